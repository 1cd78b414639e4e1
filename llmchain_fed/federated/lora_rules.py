"""The LoRA rules that keep every participant's factors: FedEx, FLoRA and FlexLoRA, and FedSVD's refactoring.

Knows factors and their stacks. No (m, n) matrix is formed: the server holds the participants' factors and works layer
by layer. s_k is a participant's scaling, p_k = n_k/n, a bar the mean with these weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.federated.factors import Factors, as_shares, covariance, stack
from llmchain_fed.federated.rule import A, B, Combined, Contribution, LoraLayout, Round
from llmchain_fed.federated.running_mean import RunningMean


class _Kept:
    """Keeps every contribution until all are in."""

    def __init__(self, round_: Round) -> None:
        assert round_.layout is not None  # Rule.check has made sure
        self.round, self.layout = round_, round_.layout
        self.given: list[Contribution] = []

    def add(self, given: Contribution) -> None:
        """Keeps it; a weight that is no share of anything is refused."""
        if not (math.isfinite(given.weight) and given.weight > 0):
            msg = f"an update's weight must be positive and finite, got {given.weight}. Use its number of examples."
            raise FederationError(msg)
        self.given.append(given)

    @property
    def shares(self) -> list[float]:
        """p_k, in the order of arrival."""
        if not self.given:
            msg = "there is no update to combine."
            raise FederationError(msg)
        return as_shares([g.weight for g in self.given])

    def stacked(self, layer: str) -> Factors:
        """Σ p_k s_k B_k·A_k of one layer, of rank Σ r_k."""
        parts = []
        for given, share in zip(self.given, self.shares, strict=True):
            scaling = (given.scaling or self.layout.scaling)[layer]
            pair = self.layout.factors(given.tensors, layer)
            parts.append(Factors(pair.b.float() * (share * scaling), pair.a.float()))
        return stack(parts)


class FedEx(_Kept):
    """A ← Ā, B ← B̄, and what that leaves out, s·(mean(BA) − B̄·Ā), goes to the frozen remainder (arXiv 2410.09432)."""

    def combine(self) -> Combined:
        """The mean factors, and the remainder's increment of rank (K−1)·r per layer."""
        shares = self.shares
        mean = RunningMean()
        for given in self.given:
            mean.add(given.tensors, given.weight)
        remainder = {}
        for layer in self.layout.layers if len(self.given) > 1 else []:
            parts = [self.layout.factors(g.tensors, layer) for g in self.given]
            left_out = covariance([Factors(p.b.float(), p.a.float()) for p in parts], shares)
            remainder[layer] = Factors(left_out.b * self.layout.scaling[layer], left_out.a)
        return Combined(mean.result(), remainder)


class FLoRA(_Kept):
    """The stack Σ p_k s_k B_k·A_k goes to the frozen remainder, and LoRA starts anew (arXiv 2409.05976)."""

    def combine(self) -> Combined:
        """A fresh random A, a zero B, and the stack of rank Σ r_k per layer."""
        values = {}
        for layer in self.layout.layers:
            pair = self.layout.factors(self.round.state, layer)
            generator = torch.Generator().manual_seed(self.round.seed_for(layer))
            bound = 1 / math.sqrt(pair.a.shape[1])  # PEFT's own start: Kaiming uniform with a = √5
            fresh = torch.empty(pair.a.shape).uniform_(-bound, bound, generator=generator)
            values[f"{layer}.{A}"], values[f"{layer}.{B}"] = fresh.to(pair.a.dtype), torch.zeros_like(pair.b)
        return Combined(values, {layer: self.stacked(layer) for layer in self.layout.layers})


class FlexLoRA(_Kept):
    """The stack's best approximation of the adapter's rank, by SVD (arXiv 2402.11505).

    Exact where that rank holds the stack; else the nearest there is, at a distance of √(Σ of the squared singular
    values left out).
    """

    def combine(self) -> Combined:
        """B = U·S/s and A = Vᵀ, cut to the adapter's rank; A keeps the rows that a smaller stack does not need.

        Their columns of B are zero, so they say nothing; were the rows zero too, neither would ever get a gradient.
        """
        values = {}
        for layer in self.layout.layers:
            pair, stacked = self.layout.factors(self.round.state, layer), self.stacked(layer)
            best, needed = stacked.truncated(pair.rank), min(stacked.rank, stacked.full_rank)
            values[f"{layer}.{A}"] = torch.cat([best.a[:needed].to(pair.a.dtype), pair.a[needed:]])
            values[f"{layer}.{B}"] = (best.b / self.layout.scaling[layer]).to(pair.b.dtype)
        return Combined(values)


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
