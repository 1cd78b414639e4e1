"""Attendance: who takes part, who is out since when and why, and who is waited for. It tells those who listen.

Knows names, errors and the clock. Knows nothing of transports, rounds or screens. Whoever asks participants reports
here; the first reason of an absence is kept, because the reason of a retry says less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from llmchain_fed.federated.history import told_of


@dataclass(frozen=True)
class Change:
    """Somebody went out, or came (back)."""

    name: str
    state: Literal["in", "out"]
    at: float
    """seconds since the epoch"""
    reason: str | None = None
    """why it is out, in a line"""
    after: float | None = None
    """seconds for which it was out, where it came back"""


@dataclass
class Standing:
    """One participant."""

    state: Literal["expected", "in", "out"] = "expected"
    since: float | None = None
    """seconds since the epoch"""
    heard: float | None = None
    """when it last answered anything"""
    reason: str | None = None
    """the first reason of this absence"""
    error: Exception | None = None
    """likewise, as it was raised"""
    asked: str | None = None
    """the operation whose answer is waited for"""
    joined: bool = False
    """whether it has ever taken part"""


class Attendance:
    """Keeps who is in and out.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: list[Callable[[Change], object]] = []
        self.standings: dict[str, Standing] = {}

    def listen(self, listener: Callable[[Change], object]) -> None:
        """Tells `listener` of every change from now on, in the thread in which it is reported."""
        self._listeners.append(listener)

    def asked(self, op: str, names: Iterable[str]) -> None:
        """They are asked for something, and waited for from now on."""
        for name in names:
            self._of(name).asked = op

    def heard(self, name: str) -> None:
        """It has answered."""
        found = self._of(name)
        found.asked, found.heard = None, self._clock()

    def came(self, name: str) -> None:
        """It takes part from now on."""
        found, now = self._of(name), self._clock()
        if found.state == "in":
            return
        after = now - found.since if found.state == "out" and found.since is not None else None
        found.state, found.since, found.reason, found.error, found.joined = "in", now, None, None, True
        self._tell(Change(name, "in", now, after=after))

    def out(self, name: str, why: Exception) -> None:
        """It does not take part any more, or could not begin to; of one absence the first reason stays."""
        found, now = self._of(name), self._clock()
        found.asked = None
        if found.state == "out":
            return
        found.state, found.since, found.error, found.reason = "out", now, why, told_of(why)
        self._tell(Change(name, "out", now, found.reason))

    @property
    def absent(self) -> dict[str, str]:
        """Who is out now, and the first reason."""
        return {name: s.reason or "" for name, s in self.standings.items() if s.state == "out"}

    @property
    def never(self) -> dict[str, str]:
        """Who has never taken part, and why; those who were not asked yet are not among them."""
        return {name: s.reason or "" for name, s in self.standings.items() if not s.joined and s.state == "out"}

    @property
    def waiting_for(self) -> dict[str, str]:
        """Who is waited for, and for the answer to what."""
        return {name: s.asked for name, s in self.standings.items() if s.asked is not None}

    def _of(self, name: str) -> Standing:
        return self.standings.setdefault(name, Standing())

    def _tell(self, change: Change) -> None:
        for listener in self._listeners:
            listener(change)
