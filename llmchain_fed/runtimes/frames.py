"""Frames: a JSON head and a body as one piece of bytes, and the UNIX sockets they go through on one machine.

Knows bytes and sockets; no torch, because the engine's own processes import this. Knows nothing of what a frame means.
No pickle: heads are JSON, bodies are opaque. A socket and its key can be used by the operator's own account alone.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError, TransportError

SLICE = 16 * 2**20  # bytes: larger bodies travel in slices, so that no process on the way holds them whole
_MAX_HEAD = 2**20
MAX_FRAME = SLICE + _MAX_HEAD + 4
MAX_OUTER = MAX_FRAME + _MAX_HEAD + 4  # a frame within a frame, between driver and bridge
_LONGEST_PATH = 100  # characters: what a UNIX socket's address holds, less some room


def pack(head: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """4 bytes of length, the JSON head, the body."""
    text = json.dumps(head, allow_nan=False).encode()
    return b"".join((len(text).to_bytes(4, "big"), text, body))


def read(frame: bytes) -> tuple[dict[str, Any], memoryview]:
    """The reverse of `pack`; the body is a view.

    Raises:
        TransportError: It is no frame.
    """
    size = int.from_bytes(frame[:4], "big")
    try:
        if len(frame) < 4 or size > min(len(frame) - 4, _MAX_HEAD):
            raise ValueError("too short for its head")  # noqa: EM101
        head = json.loads(frame[4 : 4 + size], parse_constant=_no_constant)
        if not isinstance(head, dict):
            raise ValueError("its head is no mapping")  # noqa: EM101
    except (ValueError, RecursionError) as error:
        msg = f"a frame of {len(frame):,} bytes cannot be read ({error!s:.200})."
        raise TransportError(msg) from None
    return head, memoryview(frame)[4 + size :]


def _no_constant(name: str) -> float:
    msg = f"{name} is no JSON"
    raise ValueError(msg)


def key_path(path: Path) -> Path:
    """Where the key of a socket lies."""
    return path.with_name(path.name + ".key")


def listen(path: str | Path) -> Listener:
    """A listening socket at `path`, with a fresh key beside it; both for this account alone.

    Raises:
        ConfigError: The path is too long, its folder is missing or not writable, or somebody listens there.
    """
    path = Path(path).absolute()
    if len(str(path)) > _LONGEST_PATH:
        msg = f"a socket's path has at most {_LONGEST_PATH} characters, {path} has {len(str(path))}. Use /run or /tmp."
        raise ConfigError(msg)
    key = secrets.token_bytes(32)
    try:
        if path.exists():
            _make_room(path)
        key_path(path).unlink(missing_ok=True)
        descriptor = os.open(key_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        former = os.umask(0o177)
        try:
            return Listener(str(path), family="AF_UNIX", backlog=16, authkey=key)
        finally:
            os.umask(former)
    except OSError as error:
        msg = f"cannot listen at {path}: {error}. Its folder must exist and be writable."
        raise ConfigError(msg) from error


def _make_room(path: Path) -> None:
    """Removes a socket that a killed process left."""
    if not stat.S_ISSOCK(path.stat().st_mode):
        msg = f"{path} is there and is no socket. Choose another path: nothing is overwritten."
        raise ConfigError(msg)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    msg = f"somebody listens at {path} already. Stop that process or choose another socket."
    raise ConfigError(msg)


def dial(path: str | Path) -> Connection:
    """A connection to whoever listens at `path`.

    Raises:
        TransportError: Nobody does, or with another key.
    """
    path = Path(path)
    try:
        return Client(str(path), family="AF_UNIX", authkey=key_path(path).read_bytes())
    except (OSError, EOFError, AuthenticationError) as error:
        msg = f"nobody answers at {path} ({type(error).__name__}: {error})."
        raise TransportError(msg) from error


def ask(path: str | Path, frame: bytes) -> bytes:
    """One frame there, one back.

    Raises:
        TransportError: Nobody answers, or the other side went away.
    """
    with dial(path) as connection:
        try:
            connection.send_bytes(frame)
            return connection.recv_bytes(MAX_FRAME)
        except (OSError, EOFError) as error:
            msg = f"the process at {path} went away ({type(error).__name__}: {error})."
            raise TransportError(msg) from error
