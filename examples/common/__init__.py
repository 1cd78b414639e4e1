"""What the examples share: catalogues, the translating chain, a tiny model."""
