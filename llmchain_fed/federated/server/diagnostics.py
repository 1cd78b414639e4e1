"""Diagnostics: what a round's records say of its updates, and which of them no training can have made.

Knows updates, where their participants started, and records. Knows nothing of rules or of how updates are combined.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmchain_fed.errors import UpdateRefusedError
from llmchain_fed.federated.history import ParticipantRecord
from llmchain_fed.updates.update import Update

LARGEST_NORM = 1e12
"""of one tensor's distance from the global weights: beyond it no training ends, and float32's squares near their end"""
_COORDINATES = 1024
Seen = tuple[dict[str, float], Tensor]
"""L2 norm of local − global per tensor, and some of the coordinates"""


class Diagnostics:
    """Looks at a round's updates one by one, and keeps some coordinates of each.

    The names of the shared tensors stand in one order for all: safetensors come back in an order of their own.
    """

    def __init__(self, start: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._names = names
        self._stride = max(1, math.ceil(sum(start[n].numel() for n in names) / _COORDINATES))
        self._coordinates = _Rows()
        self._owners: dict[bytes, str] = {}  # content of an update → who sent it first
        self._comparable = True

    def look(self, update: Update, start: Mapping[str, Tensor]) -> Seen:
        """L2 norm of local − global per tensor, and some of its coordinates.

        Raises:
            UpdateRefusedError: A distance is beyond `LARGEST_NORM`.
        """
        norms, coordinates = {}, []
        for key in self._names:
            delta = update.tensors[key].float() - start[key].float()
            norms[key] = norm = float(torch.linalg.vector_norm(delta))
            if not norm <= LARGEST_NORM:  # this way round NaN is wrong, too
                far = f"its distance from the global weights is {norm:.3g} in {key}"
                msg = f"{far}: beyond {LARGEST_NORM:.0e} no training ends, and sums are no longer finite."
                raise UpdateRefusedError(msg)
            coordinates.append(delta.reshape(-1)[:: self._stride])
        return norms, torch.cat(coordinates)

    def note(
        self, record: ParticipantRecord, name: str, norms: Mapping[str, float], coordinates: Tensor, *, own_rank: bool
    ) -> None:
        """Fills in what an accepted update's norms and coordinates say, as `look` found them, learning guards included.

        Factors of a rank of their own have no mean with the others' that they could be compared to.
        """
        norm = record.update_norm = math.hypot(*norms.values())
        untouched = sorted(key for key, value in norms.items() if value == 0)
        if norm == 0:
            record.notes.append("its update is zero: nothing was learnt")
        elif untouched:
            record.notes.append(f"{len(untouched)} tensors never changed, such as {untouched[0]}")
        # Every tensor's norm and a thousand coordinates, to the bit: what is equal in these was not trained apart.
        seen = coordinates.numpy().tobytes() + repr(list(norms.values())).encode()
        twin = self._owners.setdefault(hashlib.blake2b(seen, digest_size=16).digest(), name)
        if twin != name and norm > 0:
            record.notes.append(f"its update equals {twin!r}'s: the same data or a copied answer")
        self._comparable = self._comparable and not own_rank
        if self._comparable:
            self._coordinates.add(name, coordinates)

    def compare(self, records: Mapping[str, ParticipantRecord], weights: Mapping[str, float]) -> None:
        """Fills in the cosine to the mean by these weights for all whose updates are in, where all ranks are one."""
        if not self._comparable:
            return
        total = math.fsum(weights.values())
        mean = sum((self._coordinates[n] * (weights[n] / total) for n in records), torch.zeros(()))
        for name, record in records.items():
            record.cosine_to_mean = _cosine(self._coordinates[name], mean)


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
        """Copies one in."""
        row = len(self._index)
        if row % self._PER_BLOCK == 0:
            self._blocks.append(torch.empty(self._PER_BLOCK, len(values)))
        self._blocks[-1][row % self._PER_BLOCK] = values
        self._index[name] = row

    def __getitem__(self, name: str) -> Tensor:
        block, row = divmod(self._index[name], self._PER_BLOCK)
        return self._blocks[block][row]


def _cosine(a: Tensor, b: Tensor) -> float | None:
    """Between −1 and 1; None where one of them is zero."""
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return max(-1.0, min(1.0, float(a @ b) / norms)) if norms > 0 else None
