"""Frames, channels and calls of bounded size and time between processes."""
