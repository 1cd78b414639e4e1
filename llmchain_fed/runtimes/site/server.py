"""SiteServer: a participant's long-lived process. Serves one peer behind a UNIX socket, under the site's policy.

Knows frames, the policy and a peer's `handle`. Knows nothing of the engine that brings the frames, or of models: the
peer has loaded its model before, and keeps it while engines, jobs and hubs come and go.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, PolicyError, TransportError
from llmchain_fed.federated.client.limits import Limits
from llmchain_fed.federated.client.operations import task_type
from llmchain_fed.federated.protocol.messages import glance
from llmchain_fed.federated.runtime import TaskHandler
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.messaging.channel import Channel
from llmchain_fed.runtimes.site.log import NOBODY, SiteLog
from llmchain_fed.runtimes.site.policy import Audit, Policy, counts_as_training

_LONGEST_WAIT = 30.0  # seconds a poll may block
_EACH = 100  # malformed frames that have a line each in the audit file
_CLOSING = 6.0  # seconds in which running work has come to its next step; whoever stopped the process waits for ten


@runtime_checkable
class SiteHandler(TaskHandler, Protocol):
    """A peer whose work can be given up from another thread, and which keeps to the limits that it alone can judge."""

    def give_up(self) -> None:
        """Ends running work at its next step."""

    def take_up(self) -> None:
        """Lets work that comes from now on run to its end."""

    def obey(self, limits: Limits) -> None:
        """Lets nothing be asked that these limits do not allow, from now on."""


@dataclass
class _Call:
    """The one call that is being received, waits, is worked on, or fetched."""

    id: str
    op: str
    total: int
    """bytes that are announced; they take memory only as they come"""
    payload: bytearray = field(default_factory=bytearray)
    caller: str | None = None
    """as the site's own bridge has it"""
    state: str = "receiving"
    """receiving, waiting, working, done or failed"""
    answer: bytes = b""
    error: dict[str, str] | None = None
    given_up: bool = False

    def take(self) -> bytes:
        """The payload, which this then no longer has: of full weights one copy less while they are trained."""
        payload, self.payload = bytes(self.payload), bytearray()
        return payload


