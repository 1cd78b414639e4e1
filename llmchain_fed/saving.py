"""A chain as a directory: a declarative `chain.yaml` and safetensors files, nothing that can run.

Knows files and digests. Knows nothing of LangChain, what the prompt and the parser mean is `chain`'s business, nor how
a model is stored, which is `saved_model`'s.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from llmchain_fed import saved_model
from llmchain_fed.errors import ChainFileError
from llmchain_fed.model import LocalModel
from llmchain_fed.recipes import PromptData
from llmchain_fed.saved_adapter import Strict
from llmchain_fed.saved_model import CHANGES, FOLDERS, ModelData

RECIPE = "chain.yaml"
_OURS = (CHANGES, *FOLDERS)


class ChainFile(Strict):
    """`chain.yaml`: everything but the weights."""

    format: Literal[3] = 3
    llmchain_fed: str
    """the version that wrote it"""
    face: Literal["llm", "chat"]
    options: dict[str, Any]
    llm_kwargs: dict[str, Any]
    prompt: PromptData
    parser: str
    model: ModelData
    files: dict[str, str]
    """path within the directory → SHA-256 of its content"""


def write(directory: Path, model: LocalModel, **parts: Any) -> None:
    """Writes the whole directory or leaves what was there before.

    Raises:
        ChainFileError: The directory holds something else than a chain.
    """
    if directory.exists() and not _may_be_replaced(directory):
        msg = (
            f"{str(directory)!r} holds something else than a chain, so it is not overwritten. Choose another directory."
        )
        raise ChainFileError(msg)
    with _replaced(directory) as scratch, model.exclusive():
        data = saved_model.write(model, scratch)
        for name in _files(scratch):
            (scratch / name).chmod(0o644)  # safetensors writes 0600, which a web server's user could not read
        files = {name: _digest(scratch / name) for name in _files(scratch)}
        text = _dumped(ChainFile(model=data, files=files, llmchain_fed=_version(), **parts))
        (scratch / RECIPE).write_text(text, encoding="utf-8")


def check(**parts: Any) -> None:
    """Makes sure that the parts of a chain beside its model can be written as data.

    Raises:
        ChainFileError: They hold more.
    """
    try:
        data = {name: part.model_dump() if isinstance(part, BaseModel) else part for name, part in parts.items()}
        yaml.safe_dump(data)
    except yaml.YAMLError as error:
        msg = f"the chain's options or llm_kwargs hold more than data ({error}), which no file can. Leave that out."
        raise ChainFileError(msg) from None


def _dumped(file: ChainFile) -> str:
    data = file.model_dump()
    check(**data)
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _version() -> str:
    return importlib.metadata.version("llmchain-fed")


def _may_be_replaced(directory: Path) -> bool:
    """An empty directory, or one with a chain and nothing of the user's beside it."""
    if not directory.is_dir() or {p.name for p in directory.iterdir()} - {RECIPE, *_OURS}:
        return False
    try:
        return not any(directory.iterdir()) or bool(_parse(directory / RECIPE))
    except ChainFileError:
        return False


def _files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        if directory.exists():
            old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
            directory.rename(old / directory.name)
            try:
                scratch.rename(directory)
            except BaseException:
                (old / directory.name).rename(directory)
                raise
            shutil.rmtree(old)
        else:
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(directory: Path) -> ChainFile:
    """`chain.yaml`, once every file it lists has been found and has its content.

    Raises:
        ChainFileError: Not a chain directory, or one that is incomplete or altered.
    """
    file = _parse(directory / RECIPE)
    for name, digest in file.files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            msg = f"{name!r} is missing from {str(directory)!r}. Copy the whole directory again."
            raise ChainFileError(msg)
        if _digest(path) != digest:
            msg = (
                f"{name!r} has changed since the chain was saved (SHA-256 differs), so it is not loaded. "
                "Copy or save it again."
            )
            raise ChainFileError(msg)
    # what is not listed was not checked; a note of the user's beside chain.yaml is never read
    if unlisted := [n for n in _files(directory) if n.partition("/")[0] in _OURS and n not in file.files]:
        msg = f"{unlisted[:3]} in {str(directory)!r} were not written by save(), so nothing is loaded. Remove them."
        raise ChainFileError(msg)
    return file


def _parse(recipe: Path) -> ChainFile:
    if not recipe.is_file():
        msg = (
            f"there is no {RECIPE} in {str(recipe.parent)!r}, so this is no saved chain. Give the directory "
            "that save() wrote."
        )
        raise ChainFileError(msg)
    try:
        return ChainFile.model_validate(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        msg = f"{recipe} is not what save() writes: {error}. Save the chain again; a chain file holds data only."
        raise ChainFileError(msg) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
