"""Composed chains: finding the model that they hold, and what it reads and should answer in each of their steps."""
