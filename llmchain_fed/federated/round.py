"""OpenRound: one round in progress. Takes answers as they arrive, checks them, combines them.

Knows updates and the aggregation rule. Knows nothing about who is asked, how bytes travel, or evaluation. Until its
result is loaded, a round has changed nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
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
from llmchain_fed.federated import wire
from llmchain_fed.federated.aggregation import Weighting
from llmchain_fed.federated.broadcast import Broadcast
from llmchain_fed.federated.codecs import Codec, spec
from llmchain_fed.federated.gap import AggregationGap
from llmchain_fed.federated.history import ParticipantRecord
from llmchain_fed.federated.rule import Combined, Contribution, Round, Rule, selected
from llmchain_fed.federated.update import Expected, Update
from llmchain_fed.federated.wire import TensorInfo
from llmchain_fed.training import TrainingConfig

_COORDINATES = 1024
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
        training: How participants were told to train.
    """

    def __init__(
        self,
        about: Round,
        broadcast: Broadcast,
        base: str,
        rule: Rule,
        weighting: Weighting,
        codec: Codec | None,
        training: TrainingConfig,
    ) -> None:
        self._training = training
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
        self._coordinates = _Rows()
        self._weights: dict[str, float] = {}
        self._owners: dict[bytes, str] = {}  # content of an update → who sent it first

    @property
    def header(self) -> dict[str, Any]:
        """What a participant is told to do."""
        return {
            "kind": "task",
            "round": self.number,
            "base": self._base,
            "trains": self._rule.trains(self.number),
            "shares": self.part,
            "codec": spec(self._codec),
            "feedback": self._codec is not None and self._codec.lossy_feedback and not self._rule.regauges,
        }

    def largest_update(self) -> int:
        """bytes: what no update of this round exceeds."""
        return Expected("", 0, "", self._layout(self.start), codec=self._codec).max_bytes

    def _layout(self, start: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        return wire.describe({n: start[n] for n in self._names})

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
            record.reason = f"{type(answer).__name__}: {answer}"
            self.records[name] = record
            return record
        record.bytes_up += len(answer)
        try:
            start = self._broadcast.state_for(name)
            layout = self._layout(start)
            expected = Expected(name, self.number, self._base, layout, num_examples, num_tokens, self._codec, start)
            update = Update.from_bytes(answer, expected)
            delta_norms, coordinates = self._distances(update, start)
            self._check_steps(update)
            self._take(name, update, coordinates)
            self._note(record, name, update, delta_norms, coordinates)
        except LLMChainFedError as error:
            record.status, record.reason = "refused", f"{type(error).__name__}: {error}"
        self.records[name] = record
        return record

    def _check_steps(self, update: Update) -> None:
        """Makes sure that a participant says it took no more steps than it was asked for, its own options allowed for.

        Raises:
            UpdateRefusedError: It does; FedNova would believe it.
        """
        steps = update.metrics.get("steps", 0.0)
        asked = self._training.max_steps or update.num_examples * (self._training.epochs or 1)
        if not 0 <= steps <= _GENEROUS * asked or steps != int(steps):
            msg = f"it says it took {steps:g} steps, asked for were some {asked}."
            raise UpdateRefusedError(msg)

    def _take(self, name: str, update: Update, coordinates: Tensor) -> None:
        weight = float({"examples": update.num_examples, "tokens": update.num_tokens, "equal": 1}[self._weighting])
        steps = int(update.metrics["steps"]) if "steps" in update.metrics else None
        scaling = self._broadcast.scaling_of(name)
        given = Contribution(update.tensors, weight, steps, scaling)
        self._collector.add(given)
        if scaling is not None:
            self._gap, self._comparable = None, False  # factors of different ranks have no mean
        if self._gap is not None:
            self._gap.add(given)
        if self._comparable:
            self._coordinates.add(name, coordinates)
        self._weights[name] = weight

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
            UpdateRefusedError: The distance overflows.
        """
        norms, coordinates = {}, []
        for key in self._names:  # one order for all: safetensors files come back in an order of their own
            delta = update.tensors[key].float() - start[key].float()
            norms[key] = float(torch.linalg.vector_norm(delta))
            coordinates.append(delta.reshape(-1)[:: self._stride])
        if not math.isfinite(math.hypot(*norms.values())):
            msg = "its distance from the global weights is not finite."
            raise UpdateRefusedError(msg)
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
        combined = self._collector.combine()
        self._gap_found = combined.gap
        if self._comparable:
            total = math.fsum(self._weights.values())
            rows = (self._coordinates[n] * (self._weights[n] / total) for n in trained)
            mean = sum(rows, torch.zeros(()))
            for name in trained:
                self.records[name].cosine_to_mean = _cosine(self._coordinates[name], mean)
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
    listed = "; ".join(f"{n}: {r}" for n, r in reasons.items()) or "nobody answered"
    return QuorumError(
        f"round {number + 1} has {count} {what}, the quorum is {max(1, quorum)} ({listed}). The weights are as before; "
        "mend the participants or lower the quorum."
    )


class _Rows:
    """Equally long vectors by name, in few large blocks.

    A small tensor each would outlive the large ones around it and pin the memory they leave: with 1,000 participants
    that cost more than all that is really kept.
    """

    _PER_BLOCK = 256

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._index: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        row = len(self._index)
        if row % self._PER_BLOCK == 0:
            self._blocks.append(torch.empty(self._PER_BLOCK, len(values)))
        self._blocks[-1][row % self._PER_BLOCK] = values
        self._index[name] = row

    def __getitem__(self, name: str) -> Tensor:
        block, row = divmod(self._index[name], self._PER_BLOCK)
        return self._blocks[block][row]


def _cosine(a: Tensor, b: Tensor) -> float | None:
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return max(-1.0, min(1.0, float(a @ b) / norms)) if norms > 0 else None
