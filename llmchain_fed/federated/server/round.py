"""OpenRound: one round in progress. Takes answers as they arrive, checks them, combines them.

Knows updates and the aggregation rule. Knows nothing about who is asked, how bytes travel, or evaluation. Until its
result is loaded, a round has changed nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from llmchain_fed.errors import (
    DeadlineError,
    DuplicateParticipantError,
    LLMChainFedError,
    QuorumError,
    TransportError,
    UpdateRefusedError,
)
from llmchain_fed.federated.history import ParticipantRecord, told_of
from llmchain_fed.federated.protocol.tasks import TrainTask
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.diagnostics import Diagnostics, Seen
from llmchain_fed.federated.settings import Settings
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import decoding, one_line
from llmchain_fed.updates.aggregation.gap import WithGap
from llmchain_fed.updates.aggregation.weight_share import CappedWeights
from llmchain_fed.updates.collection import Ask, Collection, Combined, Contribution, Round
from llmchain_fed.updates.lora_layout import selected
from llmchain_fed.updates.serialization import TensorInfo, describe
from llmchain_fed.updates.update import Expected, Update

_REASONS = 20  # participants whose reasons one error lists
_REASON = 300  # characters of each
_GENEROUS = 10  # times the steps asked for: a participant may have options of its own


class Arrival(NamedTuple):
    """What came of one participant's training."""

    participant: str
    answer: bytes | Exception
    """its update, or why there is none"""
    bytes_down: int
    """that went to it for this"""
    num_examples: int | None = None
    """that it trains on, as it said when it joined"""
    num_tokens: int | None = None
    """likewise, of completions"""


