"""How the aggregated values move the global weights.

Knows named tensors only: nothing of rounds, participants or models. Without a server optimizer the aggregate is loaded
as it is. The optimizers here keep their memory (momentum, second moments) by tensor name, from a name's first sight on;
names that a round leaves out are neither moved nor aged. They never change a tensor in place, a step that raises leaves
them as they were, and `copy.deepcopy` gives an independent one. The global weights stay the single truth: nothing here
keeps a copy of them.
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.weights import all_finite

_Memory = dict[str, Any]  # of one tensor: slot → its value


class ServerOptimizer(Protocol):
    """Moves the global weights along the pseudo-gradient D = Σ n_k/n · w_k − w (a descent step is +D)."""

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next values of exactly the names of `pseudo_gradient`, of which all are in `state`; once a round."""


@runtime_checkable
class ResumableServerOptimizer(ServerOptimizer, Protocol):
    """One whose memory can be saved, so that a resumed federation continues bit by bit. All those here can."""

    def settings(self) -> dict[str, Any]:
        """Class and options as JSON: another optimizer, or other options, give something else."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the memory: tensors by names such as "m/<tensor name>", and what is JSON."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; raises ConfigError, and keeps its own, for what is foreign."""


def apply(
    optimizer: ServerOptimizer | None, state: Mapping[str, Tensor], aggregate: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The next global weights; what is not in `aggregate` stays as it is in `state`.

    Without an optimizer they are the aggregate itself, bit by bit.

    Raises:
        FederationError: Names that are not the state's, another shape, or a result of other names than were asked for.
    """
    _check_names(state, aggregate)
    if optimizer is None:
        return {**state, **aggregate}
    gradient = {name: value.float() - state[name].float() for name, value in aggregate.items()}
    moved = optimizer.step({name: state[name] for name in aggregate}, gradient)
    missing, extra = sorted(aggregate.keys() - moved.keys()), sorted(moved.keys() - aggregate.keys())
    if missing or extra:
        msg = (
            f"the step of {optimizer!r:.80} lacks {len(missing)} tensors {missing[:2]} and adds {len(extra)} "
            f"{extra[:2]}. It must return the names of pseudo_gradient, no more and no less."
        )
        raise FederationError(msg)
    return {**state, **{name: value.to(state[name].dtype) for name, value in moved.items()}}


def check(optimizer: Any) -> None:
    """Makes sure that it has the one method, and is no class and no torch optimizer.

    Raises:
        ConfigError: With what to pass instead.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        msg = (
            f"server_optimizer={kind}(…) holds parameters of its own, and its step() knows no pseudo-gradient. "
            f"Pass TorchServerOptimizer(torch.optim.{kind}, …)."
        )
        raise ConfigError(msg)
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "step", None)):
        msg = f"server_optimizer is an object with step(state, pseudo_gradient), got {optimizer!r}."
        raise ConfigError(msg)


def snapshot(optimizer: ServerOptimizer | None) -> Callable[[], None]:
    """A function that puts the optimizer back to where it is now, for a round that fails after the step.

    Raises:
        ConfigError: An object of one's own that cannot be copied.
    """
    if isinstance(optimizer, ResumableServerOptimizer):
        kept = optimizer.state_dict()
        return lambda: optimizer.load_state_dict(*kept)
    try:
        own: dict[str, Any] = {} if optimizer is None else vars(optimizer)
        attributes = copy.deepcopy(own)
    except Exception as error:
        msg = (
            f"{optimizer!r:.80} cannot be copied ({type(error).__name__}: {error!s:.100}), so a failed round could not "
            "be undone. Give it settings(), state_dict() and load_state_dict()."
        )
        raise ConfigError(msg) from None

    def restore() -> None:
        own.clear()
        own.update(attributes)

    return restore


