"""Local training and evaluation of one model on one participant's examples."""
