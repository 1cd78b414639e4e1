"""Server: the leading side of a federation. Its state between rounds, and one round from broadcast to loaded weights.

Knows the seams: transport, rule, codecs, server optimizer, records. Knows nothing about how participants train or where
they run, nor about when a round is run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llmchain_fed.data.encoding import DataReport
from llmchain_fed.errors import QuorumError, UpdateRefusedError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.overlap import crossing, overlap
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.options import sampled
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import MAX_AGGREGATION
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.client_manager import ClientManager
from llmchain_fed.federated.server.dispatch import Dispatcher
from llmchain_fed.federated.server.divergence import Divergence, nothing_finite
from llmchain_fed.federated.server.evaluation import Evaluator, Measurement
from llmchain_fed.federated.server.round import OpenRound
from llmchain_fed.federated.settings import Settings
from llmchain_fed.federated.target import Target
from llmchain_fed.training.loop import TrainingConfig, seed_of
from llmchain_fed.untrusted import printable
from llmchain_fed.updates import serialization, server_optimizers
from llmchain_fed.updates.aggregation import AGGREGATIONS
from llmchain_fed.updates.aggregation.base import Round

UNUSABLE = "the updates of this round cannot be combined"


class Server:
    """Runs rounds and keeps what they leave.

    Args:
        trainee: The model and chain that learn.
        transport: The way to the participants.
        evaluator: What held-out loss is measured on.
        settings: The options.
        federation: The federation's id, where an earlier run goes on.
    """

    def __init__(
        self,
        target: Target,
        transport: Runtime,
        evaluator: Evaluator,
        settings: Settings,
        federation: str | None = None,
    ) -> None:
        self.target, self.model, self.transport = target, target.model, transport
        self.evaluator, self.settings = evaluator, settings
        rule = printable(settings.rule.name, MAX_AGGREGATION)[:MAX_AGGREGATION] or None
        self.client_manager = ClientManager(transport, target, settings.training, federation, aggregation=rule)
        self.broadcast = Broadcast(settings.broadcast_codec, settings.layout, self.client_manager.attendance)
        self.dispatcher = Dispatcher(
            transport, self.client_manager, self.broadcast, settings.rule, settings.deadline, settings.retries
        )
        self.round = 0
        self.history = History()
        self.data_reports: dict[str, DataReport] = {}
        self.patience: list[float] = []
        """of a fit that is under way, or was when it was interrupted"""
        self._declared: dict[str, tuple[int | None, int | None]] = {}
        """participant → examples and tokens that it joined with last"""
        self.notes: dict[str, str] = {}
        """participant → what the next record should say of it"""
        self.round_notes: list[str] = []
        """what the next record should say of the whole round"""
        self.members_changed = False
        """whether the next record is the first since members, or what they hold, changed"""
        self.diverged: str | None = None
        """why the latest round is one of a federation that diverges"""
        self._divergence = Divergence()

    def join(self) -> list[str]:
        """Lets those join who have not; returns who has now.

        Raises:
            QuorumError: Too few are there.
        """
        newcomers = self.dispatcher.join(self.round, self.settings.quorum)
        for name in newcomers:  # one that lost its connection may say something else than before: that shows
            hello = self.client_manager.joined[name]
            counts = hello.num_examples, hello.num_tokens
            former = self._declared.setdefault(name, counts)
            if former != counts:
                self.notes[name] = f"joined with {former[0]} examples before, and with {counts[0]} now"
                self._declared[name] = counts
        reports = {n: self.client_manager.joined[n].report for n in newcomers}
        self.data_reports |= {n: report for n, report in reports.items() if report is not None}
        return newcomers

    def begin(self) -> OpenRound:
        """A round that starts at the weights as they are now."""
        settings = self.settings
        self.publish()
        expected = sampled(settings.per_round, len(self.transport.nodes()))
        about = Round(self.broadcast.state_for(), settings.layout, self.round, settings.seed, expected)
        base = self.model.fingerprint()
        return OpenRound(
            about,
            self.broadcast,
            base,
            settings.rule,
            settings.weighting,
            settings.codec,
            self._training_of,
            settings.max_weight_share,
        )

    def _training_of(self, name: str) -> TrainingConfig:
        """How a participant trains: as all do, or where it is one of this process with its own options over that."""
        client = self.transport.local.get(name)
        return client.config if isinstance(client, Client) else self.settings.training

    def publish(self) -> GlobalState:
        """Makes the weights as they are now what participants are sent."""
        state = GlobalState.of(self.model)
        self.broadcast.publish(state, self.model.weights_hash)
        return state

    def header(self, opened: OpenRound) -> dict[str, Any]:
        """What participants are told to do in a round."""
        header = opened.header | {"seconds": self.settings.deadline}
        if self.settings.personal is not None:
            header["ditto"] = self.settings.personal.model_dump()
        return header

    def run_round(self, begins: Callable[[int, tuple[str, ...]], object]) -> RoundRecord:
        """One round with those who are there.

        Args:
            begins: Told the round's number, counted from 1, and who will be asked.

        Raises:
            QuorumError: Too few updates are usable; nothing has changed.
        """
        started = time.perf_counter()
        nodes = self.transport.nodes()
        chosen = self.chosen(self.client_manager.present(), self.round)
        begins(self.round + 1, tuple(chosen))
        before = self.measure(self.round)
        opened = self.begin()
        self.dispatcher.train(opened, chosen, self.header(opened))
        others = {name: self.client_manager.record_of(name) for name in nodes if name not in opened.records}
        self.diverged = None
        try:
            return self.close(opened, started, before, others)
        except QuorumError:
            self.diverged = nothing_finite(opened.records)
            raise

    def chosen(self, nodes: list[str], number: int) -> list[str]:
        """Who of them is asked in a round."""
        count = sampled(self.settings.per_round, len(nodes))
        if count >= len(nodes):
            return nodes
        rng = random.Random(seed_of(self.settings.seed, "sample", number))  # noqa: S311 (sampling, no secret)
        chosen = set(rng.sample(sorted(nodes), count))
        return [node for node in nodes if node in chosen]

    def measure(self, completed: int) -> Measurement | None:
        """Held-out losses under the weights as they are now, which stand after so many rounds."""
        return self.evaluator.measure(
            self.transport, self.broadcast, self.client_manager.joined, completed, self.settings.deadline
        )

    def close(
        self, opened: OpenRound, started: float, before: Measurement | None, idle: Mapping[str, ParticipantRecord]
    ) -> RoundRecord:
        """Aggregates and loads; what fails or is interrupted puts weights and server optimizer back.

        Updates that cannot be combined, each of which was finite for itself, leave the weights as they were: the round
        counts, and its record says why.

        Raises:
            QuorumError: Too few updates are usable.
        """
        former = GlobalState.of(self.model)
        undo = server_optimizers.snapshot(self.settings.server_optimizer)
        try:
            new, unusable = self._next_state(opened, former), []
        except UpdateRefusedError as error:
            undo()
            new, unusable = former, [f"{UNUSABLE} ({printable(error, 300)}): the weights are as before"]
        except BaseException:
            undo()
            raise
        try:
            record = RoundRecord(round=self.round + 1, participants={**opened.records, **idle})
            for name, note in self.notes.items():
                if name in record.participants:
                    record.participants[name].notes.append(note)
            self._note_overlaps(record)
            record.aggregation_gap = opened.gap()
            new.load(self.model)
            after = self.measure(self.round + 1) if before else None
            self.evaluator.fill(record, before, after, self.history)
            record.notes, record.members_changed = [*self.round_notes, *unusable], self.members_changed
            record.update_norm = serialization.distance(new.values, former.values)
            record.training_seconds = sum(r.seconds or 0.0 for r in opened.records.values())
            record.weights_version = self.model.weights_version
            diverged = self._divergence.look(self.history, record, after)
            record.notes += [diverged] if diverged else []
            record.seconds = time.perf_counter() - started
        except BaseException:
            former.load(self.model)
            undo()
            raise
        self.round += 1
        self.notes, self.round_notes, self.members_changed, self.diverged = {}, [], False, diverged
        self.history.append(record)
        return record

    def _note_overlaps(self, record: RoundRecord) -> None:
        """Says of those whose first round this is what is both trained on and held out."""
        new = [n for n in record.participants if n in self.client_manager.joined and not self._has_been_there(n)]
        for name in new:
            own = self.client_manager.joined[name].overlap
            record.participants[name].notes += own.notes() if own is not None else []
        clients = self.transport.local.items() if new else ()  # what others hold in another process, nobody here knows
        here = {n: c.data for n, c in clients if isinstance(c, Client) and n in self.client_manager.joined}
        if not here:
            return
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

    def _has_been_there(self, name: str) -> bool:
        found = (r.participants[name].status for r in reversed(self.history.rounds) if name in r.participants)
        return any(status != "absent" for status in found)

    def _next_state(self, opened: OpenRound, former: GlobalState) -> GlobalState:
        settings = self.settings
        combined = opened.aggregate(settings.quorum)
        values = combined.values
        if settings.broadcast_codec is not None and settings.rule.linear:
            # participants started from what they decoded: what they learnt is added to the weights as they really are,
            # whose distance from that copy the next broadcast brings
            values = {
                n: (former.values[n].float() + (v.float() - opened.start[n].float())).to(v.dtype)
                for n, v in values.items()
            }
        # code of a user's own may fail as it likes: what it raises, or the model's own check, is raised
        ours = AGGREGATIONS.get(settings.rule.name) is settings.rule
        if ours:
            _check_finite(values)
        moved = server_optimizers.apply(settings.server_optimizer, former.values, values)
        if settings.rule.refactor is not None and settings.layout is not None:
            moved = settings.rule.refactor(moved, settings.layout)
        new = GlobalState(moved, former.plus(combined.remainder))
        if ours:
            remainder = {n + part: t for n, f in new.remainder.items() for part, t in ((" B", f.b), (" A", f.a))}
            _check_finite({**(moved if settings.rule.refactor is not None else {}), **remainder})
        return new


def _check_finite(values: Mapping[str, Tensor]) -> None:
    """Makes sure that updates, each of which is finite, were not so large that what comes out of them overflows.

    Raises:
        UpdateRefusedError: They were.
    """
    if (name := serialization.not_finite(values)) is not None:
        msg = f"their combination is not finite in {name}"
        raise UpdateRefusedError(msg)
