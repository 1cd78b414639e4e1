"""GradientStep: how a batch becomes a gradient; the package's own way stands in `loop`.

Knows what a batch is. Knows nothing about optimizers, how batches are drawn, participants or rounds.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from llmchain_fed.data.encoding import Batch
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.config import TrainingConfig


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
