"""Weight shares: no update weighs more than a given share of its round.

Knows weights and contributions. Knows nothing of what a contribution contains or how it is combined.

Participants declare their counts themselves, so one that claims 10⁹ examples would be the mean. With a share c the
weights of a round are cut at one threshold T, w'_k = min(w_k, T), chosen so that T is the share c of Σ w'_k: whoever is
cut weighs exactly c, and what it loses goes to all others in the proportion of their own weights. Where no more than
1/c participants are there, nobody could weigh c or less: they weigh the same.

T follows from those whose updates are in, not from those who were asked: else one that stays away would lift the
others above their share. At most 1/c of them can be cut, those of the largest weights, so only these updates are kept
until all are in; every other one is added as it arrives, with its own weight. Memory grows by 1/c updates at most,
however many participants there are.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from llmchain_fed.errors import LLMChainFedError
from llmchain_fed.updates.collection import Around, Collection, Contribution

SMALLEST = 1e-6
"""a share of one in a million: no round has more participants, and 1/share is a count"""
Share = Annotated[float, Field(ge=SMALLEST, le=1)]
_SEEN = 1e-9  # a share that differs by less is the same
_NEARLY = 1e-9  # 1/c is meant to be whole where c is 0.1


def cut(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """The weights of a round with none above its share.

    >>> cut({"a": 1, "b": 1, "c": 1, "d": 10**9}, 0.4)
    {'a': 1, 'b': 1, 'c': 1, 'd': 2.0...}
    >>> cut({"a": 1, "b": 3}, 0.5)
    {'a': 1.0, 'b': 1.0}
    """
    if len(weights) * share <= 1 + _NEARLY:
        return dict.fromkeys(weights, 1.0)
    falling = sorted(weights.values(), reverse=True)
    rest = sum(falling)
    for above, weight in enumerate(falling):
        threshold = share * rest / (1 - above * share)  # of so many that weigh it
        if weight <= threshold:
            return {name: min(own, threshold) for name, own in weights.items()} if above else dict(weights)
        rest -= weight
    return dict.fromkeys(weights, 1.0)


class CappedWeights(Around):
    """A collection whose weights are cut; it keeps the updates of a round whose weight may have to be."""

    def __init__(self, inner: Collection, share: float) -> None:
        super().__init__(inner)
        self.share = share
        self._most = int(1 / share + _NEARLY)
        self._kept: list[tuple[float, int, Contribution]] = []  # a heap: the least weight first
        self._count = 0
        self.weights: dict[str, float] = {}
        """participant → what its update weighs; final after `release`"""
        self.notes: dict[str, str] = {}
        """participant → what its record should say of its weight"""
        self.refused: dict[str, LLMChainFedError] = {}
        """participant → why its update, which was kept until then, could not be used after all"""

    def add(self, given: Contribution) -> None:
        """Takes one in, and hands on one whose weight will not be cut, whoever else comes."""
        self._count += 1
        self.weights[given.participant] = given.weight
        item = (given.weight, -self._count, given)
        if len(self._kept) < self._most:
            heapq.heappush(self._kept, item)
        else:
            self._add(heapq.heappushpop(self._kept, item)[2])

    def _add(self, given: Contribution) -> None:
        try:
            super().add(given)
        except LLMChainFedError as error:
            self.refused[given.participant] = error
            del self.weights[given.participant]

    def release(self) -> None:
        """Adds those that were kept, in the order in which they came, at weights of which none passes its share.

        Once all are in, and before the inner collection asks anybody for more: it knows every update then.
        """
        former, late = self.weights, sorted(self._kept, key=lambda item: -item[1])
        self.weights, self._kept = cut(former, self.share), []
        total, new_total = math.fsum(former.values()), math.fsum(self.weights.values())
        few = len(former) * self.share <= 1
        why = "as all do, for they are too few" if few else f"max_weight_share={self.share:g}"
        for _, _, given in late:
            name, weight = given.participant, self.weights[given.participant]
            was, now = given.weight / total, weight / new_total
            if abs(was - now) > _SEEN and (few or weight != given.weight):
                self.notes[name] = f"its update weighs {now:.4g} of the round, not {was:.4g}: {why}"
            self._add(replace(given, weight=weight))
