"""Rows out of whatever examples come in: files, frames, data sets, lists."""
