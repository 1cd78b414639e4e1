"""The seam between the round loop and where participants run, and the runtime within this process.

Knows operations and bytes. Knows nothing about models, aggregation or history: above this seam nobody knows which
runtime is in use, below it nobody knows what a round is.
"""

# ruff: noqa: B027 (what most runtimes need of these methods is nothing)
from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from llmchain_fed.errors import ConfigError, DeadlineError, FederationError

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
    """Where participants work: carries an operation to them and brings back what they answer, as it arrives.

    One of your own says who there is (`nodes`) and carries a call (`call`); all else has a default, which is that of
    participants who live in processes of their own. What the loop above does otherwise for one runtime than for another
    follows from these facts alone, never from its class:

    | it says      | what follows                                                                                    |
    |--------------|-------------------------------------------------------------------------------------------------|
    | `local`      | their own options and examples can be looked at: overlaps are noted, a kept optimizer tried out |
    | `sequential` | participants are asked one by one; their order decides the last bits, so a resumed run keeps it. |
    |              | Their errors are raised as they are, what they answer is trusted, and `train()` can be called   |
    | `replicated` | every process of the script makes the federation; one `leads`, the others `follow`              |
    """

    sequential: bool = False
    """whether all participants work in this process, one after the other, in the order in which they are asked"""
    replicated: bool = False
    """whether all processes of a script make the same federation, each with participants of its own"""

    @property
    def local(self) -> Mapping[str, TaskHandler]:
        """The participants who live in this process, by name; none, unless the runtime hosts them."""
        return {}

    @property
    def leads(self) -> bool:
        """Whether this process runs the loop; where nothing is replicated there is no other one."""
        return True

    @abstractmethod
    def nodes(self) -> list[str]:
        """The names of all who can be called."""

    @abstractmethod
    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Yields (node, answer or why there is none) as they arrive, every node once; `dict(call(…))` waits for all.

        An exception means that the participant is absent from this operation: `TransportError` where it cannot be
        reached, `DeadlineError` where it is late, `ParticipantError` or the error itself where its work failed.

        Args:
            op: What they are asked to do.
            nodes: The names of those who are asked.
            payload: The same bytes for all, or each node's own by name.
            timeout: seconds until an answer is no longer waited for; None waits as long as the node is there.
        """

    def host(self, clients: Mapping[str, TaskHandler]) -> None:
        """Lets participants of this process join; where the runtime is replicated, every process calls it once.

        Raises:
            ConfigError: This runtime knows its own participants and takes no others.
        """
        if clients:
            msg = "give participants (they run in this process) or a runtime (which knows its own), not both."
            raise ConfigError(msg)

    def withdraw(self, name: str) -> None:
        """Lets a participant that was hosted take no part any more; one that was not hosted stays."""

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how many bytes an answer to `op` may have from now on; a runtime that takes no bytes in needs no limit.

        A larger one is refused before memory is taken for it.
        """

    def follow(self, adopt: Callable[[bytes], None]) -> None:
        """Answers the leading process's calls until it publishes, and gives that to `adopt`.

        It returns at once where nothing is replicated.

        Raises:
            FederationError: The leader failed (its outcome is adopted before this is raised), or is gone.
        """

    def publish(self, outcome: bytes, error: BaseException | None = None) -> None:
        """Ends the others' `follow` with what they adopt, and what this process failed with; no others, no effect."""

    def close(self) -> None:
        """Gives back what the runtime has taken: connections, threads, files."""


class InProcess(Runtime):
    """All participants in this process, one after the other on the same module."""

    sequential = True

    def __init__(self, clients: Mapping[str, TaskHandler] | None = None) -> None:
        self._clients = dict(clients or {})

    @property
    def local(self) -> Mapping[str, TaskHandler]:
        """All there are."""
        return self._clients

    def host(self, clients: Mapping[str, TaskHandler]) -> None:
        """Lets participants join; one of a name that is there already takes its place."""
        self._clients |= clients

    def withdraw(self, name: str) -> None:
        """Lets a participant take no part any more."""
        self._clients.pop(name, None)

    def nodes(self) -> list[str]:
        """Their names, in the order they were given."""
        return list(self._clients)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Runs `op` for one node after the other; each has the timeout for itself, nobody is late behind others.

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


def checked_runtime(given: Runtime | None) -> Runtime:
    """The runtime that was given; this process where none was.

    Raises:
        ConfigError: It is no `Runtime`.
    """
    if given is not None and not isinstance(given, Runtime):
        msg = (
            f"runtime is TorchDistributed(), NVFlare(…) or a Runtime of your own, got {given!r:.80}. Leave it out "
            "to run all participants in this process."
        )
        raise ConfigError(msg)
    return given if given is not None else InProcess()
