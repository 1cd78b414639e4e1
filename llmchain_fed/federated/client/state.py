"""Where a participant stands after a round: its place in the data, and what of tensors stays with it.

Knows torch optimizer states, named tensors and bytes: safetensors and JSON. Knows nothing about training. This never
travels with an update: it moves only on the operation `personal_state`, by which a hub asks for it, or gives back what
can be this participant's, and which a site's policy may forbid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError, ParticipantError
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.tasks import KeptOptimizer, PersonalStateTask, ProgressData
from llmchain_fed.model.weights import all_finite
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.schedule import steps_per_pass
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.lora_layout import PARTS, A, B, selected
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms import carried_by

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client

KINDS = ("carried", "private", "ditto", "personal")
"""of named tensors that stay with a participant"""
_ADAM = ("exp_avg", "exp_avg_sq", "step")
_KEPT = {"Adam": _ADAM, "AdamW": _ADAM, "SGD": ("momentum_buffer",)}
_REMEDY = "Give back what this participant gave."


@dataclass
class Progress:
    """Where a participant stands after a round; an interrupted round leaves the former one in force."""

    next_step: int = 0
    """batches that rounds of `max_steps` have consumed"""
    optimizer_state: dict[str, Any] | None = field(default=None, repr=False)
    """`torch.optim.Optimizer.state_dict()`, where it is kept"""
    carried: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """what transforms of its updates carry, as "transform/name"; "residual/…" is what a lossy codec has left out"""
    private: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """trained tensors that are never shared (FedSA-LoRA's B)"""
    ditto: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """the factors that Ditto goes on training, beside the global state's remainder"""
    personal: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """an adapter that `personalize` made, which stands alone"""

    @property
    def has_own(self) -> bool:
        """Whether there is a personal model of any kind."""
        return bool(self.personal or self.private or self.ditto)

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """The named tensors by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}


class ProgressByRound:
    """Where a participant stands, by the rounds that it trained in. An interrupted round has not happened.

    Whether a round counts, only what is asked next tells: a later round says that it does, the same one again that it
    was interrupted. So two are kept: after the latest round, and before it. Rounds count from 1; 0 is the beginning.

    | it trained in | it is asked about | it stands |
    |---|---|---|
    | nothing | any round | at its start |
    | 1, 2 | 3, or no round in particular | as after 2 |
    | 1, 2 | 2 again | as after 1 |
    | 1, 2, 3 | 2: the hub went back further than is kept | at its start |
    """

    def __init__(self, rounds: Mapping[int, Progress] | None = None) -> None:
        self.rounds: dict[int, Progress] = dict(rounds or {0: Progress()})

    def before(self, number: int | None = None) -> tuple[int, Progress]:
        """The latest round that counts before this one, and where it ended; None is the latest of all."""
        at = max((r for r in self.rounds if number is None or r < number), default=0)
        return at, self.rounds.get(at, Progress())

    def trained(self, number: int, former: Progress, now: Progress) -> None:
        """A round is done, which began at `former`."""
        self.rounds = {r: p for r, p in self.rounds.items() if p is former} | {number: now}

    def personalized(self, number: int, values: dict[str, Tensor]) -> Progress:
        """Another personal model, made before this round; all else stays."""
        at, progress = self.before(number)
        self.rounds = self.rounds | {at: replace(progress, personal=values)}
        return self.rounds[at]

    def without_optimizers(self) -> ProgressByRound:
        """The same, for other training options than an optimizer was made with."""
        return ProgressByRound({n: replace(p, optimizer_state=None) for n, p in self.rounds.items()})

    @property
    def private(self) -> set[str]:
        """Names of tensors that were never shared."""
        return set().union(*(p.private for p in self.rounds.values()))


def pack(progress: Mapping[int, Progress], *, new_pass: bool = False) -> bytes:
    """Round → progress as a message that gives it back; `new_pass` has the data, other than then, begun anew."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, ProgressData] = {}
    for number, item in progress.items():
        for kind, kept in item.kept().items():
            tensors |= {f"{number}/{kind}/{n}": t.detach().cpu() for n, t in kept.items()}
        optimizer = None
        if item.optimizer_state is not None:
            values: dict[str, dict[str, Any]] = {}
            for index, state in item.optimizer_state["state"].items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"{number}/{index}/{key}"] = value.detach().cpu()
                    else:
                        values.setdefault(str(index), {})[key] = value
            optimizer = KeptOptimizer.model_construct(values=values, param_groups=item.optimizer_state["param_groups"])
        places[str(number)] = ProgressData.model_construct(next_step=item.next_step, optimizer=optimizer)
    said: dict[str, Any] = {"progress": places} | ({"new_pass": True} if new_pass else {})
    return messages.write(PersonalStateTask.model_construct(**said), tensors)


def at_new_pass(progress: Mapping[int, Progress], per_pass: int | None) -> dict[int, Progress]:
    """The same, at the beginning of the next pass: going on within one would leave a part of other data out of it.

    A pass has `per_pass` steps; None of a DataLoader whose dataset does not know begins at its beginning every time.
    """
    if not per_pass:
        return dict(progress)
    return {n: replace(item, next_step=-(-item.next_step // per_pass) * per_pass) for n, item in progress.items()}


def read(progress: Mapping[str, ProgressData] | None, tensors: Mapping[str, Tensor]) -> dict[int, Progress]:
    """The reverse of `pack`, from the message's `progress` and its tensors.

    Raises:
        ParticipantError: They do not fit together.
    """
    try:
        found = {int(number): Progress(place.next_step) for number, place in (progress or {}).items()}
        for number, place in (progress or {}).items():
            if place.optimizer is not None:
                state = {int(i): dict(values) for i, values in place.optimizer.values.items()}
                kept_groups = place.optimizer.param_groups
                found[int(number)].optimizer_state = {"state": state, "param_groups": kept_groups}
        for name, tensor in tensors.items():
            number, index, key = name.split("/", 2)
            if index in KINDS:
                found[int(number)].kept()[index][key] = torch.clone(tensor)
                continue
            kept = found[int(number)].optimizer_state
            if kept is None:
                msg = f"{name} belongs to no optimizer"
                raise KeyError(msg)
            kept["state"].setdefault(int(index), {})[key] = torch.clone(tensor)
        if not found:
            msg = "no round"
            raise KeyError(msg)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"the personal state cannot be read ({type(error).__name__}: {error})."
        raise ParticipantError(msg) from None
    return found


def unpack(state: bytes) -> dict[int, Progress]:
    """Round → where a participant stands, as it answered or as a checkpoint has it: the reverse of `pack`.

    Raises:
        FederationError: The bytes are none of ours.
    """
    task, tensors = messages.read_personal_state(state)
    return read(task.progress, tensors)


# --- the operation, and what may be given back ------------------------------------------------------------------------


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
    return info.shape == whole and 1 <= rank <= r + min(m, n)  # a remainder is stacked beside it


def _refuse(why: str) -> None:
    msg = f"the personal state cannot be read: {why}. {_REMEDY}"
    raise ParticipantError(msg)
