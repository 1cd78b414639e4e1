"""evaluate_locally: held-out loss of a model as it is.

Knows examples and the loss. Knows nothing about optimizers, other participants or rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.data.encoding import EncodedExamples, collate, encoded, no_examples, on_device, unwrap
from llmchain_fed.data.examples import Examples
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.errors import EmptyParticipantError
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training import trainable
from llmchain_fed.training.loss import Precision, computing_in, examples_with_loss, summed_loss


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out loss of the model as it is now."""

    loss: float
    """nats per completion token"""
    tokens: int
    examples: int


@torch.no_grad()
def evaluate_locally(
    model: LocalModel | Any,
    examples: Examples | EncodedExamples,
    *,
    prompt: Prompt | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: Precision = "fp32",
) -> EvaluationResult:
    """Mean negative log-likelihood per completion token over all examples.

    Raises:
        EmptyParticipantError: Not a single example is usable.
        DataError: See `read_examples`.
        UnsupportedModelError: See `train_locally`.
    """
    model, prompt = unwrap(model, prompt)
    data = encoded(examples, model, prompt, max_length)
    batch_size = batch_size if trainable.pads(model) else 1
    total, tokens, count = 0.0, 0, 0
    with model.exclusive(), evaluating(model.module), computing_in(precision, model.module):
        for batch in _evaluation_batches(data, model, batch_size):
            summed, n = summed_loss(model.module, on_device(batch, model.device))
            total, tokens = total + float(summed), tokens + n
            count += examples_with_loss(model.module, batch)
    if not tokens:
        raise EmptyParticipantError(no_examples("the evaluation", "no labelled token"))
    return EvaluationResult(total / tokens, tokens, count)


def _evaluation_batches(data: EncodedExamples | Any, model: LocalModel, batch_size: int) -> Iterator[dict[str, Tensor]]:
    if not isinstance(data, EncodedExamples):
        yield from data
        return
    lengths = data.lengths()
    order = sorted(range(len(data)), key=lengths.__getitem__)
    for at in range(0, len(order), batch_size):
        yield collate([data[i] for i in order[at : at + batch_size]], model)
