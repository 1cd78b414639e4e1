"""Factors: a matrix kept as the product of two thin ones, B·A, and the algebra that never multiplies them out.

Knows linear algebra. Knows nothing about adapters, participants or rounds.

Notation: B is (m, R), A is (R, n), their product (m, n) is what they stand for. Sums of products are stacks:
[B₁ B₂] · [A₁; A₂] = B₁A₁ + B₂A₂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not in its __all__

from llmchain_fed.errors import UpdateRefusedError

_NARROW = 128  # ranks up to here are worked on in float64


@dataclass(frozen=True)
class Factors:
    """B (m, R) and A (R, n) in place of their product (m, n)."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """R, which bounds the product's rank."""
        return int(self.a.shape[0])

    @property
    def full_rank(self) -> int:
        """min(m, n): from here on factors contain nothing that fewer could not."""
        return min(self.b.shape[0], self.a.shape[1])

    def until(self, rank: int) -> Factors:
        """The first so many columns and rows."""
        return Factors(self.b[:, :rank], self.a[:rank])

    def beyond(self, rank: int) -> Factors:
        """Without the first so many columns and rows."""
        return Factors(self.b[:, rank:], self.a[rank:])

    def norm(self) -> float:
        """‖B·A‖ (Frobenius) = √tr(BᵀB · AAᵀ)."""
        return math.sqrt(max(float(self.gram().sum()), 0.0))

    def gram(self) -> Tensor:
        """(R, R), float64: entry (i, j) is the inner product of bᵢ·aᵢ and bⱼ·aⱼ, whose sum over i is B·A.

        That is BᵀB ∘ AAᵀ, and the sum over any block is the inner product of the two partial sums.
        """
        kind = self._precise
        b, a = self.b.to(kind), self.a.to(kind)
        return (b.T @ b).double() * (a @ a.T).double()

    @property
    def _precise(self) -> torch.dtype:
        """float64 where that costs nothing; wide stacks in float32, as the factors themselves."""
        return torch.float64 if self.rank <= _NARROW else torch.float32

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), S (k,) in falling order and Vᵀ (k, n) of B·A, with k = min(m, n, R).

        B = Q₁R₁ and Aᵀ = Q₂R₂ give B·A = Q₁ (R₁R₂ᵀ) Q₂ᵀ; only the small middle is decomposed.

        Raises:
            UpdateRefusedError: LAPACK cannot: values so large that they overflow, or no convergence.
        """
        try:
            q_b, r_b = torch.linalg.qr(self.b.to(self._precise))
            q_a, r_a = torch.linalg.qr(self.a.to(self._precise).T)
            u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        except LinAlgError as error:
            msg = f"factors of rank {self.rank} cannot be decomposed ({str(error)[:100]})."
            raise UpdateRefusedError(msg) from None
        return q_b @ u, s, vt @ q_a.T

    def truncated(self, rank: int) -> Factors:
        """The nearest product of this rank (Eckart and Young 1936): B = U·S, A = Vᵀ with orthonormal rows.

        Its distance is √(Σ of the squared singular values left out). Rows and columns that a smaller product does not
        need are zero, so the shapes are always (m, rank) and (rank, n).

        >>> both = Factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2))
        >>> nearest = both.truncated(1)
        >>> nearest.b @ nearest.a
        tensor([[3., 0.],
                [0., 0.]])
        """
        u, s, vt = self.svd()
        kept = min(rank, len(s))
        b = self.b.new_zeros(self.b.shape[0], rank)
        a = self.a.new_zeros(rank, self.a.shape[1])
        b[:, :kept] = (u[:, :kept] * s[:kept]).to(b.dtype)
        a[:kept] = vt[:kept].to(a.dtype)
        return Factors(b, a)

    def compacted(self) -> Factors:
        """The same product with at most min(m, n) columns and rows."""
        return self if self.rank <= self.full_rank else self.truncated(self.full_rank)


def stack(parts: Sequence[Factors]) -> Factors:
    """The sum of the products, as one pair of factors of the summed ranks."""
    return Factors(torch.cat([p.b for p in parts], dim=1), torch.cat([p.a for p in parts], dim=0))


class Stack:
    """A stack that grows: one block for B and one for A, so that putting parts side by side copies each of them once.

    Parts kept one by one leave holes behind that the whole, which is larger, does not fit: both would be in memory.

    Args:
        capacity: Rank to make room for; more is taken in all the same, by moving to larger blocks.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self._b = self._a = torch.empty(0, 0)
        self.ranks: list[int] = []
        """of the parts, in their order"""

    def append(self, part: Factors) -> None:
        """Copies one part in, as float32."""
        begin = sum(self.ranks)
        end = begin + part.rank
        if not self.ranks or end > self._a.shape[0]:
            room = max(self._capacity, end, 2 * begin)
            # float32 whatever torch's default: a rule must not compute otherwise because of a setting elsewhere
            b, a = (torch.empty(s, dtype=torch.float32) for s in ((len(part.b), room), (room, part.a.shape[1])))
            if begin:
                b[:, :begin], a[:begin] = self._b[:, :begin], self._a[:begin]
            self._b, self._a = b, a
        self._b[:, begin:end], self._a[begin:end] = part.b, part.a
        self.ranks.append(part.rank)

    def factors(self) -> Factors:
        """All of it, as views."""
        rank = sum(self.ranks)
        return Factors(self._b[:, :rank], self._a[:rank])

    def parts(self) -> list[Factors]:
        """What was appended, as views."""
        whole = self.factors()
        pairs = zip(torch.split(whole.b, self.ranks, dim=1), torch.split(whole.a, self.ranks), strict=True)
        return [Factors(b, a) for b, a in pairs]

    def scale(self, factors: Sequence[float]) -> Factors:
        """The sum of the products times a factor each, made of the stack itself."""
        whole = self.factors()
        scales = torch.tensor(factors, dtype=torch.float32)
        whole.b.mul_(scales.repeat_interleave(torch.tensor(self.ranks)))
        return whole

    def centre(self, shares: Sequence[float], scaling: float = 1.0) -> Factors:
        """`covariance` of the parts times a scaling, made of the stack itself."""
        *parts, last = self.parts()
        mean = _mean([p.b for p in [*parts, last]], shares)
        for part, share in zip(parts, shares, strict=False):
            part.b.sub_(mean).mul_(share).mul_(scaling)
            part.a.sub_(last.a)
        whole, rank = self.factors(), sum(self.ranks[:-1])
        return Factors(whole.b[:, :rank], whole.a[:rank])


