"""GradientStep: how a batch becomes a gradient, and the package's own way, that of the mean loss over its tokens.

Knows what a batch is made of, and the loss. Knows nothing about optimizers, how batches are drawn, participants or
rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from llmchain_fed.data.encoding import IGNORE, collate
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loss import examples_with_loss, on_device, summed_loss


@dataclass(frozen=True)
class Batch:
    """What one optimizer step is made of: rows of examples, possibly none, or ready tensors."""

    rows: Sequence[tuple[list[int], list[int]]] | None
    """(prompt ids, completion ids) of each example; None where a DataLoader gave the tensors"""
    ready: Any = None
    """what the DataLoader gave"""

    def passes(self, model: LocalModel, size: int | None = None) -> list[dict[str, Any]]:
        """The tensors of each forward pass, padded and where the model is; an empty batch has none.

        At most `size` examples share a pass; None is all. A DataLoader's batch is one pass, as it is.

        Raises:
            DataError: The DataLoader gave something else than a mapping with labels.
        """
        if self.rows is None:
            return [on_device(self.ready, model.device)]
        size = size or max(len(self.rows), 1)
        rows = (self.rows[at : at + size] for at in range(0, len(self.rows), size))
        return [on_device(collate(some, model), model.device) for some in rows]


class StepResult(NamedTuple):
    """What a gradient was computed from."""

    loss: float
    """nats per completion token, mean over the step's tokens; 0 without any. Times `tokens`, it is the sum"""
    tokens: int
    """completion tokens"""
    examples: int
    """examples with a completion token"""


class GradientStep(Protocol):
    """How a batch becomes a gradient."""

    def __call__(self, model: LocalModel, batch: Batch, config: TrainingConfig, /) -> StepResult:
        """Leaves the gradient of one optimizer step in `.grad` of `model.trainable_parameters()`.

        Every `.grad` is None before; what is None afterwards, the optimizer leaves alone. The loop then adds the
        proximal term, clips to `max_grad_norm` and steps, so that neither depends on how the gradient came about.

        Args:
            model: The model in training mode, computing in the precision of `config`.
            batch: The examples of the step; it may be empty where a `BatchSampler` says so.
            config: The options, among them `micro_batch_size`.
        """


def mean_loss_gradient(model: LocalModel, batch: Batch, config: TrainingConfig, /) -> StepResult:
    """The gradient of the mean loss over all completion tokens of the batch, whatever forward passes it takes."""
    passes = batch.passes(model, config.micro_batch_size)
    total = sum(int((p["labels"] != IGNORE).sum()) for p in passes) if len(passes) > 1 else 0
    loss, tokens, examples = 0.0, 0, 0
    for one in passes:
        summed, count = summed_loss(model.module, one)
        if not count:
            continue
        mean = summed / (total or count)
        mean.backward()  # type: ignore[no-untyped-call]
        loss, tokens = loss + float(mean.detach()), tokens + count
        examples += examples_with_loss(model.module, one)
    return StepResult(loss, tokens, examples)
