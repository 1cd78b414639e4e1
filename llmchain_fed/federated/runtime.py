"""The seam between the round loop and where participants run, and the runtime within this process.

Knows operations and bytes. Knows nothing about models, aggregation or history: above this seam nobody knows which
runtime is in use, below it nobody knows what a round is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Protocol

from llmchain_fed.errors import FederationError

Operation = Literal["hello", "train", "evaluate"]


class Peer(Protocol):
    """One participant's side: the model is loaded once and stays, the examples never leave."""

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers one operation; an exception means that the participant is absent from it."""


class Transport(Protocol):
    """Carries an operation to nodes and brings back what they answer, as it arrives."""

    def nodes(self) -> list[str]:
        """The names that can be called."""

    def call(
        self, op: Operation, nodes: Iterable[str], payload: bytes, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Yields (node, answer or why there is none) in any order; every node once.

        Args:
            op: What to do.
            nodes: Who should.
            payload: The same bytes for all.
            timeout: seconds until an answer is no longer waited for.
        """

    def close(self) -> None:
        """Gives back what the transport holds."""


class InProcess:
    """All participants in this process, one after the other on the same module."""

    def __init__(self, peers: Mapping[str, Peer]) -> None:
        self._peers = dict(peers)

    def add(self, name: str, peer: Peer) -> None:
        """Lets one more participant join."""
        self._peers[name] = peer

    def nodes(self) -> list[str]:
        """Their names, in the order they were given."""
        return list(self._peers)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: bytes, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Runs `op` for one node after the other; `timeout` does not apply within one process.

        Raises:
            FederationError: A node nobody knows.
        """
        del timeout
        for node in nodes:
            if node not in self._peers:
                msg = f"there is no participant {node!r}. Known: {', '.join(self._peers)}."
                raise FederationError(msg)
            answer: bytes | Exception
            try:
                answer = self._peers[node].handle(op, payload)
            except Exception as error:
                answer = error
            yield node, answer

    def close(self) -> None:
        """Nothing is held."""
