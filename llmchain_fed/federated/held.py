"""Held: the global states that a process's participants have been sent, so that the next message can be a difference.

Knows messages and named tensors. Knows nothing about training. One object serves all participants of a process: they
hold the same states once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.federated.codecs import make_codec
from llmchain_fed.federated.factors import Factors, stack
from llmchain_fed.federated.global_state import GlobalState, parted
from llmchain_fed.federated.rule import Part, selected
from llmchain_fed.federated.wire import describe
from llmchain_fed.model import LocalModel

STALE = b'{"stale": true}'
"""the answer of a participant that does not hold what a difference is against: the hub then sends all"""
_START = "start:"
_CODED = "coded/"


def start_version(digest: str) -> str:
    """The name of the state a participant has before it was sent any."""
    return _START + digest


class Held:
    """Global states by version, the latest of each rank.

    Args:
        model: Whose own weights are the state before the first message.
    """

    def __init__(self, model: LocalModel) -> None:
        self._model = model
        self._states: dict[str, GlobalState] = {}

    def receive(self, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> GlobalState | None:
        """The state a message stands for; None where it is a difference to one that is not held.

        Raises:
            FederationError: The message contradicts itself.
        """
        version, against = header.get("version"), header.get("against")
        if version is None:
            return GlobalState(*parted(tensors))
        if version in self._states:
            return self._states[version]
        if against is None:
            state = GlobalState(*parted(tensors))
        else:
            former = self._former(against)
            if former is None:
                return None
            state = _changed(former, header, tensors)
        rank = str(version).rpartition("/")[2]  # one of each rank: those of a smaller one live beside the others
        self._states = {v: s for v, s in self._states.items() if v.rpartition("/")[2] != rank} | {version: state}
        return state

    def forget(self) -> None:
        """Another federation begins."""
        self._states = {}

    def _former(self, version: str) -> GlobalState | None:
        if version.startswith(_START):
            same = self._model.weights_hash == version.removeprefix(_START)
            return GlobalState.of(self._model) if same else None
        return self._states.get(version)


def coded_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A codec's parts under the names they have in a message."""
    return {_CODED + name: part for name, part in parts.items()}


def _changed(former: GlobalState, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GlobalState:
    """The former state with a message's changes."""
    coded = {n.removeprefix(_CODED): t for n, t in tensors.items() if n.startswith(_CODED)}
    values, remainder = parted({n: t for n, t in tensors.items() if not n.startswith(_CODED)})
    new_values = dict(former.values)
    if coded:
        codec, names = make_codec(header["coded"]), header["coded_names"]
        names = selected(former.values, cast(Part, names)) if isinstance(names, str) else names
        assert codec is not None
        infos = describe({n: former.values[n] for n in names})
        for name, change in codec.decode(coded, infos).items():
            old = former.values[name]
            new_values[name] = (old.float() + change).to(old.dtype)
    if values.keys() - new_values.keys():
        msg = f"the message changes {sorted(values.keys() - new_values.keys())[:3]}, which it did not bring before."
        raise FederationError(msg)
    new_values |= values
    added: set[str] = set(header.get("appended", ()))
    found: dict[str, Factors] = dict(former.remainder)
    for layer, factors in remainder.items():
        found[layer] = stack([found[layer], factors]) if layer in added and layer in found else factors
    return GlobalState(new_values, found)
