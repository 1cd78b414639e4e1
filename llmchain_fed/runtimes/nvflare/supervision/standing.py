"""Standing: who is connected, since when, and what is wrong with it; and the diary in which an engine says so.

Knows the reports of NVFlare's process, the clock, the state's file and whoever is given lines. Knows nothing of
processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from llmchain_fed.runtimes.nvflare import engine_state
from llmchain_fed.runtimes.nvflare.engine_state import SeenSite, State
from llmchain_fed.runtimes.nvflare.supervision import news

SILENT = 15.0  # seconds: a site's engine is heard every four
_FORGIVEN = 150.0  # seconds after its last refusal in which the same trouble is not said again
_STANDS = {news.ELSEWHERE: 40.0}  # and in which it stands, where that is less: a second engine tries every 30
_MOST = 10_000  # names
TURNED_AWAY = {
    news.ELSEWHERE: "this site's name is in use from another place: the kit {name} was copied, or its engine runs on "
    "another machine as well. Stop one of them",
    news.OTHER_KEY: "the hub knows another key under the name {name} and does not let this one in",
    news.NOT_ALLOWED: "the hub does not let this certificate in: it was revoked, replaced, or never in its list. If "
    "the hub's operator agrees, get another with `llmchain-fed provision renew`",
    news.LATER: "the hub cannot look up now whether this certificate may come: its operator sees why",
}
"""what a site's operator is told when the hub does not let it in"""
_DAY = 86_400.0  # seconds a site is out after which it is no longer told of
_SAY_AGAIN = 60.0  # seconds after which it is said again for what it waits


class SitesSeen:
    """At the hub: the sites."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.seen: dict[str, SeenSite] = {}
        self._now = now
        self._refused: dict[str, tuple[float, int]] = {}
        """name → when it was refused last, and why"""

    def heard(self, peers: Mapping[str, news.SeenPeer]) -> list[str]:
        """Takes over who is connected now; returns a line for each who came or went."""
        now, lines = self._now(), []
        for name, peer in peers.items():
            former = self.seen.get(name)
            if former is not None and former.connected and former.fingerprint == peer.fingerprint:
                continue
            if peer.silent >= SILENT or (former is None and len(self.seen) >= _MOST):
                continue
            if former is None or former.since is None:
                lines.append(f"site {name} is connected, from {peer.address}")
            elif former.connected:
                lines.append(f"site {name} came again, with another certificate")
            else:
                lines.append(f"site {name} is back after {now - former.since:.0f} s")
            # who was turned away before was another, or the same with what it may not come with any more
            self._refused.pop(name, None)
            self.seen[name] = SeenSite(connected=True, since=now, fingerprint=peer.fingerprint)
        for name, site in list(self.seen.items()):
            there = peers.get(name)
            if site.connected and (there is None or there.silent >= SILENT):
                why = "its connection was closed" if there is None else f"nothing was heard of it for {SILENT:g} s"
                lines.append(f"site {name} is out: {why}")
                self.seen[name] = site.model_copy(update={"connected": False, "since": now})
        self._forgive(now)
        self._forget(now)
        return lines

    def refused(self, told: news.RefusedSite) -> list[str]:
        """Somebody was not let in: a line, unless it is the same trouble as before."""
        last, code = self._refused.get(told.name, (0.0, 0))
        if len(self._refused) < _MOST or told.name in self._refused:
            self._refused[told.name] = (self._now(), told.code)
            site = self.seen.get(told.name, SeenSite())
            self.seen[told.name] = site.model_copy(update={"trouble": told.says})
        if code == told.code and self._now() - last < _FORGIVEN:
            return []
        return [f"site {told.name}{' ' if told.code == news.ELSEWHERE else ': '}{told.says}"]

    def _forgive(self, now: float) -> None:
        for name, (last, code) in list(self._refused.items()):
            site = self.seen[name]
            if now - last >= _STANDS.get(code, _FORGIVEN):
                site = self.seen[name] = site.model_copy(update={"trouble": None})
            if now - last >= _FORGIVEN:
                del self._refused[name]
                if not site.connected and (site.since is None or code == news.NOT_ALLOWED):
                    del self.seen[name]  # it was never in, or is so no more

    def _forget(self, now: float) -> None:
        """A site that left for good is nobody's problem for ever."""
        for name, site in list(self.seen.items()):
            if not site.connected and name not in self._refused and now - (site.since or 0.0) >= _DAY:
                del self.seen[name]


class HubLink:
    """At a site: the connection to the hub."""

    def __init__(self, where: str, now: Callable[[], float] = time.time) -> None:
        self.connected = False
        self.since: float | None = None
        """since when it is connected, or is not any more; None before the first time"""
        self._where, self._now = where, now

    def heard(self, peers: Mapping[str, news.SeenPeer]) -> str | None:
        """Takes over whether the hub is heard; a line if that changed."""
        hub, now = peers.get(news.HUB), self._now()
        connected = hub is not None and hub.silent < SILENT
        if connected == self.connected:
            return None
        former, self.connected = self.since, connected
        self.since = now
        if connected:
            since = "" if former is None else f" again, after {now - former:.0f} s"
            return f"connected to the hub at {self._where}{since}"
        why = "it was closed" if hub is None else f"nothing was heard for {SILENT:g} s"
        return f"the connection to the hub at {self._where} is lost ({why})"


class Diary:
    """One engine's: at the hub with its `sites`, at a site with its `link` to the hub and its peer's `socket`."""

    def __init__(
        self,
        kit: Path,
        name: str,
        hub: str,
        say: Callable[[str], None],
        sites: SitesSeen,
        link: HubLink | None,
        socket: Path | None = None,
    ) -> None:
        self.state: State = "starting"
        self.lasting = False
        """it ended by itself, and a start alone changes nothing"""
        self.certificate_ends: float | None = None
        """seconds since the epoch"""
        self._kit, self._name, self._hub, self._say, self._sites, self._link = kit, name, hub, say, sites, link
        self._socket = str(socket.absolute())[:4096] if socket is not None else None
        self._started, self._says, self._unwritten = time.time(), "starts", False
        self._repeated: tuple[str, float] = ("", 0.0)
        """what `repeat` said last, and when"""

    def tell(self, state: State, says: str) -> None:
        """Says it, and writes it down."""
        self._repeated = ("", 0.0)
        self._say(says)
        self.write(state, says)

    def repeat(self, state: State, says: str) -> None:
        """Tells what lasts: once a minute, and when something else was told meanwhile."""
        last, at = self._repeated
        if says != last or time.monotonic() - at >= _SAY_AGAIN:
            self.tell(state, says)
            self._repeated = (says, time.monotonic())

    def write(self, state: State | None = None, says: str | None = None) -> None:
        """Writes down what is so now; that it cannot be written is said once, and stops nothing."""
        self.state, self._says = state or self.state, says or self._says
        link, ended = self._link, self.state == "ended"
        found = engine_state.EngineState(
            name=self._name, pid=os.getpid(), started=self._started, written=time.time(), state=self.state,
            says=self._says[:2000], hub=self._hub, connected=link.connected and not ended if link is not None else None,
            since=link.since if link is not None and not ended else None, certificate_ends=self.certificate_ends,
            lasting=self.lasting, socket=self._socket, sites=self._sites.seen,
        )  # fmt: skip
        try:
            engine_state.write(self._kit, found)
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                self._say(f"{engine_state.FILE} in {self._kit} cannot be written: {error.strerror or error}")
            self._unwritten = True
