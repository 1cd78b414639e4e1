"""The chain that a command is told by name or folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed.errors import RecipeError
from llmchain_fed.library import recipe_folder, recipe_names
from llmchain_fed.untrusted import shown


def check(name: str, beside: Path | None = None) -> None:
    """Makes sure, before anything slow is imported, that there is such a chain.

    Its relative paths start at the folder of the file `beside`, too.

    Raises:
        RecipeError: There is none.
    """
    known = recipe_names(recipe_folder("chains"))
    if name in known or _is_folder(name):
        return
    folders = {str((folder / name).absolute()): None for folder in ([beside.parent] if beside else []) + [Path()]}
    places = " or ".join(shown(folder, 300) for folder in folders)
    msg = (
        f"the chain {shown(name, 300)!r} is neither a folder that chain.save wrote (there is no folder {places}) nor "
        f"one of the recipes {', '.join(known)}."
    )
    raise RecipeError(msg)


def _is_folder(name: str) -> bool:
    with suppress(ValueError, OSError):  # no name that a folder could have
        return Path(name).is_dir()
    return False


def load(name: str) -> Any:
    """A recipe by its name, or a folder that `chain.save` wrote.

    Raises:
        RecipeError: There is neither.
    """
    check(name)
    from transformers.utils.logging import disable_progress_bar

    from llmchain_fed.chain.llm_chain import LLMChain
    from llmchain_fed.library import load_chain

    disable_progress_bar()  # it writes to stderr, which is for errors: a peer's goes to a log
    return LLMChain.load(name) if _is_folder(name) else load_chain(name)
