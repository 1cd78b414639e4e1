"""Where a participant stands after a round: its place in the data, and what of tensors stays with it.

Knows torch optimizer states, named tensors and bytes: safetensors and JSON. Knows nothing about training. This never
travels with an update: it moves only on `personal_state`, which a site's policy may forbid. What comes in is checked by
`given_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.errors import ParticipantError
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.tasks import KeptOptimizer, PersonalStateTask, ProgressData

KINDS = ("carried", "private", "ditto", "personal")
"""of named tensors that stay with a participant"""


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
    """Round → progress as a message that gives it back.

    Args:
        progress: Of one participant.
        new_pass: Whether whoever is given it shall begin a new pass over its data, which is other data than then.
    """
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

    Args:
        progress: By round.
        per_pass: steps; None of a DataLoader whose dataset does not know, which begins at its beginning every time.
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