class SiteServer:
    """Answers frames: a call's payload comes in slices, is worked on, and its answer is fetched in slices.

    One call at a time: a newer one replaces the former, whose work is given up, because whoever asked no longer waits.
    Repeating a frame does no harm, so a hub whose connection broke goes on where it was; a frame of a call that was
    replaced or dropped changes nothing any more.

    Raises:
        ConfigError: The peer keeps to no limits.
    """

    def __init__(self, peer: SiteHandler, policy: Policy, audit: Audit, log: SiteLog | None = None) -> None:
        if not isinstance(peer, SiteHandler):
            msg = (
                f"{type(peer).__name__} has no `obey(limits)`: nothing would hold it to the policy's steps, "
                "seconds and held-out losses. Give it one, as `federated.client.client.Client` has."
            )
            raise ConfigError(msg)
        self._peer, self._policy, self._audit = peer, policy, audit
        self._log = log or SiteLog(lambda _: None, NOBODY)
        self._closing = False
        self._call: _Call | None = None
        self._former: deque[str] = deque(maxlen=256)
        self._unreadable = itertools.count(1)
        self._changed = threading.Condition()
        self._trainings = 0
        peer.obey(policy)
        threading.Thread(target=self._work, name="peer", daemon=True).start()

    def answer(self, frame: bytes) -> bytes:
        """One frame in, one frame out; never raises."""
        try:
            caller, head, body = heads.request(frame)
            if caller is not None:
                self._log.heard()
            match head["do"]:
                case "ping":
                    return frames.pack({"state": "here"})
                case "status":
                    return frames.pack(self._log.status(self._trainings, self._policy.max_rounds))
                case "refused":
                    return self._refused(head)
                case "put":
                    return self._put(head, body, caller)
                case "poll":
                    return self._poll(head)
                case "get":
                    return self._get(head)
                case _:
                    return self._drop(head)
        except Exception as error:
            if isinstance(error, TransportError):
                self._malformed(len(frame), error)
            return frames.pack({"error": self._policy.told(error)})

    # --- frames -----------------------------------------------------------------------------------------------------

    def _malformed(self, num_bytes: int, error: TransportError) -> None:
        """Writes down what cannot be read: the first hundred, then every thousandth, so that nobody fills the disk."""
        count = next(self._unreadable)
        if count <= _EACH or count % 1000 == 0:
            said = f"{str(error)[:400]} ({count} so far)" if count > _EACH else str(error)[:400]
            with suppress(PolicyError):
                self._audit.write(op=None, bytes_in=num_bytes, status="malformed", error=said)

    def _refused(self, head: dict[str, Any]) -> bytes:
        """Writes down that the site's bridge sent somebody away: only the hub is heard."""
        caller, count = untrusted.shown(head["caller"], 100), head["count"]
        error = f"only the hub may call; {count} calls of {caller} were refused so far"
        self._audit.write(op=None, bytes_in=head["bytes"], caller=caller, status="refused", error=error)
        return frames.pack({"state": "noted"})

    def _put(self, head: dict[str, Any], body: memoryview, caller: str | None) -> bytes:
        name, op, offset, total = (head[key] for key in ("call", "op", "offset", "total"))
        with self._changed:
            if name in self._former:
                return frames.pack({"state": "unknown"})
            if self._call is None or self._call.id != name:
                self._begin(name, op, offset, total, caller)
            call = self._call
            assert call is not None
            if call.state != "receiving" or offset + len(body) <= len(call.payload) < total:
                return frames.pack({"state": call.state})  # said before
            ends = offset + len(body)
            if total != call.total or offset != len(call.payload) or ends > total or (total and not len(body)):
                msg = (
                    f"a slice of {len(body):,} bytes at {offset:,} does not follow {len(call.payload):,} of {total:,}."
                )
                raise TransportError(msg)
            call.payload += body
            if len(call.payload) == total:
                call.state = "waiting"
                self._changed.notify_all()
        return frames.pack({"state": call.state})

    def _begin(self, name: str, op: str, offset: int, total: int, caller: str | None) -> None:
        if offset:
            msg = f"a slice at {offset:,} of a call that this site knows nothing of: its peer has restarted."
            raise TransportError(msg)
        try:
            self._policy.check(op, total, self._trainings)
        except PolicyError as error:
            self._log.refused(error, op)
            self._audit.write(op=op[:40], bytes_in=total, caller=caller, status="refused", error=str(error))
            raise
        if self._closing:
            msg = "this site's peer is being stopped."
            raise TransportError(msg)
        self._end()
        self._call = _Call(name, op, total, caller=caller)

    def _end(self) -> None:
        """Forgets the call there is, and gives its work up."""
        if self._call is not None:
            self._former.append(self._call.id)
            if self._call.state == "receiving":
                entry = {"op": self._call.op, "bytes_in": len(self._call.payload), "caller": self._call.caller}
                with suppress(PolicyError):  # where nothing can be written down, nothing is answered either
                    self._audit.write(**entry, status="abandoned", error="its payload did not come to its end")
            self._call.payload = bytearray()
            if self._call.state == "working":
                self._call.given_up = True
                self._peer.give_up()
            self._call = None
            self._changed.notify_all()

    def _poll(self, head: dict[str, Any]) -> bytes:
        wait = min(head["wait"], _LONGEST_WAIT)
        with self._changed:
            call = self._known(head)
            if call is None:
                return frames.pack({"state": "unknown"})
            self._changed.wait_for(lambda: call.state in ("done", "failed") or self._call is not call, timeout=wait)
            if self._call is not call:
                return frames.pack({"state": "unknown"})
            if call.error is not None:
                return frames.pack({"error": call.error})
            inline = call.answer if call.state == "done" and len(call.answer) <= frames.INLINE else b""
            state = "working" if call.state == "waiting" else call.state
            return frames.pack({"state": state, "total": len(call.answer)}, inline)

    def _get(self, head: dict[str, Any]) -> bytes:
        with self._changed:
            call, offset = self._known(head), head["offset"]
            if call is None or call.state != "done":
                return frames.pack({"state": "unknown"})
            return frames.pack({"state": "done"}, memoryview(call.answer)[offset : offset + frames.SLICE])

    def _drop(self, head: dict[str, Any]) -> bytes:
        with self._changed:
            if self._known(head) is not None:
                self._end()
        return frames.pack({"state": "unknown"})

    def _known(self, head: dict[str, Any]) -> _Call | None:
        return self._call if self._call is not None and self._call.id == head["call"] else None

    # --- work -------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The one thread that works, as long as the process lives."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._call is not None and self._call.state == "waiting")
                call = self._call
                assert call is not None
                if self._closing:
                    return
                call.state = "working"
                self._peer.take_up()  # under the lock: who replaces or drops this call comes after
                self._trainings += counts_as_training(
                    call.op
                )  # also where it is given up: what it was asked, it was asked
            answer, error = b"", None
            try:
                answer = self._answer_to(call)
            except BaseException as raised:  # the site stays up: an error is an answer
                error = self._policy.told(raised)
            with self._changed:
                call.answer, call.error = answer, error
                call.state = "done" if error is None else "failed"
                self._changed.notify_all()

    def _answer_to(self, call: _Call) -> bytes:
        """What the peer answers; begun and ended in the audit file, or not at all."""
        asked = glance(task_type(call.op).task, call.payload)
        entry = {"op": call.op, "bytes_in": len(call.payload), "caller": call.caller} | asked.told()
        self._audit.write(**entry, status="began")
        self._log.began(call.op, asked)
        began = time.monotonic()
        answer, raised = b"", None
        try:
            answer = self._peer.handle(call.op, call.take())
        except BaseException as error:
            raised = error
        spent = round(time.monotonic() - began, 3)
        self._log.ended(call.op, asked, spent, raised, given_up=call.given_up)
        if raised is not None:
            status = "refused" if isinstance(raised, PolicyError) else "failed"
            self._audit.write(**entry, seconds=spent, status=status, error=f"{type(raised).__name__}: {raised}")
            raise raised
        self._audit.write(**entry, bytes_out=len(answer), seconds=spent, status="answered")
        return answer

    # --- as long as the process lives -------------------------------------------------------------------------------

    def serve(self, socket: str | Path) -> None:
        """Listens at `socket` until the process ends, or whatever is raised here ends it; then gives up what runs.

        Raises:
            ConfigError: See `frames.listen`.
        """
        try:
            with frames.listen(socket) as listener:
                listener.serve(self._converse)
        finally:
            self.close()

    def close(self, seconds: float = _CLOSING) -> None:
        """Gives up what is worked on and begins nothing more; returns once that is written down, or after so long."""
        with self._changed:
            self._closing, call = True, self._call
            self._end()
            if call is None or call.state not in ("waiting", "working"):
                return
            if call.state == "working" and self._changed.wait_for(lambda: call.state != "working", timeout=seconds):
                return
        with suppress(PolicyError):
            self._audit.write(op=call.op, caller=call.caller, status="abandoned", error="this peer was stopped")

    def _converse(self, channel: Channel) -> None:
        with channel, suppress(OSError, EOFError):
            channel.send_bytes(self.answer(channel.recv_bytes(frames.MAX_OUTER, frames.TRANSFER)), frames.TRANSFER)
