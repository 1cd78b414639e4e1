"""Sliced calls: the hub's half of what `site` answers. Payloads go out and answers come in as slices of bounded size.

Knows frames, deadlines and an `exchange` that carries one frame to several nodes. Knows nothing of the engine behind
it, of models or of rounds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmchain_fed.errors import DeadlineError, ParticipantError, TransportError
from llmchain_fed.federated.runtime import Operation, Payload, payload_for
from llmchain_fed.runtimes import failures, frames

# (nodes, frame, seconds) → (node, the frame it answered or why there is none) for each of them
Exchange = Callable[[Sequence[str], bytes, float], Iterable[tuple[str, bytes | Exception]]]
_POLL = 2.0  # seconds a site holds on to a poll before it says that it is still at work
_SLACK = 64 * 2**20  # bytes an answer may have beyond twice its payload


class SlicedCalls:
    """Calls through an exchange of frames.

    Answers are fetched one node after the other, in the order of the nodes: until then they stay where they are, so
    the hub's memory does not grow with the number of participants, and a rerun adds them in the same order.

    Args:
        exchange: Carries frames.
        patience: seconds without an answer after which a node counts as gone.
    """

    def __init__(self, exchange: Exchange, patience: float) -> None:
        self._exchange, self._patience = exchange, patience
        self._expected = 0

    def expect(self, num_bytes: int) -> None:
        """Says how large an answer may be, beside what follows from the payload."""
        self._expected = max(self._expected, num_bytes)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """As `Transport.call`; the deadline includes the way there and back."""
        names = list(nodes)
        until = time.monotonic() + timeout if timeout is not None else None
        call = secrets.token_hex(8)
        answers: dict[str, bytes | Exception] = {}
        totals: dict[str, int] = {}
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(id(payload_for(payload, name)), []).append(name)
        for alike in groups.values():
            self._send(call, op, alike, payload_for(payload, alike[0]), until, answers)
        self._wait(call, [n for n in names if n not in answers], until, answers, totals)
        for name in names:
            answer = answers.pop(name, None)
            if answer is None:
                most = max(2 * len(payload_for(payload, name)), self._expected) + _SLACK
                answer = self._fetch(call, name, totals[name], most, until)
            yield name, answer
        self._drop(call, [n for n in names if n in totals])

    def _send(
        self,
        call: str,
        op: Operation,
        names: list[str],
        payload: bytes,
        until: float | None,
        answers: dict[str, bytes | Exception],
    ) -> None:
        view, total = memoryview(payload), len(payload)
        for offset in range(0, max(total, 1), frames.SLICE):
            left = [n for n in names if n not in answers]
            if not left or _over(until):
                return
            head = {"do": "put", "call": call, "op": op, "offset": offset, "total": total}
            frame = frames.pack(head, view[offset : offset + frames.SLICE])
            for name, reply in self._exchange(left, frame, self._patience):
                found, _ = _head(reply)
                if isinstance(found, Exception):
                    answers[name] = found

    def _drop(self, call: str, names: list[str]) -> None:
        """Lets sites forget a call, and give it up if they are still at it."""
        if names:
            for _ in self._exchange(names, frames.pack({"do": "drop", "call": call}), self._patience):
                pass

    def _wait(
        self,
        call: str,
        names: list[str],
        until: float | None,
        answers: dict[str, bytes | Exception],
        totals: dict[str, int],
    ) -> None:
        """Polls until every node's answer is there, or is not to be expected any more."""
        working = names
        while working:
            left = until - time.monotonic() if until is not None else _POLL
            if left <= 0:
                self._drop(call, working)
                for name in working:
                    answers[name] = DeadlineError(
                        f"{name!r} was not done by the deadline; what it sends now is dropped."
                    )
                return
            wait = min(_POLL, left)
            frame = frames.pack({"do": "poll", "call": call, "wait": wait})
            still = []
            for name, reply in self._exchange(working, frame, self._patience + wait):
                head, body = _head(reply)
                if isinstance(head, Exception):
                    answers[name] = head
                elif head.get("state") == "done" and type(head.get("total")) is int:
                    totals[name] = head["total"]
                    if len(body) == head["total"]:
                        answers[name] = bytes(body)
                elif head.get("state") in ("working", "receiving"):
                    still.append(name)
                else:
                    answers[name] = TransportError(f"{name!r} knows nothing of this call: its peer has restarted.")
            working = still

    def _fetch(self, call: str, name: str, total: int, most: int, until: float | None) -> bytes | Exception:
        if total > most:
            return ParticipantError(f"{name!r} wants to answer with {total:,} bytes where at most {most:,} make sense.")
        answer = bytearray()
        while len(answer) < total:
            if _over(until):
                return DeadlineError(f"{name!r} was done in time, but its answer was not here by the deadline.")
            frame = frames.pack({"do": "get", "call": call, "offset": len(answer)})
            for _, reply in self._exchange([name], frame, self._patience):
                head, body = _head(reply)
                if isinstance(head, Exception):
                    return head
                if head.get("state") != "done" or len(body) != min(frames.SLICE, total - len(answer)):
                    return TransportError(f"{name!r} did not send the slice that was asked for: it has restarted.")
                answer += body
        return bytes(answer)


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _head(reply: bytes | Exception) -> tuple[dict[str, Any] | Exception, memoryview]:
    """A reply's head and body, or why there is none."""
    empty = memoryview(b"")
    if isinstance(reply, Exception):
        return reply, empty
    try:
        head, body = frames.read(reply)
    except TransportError as error:
        return error, empty
    return (failures.from_site(head["error"]), empty) if "error" in head else (head, body)
