"""NVFlare: the transport across organisations. Keeps a job running and calls the sites' peers through it.

Knows the engine's session, the link to the job, and sliced calls. Knows nothing of models or rounds. The loop never
notices that a job was replaced: peers keep their models and the call they are at, and the driver goes on with it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError, FederationError, TransportError
from llmchain_fed.federated.runtime import Operation, Payload
from llmchain_fed.runtimes import frames
from llmchain_fed.runtimes.nvflare.job import write_job
from llmchain_fed.runtimes.nvflare.link import Link
from llmchain_fed.runtimes.nvflare.names import check_name
from llmchain_fed.runtimes.nvflare.session import EngineSession
from llmchain_fed.runtimes.sliced import SlicedCalls

_NAME = "llmchain_fed"
_REUSE = 3.0  # seconds in which the bridge of a running job, left by a killed driver, finds this one
_JOB_START = 90.0  # seconds from submission to the bridge's call
_REFUSED = 600.0  # seconds before a site that refused a job is asked to take one again
_AGAIN = 60.0  # seconds before a site that the engine lists but nobody reaches is worth another job


class _JobEndedError(TransportError):
    """The engine ended a job before its bridge called: a site refused it."""


class NVFlare:
    """Participants at several organisations, each behind its own NVFlare site and its own peer process.

    `FederatedAveraging(chain, runtime=NVFlare("kits/admin", sites=["org-a", "org-b"])).fit(3)` on the hub's machine,
    where the engine's server runs. Mutual TLS by the engine; what travels is JSON and update bytes, in slices, and no
    code. A site that is cut off is absent and asked again when it is back; the server may be killed and restarted
    within `recovery` seconds, and this process too: the job waits for it.

    Args:
        admin: Folder of the administrator's kit.
        sites: Their names, which are the participants' names.
        socket: Where the job finds this process; by default a path that follows from `admin`.
        patience: seconds without a sign of life after which a site counts as absent.
        recovery: seconds within which the engine must be back after it went away.
        startup: seconds to wait for all sites to connect before the first job, and before the next once all were lost;
            later ones join as they come.

    Raises:
        ConfigError: No kit, no or doubled sites, or somebody listens at the socket.
        MissingExtraError: The extra `nvflare` is not installed.
    """

    def __init__(
        self,
        admin: str | Path,
        *,
        sites: Sequence[str],
        socket: str | Path | None = None,
        patience: float = 30.0,
        recovery: float = 120.0,
        startup: float = 60.0,
    ) -> None:
        if isinstance(sites, str) or not sites or len(set(sites)) < len(sites):
            msg = f"sites are the names of the participating sites, each once, got {sites!r}."
            raise ConfigError(msg)
        for name in sites:
            check_name(name)
        if not min(patience, recovery, startup) > 0:
            msg = f"patience, recovery and startup are positive numbers of seconds, got {patience, recovery, startup}."
            raise ConfigError(msg)
        self._sites = [str(name) for name in sites]
        self._session = EngineSession(Path(admin).absolute())
        self._socket = Path(socket).absolute() if socket is not None else _socket_of(Path(admin).absolute())
        self._patience, self._recovery, self._startup = patience, recovery, startup
        self._calls = SlicedCalls(self._exchange, patience)
        self._link: Link | None = None
        self._job: str | None = None
        self._reached: set[str] = set()
        self._lost: dict[str, float] = {}
        """site → when it was last found missing, in seconds since the epoch"""
        self._retried: dict[str, float] = {}
        self._refused: dict[str, tuple[float, str]] = {}
        """site → when it last ended a job before it ran, and what the engine said"""
        self._closed = False
        self.jobs = 0
        """jobs submitted: more than one says that the engine or a site was away"""

    def __repr__(self) -> str:
        return f"NVFlare({len(self._sites)} sites ({', '.join(self._sites[:4])}), {self.jobs} jobs submitted)"

    def __enter__(self) -> NVFlare:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- the seam ---------------------------------------------------------------------------------------------------

    def nodes(self) -> list[str]:
        """The sites, whether they are connected now or not."""
        return list(self._sites)

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._calls.expect(num_bytes, op)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """As `Transport.call`; a site that is not connected is a `TransportError`, not awaited.

        Raises:
            FederationError: A node nobody knows.
        """
        names = list(nodes)
        for name in names:
            if name not in self._sites:
                msg = f"there is no site {name!r}. Known: {', '.join(self._sites)}."
                raise FederationError(msg)
        trouble, started = "it is not connected to the hub.", time.monotonic()
        try:
            self._find(names)
        except TransportError as error:
            trouble = str(error)
        there = [name for name in names if name in self._reached]
        left = max(timeout - (time.monotonic() - started), 0.0) if timeout is not None else None
        yield from self._calls.call(op, there, payload, left)
        for name in names:
            if name not in there:
                why = self._refused[name][1] if name in self._refused else trouble
                yield name, TransportError(f"site {name!r} cannot be asked: {why}")

    def close(self) -> None:
        """Tells the peers that the federation is over, ends the job, and closes session and socket; for good."""
        self._closed = True  # from here on nothing is recovered or submitted
        try:
            if self._link is not None:
                with suppress(FederationError):
                    for _ in self._calls.call("stop", [n for n in self._sites if n in self._reached], b"{}", 5.0):
                        pass
                self._link.close()
                self._link = None
                with suppress(TransportError):
                    self._end_job()
        finally:
            self._session.close()

    # --- sites ------------------------------------------------------------------------------------------------------

    def _find(self, names: Sequence[str]) -> None:
        """Makes sure that there is a job, and that sites which came (back) are in it."""
        if self._closed:
            msg = "this transport is closed."
            raise TransportError(msg)
        if self._link is None:
            self._link = Link(self._socket)
            if (sites := self._link.wait(_REUSE)) is not None:
                self._meet(sites)
            else:
                self._submit(self._startup)
        missing = [name for name in names if name not in self._reached and not self._is_refused(name)]
        if not missing:
            return
        heard = self._session.connected()
        back = [name for name in missing if heard.get(name, 0.0) > self._lost.get(name, 0.0)]
        self._meet(back)
        # The engine never puts a site that restarted, or came late, into a running job: it takes a new one.
        now = time.monotonic()
        outside = [n for n in back if n not in self._reached and now - self._retried.get(n, -_AGAIN) >= _AGAIN]
        if outside:
            self._retried |= dict.fromkeys(outside, now)
            self._link.release()
            with suppress(TransportError):
                self._end_job()
            # When all were lost it is as at the start: they find a restarted hub one by one.
            self._submit(0.0 if self._reached else self._startup)

    def _meet(self, names: Sequence[str]) -> None:
        """Pings sites that may be in the job; nothing is recovered for that."""
        asked = [name for name in names if name in self._sites]
        if self._link is None or not asked:
            return
        with suppress(TransportError):
            for name, reply in self._link.exchange(asked, frames.pack({"do": "ping"}), min(self._patience, 10.0)):
                if not isinstance(reply, Exception):  # that its peer is down is for the call to say
                    self._reached.add(name)
                    self._lost.pop(name, None)

    def _exchange(self, nodes: Sequence[str], frame: bytes, seconds: float) -> list[tuple[str, bytes | Exception]]:
        """One frame to several sites, through whichever job there is."""
        until = time.monotonic() + self._recovery
        while True:
            try:
                if self._link is None:
                    msg = "this transport is closed."
                    raise TransportError(msg)
                replies = self._link.exchange(nodes, frame, seconds)
                break
            except TransportError as error:
                hopeless = "" if not self._closed and time.monotonic() <= until else "It was not tried again."
                try:
                    if not hopeless:
                        self._recover(until)
                except TransportError as lost:
                    hopeless = str(lost)
                if hopeless:
                    for node in nodes:
                        self._miss(node)
                    return [(node, TransportError(f"{error} {hopeless}")) for node in nodes]
        for node, reply in replies:
            if isinstance(reply, Exception):
                self._miss(node)
        return replies

    def _miss(self, node: str) -> None:
        self._reached.discard(node)
        self._lost[node] = time.time()

    # --- jobs -------------------------------------------------------------------------------------------------------

    def _recover(self, until: float) -> None:
        """Waits for the job's bridge, or for the engine and its sites, and submits a new job.

        Raises:
            TransportError: Not in time.
        """
        if self._link is None or self._closed:
            msg = "this transport is closed."
            raise TransportError(msg)
        if self._link.wait(_REUSE) is not None:
            return
        wanted, since = set(self._reached), time.time()
        while True:
            try:
                heard = self._session.connected()
                back = {name for name in wanted if heard.get(name, 0.0) > since}
                # a killed server forgets its sites, which find it again one by one
                if back == wanted or time.time() - since > self._recovery / 2:
                    self._submit(0.0)
                    return
            except TransportError as error:
                if time.monotonic() > until:
                    msg = f"The engine was not back within {self._recovery:g} s: {error}"
                    raise TransportError(msg) from error
            time.sleep(1.0)

    def _submit(self, wait: float) -> None:
        """Submits a job once all sites are connected, or `wait` seconds have passed, and meets those in it.

        The engine ends a job for all as soon as one site refuses it. So after that each is tried alone, and the job
        goes on with those that take it.

        Raises:
            TransportError: No site is connected, or the job does not come up.
        """
        connected = self._connected(wait)
        try:
            self._run_job(connected)
        except _JobEndedError as ended:
            if len(connected) == 1:
                self._refused[connected[0]] = (time.monotonic(), str(ended))
                raise
            willing = [name for name in connected if self._takes_a_job(name)]
            if not willing:
                raise
            self._run_job(willing)

    def _connected(self, wait: float) -> list[str]:
        """The sites that can be in a job now."""
        until = time.monotonic() + wait
        while True:
            try:
                heard = self._session.connected()
                here = [name for name in self._sites if name in heard and not self._is_refused(name)]
                if len(here) == len(self._sites) or (here and time.monotonic() >= until):
                    return here
                problem = f"none of the sites {', '.join(self._sites)} is connected to the hub."
            except TransportError as error:
                problem = str(error)
            if time.monotonic() >= until:
                raise TransportError(problem)
            time.sleep(0.5)

    def _takes_a_job(self, name: str) -> bool:
        try:
            self._run_job([name])
        except _JobEndedError as ended:
            self._refused[name] = (time.monotonic(), str(ended))
            return False
        assert self._link is not None
        self._link.release()
        with suppress(TransportError):
            self._end_job()
        return True

    def _is_refused(self, name: str) -> bool:
        return name in self._refused and time.monotonic() - self._refused[name][0] < _REFUSED

    def _run_job(self, sites: Sequence[str]) -> None:
        """Submits a job to some sites and waits until its bridge calls.

        Raises:
            _JobEndedError: The engine ended it before.
            TransportError: It does not come up.
        """
        assert self._link is not None
        run = secrets.token_hex(8)
        self._reached.clear()
        self._link.expect(run)
        with tempfile.TemporaryDirectory(prefix="llmchain_fed-job-") as folder:
            job = write_job(Path(folder), name=_NAME, sites=sites, socket=str(self._socket), run=run)
            self._job = self._session.submit(job)
        self.jobs += 1
        until = time.monotonic() + _JOB_START
        while (present := self._link.wait(1.0)) is None:
            status, detail = self._session.status(self._job)
            if status.startswith("FINISHED"):
                msg = (
                    f"the engine ended the job before it ran ({status}{': ' + detail if detail else ''}). A site whose "
                    "local/resources.json does not list the bridge classes refuses it; its own log says so."
                )
                raise _JobEndedError(msg)
            if time.monotonic() > until:
                msg = f"the job did not come up within {_JOB_START:g} s (status {status})."
                raise TransportError(msg)
        self._meet(present)

    def _end_job(self) -> None:
        if self._job is not None:
            job, self._job = self._job, None
            until = time.monotonic() + 5.0
            while self._session.status(job)[0].startswith("RUNNING"):
                if time.monotonic() > until:
                    self._session.abort(job)
                    return
                time.sleep(0.5)


def _socket_of(admin: Path) -> Path:
    """A short path that is the same whenever this kit's driver starts; `frames.listen` sees to whose folder it is."""
    folder = Path(tempfile.gettempdir()) / f"llmchain_fed-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{hashlib.sha256(str(admin).encode()).hexdigest()[:16]}.sock"
