"""Server: the leading side of a federation. Its state between rounds, and the steps that a round is made of.

Knows the seams: runtime, rule, codecs, server optimizer, records. Knows nothing about how participants train or where
they run, nor about when a round is run. `Replication` lets all processes of one script end every call with its state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.data.report import DataReport
from llmchain_fed.errors import FederationError, UpdateRefusedError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.data import crossing, overlap
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.history_file import MOST_PARTICIPANTS, Count, Name
from llmchain_fed.federated.protocol.global_state import GlobalState, named, parted
from llmchain_fed.federated.protocol.tasks import MAX_AGGREGATION, TrainTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.client_manager import ClientManager
from llmchain_fed.federated.server.dispatch import Dispatcher
from llmchain_fed.federated.server.divergence import Divergence
from llmchain_fed.federated.server.evaluation import Evaluator, Measurement
from llmchain_fed.federated.server.round import OpenRound
from llmchain_fed.federated.settings import Settings, sampled
from llmchain_fed.federated.target import Target
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import Strict, checked, decoding, printable
from llmchain_fed.updates import serialization, server_optimizers
from llmchain_fed.updates.collection import Combined, Round
from llmchain_fed.updates.server_optimizers import ServerOptimizer


class Standing:
    """Where a federation stands before a round's updates are combined: its model and its server's optimizer."""

    def __init__(self, model: LocalModel, optimizer: ServerOptimizer | None) -> None:
        self.state, self._model, self._left = GlobalState.of(model), model, False
        self.undo = server_optimizers.snapshot(optimizer)
        """puts the server optimizer's memory back"""

    def leave(self, new: GlobalState) -> None:
        """Loads other weights."""
        self._left = True
        new.load(self._model)

    def restore(self) -> None:
        """Goes back, also where loading was interrupted."""
        if self._left:
            self.state.load(self._model)
        self.undo()


