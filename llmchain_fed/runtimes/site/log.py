"""SiteLog: what a site's operator is told: a line when something happens, and how the site stands when it is asked.

Knows requests, how they ended, and the clock. Knows nothing of sockets, frames or models. An operator reads this once a
week: what happens again is counted, what a hub measures is not told, and no text of an example is.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from llmchain_fed.errors import PolicyError
from llmchain_fed.federated.protocol.messages import Glance
from llmchain_fed.runtimes.site.policy import counts_as_training, is_harmless
from llmchain_fed.untrusted import one_line

_LONGEST = 1000  # characters of a refusal
_MOST_ROUNDS = 2**40
_MOST_KINDS = 1000  # of refusals that are told apart
_TAKES_PART = ("hello", "train")
NOBODY: dict[str, Any] = {"name": "?", "examples": None, "held_out": False, "audit": None, "contract": {}}
"""of a site that is not told what to say of itself"""


class SiteLog:
    """Thread-safe where one thread tells and others ask: each field is replaced as a whole.

    Args:
        about: What is known from the start: `name`, `examples`, `held_out`, `audit`, `contract`.
    """

    def __init__(self, say: Callable[[str], None], about: Mapping[str, Any]) -> None:
        self._say, self._about = say, about
        self._started = time.time()
        self._heard: float | None = None
        self._working: tuple[str | None, int | None, float | None] = (None, None, None)
        self._last_refusal: str | None = None
        self._trouble: dict[str, str] = {}
        """operation → why its last request came to nothing, of those by which a site takes part"""
        self._greeted: tuple[Any, Any] | None = None
        self._counts: Counter[str] = Counter()

    def heard(self) -> None:
        """A hub asked something."""
        self._heard = time.time()

    def began(self, op: str, asked: Glance) -> None:
        """A request is being worked on."""
        number = asked.round  # as a hub says
        self._working = op, number if number is not None and 0 <= number < _MOST_ROUNDS else None, time.time()
        if counts_as_training(op):
            self._say(f"{_said(op)} begins{_round(asked)}")

    def ended(self, op: str, asked: Glance, seconds: float, error: BaseException | None, *, given_up: bool) -> None:
        """It was answered, failed, or nobody waited for it any more."""
        self._working = None, None, None
        what = _said(op)
        if error is None and not given_up:
            self._trouble = {other: why for other, why in self._trouble.items() if other != op}
        if given_up:
            self._say(f"{what} given up{_round(asked)} after {seconds:.1f} s: nobody waits for it any more")
        elif isinstance(error, PolicyError):
            self.refused(error, op)
        elif error is not None:
            why = type(error).__name__ + (f": {error}" if is_harmless(error) else "; the audit file has its message")
            self._failed(op, f"{what} failed: {why}")
            if counts_as_training(op):
                self._say(f"{what} failed{_round(asked)} after {seconds:.1f} s: {one_line(why, _LONGEST)}")
            else:
                self._once(f"{what} failed: {one_line(why, _LONGEST)}", f"{what} {type(error).__name__}")
        elif counts_as_training(op):
            self._say(f"{what} ends{_round(asked)}, {seconds:.1f} s")
        elif op == "hello" and (found := (asked.federation, asked.rule)) != self._greeted:
            self._greeted = found
            self._say(f"hub greets: federation {one_line(found[0], 64)}, rule {one_line(found[1] or 'its own', 100)}")

    def refused(self, error: PolicyError, op: str) -> None:
        """What was asked is not allowed; an audit file that cannot be written is told by itself."""
        self._last_refusal = one_line(error, _LONGEST)
        self._failed(op, f"{_said(op)} refused: {self._last_refusal}")
        if error.__cause__ is None or not isinstance(error.__cause__, OSError):
            self._once(f"refused: {self._last_refusal}", self._last_refusal.split(":")[0])

    def status(self, trainings: int, max_rounds: int | None) -> dict[str, Any]:
        """How the site stands: a `heads.PeerStatus` as plain data."""
        op, number, since = self._working
        found = {"op": op, "round": number, "since": since, "heard": self._heard, "last_refusal": self._last_refusal}
        found["trouble"] = next(reversed(self._trouble.values()), None)
        return {**self._about, "started": self._started, "trainings": trainings, "max_rounds": max_rounds} | found

    def _failed(self, op: str, why: str) -> None:
        if op in _TAKES_PART:
            others = {other: said for other, said in self._trouble.items() if other != op}
            self._trouble = others | {op: one_line(why, _LONGEST)}

    def _once(self, line: str, kind: str) -> None:
        """The first of a kind is told, then how many they are, ever more rarely."""
        if kind not in self._counts and len(self._counts) >= _MOST_KINDS:
            return
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1:
            self._say(line)
        elif count >= 10 and math.log10(count).is_integer():
            self._say(f"{line} ({count:,} times so far)")


def _said(op: str) -> str:
    return "training" if op == "train" else op


def _round(asked: Glance) -> str:
    return f": round {asked.round}" if asked.round is not None else ""
