"""A chain as a directory: a declarative `chain.yaml` and safetensors files, nothing that can run.

Knows files and digests. Knows nothing of LangChain, what the prompt and the parser mean is `chain`'s business, nor how
a model is stored, which is `saved_model`'s.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from llmchain_fed.chain.saving import adapter as saved_adapter
from llmchain_fed.chain.saving import fields
from llmchain_fed.chain.saving import model as saved_model
from llmchain_fed.chain.saving import tokenizer as saved_tokenizer
from llmchain_fed.chain.saving.fields import ModelData
from llmchain_fed.chain.saving.model import CHANGES, FOLDERS
from llmchain_fed.errors import ChainFileError, ConfigError, RecipeError
from llmchain_fed.model.folder import files as folder_files
from llmchain_fed.model.folder import settings, weights
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.recipes.schema import LabelsData, PromptData
from llmchain_fed.storage.whole_folders import replaced
from llmchain_fed.untrusted import Strict, checked, dump_yaml, read_yaml, shown

RECIPE = "chain.yaml"
_OURS = (CHANGES, *FOLDERS)


class ChainFile(Strict):
    """`chain.yaml`: everything but the weights."""

    format: Literal[3] = 3
    llmchain_fed: Annotated[str, Field(max_length=100)]
    """the version that wrote it"""
    face: Literal["llm", "chat"]
    options: Annotated[dict[str, Any], Field(max_length=1000)]
    llm_kwargs: Annotated[dict[str, Any], Field(max_length=1000)]
    prompt: PromptData
    parser: Annotated[str, Field(max_length=100)] | LabelsData
    model: ModelData
    files: Annotated[dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(max_length=100_000)]
    """path within the directory → SHA-256 of its content"""


@contextmanager
def refusing() -> Iterator[None]:
    """What the data of `chain.yaml` cannot mean is this file's error.

    Raises:
        ChainFileError: Inside, an option, a prompt or a parser was refused.
    """
    try:
        yield
    except (ConfigError, RecipeError) as error:
        msg = f"{RECIPE}: {shown(str(error), 500)}. Only save() writes it; save the chain again."
        raise ChainFileError(msg) from None


def write(directory: Path, model: LocalModel, **parts: Any) -> None:
    """Writes the whole directory or leaves what was there before: there is no moment without a whole chain.

    Raises:
        ChainFileError: The directory contains something else than a chain, or cannot be written.
    """
    if directory.exists() and not may_be_replaced(directory):
        msg = (
            f"{str(directory)!r} contains something else than a chain and is not overwritten. Choose another directory."
        )
        raise ChainFileError(msg)
    with _writable(directory), replaced(directory) as scratch, model.exclusive():
        data = saved_model.write(model, scratch)
        found = _check_files(scratch)
        files = {name: _digest(scratch / name) for name in found}
        version = importlib.metadata.version("llmchain-fed")
        text = _dumped(ChainFile(model=data, files=files, llmchain_fed=version, **parts).model_dump())
        (scratch / RECIPE).write_text(text, encoding="utf-8")
        mode = (scratch / RECIPE).stat().st_mode & 0o666  # what the user's umask makes of a new file
        for name in found:
            (scratch / name).chmod(mode)  # safetensors writes 0600, which a web server's user could not read


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """What the disk refuses within is an error of our tree, in the words of the system."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers are written in Rust, whose errors say the number: "(os error 28)"
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d{1,4})\)", str(error))):
            number = int(found[1])
        if number is None:
            raise
        msg = (
            f"the chain cannot be written to {shown(str(directory), 300)!r}: {os.strerror(number)}. What was there is "
            "as it was. Make room there, or give this account the right to write, and save it again."
        )
        raise ChainFileError(msg) from error


def check(**parts: Any) -> None:
    """Makes sure that the parts of a chain beside its model can be written as data.

    Raises:
        ChainFileError: They contain more.
    """
    _dumped({name: part.model_dump() if isinstance(part, BaseModel) else part for name, part in parts.items()})


