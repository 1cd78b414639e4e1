"""A model's folder that somebody else made, looked at before a library opens it."""
