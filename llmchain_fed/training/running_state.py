"""State that training's forward passes change and no optimizer does: running statistics, counters, averages, biases.

Knows torch's buffers and the modes of a module's parts. Knows nothing about text, losses, optimizers or rounds.

Such state would end up different at every participant, and it does not travel: what answers after a round would not be
what was trained. So it has to stand still, which it does in a part that is frozen in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.weights import is_adapter


def still_parts(module: nn.Module, run: Callable[[], object] | None) -> list[str]:
    """The names of the parts with such state, all of them frozen in evaluation mode; training must leave them in it.

    Frozen in evaluation mode is a part that was put into it while the module as a whole is in training mode, or a
    part in evaluation mode whose parameters are not trained (the base under an adapter).

    Args:
        module: It is in the modes in which its owner handed it over; they, and every buffer, are as before afterwards.
        run: It makes one forward pass; None where nobody knows what the module takes: only torch's layers are found.

    Raises:
        UnsupportedModelError: Training would change some part's state; the message names the part and the remedy.
    """
    named = {name for name, part in module.named_modules() if _is_running(part)}
    still = {name for name in named if _is_frozen(module, name)}
    restless = named - still
    if not restless and run is not None:
        # Twice: a part that is found in the first pass and frozen must stand still in the second.
        for _ in range(2):
            with _as_in_training(module, still):
                changed = {_owner(name) for name in changed_buffers(module, run)}
            found = {name for name in changed - still if _is_frozen(module, name)}
            restless = changed - found
            still |= found
            if restless or not found:
                break
    if restless:
        raise UnsupportedModelError(_refusal(module, sorted(restless)))
    return sorted(still)


def keep_still(module: nn.Module, parts: Collection[str]) -> None:
    """Puts these parts back into evaluation mode, after `module.train()`."""
    for name in parts:
        module.get_submodule(name).eval()


def check_unchanged(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Makes sure that no persistent buffer has changed in training so far; the others may be caches.

    Raises:
        UnsupportedModelError: A buffer has changed; the message names it and the remedy.
    """
    now = {name: b for name, b in module.named_buffers() if _is_persistent(module, name)}
    if changed := _different(before, now):
        raise UnsupportedModelError(_refusal(module, sorted({_owner(name) for name in changed})))


@torch.no_grad()
def changed_buffers(module: nn.Module, run: Callable[[], object]) -> set[str]:
    """The buffers that a forward pass changes for good; all have their values back afterwards.

    A cache (rotary frequencies, a mask) changes at most once for one input: a buffer that no file stores counts only
    when the same pass changes it twice.
    """
    with restored(module) as start:
        run()
        first = _copies(module)
        changed = _different(start, first)
        kept = {name for name in changed if _is_persistent(module, name)}
        if changed - kept:
            run()
            kept |= changed & _different(first, _copies(module))
        return kept


@contextmanager
def restored(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every buffer has its value back afterwards; copies of the former values are given."""
    start = _copies(module)
    try:
        yield start
    finally:
        for name, buffer in module.named_buffers():
            if name in start and start[name].shape == buffer.shape:  # some are made by the forward pass
                buffer.copy_(start[name])


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in module.named_buffers() if b.device.type != "meta"}


def _different(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> set[str]:
    """Names of buffers that are there in both and differ; one of another shape was made anew and is a cache."""
    both = before.keys() & now.keys()
    return {n for n in both if before[n].shape == now[n].shape and not torch.equal(before[n], now[n].to(before[n]))}


def _is_persistent(module: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own not in module.get_submodule(path)._non_persistent_buffers_set


def _is_running(part: nn.Module) -> bool:
    """Torch's own layers with running state: batch and instance norms that track statistics, spectral norms."""
    if isinstance(part, _NormBase):
        return part.track_running_stats and part.running_mean is not None
    hooks = part._forward_pre_hooks.values()
    return isinstance(part, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


def _owner(buffer: str) -> str:
    return buffer.rpartition(".")[0]


def _is_frozen(module: nn.Module, name: str) -> bool:
    if any(part.training for part in module.get_submodule(name).modules()):
        return False
    if module.training and not hasattr(module, "peft_config"):  # PEFT's wrapping is always in training mode
        return True
    return not any(p.requires_grad for n, p in _around(module, name).named_parameters() if not is_adapter(n))


def _around(module: nn.Module, name: str) -> nn.Module:
    """The part itself or, where it has no parameters, the nearest around it that has."""
    name = name.split(".parametrizations.")[0]
    while name and not any(True for _ in module.get_submodule(name).parameters()):
        name = _owner(name)
    return module.get_submodule(name)


@contextmanager
def _as_in_training(module: nn.Module, still: Collection[str]) -> Iterator[None]:
    """Training mode but for these parts; every part's former mode back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.train()
    keep_still(module, still)
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _refusal(module: nn.Module, parts: list[str]) -> str:
    shown = ", ".join(f"{n or 'the module itself'} ({type(module.get_submodule(n)).__name__})" for n in parts[:3])
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return (
        f"in training, every forward pass of {type(module).__name__} changes state that no optimizer trains, in "
        f"{shown}{more}: running statistics, counters or averages would end up different at every participant and are "
        "not averaged. Freeze that part in evaluation mode before training, and it stays so: "
        f"module.train(); module.get_submodule({parts[0]!r}).eval()"
    )
