"""BetweenRounds: what can be asked of a federation while no round is under way.

Knows the hub, its kept rounds and this process's participants. Knows nothing about how rounds are run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from llmchain_fed.data.encoding import DataReport, Examples
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.checkpoint.manager import CheckpointManager
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.history import History
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.server import personalization
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.federated.server.cost_estimate import Plan, plan_of
from llmchain_fed.federated.server.personalization import Personalized, SideBySide
from llmchain_fed.federated.server.server import Server
from llmchain_fed.training.evaluation import EvaluationResult, evaluate_locally


class BetweenRounds(ABC):
    """The half of `FederatedAveraging` that runs no rounds: measures, plans, personal models, rounds that were."""

    _server: Server
    _checkpoints: CheckpointManager
    _peers: dict[str, Client]

    @abstractmethod
    def _check_rounds(self, what: str, rounds: int) -> None: ...

    @abstractmethod
    def _check_closed(self) -> None: ...

    @abstractmethod
    def _join(self) -> None: ...

    @abstractmethod
    def _everywhere(self, work: Callable[[], Any]) -> Any: ...

    @abstractmethod
    def _show_adapters(self) -> None: ...

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self._server.round

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self._server.history

    @property
    def attendance(self) -> Attendance:
        """Who is in and out, since when and why first, and who is waited for."""
        return self._server.client_manager.attendance

    @property
    def data_reports(self) -> dict[str, DataReport]:
        """What became of each participant's examples, once they have joined."""
        return self._server.data_reports

    def evaluate(self, data: Examples) -> EvaluationResult:
        """Held-out loss of the current global weights on any examples, in nats per completion token.

        Raises:
            DataError: The examples cannot be used.
        """
        target, longest = self._server.target, self._server.settings.training.max_length
        return evaluate_locally(target.model, data, prompt=target.prompt, max_length=longest)

    def plan(self, rounds: int) -> Plan:
        """What so many rounds will take: bytes, memory, and time from one timed optimizer step.

        Raises:
            ConfigError: No rounds, or no participants.
        """
        self._check_rounds("plan", rounds)

        def work() -> dict[str, Any]:
            self._join()
            return asdict(plan_of(self._server, rounds))

        return Plan(**self._everywhere(work))

    # --- personal models --------------------------------------------------------------------------------------------

    def personalize(self, participant: Any, *, steps: int, lr: float | None = None) -> Personalized:
        """Fine-tunes a personal adapter for one participant, from the present global weights, where its data is.

        In the process that hosts the participant, `chain.with_adapter(name)` answers with it from then on.

        Args:
            participant: Its name.
            steps: optimizer steps.
            lr: Learning rate; the participant's own by default.

        Raises:
            ConfigError: Nobody of that name; no LoRA adapter; or a rule whose participants are personal already.
            FederationError: The participant cannot be reached, or its training failed.
        """
        self._check_closed()

        def work() -> dict[str, Any]:
            self._join()
            found = personalization.personalize(self._server, str(participant), steps, lr)
            self._show_adapters()
            self._checkpoints.save()
            return asdict(found)

        return Personalized(**self._everywhere(work))

    def compare(self, participants: Iterable[Any] | None = None) -> SideBySide:
        """Held-out loss of the bare base, the global and the personal model, side by side, per participant.

        Args:
            participants: Names, or one; everyone who holds out examples by default.

        Raises:
            ConfigError: Nobody of that name holds out examples.
        """
        self._check_closed()
        if participants is not None and not isinstance(participants, Iterable):
            msg = f"compare takes the names of participants, got {participants!r:.80}. Pass ['a', 'b'] or 'a'."
            raise ConfigError(msg)
        given = [participants] if isinstance(participants, str) else participants
        names = [str(p) for p in given] if given is not None else None

        def work() -> dict[str, dict[str, float]]:
            self._join()
            return personalization.compare(self._server, names)

        return SideBySide(self._everywhere(work))

    def adaptation_curve(
        self, participant: Any, *, steps: Sequence[int] = (0, 1, 2, 4, 8), lr: float | None = None
    ) -> dict[int, float]:
        """Held-out loss after k optimizer steps from the global weights, for each k: how fast somebody adapts.

        Args:
            participant: A name, or a `Participant` with `held_out` that takes no part in the federation.
            steps: The values of k.
            lr: Learning rate; the participant's own by default.

        Raises:
            ConfigError: Nothing to measure on, no counts, or a learning rate that is none.
        """
        self._check_closed()
        if isinstance(participant, Participant):
            return personalization.curve_of_stranger(self._server, participant, steps, lr)

        def work() -> dict[int, float]:
            self._join()
            return personalization.curve(self._server, str(participant), steps, lr)

        return {int(k): loss for k, loss in self._everywhere(work).items()}  # JSON made text of the counts

    # --- rounds that were ---------------------------------------------------------------------------------------------

    def roll_back(self, to: int) -> None:
        """Takes the federation back to the end of an earlier round, as its checkpoint holds it; later ones are dropped.

        Raises:
            CheckpointError: There is no checkpoint of that round, or it is damaged; nothing has changed.
        """
        self._check_closed()
        self._checkpoints.roll_back(to)

    def promote(self, round: int, name: str = "promoted") -> None:  # noqa: A002 (the field's own word)
        """Makes a round's global weights a resident adapter: `chain.with_adapter(name)` serves it while rounds go on.

        Args:
            round: The current one, or one whose checkpoint is kept.
            name: The adapter's.

        Raises:
            CheckpointError: There is no checkpoint of that round.
            UnsupportedModelError: The model has no LoRA adapter.
        """
        self._checkpoints.promote(round, name)
