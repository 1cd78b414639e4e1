"""FederatedAveraging: the round loop. Broadcast → local training → updates → aggregate → load → evaluate.

Knows the seams (transport, aggregation, server optimizer) and the history. Knows nothing about how participants train
or where they run.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tqdm.auto import tqdm

from llmchain_fed._config import unknown_option
from llmchain_fed.data import DataReport, Examples
from llmchain_fed.errors import ConfigError, FederationError, NothingTrainedError
from llmchain_fed.evaluation import EvaluationResult, evaluate_locally
from llmchain_fed.federated import server_optimizers, wire
from llmchain_fed.federated.aggregation import Aggregation, Weighting, make_aggregation
from llmchain_fed.federated.asking import Asking
from llmchain_fed.federated.evaluation import Evaluator, Measurement
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.options import (
    Patience,
    check_travels,
    checked_quorum,
    checked_waiting,
    sample_size,
    training_of,
)
from llmchain_fed.federated.participant import Participant, as_participants
from llmchain_fed.federated.peer import LocalPeer
from llmchain_fed.federated.roster import Roster
from llmchain_fed.federated.round import OpenRound
from llmchain_fed.federated.runtime import Cluster, InProcess, Transport
from llmchain_fed.federated.server_optimizers import ServerOptimizer
from llmchain_fed.federated.trainee import Trainee
from llmchain_fed.training import TrainingConfig, seed_of


class FederatedAveraging:
    """Lets a chain learn from several participants' examples without pooling them.

    In each round every participant starts from the same global weights, trains on its own examples, and hands over its
    trained weights; their mean Σ n_k/n · w_k is loaded into the chain. Two ways to drive it: `fit(rounds=n)`, or
    `train(local_data, device_id)` per participant and then `step()`.

    A round that fails or is interrupted leaves chain and history exactly as they were. Updates can leak what they were
    trained on: this is no privacy guarantee by itself.

    Args:
        model: A chain (also wrapped by `with_config` or `with_fallbacks`), an LLM, a LocalModel or a torch module.
        participants: Name → examples, or a list of `Participant`; with `runtime=TorchDistributed()` those of this rank.
        optimizer: The participants': a name, a torch.optim class, or an instance taken as the template.
        lr: Their learning rate.
        batch_size: examples per optimizer step.
        training: Everything else about local training.
        aggregation: "fedavg", "fedit" (the same, LoRA factors averaged apart), or an object with `start`.
        server_optimizer: Moves the global weights along the mean update; None loads the mean itself.
        runtime: Where participants run; None is this process.
        evaluation: What held-out loss is measured on: a share of each participant's examples set apart (0.1), a mapping
            name → examples, or one set of examples for all.
        weighting: What an update counts by: "examples" (n_k), "tokens" or "equal".
        participants_per_round: How many are sampled each round: a count, or a share as a float.
        quorum: Participants, and updates, without which a round fails.
        deadline: seconds a round's training may take; who is later is dropped and recorded. None waits for all.
        retries: How often a participant that could not be reached, or failed elsewhere, is asked again in a round.
        samples: held-out examples per participant whose answers are recorded before and after each round.
        seed: Decides sampling, the order of data and dropout.
        progress: Shows a progress bar and a line per round.

    Raises:
        ConfigError: An unknown option, or options that contradict each other.
        DuplicateParticipantError: Two participants of one name.
        NotTrainableError: The model has nothing to train.
        UnsupportedModelError: `model` is none of the above.
    """

    def __init__(
        self,
        model: Any,
        *,
        participants: Mapping[Any, Any] | Iterable[Participant] | None = None,
        optimizer: Any = None,
        lr: float | None = None,
        batch_size: int | None = None,
        training: TrainingConfig | None = None,
        aggregation: str | Aggregation = "fedavg",
        server_optimizer: ServerOptimizer | None = None,
        runtime: Transport | None = None,
        evaluation: float | Mapping[str, Examples] | Examples | None = None,
        weighting: Weighting = "examples",
        participants_per_round: int | float | None = None,
        quorum: int = 1,
        deadline: float | None = None,
        retries: int = 0,
        samples: int = 1,
        seed: int = 0,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            known = set(type(self).__init__.__annotations__) - {"return", "unknown"}
            raise ConfigError(f"{type(self).__name__}: {unknown_option(name, known)}")  # noqa: EM102
        self._given = model
        self._trainee = Trainee.of(model)
        self._model = self._trainee.model
        self._training = training_of(training, optimizer=optimizer, lr=lr, batch_size=batch_size, seed=seed)
        self._aggregation = make_aggregation(aggregation)
        self._aggregation.start(self._model.trainable_parameters())  # refuses a rule or a model that does not fit, now
        server_optimizers.check(server_optimizer)
        self._server_optimizer = server_optimizer
        if weighting not in ("examples", "tokens", "equal"):
            msg = f"weighting is 'examples', 'tokens' or 'equal', got {weighting!r}."
            raise ConfigError(msg)
        self._weighting: Weighting = weighting
        self._seed, self._progress = seed, progress
        self._deadline, retries = checked_waiting(deadline, retries)
        named = as_participants(participants)
        self._cluster = runtime if isinstance(runtime, Cluster) else None
        if runtime is not None and self._cluster is None and named:
            msg = "give participants (they run in this process) or a runtime (which knows its own), not both."
            raise ConfigError(msg)
        if runtime is not None and not isinstance(runtime, (Cluster, InProcess)):
            check_travels(self._training)
        self._evaluator = Evaluator(self._trainee, evaluation, samples=samples, seed=seed)
        named = self._evaluator.divide(named)
        self._peers = {name: LocalPeer(self._trainee, p, self._training) for name, p in named.items()}
        if self._cluster is not None:
            self._cluster.host(self._peers)
        self._transport: Transport = runtime if runtime is not None else InProcess(self._peers)
        self._roster = Roster(self._transport, self._trainee, self._training)
        self._asking = Asking(self._transport, self._roster, self._deadline, retries)
        self._per_round = participants_per_round
        available = len(self._transport.nodes())
        self._quorum = checked_quorum(quorum, sample_size(participants_per_round, available), available)
        self._open: OpenRound | None = None
        self._opened = 0.0
        self.round = 0
        """rounds completed"""
        self.data_reports: dict[str, DataReport] = {}
        """what became of each participant's examples, once they have joined"""
        self.history = History()

    def __repr__(self) -> str:
        names = self._transport.nodes()
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        return (
            f"FederatedAveraging({self._model!r}, {len(names)} participants ({shown}), {self.round} rounds completed)"
        )

    def get_model(self) -> Any:
        """What was passed in: the same object, with the global weights in it."""
        return self._given

    def evaluate(self, data: Examples) -> EvaluationResult:
        """Held-out loss of the current global weights on any examples, in nats per completion token.

        Raises:
            DataError: The examples cannot be used.
        """
        return evaluate_locally(self._model, data, prompt=self._trainee.prompt, max_length=self._training.max_length)

    # --- the whole loop ---------------------------------------------------------------------------------------------

    def fit(self, rounds: int, *, patience: int | None = None, min_delta: float = 0.0) -> History:
        """Runs `rounds` more rounds.

        Args:
            rounds: At least one.
            patience: Stop early once the pooled held-out loss has not improved for this many rounds; None never does.
            min_delta: nats per token that count as an improvement.

        Returns:
            The history, of earlier calls too.

        Raises:
            ConfigError: No rounds or no participants; `patience` without evaluation.
            DataError: A participant's examples cannot be used.
            QuorumError: A round has too few usable updates; earlier rounds are kept.
            FederationError: A round opened by `train()` is not closed.
        """
        self._check_fit(rounds, patience)
        stop = Patience(patience, min_delta) if patience is not None else None
        if self._cluster is None:
            self._lead(rounds, stop)
        elif self._cluster.leads:
            try:
                self._lead(rounds, stop)
            except BaseException as error:
                self._cluster.publish(self._outcome(), error)
                raise
            self._cluster.publish(self._outcome())
        else:
            self._cluster.follow(self._adopt)
        return self.history

    def _lead(self, rounds: int, stop: Patience | None) -> None:
        self.history.stopped_early = None
        with tqdm(total=rounds, desc="federating", unit="round", disable=not self._progress) as bar:
            for _ in range(rounds):
                record = self._run_round(bar)
                bar.update()
                if self._progress:
                    bar.write(f"round {record}")
                if stop is not None and stop.over(record.held_out_before, record.held_out_after):
                    self.history.stopped_early = str(stop)
                    break

    def _check_fit(self, rounds: int, patience: int | None) -> None:
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            msg = f"fit runs at least one round, got rounds={rounds!r}."
            raise ConfigError(msg)
        if not self._transport.nodes():
            msg = "there is nobody to learn from. Pass participants={name: examples, …}, or use train() and step()."
            raise ConfigError(msg)
        held_out = self._evaluator.active or not isinstance(self._transport, InProcess)  # others may hold out their own
        if patience is not None and (not isinstance(patience, int) or patience < 1 or not held_out):
            msg = "patience is at least 1 and needs evaluation=…, which says what held-out loss is measured on."
            raise ConfigError(msg)
        if self._open is not None:
            msg = f"{self._open.trained} have trained in a round that is still open. Call step() first."
            raise FederationError(msg)

    def _join(self) -> None:
        for name in self._asking.join(self.round, self._quorum):
            report = self._roster.joined[name].report
            if report is None:
                continue
            self.data_reports[name] = report
            if self._progress and (report.empty or report.too_long):
                tqdm.write(f"{name}: {report}")

    def _run_round(self, bar: Any) -> RoundRecord:
        self._join()  # a round's seconds begin with its broadcast: an engine's start is not a round's cost
        started = time.perf_counter()
        nodes = self._transport.nodes()
        chosen = self._choose(self._roster.present())
        before = self._measure()
        opened = self._begin(self._deadline)
        self._asking.train(opened, chosen, bar.set_postfix_str)
        others = {name: self._roster.record_of(name) for name in nodes if name not in opened.records}
        return self._close(opened, started, before, others)

    def _choose(self, nodes: list[str]) -> list[str]:
        count = sample_size(self._per_round, len(nodes))
        if count >= len(nodes):
            return nodes
        rng = random.Random(seed_of(self._seed, "sample", self.round))  # noqa: S311 (sampling, no secret)
        chosen = set(rng.sample(sorted(nodes), count))
        return [node for node in nodes if node in chosen]

    # --- one participant at a time ----------------------------------------------------------------------------------

    def train(self, local_data: Examples, device_id: Any) -> ParticipantRecord:
        """Trains one participant from the current global weights; the chain keeps those until `step()`.

        Args:
            local_data: Its examples, in any form.
            device_id: Its name.

        Raises:
            DuplicateParticipantError: It has trained in this round already.
            DataError, TrainingError: Its examples or its training failed; nothing has changed.
            ConfigError: The participants run elsewhere (`runtime=`).
        """
        if not isinstance(self._transport, InProcess):
            msg = "train() works on participants in this process; with runtime=… use fit()."
            raise ConfigError(msg)
        if self._evaluator.holds_out_a_share:
            msg = (
                "evaluation as a share sets apart examples of participants=…, and train() brings its own. "
                "Pass evaluation={name: examples}, or one set for all."
            )
            raise ConfigError(msg)
        name = str(device_id)
        opened = self._open or self._begin()
        opened.refuse_twice(name)
        peer = self._peers.get(name)
        participant = Participant(name, local_data)
        if peer is None:
            peer = LocalPeer(self._trainee, participant, self._training)
        else:
            peer.take(participant)
        update = peer.handle("train", opened.payload)  # what it raises is the caller's to see
        if self._open is None:
            self._open, self._opened = opened, time.perf_counter()
        if name not in self._peers:
            self._peers[name] = peer
            self._transport.add(name, peer)
        record = opened.accept(name, update)
        self._roster.leave(name)  # it may hold another number of examples now: the next round asks anew
        return record

    def step(self) -> RoundRecord:
        """Averages what has been trained since the last step and loads it: w = Σ n_k/n · w_k.

        Raises:
            NothingTrainedError: Nobody has trained in this round.
            QuorumError: Too few updates were usable.
        """
        if self._open is None:
            msg = "no participant has trained since the last step(). Call train(local_data, device_id) first."
            raise NothingTrainedError(msg)
        if self._evaluator.active:
            self._join()
        before = self._measure()
        record = self._close(self._open, self._opened, before, {})
        self._open = None
        return record

    # --- what both share --------------------------------------------------------------------------------------------

    def _begin(self, seconds: float | None = None) -> OpenRound:
        state = self._model.trainable_state()
        return OpenRound(self.round, state, self._model.fingerprint(), self._aggregation, self._weighting, seconds)

    def _measure(self) -> Measurement | None:
        return self._evaluator.measure(self._transport, self._roster.joined, self._deadline)

    def _close(
        self, opened: OpenRound, started: float, before: Measurement | None, idle: Mapping[str, ParticipantRecord]
    ) -> RoundRecord:
        """Aggregates and loads; from here on an interruption puts the former weights back."""
        aggregate = opened.aggregate(self._quorum)
        new_state = server_optimizers.apply(self._server_optimizer, opened.state, aggregate)
        record = RoundRecord(round=self.round + 1, participants={**opened.records, **idle})
        try:
            self._model.load_state(new_state)
            after = self._measure() if before else None
            self._evaluator.fill(record, before, after)
            record.update_norm = wire.distance(new_state, opened.state)
            record.training_seconds = sum(r.seconds or 0.0 for r in opened.records.values())
            record.weights_version = self._model.weights_version
            record.seconds = time.perf_counter() - started
        except BaseException:
            self._model.load_state(opened.state)
            raise
        self.round += 1
        self.history.append(record)
        return record

    # --- several processes of one script ----------------------------------------------------------------------------

    def _outcome(self) -> bytes:
        """What the other processes need in order to stand where this one does."""
        reports = {name: asdict(report) for name, report in self.data_reports.items()}
        header = {"round": self.round, "history": json.loads(self.history.to_json()), "reports": reports}
        return wire.pack(self._model.trainable_state(), header)

    def _adopt(self, outcome: bytes) -> None:
        header, infos = wire.inspect(outcome, max_bytes=len(outcome))
        self._model.load_state(wire.values(outcome, infos))
        self.round, self.history = header["round"], History.from_dict(header["history"])
        self.data_reports = {name: DataReport(**report) for name, report in header["reports"].items()}