# --- the rules written out here ---------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class _Rule(ABC):
    """Options are dataclass fields; memory is slot → value for every tensor, in the type the numbers are done in."""

    _memory: dict[str, _Memory] = field(default_factory=dict, init=False, repr=False)
    _slots: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for option, value in self.settings().items():
            if option != "class":
                setattr(self, option, _checked(type(self).__name__, option, value))

    @abstractmethod
    def _move(self, delta: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """What is added to the weights, and the next memory; `memory` is empty at first sight."""

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next values, in the state's types; computed in float32 or better.

        Raises:
            FederationError: Names or shapes that are not the state's, or a result that is not finite.
        """
        _check_names(state, pseudo_gradient)
        moved, memory = {}, {}
        for name, gradient in pseudo_gradient.items():
            weights = _master(state[name])
            before = {slot: value.to(weights) for slot, value in self._memory.get(name, {}).items()}
            for value in before.values():
                _check_shape(f"the memory of {name}", value, weights)
            by, memory[name] = self._move(gradient.to(weights), before)
            moved[name] = (weights + by).to(state[name].dtype)
        _check_finite(self, moved, memory)
        self._memory = {**self._memory, **memory}
        return moved

    def settings(self) -> dict[str, Any]:
        """Class and options as JSON."""
        return {"class": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the memory as "slot/<tensor name>", and the class."""
        return _flattened(self._memory)[0], {"class": type(self).__name__}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ConfigError: It is another optimizer's, or incomplete.
        """
        _check_foreign(numbers, {"class": type(self).__name__})
        memory = _unflattened(tensors, {})
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

    def _move(self, delta: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        v = self.momentum * memory["v"] + delta if memory else delta.clone()
        return self.lr * v, {"v": v}


@dataclass(kw_only=True, eq=False)
class Reptile(_Rule):
    """Part of the way to the participants' mean (arXiv 1803.02999): w += ε·D; with ε = 1 plain FedAvg.

    Reptile counts every task alike: use it with `weighting="equal"`.
    """

    step_size: float = 0.1

    def _move(self, delta: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        return self.step_size * delta, memory


class _Adaptive(_Rule):
    """Algorithm 2 of arXiv 2003.00295: m = β₁·m + (1−β₁)·D, v by rule, w += lr·m / (√v + τ); v starts at τ²."""

    _slots: ClassVar[tuple[str, ...]] = ("m", "v")
    lr: float
    beta1: float
    tau: float

    def _move(self, delta: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
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


# --- any of torch's ---------------------------------------------------------------------------------------------------


class TorchServerOptimizer:
    """Any torch.optim class on the gradient −D; `SGD` with lr=1 is plain FedAvg.

    Every step fills fresh float32 parameters with the global weights; only the torch optimizer's state per tensor is
    kept. Options are torch's, so are its defaults: AdamW, for one, decays the weights towards zero.

    Args:
        optimizer: The class; one that needs a closure (LBFGS) or sparse gradients, or that keeps state across tensors,
            cannot be used.
        **options: Passed to it: numbers, strings, booleans, None, or tuples of them.

    Raises:
        ConfigError: No such class, or options that it does not take.

    >>> optimizer = TorchServerOptimizer(torch.optim.SGD, lr=0.5)
    >>> optimizer, optimizer.step({"w": torch.zeros(1)}, {"w": torch.ones(1)})["w"]
    (TorchServerOptimizer(SGD, lr=0.5), tensor([0.5000]))
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            msg = f"TorchServerOptimizer takes a torch.optim class such as torch.optim.SGD, got {optimizer!r}."
            raise ConfigError(msg)
        self._class, self._options = optimizer, copy.deepcopy(options)
        self._memory: dict[str, _Memory] = {}
        self._probe()

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"TorchServerOptimizer({self._class.__name__}{options})"

    def _probe(self) -> None:
        """One step on a parameter of no use: what cannot work shows now, not after the first round's training."""
        try:
            json.dumps(self._options, allow_nan=False)
            if self._options.get("maximize"):
                raise ValueError("maximize=True would move away from the participants")  # noqa: EM101
            parameter = nn.Parameter(torch.zeros(2, 2))
            optimizer = self._class([parameter], **self._options)
            before = repr(optimizer.state_dict()["param_groups"])
            parameter.grad = torch.ones(2, 2)
            optimizer.step()
            if repr(optimizer.state_dict()["param_groups"]) != before:
                raise ValueError("it keeps state across tensors, and a round may hold only some of them")  # noqa: EM101
            json.dumps([v for v in optimizer.state[parameter].values() if not isinstance(v, Tensor)], allow_nan=False)
        except Exception as error:
            msg = (
                f"{self!r} cannot step on named pseudo-gradients ({type(error).__name__}: {error!s:.200}). Choose "
                "other options, or an optimizer that needs nothing but dense gradients."
            )
            raise ConfigError(msg) from None

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next values, in the state's types; computed in float32 or better.

        Raises:
            FederationError: Names or shapes that are not the state's, a result that is not finite, or torch's optimizer
                cannot be used on these tensors.
        """
        _check_names(state, pseudo_gradient)
        if not pseudo_gradient:
            return {}
        parameters = {name: nn.Parameter(_master(state[name]).clone()) for name in pseudo_gradient}
        for name, parameter in parameters.items():
            parameter.grad = -pseudo_gradient[name].to(parameter)
        try:
            optimizer = self._class(list(parameters.values()), **self._options)
            known = {i: self._memory[n] for i, n in enumerate(parameters) if n in self._memory}
            # deep copies: torch steps in place, and a step that fails must leave the memory as it was
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(known), "param_groups": groups})
            optimizer.step()
        except Exception as error:
            msg = f"{self!r} failed ({type(error).__name__}: {error!s:.200}); weights and memory are as they were."
            raise FederationError(msg) from error
        moved = {name: p.detach().to(state[name].dtype) for name, p in parameters.items()}
        memory = {name: dict(optimizer.state[p]) for name, p in parameters.items()}
        _check_finite(self, moved, memory)
        self._memory = {**self._memory, **memory}
        return moved

    def settings(self) -> dict[str, Any]:
        """Class, torch's class and the options as JSON."""
        kind = f"{self._class.__module__}.{self._class.__qualname__}"
        options: dict[str, Any] = json.loads(json.dumps(self._options))
        return {"class": type(self).__name__, "optimizer": kind, "options": options}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the memory as "slot/<tensor name>", the classes, and what torch keeps as plain numbers."""
        tensors, values = _flattened(self._memory)
        settings = self.settings()
        return tensors, {"class": settings["class"], "optimizer": settings["optimizer"], "values": values}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ConfigError: It is another optimizer's.
        """
        settings = self.settings()
        _check_foreign(numbers, {"class": settings["class"], "optimizer": settings["optimizer"]}, "values")
        self._memory = _unflattened(tensors, numbers["values"])


class DiLoCo:
    """The outer optimizer of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on −D.

    >>> DiLoCo().step({"w": torch.zeros(1)}, {"w": torch.ones(1)})["w"]
    tensor([1.3300])
    """

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = _checked("DiLoCo", "lr", lr), _checked("DiLoCo", "momentum", momentum)
        # torch refuses nesterov without momentum, where it is plain SGD
        sgd = {"lr": self.lr, "momentum": self.momentum, "nesterov": self.momentum > 0}
        self._outer = TorchServerOptimizer(torch.optim.SGD, **sgd)

    def __repr__(self) -> str:
        return f"DiLoCo(lr={self.lr}, momentum={self.momentum})"

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `TorchServerOptimizer.step`."""
        return self._outer.step(state, pseudo_gradient)

    def settings(self) -> dict[str, Any]:
        """Class and options as JSON."""
        return {"class": "DiLoCo", "lr": self.lr, "momentum": self.momentum}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the momentum as "momentum_buffer/<tensor name>", and the class."""
        tensors, numbers = self._outer.state_dict()
        return tensors, {**numbers, "class": "DiLoCo"}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; raises ConfigError where it is another optimizer's."""
        _check_foreign(numbers, {"class": "DiLoCo"}, "optimizer", "values")
        self._outer.load_state_dict(tensors, {**numbers, "class": type(self._outer).__name__})


# --- shared -----------------------------------------------------------------------------------------------------------


_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("lr", "tau", "step_size"), ("positive and finite", lambda value: 0 < value < math.inf)),
    **dict.fromkeys(("momentum", "beta1", "beta2"), ("from 0 to below 1", lambda value: 0 <= value < 1)),
}


