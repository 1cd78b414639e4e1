"""Sites: which of a federation's sites can be asked now; of the others since when they cannot, and why.

Knows names, times and reasons. Knows nothing of jobs, sessions or calls. The first reason of an absence is
kept: what is found later, such as that a machine is no longer connected, does not tell what happened.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

_REFUSED = 600.0  # seconds before a site that refused a job is asked to take one again
_UNKNOWN = "it is not connected to the hub"


@dataclass
class _Out:
    """An absence."""

    since: float
    """seconds since the epoch"""
    first: str
    now: str
    last: float
    """when it was last found missing"""
    unreached: bool
    """whether it is the hub's engine that does not reach it, as it last was"""


class Sites:
    """Keeps who is there."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._in: set[str] = set()
        self._out: dict[str, _Out] = {}
        self._refused: dict[str, tuple[float, str]] = {}

    def there(self) -> list[str]:
        """Who can be asked."""
        return [name for name in self.names if name in self._in]

    def met(self, name: str) -> None:
        """It answers."""
        self._in.add(name)
        self._out.pop(name, None)
        self._refused.pop(name, None)

    def missed(self, name: str, why: str, *, unreached: bool = False) -> None:
        """A site does not answer.

        Args:
            name: The name of the site.
            why: The reason, for people; it may be the site's own text, and decides nothing.
            unreached: Whether that is what the hub's engine says, which cannot see what is behind it.
        """
        now, why = time.time(), why.rstrip(".")
        self._in.discard(name)
        found = self._out.setdefault(name, _Out(now, why, why, now, unreached))
        found.now, found.last, found.unreached = why, now, unreached

    def left(self, names: Sequence[str]) -> None:
        """Their job has ended: nothing is known of them until they are met in another."""
        self._in -= set(names)

    def refused(self, name: str, why: str) -> None:
        """It ended a job before that ran."""
        self._in.discard(name)
        self._refused[name] = (time.monotonic(), why.rstrip("."))

    def is_refused(self, name: str) -> bool:
        """Whether it is too early to ask it to take a job again."""
        return name in self._refused and time.monotonic() - self._refused[name][0] < _REFUSED

    def is_worth_asking(self, name: str, heard: float | None) -> bool:
        """Whether one that is out may be back: the hub's engine last heard of it then; None if that is long ago."""
        out = self._out.get(name)
        if out is None or heard is None:
            return heard is not None
        # a peer can be back without a sign that the hub sees; a machine that is, is heard of
        return heard > out.last or not out.unreached

    def is_silent(self, name: str) -> bool:
        """Whether its peer, or engine, was there and did not answer when it was asked last; its own word is enough.

        Of such a one no more is awaited than of one that says so: a shorter sign of life.
        """
        return name in self._out and "silent" in self._out[name].now

    def why(self, name: str) -> str:
        """Why it cannot be asked: how it is now, since when it is out, and with what that began."""
        if name in self._refused:
            return self._refused[name][1]
        if name not in self._out:
            return _UNKNOWN
        out = self._out[name]
        since = f"out since {time.strftime('%H:%M:%S', time.localtime(out.since))}"
        same = re.sub(r"\d+", "", out.now) == re.sub(r"\d+", "", out.first)
        return f"{out.first} ({since})" if same else f"{out.now} ({since}; before: {out.first})"
