"""Runnable examples, one folder each; what several need lies in `common`. Run them from the repository: `python -m`."""
