"""What keeps an engine running for months: its parent, what the parent is told, and what it tidies up."""
