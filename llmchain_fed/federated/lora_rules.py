"""The LoRA rules that keep every participant's factors: FedEx, FLoRA and FlexLoRA, and FedSVD's refactoring.

Knows factors and their stacks. No (m, n) matrix is formed: the server holds the participants' factors and works layer
by layer. s_k is a participant's scaling, p_k = n_k/n, a bar the mean with these weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.federated.factors import Factors, as_shares, covariance, stack
from llmchain_fed.federated.rule import A, B, Combined, Contribution, LoraLayout, Round
from llmchain_fed.federated.running_mean import RunningMean


class _Kept:
    """Keeps every contribution until all are in, and gives its memory back layer by layer while they are combined."""

    def __init__(self, round_: Round) -> None:
        assert round_.layout is not None  # Rule.check has made sure
        self.round, self.layout = round_, round_.layout
        self._weights: list[float] = []
        self._scaling: list[Mapping[str, float]] = []
        self._tensors: dict[str, list[Tensor]] = {}
        self._one_rank = True
        self._left_out: list[float] = []
        self._whole: list[float] = []

    def add(self, given: Contribution) -> None:
        """Keeps it; a weight that is no share of anything is refused."""
        if not (math.isfinite(given.weight) and given.weight > 0):
            msg = f"an update's weight must be positive and finite, got {given.weight}. Use its number of examples."
            raise FederationError(msg)
        self._weights.append(given.weight)
        self._scaling.append(given.scaling or self.layout.scaling)
        self._one_rank = self._one_rank and given.scaling is None
        for name, tensor in given.tensors.items():
            # copies: the tensors of a message share one block, which could not be given back piece by piece
            self._tensors.setdefault(name, []).append(tensor.to(torch.float32, copy=True))

    def _layers(self) -> Iterator[tuple[str, list[Factors], Factors]]:
        """Layer, the participants' factors, and Σ p_k s_k B_k·A_k of rank Σ r_k; each is gone with the next."""
        if not self._weights:
            msg = "there is no update to combine."
            raise FederationError(msg)
        shares = as_shares(self._weights)
        for layer in self.layout.layers:
            pairs = zip(self._tensors.pop(f"{layer}.{B}"), self._tensors.pop(f"{layer}.{A}"), strict=True)
            parts = [Factors(b, a) for b, a in pairs]
            scaled = zip(parts, shares, self._scaling, strict=True)
            whole = stack([Factors(p.b * (share * scaling[layer]), p.a) for p, share, scaling in scaled])
            if self._one_rank:
                self._whole.append(whole.norm())
                self._left_out.append(self.layout.scaling[layer] * covariance(parts, shares).norm())
            yield layer, parts, whole

    def _fresh(self, layer: str, shape: torch.Size) -> Tensor:
        """(r, n) as PEFT starts A: Kaiming uniform with a = √5; of this round and layer."""
        generator = torch.Generator().manual_seed(self.round.seed_for(layer))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def _gap(self) -> float | None:
        """‖mean(BA) − B̄·Ā‖ / ‖mean(BA)‖ over the layers seen; None where ranks differ."""
        whole = math.hypot(*self._whole) if self._one_rank else 0.0
        return math.hypot(*self._left_out) / whole if whole > 0 else None


class FedEx(_Kept):
    """A ← Ā, B ← B̄, and what that leaves out, s·(mean(BA) − B̄·Ā), goes to the frozen remainder (arXiv 2410.09432)."""

    def combine(self) -> Combined:
        """The mean factors, and the remainder's increment of rank (K−1)·r per layer."""
        shares = as_shares(self._weights or [1.0])
        values: dict[str, Tensor] = {}
        remainder: dict[str, Factors] = {}
        for layer, parts, _ in self._layers():
            mean = RunningMean()
            for part, weight in zip(parts, self._weights, strict=True):
                mean.add({B: part.b, A: part.a}, weight)
            values |= {f"{layer}.{name}": tensor for name, tensor in mean.result().items()}
            left_out = covariance(parts, shares)
            if left_out.rank:
                remainder[layer] = Factors(left_out.b * self.layout.scaling[layer], left_out.a)
        return Combined({n: t.to(self.round.state[n].dtype) for n, t in values.items()}, remainder, self._gap())


class FLoRA(_Kept):
    """The stack Σ p_k s_k B_k·A_k goes to the frozen remainder, and LoRA starts anew (arXiv 2409.05976)."""

    def combine(self) -> Combined:
        """A fresh random A, a zero B, and the stack of rank Σ r_k per layer."""
        values, remainder = {}, {}
        for layer, _, whole in self._layers():
            pair = self.layout.factors(self.round.state, layer)
            fresh = self._fresh(layer, pair.a.shape)
            values[f"{layer}.{A}"], values[f"{layer}.{B}"] = fresh.to(pair.a.dtype), torch.zeros_like(pair.b)
            remainder[layer] = whole
        return Combined(values, remainder, self._gap())


class FlexLoRA(_Kept):
    """The stack's best approximation of the adapter's rank, by SVD (arXiv 2402.11505).

    Exact where that rank holds the stack; else the nearest there is, at a distance of √(Σ of the squared singular
    values left out).
    """

    def combine(self) -> Combined:
        """B = U·S/s and A = Vᵀ, cut to the adapter's rank."""
        values = {}
        for layer, _, whole in self._layers():
            pair = self.layout.factors(self.round.state, layer)
            best = whole.truncated(pair.rank)
            if whole.rank < pair.rank:  # columns of B and rows of A that are both zero would never learn again
                best.a[whole.rank :] = self._fresh(layer, pair.a.shape)[whole.rank :]
            values[f"{layer}.{A}"] = best.a.to(pair.a.dtype)
            values[f"{layer}.{B}"] = (best.b / self.layout.scaling[layer]).to(pair.b.dtype)
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
