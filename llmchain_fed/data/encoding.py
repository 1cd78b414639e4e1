"""Turns (inputs, completion) examples into token ids, and those into padded batches with the prompt masked.

Knows tokenizers and padding. Knows nothing about LangChain, participants or optimizers; what an example may look like
stands in `examples`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.data import cache
from llmchain_fed.data.encoder import ROWS, Encoder, Row, batched
from llmchain_fed.data.examples import Examples, is_ready_tensors, placed_examples
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.report import DataReport
from llmchain_fed.data.sources.columns import Mapped
from llmchain_fed.data.sources.progress import bar_of
from llmchain_fed.errors import (
    DataError,
    EmptyParticipantError,
    ExampleFailedError,
    UnsayableError,
    UnsupportedModelError,
)
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import pad_rows

_LOOKED_AT = 8
"""examples of what a cache has that are encoded anew"""
IGNORE = -100
"""The label that the loss passes over: torch's and transformers' own convention."""


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of all usable examples in one flat tensor, some numbers of overhead an example.

    A row is made of segments that are read and learnt by turns: a prompt and its completion (with the end token), and
    of a conversation what follows. Segment s is `tokens[bounds[s]:bounds[s + 1]]`; row i has the segments `starts[i]`
    to `starts[i + 1]`.
    """

    tokens: Tensor = field(repr=False)  # (sum of lengths,) int32
    bounds: Tensor = field(repr=False)  # (segments + 1,) int64
    starts: Tensor = field(repr=False)  # (rows + 1,) int64
    report: DataReport = field(default_factory=DataReport)
    first_left_out: str = ""
    """the first example that was left out because no answer could be its completion, or the chain failed, and why"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[list[int], ...]:
        if not -len(self) <= i < len(self):
            msg = f"there is no row {i}: {len(self):,} examples have the rows 0 to {len(self) - 1}."
            raise IndexError(msg)
        i %= len(self)
        first, last = self.starts[i : i + 2].tolist()
        bounds = self.bounds[first : last + 1].tolist()
        return tuple(self.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds))

    def lengths(self) -> list[int]:
        """tokens: all segments together, per row."""
        ends = self.bounds[self.starts]
        return (ends[1:] - ends[:-1]).tolist()


def encode_examples(
    source: Examples,
    model: LocalModel,
    prompt: Prompt | None = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str | int] | None = None,
    progress: str | None = None,
) -> EncodedExamples:
    """Renders and tokenises every example; prompt and completion apart, joined as ids, the end token appended.

    The forms are those of `read_examples`, and so are `columns`. They are read once, some at a time: beside the ids
    memory is taken for those alone. Ids of large files are kept on the disk for the next start (docs/data.md). What has
    more than `max_length` tokens is left out and counted; the model's context is the outer limit. Where an example
    makes several calls of the model, those that go on from one another share a row, and every row counts.

    Args:
        source: Where the examples are.
        model: Its tokenizer and context decide.
        prompt: What renders them; None for final text.
        max_length: tokens.
        columns: As in `read_examples`.
        progress: What a bar on stderr is called, which appears where this takes longer than a second; None is none.

    Raises:
        DataError: See `read_examples`.
        UnsupportedModelError: The model's embedding has no row for some token.
    """
    mapped, encoder = Mapped.of(source, columns), Encoder(model, prompt, max_length)
    place = cache.place_of(mapped, model, prompt, max_length)
    if place is not None and (kept := place.load()) is not None:
        found = EncodedExamples(*kept[0], *kept[1:])
        if _begins_alike(found, Encoder(model, prompt, max_length), mapped, prompt):
            return found
    with bar_of(progress, mapped.source) as advance:
        for some in batched(placed_examples(mapped, prompt, ignored=encoder.ignored), ROWS):
            encoder.add([(place, example) for place, _, example in some])
            advance(len(some))
    found = EncodedExamples(*encoder.arrays(), encoder.report, encoder.first_left_out)
    if place is not None:
        place.save((found.tokens, found.bounds, found.starts), found.report, found.first_left_out)
    return found


def _begins_alike(found: EncodedExamples, encoder: Encoder, mapped: Mapped, prompt: Prompt | None) -> bool:
    """Whether the first examples, encoded anew, are what a cache has: else something has changed that it cannot see."""
    first = itertools.islice(placed_examples(mapped, prompt), _LOOKED_AT)
    encoder.add([(place, example) for place, _, example in first])
    rows = EncodedExamples(*encoder.arrays())
    return len(rows) <= len(found) and all(rows[at] == found[at] for at in range(len(rows)))


def encoded(
    examples: Examples | EncodedExamples,
    model: LocalModel,
    prompt: Prompt | None,
    max_length: int | None,
    *,
    tolerance: float | None = None,
    progress: str | None = None,
    whose: str = "the participant",
) -> EncodedExamples | Any:
    """Examples in the form the loop takes; a DataLoader stays as it is.

    Examples of more than `max_length` tokens are left out, and those that no answer could be, which may be the share
    `tolerance` of all; None is any. An error that there are none says `whose`.

    Raises:
        EmptyParticipantError: Not a single example is usable.
        ExampleFailedError: A composed chain raises for more examples than `tolerance`.
        UnsayableError: More completions than `tolerance` could never be an answer.
        DataError: See `read_examples`.
    """
    if is_ready_tensors(examples):
        return examples
    data = (
        examples
        if isinstance(examples, EncodedExamples)
        else encode_examples(examples, model, prompt, max_length=max_length, progress=progress)
    )
    left_out, unsayable = data.report.left_out, data.report.unsayable
    total = left_out + data.report.used
    if tolerance is not None and left_out > tolerance * total:
        what = f"{unsayable} of {total} completions could never be an answer" if unsayable else ""
        failed = f"the chain fails for {data.report.failed} of {total} examples" if data.report.failed else ""
        msg = (
            f"{', and '.join(filter(None, (what, failed)))}, and up to {tolerance:.0%} are left out. "
            f"The first: {data.first_left_out} TrainingConfig(tolerance=…) leaves more out."
        )
        raise (UnsayableError if unsayable else ExampleFailedError)(msg)
    if not len(data):
        raise EmptyParticipantError(no_examples(whose, data.report))
    return data


def no_examples(who: str, report: DataReport | str) -> str:
    """The sentence for `EmptyParticipantError`, with the remedy of what has left the examples out."""
    remedy = "Check the data path and max_length"
    if isinstance(report, DataReport):
        ways = {
            "Fill the prompt, the variables and the completion of each": report.empty,
            "Raise max_length, or write shorter ones": report.too_long,
            "See why with preview(…)": report.left_out,
        }
        remedy = ". ".join(way for way, count in ways.items() if count) or "Give it some: the source has no row"
    return f"{who} has no usable example ({report}): there is nothing to learn or to measure. {remedy}."


def collate(rows: Sequence[Row], model: LocalModel) -> dict[str, Tensor]:
    """Rows of ids → a batch; the labels of what is read are −100 by length.

    For a causal model `([5, 6], [7, 2])` and `([5], [8, 2])` become::

        input_ids [[5, 6, 7, 2], [5, 8, 2, pad]]   labels [[-100, -100, 7, 2], [-100, 8, 2, -100]]

    For seq2seq the prompt is the encoder's input and the completion the labels.
    """
    if model.kind == "seq2seq":
        input_ids, mask = pad_rows([row[0] for row in rows], model.pad_id, left=False)
        labels, _ = pad_rows([row[1] for row in rows], IGNORE, left=False)
    else:
        input_ids, mask = pad_rows([[i for ids in row for i in ids] for row in rows], model.pad_id, left=False)
        labels, _ = pad_rows([labels_of(row) for row in rows], IGNORE, left=False)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def labels_of(row: Row) -> list[int]:
    """The labels of a row of a causal model: every other segment is learnt."""
    return [i if at % 2 else IGNORE for at, ids in enumerate(row) for i in ids]


@dataclass(frozen=True)
class Batch:
    """What one optimizer step is made of: rows of examples, possibly none, or ready tensors."""

    rows: Sequence[Row] | None
    """the ids of each example; None where a DataLoader gave the tensors"""
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


def controls_of(prompt: Prompt | None) -> Collection[str]:
    """Control tokens, beside the model's own, that a completion cannot write."""
    return prompt.completion_controls if prompt is not None else ()


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
            "LocalModel(module, tokenizer); a composed chain is trained by FederatedAveraging(chain, …), also of one "
            "participant, and measured by its `evaluate`."
        )
        raise UnsupportedModelError(msg)
    renders = getattr(model, "as_prompt", None)
    return inner, prompt if prompt is not None or renders is None else renders()
