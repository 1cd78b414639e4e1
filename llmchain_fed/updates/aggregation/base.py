"""Rule: what a server rule decides. What is trained and shared in a round, and how updates become global values.

Knows named tensors and LoRA's layout. Knows nothing about participants, transport or how a value is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

from torch import Tensor

from llmchain_fed.errors import ConfigError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.batch_sampler import seed_of
from llmchain_fed.updates.low_rank import Factors

Part = Literal["all", "A", "B"]
"""which of the trainable tensors: all of them, or one kind of LoRA factor"""
PARTS: tuple[Part, ...] = get_args(Part)

A, B = "lora_A.weight", "lora_B.weight"


def at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A factor's shape at another rank; anything else's as it is."""
    if name.endswith(A):
        return (rank, *shape[1:])
    return (*shape[:1], rank, *shape[2:]) if name.endswith(B) else shape


class Accumulator(Protocol):
    """Takes the updates of one round as they arrive."""

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """One participant's trained values; they are not kept unless the rule needs them all."""

    def result(self) -> dict[str, Tensor]:
        """The combined values, by names of the global state; names that are left out stay as they are."""


class Aggregation(Protocol):
    """What a user's own rule must have; pass it to `FederatedAveraging(aggregation=…)`."""

    name: str

    def start(self, state: Mapping[str, Tensor]) -> Accumulator:
        """A fresh accumulator for a round that broadcast `state`."""


@dataclass(frozen=True)
class LoraLayout:
    """The LoRA factors among a model's trainable tensors.

    Args:
        scaling: Layer → s = alpha/r (alpha/√r with rsLoRA), by which B·A counts.
        rank: Of every layer; None where they differ.
        refused: What the adapter has that the LoRA rules do not handle.
    """

    scaling: Mapping[str, float]
    rank: int | None
    alpha: float
    rslora: bool = False
    refused: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: LocalModel) -> LoraLayout | None:
        """That of a model; None where it trains no LoRA factors."""
        parameters = model.trainable_parameters()
        layers = sorted(name.removesuffix("." + B) for name in parameters if name.endswith("." + B))
        names = model.peft_names
        if not names or not any("lora_" in name for name in parameters):
            return None
        config = cast(Any, model.module).peft_config[names[0]]
        found = {
            "DoRA": getattr(config, "use_dora", False),
            "modules_to_save": getattr(config, "modules_to_save", None),
            f"bias={getattr(config, 'bias', 'none')!r}": getattr(config, "bias", "none") != "none",
            "lora_bias": getattr(config, "lora_bias", False),
            "rank_pattern": getattr(config, "rank_pattern", None),
            "alpha_pattern": getattr(config, "alpha_pattern", None),
            "trainable_token_indices": getattr(config, "trainable_token_indices", None),
            "target_parameters": getattr(config, "target_parameters", None),
        }
        paired = {f"{layer}.{part}" for layer in layers for part in (A, B)}
        odd = sorted(name for name in parameters if name not in paired or parameters[name].dim() != 2)
        lone = sorted(paired - parameters.keys())
        refused = [name for name, present in found.items() if present]
        if len(names) > 1:
            refused.append("several adapters trained at once")
        if odd:
            refused.append(f"trainable tensors that are no pair of LoRA matrices, such as {odd[0]}")
        if lone:
            refused.append(f"LoRA factors that are not trained, such as {lone[0]}")
        if refused:
            return cls({}, None, 1.0, refused=tuple(refused))
        ranks = {int(parameters[f"{layer}.{A}"].shape[0]) for layer in layers}
        rank = next(iter(ranks)) if len(ranks) == 1 else None
        alpha = float(getattr(config, "lora_alpha", 1))
        return cls(model.lora_scaling(), rank, alpha, bool(getattr(config, "use_rslora", False)))

    @property
    def layers(self) -> list[str]:
        """The adapted layers' names, in one order for all."""
        return sorted(self.scaling)

    def factors(self, tensors: Mapping[str, Tensor], layer: str) -> Factors:
        """One layer's B and A."""
        return Factors(tensors[f"{layer}.{B}"], tensors[f"{layer}.{A}"])

    def scaling_at(self, rank: int, alpha: float | None = None) -> dict[str, float]:
        """Layer → s at another rank, as PEFT's `LoraConfig(r=rank, lora_alpha=alpha)` would have it."""
        value = (alpha or self.alpha) / (rank**0.5 if self.rslora else rank)
        return dict.fromkeys(self.scaling, value)

    def at_rank(
        self, state: Mapping[str, Tensor], rank: int | None, scaling: Mapping[str, float] | None
    ) -> dict[str, Tensor]:
        """The state that a participant of a smaller rank starts from: the leading rows of A and columns of B.

        B takes up what the participant's own scaling differs by, so that the leading part of s·B·A is kept. After
        FlexLoRA that part is the nearest of its rank.
        """
        if rank is None:
            return dict(state)
        own = scaling or self.scaling
        found = {}
        for layer in self.layers:
            pair = self.factors(state, layer)
            found[f"{layer}.{A}"] = pair.a[:rank].clone()
            found[f"{layer}.{B}"] = (pair.b[:, :rank] * (self.scaling[layer] / own[layer])).contiguous()
        return found


