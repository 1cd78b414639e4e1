"""LocalData: a participant's examples as the training loop takes them, read once and kept; and where they overlap.

Knows forms of examples and token ids, which are compared by a hash. Knows nothing about rounds. What it raises says
whose examples they are; what another process counts is read with bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from llmchain_fed.data.encoding import EncodedExamples, encode_examples, encoded
from llmchain_fed.data.examples import Example, Placed, RawText, is_ready_tensors, read_examples, with_columns
from llmchain_fed.data.report import DataReport
from llmchain_fed.data.sources.columns import Mapped
from llmchain_fed.data.sources.readers import reads_again
from llmchain_fed.errors import DataError
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig

_T = TypeVar("_T")


class LocalData:
    """What one participant trains on and is evaluated on.

    The target's prompt and tokenizer make tokens of it; the options decide which examples are left out, and how many
    may be. With `progress` a bar shows how far reading is.
    """

    def __init__(
        self, target: Target, participant: Participant, config: TrainingConfig, *, progress: bool = False
    ) -> None:
        self._target, self.participant = target, participant
        self._max_length, self._tolerance = config.max_length, config.tolerance
        self._progress = f"reading {participant.name}" if progress else None
        self._train: Any = None
        self._held_out: Any = None
        self._sampled: Any = ()
        """what held-out examples are read from again, for samples"""
        self._first: dict[int, list[Example | RawText]] = {}
        self._compared: tuple[Any, Any, Overlap | None] | None = None

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.participant.held_out is not None

    @contextmanager
    def taking(self, participant: Participant) -> Iterator[None]:
        """Other examples from now on; where what is done with them fails, the former ones stay."""
        former = self.participant, self._train  # both: examples that were a generator cannot be read again
        if participant.examples is not self.participant.examples:
            self.participant, self._train = replace(self.participant, examples=participant.examples), None
        try:
            yield
        except BaseException:
            self.participant, self._train = former
            raise

    @contextmanager
    def limiting(self, config: TrainingConfig) -> Iterator[None]:
        """Other limits from now on; where what is done with them fails, the former ones stay."""
        former = self._max_length, self._tolerance, self._train, self._held_out
        if (config.max_length, config.tolerance) != (self._max_length, self._tolerance):
            self._max_length, self._tolerance = config.max_length, config.tolerance
            self._train = self._held_out = None
        try:
            yield
        except BaseException:
            self._max_length, self._tolerance, self._train, self._held_out = former
            raise

    def train(self) -> Any:
        """The training examples.

        Raises:
            DataError: They cannot be used.
        """
        if self._train is None:
            examples = with_columns(self.participant.examples, self.participant.columns)
            self._train = self._ready(examples, self._tolerance)
        return self._train

    def held_out(self) -> Any:
        """The held-out examples.

        Raises:
            DataError: They cannot be used.
        """
        if self._held_out is None:
            held_out = with_columns(self.participant.held_out, self.participant.columns)
            if not is_ready_tensors(held_out):
                source = Mapped.of(held_out).source
                if not isinstance(source, Placed) and not reads_again(source):  # a generator …
                    given, prompt = held_out, self._target.prompt
                    held_out = self._named(lambda: list(read_examples(given, prompt)))
                self._sampled, self._first = held_out, {}
            self._held_out = self._ready(held_out, whose="its held-out part")
        return self._held_out

    def overlap(self) -> Overlap | None:
        """What of its held-out examples it trains on; None where nothing is held out, or by a DataLoader."""
        if not self.holds_out:
            return None
        train, held_out = self.train(), self.held_out()
        if self._compared is None or self._compared[0] is not train or self._compared[1] is not held_out:
            self._compared = train, held_out, overlap(train, held_out)
        return self._compared[2]

    def count(self) -> int | None:
        """Examples that are trained on; None of a DataLoader, whose batches are not counted."""
        found = self.train()
        return len(found) if isinstance(found, EncodedExamples) else None

    def first_held_out(self, count: int) -> list[Example | RawText]:
        """The first held-out examples that are neither empty nor too long."""
        model, prompt, longest = self._target.model, self._target.prompt, self._max_length
        if count not in self._first:
            examples = read_examples(self._sampled, prompt)
            usable = (e for e in examples if len(encode_examples([e], model, prompt, max_length=longest)))
            self._first[count] = list(itertools.islice(usable, count))
        return self._first[count]

    @property
    def report(self) -> DataReport | None:
        """What became of the training examples, as far as they have been read; with names that do not travel."""
        return self._train.report if isinstance(self._train, EncodedExamples) else None

    def inspect(self) -> str:
        """What became of the examples, in a line; reads them."""
        found = f"trains on {_report(self.train())}"
        if self.holds_out:
            found += f", holds out {_report(self.held_out())}"
        return found

    def _ready(self, examples: Any, tolerance: float | None = None, whose: str = "the participant") -> Any:
        target, longest, bar = self._target, self._max_length, self._progress
        return self._named(
            lambda: encoded(
                examples, target.model, target.prompt, longest, tolerance=tolerance, progress=bar, whose=whose
            )
        )

    def _named(self, read: Callable[[], _T]) -> _T:
        """What `read` returns; what it raises says whose examples they are."""
        try:
            return read()
        except DataError as error:
            raise type(error)(f"participant {self.participant.name!r}: {error}") from None  # noqa: EM102


def _report(data: Any) -> str:
    return data.report.in_words() if isinstance(data, EncodedExamples) else "a DataLoader"


# --- what is both trained on and held out -----------------------------------------------------------------------------


class Overlap(NamedTuple):
    """How many held-out examples are trained on.

    >>> Overlap(same=3, asked=0, of=40).notes()
    ['3 of 40 held-out examples are also trained on: held-out loss flatters']
    """

    same: int
    """with the same prompt and the same completion"""
    asked: int
    """with the same prompt alone, and another completion"""
    of: int
    """held-out examples in all"""

    def notes(self, what: str = "held-out examples") -> list[str]:
        """What a record should say of it; nothing where there is no overlap."""
        found = []
        if self.same:
            found.append(f"{self.same} of {self.of} {what} are also trained on: held-out loss flatters")
        if self.asked:
            found.append(f"{self.asked} of {self.of} {what} have a prompt that is trained on, with another completion")
        return found

    @classmethod
    def read(cls, found: Any, most: int) -> Overlap:
        """From the list of its counts as it came from elsewhere.

        Raises:
            ValueError: These are no such counts.
        """
        if not (isinstance(found, list) and len(found) == 3 and all(type(count) is int for count in found)):
            raise ValueError(found)
        same, asked, of = found
        if not (same >= 0 and asked >= 0 and same + asked <= of <= most):
            raise ValueError(found)
        return cls(same, asked, of)


def overlap(train: Any, held_out: Any) -> Overlap | None:
    """What of `held_out` is in `train`; None where either is a DataLoader, whose batches are not looked into."""
    if not (isinstance(train, EncodedExamples) and isinstance(held_out, EncodedExamples)):
        return None
    apart = list(_digests(held_out))
    wanted = {digest for pair in apart for digest in pair}
    trained = {digest for pair in _digests(train) for digest in pair if digest in wanted}
    same = sum(both in trained for both, _ in apart)
    asked = sum(prompt in trained and both not in trained for both, prompt in apart)
    return Overlap(same, asked, len(apart))


def crossing(train: Mapping[str, Any], held_out: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Participant → how many of its held-out examples others train on, and of how many; those of none are left out."""
    apart = {name: [both for both, _ in _digests(data)] for name, data in _encoded(held_out)}
    trained_by: dict[int, set[str]] = {digest: set() for digests in apart.values() for digest in digests}
    for name, data in _encoded(train):
        for both, _ in _digests(data):
            if both in trained_by:
                trained_by[both].add(name)
    counts = {name: sum(bool(trained_by[d] - {name}) for d in digests) for name, digests in apart.items()}
    return {name: (count, len(apart[name])) for name, count in counts.items() if count}


def _encoded(by_name: Mapping[str, Any]) -> Iterable[tuple[str, EncodedExamples]]:
    return [(name, data) for name, data in by_name.items() if isinstance(data, EncodedExamples)]


def _digests(data: EncodedExamples) -> Iterator[tuple[int, int]]:
    """(hash of prompt and completion, hash of the prompt) per example; the two kinds never equal each other."""
    tokens, bounds, starts = data.tokens.numpy(), data.bounds.tolist(), data.starts.tolist()
    for first, last in itertools.pairwise(starts):
        start, middle, end = bounds[first], bounds[first + 1], bounds[last]
        prompt = tokens[start:middle].tobytes()
        yield hash((prompt, tokens[middle:end].tobytes())), hash((prompt,))
