"""The seam between the round loop and where participants run, and the runtime within this process.

Knows operations and bytes. Knows nothing about models, aggregation or history: above this seam nobody knows which
runtime is in use, below it nobody knows what a round is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from llmchain_fed.errors import DeadlineError, FederationError

Operation = str
"""the name of what a participant can be asked, such as "train"; see `client.operations`"""
Payload = bytes | Mapping[str, bytes]


def payload_for(payload: Payload, node: str) -> bytes:
    """What one node is sent."""
    return payload[node] if isinstance(payload, Mapping) else payload


class TaskHandler(Protocol):
    """One participant's side: the model is loaded once and stays, the examples never leave."""

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers one operation; an exception means that the participant is absent from it."""


class Transport(Protocol):
    """Carries an operation to nodes and brings back what they answer, as it arrives."""

    def nodes(self) -> list[str]:
        """The names that can be called."""

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Yields (node, answer or why there is none) as they arrive, every node once; `dict(call(…))` waits for all.

        An exception means that the participant is absent from this operation: `TransportError` where it cannot be
        reached, `DeadlineError` where it is late, `ParticipantError` or the error itself where its work failed.

        Args:
            op: What to do.
            nodes: Who should.
            payload: The same bytes for all, or each node's own by name.
            timeout: seconds until an answer is no longer waited for; None waits as long as the node is there.
        """

    def close(self) -> None:
        """Gives back what the transport holds."""


@runtime_checkable
class Cluster(Transport, Protocol):
    """A transport between processes that all run the same script, each with participants of its own.

    One process leads: it runs the loop and calls the others. These follow: they answer until the leader publishes how
    it ended, so that all go on with the same weights and the same history.
    """

    @property
    def leads(self) -> bool:
        """Whether this process runs the loop."""

    def host(self, peers: Mapping[str, TaskHandler]) -> None:
        """Lets this process's participants join; every process calls it once."""

    def follow(self, adopt: Callable[[bytes], None]) -> None:
        """Answers the leader's calls until it publishes; `adopt` is given what it published.

        Raises:
            FederationError: The leader failed (its outcome is adopted before this is raised), or is gone.
        """

    def publish(self, outcome: bytes, error: BaseException | None = None) -> None:
        """Ends the others' `follow` with an outcome, and with an error where the leader failed."""


class InProcess:
    """All participants in this process, one after the other on the same module."""

    def __init__(self, peers: Mapping[str, TaskHandler]) -> None:
        self._peers = dict(peers)

    def add(self, name: str, peer: TaskHandler) -> None:
        """Lets one more participant join."""
        self._peers[name] = peer

    @property
    def peers(self) -> Mapping[str, TaskHandler]:
        """Those who work, by name."""
        return self._peers

    def nodes(self) -> list[str]:
        """Their names, in the order they were given."""
        return list(self._peers)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Runs `op` for one node after the other.

        Args:
            op: What to do.
            nodes: Who should.
            payload: The same bytes for all, or each node's own by name.
            timeout: seconds each node may take for itself: nobody is late because others came first.

        Raises:
            FederationError: A node nobody knows.
        """
        for node in nodes:
            if node not in self._peers:
                msg = f"there is no participant {node!r}. Known: {', '.join(self._peers)}."
                raise FederationError(msg)
            started = time.monotonic()
            answer: bytes | Exception
            try:
                answer = self._peers[node].handle(op, payload_for(payload, node))
                if timeout is not None and time.monotonic() - started > timeout:
                    msg = f"{node!r} took {time.monotonic() - started:.1f} s, the deadline was {timeout:g} s."
                    answer = DeadlineError(msg)
            except Exception as error:
                answer = error
            yield node, answer

    def close(self) -> None:
        """Nothing is held."""
