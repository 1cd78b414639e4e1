"""ClientManager: who takes part. Who has said hello and fits the contract, who is absent, and why.

Knows the runtime's `hello` and what participants say of themselves. Knows nothing about rounds, and believes nothing
that it can check.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator

from llmchain_fed.errors import (
    ContractError,
    DeadlineError,
    FederationError,
    LLMChainFedError,
    ParticipantError,
    PolicyError,
    TransportError,
)
from llmchain_fed.federated.history import ParticipantRecord, told_of
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.protocol.tasks import HelloTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.federated.settings import Settings, sampled
from llmchain_fed.federated.target import Target
from llmchain_fed.training.batch_sampler import seed_of
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import decoding, shown

# What another process reports of itself makes it absent. Any other error is this process's own and raised.
ABSENCE = (ContractError, DeadlineError, ParticipantError, PolicyError, TransportError)


class ClientManager:
    """Keeps who takes part.

    Args:
        target: What is trained, whose contract all must share.
        training: How they train; told to those in other processes.
        aggregation: The rule's name, which a site's policy may ask for.
    """

    def __init__(
        self, runtime: Runtime, target: Target, training: TrainingConfig, *, aggregation: str | None = None
    ) -> None:
        self._runtime, self._target, self._aggregation = runtime, target, aggregation
        self._training = training.to_plain()
        self.federation = secrets.token_hex(8)
        """tells this federation from an earlier one of the same participants; one that goes on keeps its own"""
        self.attendance = Attendance()
        """who is in and out since when, and why first; everybody who asks participants reports to it"""
        self.joined: dict[str, Introduction] = {}
        self.absent: dict[str, Exception] = {}
        """who is not there now, and why it is not now"""

    def join(self, *, timeout: float | None = None, again: bool = False) -> list[str]:
        """Asks everyone who has not joined what they have and on which contract they stand; returns who has joined now.

        Whoever was lost meanwhile, when it was to evaluate perhaps, has not: it may have restarted, and is told anew.

        Args:
            timeout: seconds to wait for them.
            again: In the same round: who refused by its policy would refuse again, and is left alone until the next.

        Raises:
            LLMChainFedError: A participant's own error in this process, such as examples that cannot be used.
        """
        nodes = self._runtime.nodes()
        self.absent = {n: e for n, e in self.absent.items() if n in nodes}
        self.attendance.expect(nodes)
        for node in () if again else self.attendance.doubtful:
            self.joined.pop(node, None)
        newcomers = [node for node in nodes if node not in self.joined]
        if again:
            newcomers = [node for node in newcomers if not isinstance(self.absent.get(node), PolicyError)]
        if not newcomers:
            return []
        found: dict[str, Introduction] = {}
        for node, answer in self.ask(newcomers, timeout=timeout):
            if isinstance(answer, Introduction):
                found[node] = answer
                self.absent.pop(node, None)
                self.attendance.came(node)
            else:
                self.absent[node] = answer
                self.attendance.out(node, answer)
        self.joined |= found
        return list(found)

    def ask(self, nodes: list[str], *, timeout: float | None = None) -> Iterator[tuple[str, Introduction | Exception]]:
        """What participants say within so many seconds, or why they cannot join; by this alone nobody joins.

        Raises:
            LLMChainFedError: See `join`.
        """
        contract = self._target.contract()
        hello = HelloTask.of(
            contract=contract, training=self._training, federation=self.federation, aggregation=self._aggregation
        )
        answers = self._runtime.call(hello.operation, nodes, messages.write(hello), timeout)
        for node, answer in self.attendance.following(hello.operation, nodes, answers):
            found: Introduction | Exception
            try:
                if isinstance(answer, Exception):
                    raise answer
                with decoding(f"what {shown(node)!r} answers to hello", ParticipantError):
                    found = messages.read_introduction(answer, node, contract)
            except ABSENCE as error:
                found = error
            except LLMChainFedError:
                raise
            except Exception as error:
                msg = f"participant {node!r} cannot join: {type(error).__name__}: {error}"
                raise FederationError(msg) from error
            yield node, found

    def present(self) -> list[str]:
        """Who can be asked, in the runtime's order."""
        return [node for node in self._runtime.nodes() if node in self.joined]

    def sample(self, settings: Settings, number: int) -> list[str]:
        """Who of those who are there is asked in a round (0 is the first): as the options say, drawn by seed."""
        present = self.present()
        count = sampled(settings.config.participants_per_round, len(present))
        if count >= len(present):
            return present
        rng = random.Random(seed_of(settings.config.seed, "sample", number))  # noqa: S311 (sampling, no secret)
        chosen = set(rng.sample(sorted(present), count))
        return [node for node in present if node in chosen]

    def leave(self, node: str, why: Exception | None = None) -> None:
        """Takes a participant off, so that it is asked anew before the next round."""
        self.joined.pop(node, None)
        if why is not None:
            self.absent[node] = why
            self.attendance.out(node, why, lasting=not isinstance(why, TransportError))

    @property
    def reasons(self) -> dict[str, Exception]:
        """Who is absent, and why first."""
        standings = self.attendance.standings
        return {node: standings[node].error or why for node, why in self.absent.items()}

    def record_of(self, node: str) -> ParticipantRecord:
        """The record of one that a round did not ask: absent and why, first of all why first, or idle."""
        if (why := self.absent.get(node)) is None:
            return ParticipantRecord("idle")
        return ParticipantRecord("absent", self.attendance.told(node, told_of(why)))
