"""ManualRounds: one participant at a time. `train()` opens a round and adds an update to it, `step()` closes it.

Knows the hub and this process's participants. Knows nothing about checkpoints, callbacks or whole fits.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from llmchain_fed.data.examples import Examples
from llmchain_fed.errors import ConfigError, FederationError, NothingTrainedError, QuorumError
from llmchain_fed.federated import compatibility
from llmchain_fed.federated.callbacks import Stop
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
from llmchain_fed.federated.loop import close_round
from llmchain_fed.federated.measures.monitor import decided
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol.tasks import TrainTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Sent
from llmchain_fed.federated.server.round import Arrival, OpenRound
from llmchain_fed.federated.server.server import Server
from llmchain_fed.training.schedule import check_planned


class ManualRounds(ABC):
    """The part of `FederatedAveraging` in which the caller says who trains when."""

    _server: Server
    _peers: dict[str, Client]
    _peer: Callable[[Participant], Client]
    _runtime: Runtime
    _open: OpenRound | None
    _opened: float

    @abstractmethod
    def _join(self) -> None: ...

    @abstractmethod
    def _check_directory(self) -> None: ...

    @abstractmethod
    def _completed(self, record: RoundRecord) -> Stop | None: ...

    def train(self, local_data: Examples, device_id: Any) -> ParticipantRecord:
        """Trains one participant, on its examples in any form, from the current global weights.

        The chain keeps those until `step()`. One whose update was refused, which its record says, may train again in
        the same round: its new record then takes the place of the old one. It takes part from then on, in rounds of
        `fit` too, with the examples that were given last.

        Raises:
            DuplicateParticipantError: An update of its own is in this round already.
            DataError, TrainingError: Its examples or its training failed; nothing has changed.
            ConfigError: The participants run elsewhere (`runtime=`); no participant can have that name; or the learning
                rate's schedule runs over rounds that nobody has planned.
            CheckpointError: The checkpoint directory is not this run's, or cannot be written to.
        """
        if not self._runtime.sequential:
            msg = "train() works on participants in this process; with runtime=… use fit()."
            raise ConfigError(msg)
        if self._server.evaluator.split is not None:
            msg = (
                "evaluation as a share sets apart examples of participants=…, and train() brings its own. Pass "
                "evaluation=examples, one set for all, or both participants= and evaluation= as {name: examples}."
            )
            raise ConfigError(msg)
        name, settings = str(device_id), self._server.settings
        check_planned(settings.training, "train()")
        compatibility.check_name(settings.rule, settings.config.personal, name)
        self._check_directory()
        opened = self._open or self._server.begin()
        opened.refuse_twice(name)
        known, participant = self._runtime.local.get(name), Participant(name, local_data)
        client = known if isinstance(known, Client) else self._peer(participant)
        self._runtime.host({name: client})
        try:
            with client.data.taking(participant):
                sent = self._asked(client.participant, self._server.task(opened))
        except BaseException:
            self._runtime.withdraw(name) if known is None else self._runtime.host({name: known})
            raise
        if self._open is None:
            self._open, self._opened = opened, time.perf_counter()
        self._peers[name] = client
        record = opened.accept(Arrival(name, sent.answer, sent.bytes))
        self._server.client_manager.leave(name)  # it may have another number of examples now: the next round asks anew
        return record

    def _asked(self, participant: Participant, task: TrainTask) -> Sent:
        """One participant's update; what its training raises is the caller's to see."""
        broadcast, name, rank = self._server.broadcast, participant.name, participant.rank
        if rank is not None or broadcast.scaling_of(name) is not None:  # else it has what it is known to have
            broadcast.joined(name, None, rank, participant.alpha)
        (sent,) = broadcast.call(self._runtime, task, [name])
        if isinstance(sent.answer, Exception):
            raise sent.answer
        return sent

    def step(self) -> RoundRecord:
        """Averages what has been trained since the last step and loads it: w = Σ n_k/n · w_k.

        `best` counts it in. Where a callback returns `Stop`, `history.stopped_early` says its reason: the loop is yours
        to end.

        Raises:
            NothingTrainedError: Nobody has trained in this round.
            QuorumError: Too few updates were usable. The round stays open, so that more can train; it is closed where
                not one was usable. Weights and history are as before.
            LLMChainFedError: The updates cannot be combined or loaded. Weights and history are as before, and the round
                is closed: its updates are used up.
        """
        if self._open is None:
            msg = "no participant has trained since the last step(). Call train(local_data, device_id) first."
            raise NothingTrainedError(msg)
        try:
            if self._server.evaluator.active:
                self._join()
            before = self._server.measure(self._server.round)
            record = close_round(self._server, self._open, self._opened, before, {})
        except BaseException as error:
            if self._open.spent:
                error.add_note(
                    "The round is closed, weights and history are as before: its participants must train anew."
                )
            if self._open.spent or (isinstance(error, QuorumError) and not self._open.trained):
                self._open = None  # nothing in it is worth waiting for: fit() and train() may begin anew
            raise
        self._open = None
        history = self._server.history
        monitored = decided(history.monitor, self._server.evaluator)
        if monitored is not None:
            monitored.judge(record, history)
            history.monitor = monitored.name if history.best is not None else history.monitor
        stop = self._completed(record)
        history.stopped_early = stop.reason if stop is not None else None
        return record

    def _check_closed(self) -> None:
        if self._open is None:
            return
        msg = f"{self._open.trained} have trained in a round that is still open. Call step() first."
        if not self._open.trained:
            msg = (
                f"the round that train() opened has no usable update (from {', '.join(self._open.records)}). Call "
                "train() again, or step(), which says why and closes it."
            )
        raise FederationError(msg)
