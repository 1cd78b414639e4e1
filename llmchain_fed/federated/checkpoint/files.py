"""Checkpoint: a federation after a whole round, as a folder of safetensors and JSON that is there whole or not at all.

Knows files, digests and sizes. Knows nothing of what is in them beyond names and bytes. Nothing is pickled. The digests
find damage and not an attacker, who writes them anew: what is read is bounded here, and means nothing until `contents`
and `fitting` have looked at it.

    <directory>/round-000003/manifest.json            everything that is no tensor, and SHA-256 of every other file
                             global.safetensors       trainable values and the remainder's factors
                             copy.safetensors         with a broadcast codec: what participants have
                             server.safetensors       the server optimizer's memory
                             participants/*.safetensors    where each participant stands
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llmchain_fed.errors import CheckpointError
from llmchain_fed.federated.history_file import MOST_PARTICIPANTS, Name
from llmchain_fed.stopping import whole
from llmchain_fed.untrusted import Strict, checked, decoding, parse_json, read_file, read_safetensors_header, shown
from llmchain_fed.untrusted.text import machine_memory, reason

FORMAT = 1
MANIFEST = "manifest.json"
_PEOPLE = "participants"
_TENSORS = r"(?:global|copy|server)\.safetensors"
_FILE = re.compile(rf"{_TENSORS}|{_PEOPLE}/[0-9a-f]{{32}}\.safetensors")
_NAME = re.compile(r"(round-|\.former-)(\d{6,15})")
MAX_MANIFEST = 64 * 2**20  # bytes: a history of some 150,000 trainings, or a million of those who were not asked
_SCRATCH = ".writing-"
_FORMER = ".former-"  # what a checkpoint of the same round replaces, until the new one stands in its place
_LOST = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint contains."""

    round: int
    """rounds completed"""
    about: Mapping[str, Any]
    """contract, options, history and numbers: all that is JSON"""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """by file: "global", "copy", "server" """
    participants: Mapping[str, bytes] = field(repr=False)
    """name → what `personal_state` gave"""
    folder: Path | None = None
    """where it was read"""
    others: tuple[int, ...] = ()
    """rounds that there are beside it"""

    def unusable(self, what: str) -> CheckpointError:
        """The error for one whose content is none, with the way out."""
        return CheckpointError(f"{self.where}: {what}. {self.remedy}")

    @property
    def where(self) -> str:
        """Which it is, for a message."""
        return f"the checkpoint {shown(str(self.folder), 300)!r} is not used"

    @property
    def remedy(self) -> str:
        """What to do instead of using it."""
        if not self.others:
            return "There is no other one: copy it again from where it is whole."
        return f"Pass round={self.others[-1]} to go on from there, or copy it again."


@dataclass(frozen=True)
class FileSizes:
    """Sizes beyond which a file cannot be of the federation that reads it."""

    file: int = 2**48
    """bytes of one file of tensors; all together never have more than the machine has memory"""
    header: int = 2**24
    """bytes of its header"""


class _Manifest(Strict):
    """All of `manifest.json`."""

    format: int
    round: int
    files: Annotated[dict[str, str], Field(max_length=MOST_PARTICIPANTS + 3)]
    """name → SHA-256"""
    participants: Annotated[dict[str, Name], Field(max_length=MOST_PARTICIPANTS)]
    """file → whose"""
    about: Annotated[dict[str, Any], Field(max_length=100)]


