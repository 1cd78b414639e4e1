"""Attendance: who takes part, who is out since when and why, and who is waited for. It tells those who listen.

Knows names, errors and the clock. Knows nothing of runtimes, rounds or screens. Whoever asks participants reports
here; the first reason of an absence is kept, because the reason of a retry says less.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmchain_fed.errors import DeadlineError, ParticipantError, TransportError
from llmchain_fed.federated.history import told_of

State = Literal["expected", "in", "late", "out"]
"""not heard of yet; takes part; takes part, and its last update came too late; does not take part"""
_KINDS = 5  # of reasons of one absence that are told: a site that makes up ever new ones writes no further lines
# what the way there ends in is one kind, however it is worded: a retry says less than the first attempt did
_ONE_KIND = (TransportError.__name__, DeadlineError.__name__)


@dataclass(frozen=True)
class AttendanceChange:
    """Somebody went out, came (back), is late, or is still out for a reason of another kind."""

    name: str
    state: State
    at: float
    """seconds since the epoch"""
    reason: str | None = None
    """why it is out or late, in a line"""
    after: float | None = None
    """seconds for which it was out or late, where it comes back"""
    was: State = "expected"
    """its state before; "out" twice is a further reason of one absence"""


@dataclass
class Presence:
    """One participant."""

    state: State = "expected"
    since: float | None = None
    """seconds since the epoch"""
    heard: float | None = None
    """when it last answered anything"""
    reason: str | None = None
    """the first reason of this absence"""
    latest: str | None = None
    """the latest reason of this absence, where it is of another kind than the first"""
    error: Exception | None = None
    """the first reason as it was raised; None where an update was refused"""
    asked: str | None = None
    """the operation whose answer is waited for"""
    took_part: bool = False
    """whether an update of it was ever accepted, be it for a round that then had too few"""
    lasting: bool = False
    """whether only an update that is used ends this absence: its greetings are fine, its trainings are not"""
    proven: bool = True
    """whether it has trained since it came back"""
    doubtful: bool = False
    """whether it may have restarted since it was greeted"""
    kinds: list[str] = field(default_factory=list)
    """of reasons that this absence was told with"""


class Attendance:
    """Keeps who is in and out.

    A participant that stops taking part is told once, whatever the cause, and once again when it takes part anew;
    nothing is told of each round in between.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: list[Callable[[AttendanceChange], object]] = []
        self._followers: list[Callable[[], object]] = []
        self.standings: dict[str, Presence] = {}

    def listen(self, listener: Callable[[AttendanceChange], object]) -> None:
        """Tells `listener` of every change from now on, in the thread in which it is reported."""
        self._listeners.append(listener)

    def follow(self, follower: Callable[[], object]) -> None:
        """Calls `follower` whenever somebody is asked or has answered, from now on."""
        self._followers.append(follower)

    # --- what is asked and answered -----------------------------------------------------------------------------------

    def expect(self, names: Iterable[str]) -> None:
        """They are to take part."""
        for name in names:
            self._of(name)

    def asked(self, op: str, names: Iterable[str]) -> None:
        """They are asked for something, and waited for from now on."""
        for name in names:
            self._of(name).asked = op
        self._moved()

    def heard(self, name: str) -> None:
        """It has answered."""
        found = self._of(name)
        found.asked, found.heard = None, self._clock()
        self._moved()

    def following(
        self, op: str, names: Iterable[str], answers: Iterable[tuple[str, bytes | Exception]]
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """The same answers; who is waited for, heard, or out because the way to it is broken, is kept meanwhile."""
        waiting = set(names)
        self.asked(op, waiting)
        try:
            for name, answer in answers:
                waiting.discard(name)
                self._answered(op, name, answer)
                yield name, answer
        finally:
            for name in waiting:
                self._of(name).asked = None
            self._moved()

    def _answered(self, op: str, name: str, answer: bytes | Exception) -> None:
        found = self._of(name)
        if not isinstance(answer, (TransportError, DeadlineError)):
            self.heard(name)
        found.asked = None
        if op not in ("hello", "train") and isinstance(answer, (TransportError, ParticipantError)):
            found.doubtful = True
        if isinstance(answer, TransportError):
            # one that can be greeted and is lost in each training is not told of in each round
            self.out(name, answer, lasting=op == "train" and not found.proven)
        else:
            self._moved()

    # --- who is in and out --------------------------------------------------------------------------------------------

    def came(self, name: str) -> None:
        """It has joined: it takes part from now on, unless its absence is one that only an update ends."""
        found = self._of(name)
        found.doubtful = False
        if found.state in ("expected", "out") and not found.lasting:
            found.proven = found.state == "expected"
            self._in(name)

    def worked(self, name: str) -> None:
        """An update of it is accepted."""
        found = self._of(name)
        found.took_part, found.proven, found.lasting, found.doubtful = True, True, False, False
        if found.state != "in":
            self._in(name)

    def late(self, name: str, why: Exception) -> None:
        """Its update did not come in time: it goes on taking part, and this round is without it."""
        found, now = self._of(name), self._clock()
        if found.state == "out":
            self.out(name, why)
        elif found.state != "late":
            was = found.state
            found.state, found.since, found.error, found.reason = "late", now, why, told_of(why)
            self._tell(AttendanceChange(name, "late", now, found.reason, was=was))

    def out(self, name: str, why: Exception | str, *, lasting: bool = False) -> None:
        """It does not take part any more, or could not begin to; of one absence the first reason stays.

        After a `lasting` one only an update that is used ends it.
        """
        found, now = self._of(name), self._clock()
        reason = why if isinstance(why, str) else told_of(why)
        kind, was = _kind(reason), found.state
        found.asked, found.lasting = None, found.lasting or lasting
        if was != "out":
            found.state, found.since, found.reason, found.latest, found.kinds = "out", now, reason, None, [kind]
            found.error = why if isinstance(why, Exception) else None
        else:
            found.latest = reason if kind != _kind(found.reason or "") else found.latest
            if kind in found.kinds or kind in _ONE_KIND or len(found.kinds) >= _KINDS:
                return  # one that is started anew to be mended is out of reach meanwhile: nobody need be told
            found.kinds.append(kind)
        self._tell(AttendanceChange(name, "out", now, reason, was=was))

    def remember(self, names: Iterable[str]) -> None:
        """They took part in rounds before this process began."""
        for name in names:
            self._of(name).took_part = True

    def told(self, name: str, reason: str) -> str:
        """What a record says of one that took no part: the first reason, and this one if it is of another kind."""
        found = self._of(name)
        if found.state not in ("out", "late") or found.reason is None or _kind(found.reason) == _kind(reason):
            return found.reason or reason
        return f"{found.reason}; then {reason}"

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def absent(self) -> dict[str, str]:
        """Who is out now, and the first reason."""
        return {name: s.reason or "" for name, s in self.standings.items() if s.state == "out"}

    @property
    def never(self) -> dict[str, str]:
        """Of whom no update was ever accepted, and why; those who were not asked for one yet are not among them."""
        found = {name: s for name, s in self.standings.items() if not s.took_part}
        return {name: s.reason or "" for name, s in found.items() if s.state in ("out", "late")}

    @property
    def waiting_for(self) -> dict[str, str]:
        """Who is waited for, and for the answer to what."""
        return {name: s.asked for name, s in self.standings.items() if s.asked is not None}

    @property
    def doubtful(self) -> list[str]:
        """Who may have restarted since it was greeted, and is greeted anew before the next round."""
        return [name for name, s in self.standings.items() if s.doubtful]

    def _in(self, name: str) -> None:
        found, now = self._of(name), self._clock()
        was, since = found.state, found.since
        found.state, found.since, found.reason, found.latest, found.error = "in", now, None, None, None
        found.kinds = []
        after = now - since if was in ("out", "late") and since is not None else None
        self._tell(AttendanceChange(name, "in", now, after=after, was=was))

    def _of(self, name: str) -> Presence:
        return self.standings.setdefault(name, Presence())

    def _tell(self, change: AttendanceChange) -> None:
        for listener in self._listeners:
            listener(change)
        self._moved()

    def _moved(self) -> None:
        for follower in self._followers:
            follower()


def _kind(reason: str) -> str:
    """What two reasons have in common that mean the same: the broken way, or all words but the numbers."""
    name = reason.partition(":")[0]
    return name if name in _ONE_KIND else re.sub(r"\d+", "#", reason)
