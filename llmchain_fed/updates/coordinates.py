"""Coordinates: some of each update's values, kept until the round is over, and the angle between two of them.

Knows vectors by name. Knows nothing of what they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
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


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Between −1 and 1; None where one of them is zero."""
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return max(-1.0, min(1.0, float(a @ b) / norms)) if norms > 0 else None
