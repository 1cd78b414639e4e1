"""GlobalState: what a federation agrees on after a round. Trainable values, and a frozen low-rank remainder.

A `Version` is its name, so that a message can bring what changed since one that is there already.

Knows named tensors, factors, and their names in a message. Knows nothing about who has or needs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.low_rank import Factors, stack

REMAINDER_A, REMAINDER_B = ".remainder_A.weight", ".remainder_B.weight"
"""what a layer's factors are called in a message"""
STALE = b'{"stale": true}'
"""the answer of a participant that does not have what a difference is against: the hub then sends all"""
START = "start:"
"""begins the name of the state that a participant has before it was sent any: the hash of its weights follows"""
CODED = "coded/"
"""begins the names of a codec's parts in a message: the number of the version they made follows"""
_VERSION = re.compile(r"([^/]{1,64})/([0-9]{1,12})/([^/]{0,64})")


class Version(NamedTuple):
    """Names a global state among those of one hub and one rank."""

    server: str
    """one run of one hub: after a restart the same number may mean another state"""
    number: int
    rank: str
    """of the participant's factors, empty for the common one"""

    def __str__(self) -> str:
        return f"{self.server}/{self.number}/{self.rank}"

    @classmethod
    def read(cls, text: str) -> Self:
        """From its text.

        Raises:
            FederationError: It is none.
        """
        found = _VERSION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            msg = f"{shown(text)} names no version of the global state."
            raise FederationError(msg)
        return cls(found[1], int(found[2]), found[3])


@dataclass(frozen=True)
class GlobalState:
    """The trainable values by stable name, and what is added to the base's weights beside them, by layer."""

    values: Mapping[str, Tensor] = field(repr=False)
    remainder: Mapping[str, Factors] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: LocalModel) -> GlobalState:
        """What a model has now: copies of the trainable values, and the remainder itself where it is on the CPU."""
        return cls(model.trainable_state(), {n: Factors(b, a) for n, (b, a) in model.remainder().items()})

    def load(self, model: LocalModel) -> None:
        """Makes this the model's state; all of it, or on an error nothing.

        Raises:
            WeightsMismatchError: It was made for another model.
        """
        former = model.remainder()
        model.load_remainder({n: (f.b, f.a) for n, f in self.remainder.items()})
        try:
            model.load_state(self.values)
        except BaseException:
            model.load_remainder(former)
            raise

    def plus(self, remainder: Mapping[str, Factors]) -> dict[str, Factors]:
        """The remainder with increments; factors wider than their matrix are brought back, losslessly."""
        found = dict(self.remainder)
        for layer, more in remainder.items():
            if more.rank:
                found[layer] = (stack([found[layer], more]) if layer in found else more).compacted()
        return found


def is_start_of(old: Factors, new: Factors) -> bool:
    """Whether `new` is `old`, or `old` and more."""
    if new.rank < old.rank:
        return False
    b, a = new.b[:, : old.rank], new.a[: old.rank]
    return (b.is_set_to(old.b) and a.is_set_to(old.a)) or (torch.equal(b, old.b) and torch.equal(a, old.a))


def named(remainder: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as named tensors, for a message or a file."""
    found = {}
    for layer, factors in remainder.items():
        found[layer + REMAINDER_A], found[layer + REMAINDER_B] = factors.a.contiguous(), factors.b.contiguous()
    return found


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """The reverse: other values, and the remainder by layer."""
    values = {n: t for n, t in tensors.items() if not n.endswith((REMAINDER_A, REMAINDER_B))}
    layers = [n.removesuffix(REMAINDER_A) for n in tensors if n.endswith(REMAINDER_A)]
    return values, {layer: Factors(tensors[layer + REMAINDER_B], tensors[layer + REMAINDER_A]) for layer in layers}
