"""Encoder: examples, some at a time, become rows of token ids in flat arrays; what became of each is counted.

Knows tokenizers, prompts and limits. Knows nothing of where examples come from, or of batches.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llmchain_fed.data.examples import Example, PromptRow, RawText, calls_of
from llmchain_fed.data.prompt import Call, Prompt
from llmchain_fed.data.report import DataReport
from llmchain_fed.data.sayable import Saying
from llmchain_fed.errors import DataError, ExampleFailedError
from llmchain_fed.model.control_tokens import Rendered
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import check_rows

ROWS = 512
"""examples that become tokens at a time: a tokenizer is quick with many, and the texts of all take memory"""
Row = Sequence[list[int]]
"""Token ids by turns: what the model reads, what it learns to answer, what it reads then …"""
_T = TypeVar("_T")


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of so many items, the last of what is left; as itertools has it from Python 3.12 on."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


class Encoder:
    """Makes rows of examples; see `encode_examples` for what becomes of which.

    Args:
        model: Its tokenizer and context decide.
        prompt: What renders examples; None for final text.
        max_length: tokens; longer examples are left out.
    """

    def __init__(self, model: LocalModel, prompt: Prompt | None, max_length: int | None) -> None:
        self._model, self._prompt = model, prompt
        self._limit = min((limit for limit in (max_length, model.context_length) if limit is not None), default=None)
        self._special = prompt.adds_special_tokens if prompt is not None else True
        self._controls: Collection[str] = prompt.completion_controls if prompt is not None else ()
        self._known = {*model.control_tokens(), *self._controls}
        self._saying = Saying(model, prompt)
        self._tokens, self._bounds, self._starts = array("i"), array("q", [0]), array("q", [0])
        self._seen = array("q")  # hashes of calls: of texts themselves there would be all
        self._report = DataReport()
        self.first_left_out = ""
        self.ignored: dict[str, None] = {}
        """names of columns that nobody reads"""

    @property
    def report(self) -> DataReport:
        """What became of the examples so far."""
        report = self._report
        report.duplicate = len(self._seen) - len(np.unique(np.frombuffer(self._seen, dtype=np.int64)))
        report.without_end = report.used if not self._model.eos_ids else 0
        report.ignored_columns, report.ignored_names = len(self.ignored), tuple(self.ignored)
        return report

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens, bounds and starts of `EncodedExamples`; not copied, so nothing can be added from now on."""
        tokens = (
            torch.frombuffer(self._tokens, dtype=torch.int32) if self._tokens else torch.zeros(0, dtype=torch.int32)
        )
        bounds, starts = (torch.frombuffer(each, dtype=torch.int64) for each in (self._bounds, self._starts))
        return tokens, bounds, starts

    def add(self, examples: Sequence[tuple[str, Example | RawText]]) -> None:
        """Makes rows of some more examples, each with the place where it stands.

        Raises:
            DataError: One cannot be rendered.
            UnsupportedModelError: The model's embedding has no row for some token.
        """
        asked = list(self._asked(examples))
        texts = [call.text for calls, *_ in asked for call in calls]
        prompt_ids = self._model.encode(texts, add_special_tokens=self._special)
        completions = [call.completion for calls, *_ in asked for call in calls]
        completion_ids = self._model.encode_completions(completions, controls=self._controls)
        check_rows(self._model, prompt_ids, completion_ids)
        pairs = iter(zip(prompt_ids, completion_ids, strict=True))
        for calls, kind, place in asked:
            self._take([(call, *pair) for call, pair in zip(calls, pairs, strict=False)], kind, place)

    def _asked(self, examples: Iterable[tuple[str, Example | RawText]]) -> Iterator[tuple[Sequence[Call], str, str]]:
        """The calls of every example with its kind and place; those that make none are counted."""
        for place, example in examples:
            if example.empty:  # not rendered: a missing list of messages, for one, is nothing that a prompt takes
                self._report.empty += 1
                continue
            try:
                calls = calls_of(example, self._prompt)
            except ExampleFailedError as error:
                self._report.failed += 1
                self.first_left_out = self.first_left_out or f"{place}: {error}"
                continue
            except DataError as error:
                raise type(error)(f"{place}: {error}") from None  # noqa: EM102
            kind = "prompt_as_input" if isinstance(example, PromptRow) else ""
            yield calls, "raw" if isinstance(example, RawText) else kind, place

    def _take(self, asked: list[tuple[Call, list[int], list[int]]], kind: str, place: str) -> None:
        """The rows of one example, or the reason why it has none."""
        report, causal = self._report, self._model.kind == "causal"
        if not all(call.completion.strip() and p for call, p, _ in asked):
            report.empty += 1
            return
        rows: Sequence[Row] = turns([(p, c) for _, p, c in asked]) if causal else [(p, c) for _, p, c in asked]
        longest = max((sum(map(len, row)) if causal else max(map(len, row)) for row in rows), default=0)
        if self._limit is not None and longest > self._limit:
            report.too_long += 1
            return
        tests = [(call, c, self._saying.of(call.options)) for call, _, c in asked]
        unsaid = ((call, c, test, why) for call, c, test in tests if (why := test.fails(call.completion, c)))
        if failing := next(unsaid, None):
            call, c, test, why = failing
            setattr(report, why, getattr(report, why) + 1)
            self.first_left_out = self.first_left_out or f"{place}: {test.explain(call.completion, c, why)}"
            return
        self._seen.append(hash(tuple((call.text, call.completion) for call, _, _ in asked)))
        report.used += len(rows)
        report.length_out_of_range += any(test.out_of_range(c) for _, c, test in tests)
        report.raw += self._prompt is not None and kind == "raw"
        report.prompt_as_input += self._prompt is not None and kind == "prompt_as_input"
        spelled = (isinstance(call.text, Rendered) or _spells(call.completion, self._known) for call, _, _ in asked)
        report.control_text += any(spelled)
        report.completion_tokens += sum(len(c) for _, _, c in asked)
        for row in rows:
            for segment in row:
                self._tokens.extend(segment)
                self._bounds.append(len(self._tokens))
            self._starts.append(len(self._bounds) - 1)


def _spells(completion: str, known: Collection[str]) -> bool:
    """Whether a completion spells a control token where its author is not the template."""
    return bool(completion.foreign) if isinstance(completion, Rendered) else any(c in completion for c in known)


def turns(calls: Sequence[tuple[list[int], list[int]]]) -> list[Row]:
    """(prompt ids, completion ids) of an example's calls → its rows; a call that reads on from a row continues it.

    >>> turns([([1, 2], [3]), ([1, 2, 3, 4], [5]), ([1, 9], [6])])
    [[[1, 2], [3], [4], [5]], [[1, 9], [6]]]
    """
    rows: list[list[list[int]]] = []
    read: list[int] = []
    for p, c in calls:
        if rows and len(p) > len(read) and p[: len(read)] == read:
            rows[-1] += [p[len(read) :], c]
        else:
            rows.append([p, c])
        read = p + c
    return rows  # type: ignore[return-value]
