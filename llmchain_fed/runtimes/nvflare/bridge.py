"""The two classes that run inside the engine's job processes: they carry frames and nothing else.

Knows frames, the engine's call interface and who called. No torch, no model, no loop: those live in processes of their
own behind a UNIX socket, so that a model that runs out of memory is one absent participant and never a dead job (the
engine fails the whole job when one of its processes dies). The engine lets every participant of a job call every other:
a site hears the hub alone.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from nvflare.collab import collab

from llmchain_fed import untrusted
from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.messaging.channel import Channel
from llmchain_fed.runtimes.nvflare.job import SOCKET

_REDIAL = 0.5  # seconds between attempts to reach the driver
_LINGER = 600.0  # seconds a job waits for a driver that went away
_SEND = 60.0  # seconds a frame may take to or from the driver
_TICK = 0.5  # seconds between looks whether the driver went away while sites answer
_SOONER = 2.0  # seconds by which a site's bridge answers before the hub gives the site up
_DEAF = "its engine answers, its peer does not:"
_OTHER_BRIDGE = "it offers another bridge than the hub asks: both need one version of llmchain-fed."
_CALL = "exchange"  # the only function of a site that the hub calls
_HUB = "server"  # what the engine calls the hub; no site can have the name, see `kits`
_EACH, _EVERY = 100, 1000  # refused calls of one caller that are written down each, and of those after them every …th
_log = logging.getLogger(__name__)


def _without_torch() -> None:
    """Keeps the engine from importing torch, for tensors that never come here: 200 MB and seconds in each process.

    It does so whenever torch is installed (NVFlare 2.9.0, collab/runtime/executor.py and controller.py,
    `optional_import("nvflare.app_opt.pt.decomposers")`), after it has made its components.
    """
    sys.modules.setdefault("nvflare.app_opt.pt", None)  # type: ignore[arg-type]


class SiteBridge:
    """At a participant: hands a frame of the hub to the peer process and its answer back."""

    def __init__(self) -> None:
        _without_torch()
        self._refused: dict[str, int] = {}
        """caller → how many of its calls were refused"""
        self._lock = threading.Lock()
        self._notes: queue.Queue[bytes] | None = None

    @collab.publish  # type: ignore[untyped-decorator]  # nvflare has no types
    def exchange(self, frame: bytes, seconds: float = frames.TRANSFER) -> bytes:
        """One frame in, one frame out, within so many seconds; that nobody answers at the socket is an answer too.

        Anybody but the hub is refused before a byte of the frame is looked at or handed on, and the peer is told who it
        was, for its audit file. What goes wrong here is for this site's log: the hub learns no path of this machine,
        but which link broke, before its own patience ends.
        """
        try:
            caller = str(collab.caller)
            if caller != _HUB:
                return self._refuse(caller, len(frame) if isinstance(frame, bytes) else 0)
            if not isinstance(frame, bytes) or len(frame) > frames.MAX_FRAME:
                return _fault("TransportError", "what this site was sent is no frame.")
            what = "the time that this site is given"
            allowed = untrusted.checked(heads.Allowed, {"seconds": seconds}, what=what, error=TransportError).seconds
            path = os.environ.get(SOCKET, "")
            if not path:
                return _fault("TransportError", f"{_DEAF} its engine was not told where the peer listens.")
            return frames.ask(path, frames.pack({"do": "carry", "caller": caller}, frame), allowed)
        except frames.SilentError as error:
            _log.warning("no answer of the peer: %s", untrusted.printable(error))
            return _fault("TransportError", f"its peer has been silent for {allowed:.0f} s.")
        except Exception as error:  # the engine would send the traceback
            _log.warning("no answer of the peer: %s", untrusted.printable(error))
            return _fault(
                "TransportError", f"{_DEAF} nobody listens, or it went away; the site's engine.log says more."
            )

    def _refuse(self, caller: str, size: int) -> bytes:
        """Sends a caller away; its name and count are written down by another thread, so that nobody waits for it."""
        caller = untrusted.printable(caller, 100) or "?"
        with self._lock:
            count = self._refused[caller] = self._refused.get(caller, 0) + 1
            if self._notes is None:
                self._notes = queue.Queue(maxsize=1000)
                threading.Thread(target=self._write_down, args=(self._notes,), daemon=True).start()
            if count <= _EACH or count % _EVERY == 0:
                with suppress(queue.Full):
                    note = {"do": "refused", "caller": caller, "bytes": size, "count": count}
                    self._notes.put_nowait(frames.pack(note))
        return _fault("PolicyError", "only the hub may call a site; this call was not heard, and is written down.")

    @staticmethod
    def _write_down(notes: queue.Queue[bytes]) -> None:
        while True:
            note = notes.get()
            _log.warning("a call was refused: %s", untrusted.printable(note[4:].decode()))
            with suppress(TransportError):  # the log has it
                frames.ask(os.environ.get(SOCKET, ""), note)


def _fault(kind: str, message: str) -> bytes:
    return frames.pack({"error": {"type": kind, "message": message}})


class HubBridge:
    """At the hub: dials the driver's socket and carries its frames to the sites, until told to stop.

    A driver that goes away is waited for, so that one that is started again finds its job running.

    Args:
        socket: The path at which the driver listens.
        run: The name of this submission of the job, by which the driver knows it.
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
                driver.send_bytes(frames.pack({"run": self.run_id, "sites": sites}), _SEND)
                try:
                    self._serve(driver, set(sites))
                    return
                finally:
                    alone_since = time.monotonic()
            time.sleep(_REDIAL)

    def _serve(self, driver: Channel, sites: set[str]) -> None:
        """Carries frames until the driver says stop, or the job is aborted."""
        while not collab.is_aborted:
            if not driver.poll(_REDIAL):
                continue
            told = driver.recv_bytes(frames.MAX_OUTER, _SEND)
            order, frame = heads.one_of(told, heads.Order, heads.StopOrder, what="what the driver told the bridge")
            if not isinstance(order, heads.Order):
                return
            known = [name for name in order.nodes if name in sites]
            for name in order.nodes:
                if name not in sites:
                    self._tell(driver, name, "it is not connected to the hub: it was not when this job began.")
            if known:
                self._ask(driver, known, bytes(frame), order.seconds)
            driver.send_bytes(frames.pack({"do": "done"}), _SEND)

    def _ask(self, driver: Channel, names: list[str], frame: bytes, seconds: float) -> None:
        """Carries a frame to sites and tells the driver what each answers, as it comes.

        Another thread waits for the sites: a driver that gave up, and dials anew to say so, is not kept waiting by a
        site that is silent.
        """
        told: queue.Queue[tuple[str, object] | None] = queue.Queue()
        calls, troubles = _call(names, frame, seconds)

        def wait(answers: Any) -> None:
            try:
                for name, answer in answers:
                    told.put((name, answer))
                for name, error in answers.failures.items():
                    told.put((name, error))
            except Exception as error:  # of the engine's: it stands for all who have not answered
                _log.warning("the engine gave no answers: %s", untrusted.printable(error))
            told.put(None)

        for name, trouble in troubles.items():
            self._tell(driver, name, trouble)
        for answers in calls:
            threading.Thread(target=wait, args=(answers,), daemon=True).start()
        open_calls = len(calls)
        waited = set(names) - troubles.keys()
        while open_calls:
            try:
                found = told.get(timeout=_TICK)
            except queue.Empty:
                if driver.poll():
                    msg = "the driver went away while sites were asked"
                    raise EOFError(msg) from None
                continue
            if found is None:
                open_calls -= 1
                continue
            name, answer = found
            if name not in waited:
                continue
            waited.remove(name)
            if isinstance(answer, Exception):
                self._tell(driver, name, _which_link(answer, seconds))
            elif isinstance(answer, bytes) and len(answer) <= frames.MAX_FRAME:
                driver.send_bytes(frames.pack({"node": name}, answer), _SEND)
            else:
                self._tell(driver, name, "its answer is no frame")

    @staticmethod
    def _tell(driver: Channel, name: str, message: str) -> None:
        error = {"type": "TransportError", "message": message}
        driver.send_bytes(frames.pack({"node": name, "error": error}), _SEND)


