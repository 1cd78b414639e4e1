"""Results: the folders in which a federation leaves chain, history and checkpoints, and never less than before.

Knows files, locks, counts of rounds, and what of a folder tells whose federation it is: its file, what the newest
checkpoint says of itself, and a digest of the chain that it began with. Knows nothing of how rounds are run, or of
weights: what those of a checkpoint mean is compared where a federation goes on (`checkpoint.contents`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llmchain_fed.chain.saving import directory
from llmchain_fed.errors import ChainFileError, ConfigError
from llmchain_fed.federated.checkpoint import files
from llmchain_fed.federated.checkpoint.files import MAX_MANIFEST
from llmchain_fed.federated.checkpoint.schema import identity
from llmchain_fed.federated.history import History
from llmchain_fed.federated.history_file import rounds_in
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.stopping import whole
from llmchain_fed.storage import own_files, whole_folders
from llmchain_fed.tracking.status_file import FILE
from llmchain_fed.untrusted import Strict, checked, printable, read_file, read_json, shown

_LOCK = ".lock"
_START = "start.json"  # which chain it began with
_WHOLE = 2**26  # bytes of a file that are all read; of a larger one its size, its beginning and its end
_PART = 2**20
_MOST = 2**16


class Results:
    """What a federation leaves on the disk."""

    def __init__(self, out: Path, checkpoints: Path) -> None:
        self.out, self.checkpoints = out, checkpoints
        self.chain, self.history, self.status = out / "chain", out / "history.json", out / FILE
        self.start = out / _START

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other process has these folders; what a killed one left half written is put right.

        Raises:
            ConfigError: Another process has them, or they cannot be made.
        """
        with _writing(self.out), own_files.as_the_user_says():
            self.out.mkdir(parents=True, exist_ok=True)
        with _writing(self.checkpoints):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for folder in {self.out.resolve(): "out", self.checkpoints.resolve(): "checkpoint_dir"}:
                stack.enter_context(own_files.lock(folder / _LOCK, f"the folder {shown(str(folder), 300)!r}"))
            whole_folders.put_right(self.chain)
            own_files.sweep(self.history)
            own_files.sweep(self.status)
            own_files.sweep(self.start)
            yield

    @property
    def rounds(self) -> int:
        """After how many rounds a federation would go on: those of the newest checkpoint."""
        return max(files.rounds(self.checkpoints), default=0)

    def ended_early(self, file: FederationFile) -> bool:
        """Whether the rounds that are here are all that were wanted, since something that the file asks for ended it.

        Raises:
            ConfigError: The history is none of ours.
        """
        if not (file.may_end_early and self.rounds and self.history.is_file()):
            return False
        history = self.read_history()
        return len(history) == self.rounds and history.stopped_early is not None

    def is_whole(self, rounds: int) -> bool:
        """Whether chain and history are there, of no fewer rounds."""
        try:
            return rounds_in(self.history) >= rounds and bool(directory.read(self.chain))
        except ChainFileError:
            return False

    def read_history(self) -> History:
        """The rounds that were.

        Raises:
            ConfigError: The file is none of ours.
        """
        what = shown(str(self.history), 300)
        data = read_file(self.history, most=MAX_MANIFEST, what=what, error=ConfigError)
        return History.from_dict(read_json(data, most=MAX_MANIFEST, what=what, error=ConfigError), what=what)

    def check_finished(self, file: FederationFile, members: str) -> None:
        """Makes sure that the rounds that are here are of this federation, and not of another that had this folder.

        How many rounds it is to have may differ. With `members` "changed", the sites may be others than it had.

        Raises:
            CheckpointError: The newest checkpoint is damaged.
            ConfigError: They are another federation's.
        """
        config, there = identity(files.about(self.checkpoints))
        then, now = config.decisive(), file.written().decisive()
        asked = {name for name in then if members == "same" or name != "participants_per_round"}
        wrong = [
            f"{name}: {shown(repr(then[name]), 200)} there, {shown(repr(now[name]), 200)} here"
            for name in then
            if name in asked and then[name] != now[name]
        ]
        if members == "same" and sorted(there) != sorted(file.hub.sites):
            wrong.append(f"sites: {shown(', '.join(there), 200)} there, {shown(', '.join(file.hub.sites), 200)} here")
        before, here = _noted(self.start), _chain_of(file.chain)
        gone = "files" not in here and here["name"] == before.get("name")  # its folder is not there any more
        if before and not gone and before.get("files", before.get("name")) != here.get("files", here["name"]):
            wrong.append(f"chain: {shown(file.chain, 200)} is not the one that it began with")
        if wrong:
            msg = (
                f"out: {shown(str(file.out), 300)} contains the rounds of another federation ({'; '.join(wrong)}). "
                "Choose another `out` for this one, or give the chain, sites and options of then."
            )
            raise ConfigError(msg)

    def begin(self, chain: str) -> None:
        """Takes down which chain the federation begins with, unless that is the one that it leaves here.

        Raises:
            ConfigError: It cannot be written.
        """
        if not self.rounds and Path(chain) != self.chain:
            with _writing(self.out):
                _note(self.start, _chain_of(chain))

    def check(self, *, start: str) -> None:
        """Makes sure, before anything is loaded or trained, that the results to come can be left here.

        Raises:
            ConfigError: They cannot; or what is there would be replaced by less.
        """
        where, begun = shown(str(self.out), 300), self.rounds
        with _writing(self.out), tempfile.TemporaryFile(dir=self.out) as file:
            file.write(b"\0")
            file.flush()
        if (os.path.lexists(self.chain) and not directory.may_be_replaced(self.chain)) or (
            os.path.lexists(self.history) and not self.history.is_file()
        ):
            msg = f"out: {where} contains something else than a federation's chain and history. Choose another folder."
            raise ConfigError(msg)
        there = rounds_in(self.history)
        orphan = self.chain.exists() and not self.history.exists() and not begun and Path(start) != self.chain
        if there > begun or (orphan and any(self.chain.iterdir())):
            what = f"a history of {there} rounds" if there > begun else "a chain without its history"
            kept = f"of {begun} rounds" if begun else "of none"
            msg = (
                f"out: {where} contains {what}, and {shown(str(self.checkpoints), 300)!r} a checkpoint {kept}: what is "
                "there would be replaced by less. Bring the checkpoints back, move chain and history away, or choose "
                "another `out`."
            )
            raise ConfigError(msg)

    def save(self, fed: Any, chain: Any) -> None:
        """The chain for whom the user lets read it; the history, which can quote held-out examples, for nobody else.

        Raises:
            ChainFileError, ConfigError: They cannot be written; what was there is as it was.
        """
        with whole(), _writing(self.out):
            with own_files.as_the_user_says():
                chain.save(self.chain)
            if self.history.exists():
                self.history.chmod(0o600)  # of a run that was begun by an earlier version
            fed.history.save(self.history)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = (
            f"{shown(str(folder), 300)!r} cannot be written: {error.strerror or error}. What was there is as it was. "
            "Make room there, or give this account the right to write, and start again."
        )
        raise ConfigError(msg) from error


