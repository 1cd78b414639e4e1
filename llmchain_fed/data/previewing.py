"""Makes previews: examples of any form → the very rows that training takes, with what each token says.

Knows encoding and tokenizers. Knows nothing about LangChain or how a preview is drawn; where a call's text came from
it is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmchain_fed.data.encoder import Row
from llmchain_fed.data.encoding import IGNORE, EncodedExamples, encode_examples
from llmchain_fed.data.examples import Example, RawText, calls_of, read_examples
from llmchain_fed.data.preview import Preview, PreviewExample, PreviewToken
from llmchain_fed.data.prompt import Call, Prompt
from llmchain_fed.errors import DataError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.token_texts import pieces

RAW = "raw text"
TOKENIZER = "the tokenizer's own"
_NEAR = 24  # characters: so far on a token's text is looked for, where something was normalised away


@dataclass(frozen=True)
class Span:
    """A piece of the text that a call reads, and where it came from."""

    start: int
    end: int
    source: str


Sources = Callable[[Example | RawText, Sequence[Call]], Sequence[Sequence[Span]]]
"""an example and its calls → for each call the pieces of its text, in order; of pieces within pieces the later count"""


def previewed(
    source: Any,
    model: LocalModel,
    prompt: Prompt | None = None,
    *,
    count: int = 1,
    max_length: int | None = None,
    sources: Sources | None = None,
) -> Preview:
    """What is learnt of the first `count` usable examples of a source; and of the first that is left out, why.

    Args:
        source: What `encode_examples` takes.
        model: Its tokenizer and context decide.
        prompt: What makes calls of an example; None for final text.
        count: So many examples that are learnt from.
        max_length: As in training.
        sources: Where texts came from; without it that is not told.

    Raises:
        DataError: See `read_examples`.
        UnsupportedModelError: The model's embedding has no row for some token.
    """
    shown: list[PreviewExample] = []
    used = left_out = 0
    for number, example in enumerate(read_examples(source, prompt)):
        if used >= count:
            break
        found = encode_examples([example], model, prompt, max_length=max_length)
        if len(found):
            used += 1
            shown.append(PreviewExample(f"example {number}", tuple(_rows(example, found, model, prompt, sources))))
        elif not left_out:
            left_out += 1
            shown.append(PreviewExample(f"example {number}", (), _why(found, model, max_length)))
    notes = [] if model.eos_ids else ["the model has no end token, so no answer learns where to end"]
    return Preview(tuple(shown), tuple(notes))


def preview_of_rows(rows: Iterable[Row], model: LocalModel, count: int) -> Preview:
    """The same of rows that are tokens already; where they came from is not known any more."""
    shown = []
    for number, row in enumerate(itertools.islice(rows, count)):
        tokens = [
            PreviewToken(i, text, learnt=bool(at % 2), source="read")
            for at, ids in enumerate(row)
            for i, text in zip(ids, pieces(model.tokenizer, ids), strict=True)
        ]
        shown.append(PreviewExample(f"row {number}", (tuple(tokens),)))
    return Preview(tuple(shown))


def preview_of_batches(loader: Any, model: LocalModel, count: int) -> Preview:
    """The same of a DataLoader, whose first batch is drawn: its labels say what is learnt.

    Raises:
        DataError: The batch has no ids, or no labels.
    """
    batch: Any = next(iter(loader), None)
    try:
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        mask = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in ids]
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        msg = f"the first batch of the DataLoader cannot be shown ({error!r:.80}): give it input_ids and labels."
        raise DataError(msg) from None
    shown = []
    for number, (row, wanted, seen) in enumerate(itertools.islice(zip(ids, labels, mask, strict=True), count)):
        read = [(i, label) for i, label, there in zip(row, wanted, seen, strict=False) if there or label != IGNORE]
        parts = [(i, model.kind == "causal" and label != IGNORE) for i, label in read]
        if model.kind == "seq2seq":
            parts = [(i, False) for i, there in zip(row, seen, strict=True) if there]
            parts += [(label, True) for label in wanted if label != IGNORE]
        texts = pieces(model.tokenizer, [i for i, _ in parts])
        tokens = [
            PreviewToken(i, text, learnt, "the DataLoader") for (i, learnt), text in zip(parts, texts, strict=True)
        ]
        shown.append(PreviewExample(f"row {number}", (tuple(tokens),)))
    return Preview(tuple(shown))


def _rows(
    example: Example | RawText,
    found: EncodedExamples,
    model: LocalModel,
    prompt: Prompt | None,
    sources: Sources | None,
) -> Iterator[tuple[PreviewToken, ...]]:
    """The rows of one example; the n-th segment that is learnt answers its n-th call."""
    calls = calls_of(example, prompt)
    if isinstance(example, RawText):
        told: Sequence[Sequence[Span]] = [[Span(0, len(call.text), RAW)] for call in calls]
    else:
        told = sources(example, calls) if sources is not None else [()] * len(calls)
    pairs = iter(zip(calls, told, strict=True))
    for row in (found[i] for i in range(len(found))):
        tokens: list[PreviewToken] = []
        for read, learnt in zip(row[::2], row[1::2], strict=True):
            call, spans = next(pairs)
            # aligned from the row's beginning, for a later call's text begins there, too
            ids = [token.id for token in tokens] + read if model.kind == "causal" else read
            where = _aligned(pieces(model.tokenizer, ids), call.text, spans)[len(ids) - len(read) :]
            texts = pieces(model.tokenizer, read)
            tokens += [PreviewToken(i, t, learnt=False, source=s) for i, t, s in zip(read, texts, where, strict=True)]
            texts = pieces(model.tokenizer, learnt)
            tokens += [PreviewToken(i, t, learnt=True, source="") for i, t in zip(learnt, texts, strict=True)]
        yield tuple(tokens)


def _why(found: EncodedExamples, model: LocalModel, max_length: int | None) -> str:
    if found.report.too_long:
        most = min(limit for limit in (max_length, model.context_length) if limit is not None)
        return f"it is longer than {most:,} tokens"
    if found.report.empty:
        return "its completion, its prompt or a variable is missing or blank"
    return found.first_left_out


def _aligned(texts: Sequence[str], text: str, spans: Sequence[Span]) -> list[str]:
    """Where each token came from: the span in which its first character that is no space stands.

    Tokens that the text does not have are the tokenizer's own: a token that begins every text, say.
    """
    marks = ["" for _ in text]
    for span in spans:
        marks[span.start : span.end] = [span.source] * (span.end - span.start)
    found, at = [], 0
    waiting = 0
    for piece in texts:
        if not piece:  # a part of the character that comes next
            waiting += 1
            continue
        bare = piece.strip()
        begin = at if text.startswith(piece, at) else text.find(bare, at, at + len(bare) + _NEAR) if bare else -1
        if begin < 0 and not bare and text[at : at + 1].isspace():
            begin = at
        if begin < 0:
            source = TOKENIZER
        else:
            end = begin + (len(piece) if text.startswith(piece, begin) else len(bare))
            inked = next((i for i in range(begin, min(end, len(text))) if not text[i].isspace()), begin)
            source = marks[inked] if inked < len(marks) else ""
            at = end
        found += [source] * (waiting + 1)
        waiting = 0
    return found + [found[-1] if found else ""] * waiting
