"""What happens to an update between "trained" and "sent": transforms one after the other, a codec's encoding last.

What comes out of all of them is added to where the participant started and travels as values, unless the last one makes
something else of it: a codec's parts, or what the collection at the hub asks for (`Collection.payload`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.model.weights import all_finite
from llmchain_fed.updates.serialization import TensorInfo, describe
from llmchain_fed.updates.transforms.base import RESIDUAL, Origin, UpdateTransform


def checked_transforms(transforms: Iterable[UpdateTransform] | None) -> tuple[UpdateTransform, ...]:
    """The transforms, if each has a name of its own and can use what comes out of the one before; None are none.

    Raises:
        ConfigError: They do not.
    """
    if isinstance(transforms, UpdateTransform | type):
        msg = f"transforms is a list, got one {type(transforms).__name__}. Write transforms=[…] around it."
        raise ConfigError(msg)
    found = tuple(transforms if transforms is not None else ())
    for transform in found:
        if not isinstance(transform, UpdateTransform) or not isinstance(getattr(transform, "name", None), str):
            msg = f"transforms are UpdateTransform objects with a name, got {transform!r:.80}."
            raise ConfigError(msg)
        name = transform.name
        if name in ("", RESIDUAL) or "/" in name or [t.name for t in found].count(name) > 1:
            msg = f"a transform needs a name of its own without '/', other than {RESIDUAL!r}, got {name!r:.80}."
            raise ConfigError(msg)
    if not all(transform.keeps_names for transform in found[:-1]):
        msg = "a transform that makes something else than a delta is the last one: no other can use that. Put it last."
        raise ConfigError(msg)
    return found


def carried_by(transforms: Iterable[UpdateTransform], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """All that they, and a codec beside them, may carry for such tensors, as "transform/name"."""
    found = {f"{RESIDUAL}/{n}": TensorInfo(torch.float32, info.shape) for n, info in infos.items()}
    return found | {f"{t.name}/{n}": info for t in transforms for n, info in t.carries(infos).items()}


def transformed(
    transforms: Sequence[UpdateTransform], delta: dict[str, Tensor], origin: Origin, carried: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What comes out of all of them, and all that they carry, as "transform/name".

    What is carried of none of these transforms is handed on.

    Raises:
        FederationError: One of them cannot, or makes what it says it does not make; nothing has changed.
    """
    left = {key: t for key, t in carried.items() if key.partition("/")[0] not in {each.name for each in transforms}}
    for transform in transforms:
        prefix, infos = f"{transform.name}/", describe(delta)
        own = {key.removeprefix(prefix): t for key, t in carried.items() if key.startswith(prefix)}
        made = transform.apply(delta, origin, own)
        if not isinstance(made, tuple) or len(made) != 2:
            msg = f"transform {transform.name!r:.80} gives a pair, an outcome and what it carries ({{}} is nothing)."
            raise FederationError(msg)
        outcome, kept = made
        if transform.keeps_names:
            _check_delta(transform.name, outcome, infos)
        said = {**transform.carries(infos), **describe(own)}  # what a round that shared other tensors left may stay
        if wrong := [name for name, info in describe(kept).items() if said.get(name) != info]:
            msg = (
                f"transform {transform.name!r:.80} carries {wrong[0]!r:.80}, which its carries() does not say so: no "
                "checkpoint could be gone on from. Let carries() give type and shape of all it may carry."
            )
            raise FederationError(msg)
        left |= {prefix + name: tensor for name, tensor in kept.items()}
        delta = outcome
    return delta, left


def added(start: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that travel in place of a delta, in the types of where it started."""
    return {name: (start[name].float() + change).to(start[name].dtype) for name, change in delta.items()}


def _check_delta(name: str, outcome: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> None:
    found = {n: tuple(t.shape) for n, t in outcome.items()}
    if found != {n: info.shape for n, info in infos.items()}:
        msg = f"transform {name!r:.80} makes other tensors than it is given. Set keeps_names = False if it means to."
        raise FederationError(msg)
    wrong = next((n for n, t in outcome.items() if not t.is_floating_point() or not all_finite(t)), None)
    if wrong is not None:
        msg = f"transform {name!r:.80} makes {wrong} NaN, infinite or no float, which nobody could use."
        raise FederationError(msg)