class Server:
    """Runs rounds and keeps what they leave."""

    def __init__(self, target: Target, runtime: Runtime, evaluator: Evaluator, settings: Settings) -> None:
        self.target, self.model, self.runtime = target, target.model, runtime
        self.evaluator, self.settings = evaluator, settings
        rule = printable(settings.rule.name, MAX_AGGREGATION)[:MAX_AGGREGATION] or None
        self.client_manager = ClientManager(runtime, target, settings.training, aggregation=rule)
        self.broadcast = Broadcast(settings.broadcast_codec, settings.layout, self.client_manager.attendance)
        self.dispatcher = Dispatcher(runtime, self.client_manager, self.broadcast, settings)
        self.round = 0
        self.history = History()
        self.data_reports: dict[str, DataReport] = {}
        self.planned: int | None = None
        """how many rounds the federation has, while a fit knows"""
        self.patience: list[int] = []
        """of a fit that is under way, or was when it was interrupted"""
        self._declared: dict[str, tuple[int | None, int | None]] = {}
        """participant → examples and tokens that it joined with last"""
        self.notes: dict[str, str] = {}
        """participant → what the next record should say of it"""
        self.round_notes: list[str] = []
        """what the next record should say of the whole round"""
        self.members_changed = False
        """whether the next record is the first since members, or what they have, changed"""
        self.diverged: str | None = None
        """why the latest round is one of a federation that diverges"""
        self._divergence = Divergence()

    def join(self) -> list[str]:
        """Lets those join who have not; returns who has now.

        Raises:
            QuorumError: Too few are there.
        """
        newcomers = self.dispatcher.join(self.round)
        for name in newcomers:  # one that lost its connection may say something else than before: that shows
            hello = self.client_manager.joined[name]
            counts = hello.num_examples, hello.num_tokens
            former = self._declared.setdefault(name, counts)
            if former != counts:
                self.notes[name] = f"joined with {former[0]} examples before, and with {counts[0]} now"
                self._declared[name] = counts
        reports = {n: self.client_manager.joined[n].data_report for n in newcomers}
        self.data_reports |= {n: report for n, report in reports.items() if report is not None}
        return newcomers

    def begin(self) -> OpenRound:
        """A round that starts at the weights as they are now."""
        settings = self.settings
        self.publish()
        expected = sampled(settings.config.participants_per_round, len(self.runtime.nodes()))
        about = Round(self.broadcast.state_for(), settings.layout, self.round, settings.config.seed, expected)
        return OpenRound(about, self.broadcast, self.model.fingerprint(), settings, self._training_of)

    def _training_of(self, name: str) -> TrainingConfig:
        """How a participant trains: as all do, or where it is one of this process with its own options over that."""
        client = self.runtime.local.get(name)
        return client.config if isinstance(client, Client) else self.settings.training

    def publish(self) -> GlobalState:
        """Makes the weights as they are now what participants are sent."""
        state = GlobalState.of(self.model)
        self.broadcast.publish(state, self.model.weights_hash)
        return state

    def task(self, opened: OpenRound) -> TrainTask:
        """What participants are told to do in a round."""
        config = self.settings.config
        more: dict[str, Any] = {"seconds": config.deadline, "rounds": self.planned}
        if config.personal is not None:
            more["ditto"] = config.personal.model_dump()
        return opened.task(**more)

    def measure(self, completed: int) -> Measurement | None:
        """Held-out losses under the weights as they are now, which stand after so many rounds."""
        return self.evaluator.measure(*self._measuring(completed))

    def peek(self) -> Measurement | None:
        """The same before a round, which says what it has cost."""
        return self.evaluator.peek(*self._measuring(self.round))

    def _measuring(self, completed: int) -> tuple[Any, ...]:
        return self.runtime, self.broadcast, self.client_manager.joined, completed, self.settings.config.deadline

    @contextmanager
    def restoring(self) -> Iterator[Standing]:
        """Where the federation stands; what fails or is interrupted inside puts weights and server optimizer back."""
        standing = Standing(self.model, self.settings.server_optimizer)
        try:
            yield standing
        except BaseException:
            standing.restore()
            raise

    def record_of(self, opened: OpenRound, idle: Mapping[str, ParticipantRecord]) -> RoundRecord:
        """The record of a round that is aggregated, as far as its updates say, with those of who was not asked."""
        record = RoundRecord(
            round=self.round + 1, participants={**opened.records, **idle}, loss=self.settings.training.loss
        )
        for name, note in self.notes.items():
            if name in record.participants:
                record.participants[name].notes.append(note)
        self._note_overlaps(record)
        record.aggregation_gap = opened.gap()
        record.notes, record.members_changed = [*self.round_notes, *opened.notes], self.members_changed
        if not self.history.rounds and isinstance(shared := self.evaluator.shared(), EncodedExamples):
            record.notes += shared.report.notes("shared evaluation examples")
        record.training_seconds = sum(r.seconds or 0.0 for r in opened.records.values())
        return record

    def diverges(self, record: RoundRecord, after: Measurement | None) -> str | None:
        """Why this round is one of a federation that diverges, which its record says as well; None where it is not."""
        why = self._divergence.look(self.history, record, after)
        record.notes += [why] if why else []
        return why

    def complete(self, record: RoundRecord, diverged: str | None) -> None:
        """The round has happened: it counts, and its record stands in the history."""
        self.round += 1
        self.notes, self.round_notes, self.members_changed, self.diverged = {}, [], False, diverged
        self.history.append(record)

    def start_anew(self) -> None:
        """Forgets all rounds: the weights as they are now are where the next one, the first, begins."""
        self.round, self.history, self.patience = 0, History(), []
        self.notes, self.round_notes, self.members_changed, self.diverged = {}, [], False, None
        self._divergence = Divergence()
        self.broadcast.restore({}, GlobalState.of(self.model))
        self.evaluator.forget()

    def idle(self, opened: OpenRound) -> dict[str, ParticipantRecord]:
        """Records of those who were not asked in a round."""
        manager = self.client_manager
        return {name: manager.record_of(name) for name in self.runtime.nodes() if name not in opened.records}

    def _note_overlaps(self, record: RoundRecord) -> None:
        """Says of those whose first round this is what is both trained on and held out."""
        there = {n for r in self.history.rounds for n, p in r.participants.items() if p.status != "absent"}
        new = [n for n in record.participants if n in self.client_manager.joined and n not in there]
        for name in new:
            record.participants[name].notes += self.client_manager.joined[name].held_out_notes
            own = self.client_manager.joined[name].overlapping
            record.participants[name].notes += own.notes() if own is not None else []
        if not new or not self.runtime.local:
            return  # what others have in another process, nobody here knows
        here = {
            n: p.data
            for n, p in self.runtime.local.items()
            if isinstance(p, Client) and n in self.client_manager.joined
        }
        shared = self.evaluator.shared()
        for name in new:
            found = overlap(here[name].train(), shared) if name in here else None
            record.participants[name].notes += found.notes("shared evaluation examples") if found is not None else []
        held_out = {n: data.held_out() for n, data in here.items() if data.holds_out}
        for name, (count, of) in crossing(
            {n: d.train() for n, d in here.items()} if held_out else {}, held_out
        ).items():
            if name in new:
                note = (
                    f"{count} of {of} held-out examples are trained on by another participant: held-out loss flatters"
                )
                record.participants[name].notes.append(note)

    def ask(self, op: str, messages: Mapping[str, bytes]) -> dict[str, bytes | Exception]:
        """Sends participants a message each, and waits for all answers."""
        answers = self.runtime.call(op, list(messages), messages, self.settings.config.deadline)
        return dict(self.client_manager.attendance.following(op, messages, answers))

    def moved(self, opened: OpenRound, former: GlobalState, combined: Combined) -> GlobalState:
        """Where the server optimizer moves the global weights to.

        Raises:
            UpdateRefusedError: What comes out is not finite. Code of a user's own may fail as it likes: what it raises,
                or the model's own check, is raised.
        """
        settings, values = self.settings, combined.values
        if settings.broadcast_codec is not None:
            # participants started from what they decoded: what they learnt is added to the weights as they really are,
            # whose distance from that copy the next broadcast brings
            values = {
                n: (former.values[n].float() + (v.float() - opened.start[n].float())).to(v.dtype)
                for n, v in values.items()
            }
        if not settings.rule.own:
            _check_finite(values)
        moved = server_optimizers.apply(settings.server_optimizer, former.values, values)
        if settings.rule.refactor is not None and settings.layout is not None:
            moved = settings.rule.refactor(moved, settings.layout)
        new = GlobalState(moved, former.plus(combined.remainder))
        if not settings.rule.own:
            remainder = {n + part: t for n, f in new.remainder.items() for part, t in ((" B", f.b), (" A", f.a))}
            _check_finite({**(moved if settings.rule.refactor is not None else {}), **remainder})
        return new


