"""Diary: what an engine says on the screen, and writes down for other commands to read.

Knows the state's file and whoever is given lines. Knows nothing of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmchain_fed.runtimes.nvflare import engine_state
from llmchain_fed.runtimes.nvflare.supervision.standing import HubLink, SitesSeen

_SAY_AGAIN = 60.0  # seconds after which it is said again for what it waits
State = Literal["starting", "waiting", "running", "stopping", "ended"]


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
