"""Jobs: keeps jobs of the engine running that all sites which can be asked are in, and carries frames through them.

Knows the engine's session, the link to the jobs, and who is there. Knows nothing of calls, payloads or rounds. A site
that came late, or came back, gets a job of its own beside the one that runs: the engine never puts it into that one,
and the others need not wait. Every wait has a bound, and is told to `say`.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes.messaging import chunked_calls, frames
from llmchain_fed.runtimes.nvflare.gathering import Gathering, Sites
from llmchain_fed.runtimes.nvflare.job import write_job
from llmchain_fed.runtimes.nvflare.link import JobLostError, Link, UnreachedError
from llmchain_fed.runtimes.nvflare.session import EngineSession

_NAME = "llmchain_fed"
_REUSE = 2.0  # seconds in which the bridge of a running job, left by a killed driver, finds this one
_JOB_START = 45.0  # seconds from submission to the bridge's call; a healthy one takes some five
_OTHERS = 5.0  # seconds for the other jobs once one of several has begun
_COMING = 8.0  # seconds the others wait for the job of a site that came back: once, then it begins beside the rounds
_AGAIN = 60.0  # seconds before a site that the engine lists but nobody reaches is worth another job
_LESS_OFTEN = 3  # times that this doubles
_PROBE = 4.0  # seconds a site may take to say that it is there
_KNOWN = 1.0  # the same, for one that was silent when it was asked last: it costs that much a round
_PARTS = 8  # jobs at a time in search of the site that ends them
_FAREWELL = 2.5  # seconds for what may as well be lost
_LOSSES = 4  # times in a row that a job may be lost with one frame: then it is the frame, or the hub, and not bad luck


@dataclass
class _Job:
    """A job that was submitted."""

    id: str
    run: str
    sites: list[str]
    since: float = field(default_factory=time.monotonic)


class Jobs:
    """Brings jobs up, and up again.

    Args:
        session: A session with the hub's engine.
        socket: The path at which the jobs find this process.
        sites: Keeps who is there; this keeps it up to date.
        recovery: seconds within which the engine must be back after it went away.
        startup: seconds to wait for sites that are not connected, before the first job and after all were lost.
        say: Is told in a line what is waited for.
    """

    def __init__(
        self,
        session: EngineSession,
        socket: Path,
        sites: Sites,
        *,
        recovery: float,
        startup: float,
        say: Callable[[str], object],
    ) -> None:
        self._session, self._socket, self._sites = session, socket, sites
        self._recovery, self._say = recovery, say
        self._gathering = Gathering(session, sites, startup=startup, say=say)
        self._link: Link | None = None
        self._running: dict[str, _Job] = {}
        """submission → its job, from its bridge's call on"""
        self._starting: list[_Job] = []
        self._tried: dict[str, tuple[int, float]] = {}
        """site → how many jobs of its own were begun for it in vain, and before when none is begun again"""
        self._closed = False
        self.count = 0
        """jobs submitted"""

    # --- who can be asked -------------------------------------------------------------------------------------------

    def find(self, names: Sequence[str]) -> None:
        """Makes sure that there is a job, and that sites which came (back) are in one, as far as that goes quickly.

        Raises:
            TransportError: There is none, and none can be had.
        """
        first = self._link is None
        link = self._open()
        found = link.wait(0.0 if self._starting else _REUSE)  # one that was given up dials again
        if found is None and not self._starting:
            self._begin()
        elif first and found is not None:
            self._say(f"found the job of an earlier process, with {', '.join(found)}")
            self._probe(found)
        self._look_after()
        missing = [name for name in names if name not in self._sites.there()]
        if not missing:
            return
        heard = self._gathering.heard()
        back = [n for n in missing if self._sites.is_worth_asking(n, heard.get(n))]
        inside = set(link.wait(0.0) or [])
        unreached = self._probe([n for n in back if n in inside])
        self._bring_back([n for n in back if n in heard and (n not in inside or n in unreached)])

    def exchange(self, nodes: Sequence[str], frame: bytes, seconds: float) -> list[tuple[str, bytes | Exception]]:
        """One frame to several sites, through whichever jobs there are; a job that went away is replaced.

        That ends after `recovery` seconds, or after a few jobs: what is lost again each time would be so for ever.
        """
        until, left, losses = time.monotonic() + self._recovery, list(nodes), 0
        found: dict[str, bytes | Exception] = {}
        while left:
            try:
                replies = self._open().exchange(left, frame, seconds)
            except TransportError as error:
                replies = [(node, error) for node in left]
            found |= dict(replies)
            lost = [(node, reply) for node, reply in replies if isinstance(reply, JobLostError)]
            left, losses = [node for node, _ in lost], losses + 1
            if left:
                try:
                    if losses >= _LOSSES or time.monotonic() > until:
                        msg = f"It was lost {losses} times in a row; the hub's engine.log says what ends its process."
                        raise TransportError(msg)
                    self._recover(left, until)
                except TransportError as hopeless:
                    found |= {node: TransportError(f"{reply} {hopeless}") for node, reply in lost}
                    break
        return [(node, found[node]) for node in nodes]

    def farewell(self, nodes: Sequence[str], frame: bytes, seconds: float) -> list[tuple[str, bytes | Exception]]:
        """One frame that may as well be lost: nothing is recovered, and it takes little time."""
        until, link = time.monotonic() + min(seconds, _FAREWELL), self._link
        if link is None:
            return [(node, TransportError("it was not told.")) for node in nodes]
        while not set(nodes) <= set(link.wait(0.0) or []) and time.monotonic() < until - _FAREWELL / 3:
            time.sleep(0.05)  # a bridge that was given up, as after Ctrl-C, dials again
        try:
            return link.exchange(nodes, frame, max(until - time.monotonic(), _FAREWELL / 3))
        except TransportError as error:
            return [(node, error) for node in nodes]

    def close(self) -> None:
        """Ends the jobs, for good."""
        self._closed = True
        if self._link is not None:
            self._link.close()
            self._link = None
            until = time.monotonic() + 1.0  # they end by themselves
            for job in [*self._running.values(), *self._starting]:
                with suppress(TransportError):
                    while self._session.status(job.id)[0].startswith("RUNNING") and time.monotonic() < until:
                        time.sleep(0.2)
                    self._end(job)

    def _open(self) -> Link:
        if self._closed:
            msg = "this runtime is closed."
            raise TransportError(msg)
        if self._link is None:
            self._link = Link(self._socket)
        return self._link

    def _probe(self, names: Sequence[str]) -> list[str]:
        """Pings sites that may be in a job; returns those that the engine did not reach."""
        asked = [name for name in names if name in self._sites.names]
        if self._link is None or not asked:
            return []
        seconds = _KNOWN if all(self._sites.is_silent(name) for name in asked) else _PROBE
        try:
            replies = self._link.exchange(asked, frames.pack({"do": "ping"}), seconds)
        except TransportError:
            return asked
        unreached = []
        for name, reply in replies:
            if isinstance(reply, JobLostError):
                unreached.append(name)
            elif isinstance(reply, Exception):
                self._sites.missed(name, str(reply), unreached=isinstance(reply, UnreachedError))
                unreached.append(name)
            elif isinstance(trouble := chunked_calls.read(reply)[0], Exception):
                self._sites.missed(name, str(trouble))
            else:
                self._sites.met(name)
                self._tried.pop(name, None)
        return unreached

    # --- jobs -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The first job, or the first after all were lost, with those who are connected after a while."""
        here = self._gathering.wait()
        self._sites.left(self._sites.names)
        self._bring_up(here)

    def _bring_up(self, sites: Sequence[str]) -> None:
        """Submits the one job that there is, and waits for its bridge.

        The engine ends a job for all as soon as one site refuses it. Then its sites are tried in smaller groups, all at
        once, and each such job goes on; those for which nobody waits any more begin beside the rounds.
        """
        now = time.monotonic()
        until, others = now + _JOB_START, None
        self._starting = [self._submit(sites, alone=True)]
        problem = "no site takes a job"
        while self._starting and now < until:
            time.sleep(0.2)
            problem, now = self._look_after() or problem, time.monotonic()
            if self._running and others is None:
                others = until = min(until, now + _OTHERS)
        if not self._running:
            for job in self._starting:
                self._end(job)
            if self._starting:
                problem = f"the job did not come up within {_JOB_START:g} s"
            self._starting = []
            msg = f"{problem}."
            raise TransportError(msg)

    def _look_after(self) -> str | None:
        """Sees which of the jobs that were submitted have begun, or ended before; returns why one of these did."""
        said = None
        for job in list(self._starting):
            assert self._link is not None
            if (inside := self._link.wait(0.0, job.run)) is not None:
                self._starting.remove(job)
                replaced = [run for run, former in self._running.items() if set(former.sites) <= set(inside)]
                self._running = {run: j for run, j in self._running.items() if run not in replaced} | {job.run: job}
                self._probe(job.sites)
                self._say(self._who_is_in(inside))
                continue
            ended = None
            with suppress(TransportError):
                status, detail = self._session.status(job.id)
                ended = status + (f": {detail}" if detail else "") if status.startswith("FINISHED") else None
            if ended is not None:
                self._starting.remove(job)
                said = self._ended(job, ended)
            elif time.monotonic() - job.since > _JOB_START:
                self._starting.remove(job)
                self._end(job)
                self._say(f"the job for {', '.join(job.sites)} did not begin within {_JOB_START:g} s")
        return said

    def _who_is_in(self, sites: Sequence[str]) -> str:
        """A job that runs: with whom, and with whom not, though the engine has them in it."""
        there = [name for name in self._sites.there() if name in sites]
        others = [f"{name}: {self._sites.why(name)}" for name in sites if name not in there]
        return f"a job runs, with {', '.join(there) or 'nobody'}" + (f"; not {'; '.join(others)}" if others else "")

    def _ended(self, job: _Job, status: str) -> str:
        """A job that the engine ended before it ran: its site refused it, or one of them did, which is looked for."""
        why = (
            f"the engine ended the job before it ran ({status}). A site whose local/resources.json does not list the "
            "bridge classes refuses it, as does a hub whose own lacks them or the controller; its own log says so"
        )
        if len(job.sites) == 1:
            self._sites.refused(job.sites[0], why)
            self._say(f"site {job.sites[0]} refused the job ({status})")
        else:
            self._say(f"the engine ended the job with {', '.join(job.sites)} before it ran ({status}): trying each")
            for name in job.sites:
                self._sites.missed(name, why)  # until its own job begins, or is ended
            step = -(-len(job.sites) // _PARTS)
            parts = [job.sites[at : at + step] for at in range(0, len(job.sites), step)]
            self._starting += [self._submit(part) for part in parts]
        return why

    def _submit(self, sites: Sequence[str], *, alone: bool = False) -> _Job:
        run = secrets.token_hex(8)
        self._open().expect(run, alone=alone)
        if alone:
            self._running = {}
        with tempfile.TemporaryDirectory(prefix="llmchain_fed-job-") as folder:
            written = write_job(Path(folder), name=_NAME, sites=sites, socket=str(self._socket), run=run)
            job = _Job(self._session.submit(written), run, list(sites))
        self.count += 1
        return job

    def _end(self, job: _Job) -> None:
        with suppress(TransportError):
            self._session.abort(job.id)

    def _bring_back(self, names: Sequence[str]) -> None:
        """Begins a job for sites that came, or came back; the others wait a little for that, the first time."""
        now = time.monotonic()
        begun = {name for job in self._starting for name in job.sites}
        able = self._gathering.able(names)
        due = [n for n in able if n not in begun and now >= self._tried.get(n, (0, 0.0))[1]]
        if not due:
            return
        new = [name for name in due if name not in self._tried]
        for name in due:
            times = self._tried.get(name, (0, 0.0))[0]
            self._tried[name] = times + 1, now + _AGAIN * 2 ** min(times, _LESS_OFTEN)
        self._starting.append(self._submit(due))
        if new:
            self._say(f"a job begins for {', '.join(new)}; the others wait {_COMING:g} s at most")
            self._wait_for_starting(_COMING)

    def _wait_for_starting(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._starting and time.monotonic() < until:
            time.sleep(0.2)
            self._look_after()

    # --- what breaks ------------------------------------------------------------------------------------------------

    def _recover(self, lost: Sequence[str], until: float) -> None:
        """Waits for the job's bridge, or engine and sites, and submits a new job for those who lost theirs."""
        link = self._open()
        dialled = time.monotonic() + _REUSE
        while time.monotonic() < dialled:  # a bridge that was given up dials again
            if set(lost) <= set(link.wait(0.1) or []):
                return
            time.sleep(0.1)
        self._say(f"the job with {', '.join(lost)} ended, or its process at the hub: another one begins")
        back = self._gathering.wait_again(lost, self._recovery, until)
        self._sites.left(lost)
        if link.wait(0.0) is None:
            self._bring_up(back)
        else:
            self._starting.append(self._submit(back))
            self._wait_for_starting(_COMING)
