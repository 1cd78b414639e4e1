"""PersonalModels: what belongs to one participant, made and measured, and rounds that are served beside the newest.

Knows the hub, and that a checkpoint follows. Knows nothing about how a personal model is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.checkpoint.manager import CheckpointManager
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.server import personalization
from llmchain_fed.federated.server.personalization import Personalized, SideBySide
from llmchain_fed.federated.server.server import Replication, Server


class PersonalModels(ABC):
    """The part of `FederatedAveraging` that is about adapters beside the global one."""

    _server: Server
    _checkpoints: CheckpointManager
    _replication: Replication
    _show_adapters: Callable[[], None]

    @abstractmethod
    def _join(self) -> None: ...

    @abstractmethod
    def _check_directory(self) -> None: ...

    @abstractmethod
    def _check_closed(self) -> None: ...

    @abstractmethod
    def _together(self, work: Callable[[], Any]) -> Any: ...

    def personalize(self, participant: Any, *, steps: int, lr: float | None = None) -> Personalized:
        """Fine-tunes a personal adapter for one participant, from the present global weights, where its data is.

        In the process that hosts the participant, `chain.with_adapter(name)` answers with it from then on. `steps` are
        optimizer steps, `lr` is by default the participant's own.

        Raises:
            ConfigError: Nobody of that name; no LoRA adapter; or a rule whose participants are personal already.
            FederationError: The participant cannot be reached, or its training failed.
            CheckpointError: The checkpoint directory is not this run's, or cannot be written to.
        """
        self._check_closed()

        def work() -> dict[str, Any]:
            self._check_directory()
            self._join()
            found = personalization.personalize(self._server, str(participant), steps, lr)
            self._show_adapters()
            self._checkpoints.save()
            return asdict(found)

        return Personalized(**self._replication.do(work))

    def side_by_side(self, participants: Iterable[Any] | None = None) -> SideBySide:
        """Held-out loss of the bare base, the global and the personal model, side by side, per participant.

        By default of everyone who holds out examples.

        Raises:
            ConfigError: Nobody of that name holds out examples.
        """
        self._check_closed()
        if participants is not None and not isinstance(participants, Iterable):
            msg = f"side_by_side takes the names of participants, got {participants!r:.80}. Pass ['a', 'b'] or 'a'."
            raise ConfigError(msg)
        names = [participants] if isinstance(participants, str) else participants
        names = [str(name) for name in names] if names is not None else None
        return SideBySide(self._together(lambda: personalization.compare(self._server, names)))

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
        found = self._together(lambda: personalization.curve(self._server, str(participant), steps, lr))
        return {int(k): loss for k, loss in found.items()}  # JSON made text of the counts

    def promote(self, round: int, name: str = "promoted") -> None:  # noqa: A002 (the field's own word)
        """Makes a round's global weights a resident adapter: `chain.with_adapter(name)` serves it while rounds go on.

        The round is the current one, or one whose checkpoint is kept.

        Raises:
            CheckpointError: There is no checkpoint of that round.
            UnsupportedModelError: The model has no LoRA adapter.
        """
        self._checkpoints.promote(round, name)
