"""Fitting: whether a checkpoint's tensors, and its participants' states, are a model's, before any of them is loaded.

Knows shapes, and what of a hub decides them. Knows nothing of files or of how a hub goes on. A state that fits is one
that the next round can begin with: what would only fail there is refused here, while everything is as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmchain_fed.errors import CheckpointError, LLMChainFedError
from llmchain_fed.federated.checkpoint.files import FileSizes
from llmchain_fed.federated.checkpoint.schema import Contents
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.global_state import GlobalState, parted
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.weights import all_finite
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import decoding, shown
from llmchain_fed.updates.lora_layout import A, B, at_rank, selected
from llmchain_fed.updates.serialization import TensorInfo, describe
from llmchain_fed.updates.transforms import carried_by

_Shape = tuple[int, ...]
_SLACK = 64 * 2**20  # bytes
_A_VALUE = 64  # bytes: what optimizers, codecs and personal models keep of it, eight values in double precision
_A_NAME = 4096  # bytes: of a header, for as many names of each tensor


def limits_of(model: LocalModel) -> FileSizes:
    """Sizes beyond which no file of a federation of this model is.

    Raises:
        NotTrainableError: Nothing in it is trained.
    """
    shapes = _shapes(model)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    beside = sum((m + n) * min(m, n) * 8 for m, n in _layers(shapes).values())
    return FileSizes(_SLACK + _A_VALUE * values + 4 * beside, min(2**24, 2**20 + _A_NAME * len(shapes)))


def state_of(contents: Contents, model: LocalModel) -> GlobalState:
    """The global state in a checkpoint of this model.

    Raises:
        CheckpointError: A tensor is missing or foreign, of another shape or type, or not finite; nothing was loaded.
    """
    parameters = model.trainable_parameters()
    found = contents.found
    tensors = found.tensors.get("global", {})
    try:
        values, remainder = parted(tensors)
    except KeyError:
        values, remainder = {}, {}
    if len(values) + 2 * len(remainder) != len(tensors):
        msg = "global.safetensors has one factor of a remainder without the other"
        raise found.unusable(msg)
    _check_named(contents, "global", values, parameters)
    layers = _layers(_shapes(model))
    for layer, factors in remainder.items():
        m, n = layers.get(layer, (0, 0))
        b, a = tuple(factors.b.shape), tuple(factors.a.shape)
        rank = a[0] if a else 0
        fits = b == (m, rank) and a == (rank, n) and rank <= min(m, n)
        if not fits or not all(t.is_floating_point() and all_finite(t) for t in (factors.a, factors.b)):
            msg = f"global.safetensors has a remainder of {shown(layer)} that is none of this model's"
            raise found.unusable(msg)
    return GlobalState(values, remainder)


def copy_of(contents: Contents, model: LocalModel) -> dict[str, Tensor]:
    """What participants have: there where the broadcast has a codec, and only there.

    Raises:
        CheckpointError: See `state_of`.
    """
    found = dict(contents.found.tensors.get("copy", {}))
    coded = contents.config.broadcast_codec is not None
    if not coded and not found:
        return {}
    _check_named(contents, "copy", found, model.trainable_parameters() if coded else {})
    return found


def _check_named(contents: Contents, file: str, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or extra:
        what = f"{file}.safetensors lacks {shown(missing[:3])} and adds {shown(extra[:3])}"
        msg = f"{what}: it was made for another model or adapter"
        raise contents.found.unusable(msg)
    for name, value in values.items():
        like = wanted[name]
        if value.shape != like.shape or value.dtype != like.dtype or not all_finite(value):
            what = f"{name} in {file}.safetensors is {value.dtype} of shape {shown(tuple(value.shape))}"
            what += f" where {like.dtype} of {tuple(like.shape)} belongs, or contains NaN or infinite values"
            raise contents.found.unusable(what)


def check_participants(contents: Contents, server: Server, changed: Collection[str] = ()) -> None:
    """Makes sure that participants' states can be given back; those in this process are looked at as they would train.

    Whoever `changed` has something else now, and does not go on with the optimizer of then.

    Raises:
        CheckpointError: One is none, or of other shapes than its participant's tensors.
    """
    peers = server.runtime.local
    for name, state in contents.found.participants.items():
        rank = contents.about.declarations.get(name, {}).get("rank")
        try:
            check_state(server, name, state, rank, contents.round, peers.get(name) if name not in changed else None)
        except LLMChainFedError as error:
            raise contents.found.unusable(shown(str(error), 400).rstrip(".")) from None


def check_state(server: Server, name: str, state: bytes, rank: int | None, completed: int, peer: Any = None) -> None:
    """Makes sure that one participant's state can be given back, as it answered `personal_state`, perhaps long ago.

    Of a `peer`, which lives in this process, the optimizer is tried out on what was trained after `completed` rounds.

    Raises:
        CheckpointError: It is none, or of other shapes than the participant's tensors.
    """
    shapes, layout = _shapes(server.model), server.settings.layout
    what = f"the state of participant {shown(name)}"
    try:
        with decoding(what, CheckpointError):
            own = shapes if rank is None else {n: at_rank(n, shape, rank) for n, shape in shapes.items()}
            infos = {n: TensorInfo(torch.float32, shape) for n, shape in own.items()}
            task, tensors = messages.read_personal_state(state)
            places = task.progress or {}
            carried = carried_by(server.settings.transforms, infos)
            private_state.check_layout(places, describe(tensors), Layout(infos), carried)  # as the participant will
            found = private_state.read(places, tensors)
            private_state.check_finite(found)
            if any(progress.personal for progress in found.values()) and (layout is None or layout.refused):
                msg = "it has a personal model, and this model has none beside it"
                raise CheckpointError(msg)
            for progress in found.values():
                if progress.optimizer_state is not None and isinstance(peer, Client):
                    types = {n: parameter.dtype for n, parameter in server.model.trainable_parameters().items()}
                    trained = selected(shapes, server.settings.rule.trains(completed))
                    weights = [torch.zeros(own[n], dtype=types[n]) for n in trained]
                    _rehearse(peer.config, weights, progress.optimizer_state)
    except LLMChainFedError as error:
        msg = f"{what} makes no sense: {shown(str(error), 300)}"
        raise CheckpointError(msg) from None


def _rehearse(config: TrainingConfig, weights: Iterable[Tensor], state: Mapping[str, Any]) -> None:
    """One step of a kept optimizer on weights of no use: what could not go on shows now."""
    parameters = [nn.Parameter(values) for values in weights]
    optimizer = config.make_optimizer(parameters)
    own = json.loads(json.dumps(optimizer.state_dict()["param_groups"], default=repr))
    there = json.loads(json.dumps(state["param_groups"]))
    same = len(own) == len(there) and all(
        group.get(option, value) == value
        for mine, group in zip(own, there, strict=True)
        for option, value in mine.items()
    )
    if not same or not state["state"].keys() <= set(range(len(parameters))):
        msg = "its optimizer has other options, or other tensors, than the participant trains with"
        raise CheckpointError(msg)
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    for parameter in parameters:
        kept = optimizer.state.get(parameter, {})
        if any(isinstance(value, Tensor) and not all_finite(value) for value in kept.values()):
            msg = "its optimizer contains NaN or infinite values"
            raise CheckpointError(msg)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not all(all_finite(parameter.detach()) for parameter in parameters):
        msg = "its optimizer's next step would not be finite"
        raise CheckpointError(msg)


def _shapes(model: LocalModel) -> dict[str, _Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.trainable_parameters().items()}


def _layers(shapes: Mapping[str, _Shape]) -> dict[str, tuple[int, int]]:
    """Adapted layer → (m, n) of its matrix."""
    layers = [name.removesuffix(f".{B}") for name in shapes if name.endswith(f".{B}")]
    return {
        layer: (shapes[f"{layer}.{B}"][0], shapes[f"{layer}.{A}"][1]) for layer in layers if f"{layer}.{A}" in shapes
    }
