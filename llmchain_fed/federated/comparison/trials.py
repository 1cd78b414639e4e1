"""Bench: trains one arm with one seed and one learning rate, each time from the same start, and measures it.

Knows how an arm learns: every arm is a federation, of all participants, of one alone, or of one who has everybody's
examples, so that rounds, optimizers and schedules mean the same in each. Knows nothing about which trials there are.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import NonFiniteLossError, ParticipantError, QuorumError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.comparison import rows
from llmchain_fed.federated.comparison.arms import ALONE, BASE, CENTRALISED, FEDERATED, PERSONAL
from llmchain_fed.federated.comparison.code_digest import code_digest
from llmchain_fed.federated.comparison.measuring import Values, values_of
from llmchain_fed.federated.comparison.start import Start
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.loop import UNUSABLE, run_round
from llmchain_fed.federated.options import CODE, FederationConfig, FederationOptions
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.server.assembly import assemble
from llmchain_fed.federated.server.cost_estimate import plan_of
from llmchain_fed.federated.server.server import Server
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loop import train_locally

ALL = ""
"""whose model it is that everybody shares"""
# beside what is learnt: who is measured on what, what is kept, who is waited for
_BESIDE = {"evaluation", "samples", "personal", "keep_checkpoints", "deadline", "retries", "participants_per_round"}
_BESIDE |= {"metrics", "labels", "answer_tokens"}


@dataclass(frozen=True)
class Trial:
    """One training of a comparison, and where it is measured."""

    arm: str
    """one of the five names"""
    seed: int
    lr: float | None = None
    participant: str | None = None
    """who trains alone"""
    batch_size: int | None = None
    """of the centralised arm"""
    choosing: bool = False
    """whether it trains without the validation part, and is measured on that; else on what is held out"""
    code: str = ""
    """of an arm of one's own, the digest of its function"""


@dataclass
class TrialResult:
    """What a trial gave."""

    values: dict[str, Values] = field(default_factory=dict)
    """whose model (`ALL`: one for everybody) → its values"""
    seconds: float = 0.0
    """of training and measuring"""
    diverged: str | None = None
    """why there are no values: training did not stay finite"""


