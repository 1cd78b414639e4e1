"""Gathering: which of a federation's sites can be asked now, why the others cannot, and waiting until they can.

Knows names, times and reasons, when the hub's engine last heard of each site, and what it thinks of them. Knows nothing
of jobs or calls. The first reason of an absence is kept: what is found later, such as that a machine is no longer
connected, does not tell what happened. The engine lists a site for half a minute after it is gone, and a job with such
a one begins late: those count that it heard just now.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.nvflare import engine_state
from llmchain_fed.runtimes.nvflare.session import EngineSession

_REFUSED = 600.0  # seconds before a site that refused a job is asked to take one again
_UNKNOWN = "it is not connected to the hub"
_FRESH = 10.0  # seconds since the engine heard of a site that is there: it says so every four
_NOBODY = 6.0  # times as long is waited while nobody is there to begin with
_RETURN = 15.0  # seconds for the other sites once one has found a hub that was away: each tries every ten
_LONELY = 45.0  # seconds for the first of them
_LOOK = 0.5
_CURRENT = 30.0  # seconds since the hub's engine wrote, which it does every ten


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

        `why` may be the site's own text, and decides nothing. `unreached`: that is what the hub's engine says, which
        cannot see what is behind it.
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


class _NobodyError(TransportError):
    """The engine is there, and no site."""


def in_the_hubs_words(session: EngineSession, name: str, answer: TransportError) -> TransportError:
    """Why a call to a site failed, with what the hub's engine knows of that first: it put it out, or lost it."""
    state = None
    with suppress(ConfigError):
        state = engine_state.of_hub(session.port)
    seen = state.sites.get(name) if state is not None and time.time() - state.written < _CURRENT else None
    if seen is None or seen.connected or (seen.trouble is None and seen.since is None):
        return answer
    since = f" since {time.strftime('%H:%M:%S', time.localtime(seen.since))}" if seen.since is not None else ""
    word = seen.trouble.rstrip(".") if seen.trouble is not None else f"it is not connected to the hub{since}"
    return TransportError(f"{word} ({str(answer).rstrip('.')}).")


class Gathering:
    """Who can be in a job; `startup` seconds are waited for others, six times as many while nobody is there."""

    def __init__(self, session: EngineSession, sites: Sites, *, startup: float, say: Callable[[str], object]) -> None:
        self._session, self._sites, self._startup, self._say = session, sites, startup, say
        self._told: dict[str, str] = {}
        """site → the trouble that was said of it"""

    def heard(self) -> dict[str, float]:
        """When the engine last heard of the sites that are there, in seconds since the epoch.

        Raises:
            TransportError: It does not answer.
        """
        now = time.time()
        return {name: last for name, last in self._session.connected().items() if now - last <= _FRESH}

    def able(self, names: Sequence[str]) -> list[str]:
        """Those of these sites that a job may be tried with: not those that refused one.

        The hub's engine knows a name's trouble: it turned somebody away who came under it. That is said; whoever has
        the name and is connected is well, and stays in.
        """
        state = None
        with suppress(ConfigError):  # what it wrote is read for a better word alone
            state = engine_state.of_hub(self._session.port)
        able = []
        for name in names:
            seen = state.sites.get(name) if state is not None else None
            trouble = seen.trouble if seen is not None else None
            if trouble is None:
                self._told.pop(name, None)
            elif self._told.get(name) != trouble:
                self._told[name] = trouble
                self._say(f"site {name}: {trouble}")
            if trouble is not None and seen is not None and not seen.connected:
                self._sites.missed(name, trouble)
            elif not self._sites.is_refused(name):
                able.append(name)
        return able

    def wait(self) -> list[str]:
        """The sites that are there: all, or those who came within the grace period.

        Raises:
            TransportError: Nobody came, or the engine does not answer.
        """
        began, told, answered, first = time.monotonic(), "", False, None
        while True:
            here: list[str] = []
            absent = self._sites.names
            try:
                heard = self.heard()
                here, answered = [name for name in self.able(self._sites.names) if name in heard], True
                absent = [name for name in self._sites.names if name not in here and not self._sites.is_refused(name)]
                problem = (
                    f"no site can be in a job: {'; '.join(f'{n}: {self._sites.why(n)}' for n in self._sites.names)}."
                )
            except TransportError as error:
                problem = str(error)
            now = time.monotonic()
            first = first or (now if here else None)  # the grace is theirs who come after the first
            spent = now - (first if first is not None and here else began)
            most = self._startup * (1.0 if here or not answered else _NOBODY)
            if here and (not absent or spent >= most):
                return here
            if not absent or spent >= most:
                raise TransportError(problem)
            line = f"waiting for {', '.join(absent)}; " if answered else f"{problem} Waiting for it; "
            end = "going on without them" if here else "giving up"
            if line != told:
                self._say(f"{line}{end} after {most - spent:.0f} s")
                told = line
            time.sleep(_LOOK)

    def wait_again(self, names: Sequence[str], seconds: float, until: float) -> list[str]:
        """Those of these sites that the engine has heard of since now, once it is there and not after `until`.

        Raises:
            TransportError: It was not back in time, or none of them was.
        """
        since, first, engine, told = time.time(), None, None, False
        problem = f"none of {', '.join(names)} was connected to it again."
        while True:
            try:
                heard, now = self.heard(), time.monotonic()
                engine = engine or now
                back = self.able([name for name in names if heard.get(name, 0.0) > since])
                first = first or (now if back else None)
                if back and (len(back) == len(names) or (first is not None and now - first > _RETURN)):
                    return back
                if not back and now - engine > _LONELY:
                    msg = f"The hub's engine answers, and {problem}"
                    raise _NobodyError(msg)
            except _NobodyError:
                raise
            except TransportError as error:
                problem = str(error)
                if not told:
                    self._say(f"{problem} Waiting for it; giving up after {max(until - time.monotonic(), 0):.0f} s")
                    told = True
            if time.monotonic() > until:
                msg = f"The engine was not back within {seconds:g} s: {problem}"
                raise TransportError(msg)
            time.sleep(_LOOK)
