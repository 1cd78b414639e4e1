"""What held-out examples say of all participants together, and what follows from it."""
