"""Sliced calls: the hub's half of what `site` answers. Payloads go out and answers come in as slices of bounded size.

Knows frames, deadlines, how large an answer may be, and an `exchange` that carries one frame to several nodes. Knows
nothing of the engine behind it, of models or of rounds. Believes no node: what makes no sense, is too large or comes
too slowly ends that node's part in the call, and takes no more than its share of the time that all have.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llmchain_fed.errors import DeadlineError, ParticipantError, TransportError
from llmchain_fed.federated.runtime import Operation, Payload, payload_for
from llmchain_fed.runtimes.messaging import frames, heads

_SMALL = 16 * 2**20  # bytes: counts, losses and samples as JSON
_STATE = 64 * 2**20  # bytes a participant's own state may have beyond what was said of it
# (nodes, frame, seconds) → (node, the frame it answered or why there is none) for each of them
Exchange = Callable[[Sequence[str], bytes, float], Iterable[tuple[str, bytes | Exception]]]
_POLL = 2.0  # seconds a site keeps a poll waiting before it says that it is still at work
_LATE = 5.0  # seconds by which the last poll, or a farewell, may outlast the deadline
_LONGEST = 86_400.0  # seconds a node may be at work where no deadline was set: nobody is waited for without end


class AnswerSizes:
    """Remembers what was said of the size of answers.

    A training whose updates nobody described, and a participant's own state, may have twice what was sent to it and
    some more; everything else is JSON.
    """

    def __init__(self) -> None:
        self._said: dict[str, int] = {}

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._said[op] = num_bytes

    def most(self, op: str, payload: int) -> int:
        """bytes: what no sensible answer to `op` exceeds, for which so many bytes of `payload` were sent."""
        if op == "train":  # what is not an update is JSON: a loss, a curve
            return max(self._said[op], _SMALL) if op in self._said else 2 * payload + _SMALL
        if op == "personal_state":
            return max(self._said.get(op, 0), 2 * payload) + _STATE
        return _SMALL


@dataclass
class _Call:
    """What is known of a call while it lasts."""

    id: str
    op: Operation
    until: float | None
    open: set[str]
    """who has not answered and is not known to give no answer"""
    totals: dict[str, int] = field(default_factory=dict)
    """bytes of the answers that are there"""
    small: dict[str, bytes] = field(default_factory=dict)
    """answers that came with the news that they are there"""

    def ends(self, name: str, why: Exception) -> Iterator[tuple[str, Exception]]:
        """A node that gives no answer, told once."""
        if name in self.open:
            self.open.discard(name)
            yield name, why


class ChunkedCalls:
    """Calls through an exchange of frames.

    Answers are fetched one node after the other, in the order of the nodes: until then they stay where they are, so
    the hub's memory does not grow with the number of participants, and a rerun adds them in the same order. That a node
    gives no answer is told as soon as it is known, while the others still work.

    Args:
        exchange: Carries a frame to nodes and brings their answers back.
        patience: seconds without an answer after which a node counts as gone.
        farewell: Carries what may as well be lost, and recovers nothing for that; `exchange` by default.
    """

    def __init__(self, exchange: Exchange, patience: float, farewell: Exchange | None = None) -> None:
        self._exchange, self._patience, self._farewell = exchange, patience, farewell or exchange
        self._sizes = AnswerSizes()

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._sizes.expect(num_bytes, op)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """As `Runtime.call`; the deadline includes the way there and back.

        What is done by the deadline is fetched within `patience` seconds after it: a node that is late, or slow to hand
        over its answer, makes nobody else late. Whoever ends the call before its end, as Ctrl-C does, ends what the
        nodes do for it.
        """
        names = list(nodes)
        until = time.monotonic() + timeout if timeout is not None else None
        call = _Call(secrets.token_hex(8), op, until, set(names))
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(id(payload_for(payload, name)), []).append(name)
        most = {name: self._sizes.most(op, len(payload_for(payload, name))) for name in names}
        try:
            for alike in groups.values():
                yield from self._send(call, alike, payload_for(payload, alike[0]))
            yield from self._wait(call, [n for n in names if n in call.open], most)
            # of fetching alone: what becomes of the answers meanwhile is nobody's fault
            left = max(until + self._patience - time.monotonic(), 0.0) if until is not None else None
            waiting = sum(name not in call.small for name in names if name in call.open)
            for name in [n for n in names if n in call.open]:
                answer: bytes | Exception
                if name in call.small:
                    answer = call.small.pop(name)
                else:
                    began = time.monotonic()
                    answer = self._fetch(call, name, began + left / waiting if left is not None else None)
                    left = max(left - (time.monotonic() - began), 0.0) if left is not None else None
                    waiting -= 1
                call.open.discard(name)
                yield name, answer
            open_still = set(call.totals)
        except BaseException:
            open_still = call.open | set(call.totals)
            raise
        finally:
            self._drop(call, [n for n in names if n in open_still])

    def _send(self, call: _Call, names: list[str], payload: bytes) -> Iterator[tuple[str, Exception]]:
        """Sends a payload to those who are to get it; yields who did not take it, and why."""
        view, total = memoryview(payload), len(payload)
        for offset in range(0, max(total, 1), frames.SLICE):
            left = [n for n in names if n in call.open]
            if not left or (call.until is not None and time.monotonic() >= call.until):
                return
            seconds = self._patience
            if call.until is not None:  # a slow node shall not use up the time in which the others would work
                slices = 1 + (total - offset) // frames.SLICE
                seconds = min(seconds, max(1.0, (call.until - time.monotonic()) / 2 / slices))
            head = {"do": "put", "call": call.id, "op": call.op, "offset": offset, "total": total}
            frame = frames.pack(head, view[offset : offset + frames.SLICE])
            whole = offset + frames.SLICE >= total
            for name, reply in self._exchange(left, frame, seconds):
                found, _ = read(reply)
                if isinstance(found, Exception):
                    yield from call.ends(name, found)
                elif found.state == "unknown" or (found.state == "receiving") is whole:
                    yield from call.ends(name, _restarted(name))

    def _drop(self, call: _Call, names: list[str]) -> None:
        """Lets sites forget a call, and give it up if they are still at it."""
        if names:
            for _ in self._farewell(names, frames.pack({"do": "drop", "call": call.id}), min(self._patience, _LATE)):
                pass

    def _wait(self, call: _Call, names: list[str], most: Mapping[str, int]) -> Iterator[tuple[str, Exception]]:
        """Polls until every node's answer is there, or is not to be expected any more: those are yielded, with why."""
        working = names
        given_up = call.until if call.until is not None else time.monotonic() + _LONGEST
        while working:
            asked = time.monotonic()
            left = given_up - asked
            if left <= 0:
                self._drop(call, working)
                late = "was not done by the deadline" if call.until is not None else f"was at work for {_LONGEST:g} s"
                for name in working:
                    yield from call.ends(name, DeadlineError(f"{name!r} {late}; what it sends now is dropped."))
                return
            wait = min(_POLL, left)
            frame = frames.pack({"do": "poll", "call": call.id, "wait": wait})
            still = []
            seconds = wait + min(self._patience, max(left - wait, _LATE))
            for name, reply in self._exchange(working, frame, seconds):
                head, body = read(reply)
                if isinstance(head, Exception):
                    yield from call.ends(name, head)
                elif head.state == "working":
                    still.append(name)
                elif head.state != "done" or head.total is None:
                    yield from call.ends(name, _restarted(name))
                else:
                    call.totals[name] = head.total  # also of one that is refused: it keeps it until told to drop it
                    if len(body) not in (0, head.total) or len(body) > frames.INLINE:
                        strange = f"{name!r} sent {len(body):,} bytes that nobody asked for."
                        yield from call.ends(name, TransportError(strange))
                    elif head.total > most[name]:
                        large = f"{head.total:,} bytes where at most {most[name]:,} make sense."
                        yield from call.ends(name, ParticipantError(f"{name!r} wants to answer with {large}"))
                    elif len(body) == head.total:
                        call.small[name] = bytes(body)
            # one that says at once that it is still at work, rather than when the time is over, is not asked at once
            if still and still == working:
                time.sleep(max(wait - (time.monotonic() - asked), 0.0))
            working = still

    def _fetch(self, call: _Call, name: str, until: float | None) -> bytes | Exception:
        answer, total = bytearray(), call.totals[name]
        while len(answer) < total:
            left = until - time.monotonic() if until is not None else self._patience
            if left <= 0:
                return DeadlineError(f"{name!r} was done in time, but its answer was not here by the deadline.")
            frame = frames.pack({"do": "get", "call": call.id, "offset": len(answer)})
            for _, reply in self._exchange([name], frame, min(self._patience, max(left, 1.0))):
                head, body = read(reply)
                if isinstance(head, Exception):
                    return head
                if head.state != "done" or len(body) != min(frames.SLICE, total - len(answer)):
                    return TransportError(f"{name!r} did not send the slice that was asked for: it has restarted.")
                answer += body
        return bytes(answer)


def _restarted(name: str) -> TransportError:
    return TransportError(f"{name!r} knows nothing of this call: its peer has restarted.")


def read(reply: bytes | Exception) -> tuple[heads.Reply | Exception, memoryview]:
    """A reply's head and body, or why there is none."""
    empty = memoryview(b"")
    if isinstance(reply, Exception):
        return reply, empty
    try:
        head, body = heads.read_reply(reply)
    except TransportError as error:
        return error, empty
    return (heads.from_site(head.error.model_dump()), empty) if isinstance(head, heads.Failed) else (head, body)
