"""The server optimizers that are written out here: momentum, the adaptive three, and Reptile.

Knows formulas over named tensors. Knows nothing of rounds or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from llmchain_fed._config import check_by_name
from llmchain_fed.errors import ConfigError
from llmchain_fed.updates.server_optimizers.state import (
    Memory,
    check_finite,
    check_foreign,
    check_names,
    check_shape,
    flattened,
    in_range,
    master,
    unflattened,
)


@dataclass(kw_only=True, eq=False)
class _Rule(ABC):
    """Options are dataclass fields; memory is slot → value for every tensor, in the type the numbers are done in."""

    _memory: dict[str, Memory] = field(default_factory=dict, init=False, repr=False)
    _slots: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, /, *values: Any, **options: Any) -> Self:
        """Refuses what the options are not, which a dataclass would with a TypeError."""
        check_by_name(cls, [f.name for f in fields(cls) if f.init], values, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option, value in self.settings().items():
            if option != "class":
                setattr(self, option, in_range(type(self).__name__, option, value))

    @abstractmethod
    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """What is added to the weights, and the next memory; `memory` is empty at first sight."""

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next values, in the state's types; computed in float32 or better.

        Raises:
            FederationError: Names or shapes that are not the state's, or a result that is not finite.
        """
        check_names(state, pseudo_gradient)
        moved, memory = {}, {}
        for name, gradient in pseudo_gradient.items():
            weights = master(state[name])
            before = {slot: value.to(weights) for slot, value in self._memory.get(name, {}).items()}
            for value in before.values():
                check_shape(f"the memory of {name}", value, weights)
            by, memory[name] = self._move(gradient.to(weights), before)
            moved[name] = (weights + by).to(state[name].dtype)
        check_finite(self, moved, memory)
        self._memory = {**self._memory, **memory}
        return moved

    def settings(self) -> dict[str, Any]:
        """Class and options as JSON."""
        return {"class": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the memory as "slot/<tensor name>", and the class."""
        return flattened(self._memory)[0], {"class": type(self).__name__}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ConfigError: It is another optimizer's, or incomplete.
        """
        check_foreign(numbers, {"class": type(self).__name__})
        memory = unflattened(tensors, {})
        for name, slots in memory.items():
            if sorted(slots) != sorted(self._slots) or len({value.shape for value in slots.values()}) > 1:
                found = {slot: tuple(value.shape) for slot, value in slots.items()}
                msg = f"{type(self).__name__} keeps {self._slots} of one shape per tensor; of {name:.80} came {found}."
                raise ConfigError(msg)
        self._memory = memory


@dataclass(kw_only=True, eq=False)
class FedAvgM(_Rule):
    """Server momentum (arXiv 1909.06335): v = β·v + D, w += lr·v. With momentum 0 and lr 1 it is plain FedAvg.

    >>> FedAvgM(lr=1.0, momentum=0.5).step({"w": torch.zeros(1)}, {"w": torch.ones(1)})
    {'w': tensor([1.])}
    """

    lr: float = 1.0
    momentum: float = 0.9
    _slots: ClassVar[tuple[str, ...]] = ("v",)

    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        v = self.momentum * memory["v"] + delta if memory else delta.clone()
        return self.lr * v, {"v": v}


@dataclass(kw_only=True, eq=False)
class Reptile(_Rule):
    """Part of the way to the participants' mean (arXiv 1803.02999): w += ε·D; with ε = 1 plain FedAvg.

    Reptile counts every task alike: use it with `weighting="equal"`.
    """

    step_size: float = 0.1

    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.step_size * delta, memory


class _Adaptive(_Rule):
    """Algorithm 2 of arXiv 2003.00295: m = β₁·m + (1−β₁)·D, v by rule, w += lr·m / (√v + τ); v starts at τ²."""

    _slots: ClassVar[tuple[str, ...]] = ("m", "v")
    lr: float
    beta1: float
    tau: float

    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        before = memory or {"m": torch.zeros_like(delta), "v": torch.full_like(delta, self.tau**2)}
        m = self.beta1 * before["m"] + (1 - self.beta1) * delta
        v = self._second_moment(before["v"], delta.square())
        return self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}

    @abstractmethod
    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v from D²."""


@dataclass(kw_only=True, eq=False)
class FedAdagrad(_Adaptive):
    """v += D², w += lr·m / (√v + τ) (arXiv 2003.00295, Algorithm 2, v₋₁ = τ²); its steps only get shorter.

    Where |D| ≫ τ the first step is lr in size, whatever D is: choose lr near the size of D.
    """

    lr: float = 1.0
    beta1: float = 0.0
    tau: float = 1e-3

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(kw_only=True, eq=False)
class FedAdam(_Adaptive):
    """v = β₂·v + (1−β₂)·D², w += lr·m / (√v + τ) (arXiv 2003.00295, Algorithm 2, v₋₁ = τ²); no bias correction.

    Where |D| ≫ τ a step is about lr in size, whatever D is. Trained LoRA factors change by far less than the default
    of 1 in a round: choose lr near the size of D.

    >>> FedAdam(lr=0.01)
    FedAdam(lr=0.01, beta1=0.9, beta2=0.99, tau=0.001)
    """

    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(kw_only=True, eq=False)
class FedYogi(_Adaptive):
    """As `FedAdam` with v −= (1−β₂)·D²·sign(v − D²): v falls by no more than D² lets it (arXiv 2003.00295)."""

    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)
