"""The chain that a command is told by name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(name: str) -> Any:
    """A recipe by its name, or a folder that `chain.save` wrote."""
    from transformers.utils.logging import disable_progress_bar

    from llmchain_fed.chain import LLMChain
    from llmchain_fed.library import load_chain

    disable_progress_bar()  # it writes to stderr, which is for errors: a peer's goes to a log
    return LLMChain.load(name) if Path(name).is_dir() else load_chain(name)
