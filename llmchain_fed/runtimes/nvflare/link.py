"""Link: the driver's end of the socket that the job's hub bridge dials.

Knows frames and one connection. Knows nothing of sessions, calls or rounds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmchain_fed import untrusted
from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes import failures, frames, heads
from llmchain_fed.runtimes.channel import Channel

_GREETING = 10.0  # seconds in which whoever connected has said which job it is of
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
        self._bridge: Channel | None = None
        self._sites: list[str] = []
        self._changed = threading.Condition()
        self._busy = threading.Lock()
        threading.Thread(target=self._listener.serve, args=(self._greet,), name="bridge", daemon=True).start()

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
            asked = set(nodes)
            try:
                until = time.monotonic() + seconds + _GRACE
                order = {"nodes": list(nodes), "seconds": float(seconds)}
                bridge.send_bytes(frames.pack(order, frame), seconds + _GRACE)
                while True:
                    told = bridge.recv_bytes(frames.MAX_OUTER, max(until - time.monotonic(), 0.0))
                    head, body = heads.one_of(told, heads.Carried, heads.Done, what="what the bridge told")
                    if not isinstance(head, heads.Carried):
                        break
                    if head.node not in asked or head.node in answers:
                        msg = f"it answers for {untrusted.shown(head.node)}, who was not asked or has answered"
                        raise TransportError(msg)
                    error = head.error
                    answers[head.node] = failures.from_site(error.model_dump()) if error is not None else bytes(body)
            except BaseException as lost:
                # also after Ctrl-C: what is still to come would be taken for the next frame's answers
                with self._changed:
                    if self._bridge is bridge:
                        self._drop()
                if not isinstance(lost, (OSError, EOFError, TransportError)):
                    raise
                msg = f"the job's bridge went away ({type(lost).__name__}: {lost})."
                raise TransportError(msg) from lost
        nobody = TransportError("the engine gave no answer for it.")
        return [(node, answers.get(node, nobody)) for node in nodes]

    def release(self) -> None:
        """Ends the loop of the job that is connected, so that the job ends by itself."""
        with self._changed:
            if self._bridge is not None:
                with suppress(OSError):
                    self._bridge.send_bytes(frames.pack({"do": "stop"}), _GREETING)
            self._drop()

    def close(self) -> None:
        """Ends the job's loop and stops listening."""
        self.release()
        self._listener.close()

    def _greet(self, channel: Channel) -> None:
        """Hears who connected; the bridge of the job that is expected is talked to from now on."""
        try:
            told = channel.recv_bytes(frames.MAX_ORDER, _GREETING)
            greeting, _ = heads.one_of(told, heads.Greeting, what="a greeting")
        except (OSError, EOFError, TransportError):
            channel.close()
            return
        with self._changed:
            if self._expected not in (None, greeting.run):
                with suppress(OSError), channel:
                    channel.send_bytes(frames.pack({"do": "stop"}), _GREETING)  # of a job that was given up
                return
            self._drop()
            self._bridge, self._sites, self._expected = channel, list(greeting.sites), greeting.run
            self._changed.notify_all()

    def _drop(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
        self._bridge = None
