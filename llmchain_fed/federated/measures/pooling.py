"""Pooling: one number of all participants, whose word it is, and how many must say so.

Knows losses, metrics' values and counts. Knows nothing of messages or rounds.

The pooled loss is the mean of the participants' losses, weighted by completion tokens: those that a participant
declared when it joined, or fewer. From three participants on, none weighs more than all others together, so at most one
half; of two, nobody could say whose count is the lie. What is decided by the pool (stopping early, divergence) moreover
needs as many witnesses as half of those who were measured: see `witnesses`. One that always claims to improve can delay
an early stop, not bring one about.

A metric's pooled value is the mean of the participants' values, weighted by the held-out examples that each is over. In
one process that is exact; where participants are elsewhere none weighs more than all others together, likewise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

MEASURED = 3
"""participants from which on one alone neither weighs most nor decides"""
Answers = Mapping[str, Mapping[str, Any]]


def pooled(before: Answers, after: Answers) -> tuple[float | None, float | None, list[str]]:
    """Mean over the same held-out tokens on both sides, and whose weight in it was cut.

    Who sent a loss that is not finite, on either side, is left out of both, and its record says so: one participant's
    numbers do not hide the others'.
    """
    both = [n for n in before if all(_is_finite(side.get(n, {})) for side in (before, after))]
    if not both:  # nobody's is finite on both sides: perhaps some are on one
        (old, cut), (new, _) = _mean(before), _mean(after)
        return (old, new, cut) if old is None or new is None else (None, new, [])
    weights, cut = capped({n: before[n]["tokens"] for n in both})
    total = sum(weights.values())
    sides = (sum(side[n]["loss"] * weights[n] for n in both) / total for side in (before, after))
    return next(sides), next(sides), cut


def capped(tokens: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Participant → what its loss weighs, and whose weight was cut; as they are where nobody has more than half.

    >>> capped({"a": 10, "b": 30, "c": 10**9})
    ({'a': 10, 'b': 30, 'c': 40}, ['c'])
    """
    weights = dict(tokens)
    largest = max(weights, key=weights.__getitem__)
    others = sum(weights.values()) - weights[largest]
    if len(weights) < MEASURED or weights[largest] <= others:
        return weights, []
    return weights | {largest: others}, [largest]


def witnesses(measured: Collection[str], wrong: Collection[str]) -> bool:
    """Whether enough participants say that something is wrong: half of them, or of fewer than three whoever does.

    Not two of any number: in many rounds of many participants somebody honest has a bad one by chance.

    >>> witnesses("abc", "c"), witnesses("abc", "bc"), witnesses("ab", "b"), witnesses("abcdefghi", "abcd")
    (False, True, True, False)
    """
    return 2 * len(wrong) >= len(measured) if len(measured) >= MEASURED else bool(wrong)


def pooled_metrics(found: Answers, *, trusted: bool) -> dict[str, float]:
    """Each metric's mean over those who have it, weighted by the held-out examples that it is over.

    Counts that are `trusted` weigh as they are.
    """
    keys = dict.fromkeys(key for own in found.values() for key in own.get("metrics", ()))
    pool = {}
    for key in keys:
        counts = {n: own["measured"] for n, own in found.items() if key in own.get("metrics", ())}
        weights = counts if trusted else capped(counts)[0]
        total = sum(weights.values())
        pool[key] = sum(found[n]["metrics"][key] * weight for n, weight in weights.items()) / total
    return pool


def _is_finite(own: Mapping[str, Any]) -> bool:
    loss = own.get("loss")
    return loss is not None and math.isfinite(loss)


def _mean(found: Answers) -> tuple[float | None, list[str]]:
    finite = {n: own for n, own in found.items() if _is_finite(own)}
    if not finite:
        return None, []
    weights, cut = capped({n: own["tokens"] for n, own in finite.items()})
    return sum(own["loss"] * weights[n] for n, own in finite.items()) / sum(weights.values()), cut
