"""Turns (inputs, completion) examples into token ids, and those into padded batches with the prompt masked.

Knows tokenizers and padding. Knows nothing about LangChain, participants or optimizers; what an example may look like
stands in `examples`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.data.examples import (
    Examples,
    Prompt,
    PromptRow,
    RawText,
    is_ready_tensors,
    prompt_text,
    read_examples,
)
from llmchain_fed.data.report import DataReport
from llmchain_fed.data.sayable import Saying
from llmchain_fed.errors import DataError, EmptyParticipantError, UnsayableError, UnsupportedModelError
from llmchain_fed.model.control_tokens import Rendered
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import check_rows, pad_rows

IGNORE = -100
"""The label that the loss passes over: torch's and transformers' own convention."""


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of all usable examples in one flat tensor, eight numbers of overhead an example.

    `tokens` contains prompt and completion ids alternately; example i's prompt is `tokens[bounds[2i]:bounds[2i+1]]` and
    its completion (with the end token) `tokens[bounds[2i+1]:bounds[2i+2]]`.
    """

    tokens: Tensor = field(repr=False)  # (sum of lengths,) int32
    bounds: Tensor = field(repr=False)  # (2 * examples + 1,) int64
    report: DataReport = field(default_factory=DataReport)
    unsayable: str = ""
    """the first completion that no answer could be, and why; empty where there is none"""

    def __len__(self) -> int:
        return (len(self.bounds) - 1) // 2

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        if not -len(self) <= i < len(self):
            msg = f"there is no row {i}: {len(self):,} examples have the rows 0 to {len(self) - 1}."
            raise IndexError(msg)
        i %= len(self)
        start, middle, end = self.bounds[2 * i : 2 * i + 3].tolist()
        return self.tokens[start:middle].tolist(), self.tokens[middle:end].tolist()

    def lengths(self) -> list[int]:
        """tokens: prompt and completion together, per example."""
        return (self.bounds[2::2] - self.bounds[:-1:2]).tolist()


def encode_examples(
    source: Examples, model: LocalModel, prompt: Prompt | None = None, *, max_length: int | None = None
) -> EncodedExamples:
    """Renders and tokenises every example; prompt and completion apart, joined as ids, the end token appended.

    The forms are those of `read_examples`. What has more than `max_length` tokens is left out and counted; the model's
    context is the outer limit.

    Raises:
        DataError: See `read_examples`.
        UnsupportedModelError: The model's embedding has no row for some token.
    """
    report, texts, completions, kinds = DataReport(), [], [], []
    for number, example in enumerate(read_examples(source, prompt)):
        if example.empty:  # not rendered: a missing list of messages, for one, is nothing that a prompt takes
            report.empty += 1
            continue
        try:
            texts.append(prompt_text(example, prompt))
        except DataError as error:
            raise type(error)(f"example {number}: {error}") from None  # noqa: EM102
        completions.append(example.completion)
        kinds.append(
            "raw" if isinstance(example, RawText) else "prompt_as_input" if isinstance(example, PromptRow) else ""
        )
    special = prompt.adds_special_tokens if prompt is not None else True
    controls = prompt.completion_controls if prompt is not None else ()
    prompt_ids = model.encode(texts, add_special_tokens=special)
    completion_ids = model.encode_completions(completions, controls=controls)
    check_rows(model, prompt_ids, completion_ids)
    known = {*model.control_tokens(), *controls}
    saying = Saying(model, prompt)

    limits = [limit for limit in (max_length, model.context_length) if limit is not None]
    flat, bounds, seen, first = [], [0], set(), ""
    rows = zip(texts, completions, kinds, prompt_ids, completion_ids, strict=True)
    for text, completion, kind, p, c in rows:
        longest = len(p) + len(c) if model.kind == "causal" else max(len(p), len(c))
        if not completion.strip() or not p:
            report.empty += 1
            continue
        if limits and longest > min(limits):
            report.too_long += 1
            continue
        if (unsaid := saying.fails(completion, c)) is not None:
            setattr(report, unsaid, getattr(report, unsaid) + 1)
            first = first or saying.explain(completion, c, unsaid)
            continue
        report.duplicate += (text, completion) in seen
        seen.add((text, completion))
        report.used += 1
        report.length_out_of_range += saying.out_of_range(c)
        report.raw += prompt is not None and kind == "raw"
        report.prompt_as_input += prompt is not None and kind == "prompt_as_input"
        report.control_text += isinstance(text, Rendered) or any(c in completion for c in known)
        report.completion_tokens += len(c)
        flat += p + c
        bounds += [bounds[-1] + len(p), bounds[-1] + len(p) + len(c)]
    return EncodedExamples(torch.tensor(flat, dtype=torch.int32), torch.tensor(bounds), report, first)


