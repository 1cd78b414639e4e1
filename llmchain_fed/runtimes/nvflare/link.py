"""Link: the driver's end of the socket that the jobs' hub bridges dial.

Knows frames and connections. Knows nothing of sessions, calls or rounds. Several jobs can run at a time: a site that
came late is in one of its own, and nobody waits while that begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from llmchain_fed import untrusted
from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.messaging.channel import Channel

_GREETING = 10.0  # seconds in which whoever connected has said which job it is of
_FAREWELL = 0.5  # seconds in which a bridge takes the news that its job is over
_GRACE = 3.0  # seconds the bridge may be silent beyond the time it was given


class JobLostError(TransportError):
    """The job that a site was in has ended, or its process at the hub is gone: the site itself may be well."""


class UnreachedError(TransportError):
    """The hub's own engine says that it did not reach a site: what the site itself answers is never one."""


class _Bridge:
    """The connection to one job's bridge."""

    def __init__(self, channel: Channel, run: str, sites: Sequence[str]) -> None:
        self.channel, self.run, self.sites = channel, run, list(sites)
        self._busy = threading.Lock()

    def exchange(self, nodes: Sequence[str], frame: bytes, seconds: float) -> dict[str, bytes | Exception]:
        """Carries a frame to nodes of this job.

        Raises:
            JobLostError: It is of no use any more: gone, silent, or it talks nonsense.
        """
        with self._busy:
            answers: dict[str, bytes | Exception] = {}
            asked = set(nodes)
            try:
                until = time.monotonic() + seconds + _GRACE
                order = {"nodes": list(nodes), "seconds": float(seconds)}
                self.channel.send_bytes(frames.pack(order, frame), seconds + _GRACE)
                while True:
                    told = self.channel.recv_bytes(frames.MAX_OUTER, max(until - time.monotonic(), 0.0))
                    head, body = heads.one_of(told, heads.Carried, heads.Done, what="what the bridge told")
                    if not isinstance(head, heads.Carried):
                        return answers
                    if head.node not in asked or head.node in answers:
                        msg = f"it answers for {untrusted.shown(head.node)}, who was not asked or has answered"
                        raise TransportError(msg)
                    error = head.error
                    told_by_hub = UnreachedError(heads.from_site(error.model_dump())) if error is not None else None
                    answers[head.node] = told_by_hub or bytes(body)
            except (OSError, EOFError, TransportError) as lost:
                msg = f"the job's bridge went away ({type(lost).__name__}: {lost})."
                raise JobLostError(msg) from lost

    def stop(self) -> None:
        """Ends the loop of its job, so that the job ends by itself."""
        with suppress(OSError):
            self.channel.send_bytes(frames.pack({"do": "stop"}), _FAREWELL)
        self.channel.close()


