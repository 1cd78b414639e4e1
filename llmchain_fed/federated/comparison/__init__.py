"""Did federating help? Several ways to train on the same examples, measured on the same held-out texts."""
