"""Overlap: held-out examples that are also trained on, so that their loss says less than it seems.

Knows encoded examples and compares them by a hash of their ids, never by a list of them. Knows nothing about rounds.
What another process counts is read with bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from llmchain_fed.data.encoding import EncodedExamples


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
    tokens, bounds = data.tokens.numpy(), data.bounds.tolist()
    for i in range(len(data)):
        start, middle, end = bounds[2 * i : 2 * i + 3]
        prompt = tokens[start:middle].tobytes()
        yield hash((prompt, tokens[middle:end].tobytes())), hash((prompt,))
