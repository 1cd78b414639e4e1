"""LocalData: a participant's examples as the training loop takes them, read once and kept.

Knows forms of examples and token ids. Knows nothing about rounds. What it raises says whose examples they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from llmchain_fed.data.encoding import EncodedExamples, encode_examples, encoded
from llmchain_fed.data.examples import Example, RawText, is_ready_tensors, read_examples
from llmchain_fed.errors import DataError
from llmchain_fed.federated.client.overlap import Overlap, overlap
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig

_T = TypeVar("_T")


class LocalData:
    """What one participant trains on and is evaluated on.

    Args:
        target: Whose prompt and tokenizer make tokens of it.
        participant: Whose examples.
        config: What decides which examples are left out, and how many may be.
    """

    def __init__(self, target: Target, participant: Participant, config: TrainingConfig) -> None:
        self._target, self.participant = target, participant
        self._max_length, self._tolerance = config.max_length, config.tolerance
        self._train: Any = None
        self._held_out: Any = None
        self._held_out_examples: list[Example | RawText] = []
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
            self._train = self._ready(self.participant.examples, self._tolerance)
        return self._train

    def held_out(self) -> Any:
        """The held-out examples.

        Raises:
            DataError: They cannot be used.
        """
        if self._held_out is None:
            held_out = self.participant.held_out
            if not is_ready_tensors(held_out):  # read once: it may be a generator
                given, prompt = held_out, self._target.prompt
                held_out = self._held_out_examples = self._named(lambda: list(read_examples(given, prompt)))
            self._held_out = self._ready(held_out)
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
        usable = (e for e in self._held_out_examples if len(encode_examples([e], model, prompt, max_length=longest)))
        return list(itertools.islice(usable, count))

    def inspect(self) -> str:
        """What became of the examples, in a line; reads them."""
        found = f"trains on {_report(self.train())}"
        if self.holds_out:
            found += f", holds out {_report(self.held_out())}"
        return found

    def _ready(self, examples: Any, tolerance: float | None = None) -> Any:
        target, longest = self._target, self._max_length
        return self._named(lambda: encoded(examples, target.model, target.prompt, longest, tolerance=tolerance))

    def _named(self, read: Callable[[], _T]) -> _T:
        """What `read` returns; what it raises says whose examples they are."""
        try:
            return read()
        except DataError as error:
            raise type(error)(f"participant {self.participant.name!r}: {error}") from None  # noqa: EM102


def _report(data: Any) -> str:
    return data.report.in_words() if isinstance(data, EncodedExamples) else "a DataLoader"
