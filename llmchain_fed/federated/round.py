"""OpenRound: one round in progress. Takes answers as they arrive, checks them, combines them.

Knows updates and the aggregation rule. Knows nothing about who is asked, how bytes travel, or evaluation. Until its
result is loaded, a round has changed nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

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
from llmchain_fed.federated.aggregation import Aggregation, Weighting
from llmchain_fed.federated.history import ParticipantRecord
from llmchain_fed.federated.update import Expected, Update

_COORDINATES = 1024


class OpenRound:
    """Collects a round's updates.

    Args:
        number: Which round; an update of another one is refused.
        state: The global trainable weights that are broadcast.
        base: Fingerprint of the base weights.
        aggregation: The server rule.
        weighting: What an update counts by.
        seconds: After which a participant gives up training; None is never.
    """

    def __init__(
        self,
        number: int,
        state: Mapping[str, Tensor],
        base: str,
        aggregation: Aggregation,
        weighting: Weighting,
        seconds: float | None = None,
    ) -> None:
        self.number = number
        self.state = state
        self.payload = wire.pack(state, {"kind": "task", "round": number, "base": base, "seconds": seconds})
        self.records: dict[str, ParticipantRecord] = {}
        self._base, self._weighting = base, weighting
        self._layout = wire.describe(state)
        self._accumulator = aggregation.start(state)
        total = sum(t.numel() for t in state.values())
        self._stride = max(1, math.ceil(total / _COORDINATES))
        self._coordinates = _Rows()
        self._owners: dict[bytes, str] = {}  # content of an update → who sent it first

    def accept(
        self,
        name: str,
        answer: bytes | Exception,
        *,
        num_examples: int | None = None,
        num_tokens: int | None = None,
        sent: int = 1,
    ) -> ParticipantRecord:
        """Uses one participant's answer, or records why it cannot be used.

        Args:
            name: Who was asked.
            answer: The update's bytes, or why there are none.
            num_examples: What the participant said it holds when it joined.
            num_tokens: Likewise, completion tokens.
            sent: How often the weights went to it: more than once where it was asked again, 0 where it was not reached.

        Raises:
            DuplicateParticipantError: It has answered in this round already.
        """
        self.refuse_twice(name)
        record = ParticipantRecord(bytes_down=sent * len(self.payload))
        if isinstance(answer, Exception):
            late, absent = isinstance(answer, DeadlineError), isinstance(answer, TransportError)
            record.status = "late" if late else "absent" if absent else "failed"
            record.reason = f"{type(answer).__name__}: {answer}"
            self.records[name] = record
            return record
        record.bytes_up = len(answer)
        try:
            expected = Expected(name, self.number, self._base, self._layout, num_examples, num_tokens)
            update = Update.from_bytes(answer, expected)
            delta_norms, coordinates = self._distances(update)
            self._accumulator.add(update.tensors, self._weight(update))
            self._coordinates.add(name, coordinates)
            self._note(record, name, answer, update, delta_norms)
        except LLMChainFedError as error:
            record.status, record.reason = "refused", f"{type(error).__name__}: {error}"
        self.records[name] = record
        return record

    def refuse_twice(self, name: str) -> None:
        """Makes sure that this participant has not answered yet.

        Raises:
            DuplicateParticipantError: It has.
        """
        if name in self.records:
            msg = f"participant {name!r} has already trained in this round. Call step() to close the round first."
            raise DuplicateParticipantError(msg)

    def _weight(self, update: Update) -> float:
        return {"examples": update.num_examples, "tokens": update.num_tokens, "equal": 1}[self._weighting]

    def _distances(self, update: Update) -> tuple[dict[str, float], Tensor]:
        """L2 norm of local − global per tensor, and some of its coordinates.

        Raises:
            UpdateRefusedError: The distance overflows.
        """
        norms, coordinates = {}, []
        for key in self.state:  # one order for all: safetensors files come back in an order of their own
            delta = update.tensors[key].float() - self.state[key].float()
            norms[key] = float(torch.linalg.vector_norm(delta))
            coordinates.append(delta.reshape(-1)[:: self._stride])
        if not math.isfinite(math.hypot(*norms.values())):
            msg = "its distance from the global weights is not finite."
            raise UpdateRefusedError(msg)
        return norms, torch.cat(coordinates)

    def _note(
        self, record: ParticipantRecord, name: str, data: bytes, update: Update, delta_norms: Mapping[str, float]
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
        start = 8 + int.from_bytes(data[:8], "little")
        digest = hashlib.blake2b(memoryview(data)[start:], digest_size=16).digest()
        twin = self._owners.setdefault(digest, name)
        if twin != name and norm > 0:
            record.notes.append(f"its update equals {twin!r}'s: the same data or a copied answer")

    @property
    def trained(self) -> list[str]:
        """Whose updates are in."""
        return [name for name, record in self.records.items() if record.status == "trained"]

    def aggregate(self, quorum: int) -> dict[str, Tensor]:
        """The combined values; fills in every record's cosine to the mean.

        Raises:
            QuorumError: Too few updates are in; every reason is listed.
        """
        trained = self.trained
        if len(trained) < max(1, quorum):
            reasons = {n: r.reason for n, r in self.records.items() if r.reason}
            raise too_few(self.number, len(trained), quorum, reasons, "usable updates")
        combined = self._accumulator.result()
        mean = torch.cat(
            [(combined[k].float() - v.float()).reshape(-1)[:: self._stride] for k, v in self.state.items()]
        )
        for name in trained:
            self.records[name].cosine_to_mean = _cosine(self._coordinates[name], mean)
        return combined


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
