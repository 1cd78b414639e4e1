"""The loss over labels: cross-entropy of an example's label among all, each label's whole text scored.

The mean over completion tokens counts an end token as much as a label of one token, and falls while a classifier
collapses to its majority; this loss compares the labels with one another and nothing else. Knows scores, label indices
and weights. Knows nothing about optimizers, participants or rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmchain_fed.data.encoding import Batch, EncodedExamples
from llmchain_fed.data.labels import encode_labels, prompts_and_targets
from llmchain_fed.errors import LabelError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.scoring import answer_scores
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_step import StepResult


def label_loss(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w[y] · −log softmax(scores)[y] and Σ w[y], whose ratio is the weighted mean.

    Args:
        scores: (B, L) log p(label | prompt).
        targets: (B,) index of each example's label, y.
        weights: (L,) what an example counts, by its label.
    """
    weighted = F.cross_entropy(scores.float(), targets, weight=weights, reduction="sum")
    return weighted, weights[targets].sum()


def class_weights(
    choice: str | Mapping[str, float] | None, labels: Sequence[str], targets: Sequence[int]
) -> list[float]:
    """What an example counts, by its label; a balanced label that nobody has counts 1, as it is never used.

    >>> class_weights("balanced", ["no", "yes"], [0, 0, 0, 1])
    [0.6666666666666666, 2.0]
    """
    if choice == "balanced":
        counts = Counter(targets)
        return [len(targets) / (len(labels) * counts[at]) if counts[at] else 1.0 for at in range(len(labels))]
    given = choice if isinstance(choice, Mapping) else {}
    return [float(given.get(label, 1.0)) for label in labels]


@dataclass(frozen=True)
class LabelGradient:
    """The `GradientStep` of the loss over labels."""

    labels: tuple[str, ...]
    ids: list[list[int]]
    weights: list[float]

    @classmethod
    def of(
        cls, data: EncodedExamples | object, model: LocalModel, config: TrainingConfig, controls: Collection[str]
    ) -> LabelGradient:
        """The gradient for a participant's examples, of which every completion must be a label.

        Raises:
            LabelError: One is not, or the examples are ready tensors.
        """
        labels = config.labels or ()
        ids = encode_labels(labels, model, controls)
        if not isinstance(data, EncodedExamples):
            msg = (
                'loss="labels" scores every label for an example, and a DataLoader gives tensors with one completion '
                "each. Pass examples, (inputs, label)."
            )
            raise LabelError(msg)
        _, targets = prompts_and_targets([data[i] for i in range(len(data))], ids, labels)
        return cls(labels, ids, class_weights(config.class_weight, labels, targets))

    def __call__(self, model: LocalModel, batch: Batch, config: TrainingConfig, /) -> StepResult:
        """The gradient of the weighted mean over the batch's examples; an example counts as one token of the loss."""
        prompts, found = prompts_and_targets(batch.rows or [], self.ids, self.labels)
        if not found:
            return StepResult(0.0, 0, 0)
        weights = torch.tensor(self.weights, device=model.device)
        targets = torch.tensor(found, device=model.device)
        total, loss = weights[targets].sum(), 0.0
        size = config.micro_batch_size or len(prompts)
        for at in range(0, len(prompts), size):
            scores = answer_scores(model, prompts[at : at + size], self.ids)
            mean = label_loss(scores, targets[at : at + size], weights)[0] / total
            mean.backward()  # type: ignore[no-untyped-call]
            loss += float(mean.detach())
        return StepResult(loss, len(found), len(found))


@dataclass(frozen=True)
class LabelEvaluation:
    """What the labels of held-out examples are and what they are taken for."""

    loss: float
    """nats per example, unweighted"""
    predicted: list[int]
    targets: list[int]

    @property
    def collapsed(self) -> int | None:
        """The label that every example is taken for, though not every one has it; None where there is none."""
        one = set(self.predicted)
        return self.predicted[0] if len(one) == 1 and len(set(self.targets)) > 1 else None


@torch.no_grad()
def evaluate_labels(
    model: LocalModel, data: EncodedExamples, labels: Sequence[str], controls: Collection[str], batch_size: int = 32
) -> LabelEvaluation:
    """The loss over labels of all examples, with the model as it is.

    Raises:
        LabelError: A completion is no label.
    """
    ids = encode_labels(labels, model, controls)
    lengths = data.lengths()
    order = sorted(range(len(data)), key=lengths.__getitem__)
    prompts, targets = prompts_and_targets([data[i] for i in order], ids, labels)
    even = torch.ones(len(labels), device=model.device)
    total, predicted = 0.0, []
    for at in range(0, len(prompts), batch_size):
        scores = answer_scores(model, prompts[at : at + batch_size], ids)
        there = torch.tensor(targets[at : at + batch_size], device=scores.device)
        total += float(label_loss(scores, there, even)[0])
        predicted += scores.argmax(1).tolist()
    return LabelEvaluation(total / len(targets), predicted, targets)
