"""Channels: messages of bounded size and time through UNIX sockets, and the listener that makes sure who calls.

Knows sockets, deadlines and a shared key. Knows nothing of frames, files or what a message means. Who connects and is
silent, slow or stopped occupies one place of many for some seconds, and is never waited for by anybody else.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from pathlib import Path

HANDSHAKE = 5.0  # seconds in which both sides have shown that they have the key
_NONCE, _PROOF = 32, 32  # bytes
_MOST_CALLERS = 64  # conversations at a time, those that shake hands included
_TICK = 0.5  # seconds between looks whether the listener was closed


class Channel:
    """A connected socket that carries messages: 4 bytes of length, then as many.

    One thread may receive while another sends. Times are seconds for the whole message, however slowly it comes; None
    waits for as long as the other side is there.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(0)
        self._socket = connected

    def send_bytes(self, data: bytes, seconds: float | None = None) -> None:
        """Sends one message.

        Raises:
            OSError: The other side is gone, or did not take it in time (TimeoutError).
        """
        until = _until(seconds)
        for part in (memoryview(struct.pack("!I", len(data))), memoryview(data)):
            left = part
            while len(left):
                self._ready(select.POLLOUT, until)
                with suppress(BlockingIOError):
                    left = left[self._socket.send(left) :]

    def recv_bytes(self, most: int, seconds: float | None = None) -> bytes:
        """Receives one message.

        Args:
            most: bytes that make sense; a longer one is not received at all.
            seconds: The time within which all of it must come.

        Raises:
            EOFError: The other side went away between two messages.
            OSError: It went away within one, announced a longer one, or was too slow (TimeoutError).
        """
        until = _until(seconds)
        size = int.from_bytes(self._receive(4, until, between=True), "big")
        if size > most:
            msg = f"a message of {size:,} bytes was announced where at most {most:,} make sense"
            raise OSError(msg)
        return self._receive(size, until)

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether something has come, or the other side has gone."""
        try:
            self._ready(select.POLLIN, _until(seconds))
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends the connection; who waits for it in another thread is woken."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, size: int, until: float | None, *, between: bool = False) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            self._ready(select.POLLIN, until)
            try:
                count = self._socket.recv_into(view[got:])
            except BlockingIOError:
                continue
            if not count:
                if between and not got:
                    raise EOFError
                msg = "the other side went away within a message"
                raise OSError(msg)
            got += count
        return bytes(data)

    def _ready(self, event: int, until: float | None) -> None:
        number = self._socket.fileno()
        if number < 0:
            msg = "this end was closed"
            raise OSError(msg)
        waiting = select.poll()
        waiting.register(number, event)
        left = None if until is None else max(until - time.monotonic(), 0.0) * 1000
        if not waiting.poll(left):
            msg = "not in time"
            raise TimeoutError(msg)

    # --- who it is --------------------------------------------------------------------------------------------------

    def check_account(self) -> None:
        """Makes sure that the process at the other end belongs to this account, or to root, where the system can say.

        Raises:
            AuthenticationError: It does not.
        """
        if not hasattr(socket, "SO_PEERCRED"):
            return
        found = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        account = struct.unpack("3i", found)[1]
        if account not in (os.geteuid(), 0):
            msg = f"the process at the other end belongs to account {account}"
            raise AuthenticationError(msg)

    def admit(self, key: bytes) -> None:
        """Shakes hands as the listener; both prove that they have the key, neither shows it.

        Raises:
            AuthenticationError: The other side does not have it.
            EOFError, OSError: It went away, or did not answer in time.
        """
        until = time.monotonic() + HANDSHAKE
        ours = secrets.token_bytes(_NONCE)
        self.send_bytes(ours, HANDSHAKE)
        answer = self.recv_bytes(_NONCE + _PROOF, until - time.monotonic())
        theirs, proof = answer[:_NONCE], answer[_NONCE:]
        if len(theirs) < _NONCE or not hmac.compare_digest(proof, _proof(key, b"dials", ours, theirs)):
            self.send_bytes(b"", until - time.monotonic())
            msg = "the other side does not have the key"
            raise AuthenticationError(msg)
        self.send_bytes(_proof(key, b"listens", theirs, ours), until - time.monotonic())

    def introduce(self, key: bytes, seconds: float = HANDSHAKE) -> None:
        """Shakes hands as the one who dials, within so many seconds; see `admit`."""
        until = time.monotonic() + seconds
        theirs = self.recv_bytes(_NONCE, seconds)
        ours = secrets.token_bytes(_NONCE)
        self.send_bytes(ours + _proof(key, b"dials", theirs, ours), until - time.monotonic())
        proof = self.recv_bytes(_PROOF, until - time.monotonic())
        if not hmac.compare_digest(proof, _proof(key, b"listens", ours, theirs)):
            msg = "who listens there has another key"
            raise AuthenticationError(msg)


def _until(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _proof(key: bytes, role: bytes, challenge: bytes, other: bytes) -> bytes:
    """What only somebody who has the key can say; the role keeps a proof from being handed back to who gave it."""
    return hmac.digest(key, role + challenge + other, "sha256")


def which(path: Path) -> tuple[int, int]:
    """Tells a file from another that takes its name; the number alone is given to the next one at once."""
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns


class Listener:
    """A listening socket whose callers are heard each in a thread of its own, once they have shown the key.

    Its `files` are removed when it is closed, if they are still what they were.
    """

    def __init__(
        self, listening: socket.socket, path: Path, key: bytes, files: list[tuple[Path, tuple[int, int]]]
    ) -> None:
        self._socket, self._path, self._key, self._files = listening, path, key, files
        self._closed, self._serving = threading.Event(), False
        self._lock = threading.Lock()
        self._callers: dict[Channel, bool] = {}
        """whom we talk to → whether the handshake is over; the oldest first"""

    def serve(self, hear: Callable[[Channel], None]) -> None:
        """Accepts until this is closed.

        `hear` is given each caller, in a thread; it closes the channel when it is done with it.
        """
        self._serving = True
        self._socket.settimeout(_TICK)
        while not self._closed.is_set():
            try:
                connected, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                self._closed.wait(_TICK)  # no descriptor is left, or this was closed
                continue
            channel = Channel(connected)
            if self._closed.is_set() or not self._make_place(channel):
                channel.close()
                continue
            try:
                threading.Thread(target=self._hear, args=(channel, hear), daemon=True).start()
            except RuntimeError:  # no thread is left
                self._leave(channel)
                channel.close()
        self._socket.close()

    def _make_place(self, channel: Channel) -> bool:
        """Whether there is a place for one more; the oldest that has not shown its key yet gives up its own."""
        with self._lock:
            if len(self._callers) >= _MOST_CALLERS:
                silent = next((c for c, known in self._callers.items() if not known), None)
                if silent is None:
                    return False
                del self._callers[silent]
                silent.close()
            self._callers[channel] = False
        return True

    def _hear(self, channel: Channel, hear: Callable[[Channel], None]) -> None:
        try:
            channel.check_account()
            channel.admit(self._key)
            with self._lock:
                if channel not in self._callers:
                    return
                self._callers[channel] = True
        except (OSError, EOFError, ValueError, AuthenticationError):
            channel.close()
            self._leave(channel)
            return
        try:
            hear(channel)
        finally:
            self._leave(channel)

    def _leave(self, channel: Channel) -> None:
        with self._lock:
            self._callers.pop(channel, None)

    def close(self) -> None:
        """Ends `serve`, and removes socket and key if they are still this one's."""
        self._closed.set()
        for path, known in self._files:
            with suppress(OSError):
                if which(path) == known:
                    path.unlink()
        if not self._serving:
            self._socket.close()
        else:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes `serve` at once, where the system does that

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
