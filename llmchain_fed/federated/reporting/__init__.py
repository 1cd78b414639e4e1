"""What people read of a federation: lines at a terminal while it runs, and a page for everyone who took part."""
