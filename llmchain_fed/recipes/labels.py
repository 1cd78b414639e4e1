"""A closed set of answers as recipes, training and questions have it, checked once.

Knows texts. Knows nothing about tokens, parsers, LangChain or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from llmchain_fed.errors import LabelError


def checked_labels(labels: Any) -> tuple[str, ...]:
    """The labels in the order given: two or more different texts.

    Raises:
        LabelError: They are no list of texts, one is empty or stands there twice, or there are fewer than two.

    >>> checked_labels(["minor", "major"])
    ('minor', 'major')
    """
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Collection):
        msg = f'labels is a list of texts, got {labels!r:.80}. Write labels=["minor", "major"].'
        raise LabelError(msg)
    found = list(labels)
    for label in found:
        if not isinstance(label, str):
            msg = f"a label is the text that the model should write, got {label!r:.80}. Give its words."
            raise LabelError(msg)
        if not label.strip():
            msg = f"one of the {len(found)} labels is empty ({label!r}): nothing to score. Leave it out, or name it."
            raise LabelError(msg)
    if twice := [label for label, count in Counter(found).items() if count > 1]:
        msg = f"the label {twice[0]!r:.80} is given twice, and would share its probability. Give every label once."
        raise LabelError(msg)
    if len(found) < 2:
        msg = f"{len(found)} label is no choice: its probability is 1. Give two or more."
        raise LabelError(msg)
    return tuple(found)
