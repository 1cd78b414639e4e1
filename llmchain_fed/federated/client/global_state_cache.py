"""GlobalStateCache: the global states that a process was sent, so that the next message can be a difference.

Knows messages and named tensors. Knows nothing about training. One object serves all participants of a process: they
keep the same states once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.federated.protocol.global_state import CODED, START, GlobalState, Version, parted
from llmchain_fed.federated.protocol.tasks import StateHeader
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import Part, selected
from llmchain_fed.updates.low_rank import Factors, stack
from llmchain_fed.updates.serialization import describe, not_finite


class GlobalStateCache:
    """The latest global state of each rank.

    Those of a process may have been sent others last: who was not asked for a while is sent what changed since, and
    that can be told from any state in between.

    Args:
        model: Whose own weights are the state before the first message.
        most: States that are kept at most, of which the oldest goes first; None is one for each rank there is.
    """

    def __init__(self, model: LocalModel, *, most: int | None = None) -> None:
        self._model = model
        self.most = most
        self._states: dict[str, tuple[Version, GlobalState]] = {}

    def receive(self, header: StateHeader, tensors: dict[str, Tensor]) -> GlobalState | None:
        """The state a message stands for; None where it is a difference to one that is not kept.

        Raises:
            FederationError: The message contradicts itself, or a value is not finite; what was kept stays kept.
        """
        _check_finite(tensors)
        if header.version is None:
            return GlobalState(*parted(tensors))
        version, against = Version.read(header.version), header.against
        known = self._states.get(version.rank)
        if known is not None and known[0] == version:
            return known[1]
        if against is None:
            state = GlobalState(*parted(tensors))
        else:
            former = self._since(against, version)
            if former is None:
                return None
            state = _changed(*former, header, tensors)
        self._keep(version, state)
        return state

    def _keep(self, version: Version, state: GlobalState) -> None:
        """The latest of its rank; those of another hub mean nothing any more, and of too many the oldest goes."""
        kept = {
            r: known for r, known in self._states.items() if known[0].server == version.server and r != version.rank
        }
        while self.most is not None and len(kept) >= max(1, self.most):
            del kept[next(iter(kept))]
        self._states = kept | {version.rank: (version, state)}

    def forget(self) -> None:
        """Another federation begins."""
        self._states = {}

    def _since(self, against: str, version: Version) -> tuple[GlobalState, int] | None:
        """A state between the two versions, and its number; None where none is kept."""
        known = self._states.get(version.rank)
        first = against.startswith(START)
        oldest = Version(version.server, 0, version.rank) if first else Version.read(against)
        if known is not None and oldest <= known[0] <= version and known[0].server == version.server:
            return known[1], known[0].number
        if not first or self._model.weights_hash != against.removeprefix(START):
            return None
        own = GlobalState.of(self._model)  # whose remainder is the module's own: others may write into that
        return GlobalState(own.values, {n: Factors(f.b.clone(), f.a.clone()) for n, f in own.remainder.items()}), 0


def _changed(former: GlobalState, number: int, header: StateHeader, tensors: Mapping[str, Tensor]) -> GlobalState:
    """The former state with those of a message's changes that are newer."""
    values, remainder = parted({n: t for n, t in tensors.items() if not n.startswith(CODED)})
    new_values = dict(former.values)
    changes = header.coded_names or {}
    for newer in sorted(int(key) for key in changes if int(key) > number):
        prefix = f"{CODED}{newer}/"
        parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        new_values |= _decoded(new_values, header.coded, changes[str(newer)], parts)
    if values.keys() - new_values.keys():
        msg = f"the message changes {sorted(values.keys() - new_values.keys())[:3]}, which it did not bring before."
        raise FederationError(msg)
    new_values |= values
    begins = header.appended or {}
    found: dict[str, Factors] = dict(former.remainder)
    for layer, factors in remainder.items():
        rank = begins.get(layer, 0)
        if rank > (found[layer].rank if layer in found else 0):
            msg = f"the message continues {layer}'s remainder at rank {rank}, which is more than there was."
            raise FederationError(msg)
        found[layer] = stack([found[layer].until(rank), factors]) if rank else factors
    return GlobalState(new_values, found)


def _decoded(
    values: Mapping[str, Tensor], codec: str | None, names: str | list[str], parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The named values with a coded change added."""
    made = make_codec(codec)
    assert made is not None
    chosen = selected(values, cast(Part, names)) if isinstance(names, str) else names
    changes = made.decode(parts, describe({n: values[n] for n in chosen}))
    found = {n: (values[n].float() + change).to(values[n].dtype) for n, change in changes.items()}
    _check_finite(found)
    return found


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    if (name := not_finite(tensors)) is not None:
        msg = f"{shown(name)} of the global state contains NaN or infinite values, which nothing can be trained from."
        raise FederationError(msg)
