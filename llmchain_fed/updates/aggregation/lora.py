"""The LoRA rules that keep every participant's factors: FedEx, FLoRA and FlexLoRA, and FedSVD's refactoring.

Knows factors and their stacks. No (m, n) matrix is formed: the server keeps the participants' factors and works layer
by layer. s_k is a participant's scaling, p_k = n_k/n, a bar the mean with these weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.updates.aggregation.gap import Norms
from llmchain_fed.updates.aggregation.mean import RunningMean
from llmchain_fed.updates.collection import Collection, Combined, Contribution, Round
from llmchain_fed.updates.lora_layout import A, B, LoraLayout
from llmchain_fed.updates.low_rank import Stack, as_shares


class _Kept(Collection):
    """Keeps every contribution until all are in, and gives its memory back layer by layer while they are combined."""

    def zero(self, about: Round) -> None:
        """Begins a round of LoRA factors."""
        assert about.layout is not None  # Rule.check has made sure
        self.round, self.layout = about, about.layout
        self._weights: list[float] = []
        self._scaling: list[Mapping[str, float]] = []
        self._stacks: dict[str, Stack] = {}
        self._norms: Norms | None = Norms()

    def add(self, given: Contribution) -> None:
        """Keeps it."""
        self._weights.append(given.weight)
        self._scaling.append(given.scaling or self.layout.scaling)
        if given.scaling is not None:
            self._norms = None  # factors of different ranks have no mean
        for layer in self.layout.layers:
            if layer not in self._stacks:
                rank = self.layout.factors(self.round.state, layer).rank
                self._stacks[layer] = Stack(rank * self.round.expected)
            self._stacks[layer].append(self.layout.factors(given.tensors, layer))

    def _layers(self) -> Iterator[tuple[str, Stack, list[float]]]:
        """Layer, the participants' factors, and their p_k s_k; each is gone with the next."""
        if not self._weights:
            msg = "there is no update to combine."
            raise FederationError(msg)
        shares = as_shares(self._weights)
        for layer in self.layout.layers:
            found = self._stacks.pop(layer)
            scales = [share * scaling[layer] for share, scaling in zip(shares, self._scaling, strict=True)]
            if self._norms is not None:
                self._norms.add(found.parts(), shares, self.layout.scaling[layer])
            yield layer, found, scales

    def _room(self) -> dict[str, Tensor]:
        """Zeros for the new factors, made before anything temporary: small tensors in between would pin its memory."""
        names = [f"{layer}.{part}" for layer in self.layout.layers for part in (A, B)]
        return {name: torch.zeros_like(self.round.state[name]) for name in names}

    def _fresh(self, layer: str, shape: torch.Size) -> Tensor:
        """(r, n) as PEFT starts A: Kaiming uniform with a = √5; of this round and layer."""
        generator = torch.Generator().manual_seed(self.round.seed_for(layer))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    def _gap(self) -> float | None:
        """Over the layers seen; None where ranks differ."""
        return self._norms.ratio() if self._norms is not None else None


class FedEx(_Kept):
    """A ← Ā, B ← B̄, and what that leaves out, s·(mean(BA) − B̄·Ā), goes to the frozen remainder (arXiv 2410.09432)."""

    def finish(self) -> Combined:
        """The mean factors, and the remainder's increment of rank (K−1)·r per layer."""
        shares = as_shares(self._weights or [1.0])
        values, remainder = self._room(), {}
        for layer, parts, _ in self._layers():
            mean = RunningMean()
            for part, weight in zip(parts.parts(), self._weights, strict=True):
                mean.add(Contribution({B: part.b, A: part.a}, weight))
            for name, tensor in mean.finish().values.items():
                values[f"{layer}.{name}"].copy_(tensor)
            left_out = parts.centre(shares, self.layout.scaling[layer])
            if left_out.rank:
                remainder[layer] = left_out
        return Combined(values, remainder, self._gap())


class FLoRA(_Kept):
    """The stack Σ p_k s_k B_k·A_k goes to the frozen remainder, and LoRA starts anew (arXiv 2409.05976)."""

    def finish(self) -> Combined:
        """A fresh random A, a zero B, and the stack of rank Σ r_k per layer."""
        values, remainder = self._room(), {}
        for layer, parts, scales in self._layers():
            new = values[f"{layer}.{A}"]
            new.copy_(self._fresh(layer, new.shape))
            remainder[layer] = parts.scale(scales)
        return Combined(values, remainder, self._gap())


class FlexLoRA(_Kept):
    """The stack's best approximation of the adapter's rank, by SVD (arXiv 2402.11505).

    Exact where that rank reaches the stack's; else the nearest there is, at a distance of √(Σ of the squared singular
    values left out).
    """

    def finish(self) -> Combined:
        """B = U·S/s and A = Vᵀ, cut to the adapter's rank."""
        values = self._room()
        for layer, parts, scales in self._layers():
            new, whole = self.layout.factors(values, layer), parts.scale(scales)
            best = whole.truncated(new.rank)
            if whole.rank < new.rank:  # columns of B and rows of A that are both zero would never learn again
                best.a[whole.rank :] = self._fresh(layer, new.a.shape)[whole.rank :]
            new.a.copy_(best.a)
            new.b.copy_(best.b / self.layout.scaling[layer])
        return Combined(values, gap=self._gap())


def orthonormal(state: dict[str, Tensor], layout: LoraLayout) -> dict[str, Tensor]:
    """FedSVD's step: B·A = U·S·Vᵀ → A ← Vᵀ, B ← U·S; the same product, A's rows orthonormal (arXiv 2505.12805)."""
    found = dict(state)
    for layer in layout.layers:
        pair = layout.factors(state, layer)
        if not bool(pair.b.any()):
            continue  # nothing learnt yet: a product of zeros has no directions to take
        same = pair.truncated(pair.rank)
        found[f"{layer}.{A}"], found[f"{layer}.{B}"] = same.a.to(pair.a.dtype), same.b.to(pair.b.dtype)
    return found
