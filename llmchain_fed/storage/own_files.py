"""Files that a command writes for its account alone, and the few that others may read; whole or not at all.

Knows the process's umask, how a file takes another's place, and locks: of two processes that would write to one place,
the second is refused, and a lock dies with its process. Knows nothing of what the files are. The umask is the whole
process's, threads included: a command sets it once, before it starts any.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import shown

PRIVATE = 0o077
_LONGEST = 20  # digits of a process id
_SHORT = 50  # characters of a name: the longest that a file system takes has 255 bytes
_users: list[int] = []  # the umask that the user came with, while a command runs


@contextmanager
def for_this_account_alone() -> Iterator[None]:
    """Within, no other account can read or write what is made: a history and a log can quote examples."""
    former = os.umask(PRIVATE)
    _users.append(former if not _users else _users[0])
    try:
        yield
    finally:
        _users.pop()
        os.umask(former)


@contextmanager
def as_the_user_says() -> Iterator[None]:
    """Within it, what is made has the modes that the user's own umask gives: a chain is there to be handed on."""
    former = os.umask(_users[-1]) if _users else None
    try:
        yield
    finally:
        if former is not None:
            os.umask(former)


def write_whole(path: str | Path, content: str | bytes, *, mode: int = 0o666, follow: bool = False) -> None:
    """Writes a file that takes the former one's place only when it is on the disk; else the former one stays.

    Args:
        path: Which; its folder must be there.
        content: All of it; a text is written as UTF-8.
        mode: Permissions, of which the umask takes its part: 0o600 is for this account alone.
        follow: Whether a link of this account's stays, and what it leads to is replaced; else the link is.

    Raises:
        OSError: It cannot be written; nothing has changed.
    """
    path = behind(Path(path)) if follow else Path(path)
    scratch = path.with_name(f".{path.name[:_SHORT]}-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(scratch, flags, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    sync_folder(path.parent)


def sweep(path: str | Path) -> None:
    """Removes what killed processes left beside a file that they wrote; no other process may be writing it now."""
    path = behind(Path(path))
    left = re.compile(rf"\.{re.escape(path.name[:_SHORT])}-[0-9a-f]{{16}}")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if left.fullmatch(other.name):
            with suppress(OSError):
                other.unlink()


def behind(path: Path) -> Path:
    """What is to be replaced: where a link leads that this account made. One that is another's is replaced itself."""
    path = path.absolute()
    with suppress(OSError):
        if path.is_symlink() and path.lstat().st_uid == os.geteuid():
            return path.resolve()
    return path


def sync_folder(folder: Path) -> None:
    """Puts on the disk which names a folder contains, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Puts a file, or a folder and all in it, on the disk: a rename alone can outlive their contents.

    Raises:
        OSError: One cannot be written.
    """
    for each in (path, *path.rglob("*")):
        if (each.is_file() or each.is_dir()) and not each.is_symlink():
            descriptor = os.open(each, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot
                    raise
            finally:
                os.close(descriptor)


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
