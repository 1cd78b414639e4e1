"""The seam between the round loop and where participants run, and the runtime within this process.

Knows operations and bytes. Knows nothing about models, aggregation or history: above this seam nobody knows which
runtime is in use, below it nobody knows what a round is.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

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


class Runtime(ABC):
    """Carries an operation to participants and brings back what they answer, as it arrives.

    What a runtime can do stands in its attributes: nobody above asks which one it is.
    """

    sequential: bool = False
    """whether all participants are in this process, asked one after the other, in the order in which they are named"""
    replicated: bool = False
    """whether several processes run the same script, each with participants of its own: one leads, the others follow"""

    @property
    def local(self) -> Mapping[str, TaskHandler]:
        """Participants whose examples this process may look at, by name."""
        return {}

    @property
    def leads(self) -> bool:
        """Whether this process runs the rounds; of replicated ones a single process does."""
        return True

    @abstractmethod
    def nodes(self) -> list[str]:
        """The names that can be called."""

    @abstractmethod
    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Yields (node, answer or why there is none) as they arrive, every node once; `dict(call(…))` waits for all.

        An exception means that the participant is absent from this operation: `TransportError` where it cannot be
        reached, `DeadlineError` where it is late, `ParticipantError` or the error itself where its work failed.

        Args:
            op: What to do.
            nodes: Who should do it.
            payload: The same bytes for all, or each node's own by name.
            timeout: seconds until an answer is no longer waited for; None waits as long as the node is there.
        """

    def expect(self, num_bytes: int, op: Operation = "train") -> None:  # noqa: B027 (in one process nothing travels)
        """Says that no answer to an operation has more bytes, so that a larger one is refused before it is read."""

    def add(self, name: str, handler: TaskHandler) -> None:
        """Lets one more participant join; of a sequential runtime."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 (most need nothing)
        """Gives back what the runtime has opened."""

    # --- of replicated ones -----------------------------------------------------------------------------------------

    def host(self, handlers: Mapping[str, TaskHandler]) -> None:
        """Lets this process's participants join; every process calls it once."""
        raise NotImplementedError

    def follow(self, adopt: Callable[[bytes], None]) -> None:
        """Answers the leader's calls until it publishes; `adopt` is given what it published.

        Raises:
            FederationError: The leader failed (its outcome is adopted before this is raised), or is gone.
        """
        raise NotImplementedError

    def publish(self, outcome: bytes, error: BaseException | None = None) -> None:
        """Ends the others' `follow` with an outcome, and with an error where the leader failed."""
        raise NotImplementedError


class InProcess(Runtime):
    """All participants in this process, one after the other on the same module."""

    sequential = True

    def __init__(self, clients: Mapping[str, TaskHandler]) -> None:
        self._clients = dict(clients)

    def add(self, name: str, handler: TaskHandler) -> None:
        """Lets one more participant join."""
        self._clients[name] = handler

    @property
    def local(self) -> Mapping[str, TaskHandler]:
        """All of them, by name."""
        return self._clients

    def nodes(self) -> list[str]:
        """Their names, in the order they were given."""
        return list(self._clients)

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
            if node not in self._clients:
                msg = f"there is no participant {node!r}. Known: {', '.join(self._clients)}."
                raise FederationError(msg)
            started = time.monotonic()
            answer: bytes | Exception
            try:
                answer = self._clients[node].handle(op, payload_for(payload, node))
                if timeout is not None and time.monotonic() - started > timeout:
                    msg = f"{node!r} took {time.monotonic() - started:.1f} s, the deadline was {timeout:g} s."
                    answer = DeadlineError(msg)
            except Exception as error:
                answer = error
            yield node, answer
