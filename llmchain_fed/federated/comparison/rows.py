"""Rows of encoded examples: divided for validation, pooled, counted, and told apart by a digest.

Knows token ids alone, so that nothing is read or tokenised a second time. Knows nothing about participants or arms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.data.report import DataReport
from llmchain_fed.training.config import TrainingConfig


def chosen(data: EncodedExamples, rows: Sequence[int]) -> EncodedExamples:
    """Some of the rows, in the order that is given."""
    return _made([data[i] for i in rows])


def pooled(parts: Sequence[EncodedExamples]) -> EncodedExamples:
    """All rows of all parts, one part after the other."""
    return _made([part[i] for part in parts for i in range(len(part))])


def _made(rows: Sequence[tuple[list[int], ...]]) -> EncodedExamples:
    flat, bounds, starts = [], [0], [0]
    for row in rows:
        for segment in row:
            flat += segment
            bounds.append(bounds[-1] + len(segment))
        starts.append(len(bounds) - 1)
    learnt = sum(len(ids) for row in rows for ids in row[1::2])
    report = DataReport(used=len(rows), completion_tokens=learnt)
    return EncodedExamples(
        torch.tensor(flat, dtype=torch.int32), torch.tensor(bounds), torch.tensor(starts), report=report
    )


def divided(data: EncodedExamples, share: float) -> tuple[EncodedExamples, EncodedExamples] | None:
    """(the rest, the validation part): what is asked in a row decides its side, by a hash of that alone.

    So the same question stands on the same side at every participant, and one more example moves no other. The part
    has about `share` of the rows, at least one; None where all rows ask the same, so that nothing can be set apart.
    """
    keys = [hashlib.sha256(b"validation" + _bytes(data[i][0])).digest() for i in range(len(data))]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        return None
    limit = int(share * 2**64)
    apart = {key for key in distinct if int.from_bytes(key[:8], "big") < limit} or {distinct[0]}
    if len(apart) == len(distinct):
        apart.discard(distinct[-1])
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        sides[key in apart].append(i)
    return chosen(data, sides[False]), chosen(data, sides[True])


def digest_of(data: EncodedExamples) -> str:
    """Hex that differs where any token, or what of them is learnt, does."""
    found = hashlib.sha256()
    for part in (data.tokens, data.bounds, data.starts):
        found.update(part.numpy().tobytes() + b"|")
    return found.hexdigest()


def weight_of(data: EncodedExamples, config: TrainingConfig) -> int:
    """What a participant's held-out loss counts in the pool: tokens that are learnt, or examples over labels."""
    return len(data) if config.loss == "labels" else data.report.completion_tokens


def presented(count: int, config: TrainingConfig, rounds: int) -> int:
    """How many examples so many rounds over `count` examples present to the model.

    Exact for epochs, and for `max_steps` that end with a pass; else the mean, because the last batch of a pass is
    smaller and may stand anywhere in it.
    """
    if config.max_steps is None:
        return rounds * (config.epochs or 1) * count
    per_pass = -(-count // config.batch_size)
    return round(rounds * config.max_steps * count / per_pass)


def _bytes(ids: Sequence[int]) -> bytes:
    return torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
