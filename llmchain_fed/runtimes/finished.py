"""Finished: whether the rounds in a folder are those of a federation's file, before anything is loaded or asked.

Knows the file, what the newest checkpoint says of itself, and a digest of the chain that it began with. Knows nothing
of weights: what those of a checkpoint mean is compared where a federation goes on (`checkpoint.resumption`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.checkpoint import files as checkpoint
from llmchain_fed.federated.checkpoint.contents import identity
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.storage.own_files import write_whole
from llmchain_fed.untrusted import Strict, checked, read_file, read_json, shown

_WHOLE = 2**26  # bytes of a file that are all read; of a larger one its size, its beginning and its end
_PART = 2**20
_MOST = 2**16


class _Chain(Strict):
    name: Annotated[str, Field(max_length=2000)]
    files: Annotated[str, Field(max_length=64)] | None = None


def check(file: FederationFile, checkpoints: Path, start: Path, *, members: str = "same") -> None:
    """Makes sure that what is there is this federation's. How many rounds it is to have may differ.

    Args:
        file: The federation.
        checkpoints: Where its checkpoints are; there is one.
        start: The file with the digest of the chain that it began with; it may be missing.
        members: "changed": with others than it had.

    Raises:
        CheckpointError: The newest checkpoint is damaged.
        ConfigError: It is another federation's.
    """
    config, there = identity(checkpoint.about(checkpoints))
    then, now = config.decisive(), file.written().decisive()
    asked = {name for name in then if members == "same" or name != "participants_per_round"}
    wrong = [
        f"{name}: {shown(repr(then[name]), 200)} there, {shown(repr(now[name]), 200)} here"
        for name in then
        if name in asked and then[name] != now[name]
    ]
    if members == "same" and sorted(there) != sorted(file.hub.sites):
        wrong.append(f"sites: {shown(', '.join(there), 200)} there, {shown(', '.join(file.hub.sites), 200)} here")
    before, here = _noted(start), chain_of(file.chain)
    gone = "files" not in here and here["name"] == before.get("name")  # its folder is not there any more
    if before and not gone and before.get("files", before.get("name")) != here.get("files", here["name"]):
        wrong.append(f"chain: {shown(file.chain, 200)} is not the one that it began with")
    if wrong:
        msg = (
            f"out: {shown(str(file.out), 300)} contains the rounds of another federation ({'; '.join(wrong)}). Choose "
            "another `out` for this one, or give the chain, sites and options of then."
        )
        raise ConfigError(msg)


def note(start: Path, chain: Mapping[str, str]) -> None:
    """Keeps which chain a federation begins with, as `chain_of` says it.

    Raises:
        OSError: It cannot be written.
    """
    if _noted(start) != chain:
        write_whole(start, json.dumps(chain) + "\n", mode=0o600)


def chain_of(chain: str) -> dict[str, str]:
    """Which chain it is, without loading it: its name, and a digest of the files where it is a folder."""
    folder, found = Path(chain), hashlib.sha256()
    name = {"name": untrusted.printable(folder.name, 300)}
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
    """What `note` wrote; nothing for a federation that was begun by an earlier version."""
    try:
        data = read_file(start, most=_MOST, what="the digest of the chain", error=ConfigError)
        found = read_json(data, most=_MOST, what="the digest of the chain", error=ConfigError)
        return dict(
            checked(_Chain, found, what="the digest of the chain", error=ConfigError).model_dump(exclude_none=True)
        )
    except ConfigError:
        return {}
