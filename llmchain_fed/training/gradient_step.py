"""GradientStep: how a batch becomes a gradient, and the package's own way, that of the mean loss over its tokens.

Knows batches and the loss. Knows nothing about optimizers, how batches are drawn, participants or rounds.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from llmchain_fed.data.encoding import IGNORE
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.batches import Batch
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loss import summed_loss


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
        loss, tokens, examples = loss + float(mean.detach()), tokens + count, examples + len(one["labels"])
    return StepResult(loss, tokens, examples)
