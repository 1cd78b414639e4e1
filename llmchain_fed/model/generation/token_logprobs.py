"""How probable each token of an answer was, and which others might have stood there, in OpenAI's form.

Knows causal models and their answers. Knows nothing about LangChain or messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmchain_fed._config import FrozenConfig
from llmchain_fed.errors import ConfigError
from llmchain_fed.model.generation.answers import Completion, evaluating
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.token_texts import pieces
from llmchain_fed.model.tokens import pad_rows

_ROWS = 8  # rows of a forward pass: its logits are as large as the vocabulary


class AnswerForm(FrozenConfig):
    """What a call wants to have of its answers, beside their text.

    >>> AnswerForm(logprobs=True, top_logprobs=2).n
    1
    """

    n: int = Field(default=1, ge=1, le=128)
    """so many answers to the same messages; they differ where `temperature` is above 0"""
    logprobs: bool = Field(default=False, strict=True)
    """whether each token's log-probability comes along"""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """so many of the most probable tokens at each place, with theirs"""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            msg = "top_logprobs come along with logprobs. Pass logprobs=True, too."
            raise ConfigError(msg)
        return self

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> AnswerForm:
        """The form that a call's keywords ask for.

        Raises:
            ConfigError: A value out of range, or `top_logprobs` without `logprobs`.
        """
        return cls(**{name: kwargs[name] for name in cls.model_fields if kwargs.get(name) is not None})


def openai_logprobs(
    model: LocalModel, prompt: str, answers: Sequence[Completion], *, top: int, add_special_tokens: bool
) -> list[dict[str, Any]]:
    """The tokens of each answer with their log-probabilities (nats), as OpenAI's chat completions have them.

    They are those of the model's own distribution, before temperature, top-p or a penalty, given all that stands before
    the token. The tokens joined are the answer as the model wrote it, its reasoning included, up to a stop string; the
    end token is none of them. https://platform.openai.com/docs/api-reference/chat/object

    Args:
        model: What answered; causal.
        prompt: What it read.
        answers: What it answered.
        top: So many of the most probable tokens at each place.
        add_special_tokens: As when it answered.
    """
    (read,) = model.encode([prompt], add_special_tokens=add_special_tokens)
    found: list[dict[str, Any]] = []
    for at in range(0, len(answers), _ROWS):
        some = answers[at : at + _ROWS]
        for answer, logprobs in zip(some, _logprobs(model, read, [a.ids for a in some]), strict=True):
            found.append({"content": _content(model, answer, logprobs, top), "refusal": None})
    return found


@torch.inference_mode()
def _logprobs(model: LocalModel, read: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens, vocabulary) nats of each answer, on the CPU; padding stands on the right, where nothing reads it."""
    ids, mask = pad_rows([[*read, *answer] for answer in answers], model.pad_id, left=False)
    with model.exclusive(), evaluating(model.module):
        output: Any = model.module(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        logits = output.logits[:, len(read) - 1 :].float().log_softmax(-1).cpu()
    return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]


def _content(model: LocalModel, answer: Completion, logprobs: Tensor, top: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    told = 0
    for token, text, row in zip(answer.ids, pieces(model.tokenizer, answer.ids), logprobs, strict=True):
        if told >= len(answer.text):  # behind a stop string
            break
        told += len(text)
        best = row.topk(min(top, len(row)))
        others = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        entry = _entry(text, float(row[token]))
        entry["top_logprobs"] = [_entry(pieces(model.tokenizer, [i])[0], value) for value, i in others]
        found.append(entry)
    return found


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}
