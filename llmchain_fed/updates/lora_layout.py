"""LoraLayout: which of a model's trainable tensors are LoRA factors, at which rank and scaling.

Knows a model's adapter and named tensors. Knows nothing about rules, rounds or participants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor

from llmchain_fed.model.local_model import LocalModel
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
