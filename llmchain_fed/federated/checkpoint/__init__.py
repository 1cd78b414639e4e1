"""A federation as a folder after a whole round, and a federation out of such a folder."""