def _checked(rule: str, option: str, value: Any) -> float:
    allowed, fits = _RANGES[option]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        msg = f"{rule}: `{option}` is a number, {allowed}, got {value!r}."
        raise ConfigError(msg)
    return float(value)


def _master(tensor: Tensor) -> Tensor:
    """In float32 or better, where small steps are not rounded away."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _check_names(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    foreign = sorted(values.keys() - state.keys())
    if foreign:
        msg = f"{len(foreign)} tensors {foreign[:3]} are not in the global weights: they are of another model."
        raise FederationError(msg)
    for name, value in values.items():
        _check_shape(name, value, state[name])


def _check_shape(what: str, value: Tensor, weights: Tensor) -> None:
    if value.shape != weights.shape:  # torch would broadcast
        msg = f"{what} has shape {tuple(value.shape)}, the global weights' is {tuple(weights.shape)}: of another model."
        raise FederationError(msg)


def _check_finite(optimizer: Any, moved: Mapping[str, Tensor], memory: Mapping[str, _Memory]) -> None:
    for name, value in moved.items():
        kept = [v for v in memory[name].values() if isinstance(v, Tensor)]
        if not all(all_finite(v) for v in (value, *kept)):
            msg = (
                f"{optimizer!r} would make {name} NaN or infinite; weights and memory are as they were. Lower its "
                "learning rate, or the participants'."
            )
            raise FederationError(msg)


def _flattened(memory: Mapping[str, _Memory]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of the tensors, and the rest, by "slot/<tensor name>"."""
    flat = {f"{slot}/{name}": value for name, slots in memory.items() for slot, value in slots.items()}
    tensors = {name: v.detach().clone().contiguous() for name, v in flat.items() if isinstance(v, Tensor)}
    return tensors, {name: value for name, value in flat.items() if not isinstance(value, Tensor)}


