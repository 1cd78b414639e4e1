"""A participant's long-lived process, its policy and what its operator reads."""
