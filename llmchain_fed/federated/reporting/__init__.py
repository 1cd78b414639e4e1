"""What a person at a terminal reads of a federation while it runs."""