def _unflattened(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, _Memory]:
    """The reverse of `_flattened`, with copies."""
    memory: dict[str, _Memory] = {}
    for key, value in {**values, **tensors}.items():
        slot, slash, name = key.partition("/")
        if not slash or not slot or (isinstance(value, Tensor) and not all_finite(value)):
            msg = f"{key!r:.100} is no finite server optimizer state named slot/tensor: the checkpoint is damaged."
            raise ConfigError(msg)
        memory.setdefault(name, {})[slot] = value.detach().clone() if isinstance(value, Tensor) else value
    return memory


def _check_foreign(numbers: Mapping[str, Any], wanted: Mapping[str, str], *more: str) -> None:
    if {name: numbers.get(name) for name in wanted} != wanted or numbers.keys() != {*wanted, *more}:
        msg = (
            f"the saved state {dict(numbers)!s:.200} is not of {dict(wanted)}. Resume with the optimizer it began with."
        )
        raise ConfigError(msg)


def from_settings(settings: Mapping[str, Any]) -> ServerOptimizer:
    """The optimizer that `settings()` described, without its memory.

    Raises:
        ConfigError: It is none of this module's, or a torch optimizer that torch.optim does not have: pass it again.
    """
    if not isinstance(settings, Mapping):
        settings = {"class": settings}
    options = {name: value for name, value in settings.items() if name != "class"}
    if settings.get("class") == "TorchServerOptimizer":
        module, _, kind = str(options["optimizer"]).rpartition(".")
        found = getattr(torch.optim, kind, None)
        if found is not None and found.__module__ == module:
            return TorchServerOptimizer(found, **options["options"])
    own = {kind.__name__: kind for kind in (FedAvgM, Reptile, FedAdagrad, FedAdam, FedYogi, DiLoCo)}
    if settings.get("class") in own:
        try:
            made: ServerOptimizer = own[settings["class"]](**options)
        except TypeError as error:
            msg = f"{settings['class']} does not take {sorted(options)}: {error}."
            raise ConfigError(msg) from None
        return made
    msg = f"the server optimizer was {dict(settings)!r:.120}, which is code of your own: pass server_optimizer= again."
    raise ConfigError(msg)