def selected(names: Iterable[str], part: Part) -> list[str]:
    """Those of the names that belong to this part."""
    return [n for n in names if part == "all" or n.endswith("." + (A if part == "A" else B))]


@dataclass(frozen=True)
class Round:
    """What a rule is told of the round it begins."""

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


@dataclass
class Combined:
    """What comes out of a round's updates."""

    values: dict[str, Tensor]
    """new global values; names that are left out stay as they are"""
    remainder: dict[str, Factors] = field(default_factory=dict)
    """layer → what is added to the frozen remainder beside the base"""
    gap: float | None = None
    """the aggregation gap, where the rule has seen all factors anyway"""


@dataclass(frozen=True)
class Contribution:
    """One participant's accepted values, and what the rules may weigh them by."""

    tensors: Mapping[str, Tensor]
    weight: float
    steps: int | None = None
    """optimizer steps it took"""
    scaling: Mapping[str, float] | None = None
    """its own layer → s, where its rank or alpha is its own"""


class Collector(Protocol):
    """Takes a round's contributions as they arrive."""

    def add(self, given: Contribution) -> None:
        """One participant's.

        Raises:
            FederationError: It cannot be used; what was added before is as it was.
        """

    def combine(self) -> Combined:
        """The outcome; may use up what was added.

        Raises:
            FederationError: Nothing was added.
        """


@dataclass(frozen=True)
class Rule:
    """One server rule.

    `trains` and `shares` say by round number (0 for the first) which tensors participants train, and which of those
    leave them. `begin` makes the round's collector. `refactor`, where there is one, rewrites the new global values
    without changing what they mean, after the server optimizer.
    """

    name: str
    begin: Callable[[Round], Collector]
    trains: Callable[[int], Part] = lambda _: "all"
    shares: Callable[[int], Part] = lambda _: "all"
    refactor: Callable[[dict[str, Tensor], LoraLayout], dict[str, Tensor]] | None = None
    lora: bool = False
    """needs LoRA factors, all of them plain"""
    exact: bool = False
    """the new global product is the mean of the participants' products"""
    linear: bool = True
    """values are a weighted sum of the participants' own, which secure aggregation and noise need"""
    regauges: bool = False
    """writes the factors anew every round, so that differences between rounds mean nothing"""
    mixed_ranks: bool = False
    personal: bool = False
    """what is trained and not shared stays with its participant"""

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
                "hold. Use 'fedavg', which averages every trainable tensor, or a plain LoraConfig."
            )
            raise ConfigError(msg)


class Plain:
    """Lets an accumulator of two arguments, a user's own for instance, collect contributions."""

    def __init__(self, accumulator: Any) -> None:
        self._accumulator: Accumulator = accumulator

    def add(self, given: Contribution) -> None:
        """Hands over values and weight."""
        self._accumulator.add(given.tensors, given.weight)

    def combine(self) -> Combined:
        """What the accumulator says."""
        return Combined(self._accumulator.result())
