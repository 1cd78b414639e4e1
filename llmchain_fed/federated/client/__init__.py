"""A participant's side: it trains, evaluates and personalises on its own data."""
