"""What the examples share: catalogues, the translating chain, the report, a tiny model."""
