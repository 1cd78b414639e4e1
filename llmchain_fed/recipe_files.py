"""Where recipes lie and how their files are read: YAML as plain data, then a spec.

Knows files and YAML. Knows nothing of LangChain or of what is made out of a spec.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from llmchain_fed.errors import RecipeError
from llmchain_fed.recipes import NAME, ChainSpec, PromptSpec

_SpecT = TypeVar("_SpecT", PromptSpec, ChainSpec)


def recipe_folder(kind: Literal["prompts", "chains"]) -> Traversable:
    """Where the recipes are: within an installed package, or beside it in a checkout."""
    packaged = files("llmchain_fed") / "_library" / kind
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    here = Path(__file__).parent
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
        spec = kind.from_data(_plain_data((folder / f"{name}.yaml").read_text(encoding="utf-8")))
        if spec.name != name:
            msg = f"`name` is {spec.name!r}, but the file is called {name!r}; make the two equal"
            raise RecipeError(msg)
    except (RecipeError, yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{noun} recipe {name}.yaml is refused, nothing was loaded: {error}. Correct the file."
        raise RecipeError(msg) from None
    return spec


def _plain_data(text: str) -> object:
    """YAML as plain data; a key given twice is refused, where `yaml.safe_load` would keep the last."""
    data = yaml.safe_load(text)
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
                msg = f"`{repeated[0]}` is given twice; keep one"
                raise RecipeError(msg)
            nodes += [value for _, value in node.value]
    return data