def _call(names: list[str], frame: bytes, seconds: float) -> tuple[list[Any], dict[str, str]]:
    """Begins a call to sites; what will contain their answers, and who cannot be called, with why.

    The engine refuses a call to all of them where one of them says that its bridge takes other arguments: that is this
    site's own trouble.
    """

    def begin(asked: list[str]) -> Any:
        allowed = max(seconds - _SOONER, seconds / 2)
        return collab.get_clients(asked)(timeout=seconds, blocking=False).exchange(frame, allowed)

    try:
        return [begin(names)], {}
    except Exception as error:  # the engine has no class for it, and says not whose fault it is
        _log.warning("not all sites can be called: %s", untrusted.printable(error))
    calls, troubles = [], {}
    for name in names:
        if collab.is_aborted:
            msg = "the job was ended while sites were asked"
            raise TransportError(msg)
        try:
            calls.append(begin([name]))
        except Exception as error:
            troubles[name] = _OTHER_BRIDGE if _is_of_another_bridge(error) else _which_link(error, seconds)
    return calls, troubles


def _is_of_another_bridge(error: Exception) -> bool:
    """Whether a call was not begun because the site says that its bridge takes other arguments.

    The engine has no class for it (NVFlare 2.9.0, collab/api/call_utils.py and proxy.py): a TypeError where it bound
    the arguments, a RuntimeError that quotes the function's name where it compared them.
    """
    cause = getattr(error, "cause", error)
    return isinstance(cause, TypeError) or (isinstance(cause, RuntimeError) and f"'{_CALL}'" in str(cause))


def _which_link(error: Exception, seconds: float) -> str:
    """What a failed call says of a site: the engine's error contains the name of what was raised, here or there."""
    if isinstance(error, TimeoutError) or getattr(error, "cause_type", None) == "TimeoutError":
        return f"its engine has been silent for {seconds:.0f} s."
    return f"it is not connected to the hub ({untrusted.printable(getattr(error, 'cause', error), 200)})."
