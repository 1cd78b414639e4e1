"""Calls that are answered together: a batch's conversations, and calls that are awaited at the same time."""
