"""Where recipes lie and how their files are read: YAML as plain data, then a spec.

Knows files and YAML. Knows nothing of LangChain or of what is made out of a spec.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, TypeVar

from llmchain_fed.errors import RecipeError
from llmchain_fed.recipes.schema import NAME, ChainSpec, PromptSpec
from llmchain_fed.untrusted import printable, read_yaml

_SpecT = TypeVar("_SpecT", PromptSpec, ChainSpec)


def recipe_folder(kind: Literal["prompts", "chains"]) -> Traversable:
    """Where the recipes are: within an installed package, or beside it in a checkout."""
    packaged = files("llmchain_fed") / "_library" / kind
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    here = Path(__file__).parents[1]
    msg = f"no {kind} lie in or beside {here}, so the installation is incomplete. Reinstall llmchain-fed."
    raise RecipeError(msg)


def recipe_names(folder: Traversable) -> list[str]:
    """Names of the recipes in a folder, sorted."""
    stems = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(stem for stem in stems if NAME.fullmatch(stem))


def read_spec(kind: type[_SpecT], name: str, folder: Traversable) -> _SpecT:
    """The spec in `folder/name.yaml`, or a `RecipeError` that names the file and the remedy."""
    noun = "prompt" if kind is PromptSpec else "chain"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        msg = f"{name!r} cannot be the name of a {noun}, so no file was looked for. Use only a-z, 0-9 and _."
        raise RecipeError(msg)
    known = recipe_names(folder)
    if name not in known:
        msg = f"there is no {noun} called {name!r}. Use one of: {', '.join(known)}."
        raise RecipeError(msg)
    try:
        with as_file(folder / f"{name}.yaml") as path:
            spec = kind.from_data(read_yaml(path, what="the file", error=RecipeError, remedy=""))
        if spec.name != name:
            msg = f"`name` is {spec.name!r}, but the file is called {name!r}; make the two equal"
            raise RecipeError(msg)
    except RecipeError as error:
        why = printable(str(error), 2000).rstrip(".")
        msg = f"{noun} recipe {name}.yaml is refused, nothing was loaded: {why}. Correct the file."
        raise RecipeError(msg) from None
    return spec
