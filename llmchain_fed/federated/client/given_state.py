"""The operation `personal_state`: a hub asks where a participant stands, or gives back what can be this participant's.

Knows named tensors, optimizers by name, and their states. Knows nothing of how training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError, ParticipantError
from llmchain_fed.federated.client.limits import steps_per_pass
from llmchain_fed.federated.client.state import KINDS, Progress, ProgressByRound, at_new_pass, pack, read
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.tasks import PersonalStateTask, ProgressData
from llmchain_fed.model.weights import all_finite
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.lora_layout import PARTS, A, B, selected
from llmchain_fed.updates.low_rank import full_rank
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms import carried_by

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client

_ADAM = ("exp_avg", "exp_avg_sq", "step")
_KEPT = {"Adam": _ADAM, "AdamW": _ADAM, "SGD": ("momentum_buffer",)}
_REMEDY = "Give back what this participant gave."


def check(client: Client, task: PersonalStateTask, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
    """Makes sure, before a value is read, that what is given back can be this participant's.

    Raises:
        FederationError: Tensors that belong to nothing.
        ParticipantError: It cannot.
    """
    if task.progress is not None:
        check_layout(task.progress, infos, layout, carried_by(client.transforms, layout.values))
    elif infos:
        msg = f"the personal_state message gives nothing back and brings {len(infos)} tensors."
        raise FederationError(msg)


def exchange(client: Client, task: PersonalStateTask, layout: Layout, tensors: Mapping[str, Tensor]) -> bytes:
    """Stands where the message says, if it says so; and says where it stands."""
    if task.progress is not None:
        given = read(task.progress, tensors)
        if client.follows:
            check_values(given, client.config, layout)
        if task.new_pass:
            given = at_new_pass(given, steps_per_pass(client.data.train(), client.config))
        client.progress = ProgressByRound(given)
    return pack(dict([client.progress.before(task.round)]))


def check_layout(
    progress: Mapping[str, ProgressData],
    infos: Mapping[str, TensorInfo],
    layout: Layout,
    carried: Mapping[str, TensorInfo],
) -> None:
    """Makes sure, before a value is read, that the tensors are those of a state of this participant's.

    `carried` is what transforms of its updates may carry from round to round.

    Raises:
        ParticipantError: They are not.
    """
    shapes = {info.shape for info in layout.values.values()} | {()}
    found: dict[tuple[str, str], set[str]] = {}
    for name, info in infos.items():
        number, kind, key = (*name.split("/", 2), "", "")[:3]
        if number not in progress or not key:
            _refuse(f"{shown(name)} belongs to none of its rounds")
        if kind in KINDS:
            found.setdefault((number, kind), set()).add(key)
            if carried.get(key) != info if kind == "carried" else not _is_own(kind, key, info, layout.values):
                _refuse(f"{shown(name)} is {info.dtype} {shown(info.shape)}, which no tensor of that name is here")
        elif progress[number].optimizer is None or not (kind.isascii() and kind.isdecimal()):
            _refuse(f"{shown(name)} belongs to no optimizer")
        elif len(kind) > 9 or info.shape not in shapes or not info.dtype.is_floating_point:
            _refuse(f"{shown(name)} is {info.dtype} {shown(info.shape)}, which no optimizer's state is here")
    for (number, kind), names in found.items():
        if kind in ("ditto", "personal") and names != layout.values.keys():
            _refuse(f"the model of its own in {number}/{kind} is not whole")
    for number in {number for number, kind in found if kind == "personal"}:
        of = {n: infos[f"{number}/personal/{n}"].shape for n in layout.values}
        if any(of[n][0] != of[n.removesuffix(A) + B][1] for n in of if n.endswith(A)):
            _refuse(f"the factors in {number}/personal have no common rank")


def check_finite(progress: Mapping[int, Progress]) -> None:
    """Makes sure that all values but an optimizer's are finite.

    Raises:
        ParticipantError: They are not.
    """
    for number, item in progress.items():
        for kind, kept in item.kept().items():
            for name, tensor in kept.items():
                if not all_finite(tensor):
                    _refuse(f"{number}/{kind}/{name} contains NaN or infinite values")


def check_values(progress: Mapping[int, Progress], config: TrainingConfig, layout: Layout) -> None:
    """Makes sure that values are finite and that an optimizer by name goes on as it would have by itself.

    Raises:
        ParticipantError: They are not, or it would not: another learning rate, for one, would come in with its state.
    """
    check_finite(progress)
    for number, item in progress.items():
        if item.optimizer_state is None or not isinstance(config.optimizer, str):
            continue
        if not any(fits(item.optimizer_state, config, shapes) for shapes in _trained(layout)):
            _refuse(f"the optimizer's state of round {number} is none of {config.optimizer} as it is set here")


def fits(
    kept: Mapping[str, Any], config: TrainingConfig, shapes: list[tuple[int, ...]], *, values: bool = True
) -> bool:
    """Whether a kept state is one of the configuration's optimizer, which has a name, over tensors of these shapes.

    The values of the participant's own training need not be looked at.
    """
    fresh = config.make_optimizer([torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes])
    ours = json.loads(json.dumps(fresh.state_dict()["param_groups"]))
    if json.loads(json.dumps(kept["param_groups"])) != ours:
        return False
    wanted = _KEPT[type(fresh).__name__]
    return all(
        0 <= index < len(shapes)
        and sorted(state) == list(wanted)
        and all(_is_value(key, value, shapes[index], looked_at=values) for key, value in state.items())
        for index, state in kept["state"].items()
    )


def _is_value(key: str, value: Any, shape: tuple[int, ...], *, looked_at: bool) -> bool:
    if key == "momentum_buffer" and value is None:
        return True
    if not isinstance(value, Tensor) or tuple(value.shape) != (() if key == "step" else shape):
        return False
    if not looked_at:
        return True
    if not all_finite(value):
        return False
    if key == "step":
        return 0 <= float(value) <= 2**53
    return key != "exp_avg_sq" or not bool((value < 0).any())


def _trained(layout: Layout) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tensors that are trained, for each part that there is."""
    for part in PARTS:
        if names := selected(layout.values, part):
            yield [layout.values[n].shape for n in names]


def _is_own(kind: str, key: str, info: TensorInfo, values: Mapping[str, TensorInfo]) -> bool:
    wanted = values.get(key)
    if wanted is None or not info.dtype.is_floating_point or len(info.shape) != len(wanted.shape):
        return False
    if info.shape == wanted.shape or kind != "personal" or not key.endswith((A, B)) or len(info.shape) != 2:
        return info.shape == wanted.shape
    layer = key.removesuffix(A).removesuffix(B)
    a, b = values.get(layer + A), values.get(layer + B)
    if a is None or b is None:
        return False
    (r, n), m = a.shape, b.shape[0]
    rank = info.shape[0] if key.endswith(A) else info.shape[1]
    whole = (rank, n) if key.endswith(A) else (m, rank)
    return info.shape == whole and 1 <= rank <= r + full_rank(m, n)  # a remainder is stacked beside it


def _refuse(why: str) -> None:
    msg = f"the personal state cannot be read: {why}. {_REMEDY}"
    raise ParticipantError(msg)
