"""Collection: what the hub keeps of a round's arrivals, from nothing, over each of them, to new global values.

Knows named tensors, weights and LoRA's layout. Knows no rule, and nothing of how updates travel or are loaded.

The running mean, the collections of the LoRA rules, a median over all updates, a sum of masked integers: each is one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.training.batch_sampler import seed_of
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.low_rank import Factors
from llmchain_fed.updates.serialization import TensorInfo

Ask = Callable[[str, Mapping[str, bytes]], Mapping[str, bytes | Exception]]
"""(operation, participant → its own message) → participant → its answer, or why there is none; waits for all"""


@dataclass(frozen=True)
class Round:
    """What a collection is told of the round that begins."""

    state: Mapping[str, Tensor]
    """the global values every participant starts from"""
    layout: LoraLayout | None
    number: int = 0
    """0 for the first"""
    seed: int = 0
    expected: int = 1
    """updates that will come if nobody fails: room may be made for so many"""

    def seed_for(self, *parts: object) -> int:
        """63 bits that follow from the federation's seed and this round."""
        return seed_of(self.seed, "rule", self.number, *parts)


@dataclass(frozen=True)
class Contribution:
    """One participant's accepted values, and what they may be weighed by.

    Raises:
        FederationError: The weight is not a positive finite number.
    """

    tensors: Mapping[str, Tensor]
    weight: float
    steps: int | None = None
    """optimizer steps it took"""
    scaling: Mapping[str, float] | None = None
    """its own layer → s, where its rank or alpha is its own"""
    participant: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            msg = f"an update's weight must be positive and finite, got {self.weight}. Use its number of examples."
            raise FederationError(msg)


@dataclass
class Combined:
    """What comes out of a round's updates."""

    values: dict[str, Tensor]
    """new global values; names that are left out stay as they are"""
    remainder: dict[str, Factors] = field(default_factory=dict)
    """layer → what is added to the frozen remainder beside the base"""
    gap: float | None = None
    """the aggregation gap, where the collection has seen all factors anyway"""


class Collection(ABC):
    """Takes in a round's updates as they arrive; `FederatedAveraging(aggregation=…)` takes one of your own.

    One object is for one federation: `zero` of another one would begin its round anew in the middle.

    The order is `zero`, then `check` and `add` for each update, `between` once all are in, and `finish`.
    """

    @abstractmethod
    def zero(self, about: Round) -> None:
        """Begins a round; what was added in another one is forgotten."""

    @abstractmethod
    def add(self, given: Contribution) -> None:
        """Takes one participant's update in; its tensors need not be kept.

        Raises:
            FederationError: It cannot be used; what was added before is as it was.
        """

    @abstractmethod
    def finish(self) -> Combined:
        """Makes the new global values; it may use up what was added.

        Raises:
            FederationError: Nothing was added.
        """

    def check(self, given: Contribution) -> None:  # noqa: B027 (most can use whatever has the right shapes)
        """Makes sure that `add` could use an update, before it is known by which weight.

        Raises:
            FederationError: It could not.
        """

    def payload(self, layout: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo] | None:  # noqa: ARG002
        """Type and shape of what an update brings, where that is not the shared values themselves; {} is a receipt.

        Participants then need a transform that makes it (`UpdateTransform`, with `keeps_names` off), and the hub looks
        at no single update: no norm, no cosine, no gap.
        """
        return None

    def between(self, ask: Ask) -> None:  # noqa: B027 (most need nothing more)
        """Asks participants for what is needed beside their updates, once all of those are in.

        Raises:
            FederationError: The answers are of no use; the round comes to nothing.
        """


class Around(Collection):
    """A collection around another one, of a round that has begun: what it does not do in its own way, that one does."""

    def __init__(self, inner: Collection) -> None:
        self.inner = inner

    def zero(self, about: Round) -> None:
        """As the inner one."""
        self.inner.zero(about)

    def check(self, given: Contribution) -> None:
        """As the inner one."""
        self.inner.check(given)

    def add(self, given: Contribution) -> None:
        """As the inner one."""
        self.inner.add(given)

    def payload(self, layout: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo] | None:
        """As the inner one."""
        return self.inner.payload(layout)

    def between(self, ask: Ask) -> None:
        """As the inner one."""
        self.inner.between(ask)

    def finish(self) -> Combined:
        """As the inner one."""
        return self.inner.finish()
