"""The federated half: participants, updates, aggregation and the round loop. Public names come from `llmchain_fed`."""
