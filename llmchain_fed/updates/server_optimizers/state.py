"""What server optimizers share: options in range, weights in float32 or better, and a memory per tensor, kept and read.

Knows named tensors. Knows no optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError, UpdateRefusedError
from llmchain_fed.model.weights import all_finite
from llmchain_fed.untrusted import shown

Memory = dict[str, Any]  # of one tensor: slot → its value

_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("lr", "tau", "step_size"), ("positive and finite", lambda value: 0 < value <= sys.float_info.max)),
    **dict.fromkeys(("momentum", "beta1", "beta2"), ("from 0 to below 1", lambda value: 0 <= value < 1)),
}


def in_range(rule: str, option: str, value: Any) -> float:
    """The option as a number, if it is in its range."""
    allowed, fits = _RANGES[option]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        got = repr(shown(value)) if isinstance(value, str) else shown(value)
        msg = f"{rule}: `{option}` is a number, {allowed}, got {got}."
        raise ConfigError(msg)
    return float(value)


def master(tensor: Tensor) -> Tensor:
    """In float32 or better, where small steps are not rounded away."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_names(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Makes sure that `values` are tensors of the state, in its shapes."""
    foreign = sorted(values.keys() - state.keys())
    if foreign:
        msg = f"{len(foreign)} tensors {foreign[:3]} are not in the global weights: they are of another model."
        raise FederationError(msg)
    for name, value in values.items():
        check_shape(name, value, state[name])


def check_tensors(whose: str, values: Any) -> None:
    """Makes sure that what code of a user's own returned are named tensors."""
    if not isinstance(values, Mapping):
        msg = f"{whose} returned {type(values).__name__}. It must return a mapping of names to tensors."
        raise FederationError(msg)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            msg = f"{whose} returned {type(value).__name__} for {name!r:.80}. Make it a torch.Tensor."
            raise FederationError(msg)


def check_shape(what: str, value: Tensor, weights: Tensor) -> None:
    """Makes sure that a tensor has the weights' shape."""
    if value.shape != weights.shape:  # torch would broadcast
        msg = f"{what} has shape {tuple(value.shape)}, the global weights' is {tuple(weights.shape)}: of another model."
        raise FederationError(msg)


def check_finite(optimizer: Any, moved: Mapping[str, Tensor], memory: Mapping[str, Memory]) -> None:
    """Makes sure that neither the next weights nor the memory overflowed.

    Raises:
        UpdateRefusedError: One did.
    """
    for name, value in moved.items():
        kept = [v for v in memory[name].values() if isinstance(v, Tensor)]
        if not all(all_finite(v) for v in (value, *kept)):
            msg = (
                f"{optimizer!r} would make {name} NaN or infinite; weights and memory are as they were. Lower its "
                "learning rate, or the participants'."
            )
            raise UpdateRefusedError(msg)


def flattened(memory: Mapping[str, Memory]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of the tensors, and the rest, by "slot/<tensor name>"."""
    flat = {f"{slot}/{name}": value for name, slots in memory.items() for slot, value in slots.items()}
    tensors = {name: v.detach().clone().contiguous() for name, v in flat.items() if isinstance(v, Tensor)}
    return tensors, {name: value for name, value in flat.items() if not isinstance(value, Tensor)}


def unflattened(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Memory]:
    """The reverse of `flattened`, with copies."""
    memory: dict[str, Memory] = {}
    for key, value in {**values, **tensors}.items():
        slot, slash, name = key.partition("/")
        if not slash or not slot or (isinstance(value, Tensor) and not all_finite(value)):
            msg = f"{key!r:.100} is no finite server optimizer state named slot/tensor: the checkpoint is damaged."
            raise ConfigError(msg)
        memory.setdefault(name, {})[slot] = value.detach().clone() if isinstance(value, Tensor) else value
    return memory


def check_foreign(numbers: Mapping[str, Any], wanted: Mapping[str, str], *more: str) -> None:
    """Makes sure that a saved state is of the same optimizer."""
    if {name: numbers.get(name) for name in wanted} != wanted or numbers.keys() != {*wanted, *more}:
        msg = (
            f"the saved state {shown(numbers, 200)} is not of {dict(wanted)}. Resume with the optimizer it began with."
        )
        raise ConfigError(msg)