class Replication:
    """Lets one process work while the others help, and then stand where it does, of which `adopted` is told there."""

    def __init__(self, server: Server, adopted: Callable[[], object]) -> None:
        self._server, self._adopted = server, adopted
        self._result: Any = None

    def do(self, work: Callable[[], Any]) -> Any:
        """What `work`, called by the leading process only, gives: JSON, on every process.

        Raises:
            FederationError: On the others, where the work failed or its process is gone.
        """
        runtime = self._server.runtime
        if not runtime.replicated:
            return work()
        if not runtime.leads:
            runtime.follow(self._adopt)
            return self._result
        try:
            found = work()
        except BaseException as error:
            runtime.publish(self._outcome(), error)
            raise
        runtime.publish(self._outcome(found))
        return found

    def _outcome(self, result: Any = None) -> bytes:
        """What the other processes need in order to stand where this one does."""
        server, state = self._server, GlobalState.of(self._server.model)
        header = {
            "round": server.round,
            "history": json.loads(server.history.to_json()),
            "reports": {name: report.counts() for name, report in server.data_reports.items()},
            "result": result,
        }
        return serialization.pack({**state.values, **named(state.remainder)}, header)

    def _adopt(self, outcome: bytes) -> None:
        what = "what the leading process says it did"
        with decoding(what, FederationError):
            header, infos = serialization.inspect(outcome, max_bytes=len(outcome))
            found = checked(_Outcome, header, what=what, error=FederationError)
            history = History.from_dict(found.history, what=what, error=FederationError)
            reports = {name: DataReport(**report) for name, report in found.reports.items()}
            state = GlobalState(*parted(serialization.values(outcome, infos)))
        state.load(self._server.model)
        self._server.round, self._server.history, self._server.data_reports = found.round, history, reports
        self._result = found.result
        self._adopted()


class _Outcome(Strict):
    """What one process tells the others, beside the weights."""

    round: Count
    history: Any
    reports: Annotated[
        dict[Name, Annotated[dict[str, Count], Field(max_length=64)]], Field(max_length=MOST_PARTICIPANTS)
    ]
    result: Any


def _check_finite(values: Mapping[str, Tensor]) -> None:
    """Makes sure that updates, each of which is finite, were not so large that what comes out of them overflows."""
    if (name := serialization.not_finite(values)) is not None:
        msg = f"their combination is not finite in {name}"
        raise UpdateRefusedError(msg)