class Bench:
    """Everything that trials share.

    Args:
        given: What the federation was made of.
        llm: Which model of it, as the federation was told.
        server: The federation's; nothing of it changes but the weights in its model.
        start: Where every trial begins.
        clients: The federation's participants, whose data is read once.
        rounds: Of every arm.
        share: Of the training examples that is set apart for choosing a learning rate.
    """

    def __init__(
        self,
        given: Any,
        llm: Any,
        server: Server,
        start: Start,
        clients: Mapping[str, Client],
        rounds: int,
        share: float,
    ) -> None:
        self._given, self._llm, self._server, self._start = given, llm, server, start
        self.clients, self.rounds = dict(clients), rounds
        self.data: dict[str, EncodedExamples] = {n: c.data.train() for n, c in clients.items()}
        sides = {name: rows.divided(data, share) for name, data in self.data.items()}
        self.validation = {n: both[1] for n, both in sides.items() if both is not None}
        self._rest = {n: both[0] if both is not None else self.data[n] for n, both in sides.items()}
        held_out = {n: c.data.held_out() for n, c in clients.items()}
        self.held_out: dict[str, EncodedExamples] = held_out
        self.training = server.settings.training
        self._everything: dict[bool, EncodedExamples] = {}

    def run(self, trial: Trial) -> TrialResult:
        """Trains from the start, and measures; the model has other weights afterwards.

        Raises:
            LLMChainFedError: What the training itself raises; one that does not stay finite is an outcome.
        """
        began, outcome = time.perf_counter(), TrialResult()
        self._start.state.load(self._server.model)
        data = self._rest if trial.choosing else self.data
        try:
            for owner in self._trained(trial, data):
                outcome.values[owner] = values_of(
                    self.clients, self.validation if trial.choosing else None, self._server.evaluator
                )
        except NonFiniteLossError as error:
            outcome.values, outcome.diverged = {}, str(error)
        outcome.seconds = time.perf_counter() - began
        return outcome

    def seconds_of_training(self) -> float | None:
        """What the plan says that one trained arm takes."""
        self._start.state.load(self._server.model)
        server, _ = self._federation(list(self.clients), self.data, self._options(0, self.base_lr))
        server.join()
        return plan_of(server, self.rounds).seconds

    @property
    def measured_by(self) -> list[Any]:
        """What decides the values of the federation's metrics, as JSON."""
        evaluator = self._server.evaluator
        metrics = [[m.name, code_digest(m.fn) if m.code else ""] for m in evaluator.metrics]
        return [metrics, list(evaluator.labels or ()), evaluator.answer_tokens]

    def identity(self) -> str | None:
        """What of the chain decides answers beside its weights, as a digest; None where much of it is code."""
        known = getattr(self._server.target.prompt, "encoding_identity", lambda: None)()
        return hashlib.sha256(known.encode()).hexdigest() if known is not None else None

    def directions(self, values: Iterable[str]) -> dict[str, bool | None]:
        """Whether more of a value is better, as the federation's metrics say; None where nobody said so.

        Whose a value is that is called as no metric is known where there is one metric alone that it can be of.
        """
        metrics = self._server.evaluator.metrics
        said = {metric.name: metric.maximize for metric in metrics}
        others = {metric.maximize for metric in metrics if metric.code and metric.name not in set(values)}
        unnamed = next(iter(others)) if len(others) == 1 else None
        return {value: said.get(value, unnamed) for value in values if value in said or others}

    @property
    def base_lr(self) -> float:
        """The federation's own learning rate."""
        return float(self.training.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"])

    def examples_seen(self, trial: Trial) -> int:
        """How many examples a trial presents to its model, or models, in all its rounds."""
        if trial.arm == BASE:
            return 0
        if trial.arm == CENTRALISED:
            return rows.presented(sum(map(len, self.data.values())), self._centralised(trial), self.rounds)
        names = [trial.participant] if trial.participant is not None else list(self.clients)
        return sum(rows.presented(len(self.data[n]), self.clients[n].config, self.rounds) for n in names)

    # --- arms -------------------------------------------------------------------------------------------------------

    def _trained(self, trial: Trial, data: Mapping[str, EncodedExamples]) -> Iterator[str]:
        """Whose model is in the model now, one after the other, until there is no further."""
        if trial.arm == BASE:
            yield ALL
        elif trial.arm == FEDERATED:
            yield from self._federated(trial, data)
        elif trial.arm == PERSONAL:
            yield from self._personal(trial, data)
        elif trial.arm == ALONE:
            assert trial.participant is not None
            name = trial.participant
            server, _ = self._federation([name], data, self._plain(trial), alone=True)
            self._rounds(server, self.rounds)
            yield name
        else:
            everything = Participant(CENTRALISED, self._pooled(trial.choosing))
            options = self._plain(trial) | {"training": self._centralised(trial)}
            server, _, _ = assemble(self._given, [everything], None, cast("FederationOptions", options))
            self._rounds(server, self.rounds)
            yield ALL

    def _federated(self, trial: Trial, data: Mapping[str, EncodedExamples]) -> Iterator[str]:
        server, clients = self._federation(list(self.clients), data, self._options(trial.seed, trial.lr))
        self._rounds(server, self.rounds)
        private = {n: c.progress.before()[1].private for n, c in clients.items()}
        if not any(private.values()):
            yield ALL
            return
        state = GlobalState.of(server.model)
        for name, own in private.items():  # under a rule whose participants keep a part for themselves
            GlobalState({**state.values, **own}, state.remainder).load(server.model)
            yield name

    def _personal(self, trial: Trial, data: Mapping[str, EncodedExamples]) -> Iterator[str]:
        """The last round is each participant's own: it trains on from the federated weights, and nobody averages."""
        server, clients = self._federation(list(self.clients), data, self._options(trial.seed, trial.lr))
        self._rounds(server, self.rounds - 1)
        state = GlobalState.of(server.model)
        for name, client in clients.items():
            progress = client.progress.before()[1]
            GlobalState({**state.values, **progress.private}, state.remainder).load(server.model)
            train_locally(
                server.model,
                data[name],
                client.config.replace(proximal_mu=0.0),
                prompt=client.target.prompt,
                participant=name,
                round=self.rounds - 1,
                rounds=self.rounds,
                first_step=progress.next_step,
                gradient_step=client.gradient_step,
                batch_sampler=client.batch_sampler,
            )
            yield name

    # --- federations ------------------------------------------------------------------------------------------------

    def _federation(
        self,
        names: list[str],
        data: Mapping[str, EncodedExamples],
        options: Mapping[str, Any],
        *,
        alone: bool = False,
    ) -> tuple[Server, dict[str, Client]]:
        """A federation of these participants on the model as it is now, which measures nothing."""
        own: dict[str, Any] = {"rank": None, "alpha": None} if alone else {}
        people = [replace(self.clients[n].participant, examples=data[n], held_out=None, **own) for n in names]
        server, clients, _ = assemble(self._given, people, None, cast("FederationOptions", dict(options)))
        return server, clients

    def _options(self, seed: int, lr: float | None) -> dict[str, Any]:
        """The federation's own options, but for the seed and the learning rate."""
        config, settings = self._server.settings.config, self._server.settings
        names = (FederationOptions.__annotations__.keys() & FederationConfig.model_fields.keys()) - _BESIDE
        written = {name: getattr(config, name) for name in sorted(names)}
        options = {n: v for n, v in written.items() if not (isinstance(v, str) and v.startswith(CODE))}
        return options | {
            "training": self.training.replace(learning_rate=lr, seed=seed),
            "aggregation": settings.rule,
            "server_optimizer": self._start.fresh_optimizer(),
            "transforms": settings.transforms or None,
            "gradient_step": settings.gradient_step,
            "batch_sampler": settings.batch_sampler,
            "samples": 0,
            "seed": seed,
            "llm": self._llm,
        }

    def _plain(self, trial: Trial) -> dict[str, Any]:
        """Options of a federation of one, which has nothing to average, to code or to pull towards."""
        settings = self._server.settings
        return {
            "training": self.training.replace(learning_rate=trial.lr, seed=trial.seed, proximal_mu=0.0),
            "gradient_step": settings.gradient_step,
            "batch_sampler": settings.batch_sampler,
            "samples": 0,
            "seed": trial.seed,
            "llm": self._llm,
        }

    def _centralised(self, trial: Trial) -> TrainingConfig:
        """How one who has all examples trains: as many presentations a round as all participants have together."""
        own = [client.config for client in self.clients.values()]
        size = trial.batch_size or self.training.batch_size
        changes: dict[str, Any] = {
            "learning_rate": trial.lr,
            "seed": trial.seed,
            "proximal_mu": 0.0,
            "batch_size": size,
            "micro_batch_size": min(size, self.training.micro_batch_size or self.training.batch_size),
        }
        if any(c.max_steps is not None for c in own) or len({c.epochs or 1 for c in own}) > 1:
            people = self.clients.items()
            total = sum(rows.presented(len(self.data[n]), c.config, self.rounds) for n, c in people)
            changes |= {"max_steps": max(1, round(total / self.rounds / size)), "epochs": None}
        else:
            changes |= {"epochs": own[0].epochs or 1}
        changed: TrainingConfig = self.training.replace(**changes)
        return changed

    def _pooled(self, choosing: bool) -> EncodedExamples:  # noqa: FBT001
        """Everybody's examples, with or without the validation part; copied once for all trials."""
        if choosing not in self._everything:
            self._everything[choosing] = rows.pooled(list((self._rest if choosing else self.data).values()))
        return self._everything[choosing]

    def _rounds(self, server: Server, rounds: int) -> None:
        """So many rounds in which everybody trains.

        Raises:
            NonFiniteLossError: Somebody's training did not stay finite.
            ParticipantError: Somebody's failed for another reason.
        """
        server.planned = self.rounds  # a learning rate's schedule runs over all of them
        for _ in range(rounds):
            server.join()
            try:
                run_round(server, lambda *_: None, _check_all_trained)
            except QuorumError as error:
                raise _failed(str(error)) from error


def _check_all_trained(record: RoundRecord) -> None:
    for name, one in record.participants.items():
        if one.status != "trained":
            why = f"{name!r} did not train in round {record.round}: {one.reason or one.status}"
            raise _failed(why)
    for note in record.notes:
        if note.startswith(UNUSABLE):
            raise _failed(note)


def _failed(why: str) -> NonFiniteLossError | ParticipantError:
    """The error for a round in which not everybody trained: by its words, as a record has no more of it."""
    return NonFiniteLossError(why) if "finite" in why.lower() else ParticipantError(why)
