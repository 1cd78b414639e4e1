"""evaluate_locally: held-out loss of a model as it is.

Knows examples and the loss. Knows nothing about optimizers, other participants or rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmchain_fed.data.encoding import EncodedExamples, collate, controls_of, encoded, no_examples, on_device, unwrap
from llmchain_fed.data.examples import Examples
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.errors import EmptyParticipantError, LabelError
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.recipes.labels import checked_labels
from llmchain_fed.training import trainable
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.label_loss import evaluate_labels
from llmchain_fed.training.loss import Precision, computing_in, examples_with_loss, summed_loss


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out loss of the model as it is now."""

    loss: float
    """nats per completion token; with the loss over labels, per example"""
    tokens: int
    """what the loss is a mean over: completion tokens; with the loss over labels, examples"""
    examples: int
    collapsed: str | None = None
    """the label that every example is taken for, though not all have it; None also where no labels are known"""


@torch.no_grad()
def evaluate_locally(
    model: LocalModel | Any,
    examples: Examples | EncodedExamples,
    *,
    prompt: Prompt | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: Precision = "fp32",
    loss: Literal["tokens", "labels"] = "tokens",
    labels: Sequence[str] | None = None,
) -> EvaluationResult:
    """Mean negative log-likelihood per completion token over all examples, or the loss over labels per example.

    Args:
        model: The LocalModel, or a chain over one.
        examples: Any form that `read_examples` takes, ready `EncodedExamples`, or a DataLoader of ready tensors.
        prompt: It renders the examples' inputs; by default the chain does, where one is given.
        batch_size: examples computed together.
        max_length: tokens: longer examples are left out.
        precision: The forward passes'.
        loss: Which one.
        labels: As in `TrainingConfig`: with them the result says whether all examples are taken for one label.

    Raises:
        LabelError: With `loss="labels"`, a completion is no label, or the examples are a DataLoader.
        EmptyParticipantError: Not a single example is usable.
        DataError: See `read_examples`.
        UnsupportedModelError: See `train_locally`.
    """
    model, prompt = unwrap(model, prompt)
    data = encoded(examples, model, prompt, max_length)
    batch_size = batch_size if trainable.pads(model) else 1
    if loss == "labels":
        return _of_labels(model, data, checked_labels(labels), prompt, batch_size, precision)
    total, tokens, count = 0.0, 0, 0
    with model.exclusive(), evaluating(model.module), computing_in(precision, model.module):
        for batch in _evaluation_batches(data, model, batch_size):
            summed, n = summed_loss(model.module, on_device(batch, model.device))
            total, tokens = total + float(summed), tokens + n
            count += examples_with_loss(model.module, batch)
    if not tokens:
        raise EmptyParticipantError(no_examples("the evaluation", "no labelled token"))
    collapsed = _collapsed(model, data, labels, prompt, batch_size, precision)
    return EvaluationResult(total / tokens, tokens, count, collapsed)


def evaluate_as(
    config: TrainingConfig, model: LocalModel, examples: Examples | EncodedExamples, prompt: Prompt | None
) -> EvaluationResult:
    """The held-out loss of the kind, length and precision that training has.

    Raises:
        DataError: See `evaluate_locally`.
    """
    return evaluate_locally(
        model,
        examples,
        prompt=prompt,
        max_length=config.max_length,
        precision=config.precision,
        loss=config.loss,
        labels=config.labels,
    )


def _of_labels(
    model: LocalModel,
    data: EncodedExamples | Any,
    labels: Sequence[str],
    prompt: Prompt | None,
    batch_size: int,
    precision: Precision,
) -> EvaluationResult:
    if not isinstance(data, EncodedExamples):
        msg = "a DataLoader's tensors have one completion each, so no other label can be scored. Pass examples."
        raise LabelError(msg)
    with model.exclusive(), evaluating(model.module), computing_in(precision, model.module):
        found = evaluate_labels(model, data, labels, controls_of(prompt), batch_size)
    collapsed = None if found.collapsed is None else labels[found.collapsed]
    return EvaluationResult(found.loss, len(data), len(data), collapsed)


def _collapsed(
    model: LocalModel,
    data: EncodedExamples | Any,
    labels: Sequence[str] | None,
    prompt: Prompt | None,
    batch_size: int,
    precision: Precision,
) -> str | None:
    """What every example is taken for, where labels are known and every completion is one."""
    if labels is None or not isinstance(data, EncodedExamples):
        return None
    try:
        return _of_labels(model, data, checked_labels(labels), prompt, batch_size, precision).collapsed
    except LabelError:  # labels are a remark here, and free texts among them no failure
        return None


def _evaluation_batches(data: EncodedExamples | Any, model: LocalModel, batch_size: int) -> Iterator[dict[str, Tensor]]:
    if not isinstance(data, EncodedExamples):
        yield from data
        return
    lengths = data.lengths()
    order = sorted(range(len(data)), key=lengths.__getitem__)
    for at in range(0, len(order), batch_size):
        yield collate([data[i] for i in order[at : at + batch_size]], model)
