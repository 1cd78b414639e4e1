"""Frames: a JSON head and a body as one piece of bytes, and the UNIX sockets they go through on one machine.

Knows bytes, sockets and who owns files; no torch, because the engine's own processes import this. Knows nothing of what
a frame means. No pickle: heads are JSON, bodies are opaque. A socket and its key can be used by the operator's own
account alone, and neither side talks to one that another account could have put there.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.messaging.channel import HANDSHAKE, Channel, Listener, which

SLICE = 16 * 2**20  # bytes: larger bodies travel in slices, so that no process on the way has them whole
INLINE = 2**18  # bytes: a shorter answer comes with the news that it is there
_MAX_HEAD = 2**17  # bytes
MAX_ORDER = 2**22  # bytes of a head that names nodes: of some 100,000
MAX_FRAME = SLICE + _MAX_HEAD + 4
MAX_OUTER = MAX_FRAME + MAX_ORDER + 4  # a frame within a frame: between driver and bridge, bridge and peer
_LONGEST_PATH = 100  # bytes: what fits a UNIX socket's address, less some room
_KEY = 32  # bytes
_BEGINNING = 5.0  # seconds to wait for another process that begins to listen at the same path
TRANSFER = 60.0  # seconds a frame may take through a socket, and its answer to come: a poll waits for less


class SilentError(TransportError):
    """Somebody listens there, and says nothing: a process that is stopped, or has no time."""


def pack(head: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """4 bytes of length, the JSON head, the body."""
    text = json.dumps(head, allow_nan=False).encode()
    return b"".join((len(text).to_bytes(4, "big"), text, body))


def read(frame: bytes | memoryview, *, most: int = _MAX_HEAD) -> tuple[dict[str, Any], memoryview]:
    """The reverse of `pack`; the body is a view. A head has `most` bytes at most.

    Raises:
        TransportError: It is no frame.
    """
    size = int.from_bytes(frame[:4], "big")
    what = f"the head of a frame of {len(frame):,} bytes"
    if len(frame) < 4 or size > len(frame) - 4:
        msg = f"a frame of {len(frame):,} bytes cannot be read (too short for its head)."
        raise TransportError(msg)
    rest = memoryview(frame)[4:]
    return untrusted.read_json(rest[:size], most=most, what=what, error=TransportError), rest[size:]


# --- sockets --------------------------------------------------------------------------------------------------------


def key_path(path: Path) -> Path:
    """Where the key of a socket lies."""
    return path.with_name(path.name + ".key")


def listen(path: str | Path) -> Listener:
    """A listening socket at `path`, with a fresh key beside it; both for this account alone.

    One process at a time takes the socket's name, then the key replaces a former one at once, and only then is anybody
    heard. So whoever connects finds the key that goes with the socket, or nobody.

    Raises:
        ConfigError: The path is too long, its folder is missing, not writable, or open to other accounts, or somebody
            listens there.
    """
    path = Path(path).absolute()
    if (size := len(os.fsencode(path))) > _LONGEST_PATH:
        msg = f"a socket's path has at most {_LONGEST_PATH} bytes, {path} has {size}. Use /run or /tmp."
        raise ConfigError(msg)
    if problem := _open_to_others(path.parent):
        msg = f"cannot listen at {path}: {problem}. Use a folder that only this account can write to."
        raise ConfigError(msg)
    try:
        with _alone(path):
            return _listen(path)
    except OSError as error:
        msg = f"cannot listen at {path}: {untrusted.reason(error)}. Its folder must exist and be writable."
        raise ConfigError(msg) from error


def _listen(path: Path) -> Listener:
    key, listening = secrets.token_bytes(_KEY), socket.socket(socket.AF_UNIX)
    try:
        if path.exists() or path.is_symlink():
            _make_room(path)
        former = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(former)
        files = [(path, which(path)), (key_path(path), _write_key(key_path(path), key))]
        listening.listen(64)
    except BaseException:
        listening.close()
        raise
    return Listener(listening, path, key, files)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of processes that begin to listen at one path at once, one after the other: each finds what the former left."""
    lock = path.with_name(path.name + ".lock")
    until = time.monotonic() + _BEGINNING
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.geteuid():
                msg = f"{lock.name} is another account's"
                raise OSError(msg)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                break  # else whoever had it has removed it meanwhile
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _make_room(path: Path) -> None:
    """Removes a socket that a killed process left."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        msg = f"{path} is there and is no socket. Choose another path: nothing is overwritten."
        raise ConfigError(msg)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):  # it listens, and does not come to accepting
            pass
    msg = f"somebody listens at {path} already. Stop that process or choose another socket."
    raise ConfigError(msg)


def _write_key(path: Path, key: bytes) -> tuple[int, int]:
    """Puts the key there whole, in place of a former one; returns which file that is."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        made = which(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    return made


