"""The hub's side: who takes part, what is asked of whom, and what becomes of the answers."""
