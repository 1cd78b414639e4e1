"""`python -m llmchain_fed.cli` is the command `llmchain-fed`."""

from llmchain_fed.cli import main

if __name__ == "__main__":
    main()