class Link:
    """Listens for bridges and exchanges frames through them.

    Raises:
        ConfigError: See `frames.listen`.
    """

    def __init__(self, path: Path) -> None:
        self._listener = frames.listen(path)
        self._expected: set[str] | None = None
        """submissions whose bridges are talked to; None: whichever, as those of a driver that was killed"""
        self._bridges: dict[str, _Bridge] = {}
        """submission → its bridge, those that called later last"""
        self._former: set[str] = set()
        """sites whose job's bridge went away, and may dial again"""
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._listener.serve, args=(self._greet,), name="bridge", daemon=True).start()

    def expect(self, run: str, *, alone: bool = False) -> None:
        """The bridge of this submission is talked to as well, or from now on alone; others are told to stop."""
        with self._changed:
            kept = {} if alone else self._bridges
            for bridge in self._bridges.values():
                if bridge.run not in kept:
                    bridge.channel.close()
            self._bridges = kept
            self._former = set() if alone else self._former
            self._expected = {run} | (set() if alone else self._expected or set(kept))

    def wait(self, seconds: float, run: str | None = None) -> list[str] | None:
        """The sites of the jobs whose bridges are connected, or of that one; None if none is within `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._found(run), timeout=seconds)
            found = self._found(run)
            return list(dict.fromkeys(site for bridge in found for site in bridge.sites)) if found else None

    def _found(self, run: str | None) -> list[_Bridge]:
        return [bridge for bridge in self._bridges.values() if run in (None, bridge.run)]

    def exchange(self, nodes: Sequence[str], frame: bytes, seconds: float) -> list[tuple[str, bytes | Exception]]:
        """Carries a frame to nodes, each in the newest job that it is in; what it answered in time, or why it did not.

        Returns:
            Of each node its answer, or why there is none; a `JobLostError` where its job's bridge went away.

        Raises:
            JobLostError: There is no bridge.
        """
        with self._changed:
            bridges, former = list(self._bridges.values()), set(self._former)
        if not bridges:
            msg = "the job's bridge is not connected."
            raise JobLostError(msg)
        routes: dict[_Bridge, list[str]] = {}
        answers: dict[str, bytes | Exception] = {}
        for node in nodes:
            bridge = next((b for b in reversed(bridges) if node in b.sites), None)
            if bridge is None and node in former:
                answers[node] = JobLostError("the job's bridge is not connected.")
            elif bridge is None:
                answers[node] = UnreachedError("it is not connected to the hub: it was not when this job began.")
            else:
                routes.setdefault(bridge, []).append(node)

        def carry(bridge: _Bridge, asked: list[str]) -> None:
            nobody = TransportError("the engine gave no answer for it.")
            try:
                found = bridge.exchange(asked, frame, seconds)
                answers.update({node: found.get(node, nobody) for node in asked})
            except JobLostError as error:
                self._forget(bridge)
                answers.update(dict.fromkeys(asked, error))

        try:
            _together([lambda b=b, asked=asked: carry(b, asked) for b, asked in routes.items()])  # type: ignore[misc]
        except BaseException:
            # after Ctrl-C: what is still to come would be taken for the next frame's answers
            for bridge in routes:
                self._forget(bridge)
            raise
        return [(node, answers[node]) for node in nodes]

    def release(self) -> None:
        """Ends the loops of the jobs that are connected, so that the jobs end by themselves."""
        with self._changed:
            for bridge in self._bridges.values():
                bridge.stop()
            self._bridges = {}

    def close(self) -> None:
        """Ends the jobs' loops and stops listening."""
        with self._changed:
            self._closed = True  # a bridge that greets just now is told to stop as well
        self.release()
        self._listener.close()

    def _greet(self, channel: Channel) -> None:
        """Hears who connected; the bridge of a job that is expected is talked to from now on."""
        try:
            told = channel.recv_bytes(frames.MAX_ORDER, _GREETING)
            greeting, _ = heads.one_of(told, heads.Greeting, what="a greeting")
        except (OSError, EOFError, TransportError):
            channel.close()
            return
        with self._changed:
            bridge = _Bridge(channel, greeting.run, greeting.sites)
            if self._closed or (self._expected is not None and greeting.run not in self._expected):
                bridge.stop()  # of a job that was given up
                return
            former = self._bridges.pop(greeting.run, None)
            if former is not None:
                former.channel.close()
            self._bridges[greeting.run] = bridge
            self._former -= set(bridge.sites)
            self._release_replaced()
            self._changed.notify_all()

    def _release_replaced(self) -> None:
        """Ends the jobs whose sites are all in newer ones."""
        newer: set[str] = set()
        for bridge in reversed(list(self._bridges.values())):
            if set(bridge.sites) <= newer:
                del self._bridges[bridge.run]
                bridge.stop()
            newer |= set(bridge.sites)

    def _forget(self, bridge: _Bridge) -> None:
        with self._changed:
            if self._bridges.get(bridge.run) is bridge:
                del self._bridges[bridge.run]
                self._former |= set(bridge.sites)
        bridge.channel.close()


def _together(tasks: Sequence[Callable[[], None]]) -> None:
    """Runs the first here and the others in threads of their own, and waits for all."""
    threads = [threading.Thread(target=task, daemon=True) for task in tasks[1:]]
    for thread in threads:
        thread.start()
    for task in tasks[:1]:
        task()
    for thread in threads:
        thread.join()
