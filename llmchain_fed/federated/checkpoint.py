"""Checkpoint: a federation after a whole round, as a folder of safetensors and JSON that is there whole or not at all.

Knows files and digests. Knows nothing of what is in them beyond names and bytes. Nothing is pickled.

    <directory>/round-000003/manifest.json            everything that is no tensor, and SHA-256 of every other file
                             global.safetensors       trainable values and the remainder's factors
                             copy.safetensors         with a broadcast codec: what participants hold
                             server.safetensors       the server optimizer's memory
                             participants/*.safetensors    where each participant stands
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llmchain_fed.errors import CheckpointError

FORMAT = 1
_MANIFEST = "manifest.json"
_FILE = re.compile(r"(participants/)?[a-z0-9]+\.safetensors")
_NAME = re.compile(r"(round-|\.former-)(\d{6,})")
_SCRATCH = ".writing-"
_FORMER = ".former-"  # what a checkpoint of the same round replaces, until the new one stands in its place
_LOST = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    round: int
    """rounds completed"""
    about: Mapping[str, Any]
    """contract, options, history and numbers: all that is JSON"""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """by file: "global", "copy", "server" """
    participants: Mapping[str, bytes] = field(repr=False)
    """name → what `personal_state` gave"""


def write(directory: Path, checkpoint: Checkpoint, *, keep: int | None) -> Path:
    """Adds a checkpoint; a process killed at any moment leaves the former ones, and this one whole or not.

    Args:
        directory: Of the federation; made if it is not there.
        checkpoint: What to write.
        keep: How many of the newest to keep; None keeps all.

    Raises:
        CheckpointError: It cannot be written; what was there is as it was.
    """
    target, former = (directory / f"{prefix}{checkpoint.round:06d}" for prefix in ("round-", _FORMER))
    scratch = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
        files = {f"{name}.safetensors": save(dict(tensors)) for name, tensors in checkpoint.tensors.items() if tensors}
        owners = {_file_of(name): name for name in checkpoint.participants}
        files |= {_file_of(name): blob for name, blob in checkpoint.participants.items()}
        for name, data in files.items():
            _write(scratch / name, data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        content = {"format": FORMAT, "round": checkpoint.round, "files": digests, "participants": owners}
        # ASCII: a text that came from elsewhere may hold half a surrogate pair, which UTF-8 has not
        text = json.dumps(content | {"about": checkpoint.about}, allow_nan=False)
        _write(scratch / _MANIFEST, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
        for folder in (scratch / "participants", scratch):
            if folder.is_dir():
                _sync(folder)
        scratch.chmod(0o700)
        if target.exists():  # of the same round: before a personal adapter was made, say
            target.rename(former)
        scratch.rename(target)
        _sync(directory)
        _sweep(directory)
        if keep is not None:
            for number in rounds(directory)[:-keep]:
                remove(directory, number)
    except _LOST as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if former.is_dir() and not target.exists():
            with contextlib.suppress(OSError):  # where it stays, it is found all the same
                former.rename(target)
        msg = f"the checkpoint of round {checkpoint.round} cannot be written to {directory}: {error}. Former ones stay."
        raise CheckpointError(msg) from error
    return target


def prepare(directory: Path) -> None:
    """Makes the directory, and makes sure that a checkpoint can be written there.

    Raises:
        CheckpointError: It cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        msg = f"no checkpoint could be written to {str(directory)!r}: {error}. Choose another checkpoint_dir."
        raise CheckpointError(msg) from error


def rounds(directory: Path) -> list[int]:
    """Which rounds there are whole checkpoints of, in order."""
    return sorted(_folders(directory))


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    found = [(m[1], int(m[2]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    # a process killed while it replaced a round leaves the former one: that counts where there is no other
    return {n: p for kind, n, p in sorted(found, key=lambda item: item[0] == "round-")}


def read(directory: Path, number: int | None = None) -> Checkpoint:
    """The checkpoint of a round, the newest by default, once every file has been found to be what was written.

    Raises:
        CheckpointError: None there, or one with a missing, truncated, altered or added file. Nothing has been changed.
    """
    folders = _folders(directory)
    there = sorted(folders)
    if not there or (number is not None and number not in there):
        what = f"no checkpoint of round {number}" if there else "no checkpoint"
        msg = f"there is {what} in {str(directory)!r}; rounds there: {', '.join(map(str, there)) or 'none'}."
        raise CheckpointError(msg)
    number = there[-1] if number is None else number
    folder = folders[number]
    others = [n for n in there if n != number]
    content = _manifest(folder, number, others)
    data: dict[str, bytes] = {}
    for name, digest in content["files"].items():
        try:
            data[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read ({error.strerror})", others) from None
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise _damaged(folder, f"{name} has changed or is cut off (SHA-256 differs)", others)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    if strangers := sorted(found - content["files"].keys() - {_MANIFEST}):
        raise _damaged(folder, f"{strangers[:3]} were not written by a federation", others)
    try:
        tensors = {
            name.removesuffix(".safetensors"): load(blob)
            for name, blob in data.items()
            if name not in content["participants"]
        }
    except (SafetensorError, ValueError) as error:
        raise _damaged(folder, f"it is no safetensors ({error!s:.200})", others) from None
    participants = {owner: data[name] for name, owner in content["participants"].items()}
    return Checkpoint(number, content["about"], tensors, participants)


def remove(directory: Path, number: int) -> None:
    """Takes a checkpoint away; killed meanwhile, it is gone or whole."""
    doomed = directory / f"{_SCRATCH}removing-{number}"
    for prefix in (_FORMER, "round-"):  # in this order: the former one must not take the other's place
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process of the same script was faster
            (directory / f"{prefix}{number:06d}").rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _manifest(folder: Path, number: int, others: list[int]) -> dict[str, Any]:
    try:
        digest, _, text = (folder / _MANIFEST).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"{_MANIFEST} cannot be read ({type(error).__name__})", others) from None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise _damaged(folder, f"{_MANIFEST} has changed or is cut off (SHA-256 differs)", others)
    try:
        content: dict[str, Any] = json.loads(text)
        if content["format"] != FORMAT or content["round"] != number:
            raise _damaged(folder, f"it is format {content['format']!r} of round {content['round']!r}", others)
        inside = all(_FILE.fullmatch(name) for name in content["files"])
        if not inside or not content["participants"].keys() <= content["files"].keys() or not content["about"]:
            raise _damaged(folder, f"{_MANIFEST} names files that no federation writes", others)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{_MANIFEST} makes no sense ({type(error).__name__}: {error})", others) from None
    return content


def _damaged(folder: Path, what: str, others: list[int]) -> CheckpointError:
    remedy = f"Pass round={others[-1]} to go on from there" if others else "There is no other one"
    return CheckpointError(f"the checkpoint {str(folder)!r} is not used: {what}. {remedy}, or copy it again.")


def _file_of(participant: str) -> str:
    """A name that no participant's can break out of."""
    return f"participants/{hashlib.sha256(participant.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Puts right what killed processes left unfinished."""
    for path in directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f"{_FORMER}*"):
        target = directory / f"round-{path.name.removeprefix(_FORMER)}"
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
