"""The two sides of a source that is divided: what is trained on, and what is held out.

Knows rows, examples and their prompts. Knows nothing about participants, rounds or tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmchain_fed.data import cache
from llmchain_fed.data.examples import Example, Examples, Placed, RawText, placed_examples, prompt_text
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.sources.columns import Mapped
from llmchain_fed.data.sources.files import identity
from llmchain_fed.data.sources.missing import is_blank
from llmchain_fed.data.sources.readers import reads_again
from llmchain_fed.data.split import Split, moment, position, text_of
from llmchain_fed.errors import DataError, EmptyParticipantError, ExampleFailedError
from llmchain_fed.untrusted import shown

_LOOKED_AT = 8
"""rows of what a cache has whose sides are found anew"""
_TRIED = 100  # seeds, for one that would serve
_KEPT = 64  # keys, to try them with


def divide(source: Examples, prompt: Prompt | None, split: Split, seed: int, who: str) -> tuple[Examples, Examples]:
    """What is trained on and what is held out of a source.

    A table stays where it is and is read again for each side; of what can be read only once the examples are kept.
    Empty examples are on the side that is trained on, where they are counted.

    Args:
        source: What `read_examples` takes.
        prompt: What renders the examples.
        split: Which are held out.
        seed: Where the split has none of its own.
        who: The participant's name, for errors.

    Raises:
        DataError: The source cannot be read, a row has no key or time, or the column is missing.
        EmptyParticipantError: One of the sides would be empty.
    """
    mapped, seed = Mapped.of(source), split.seed if split.seed is not None else seed
    before = identity(Path(mapped.source)) if isinstance(mapped.source, (str, Path)) else None
    rule = (_ByTime if split.time is not None else _ByKey)(split, seed, prompt)
    if not reads_again(mapped.source) or isinstance(mapped.source, (list, tuple)):
        kept: list[Example | RawText] = []
        marks = _marked(mapped, rule, prompt, who, kept)
        apart = [example for example, mark in zip(kept, marks, strict=True) if mark]
        return [example for example, mark in zip(kept, marks, strict=True) if not mark], apart
    place = cache.place_of_marks(mapped, prompt, split, seed)
    known = place.load() if place is not None else None
    if known is None or not _begins_alike(mapped, rule, prompt, known):
        known = _marked(mapped, rule, prompt, who), rule.start
        if place is not None:
            place.save(*known)
    marks, rule.start = known
    return Side(mapped, marks, 0, rule, before), Side(mapped, marks, 1, rule, before)


def _marked(
    mapped: Mapped, rule: _ByKey | _ByTime, prompt: Prompt | None, who: str, kept: list[Example | RawText] | None = None
) -> bytes:
    """1 for each example that is held out, 0 for the others; the examples go to `kept`."""
    for place, row, example in placed_examples(mapped, prompt, beside=rule.split.columns):
        if kept is not None:
            kept.append(example)
        try:
            rule.add(row, example)
        except DataError as error:
            raise type(error)(f"{place}: {error}") from None  # noqa: EM102
    return rule.marks(who)


def _begins_alike(mapped: Mapped, rule: _ByKey | _ByTime, prompt: Prompt | None, known: tuple[bytes, float]) -> bool:
    """Whether the first rows are on the sides that a cache has: else something has changed that it cannot see."""
    marks, rule.start = known
    first = itertools.islice(placed_examples(mapped, prompt, beside=rule.split.columns), _LOOKED_AT)
    return all(at < len(marks) and rule.side(row, example) == marks[at] for at, (_, row, example) in enumerate(first))


class Side(Placed):
    """One side of a table that is divided: its examples, read from the table as often as they are asked for."""

    def __init__(
        self, source: Mapped, marks: bytes, mark: int, rule: _ByKey | _ByTime, before: tuple[int, ...] | None
    ) -> None:
        self.source, self.marks, self.mark = source, marks, mark
        self._before, self._beside = before, rule.split.columns
        self._rule = rule if before is None else None  # a file is known by its identity

    def __len__(self) -> int:
        return self.marks.count(self.mark)

    def __repr__(self) -> str:
        return f"{'held-out' if self.mark else 'training'} examples of {self.source.source!r:.80}"

    def placed(
        self, prompt: Prompt | None, ignored: dict[str, None] | None = None
    ) -> Iterator[tuple[str, Any, Example | RawText]]:
        """Its examples with their places and rows, as `placed_examples` gives them.

        Raises:
            DataError: The table is not the one that was divided any more.
        """
        table, read = self.source.source, 0
        if isinstance(table, (str, Path)) and identity(Path(table)) != self._before:
            self._refuse()
        for item in placed_examples(self.source, prompt, beside=self._beside, ignored=ignored):
            if read >= len(self.marks) or not self._stays(item, self.marks[read]):
                self._refuse()
            if self.marks[read] == self.mark:
                yield item
            read += 1
        if read != len(self.marks):
            self._refuse()

    def _stays(self, item: tuple[str, Any, Example | RawText], mark: int) -> bool:
        """Whether a row in memory, which nothing tells from one that took its place, is still of its side."""
        place, row, example = item
        try:
            return self._rule is None or self._rule.side(row, example) == mark
        except DataError as error:
            raise type(error)(f"{place}: {error}") from None  # noqa: EM102

    def described(self) -> tuple[Mapped, str]:
        """The table, and which of its rows."""
        return self.source, f"{self.mark} of {hashlib.sha256(self.marks).hexdigest()}, beside {self._beside}"

    def _refuse(self) -> None:
        table = self.source.source
        what = f"{str(table)!r:.200}" if isinstance(table, (str, Path)) else f"the {type(table).__name__}"
        msg = (
            f"{what} has changed since it was divided, so nobody knows what of it was held out. "
            "Make the federation anew, or read a copy."
        )
        raise DataError(msg)


class _ByKey:
    """Sides by a hash of each key."""

    def __init__(self, split: Split, seed: int, prompt: Prompt | None) -> None:
        assert split.share is not None
        self.split, self._share, self._seed = split, split.share, seed
        self._prompt = prompt if split.by is None else None  # a copy of a side need not have a model with it
        self._marks, self._count = bytearray(), 0
        self.start = math.inf  # of what is divided by time
        self._keys: set[str] = set()
        self._range = (math.inf, -math.inf)

    def side(self, row: Any, example: Example | RawText) -> int:
        """1 for an example that is held out, 0 for another."""
        key = None if example.empty else _key(self.split.by, row, example, self._prompt)
        return int(key is not None and position(key, self._seed) < self._share)

    def add(self, row: Any, example: Example | RawText) -> None:
        """The side of one more example."""
        key = None if example.empty else _key(self.split.by, row, example, self._prompt)
        if key is None:
            self._marks.append(0)
            return
        place = position(key, self._seed)
        self._count += 1
        self._range = min(self._range[0], place), max(self._range[1], place)
        if len(self._keys) < _KEPT:
            self._keys.add(key)
        self._marks.append(place < self._share)

    def marks(self, who: str) -> bytes:
        """1 for each example that is held out, 0 for the others."""
        lowest, highest = self._range
        if lowest < self._share <= highest:
            return bytes(self._marks)
        what = "key" if self.split.by is not None else "example"
        of = f"{self._count:,} usable examples with {len(self._keys)} different {what}s"
        if len(self._keys) < 2:
            msg = f"{who!r} has {of}, too few to hold out {self._share:.0%} and train on the rest. Give it more."
            raise EmptyParticipantError(msg)
        side = "all are" if highest < self._share else "none is"
        share = math.floor(highest * 100) / 100 if highest < self._share else math.ceil(lowest * 100 + 1e-9) / 100
        ways = [f"share={share}"] if 0 < share < 1 and lowest < share <= highest else []
        ways += [f"seed={s}" for s in range(_TRIED) if len({position(k, s) < self._share for k in self._keys}) == 2][:1]
        msg = (
            f"{who!r} has {of}, too few to hold out {self._share:.0%} and train on the rest: by a hash of each, which "
            f"is the same at every participant, {side} held out. Split with {' or '.join(ways) or 'another seed'} "
            "divides them, or say which by Participant(held_out=rows)."
        )
        raise EmptyParticipantError(msg)


class _ByTime:
    """Sides by a time in each row: the newest are held out."""

    def __init__(self, split: Split, seed: int, prompt: Prompt | None) -> None:  # noqa: ARG002 (made as `_ByKey` is)
        assert split.time is not None
        self.split, self._column = split, split.time
        self.start = math.inf
        self._times = array("d")
        self._kind = moment(split.after)[0] if split.after is not None else ""  # type: ignore[index]

    def side(self, row: Any, example: Example | RawText) -> int:
        """1 for an example that is held out, 0 for another; known once `marks` has found where the newest begin."""
        return int(self._time(row, example) >= self.start)  # a NaN is not

    def add(self, row: Any, example: Example | RawText) -> None:
        """The time of one more example."""
        self._times.append(self._time(row, example))

    def _time(self, row: Any, example: Example | RawText) -> float:
        """NaN of an empty example."""
        if example.empty:
            return math.nan
        value = _cell(self._column, row, example, "time")
        found = moment(value)
        if found is None:
            msg = (
                f"{self._column!r:.60} is {value!r:.60}, which is no time. Write dates as 2026-01-31, with a time as "
                "2026-01-31T12:00, or numbers."
            )
            raise DataError(msg)
        self._kind = self._kind or found[0]
        if found[0] != self._kind:
            msg = (
                f"{self._column!r:.60} is the {found[0]} {value!r:.60}, and others are {self._kind}s. Write all alike."
            )
            raise DataError(msg)
        return found[1]

    def marks(self, who: str) -> bytes:
        """1 for each example that is held out, 0 for the others."""
        known = sorted(time for time in self._times if not math.isnan(time))
        if self.split.after is not None:
            start = moment(self.split.after)[1]  # type: ignore[index] # looked at when it was made
        else:
            assert self.split.share is not None
            start = known[-max(1, round(self.split.share * len(known)))] if known else math.inf
        if not known or not known[0] < start <= known[-1]:
            what = "from " + str(self.split.after) if self.split.after is not None else "of the newest"
            side = "train on" if known and known[0] >= start else "hold out"
            msg = (
                f"{who!r} has {len(known):,} usable examples, and with those {what} held out by {self._column!r:.60} "
                f"there is none to {side}. Choose another time or share, or say which by Participant(held_out=rows)."
            )
            raise EmptyParticipantError(msg)
        self.start = start
        times, self._times = self._times, array("d")
        return bytes(time >= start for time in times)  # a NaN is not


def _key(by: Any, row: Any, example: Example | RawText, prompt: Prompt | None) -> str | None:
    """The key of an example as text; None where a composed chain fails for it, which is counted elsewhere."""
    if by is None:
        try:  # the question alone: with two answers, or in another form, it must not stand on both sides
            return prompt_text(example, prompt)
        except ExampleFailedError:
            return None
    if isinstance(by, str):
        return text_of(_cell(by, row, example, "by"))
    if isinstance(by, tuple):
        return text_of([_cell(name, row, example, "by") for name in by])
    try:
        value = by(row)
    except Exception as error:  # whatever somebody's function makes of a row
        msg = f"the function of Split(by=…) raises {type(error).__name__}: {error!s:.200} for {row!r:.80}."
        raise DataError(msg) from error
    if value is None or is_blank(value):
        msg = f"the function of Split(by=…) gives {value!r:.40} for {row!r:.80}. Give a key for every row."
        raise DataError(msg)
    return text_of(value)


def _cell(column: str, row: Any, example: Example | RawText, option: str) -> Any:
    """The value of a column, beside the example or in it."""
    inputs = getattr(example, "inputs", None)
    for place in (row, inputs):
        if isinstance(place, Mapping) and column in place:
            if is_blank(place[column]):
                msg = f"it has no {column!r:.60} to split by. Fill it, or leave the example out."
                raise DataError(msg)
            return place[column]
    names: Iterable[Any] = row if isinstance(row, Mapping) else ()
    there = f"there are {shown(sorted(map(str, names)), 300)}" if names else f"a {type(row).__name__} has no columns"
    msg = f"there is no column {column!r:.60} for Split({option}={column!r:.60}); {there}."
    raise DataError(msg)
