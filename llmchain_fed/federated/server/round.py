"""OpenRound: one round in progress. Takes answers as they arrive, checks them, combines them.

Knows updates and the aggregation rule. Knows nothing about who is asked, how bytes travel, or evaluation. Until its
result is loaded, a round has changed nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
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
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import decoding, one_line
from llmchain_fed.updates import serialization
from llmchain_fed.updates.aggregation import Weighting
from llmchain_fed.updates.aggregation.base import Combined, Contribution, Round, Rule, selected
from llmchain_fed.updates.aggregation.gap import AggregationGap
from llmchain_fed.updates.aggregation.weight_share import CappedWeights, cut
from llmchain_fed.updates.codecs import spec
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.coordinates import Rows, cosine
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.update import Expected, Update

LARGEST_NORM = 1e12
"""of one tensor's distance from the global weights: beyond it no training ends, and float32's squares near their end"""
_REASONS = 20  # participants whose reasons one error lists
_REASON = 300  # characters of each
_COORDINATES = 1024
_SEEN = 1e-9  # a share that differs by less is the same
_GENEROUS = 10  # times the steps asked for: a participant may have options of its own


class OpenRound:
    """Collects a round's updates.

    Args:
        about: The round as its rule sees it.
        broadcast: What each participant was sent.
        base: Fingerprint of the base weights.
        rule: The server rule.
        weighting: What an update counts by.
        codec: What updates travel as.
        training: How a participant of this name trains, as far as anybody here knows.
        max_share: The largest share of the round that one update may weigh; None sets no limit.
    """

    def __init__(
        self,
        about: Round,
        broadcast: Broadcast,
        base: str,
        rule: Rule,
        weighting: Weighting,
        codec: Codec | None,
        training: Callable[[str], TrainingConfig],
        max_share: float | None = None,
    ) -> None:
        self._training = training
        self._capped = CappedWeights(max_share) if max_share is not None else None
        self.about, self.number = about, about.number
        self.start = broadcast.state_for()
        """where participants start: the global state, or with a broadcast codec what they decoded of it"""
        self.records: dict[str, ParticipantRecord] = {}
        self.spent = False
        """whether its updates have been combined: rules may use them up"""
        self._broadcast, self._base, self._rule, self._weighting, self._codec = broadcast, base, rule, weighting, codec
        self.part = rule.shares(about.number)
        self._names = selected(self.start, self.part)
        self._collector = rule.begin(replace(about, state=self.start))
        measured = about.layout is not None and not about.layout.refused and self.part == "all" and rule.linear
        self._gap = AggregationGap(about.layout) if measured and about.layout is not None else None
        self._gap_found: float | None = None
        self._comparable = True
        total = sum(self.start[n].numel() for n in self._names)
        self._stride = max(1, math.ceil(total / _COORDINATES))
        self._coordinates = Rows()
        self._weights: dict[str, float] = {}
        self._layouts: dict[int | None, dict[str, TensorInfo]] = {}
        self._owners: dict[bytes, str] = {}  # content of an update → who sent it first

    def task(self, **more: Any) -> TrainTask:
        """What a participant is told to do; rounds count from 1 in messages.

        Raises:
            FederationError: What is told beside the round's own makes no sense.
        """
        return TrainTask.of(
            round=self.number + 1,
            base=self._base,
            trains=self._rule.trains(self.number),
            shares=self.part,
            codec=spec(self._codec),
            feedback=self._codec is not None and self._codec.lossy_feedback and not self._rule.regauges,
            **more,
        )

    def largest_update(self, names: Iterable[str] = ()) -> int:
        """bytes: what no update of this round exceeds, from whoever of these it comes."""
        longest = max(names, key=lambda name: len(json.dumps(name)), default="")
        return Expected(
            longest, self.number + 1, self._base, self._layout(None, self.start), codec=self._codec
        ).max_bytes

    def _layout(self, rank: int | None, start: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        """Type and shape of what a participant of this rank is asked for; None is the common one."""
        if rank not in self._layouts:
            self._layouts[rank] = serialization.describe({n: start[n] for n in self._names})
        return self._layouts[rank]

    def accept(
        self,
        name: str,
        answer: bytes | Exception,
        *,
        num_examples: int | None = None,
        num_tokens: int | None = None,
        sent: int = 0,
    ) -> ParticipantRecord:
        """Uses one participant's answer, or records why it cannot be used.

        Args:
            name: Who was asked.
            answer: The update's bytes, or why there are none.
            num_examples: What the participant said it holds when it joined.
            num_tokens: Likewise, completion tokens.
            sent: bytes that went to it for this.

        Raises:
            DuplicateParticipantError: An answer of its own has been used already.
        """
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
            layout = self._layout(self._broadcast.rank_of(name), start)
            expected = Expected(name, self.number + 1, self._base, layout, num_examples, num_tokens, self._codec, start)
            with decoding("its update", UpdateRefusedError):
                update = Update.from_bytes(answer, expected)
                delta_norms, coordinates = self._distances(update, start)
                self._check_steps(update)
            self._take(name, update, coordinates)
            self._note(record, name, update, delta_norms, coordinates)
        except LLMChainFedError as error:
            record.status, record.reason = "refused", told_of(error)
        self.records[name] = record
        return record

    def _check_steps(self, update: Update) -> None:
        """Makes sure that a participant says it took no more steps than it was asked for, its own options allowed for.

        Raises:
            UpdateRefusedError: It does; FedNova would believe it.
        """
        steps = update.metrics.get("steps", 0.0)
        training = self._training(update.participant)
        asked = training.max_steps or update.num_examples * (training.epochs or 1)
        if not 0 <= steps <= _GENEROUS * asked or steps != int(steps):
            msg = (
                f"it says it took {steps:g} steps, asked for were some {asked}. In another process a participant's own "
                f"options may ask for {_GENEROUS} times as many: bring them, or the federation's, nearer to each other."
            )
            raise UpdateRefusedError(msg)

    def _take(self, name: str, update: Update, coordinates: Tensor) -> None:
        weight = float({"examples": update.num_examples, "tokens": update.num_tokens, "equal": 1}[self._weighting])
        steps = int(update.metrics["steps"]) if "steps" in update.metrics else None
        scaling = self._broadcast.scaling_of(name)
        given = Contribution(update.tensors, weight, steps, scaling)
        if self._capped is None:
            self._collector.add(given)
        else:
            check = getattr(self._collector, "check", None)  # before it is kept: later it could not be refused
            if check is not None:
                check(given)
        if scaling is not None:
            self._gap, self._comparable = None, False  # factors of different ranks have no mean
        if self._comparable:
            self._coordinates.add(name, coordinates)
        self._weights[name] = weight
        if self._capped is None:
            self._measure_gap(given)
        elif (light := self._capped.push(name, given)) is not None:
            self._add_late(*light)

    def _measure_gap(self, given: Contribution) -> None:
        if self._gap is not None:
            self._gap.add(given)

    def _add_late(self, name: str, given: Contribution) -> None:
        """One that was kept until its weight was known."""
        try:
            self._collector.add(given)
        except LLMChainFedError as error:
            self.records[name].status, self.records[name].reason = "refused", told_of(error)
            del self._weights[name]
        else:
            self._measure_gap(given)

    def _release(self) -> None:
        """Adds the updates that were kept, at weights of which none passes its share, and says so in their records."""
        if self._capped is None:
            return
        former, share = self._weights, self._capped.share
        total = math.fsum(former.values())
        self._weights = cut(former, share)
        new_total = math.fsum(self._weights.values())
        few = len(former) * share <= 1
        why = "as all do, for they are too few" if few else f"max_weight_share={share:g}"
        for name, given in self._capped.release(self._weights):
            self._add_late(name, given)
            was, now = former[name] / total, given.weight / new_total
            if abs(was - now) > _SEEN and (few or given.weight != former[name]):
                self.records[name].notes.append(f"its update weighs {now:.4g} of the round, not {was:.4g}: {why}")

    def refuse_twice(self, name: str) -> None:
        """Makes sure that no update of this participant is in yet; one that could not be used may come again.

        Raises:
            DuplicateParticipantError: There is one.
        """
        former = self.records.get(name)
        if former is not None and former.status == "trained":
            msg = f"participant {name!r} has already trained in this round. Call step() to close the round first."
            raise DuplicateParticipantError(msg)

    def _distances(self, update: Update, start: Mapping[str, Tensor]) -> tuple[dict[str, float], Tensor]:
        """L2 norm of local − global per tensor, and some of its coordinates.

        Raises:
            UpdateRefusedError: A distance is beyond `LARGEST_NORM`.
        """
        norms, coordinates = {}, []
        for key in self._names:  # one order for all: safetensors files come back in an order of their own
            delta = update.tensors[key].float() - start[key].float()
            norms[key] = norm = float(torch.linalg.vector_norm(delta))
            if not norm <= LARGEST_NORM:  # this way round NaN is wrong, too
                far = f"its distance from the global weights is {norm:.3g} in {key}"
                msg = f"{far}: beyond {LARGEST_NORM:.0e} no training ends, and sums are no longer finite."
                raise UpdateRefusedError(msg)
            coordinates.append(delta.reshape(-1)[:: self._stride])
        return norms, torch.cat(coordinates)

    def _note(
        self,
        record: ParticipantRecord,
        name: str,
        update: Update,
        delta_norms: Mapping[str, float],
        coordinates: Tensor,
    ) -> None:
        """Fills in the record, learning guards included."""
        norm = math.hypot(*delta_norms.values())
        record.status = "trained"
        record.examples, record.tokens = update.num_examples, update.num_tokens
        record.train_loss = update.metrics.get("train_loss")
        record.steps = int(update.metrics["steps"]) if "steps" in update.metrics else None
        record.seconds = update.metrics.get("seconds")
        record.update_norm = norm
        untouched = sorted(key for key, value in delta_norms.items() if value == 0)
        if norm == 0:
            record.notes.append("its update is zero: nothing was learnt")
        elif untouched:
            record.notes.append(f"{len(untouched)} tensors never changed, such as {untouched[0]}")
        # Every tensor's norm and a thousand coordinates, to the bit: what is equal in these was not trained apart.
        seen = coordinates.numpy().tobytes() + repr(list(delta_norms.values())).encode()
        twin = self._owners.setdefault(hashlib.blake2b(seen, digest_size=16).digest(), name)
        if twin != name and norm > 0:
            record.notes.append(f"its update equals {twin!r}'s: the same data or a copied answer")

    @property
    def trained(self) -> list[str]:
        """Whose updates are in."""
        return [name for name, record in self.records.items() if record.status == "trained"]

    def aggregate(self, quorum: int) -> Combined:
        """The combined values; fills in every record's cosine to the mean.

        Raises:
            QuorumError: Too few updates are in; every reason is listed.
        """
        trained = self.trained
        if len(trained) < max(1, quorum):
            reasons = {n: r.reason for n, r in self.records.items() if r.reason}
            raise too_few(self.number, len(trained), quorum, reasons, "usable updates")
        self.spent = True
        self._release()
        trained = self.trained
        combined = self._collector.combine()
        self._gap_found = combined.gap
        if self._comparable:
            total = math.fsum(self._weights.values())
            rows = (self._coordinates[n] * (self._weights[n] / total) for n in trained)
            mean = sum(rows, torch.zeros(()))
            for name in trained:
                self.records[name].cosine_to_mean = cosine(self._coordinates[name], mean)
        return combined

    def gap(self) -> float | None:
        """‖mean(BA) − B̄·Ā‖ / ‖mean(BA)‖; 0 where participants shared one factor, None where it means nothing."""
        if self.about.layout is None or self.about.layout.refused or not self._comparable:
            return None
        if self.part != "all":
            return None if self._rule.personal else 0.0
        return self._gap.value() if self._gap is not None else self._gap_found


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
