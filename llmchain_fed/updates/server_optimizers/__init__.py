"""How the aggregated values move the global weights.

Knows named tensors only: nothing of rounds, participants or models. Without a server optimizer the aggregate is loaded
as it is. The optimizers here keep their memory (momentum, second moments) by tensor name, from a name's first sight on;
names that a round leaves out are neither moved nor aged. They never change a tensor in place, a step that raises leaves
them as they were, and `copy.deepcopy` gives an independent one. The global weights stay the single truth: nothing here
keeps a copy of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.server_optimizers.adaptive import FedAdagrad, FedAdam, FedAvgM, FedYogi, Reptile
from llmchain_fed.updates.server_optimizers.state import check_names, check_tensors
from llmchain_fed.updates.server_optimizers.torch_optimizers import DiLoCo, TorchServerOptimizer

_WRITTEN_OUT = (FedAvgM, Reptile, FedAdagrad, FedAdam, FedYogi, DiLoCo)
_OWN: Mapping[str, type[Any]] = {kind.__name__: kind for kind in _WRITTEN_OUT}
_OF_MEMORY = ("settings", "state_dict", "load_state_dict")
_LONGEST = 64  # characters of an option, or values in a list of them


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
        FederationError: Names that are not the state's, another shape, or a result that is no tensors of the names
            that were asked for.
    """
    check_names(state, aggregate)
    if optimizer is None:
        return {**state, **aggregate}
    gradient = {name: value.float() - state[name].float() for name, value in aggregate.items()}
    before = {name: state[name] for name in aggregate}
    if type(optimizer) not in (*_WRITTEN_OUT, TorchServerOptimizer):
        # one that writes in place must not write into what a round that fails goes back to
        before = {name: value.clone() for name, value in before.items()}
    moved = optimizer.step(before, gradient)
    check_tensors(f"the step of {optimizer!r:.80}", moved)
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
            f"server_optimizer={kind}(…) has parameters of its own, and its step() knows no pseudo-gradient. "
            f"Pass TorchServerOptimizer(torch.optim.{kind}, …)."
        )
        raise ConfigError(msg)
    steps = callable(getattr(optimizer, "step", None))
    if isinstance(optimizer, type) and steps:
        kind = optimizer.__name__
        torchs = issubclass(optimizer, torch.optim.Optimizer)
        instead = f"Pass TorchServerOptimizer(torch.optim.{kind}, …)" if torchs else f"Call it: {kind}(…)"
        msg = f"server_optimizer={kind} is a class, not an object. {instead}."
        raise ConfigError(msg)
    if not steps:
        known = ", ".join(f"{kind.__name__}()" for kind in _WRITTEN_OUT)
        msg = (
            f"server_optimizer is None, {known}, TorchServerOptimizer(torch.optim.…, …), or an object with "
            f"step(state, pseudo_gradient), got {optimizer!r:.80}."
        )
        raise ConfigError(msg)
    _check_memory(optimizer)


def _check_memory(optimizer: Any) -> None:
    """Makes sure that one whose memory is to be saved says all that is needed for that, in the form it is kept in."""
    said = [name for name in _OF_MEMORY if callable(getattr(optimizer, name, None))]
    wanted = "settings() → a mapping, state_dict() → (tensors by name, plain data), load_state_dict(tensors, data)"
    if said and len(said) < len(_OF_MEMORY):
        msg = (
            f"{optimizer!r:.80} has {', '.join(said)} alone, so no checkpoint could keep its memory. Give it {wanted}, "
            "or none of them: then its memory begins anew with a resumed run."
        )
        raise ConfigError(msg)
    if said and type(optimizer) not in (*_WRITTEN_OUT, TorchServerOptimizer):
        found = optimizer.state_dict()
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Mapping) for part in found)):
            msg = f"{optimizer!r:.80}: state_dict() gives {type(found).__name__}, no pair of mappings. Give {wanted}."
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


