"""Locks: of two processes that would write to one place, the second is refused. A lock dies with its process.

Knows flock and process ids. Knows nothing of what is locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import shown

_LONGEST = 20  # digits of a process id


@contextmanager
def lock(path: str | Path, what: str) -> Iterator[None]:
    """Within, no other process can lock the same; killed, a process locks nothing any more.

    Args:
        path: A file that is made for it, and stays; its folder must be there.
        what: Is locked, for the message, such as "the folder 'out'".

    Raises:
        ConfigError: Another process has locked it, by its id; or there can be no lock.
    """
    path = Path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    remedy = "Two at once would overwrite each other: wait until it has ended, or stop it."
    with _locked(path, flags, what, remedy) as descriptor:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise _impossible(path, what, error) from error
        yield


@contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """The same for a folder that is there, in which no file is made for it, so that nobody learns who has locked it.

    Raises:
        ConfigError: Another process has locked it; or there can be no lock.
    """
    remedy = "Nothing was changed; wait until it has ended, or stop it."
    with _locked(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, what, remedy):
        yield


@contextmanager
def _locked(path: Path, flags: int, what: str, remedy: str) -> Iterator[int]:
    import fcntl

    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise _impossible(path, what, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"{what} is in use by {_owner(descriptor)}. {remedy}"
            raise ConfigError(msg) from None
        except OSError as error:
            raise _impossible(path, what, error) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        found = os.pread(descriptor, _LONGEST + 1, 0).decode(errors="replace").strip()
    except OSError:  # a folder contains no process's id
        return "another process"
    return f"process {found}" if found.isdecimal() and len(found) <= _LONGEST else "another process"


def _impossible(path: Path, what: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{what} cannot be locked: {shown(str(path), 300)}: {error.strerror or error}. Give this account the right to "
        "write there, and room on the disk, or choose another place."
    )