@whole()
def write(directory: Path, checkpoint: Checkpoint, *, keep: int | None, spare: int | None = None) -> Path:
    """Adds a checkpoint; a process killed at any moment leaves the former ones, and this one whole or not.

    The folder is made if it is not there; of all rounds the `keep` newest and `spare` stay, None keeps all.

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
        # ASCII: a text that came from elsewhere may contain half a surrogate pair, which UTF-8 has not
        text = json.dumps(content | {"about": checkpoint.about}, allow_nan=False)
        if len(text) + 65 > MAX_MANIFEST:
            raise ValueError(f"history and options have {len(text):,} bytes, more than could be read again")  # noqa: EM102
        _write(scratch / MANIFEST, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
        for folder in (scratch / _PEOPLE, scratch):
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
                if number != spare:
                    remove(directory, number)
    except _LOST as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if former.is_dir() and not target.exists():
            with contextlib.suppress(OSError):  # where it stays, it is found all the same
                former.rename(target)
        msg = (
            f"the checkpoint of round {checkpoint.round} cannot be written to {shown(str(directory), 300)}: "
            f"{reason(error)}. Former ones stay. Make room there, or give this account the right to write."
        )
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
        msg = f"no checkpoint could be written to {str(directory)!r}: {reason(error)}. Choose another checkpoint_dir."
        raise CheckpointError(msg) from error


def rounds(directory: Path) -> list[int]:
    """Which rounds there are whole checkpoints of, in order."""
    return sorted(_folders(directory))


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    named = [(m[1], int(m[2]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name))]
    # a link would lead out of the directory: no federation makes one
    found = [(k, n, p) for k, n, p in named if p.name == f"{k}{n:06d}" and p.is_dir() and not p.is_symlink()]
    # a process killed while it replaced a round leaves the former one: that counts where there is no other
    return {n: p for kind, n, p in sorted(found, key=lambda item: item[0] == "round-")}


def read(directory: Path, number: int | None = None, limits: FileSizes | None = None) -> Checkpoint:
    """The checkpoint of a round, the newest by default, once every file has been found to be what was written.

    No link is followed within it, and of a file that is larger than `limits` nothing is read; without them files are
    what fits into memory.

    Raises:
        CheckpointError: None there, or one with a missing, truncated, altered, oversized or added file. Nothing has
            been changed.
    """
    folders = _folders(directory)
    there = sorted(folders)
    if not there or (number is not None and number not in there):
        what = f"no checkpoint of round {shown(number)}" if there else "no checkpoint"
        kept = ", ".join(map(str, there[-20:])) or "none"
        msg = f"there is {what} in {shown(str(directory), 300)!r}; rounds there: {kept}."
        raise CheckpointError(msg)
    number = there[-1] if number is None else number
    folder, others = folders[number], tuple(n for n in there if n != number)
    try:
        return _read(folder, number, others, limits or FileSizes())
    except MemoryError:
        raise _damaged(folder, "it does not fit into memory", others) from None


def about(directory: Path, number: int | None = None) -> Mapping[str, Any]:
    """All JSON of a round's checkpoint, by default the newest's, which is there.

    Raises:
        CheckpointError: The manifest is damaged.
    """
    folders = _folders(directory)
    number = max(folders) if number is None else number
    return _manifest(folders[number], number, tuple(n for n in rounds(directory) if n != number)).about


def _read(folder: Path, number: int, others: tuple[int, ...], limits: FileSizes) -> Checkpoint:
    content = _manifest(folder, number, others)
    if (folder / _PEOPLE).is_symlink():
        raise _damaged(folder, f"{_PEOPLE} is a link that leads elsewhere", others)
    known = {MANIFEST, *content.files}
    if strangers := list(itertools.islice((p for p in _inside(folder) if p not in known), 3)):
        raise _damaged(folder, f"{shown(strangers, 300)} were not written by a federation", others)
    sizes = {name: path.stat().st_size for name in content.files if (path := folder / name).is_file()}
    if sum(sizes.values()) > machine_memory():
        largest = max(sizes, key=lambda name: sizes[name])
        msg = f"its files do not fit into memory, {largest} with {sizes[largest]:,} bytes"
        raise _damaged(folder, msg, others)
    data: dict[str, bytes] = {}
    for name, digest in content.files.items():
        data[name] = _file(folder, name, limits.file, others)
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise _damaged(folder, f"{name} has changed or is cut off (SHA-256 differs)", others)
    tensors = {}
    for name in content.files.keys() - content.participants.keys():
        try:
            read_safetensors_header(data[name], max_header=limits.header, what=name, error=CheckpointError)
            with decoding(name, CheckpointError):
                tensors[name.removesuffix(".safetensors")] = load(data[name])
        except CheckpointError as error:
            raise _damaged(folder, f"it is no safetensors of ours: {str(error).rstrip('.')}", others) from None
    participants = {owner: data[name] for name, owner in content.participants.items()}
    return Checkpoint(number, content.about, tensors, participants, folder, others)


def _inside(folder: Path) -> Iterator[str]:
    """All there is but folders, by its path within; no link is followed."""
    waiting = [folder]
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:  # deeper than a path can be: what stands above it has been told, or is empty folders
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path).relative_to(folder).as_posix()


def remove(directory: Path, number: int) -> None:
    """Takes a checkpoint away; killed meanwhile, it is gone or whole."""
    doomed = directory / f"{_SCRATCH}removing-{number}"
    for prefix in (_FORMER, "round-"):  # in this order: the former one must not take the other's place
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process of the same script was faster
            (directory / f"{prefix}{number:06d}").rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _manifest(folder: Path, number: int, others: tuple[int, ...]) -> _Manifest:
    data = _file(folder, MANIFEST, MAX_MANIFEST, others)
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise _damaged(folder, f"{MANIFEST} has changed or is cut off (SHA-256 differs)", others)
    del data
    try:
        found = parse_json(text, most=MAX_MANIFEST, what=MANIFEST, error=CheckpointError)
        if isinstance(found, dict) and (found.get("format"), found.get("round")) != (FORMAT, number):
            what = f"{MANIFEST} says format {shown(found.get('format'))} of round {shown(found.get('round'))}"
            raise CheckpointError(what)
        content = checked(_Manifest, found, what=MANIFEST, error=CheckpointError)
        inside = all(_FILE.fullmatch(name) for name in content.files)
        people = {name for name in content.files if name.startswith(f"{_PEOPLE}/")}
        owned = all(name == _file_of(owner) for name, owner in content.participants.items())
        if not inside or not owned or people != content.participants.keys() or not content.about:
            msg = f"{MANIFEST} names files that no federation writes"
            raise CheckpointError(msg)
    except CheckpointError as error:
        raise _damaged(folder, str(error).rstrip("."), others) from None
    return content


def _file(folder: Path, name: str, most: int, others: tuple[int, ...]) -> bytes:
    try:
        return read_file(folder / name, most=most, what=name, error=CheckpointError, follow=False)
    except CheckpointError as error:
        raise _damaged(folder, str(error).rstrip("."), others) from None


def _damaged(folder: Path, what: str, others: tuple[int, ...]) -> CheckpointError:
    return Checkpoint(0, {}, {}, {}, folder, others).unusable(what)


def _file_of(participant: str) -> str:
    """A name that no participant's can break out of."""
    return f"{_PEOPLE}/{hashlib.sha256(participant.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)  # whatever the umask: it contains what a history quotes, and weights that were not released
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
