"""AggregationGap: how much averaging LoRA factors apart leaves out, measured in every round.

Knows factors, and which part of them a rule shares. The gap says whether an exact rule could matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.collection import Around, Collection, Combined, Contribution, Round
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.low_rank import Factors, as_shares, norms_of_mean

_KEPT = 16  # participants whose factors are kept for the exact figure
_COLUMNS = 32  # of the sketch that replaces them beyond


class Norms:
    """Both norms of the gap's fraction, layer by layer."""

    def __init__(self) -> None:
        self._whole: list[float] = []
        self._left_out: list[float] = []

    def add(self, parts: Sequence[Factors], shares: Sequence[float], scaling: float) -> None:
        """Takes in one layer: the participants' factors, and what each of them counts."""
        self.add_norms(*norms_of_mean(parts, shares), scaling)

    def add_norms(self, whole: float, left_out: float, scaling: float) -> None:
        """Takes in one layer's norms, of the mean product and of what averaging the factors apart leaves out of it."""
        self._whole.append(scaling * whole)
        self._left_out.append(scaling * left_out)

    def ratio(self) -> float | None:
        """The gap over the layers that were added; None where all of them are zero."""
        whole = math.hypot(*self._whole)
        found = math.hypot(*self._left_out) / whole if whole > 0 else math.nan
        return found if math.isfinite(found) else None


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
            return self._sketch.norms().ratio()
        shares, norms = as_shares([given.weight for given in self._kept]), Norms()
        for layer in self._layout.layers if self._kept else ():
            pairs = [self._layout.factors(given.tensors, layer) for given in self._kept]
            parts = [Factors(p.b.float(), p.a.float()) for p in pairs]
            norms.add(parts, shares, self._layout.scaling[layer])
        return norms.ratio()


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

    def norms(self) -> Norms:
        found = Norms()
        for layer, sums in self._sums.items():
            product, b, a = (part / self._total for part in sums)
            apart = product - b @ (a @ self._gaussian(a.shape[1]))
            whole, left_out = (float(torch.linalg.vector_norm(part)) for part in (product, apart))
            found.add_norms(whole, left_out, self._layout.scaling[layer])
        return found

    def _gaussian(self, n: int) -> Tensor:
        """(n, 32), the same for every participant."""
        if n not in self._columns:
            self._columns[n] = torch.randn(n, _COLUMNS, generator=torch.Generator().manual_seed(n))
        return self._columns[n]


class WithGap(Around):
    """A collection, and beside it the gap of what it is given."""

    def __init__(self, inner: Collection, rule: Rule, about: Round) -> None:
        super().__init__(inner)
        self._personal, self._part = rule.personal, rule.shares(about.number)
        self._plain = about.layout is not None and not about.layout.refused
        self._gap: AggregationGap | None = None
        self._measured: float | None = None
        if about.layout is not None and self._plain and self._part == "all" and not rule.keeps_updates:
            self._gap = AggregationGap(about.layout)

    def add(self, given: Contribution) -> None:
        """Hands it on, and measures it where ranks are one."""
        super().add(given)
        if given.scaling is not None:
            self._gap = None  # factors of different ranks have no mean
        elif self._gap is not None:
            self._gap.add(given)

    def finish(self) -> Combined:
        """What the inner one makes."""
        found = super().finish()
        said = getattr(found, "gap", None)  # what is no `Combined` at all is refused by the rule
        self._measured = said if isinstance(said, float) else None
        return found

    def gap(self) -> float | None:
        """The round's; 0 where participants shared one factor, None where it means nothing."""
        if not self._plain:
            return None
        if self._part != "all":
            return None if self._personal else 0.0
        return self._gap.value() if self._gap is not None and self._measured is None else self._measured
