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

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import ParticipantError
from llmchain_fed.updates import serialization

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


def pack(progress: Mapping[int, Progress], *, new_pass: bool = False) -> bytes:
    """Round → progress as bytes.

    Args:
        progress: Of one participant.
        new_pass: Whether whoever is given it shall begin a new pass over its data, which is other data than then.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for number, item in progress.items():
        header[str(number)] = {"next_step": item.next_step, "optimizer": None}
        for kind, kept in item.kept().items():
            tensors |= {f"{number}/{kind}/{n}": t.detach().cpu().contiguous() for n, t in kept.items()}
        if item.optimizer_state is None:
            continue
        values: dict[str, dict[str, Any]] = {}
        for index, state in item.optimizer_state["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}/{index}/{key}"] = value.detach().cpu().contiguous()
                else:
                    values.setdefault(str(index), {})[key] = value
        header[str(number)]["optimizer"] = {"values": values, "param_groups": item.optimizer_state["param_groups"]}
    head = {"kind": "personal_state", "progress": header}
    return serialization.pack(tensors, head | {"new_pass": True} if new_pass else head)


def at_new_pass(progress: Mapping[int, Progress], data: Any, batch_size: int) -> dict[int, Progress]:
    """The same, at the beginning of the next pass: going on within one would leave a part of other data out of it.

    Args:
        progress: By round.
        data: What the participant trains on now; a DataLoader has batches of its own size.
        batch_size: examples.
    """
    try:
        per_pass = max(1, -(-len(data) // batch_size) if isinstance(data, EncodedExamples) else len(data))
    except TypeError:  # a DataLoader whose dataset does not know: it begins at its beginning every time
        return dict(progress)
    return {n: replace(item, next_step=-(-item.next_step // per_pass) * per_pass) for n, item in progress.items()}


def read(header: Any, tensors: Mapping[str, Tensor]) -> dict[int, Progress]:
    """The reverse of `pack`, from the header's `progress` and the tensors.

    Raises:
        ParticipantError: They do not fit together.
    """
    try:
        found = {int(n): Progress(int(item["next_step"])) for n, item in header.items()}
        for number, item in header.items():
            if item["optimizer"] is None:
                continue
            state = {int(i): dict(values) for i, values in item["optimizer"]["values"].items()}
            found[int(number)].optimizer_state = {"state": state, "param_groups": item["optimizer"]["param_groups"]}
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"the personal state cannot be read ({type(error).__name__}: {error})."
        raise ParticipantError(msg) from None
    return found
