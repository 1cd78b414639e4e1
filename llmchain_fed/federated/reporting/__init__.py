"""What people read of a federation: at a terminal while it runs, in tables and plots."""
