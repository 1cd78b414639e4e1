"""The paired bootstrap: how far a difference between two arms may be chance.

Knows tensors of differences. Knows nothing about arms.

Seeds and participants are crossed: every participant is measured under every seed. So both are drawn anew, with
replacement and each for itself, and the statistic is computed over their grid (the pigeonhole bootstrap, Owen 2007,
arXiv 0712.1111; it errs towards intervals that are too wide; cells that count as independent err the other way).

Where everybody's texts count, a participant that is drawn twice stands for two like it. The model of the one on the
texts of the other is then a model on texts that are not its own, which its own model's difference on its own texts does
not tell: what stands there is the mean of that participant's differences with others, as model and as texts. So the
resamples' mean is the difference that was measured, and not one in which own texts count too often: exactly where all
weigh alike, and but for the bias of a ratio of two sums where they do not.
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
        means = _over_everybodys(differences, weights.double(), s, p * people)
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def _over_everybodys(differences: Tensor, weights: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """The mean over models and texts of each resample, in which a participant was drawn n times."""
    people = len(weights)
    own = differences.diagonal(dim1=1, dim2=2)
    others = differences - torch.diag_embed(own)
    with_others = (others.sum(1) + others.sum(2)) / (2 * max(1, people - 1))
    texts = n * weights
    found = torch.stack([torch.einsum("spq,s,p,q->", others, *each) for each in zip(s, n, texts, strict=True)])
    found = found + torch.einsum("bs,sp,bp->b", s, own, texts)
    found = found + torch.einsum("bs,sp,bp->b", s, with_others, texts * (n - 1))
    return found / (people * texts.sum(1))


def _counts(of: int, resamples: int, draw: torch.Generator) -> Tensor:
    """How often each is drawn in each resample."""
    drawn = torch.randint(of, (resamples, of), generator=draw)
    return torch.zeros(resamples, of, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
