"""AggregationGap: how much averaging LoRA factors apart leaves out, measured in every round.

Knows factors. Knows nothing about which rule is in use: the gap says whether an exact one could matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmchain_fed.updates.aggregation.base import Contribution, LoraLayout
from llmchain_fed.updates.low_rank import Factors, as_shares, norms_of_mean

_KEPT = 16  # participants whose factors are kept for the exact figure
_COLUMNS = 32  # of the sketch that replaces them beyond


class AggregationGap:
    """‖mean(BA) − B̄·Ā‖ / ‖mean(BA)‖, Frobenius over all adapted layers, scaling included.

    Exact for up to 16 participants. Beyond, their factors would fill the memory, so both norms are estimated from
    M·Ω with 32 Gaussian columns Ω, whose expected squared norm is 32·‖M‖² (Halko, Martinsson, Tropp 2011): within a few
    per cent of the exact figure over many layers, some 12 per cent for a single one of rank 1.
    """

    def __init__(self, layout: LoraLayout) -> None:
        self._layout = layout
        self._kept: list[Contribution] = []
        self._sketch: _Sketch | None = None

    def add(self, given: Contribution) -> None:
        """One participant's factors, of the common rank."""
        if self._sketch is None and len(self._kept) == _KEPT:
            self._sketch = _Sketch(self._layout)
            for kept in self._kept:
                self._sketch.add(kept)
            self._kept = []
        if self._sketch is not None:
            self._sketch.add(given)
        else:
            self._kept.append(given)

    def value(self) -> float | None:
        """The gap; None where there is no update, or where all of them are zero."""
        if self._sketch is not None:
            return _ratio(*self._sketch.norms())
        if not self._kept:
            return None
        shares = as_shares([given.weight for given in self._kept])
        left_out, whole = [], []
        for layer in self._layout.layers:
            scaling = self._layout.scaling[layer]
            pairs = [self._layout.factors(given.tensors, layer) for given in self._kept]
            parts = [Factors(p.b.float(), p.a.float()) for p in pairs]
            both, apart = norms_of_mean(parts, shares)
            left_out.append(scaling * apart)
            whole.append(scaling * both)
        return _ratio(math.hypot(*left_out), math.hypot(*whole))


class _Sketch:
    """Sums from which both norms can be estimated, whatever the number of participants."""

    def __init__(self, layout: LoraLayout) -> None:
        self._layout = layout
        self._total = 0.0
        self._sums: dict[str, list[Tensor]] = {}
        self._columns: dict[int, Tensor] = {}

    def add(self, given: Contribution) -> None:
        self._total += given.weight
        for layer in self._layout.layers:
            pair = self._layout.factors(given.tensors, layer)
            b, a = pair.b.float(), pair.a.float()
            parts = [b @ (a @ self._gaussian(a.shape[1])), b, a]  # (m, 32), (m, r), (r, n)
            if layer not in self._sums:
                self._sums[layer] = [torch.zeros_like(part) for part in parts]
            for total, part in zip(self._sums[layer], parts, strict=True):
                total.add_(part, alpha=given.weight)

    def norms(self) -> tuple[float, float]:
        left_out, whole = [], []
        for layer, sums in self._sums.items():
            product, b, a = (part / self._total for part in sums)
            apart = b @ (a @ self._gaussian(a.shape[1]))
            scaling = self._layout.scaling[layer]
            left_out.append(scaling * float(torch.linalg.vector_norm(product - apart)))
            whole.append(scaling * float(torch.linalg.vector_norm(product)))
        return math.hypot(*left_out), math.hypot(*whole)

    def _gaussian(self, n: int) -> Tensor:
        """(n, 32), the same for every participant."""
        if n not in self._columns:
            self._columns[n] = torch.randn(n, _COLUMNS, generator=torch.Generator().manual_seed(n))
        return self._columns[n]


def _ratio(left_out: float, whole: float) -> float | None:
    found = left_out / whole if whole > 0 else math.nan
    return found if math.isfinite(found) else None
