"""Held-out losses that are not finite: how they travel, and what a record says of them.

Knows messages of JSON, which has neither NaN nor infinity. Knows nothing about models or rounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

MAX_LOSS = 1e4
"""nats per token: beyond it a loss counts as infinite (guessing among a million tokens costs 14)"""
_WORDS = ("nan", "inf", "-inf")
"""what Python writes for them"""


def told(loss: float) -> dict[str, Any]:
    """A loss as part of an answer: a number, or null with the word for what it is.

    >>> told(2.5), told(float("nan")), told(1e30)
    ({'loss': 2.5}, {'loss': None, 'not_finite': 'nan'}, {'loss': None, 'not_finite': 'inf'})
    """
    if not math.isfinite(loss):
        return {"loss": None, "not_finite": str(float(loss))}
    return {"loss": loss} if loss <= MAX_LOSS else {"loss": None, "not_finite": "inf"}


def read(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `told` said, out of an answer that came from elsewhere; None where it makes no sense."""
    loss, word = answer.get("loss"), answer.get("not_finite")
    if loss is None and isinstance(word, str) and word in _WORDS:
        return {"loss": None, "not_finite": word}
    number = type(loss) in (int, float) and word is None and 0 <= loss <= sys.float_info.max  # type: ignore[operator]
    return told(float(loss)) if number else None  # type: ignore[arg-type]


def spelled(answer: Any) -> Any:
    """The same data with such numbers as words.

    >>> spelled({"base": 2.5, "global": float("nan")})
    {'base': 2.5, 'global': 'nan'}
    """
    if isinstance(answer, dict):
        return {key: spelled(value) for key, value in answer.items()}
    if isinstance(answer, list):
        return [spelled(value) for value in answer]
    return str(float(answer)) if isinstance(answer, float) and not math.isfinite(answer) else answer


def number(value: Any) -> float | None:
    """A loss that `spelled` may have made a word, out of an answer that came from elsewhere; None where it is none."""
    if isinstance(value, str) and value in _WORDS:
        return float(value)
    found = read({"loss": value})
    if found is None:
        return None
    return math.inf if found["loss"] is None else float(found["loss"])


def notes(before: Mapping[str, Any], after: Mapping[str, Any], what: str = "held-out loss") -> list[str]:
    """What a record should say: one sentence for each side of the round, none where both are finite.

    >>> notes({"loss": 2.5}, told(float("inf")))
    ['held-out loss is not finite (inf) after the round: the model has diverged, or its precision overflows']
    """
    sides = (("before", before.get("not_finite")), ("after", after.get("not_finite")))
    return [
        f"{what} is not finite ({word}) {side} the round: the model has diverged, or its precision overflows"
        for side, word in sides
        if word is not None
    ]
