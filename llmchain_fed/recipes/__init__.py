"""Prompts and chains as data: what a file may say, and where it lies."""
