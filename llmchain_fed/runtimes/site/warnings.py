"""Warnings: what a site seldom means: files open to others, held-out examples trained on, text that may leave.

Knows files' modes, a policy and counts. Knows nothing of models or of who is told.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmchain_fed.errors import ConfigError, DataError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.messaging.frames import is_own_group
from llmchain_fed.untrusted import shown

if TYPE_CHECKING:  # they bring torch, and a path that is wrong shall be said before that is imported
    from llmchain_fed.federated.client.data import Overlap
    from llmchain_fed.runtimes.site.policy import Policy


def check_apart(written: Mapping[str, Path], read: Mapping[str, Path | None]) -> None:
    """Makes sure that nothing is written to a file that is read, or that is written for something else.

    Raises:
        ConfigError: Two options name one file.
    """
    places: dict[Path, str] = {path.resolve(): option for option, path in read.items() if path is not None}
    for option, path in written.items():
        if (other := places.setdefault(path.resolve(), option)) != option:
            msg = f"{option} and {other} both name {shown(str(path), 300)}. Give each a path of its own."
            raise ConfigError(msg)


def check_readable(path: Path, what: str) -> None:
    """Makes sure that a file can be read, before anything is done that takes long.

    Raises:
        DataError: It cannot.
    """
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                msg = f"{what} {shown(str(path), 300)} is no regular file."
                raise DataError(msg)
            file.read(1)
    except OSError as error:
        msg = f"{what} {shown(str(path), 300)} cannot be read: {error.strerror or error}."
        raise DataError(msg) from error


def of_name(name: str) -> list[str]:
    """A name that no site's certificate can have, and by which no hub will know it."""
    try:
        names.check_name(name)
    except ConfigError as error:
        return [
            f"{str(error).rstrip('.')}. The hub knows this site by its certificate's name: say --name, as in its kit"
        ]
    return []


def of_files(data: Path, held_out: Path | None, policy: Path | None) -> list[str]:
    """Examples that other accounts can read or change, and a policy that they can change."""
    found = []
    for path, what in ((data, "the training examples"), (held_out, "the held-out examples")):
        if path is not None and (how := _open_to_others(path)):
            found.append(f"other accounts can {how} {what}: chmod 600 {_quoted(path)}")
    if policy is not None and "change" in (_open_to_others(policy) or ""):
        found.append(f"other accounts can change the policy: chmod go-w {_quoted(policy)}")
    return found


def of_policy(policy: Policy) -> list[str]:
    """Options that let text of examples leave."""
    found = []
    if policy.samples:
        found.append(f"the policy lets {policy.samples:,} held-out examples leave as text (samples)")
    if policy.error_messages:
        found.append("the policy lets messages of errors leave, which can quote an example (error_messages)")
    return found


def of_examples(data: Path, held_out: Path | None, found: Overlap | None) -> list[str]:
    """Held-out examples that are also trained on."""
    if held_out is not None and held_out.samefile(data):
        return ["the held-out file is the training file: held-out loss says nothing of examples that are new"]
    return found.notes() if found is not None else []


def _open_to_others(path: Path) -> str | None:
    """What other accounts can do with a file, where every folder on its way lets them pass."""
    real = path.resolve()
    mode, group = real.stat().st_mode, real.stat().st_gid
    all_pass = all(folder.stat().st_mode & 0o001 for folder in real.parents)
    group_passes = all(folder.stat().st_mode & 0o011 for folder in real.parents) and not is_own_group(group)
    open_to = (mode & 0o007 if all_pass else 0) | (mode >> 3 & 0o007 if group_passes else 0)
    how = [word for bit, word in ((0o004, "read"), (0o002, "change")) if open_to & bit]
    return " and ".join(how) or None


def _quoted(path: Path) -> str:
    return shown(shlex.quote(str(path)), 300)
