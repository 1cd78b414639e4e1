"""Layout: which tensors a message about the global state may bring, known before one of their values is read.

Knows names, types and shapes of a model's trainable state, of remainders and of codecs' parts. Knows nothing of values,
or of what the message is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from llmchain_fed.errors import FederationError
from llmchain_fed.federated.protocol.global_state import CODED, REMAINDER_A, REMAINDER_B, Version
from llmchain_fed.federated.protocol.tasks import StateHeader
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import A, B, Part, at_rank, selected
from llmchain_fed.updates.serialization import TensorInfo, describe

_REMEDY = "Hub and participants need the same model and adapter."
_CLOSE = 1e-6  # relative: a scaling comes back from a file with an error in its last places


@dataclass(frozen=True)
class Layout:
    """What the trainable state of a participant looks like, at its own rank: type and shape by stable name."""

    values: Mapping[str, TensorInfo]
    rank: int | None = None
    scaling: float | None = None

    @classmethod
    def of(cls, model: LocalModel, rank: int | None, scaling: Mapping[str, float] | None) -> Layout:
        """That of a model's parameters."""
        found = describe(model.trainable_parameters())
        if rank is None:
            return cls(found)
        own = {n: TensorInfo(i.dtype, at_rank(n, i.shape, rank)) for n, i in found.items()}
        return cls(own, rank, next(iter((scaling or {}).values()), None))

    @property
    def max_header(self) -> int:
        """Bytes that the header of a message over this state may have: names several times over, and some more."""
        return 2**20 + 4096 * len(self.values)

    def check(self, header: StateHeader, infos: Mapping[str, TensorInfo]) -> None:
        """Makes sure that a message brings what its header says and this state has, and nothing else.

        Raises:
            FederationError: A tensor too many or too few, of another type or shape, or a state of another rank.
        """
        if header.version is not None:
            self._check_rank(header.version)
        coded = {n: i for n, i in infos.items() if n.startswith(CODED)}
        remainder = {n: i for n, i in infos.items() if n.endswith((REMAINDER_A, REMAINDER_B)) and n not in coded}
        values = {n: i for n, i in infos.items() if n not in coded and n not in remainder}
        if strange := sorted(values.keys() - self.values.keys()):
            _refuse(f"brings {len(strange)} tensors that are not trained here, such as {shown(strange[0])}")
        if header.against is None and (missing := sorted(self.values.keys() - values.keys())):
            _refuse(f"is the whole state and lacks {len(missing)} tensors of it, such as {shown(missing[0])}")
        for name, info in values.items():
            if info != self.values[name]:
                _refuse(f"brings {name} as {_told(info)}, where it is {_told(self.values[name])} here")
        self._check_remainder(remainder, header.appended or {})
        self._check_coded(coded, header)

    def check_part(self, part: Part) -> None:
        """Makes sure that there is anything of a part.

        Raises:
            FederationError: There is not.
        """
        if not selected(self.values, part):
            _refuse(f"asks for the LoRA factors {part}, and this model trains none")

    def _check_rank(self, version: str) -> None:
        """Only the state of all, or that of this participant's own rank, is meant for it."""
        number, _, scaling = Version.read(version).rank.partition("x")
        own = "" if self.rank is None else str(self.rank)
        try:
            close = not own or abs(float(scaling) / (self.scaling or 1.0) - 1.0) <= _CLOSE
        except ValueError:
            close = False
        if number != own or not close:
            asked = f"rank {shown(number)}, scaling {shown(scaling)}" if number else "the common rank"
            have = f"trains rank {own} with scaling {self.scaling}" if own else "has no rank of its own"
            _refuse(f"is about a state of {asked}, and this participant {have}")

    def _check_remainder(self, infos: Mapping[str, TensorInfo], appended: Mapping[str, int]) -> None:
        layers = {name.removesuffix(REMAINDER_A).removesuffix(REMAINDER_B) for name in infos}
        if strange := sorted(appended.keys() - layers):
            _refuse(f"appends to {shown(strange[0])}, for which it brings nothing")
        for layer in sorted(layers):
            a, b = self.values.get(f"{layer}.{A}"), self.values.get(f"{layer}.{B}")
            if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
                _refuse(f"brings a remainder for {shown(layer)}, which has no LoRA factors here")
            pair = infos.get(layer + REMAINDER_A), infos.get(layer + REMAINDER_B)
            if pair[0] is None or pair[1] is None:
                _refuse(f"brings one factor of {shown(layer)}'s remainder without the other")
            m, n, rank = b.shape[0], a.shape[1], pair[0].shape[0] if pair[0].shape else -1
            if (pair[0].shape, pair[1].shape) != ((rank, n), (m, rank)):
                _refuse(f"brings {shown(layer)}'s remainder as {_told(pair[1])} and {_told(pair[0])}, over ({m}, {n})")
            if not all(each.dtype.is_floating_point for each in pair if each is not None):
                _refuse(f"brings {shown(layer)}'s remainder as {_told(pair[1])}, which is no floating-point type")
            whole, most = rank + appended.get(layer, 0), min(m, n)
            if whole > most:
                _refuse(f"brings {shown(layer)}'s remainder to rank {whole:,}, of which {most:,} can mean something")

    def _check_coded(self, infos: Mapping[str, TensorInfo], header: StateHeader) -> None:
        wanted: dict[str, TensorInfo] = {}
        codec = make_codec(header.coded)
        for number, names in (header.coded_names or {}).items():
            chosen = selected(self.values, names) if isinstance(names, str) else names
            strange = sorted(set(chosen) - self.values.keys())
            if strange or not chosen or len(set(chosen)) < len(chosen) or codec is None:
                _refuse(f"codes tensors that are not trained here, or twice: {shown(strange or chosen)}")
            for name, info in codec.layout({n: self.values[n] for n in chosen}).items():
                full = f"{CODED}{int(number)}/{name}"
                if infos.get(full) != info or full in wanted:
                    _refuse(f"does not bring what its codec makes, once: {full} as {_told(info)}")
                wanted[full] = info
        if odd := sorted(infos.keys() - wanted.keys()):
            _refuse(f"brings codes that its header says nothing of, such as {shown(odd[0])}")
        if sum(i.nbytes for i in wanted.values()) > sum(i.nbytes for i in self.values.values()):
            _refuse("brings more codes than the values themselves would take")


def _told(info: TensorInfo | None) -> str:
    return f"{info.dtype} {shown(info.shape)}" if info is not None else "nothing"


def _refuse(why: str) -> NoReturn:
    msg = f"the message {why}. {_REMEDY}"
    raise FederationError(msg)