def covariance(parts: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Σ p_k B_k·A_k − (Σ p_k B_k)·(Σ p_k A_k), what averaging the factors apart leaves out, with rank (K−1)·r.

    It is Σ p_k (B_k − B̄)(A_k − Ā), and because the differences from a mean sum to zero, also
    Σ_{k<K} p_k (B_k − B̄)(A_k − A_K): one participant's rank less (arXiv 2410.09432 counts K·r).

    The factors are all of one rank, and the shares p_k sum to 1.
    """
    mean, last = _mean([p.b for p in parts], shares), parts[-1].a
    pairs = list(zip(parts, shares, strict=True))[:-1]
    if not pairs:
        return Factors(last.new_zeros(parts[-1].b.shape[0], 0), last[:0])
    return stack([Factors((p.b - mean) * share, p.a - last) for p, share in pairs])


def norms_of_mean(parts: Sequence[Factors], shares: Sequence[float]) -> tuple[float, float]:
    """‖Σ p_k B_k·A_k‖ and ‖Σ p_k B_k·A_k − B̄·Ā‖ (Frobenius), from one pair of (K·r, K·r) matrices.

    The first is the stack of `covariance` and B̄·Ā, so what the second needs is a corner of what the first needs.
    """
    apart = covariance(parts, shares)
    means = (_mean([p.b for p in parts], shares), _mean([p.a for p in parts], shares))
    both = stack([apart, Factors(*means)])
    found, corner = both.gram(), slice(apart.rank)
    return math.sqrt(max(float(found.sum()), 0.0)), math.sqrt(max(float(found[corner, corner].sum()), 0.0))


def _mean(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return sum((p * share for p, share in zip(parts[1:], shares[1:], strict=True)), parts[0] * shares[0])


def as_shares(weights: Sequence[float]) -> list[float]:
    """p_k = n_k / n.

    >>> as_shares([1, 3])
    [0.25, 0.75]
    """
    total = math.fsum(weights)
    return [weight / total for weight in weights]
