"""Whole folders: one takes another's place at once, when it is on the disk. Killed at any moment, the former one stays.

Knows folders and how this system exchanges two. Knows nothing of what is in them.

    chain               always whole: the former, then the new one
    .chain-new-k3f0…    what is being written; after the exchange the former one, until it is removed
    .chain-old-k3f0…    on systems that cannot exchange: keeps the former one between two renames
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmchain_fed.storage.own_files import behind, sync_folder, sync_tree

_NEW, _OLD = "new", "old"
_SHORT = 50  # characters of a name: the longest that a file system takes has 255 bytes
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of `directory` once it is on the disk.

    A link stays, and what it leads to is replaced; folder and files are for whom those in their place were. What a
    killed process left of an earlier attempt is put right first.

    Raises:
        OSError: It cannot be written. What was there is as it was, then and after whatever else is raised within.
    """
    directory = behind(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    put_right(directory)
    with _beside(directory, _NEW) as scratch:
        yield scratch
        _as_open_as(directory, scratch)
        sync_tree(scratch)
        if not os.path.lexists(directory):
            scratch.rename(directory)
        elif not _exchanged(scratch, directory):
            _swap(scratch, directory)
        sync_folder(directory.parent)


def put_right(directory: Path) -> None:
    """Brings the former folder back where a process was killed between two renames, and removes what others left."""
    directory = behind(directory)
    named = re.compile(rf"\.{re.escape(directory.name[:_SHORT])}-({_NEW}|{_OLD})-[0-9a-f]{{16}}")
    for path in sorted(directory.parent.iterdir()) if directory.parent.is_dir() else ():
        kind = found[1] if (found := named.fullmatch(path.name)) else None
        with suppress(OSError):  # another process is at it, or it is none of this account's
            if kind is None or path.lstat().st_uid != os.geteuid():
                continue
            with _claimed(path, sure=True):
                if kind == _OLD and not os.path.lexists(directory):
                    (path / directory.name).rename(directory)
                _remove(path)


def exchange(one: Path, other: Path) -> None:
    """Gives each of two folders of one file system the other's name: both at once where this system can.

    Raises:
        OSError: It cannot be; each has its own name still.
    """
    if _exchanged(one, other):
        return
    aside = one.with_name(f".{one.name[:_SHORT]}-{_OLD}-{secrets.token_hex(8)}")
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in ((other, aside), (one, other), (aside, one)):
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


@contextmanager
def _beside(directory: Path, kind: str) -> Iterator[Path]:
    """An empty folder that no other process removes, and that is gone afterwards."""
    made = directory.with_name(f".{directory.name[:_SHORT]}-{kind}-{secrets.token_hex(8)}")
    made.mkdir()  # with the mode that the user's umask gives a new folder
    try:
        with _claimed(made, sure=False):
            yield made
    finally:
        _remove(made)


@contextmanager
def _claimed(folder: Path, *, sure: bool) -> Iterator[None]:
    """Within, no other process takes the folder for one that a killed process left."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if sure:
                raise
        yield
    finally:
        os.close(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether this system has given each of two folders the other's name, both at once."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _swap(scratch: Path, directory: Path) -> None:
    """The same in two renames: killed between them, the former one is put right before the next is written."""
    with _beside(directory, _OLD) as old:
        former = old / directory.name
        directory.rename(former)
        try:
            scratch.rename(directory)
        except BaseException:
            former.rename(directory)
            raise


def _as_open_as(former: Path, new: Path) -> None:
    """Gives a folder, and what is in it, the group and the rights of what it will replace: a user may have set them."""
    if former.is_symlink() or not former.is_dir():
        return
    for path in (new, *new.rglob("*")):
        with suppress(FileNotFoundError):  # the former one had no such file
            was, found = (former / path.relative_to(new)).lstat(), path.lstat()
            if stat.S_IFMT(was.st_mode) != stat.S_IFMT(found.st_mode) or path.is_symlink():
                continue
            if was.st_gid != found.st_gid:
                with suppress(PermissionError):  # this account is not in that group: it was another's to give
                    os.chown(path, -1, was.st_gid)
            path.chmod(stat.S_IMODE(was.st_mode))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
