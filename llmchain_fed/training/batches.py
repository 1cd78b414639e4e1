"""Batch: what one optimizer step is made of, drawn from a participant's examples or given by a DataLoader.

Knows encoded examples, DataLoaders of ready tensors and padding. Knows nothing about losses, gradients or optimizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmchain_fed.data.encoding import EncodedExamples, collate
from llmchain_fed.errors import ConfigError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.batch_sampler import BatchSampler, Place, length_buckets
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loss import on_device


@dataclass(frozen=True)
class Batch:
    """What one optimizer step is made of: rows of examples, possibly none, or ready tensors."""

    rows: Sequence[tuple[list[int], list[int]]] | None
    """(prompt ids, completion ids) of each example; None where a DataLoader gave the tensors"""
    ready: Any = None
    """what the DataLoader gave"""

    def passes(self, model: LocalModel, size: int | None = None) -> list[dict[str, Any]]:
        """The tensors of each forward pass, padded and where the model is; an empty batch has none.

        Args:
            model: The model whose tokens, padding and device these are.
            size: examples: At most this many share a pass; None is all. A DataLoader's batch is one pass, as it is.

        Raises:
            DataError: The DataLoader gave something else than a mapping with labels.
        """
        if self.rows is None:
            return [on_device(self.ready, model.device)]
        size = size or max(len(self.rows), 1)
        rows = (self.rows[at : at + size] for at in range(0, len(self.rows), size))
        return [on_device(collate(some, model), model.device) for some in rows]


def batches_of(
    data: EncodedExamples | Any, config: TrainingConfig, place: Place, sampler: BatchSampler | None
) -> Iterator[Batch]:
    """The batches of one call of `train_locally`.

    Raises:
        ConfigError: A sampler is given for a DataLoader, which draws its batches itself.
    """
    if isinstance(data, EncodedExamples):
        return (Batch([data[i] for i in rows]) for rows in (sampler or length_buckets)(data, config, place))
    if sampler is not None:
        msg = "a DataLoader draws its batches itself, so no batch_sampler can. Give the examples, or leave it out."
        raise ConfigError(msg)
    return (Batch(None, ready) for ready in _given(data, config, place.first_step))


def batches_per_pass(loader: Any) -> int | None:
    """How many batches a DataLoader gives; None where its dataset does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _given(loader: Any, config: TrainingConfig, first_step: int) -> Iterator[Any]:
    """What a DataLoader gives in one call, which goes on where earlier rounds ended."""
    if not config.max_steps:
        return _passes(loader, config)
    length = batches_per_pass(loader)
    start = first_step % length if length else first_step
    return itertools.islice(_passes(loader, config), start, start + config.max_steps)


def _passes(loader: Any, config: TrainingConfig) -> Iterator[Any]:
    """The batches of a DataLoader, over and over with `max_steps`; an empty one ends at once."""
    for _ in itertools.count() if config.max_steps else range(config.epochs or 1):
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return