def is_known(settings: Mapping[str, Any]) -> bool:
    """Whether `settings()` described one of this module's, rather than code of somebody's own."""
    return settings.get("class") in [*_OWN, TorchServerOptimizer.__name__]


def from_settings(settings: Any) -> ServerOptimizer:
    """The optimizer that `settings()` described, without its memory; classes are looked up in fixed tables alone.

    Raises:
        ConfigError: It is none of this module's, or a torch optimizer that torch.optim does not have: pass it again. Or
            its options are none.
    """
    given = dict(settings) if isinstance(settings, Mapping) else {"class": settings}
    kind, options = given.pop("class", None), given
    if not is_known({"class": kind}):
        msg = f"the server optimizer was {shown(kind)}, which is code of your own: pass server_optimizer= again."
        raise ConfigError(msg)
    made: Callable[..., Any] = _OWN.get(kind, TorchServerOptimizer)
    if made is TorchServerOptimizer:
        made, options = _torchs(options)
    if not all(isinstance(name, str) and _is_plain(value) for name, value in options.items()):
        msg = f"{kind}: options are numbers, texts, true, false, null, or lists of them by name, got {shown(options)}."
        raise ConfigError(msg)
    try:
        optimizer: ServerOptimizer = made(**options)
    except ConfigError as error:
        raise ConfigError(shown(str(error), 500)) from None
    except Exception as error:
        msg = f"{kind} does not take {shown(options)} ({type(error).__name__}: {shown(str(error), 200)})."
        raise ConfigError(msg) from None
    return optimizer


def _torchs(given: Mapping[str, Any]) -> tuple[Callable[..., TorchServerOptimizer], dict[str, Any]]:
    """What makes one of torch's optimizers, and its options."""
    table = {f"{k.__module__}.{k.__qualname__}": k for k in vars(torch.optim).values() if isinstance(k, type)}
    name, options = given.get("optimizer"), given.get("options", {})
    if not isinstance(name, str) or not issubclass(table.get(name, object), torch.optim.Optimizer):
        msg = f"the server optimizer was {shown(name)}, which torch.optim does not have: pass server_optimizer= again."
        raise ConfigError(msg)
    if given.keys() - {"optimizer", "options"} or not isinstance(options, Mapping) or "optimizer" in options:
        msg = f"TorchServerOptimizer: besides its class it takes `optimizer` and `options`, got {shown(given)}."
        raise ConfigError(msg)
    return functools.partial(TorchServerOptimizer, table[name]), dict(options)


def _is_plain(value: Any, *, nested: bool = False) -> bool:
    if isinstance(value, (list, tuple)):
        return not nested and len(value) <= _LONGEST and all(_is_plain(each, nested=True) for each in value)
    if isinstance(value, str):
        return len(value) <= _LONGEST
    return value is None or type(value) in (bool, int, float)


def rehearse(optimizer: ServerOptimizer | None, values: Mapping[str, Tensor]) -> None:
    """Makes sure that the memory of one of this module's fits the weights: a step of a copy, along no gradient.

    Raises:
        ConfigError: It does not: its tensors have other names or shapes, or the step is not finite.
    """
    if not isinstance(optimizer, (*_WRITTEN_OUT, TorchServerOptimizer)):
        return
    tensors, numbers = optimizer.state_dict()
    kept = [*tensors, *numbers.get("values", {})]
    if strangers := [key for key in kept if key.partition("/")[2] not in values]:
        msg = f"the server optimizer remembers {shown(strangers[:3])}, which this model does not train."
        raise ConfigError(msg)
    if kept:
        names = {key.partition("/")[2] for key in kept}
        state = {name: values[name] for name in names}
        try:
            copy.deepcopy(optimizer).step(state, {name: torch.zeros_like(value) for name, value in state.items()})
        except FederationError as error:
            msg = f"the server optimizer's memory does not fit the weights ({shown(str(error), 300)})."
            raise ConfigError(msg) from None
