"""The two classes that run inside the engine's job processes: they carry frames and nothing else.

Knows frames and the engine's call interface. No torch, no model, no loop: those live in processes of their own behind a
UNIX socket, so that a model that runs out of memory is one absent participant and never a dead job (the engine fails
the whole job when one of its processes dies).
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from nvflare.collab import collab

from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes import frames
from llmchain_fed.runtimes.nvflare.job import SOCKET

_REDIAL = 0.5  # seconds between attempts to reach the driver
_LINGER = 600.0  # seconds a job waits for a driver that went away


def _without_torch() -> None:
    """Keeps the engine from importing torch, for tensors that never come here: 200 MB and seconds in each process.

    It does so whenever torch is installed (NVFlare 2.9.0, collab/runtime/executor.py and controller.py,
    `optional_import("nvflare.app_opt.pt.decomposers")`), after it has made its components.
    """
    sys.modules.setdefault("nvflare.app_opt.pt", None)  # type: ignore[arg-type]


class Site:
    """At a participant: hands a frame to the peer process and its answer back."""

    def __init__(self) -> None:
        _without_torch()

    @collab.publish  # type: ignore[untyped-decorator]  # nvflare has no types
    def exchange(self, frame: bytes) -> bytes:
        """One frame in, one frame out; that nobody answers at the socket is an answer too."""
        try:
            path = os.environ.get(SOCKET, "")
            if not path:
                msg = f"the site's engine was started without {SOCKET}, so it does not know where its peer listens."
                raise TransportError(msg)
            return frames.ask(path, frame)
        except TransportError as error:
            return frames.pack({"error": {"type": "TransportError", "message": str(error)}})


class Hub:
    """At the hub: dials the driver's socket and carries its frames to the sites, until told to stop.

    A driver that goes away is waited for, so that one that is started again finds its job running.

    Args:
        socket: Where the driver listens.
        run: Which submission of this job it is, for the driver to know it by.
    """

    def __init__(self, socket: str, run: str) -> None:
        _without_torch()
        self.socket, self.run_id = socket, run

    @collab.main  # type: ignore[untyped-decorator]  # nvflare has no types
    def run(self) -> None:
        """The job."""
        alone_since = time.monotonic()
        while not collab.is_aborted and time.monotonic() - alone_since < _LINGER:
            with suppress(TransportError, OSError, EOFError), frames.dial(self.socket) as driver:
                sites = [site.name for site in collab.clients]
                driver.send_bytes(frames.pack({"run": self.run_id, "sites": sites}))
                try:
                    self._serve(driver, set(sites))
                    return
                finally:
                    alone_since = time.monotonic()
            time.sleep(_REDIAL)

    def _serve(self, driver: Connection, sites: set[str]) -> None:
        """Carries frames until the driver says stop, or the job is aborted.

        Raises:
            EOFError, OSError, TransportError: The driver went away.
        """
        while not collab.is_aborted:
            if not driver.poll(_REDIAL):
                continue
            head, frame = frames.read(driver.recv_bytes(frames.MAX_OUTER))
            if head.get("do") == "stop":
                return
            known = [name for name in head["nodes"] if name in sites]
            for name in head["nodes"]:
                if name not in sites:
                    self._tell(driver, name, "it was not connected when this job began")
            if known:
                answers = collab.get_clients(known)(timeout=head["seconds"], blocking=False).exchange(bytes(frame))
                for name, answer in answers:
                    if isinstance(answer, bytes) and len(answer) <= frames.MAX_FRAME:
                        driver.send_bytes(frames.pack({"node": name}, answer))
                    else:
                        self._tell(driver, name, "its answer is no frame")
                for name, error in answers.failures.items():
                    self._tell(driver, name, str(error)[:300])
            driver.send_bytes(frames.pack({"done": True}))

    @staticmethod
    def _tell(driver: Connection, name: str, message: str) -> None:
        error: dict[str, Any] = {"type": "TransportError", "message": message}
        driver.send_bytes(frames.pack({"node": name, "error": error}))
