"""The paired bootstrap: how far a difference between two arms may be chance.

Knows tensors of differences. Knows nothing about arms.

Seeds and participants are crossed: every participant is measured under every seed. So both are drawn anew, with
replacement and each for itself, and the statistic is computed over their grid (the pigeonhole bootstrap, Owen 2007,
arXiv 0712.1111; it errs towards intervals that are too wide; cells that count as independent err the other way).
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000
COVERAGE = 0.95


def interval(
    differences: Tensor, weights: Tensor | None = None, *, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The percentile interval of the mean difference; None where there is nothing to draw from.

    Args:
        differences: `(seeds, participants)`, each participant's difference on its own texts; with `weights`
            `(seeds, participants, participants)`: of each participant's model (2nd) on each participant's texts (3rd).
        weights: `(participants,)`: what each participant's texts count in the pool.
        resamples: How often seeds and participants are drawn.
    """
    seeds, people = differences.shape[:2]
    if seeds * people < 2:
        return None
    draw = torch.Generator().manual_seed(0)  # its own: the user's random numbers stay where they are
    s = _counts(seeds, resamples, draw) / seeds  # (resamples, seeds)
    p = _counts(people, resamples, draw) / people
    differences = differences.double()
    if weights is None:
        means = torch.einsum("bs,sp,bp->b", s, differences, p)
    else:
        texts = p * weights.double()
        texts = texts / texts.sum(1, keepdim=True)
        means = torch.stack([torch.einsum("spq,s,p,q->", differences, *each) for each in zip(s, p, texts, strict=True)])
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def _counts(of: int, resamples: int, draw: torch.Generator) -> Tensor:
    """How often each is drawn in each resample."""
    drawn = torch.randint(of, (resamples, of), generator=draw)
    return torch.zeros(resamples, of, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
