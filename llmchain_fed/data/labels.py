"""Labels as token ids, and which of them each example has.

Knows token ids and examples; what a set of labels may be stands in `recipes.labels`. Knows
nothing about scores, losses, LangChain or participants.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmchain_fed.data.encoder import Row
from llmchain_fed.errors import LabelError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import check_rows

Ids = Sequence[list[int]]


def encode_labels(labels: Sequence[str], model: LocalModel, controls: Collection[str] = ()) -> list[list[int]]:
    """The token ids of each label with the end token behind it, as a completion of training has them.

    Raises:
        LabelError: Two labels are the same tokens.
        UnsupportedModelError: The model's embedding has no row for some token.
    """
    ids = model.encode_completions(list(labels), controls=controls)
    check_rows(model, (), ids)
    first: dict[tuple[int, ...], str] = {}
    for label, row in zip(labels, ids, strict=True):
        if (other := first.setdefault(tuple(row), label)) != label:
            msg = (
                f"the labels {other!r:.60} and {label!r:.60} are the same tokens to {model.name!r}, which cannot tell "
                "them apart. Rename one."
            )
            raise LabelError(msg)
    return ids


def prompts_and_targets(rows: Sequence[Row], ids: Ids, labels: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """The prompt of each row and the index of the label that is its completion.

    Raises:
        LabelError: A completion is no label, or an example has several answers.
    """
    known = {tuple(row): at for at, row in enumerate(ids)}
    targets = []
    for row in rows:
        target = known.get(tuple(row[1])) if len(row) == 2 else None
        if target is None:
            what = "a completion is none of the labels" if len(row) == 2 else "an example has several answers"
            msg = (
                f"{what} {list(labels)!r:.200}, so there is no cross-entropy over them. Write completions "
                'exactly as the labels are, with the same spaces and case, or train with loss="tokens".'
            )
            raise LabelError(msg)
        targets.append(target)
    return [list(row[0]) for row in rows], targets
