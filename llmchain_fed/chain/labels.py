"""Classifies: probabilities of labels, and of any one completion, for a chain and for both faces of a model.

Knows a `Prompt`, its model and the scores of answers. Knows nothing about training, data or participants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmchain_fed.chain.batching.inputs import listed
from llmchain_fed.data.labels import encode_labels
from llmchain_fed.errors import ConfigError, DataError, LabelError
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.scoring import answer_scores
from llmchain_fed.recipes.labels import checked_labels

if TYPE_CHECKING:
    from llmchain_fed.data.prompt import Prompt

_COLDEST, _HOTTEST = 0.05, 20.0  # temperatures: beyond them probabilities are 0 and 1, or all alike


@dataclass(frozen=True)
class Classification:
    """The most probable of the labels, and the probability of each, which sum to one."""

    label: str
    probabilities: dict[str, float]


class Classifies:
    """`classify` and `loglikelihood`, for what has `as_prompt()`."""

    def _prompt(self) -> Prompt:
        prompt: Prompt = self.as_prompt()  # type: ignore[attr-defined] # the other half of the class
        return prompt

    def classify(self, x: Any, labels: Sequence[str], *, temperature: float = 1.0) -> Classification:
        """The probability of each label as the answer, its end token included, normalised over the labels.

        Args:
            x: What `invoke` takes.
            labels: All answers that there are, written exactly as completions are in training.
            temperature: What `fit_temperature` found; above 1 it evens the probabilities out.

        Raises:
            LabelError: A label is empty, given twice or no text.
            DataError: `x` is nothing that `invoke` takes.
            PromptTooLongError: The prompt with the longest label exceeds the model's context.
        """
        return self.classify_batch([x], labels, temperature=temperature)[0]

    def classify_batch(
        self, inputs: Sequence[Any], labels: Sequence[str], *, temperature: float = 1.0
    ) -> list[Classification]:
        """`classify` of several inputs, computed together.

        Raises:
            LabelError: As `classify`.
            DataError: As `classify`; or `inputs` is no list of inputs.
            PromptTooLongError: As `classify`.
        """
        known = checked_labels(labels)
        _check_temperature(temperature)
        inputs = listed(inputs, "classify_batch")
        if not inputs:
            return []
        return _classifications(self._label_scores(inputs, known).double() / temperature, known)

    async def aclassify(self, x: Any, labels: Sequence[str], *, temperature: float = 1.0) -> Classification:
        """`classify` for a coroutine, beside which the loop goes on.

        Raises:
            LabelError: As `classify`.
            DataError: As `classify`.
            PromptTooLongError: As `classify`.
        """
        return await asyncio.to_thread(self.classify, x, labels, temperature=temperature)

    def loglikelihood(self, x: Any, completion: Any) -> float:
        """Log p(completion | x) in nats, its end token included: what training on it would raise.

        Raises:
            DataError: `x` is nothing that `invoke` takes, or the completion nothing that the model could answer.
            PromptTooLongError: Both together exceed the model's context.
        """
        prompt = self._prompt()
        call = prompt.calls(x, completion)[-1]
        if not call.completion.strip():
            msg = f"the completion is empty ({completion!r}), so it has no probability worth the name. Give text."
            raise DataError(msg)
        ids = prompt.model.encode_completions([call.completion], controls=prompt.completion_controls)  # type: ignore[attr-defined] # what is asked has one
        return float(_scores(prompt, [call.text], ids)[0, 0])

    def fit_temperature(self, examples: Iterable[tuple[Any, str]], labels: Sequence[str]) -> float:
        """The temperature under which these examples' labels are most probable: calibration (arXiv 1706.04599).

        Take held-out examples: those that were trained on would call for too low a temperature. It lies between 0.05
        and 20; where every label is right, the lowest is the best.

        Args:
            examples: `(x, label)` each.
            labels: As in `classify`, to which the result is given as `temperature`.

        Raises:
            LabelError: A label is empty or given twice, an example's is none of them, or there is no example.
            DataError: As `classify`.
            PromptTooLongError: As `classify`.
        """
        known, pairs = checked_labels(labels), list(examples)
        for at, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[1] not in known:
                msg = f"example {at} is {pair!r:.80}; wanted is (x, label) with one of the labels {list(known)!r:.200}."
                raise LabelError(msg)
        if not pairs:
            msg = "there is no example to fit a temperature to. Give held-out examples, (x, label)."
            raise LabelError(msg)
        scores = self._label_scores([x for x, _ in pairs], known).double()
        targets = torch.tensor([known.index(label) for _, label in pairs])
        return _best_temperature(scores, targets)

    def _label_scores(self, inputs: Sequence[Any], labels: Sequence[str]) -> Tensor:
        """(inputs, labels) nats, on the CPU."""
        prompt = self._prompt()
        texts = [prompt.render(x) for x in inputs]
        written = [prompt.calls(inputs[0], label)[-1].completion for label in labels]
        ids = encode_labels(written, prompt.model, prompt.completion_controls)  # type: ignore[attr-defined] # likewise
        return _scores(prompt, texts, ids)


def classified(prompt: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Classification]:
    """What `classify` says of prompts that are rendered already, as those of a composed chain's last call are.

    Args:
        prompt: Has `model`, `adds_special_tokens` and `completion_controls`.
        texts: What the model reads, up to where its answer begins.
        labels: As in `classify`.

    Raises:
        LabelError: As `classify`.
        PromptTooLongError: As `classify`.
    """
    known = checked_labels(labels)
    ids = encode_labels(known, prompt.model, prompt.completion_controls)
    return _classifications(_scores(prompt, texts, ids).double(), known)


def _classifications(scores: Tensor, labels: Sequence[str]) -> list[Classification]:
    found = [dict(zip(labels, row, strict=True)) for row in scores.softmax(1).tolist()]
    return [Classification(max(p, key=p.__getitem__), p) for p in found]


@torch.inference_mode()
def _scores(prompt: Any, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> Tensor:
    model = prompt.model
    ids = model.encode(list(texts), add_special_tokens=prompt.adds_special_tokens)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that little is padded
    with model.exclusive(), evaluating(model.module):
        found = answer_scores(model, [ids[i] for i in order], answers).cpu()
    return found[torch.tensor(order).argsort()]


def _check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        msg = f"temperature is a number above 0, got {temperature!r:.80}. fit_temperature finds one."
        raise ConfigError(msg)


def _best_temperature(scores: Tensor, targets: Tensor) -> float:
    """Bisects the derivative of the loss in β = 1/T, in which it is convex."""
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    right = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    for _ in range(60):
        beta = (low * high) ** 0.5
        slope = (((scores * beta).softmax(1) * scores).sum(1) - right).mean()
        low, high = (beta, high) if slope < 0 else (low, beta)
    return float(1 / (low * high) ** 0.5)
