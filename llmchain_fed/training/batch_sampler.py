"""BatchSampler: which examples each optimizer step is made of, and the package's own way, batches of similar length.

Knows counts, lengths and where a call stands in a federation. Knows nothing about models, losses or gradients.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.training.config import TrainingConfig


class Place(NamedTuple):
    """Where one call of `train_locally` stands: whose data, which round, how far in the data."""

    participant: str = "local"
    round: int = 0
    """counts from 0, as the seeds do"""
    first_step: int = 0
    """optimizer steps that earlier rounds have taken"""


class BatchSampler(Protocol):
    """How batches are drawn from a participant's examples."""

    def __call__(self, examples: EncodedExamples, config: TrainingConfig, place: Place, /) -> Iterable[Sequence[int]]:
        """The rows of `examples` that each optimizer step of one call is made of, one sequence for each step.

        A sequence may be empty: the step is taken all the same, with the gradient that the `GradientStep` leaves.

        Args:
            examples: The participant's encoded examples; `len` and `lengths()` say what there is to draw from.
            config: The options: `batch_size`, `epochs` or `max_steps`, and `seed`.
            place: What makes the draw differ between participants and rounds, and where a round goes on.
        """


def length_buckets(examples: EncodedExamples, config: TrainingConfig, place: Place, /) -> Iterator[list[int]]:
    """Passes over all examples in batches of similar length; the order follows from (seed, participant, round)."""
    lengths = examples.lengths()
    if config.max_steps is None:
        for epoch in range(config.epochs or 1):
            rng = random.Random(seed_of(config.seed, place.participant, place.round, epoch))  # noqa: S311 (order, no secret)
            yield from bucketed_order(lengths, config.batch_size, rng)
        return
    # The stream of all passes does not depend on the round: rounds walk on through it.
    per_pass = -(-len(lengths) // config.batch_size)
    step, stop = place.first_step, place.first_step + config.max_steps
    while step < stop:
        rng = random.Random(seed_of(config.seed, place.participant, "pass", step // per_pass))  # noqa: S311 (order, no secret)
        order = bucketed_order(lengths, config.batch_size, rng)[step % per_pass :][: stop - step]
        yield from order
        step += len(order)


def bucketed_order(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """One pass over the data as batches of similar length, in random order.

    Lengths are jittered by up to a tenth before sorting: neighbours still fit well, and yet no two passes form the
    same batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i] * rng.uniform(0.95, 1.05), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def seed_of(*parts: object) -> int:
    """63 bits from any values, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
