"""Link: the driver's end of the socket that the job's hub bridge dials.

Knows frames and one connection. Knows nothing of sessions, calls or rounds.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes import failures, frames

_PAUSE = 0.05  # seconds after a connection that failed
_GRACE = 30.0  # seconds the bridge may be silent beyond the time it was given


class Link:
    """Listens for the bridge and exchanges frames through it.

    Args:
        path: Where to listen.

    Raises:
        ConfigError: See `frames.listen`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._listener = path, frames.listen(path)
        self._expected: str | None = None
        self._bridge: Connection | None = None
        self._sites: list[str] = []
        self._changed = threading.Condition()
        self._busy = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="bridge", daemon=True).start()

    def expect(self, run: str) -> None:
        """From now on only the bridge of this submission is talked to; others are told to stop."""
        with self._changed:
            self._expected = run
            self._drop()

    def wait(self, seconds: float) -> list[str] | None:
        """The sites of the job whose bridge is connected; None if none is within `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._bridge is not None, timeout=seconds)
            return list(self._sites) if self._bridge is not None else None

    def exchange(self, nodes: Sequence[str], frame: bytes, seconds: float) -> list[tuple[str, bytes | Exception]]:
        """Carries a frame to nodes; what each answered, or why it did not.

        Args:
            nodes: To whom.
            frame: What.
            seconds: How long the engine waits for each.

        Raises:
            TransportError: There is no bridge, or it went away.
        """
        with self._busy:
            bridge = self._bridge
            if bridge is None:
                msg = "the job's bridge is not connected."
                raise TransportError(msg)
            answers: dict[str, bytes | Exception] = {}
            try:
                bridge.send_bytes(frames.pack({"nodes": list(nodes), "seconds": seconds}, frame))
                until = time.monotonic() + seconds + _GRACE
                while True:
                    if not bridge.poll(max(until - time.monotonic(), 0.0)):
                        msg = f"silent for {seconds + _GRACE:g} s"
                        raise TimeoutError(msg)
                    head, body = frames.read(bridge.recv_bytes(frames.MAX_OUTER))
                    if "done" in head:
                        break
                    failed = "error" in head
                    answers[head["node"]] = failures.from_site(head["error"]) if failed else bytes(body)
            except BaseException as error:
                # also after Ctrl-C: what is still to come would be taken for the next frame's answers
                with self._changed:
                    if self._bridge is bridge:
                        self._drop()
                if not isinstance(error, (OSError, EOFError, KeyError, TransportError)):
                    raise
                msg = f"the job's bridge went away ({type(error).__name__}: {error})."
                raise TransportError(msg) from error
        nobody = TransportError("the engine gave no answer for it.")
        return [(node, answers.get(node, nobody)) for node in nodes]

    def release(self) -> None:
        """Ends the loop of the job that is connected, so that the job ends by itself."""
        with self._changed:
            if self._bridge is not None:
                with suppress(OSError):
                    self._bridge.send_bytes(frames.pack({"do": "stop"}))
            self._drop()

    def close(self) -> None:
        """Ends the job's loop and stops listening."""
        self._closed = True
        self.release()
        with suppress(OSError), socket.socket(socket.AF_UNIX) as knock:  # wakes the thread that accepts, if it does
            knock.connect(str(self._path))
        self._listener.close()
        frames.key_path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
                if self._closed or not connection.poll(10.0):
                    connection.close()
                    continue
                head, _ = frames.read(connection.recv_bytes(frames.MAX_FRAME))
                run, sites = str(head["run"]), [str(name) for name in head["sites"]]
            except (OSError, EOFError, AuthenticationError, TransportError, KeyError, TypeError):
                time.sleep(_PAUSE)
                continue
            with self._changed:
                if self._expected not in (None, run):
                    with suppress(OSError), connection:
                        connection.send_bytes(frames.pack({"do": "stop"}))  # of a job that was given up
                    continue
                self._drop()
                self._bridge, self._sites, self._expected = connection, sites, run
                self._changed.notify_all()

    def _drop(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
        self._bridge = None
