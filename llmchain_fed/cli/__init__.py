"""The command `llmchain-fed`: a module a group of commands, put together in `__main__`."""
