"""Rule: what a server rule decides, and what it declares of itself, so that options which break it are refused.

Knows LoRA's layout and collections. Knows nothing about participants, runtimes or how a value is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.updates.collection import Collection, Combined, Round
from llmchain_fed.updates.lora_layout import LoraLayout, Part
from llmchain_fed.updates.server_optimizers.state import check_names, check_tensors


@dataclass(frozen=True)
class Rule:
    """One server rule.

    `trains` and `shares` say by round number (0 for the first) which tensors participants train, and which of those
    leave them. `collection` makes what takes a round's updates in. `refactor`, where there is one, rewrites the new
    global values without changing what they mean, after the server optimizer.
    """

    name: str
    collection: Callable[[], Collection]
    trains: Callable[[int], Part] = lambda _: "all"
    shares: Callable[[int], Part] = lambda _: "all"
    refactor: Callable[[dict[str, Tensor], LoraLayout], dict[str, Tensor]] | None = None
    lora: bool = False
    """needs LoRA factors, all of them plain"""
    summable: bool = False
    """new values are Σ weight · values / Σ weight and nothing else, so that a sum can stand for the single updates"""
    keeps_updates: bool = False
    """keeps every update until all are in, and measures the gap itself where there are factors"""
    keeps_product: bool = False
    """places A, B and the remainder so that together they are what comes out: nothing may move them apart"""
    regauges: bool = False
    """writes the factors anew every round, so that differences between rounds mean nothing"""
    restarts: bool = False
    """leaves B at zero after every round"""
    remainder_rank: Callable[[Sequence[int]], int] | None = None
    """rank that the frozen remainder grows by in a round of participants of these ranks; None where it never grows"""
    mixed_ranks: bool = False
    personal: bool = False
    """what is trained and not shared stays with its participant"""
    own: bool = True
    """is somebody's own code: it is given copies, and what it makes is looked at"""

    @property
    def alternates(self) -> bool:
        """Whether rounds train different tensors, so that what an optimizer keeps belongs to others than it moves."""
        return len({self.trains(number) for number in range(4)}) > 1

    @property
    def rewrites(self) -> bool:
        """Whether a round also changes global values that nobody shared in it."""
        return self.refactor is not None or self.regauges or self.keeps_product

    def check(self, layout: LoraLayout | None) -> None:
        """Makes sure that this rule fits the model.

        Raises:
            ConfigError: It trains no LoRA factors, or some that the rule does not handle.
        """
        if not self.lora:
            return
        if layout is None:
            msg = (
                f"aggregation={self.name!r} averages LoRA factors, and this model trains none. Use 'fedavg', or "
                "add a LoRA adapter."
            )
            raise ConfigError(msg)
        if layout.refused:
            msg = (
                f"aggregation={self.name!r} does not handle {', '.join(layout.refused)}: what it promises would not "
                "be true. Use 'fedavg', which averages every trainable tensor, or a plain LoraConfig."
            )
            raise ConfigError(msg)

    def begin(self, about: Round) -> Collection:
        """The collection of a round; the state it is told of is its own where the code is somebody's own."""
        collection = self.collection()
        copies = {n: t.clone() for n, t in about.state.items()} if self.own else about.state  # it is sent to others
        collection.zero(replace(about, state=copies))
        return collection

    def check_outcome(self, found: object, about: Round) -> None:
        """Makes sure that what somebody's own code made are values of the model.

        Raises:
            FederationError: They are not.
        """
        if not self.own:
            return
        whose = f"aggregation {self.name!r:.80}"
        if not isinstance(found, Combined):
            msg = (
                f"{whose}: finish() returned {type(found).__name__}. It must return Combined(values={{name: tensor}})."
            )
            raise FederationError(msg)
        check_tensors(whose, found.values)
        check_names(about.state, found.values)