def encoded(
    examples: Examples | EncodedExamples,
    model: LocalModel,
    prompt: Prompt | None,
    max_length: int | None,
    *,
    tolerance: float | None = None,
) -> EncodedExamples | Any:
    """Examples in the form the loop takes; a DataLoader stays as it is.

    Examples of more than `max_length` tokens are left out, and those that no answer could be, which may be the share
    `tolerance` of all; None is any.

    Raises:
        EmptyParticipantError: Not a single example is usable.
        UnsayableError: More completions than `tolerance` could never be an answer.
        DataError: See `read_examples`.
    """
    if is_ready_tensors(examples):
        return examples
    data = (
        examples
        if isinstance(examples, EncodedExamples)
        else encode_examples(examples, model, prompt, max_length=max_length)
    )
    left_out = data.report.unsayable
    total = left_out + data.report.used
    if tolerance is not None and left_out > tolerance * total:
        msg = (
            f"{left_out} of {total} completions could never be an answer, and up to {tolerance:.0%} are left out. "
            f"The first: {data.unsayable} TrainingConfig(tolerance=…) leaves more out."
        )
        raise UnsayableError(msg)
    if not len(data):
        raise EmptyParticipantError(no_examples("the participant", repr(data.report)))
    return data


def no_examples(who: str, report: str) -> str:
    """The sentence for `EmptyParticipantError`."""
    return f"{who} has no usable example ({report}): there is nothing to learn. Check the data path and max_length."


def collate(rows: Sequence[tuple[list[int], list[int]]], model: LocalModel) -> dict[str, Tensor]:
    """Prompt and completion ids → a batch; the prompt's labels are −100 by length.

    For a causal model `([5, 6], [7, 2])` and `([5], [8, 2])` become::

        input_ids [[5, 6, 7, 2], [5, 8, 2, pad]]   labels [[-100, -100, 7, 2], [-100, 8, 2, -100]]

    For seq2seq the prompt is the encoder's input and the completion the labels.
    """
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    if model.kind == "seq2seq":
        input_ids, mask = pad_rows(prompts, model.pad_id, left=False)
        labels, _ = pad_rows(completions, IGNORE, left=False)
    else:
        input_ids, mask = pad_rows([p + c for p, c in rows], model.pad_id, left=False)
        labels, _ = pad_rows([[IGNORE] * len(p) + c for p, c in rows], IGNORE, left=False)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


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


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors where the module is.

    Raises:
        DataError: The batch is no mapping with labels.
    """
    check_ready(batch)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def check_ready(batch: object) -> None:
    """Makes sure that a batch is what a loss can be computed of.

    Raises:
        DataError: The batch is no mapping with labels.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        msg = (
            f"a batch is a mapping of the tensors input_ids, attention_mask and labels, got {got}. "
            "Let the DataLoader's collate_fn return such mappings."
        )
        raise DataError(msg)


def unwrap(model: Any, prompt: Prompt | None) -> tuple[LocalModel, Prompt | None]:
    """The LocalModel in what may be a chain or a face, and what renders its prompts: itself unless another is given.

    Raises:
        UnsupportedModelError: It is neither a LocalModel nor has one as `.model`.
    """
    if isinstance(model, LocalModel):
        return model, prompt
    inner = getattr(model, "model", None)
    if not isinstance(inner, LocalModel):
        msg = (
            f"expected a LocalModel or a chain over one, got {type(model).__name__}. Wrap a module as "
            "LocalModel(module, tokenizer)."
        )
        raise UnsupportedModelError(msg)
    renders = getattr(model, "as_prompt", None)
    return inner, prompt if prompt is not None or renders is None else renders()