def _dumped(data: dict[str, Any]) -> str:
    return dump_yaml(
        data,
        what=f"the chain's {RECIPE}, with its prompt, options and llm_kwargs,",
        error=ChainFileError,
        remedy="Leave out what is no text, number, list or mapping of these, and examples beyond a megabyte of text.",
    )


def may_be_replaced(directory: Path) -> bool:
    """Whether a chain may take its place: it is empty, or contains a chain and nothing of the user's beside it."""
    if not directory.is_dir() or {p.name for p in directory.iterdir()} - {RECIPE, *_OURS}:
        return False
    try:
        return not any(directory.iterdir()) or bool(_parse(directory / RECIPE))
    except ChainFileError:
        return False


def _check_files(directory: Path) -> list[str]:
    """Paths within the directory, once every file is one that `save` writes, containing the kind of data it writes."""
    found = _files(directory)
    _check_names(found)
    settings.check_saved(directory, error=ChainFileError)
    settings.check_tokenizer(directory / saved_tokenizer.FOLDER, remedy=SAVE_AGAIN, error=ChainFileError)
    if (adapter := directory / saved_adapter.FOLDER).is_dir():
        fields.read_settings(adapter)
    for name in found:
        if name.endswith(".safetensors"):
            weights.headers(directory / name, error=ChainFileError)
    weights.check_index(directory / saved_model.BASE, error=ChainFileError)
    return found


def _check_names(found: list[str]) -> None:
    folder_files.check_written((n for n in found if n != CHANGES), error=ChainFileError)


def _files(directory: Path) -> list[str]:
    """Ours alone: a note of the user's beside chain.yaml is never read."""
    found = []
    for name in _OURS:
        path = directory / name
        if path.is_dir() or path.is_symlink():
            found += [f"{name}/{inner}" for inner in folder_files.plain_files(path, error=ChainFileError)]
        elif path.is_file():
            found.append(name)
    return sorted(found)


def read(directory: Path) -> ChainFile:
    """`chain.yaml`, once every file it lists has been found and has its content.

    Raises:
        ChainFileError: Not a chain directory, or one that is incomplete or altered.
    """
    file = _parse(directory / RECIPE)
    found = _files(directory)
    if missing := sorted(file.files.keys() - set(found)):
        msg = f"{shown(missing[0], 300)!r} is missing from {str(directory)!r}. Copy the whole directory again."
        raise ChainFileError(msg)
    # what is not listed was not checked
    if unlisted := [n for n in found if n not in file.files]:
        msg = (
            f"{shown(unlisted[:3], 300)} in {shown(str(directory), 300)!r} were not written by save(), so nothing is "
            "loaded. Remove them."
        )
        raise ChainFileError(msg)
    _check_names(found)  # before any of them is opened
    for name, digest in file.files.items():
        if _digest(directory / name) != digest:
            msg = (
                f"{shown(name, 300)!r} has changed since the chain was saved (SHA-256 differs), so it is not loaded. "
                "Copy or save it again."
            )
            raise ChainFileError(msg)
    _check_files(directory)  # whoever made the directory made the digests
    return file


def _parse(recipe: Path) -> ChainFile:
    if not recipe.is_file():
        msg = (
            f"there is no {RECIPE} in {str(recipe.parent)!r}, so this is no saved chain. Give the directory "
            "that save() wrote."
        )
        raise ChainFileError(msg)
    if recipe.is_symlink():
        msg = f"{str(recipe)!r} is a link, and links are not followed. {SAVE_AGAIN}"
        raise ChainFileError(msg)
    found = read_yaml(recipe, what="the file", error=ChainFileError, remedy=SAVE_AGAIN)
    return checked(ChainFile, found, what=shown(str(recipe), 300), error=ChainFileError, remedy=SAVE_AGAIN)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