def dial(path: str | Path, seconds: float = HANDSHAKE) -> Channel:
    """A connection to whoever listens at `path`, within so many seconds.

    Raises:
        SilentError: Somebody listens there, and does not answer.
        TransportError: Nobody does, or with another key, or somebody whom another account could have put there.
    """
    path = Path(path).absolute()
    for last in (False, True):
        try:
            return _dial(path, seconds)
        except AuthenticationError as error:
            if last:
                msg = f"nobody answers at {path} ({untrusted.reason(error)})."
                raise TransportError(msg) from error
            time.sleep(0.05)  # a peer that starts anew just now has put another key there
        except (TimeoutError, BlockingIOError) as error:  # the latter where those who wait to be heard are too many
            msg = f"the process that listens at {path} has been silent for {seconds:.0f} s."
            raise SilentError(msg) from error
        except (OSError, EOFError, ValueError) as error:
            msg = f"nobody answers at {path} ({untrusted.reason(error)})."
            raise TransportError(msg) from error
    raise AssertionError  # pragma: no cover (the second attempt returns or raises)


def _dial(path: Path, seconds: float) -> Channel:
    key = _read_key(path)
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(seconds)
        connected.connect(str(path))
        channel = Channel(connected)
        channel.check_account()
        channel.introduce(key, seconds)
    except BaseException:
        connected.close()
        raise
    return channel


def _read_key(path: Path) -> bytes:
    """The key beside a socket, once it is certain that both are this account's."""
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode):
        msg = "it is no socket"
        raise OSError(msg)
    descriptor = os.open(key_path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        kept = os.fstat(descriptor)
        key = file.read(_KEY + 1) if stat.S_ISREG(kept.st_mode) else b""
    own = found.st_uid == kept.st_uid == os.geteuid()
    problem = None if own else "socket and key do not both belong to this account"
    if problem is None and (kept.st_mode & 0o077 or found.st_mode & 0o077):
        problem = "socket or key is open to other accounts"
    problem = problem or _open_to_others(path.parent)
    if problem is None and len(key) != _KEY:
        problem = "what lies beside it is no key"
    if problem is not None:
        raise AuthenticationError(problem)
    return key


def _open_to_others(folder: Path) -> str | None:
    """Why another account could put a file of its own into this folder's place for one of ours, if it could."""
    try:
        real = folder.resolve(strict=True)
        for place in (real, *real.parents):
            found = place.stat()
            if found.st_uid not in (os.geteuid(), 0):
                return f"{place} belongs to another account"
            writable = found.st_mode & 0o002 or (found.st_mode & 0o020 and not is_own_group(found.st_gid))
            if writable and not found.st_mode & stat.S_ISVTX:
                return f"other accounts can write to {place}"
    except (OSError, RuntimeError):
        return None  # that it is missing is told by who opens something there
    return None


def is_own_group(number: int) -> bool:
    """Whether this is the group that has this account's name and nobody else in it, as many systems make one."""
    import grp
    import pwd

    try:
        name, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def ask(path: str | Path, frame: bytes, seconds: float = TRANSFER) -> bytes:
    """One frame there, one back, within so many seconds.

    Raises:
        SilentError: Somebody listens there, and does not answer in time.
        TransportError: Nobody answers, or the other side went away.
    """
    until = time.monotonic() + seconds
    with dial(path, seconds) as connection:
        try:
            connection.send_bytes(frame, max(until - time.monotonic(), 0.0))
            return connection.recv_bytes(MAX_FRAME, max(until - time.monotonic(), 0.0))
        except TimeoutError as error:
            msg = f"the process at {path} has been silent for {seconds:.0f} s."
            raise SilentError(msg) from error
        except (OSError, EOFError) as error:
            msg = f"the process at {path} went away ({untrusted.reason(error)})."
            raise TransportError(msg) from error