class _Chain(Strict):
    name: Annotated[str, Field(max_length=2000)]
    files: Annotated[str, Field(max_length=64)] | None = None


def _note(start: Path, chain: Mapping[str, str]) -> None:
    """Keeps which chain a federation begins with, as `_chain_of` says it."""
    if _noted(start) != chain:
        own_files.write_whole(start, json.dumps(chain) + "\n", mode=0o600)


def _chain_of(chain: str) -> dict[str, str]:
    """Which chain it is, without loading it: its name, and a digest of the files where it is a folder."""
    folder, found = Path(chain), hashlib.sha256()
    name = {"name": printable(folder.name, 300)}
    if not folder.is_absolute() or not folder.is_dir():
        return name
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(file.read(_WHOLE if size <= _WHOLE else _PART))
                if size > _WHOLE:
                    file.seek(-_PART, os.SEEK_END)
                    found.update(file.read(_PART))
    except OSError:
        return name
    return name | {"files": found.hexdigest()}


def _noted(start: Path) -> dict[str, str]:
    """What `_note` wrote; nothing for a federation that was begun by an earlier version."""
    try:
        data = read_file(start, most=_MOST, what="the digest of the chain", error=ConfigError)
        found = read_json(data, most=_MOST, what="the digest of the chain", error=ConfigError)
        return dict(
            checked(_Chain, found, what="the digest of the chain", error=ConfigError).model_dump(exclude_none=True)
        )
    except ConfigError:
        return {}