class OpenRound:
    """Collects a round's updates: each is verified, decoded to values, added, and let go.

    Args:
        about: The round as its rule sees it.
        broadcast: What each participant was sent.
        base: Fingerprint of the base weights.
        settings: The federation's: its rule, its codec, and what an update counts by.
        training: How a participant of this name trains, as far as anybody here knows.
    """

    def __init__(
        self,
        about: Round,
        broadcast: Broadcast,
        base: str,
        settings: Settings,
        training: Callable[[str], TrainingConfig],
    ) -> None:
        self.number = about.number
        self.start = about.state
        """where participants start: the global state, or with a broadcast codec what they decoded of it"""
        self.records: dict[str, ParticipantRecord] = {}
        self.notes: list[str] = []
        """what the round's record should say of its outcome"""
        self.spent = False
        """whether its updates have been combined: rules may use them up"""
        self._broadcast, self._base, self._settings, self._training = broadcast, base, settings, training
        self._rule = rule = settings.rule
        self._about = about
        self._names = selected(self.start, rule.shares(self.number))
        collection = rule.begin(self._about)
        self._layouts: dict[int | None, Mapping[str, TensorInfo]] = {}
        self._diagnostics: Diagnostics | None = None  # of single updates, where the hub sees them
        if collection.payload(describe({n: self.start[n] for n in self._names})) is None:
            self._diagnostics = Diagnostics(self.start, self._names)
            collection = self._with_gap = WithGap(collection, rule, about)
        share = settings.config.max_weight_share
        self._capped = CappedWeights(collection, share) if share is not None else None
        self._collection: Collection = self._capped or collection
        self._weights: dict[str, float] = {}

    def task(self, **more: Any) -> TrainTask:
        """What a participant is told to do; rounds count from 1 in messages.

        Raises:
            FederationError: What is told beside the round's own makes no sense.
        """
        codec = self._settings.codec
        return TrainTask.of(
            round=self.number + 1,
            base=self._base,
            trains=self._rule.trains(self.number),
            shares=self._rule.shares(self.number),
            codec=self._settings.config.codec,
            feedback=codec is not None and codec.lossy_feedback and not self._rule.regauges,
            **more,
        )

    def largest_update(self, names: Iterable[str] = ()) -> int:
        """bytes: what no update of this round exceeds, from whoever of these it comes."""
        longest = max(names, key=lambda name: len(json.dumps(name)), default="")
        return self._expected(longest, None, self.start).max_bytes

    def _expected(
        self,
        name: str,
        rank: int | None,
        start: Mapping[str, Tensor],
        num_examples: int | None = None,
        num_tokens: int | None = None,
    ) -> Expected:
        """What the update of a participant of this rank must be; None is the common one."""
        if rank not in self._layouts:
            values = describe({n: start[n] for n in self._names})
            payload = self._collection.payload(values)
            self._layouts[rank] = values if payload is None else payload
        layout, codec = self._layouts[rank], self._settings.codec
        return Expected(name, self.number + 1, self._base, layout, num_examples, num_tokens, codec, start)

    def accept(self, arrival: Arrival) -> ParticipantRecord:
        """Uses what arrived of a participant, or records why it cannot be used.

        Raises:
            DuplicateParticipantError: An answer of its own has been used already.
        """
        name, answer, sent, num_examples, num_tokens = arrival
        self.refuse_twice(name)
        former = self.records.get(name) or ParticipantRecord()  # of an answer that was of no use: its bytes did travel
        record = ParticipantRecord(bytes_down=former.bytes_down + sent, bytes_up=former.bytes_up)
        if isinstance(answer, Exception):
            late, absent = isinstance(answer, DeadlineError), isinstance(answer, TransportError)
            record.status = "late" if late else "absent" if absent else "failed"
            record.reason = told_of(answer)
            self.records[name] = record
            return record
        record.bytes_up += len(answer)
        try:
            start = self._broadcast.state_for(name)
            expected = self._expected(name, self._broadcast.rank_of(name), start, num_examples, num_tokens)
            update, seen = self._verified(answer, expected)
            self._add(update)
            self._note(record, update, seen)
        except LLMChainFedError as error:
            record.status, record.reason = "refused", told_of(error)
        self.records[name] = record
        self._record_refusals()
        return record

    def _verified(self, answer: bytes, expected: Expected) -> tuple[Update, Seen | None]:
        """The update in a message, its codec's parts decoded to values, and what can be seen of it."""
        with decoding("its update", UpdateRefusedError):
            update = Update.from_bytes(answer, expected)
            seen = self._diagnostics.look(update, expected.start) if self._diagnostics is not None else None
            self._check_steps(update)
        return update, seen

    def _check_steps(self, update: Update) -> None:
        """Makes sure that a participant says it took no more steps than it was asked for, or may have options for."""
        steps = update.metrics.get("steps", 0.0)
        training, own_draws = self._training(update.participant), self._settings.batch_sampler is not None
        asked = training.max_steps or update.num_examples * (training.epochs or 1)
        if not 0 <= steps <= (math.inf if own_draws else _GENEROUS * asked) or steps != int(steps):
            msg = (
                f"it says it took {steps:g} steps, asked for were some {asked}. In another process a participant's own "
                f"options may ask for {_GENEROUS} times as many: bring them, or the federation's, nearer to each other."
            )
            raise UpdateRefusedError(msg)

    def _add(self, update: Update) -> None:
        name = update.participant
        weight = float(
            {"examples": update.num_examples, "tokens": update.num_tokens, "equal": 1}[self._settings.config.weighting]
        )
        steps = int(update.metrics["steps"]) if "steps" in update.metrics else None
        scaling = self._broadcast.scaling_of(name)
        contribution = Contribution(update.tensors, weight, steps, scaling, name)
        self._collection.check(contribution)
        self._collection.add(contribution)
        self._weights[name] = weight

    def _note(self, record: ParticipantRecord, update: Update, seen: Seen | None) -> None:
        """Fills in the record of an update that was added."""
        record.status = "trained"
        record.examples, record.tokens = update.num_examples, update.num_tokens
        record.train_loss = update.metrics.get("train_loss")
        record.steps = int(update.metrics["steps"]) if "steps" in update.metrics else None
        record.seconds = update.metrics.get("seconds")
        if self._diagnostics is not None and seen is not None:
            own_rank = self._broadcast.scaling_of(update.participant) is not None
            self._diagnostics.note(record, update.participant, *seen, own_rank=own_rank)

    def _record_refusals(self) -> None:
        """Says so of updates that were kept until their weights were known, and could not be used then."""
        while self._capped is not None and self._capped.refused:
            name, error = self._capped.refused.popitem()
            del self._weights[name]
            self.records[name].status, self.records[name].reason = "refused", told_of(error)

    def refuse_twice(self, name: str) -> None:
        """Makes sure that no update of this participant is in yet; one that could not be used may come again.

        Raises:
            DuplicateParticipantError: There is one.
        """
        former = self.records.get(name)
        if former is not None and former.status == "trained":
            msg = f"participant {name!r} has already trained in this round. Call step() to close the round first."
            raise DuplicateParticipantError(msg)

    @property
    def trained(self) -> list[str]:
        """Whose updates are in."""
        return [name for name, record in self.records.items() if record.status == "trained"]

    def aggregate(self, quorum: int, ask: Ask) -> Combined:
        """The combined values; fills in every record's cosine to the mean.

        `ask` is the way to the participants, for a collection that needs something beside their updates.

        Raises:
            QuorumError: Too few updates are in, or of use; every reason is listed.
        """
        self._check_quorum(quorum)
        self.spent = True
        if self._capped is not None:
            self._capped.release()
            self._record_refusals()
            self._check_quorum(quorum)  # one that was kept until its weight was known may be of no use after all
            self._weights = self._capped.weights
            for name, note in self._capped.notes.items():
                self.records[name].notes.append(note)
        self._collection.between(ask)
        combined = self._collection.finish()
        self._rule.check_outcome(combined, self._about)
        left = [] if combined.remainder else [n for n in self._names if n not in combined.values]
        self.notes = (
            [
                f"{len(left)} of {len(self._names)} shared tensors, such as {left[0]}, came out of no update: "
                "they are as before"
            ]
            if left
            else []
        )
        if self._diagnostics is not None:
            self._diagnostics.compare({name: self.records[name] for name in self.trained}, self._weights)
        return combined

    def _check_quorum(self, quorum: int) -> None:
        if len(self.trained) < max(1, quorum):
            reasons = {n: r.reason for n, r in self.records.items() if r.reason}
            raise too_few(self.number, len(self.trained), quorum, reasons, "usable updates")

    def gap(self) -> float | None:
        """‖mean(BA) − B̄·Ā‖ / ‖mean(BA)‖; None where it means nothing, or no single update is seen."""
        return self._with_gap.gap() if self._diagnostics is not None else None


def too_few(
    number: int, count: int, quorum: int, reasons: Mapping[str, object], what: str = "participants"
) -> QuorumError:
    """The error of a round that fewer take part in than its quorum asks for."""
    first = list(reasons.items())[:_REASONS]
    listed = "; ".join(f"{one_line(n, 80)}: {one_line(r, _REASON)}" for n, r in first) or "nobody answered"
    listed += f"; and {len(reasons) - _REASONS} more" if len(reasons) > _REASONS else ""
    return QuorumError(
        f"round {number + 1} has {count} {what}, the quorum is {max(1, quorum)} ({listed}). The weights are as before; "
        "mend the participants or lower the quorum."
    )
