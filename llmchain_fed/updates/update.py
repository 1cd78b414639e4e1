"""Update: what leaves a participant after a round, and the checks it must pass before a value is used.

Knows named tensors and counts. Knows nothing about training, aggregation or how bytes travel.

Without a codec an update carries the trained values bit by bit; together with the broadcast it names, that is the
delta. A float32 difference would not give the trained values back: 0.5 → 1e-6 needs more digits than a
float32 near −0.5 has, and one participant would no longer equal plain fine-tuning. With a codec it carries the delta's
codes, and what they decode to is added to where the participant started. A collection may ask for a payload of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from llmchain_fed.errors import UpdateRefusedError
from llmchain_fed.untrusted import Strict, checked, shown
from llmchain_fed.updates import serialization
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms import added

MAX_EXAMPLES = 10**9
"""examples or tokens that one participant may have"""
MAX_SECONDS = 10**7
"""seconds that a training may take: some four months"""
_LONGEST_NUMBER = -1.2345678901234567e-100  # as JSON writes a float, and no count is longer


class Metrics(Strict):
    """What an update says of its training; each of them may be left out."""

    train_loss: float = Field(default=0.0, ge=0, le=1e9)
    """nats per completion token, mean over the steps"""
    steps: float = Field(default=0.0, ge=0, le=1e13, multiple_of=1)
    seconds: float = Field(default=0.0, ge=0, le=MAX_SECONDS)


class UpdateHeader(Strict):
    """What an update says of itself: all its fields, with their types and ranges."""

    kind: Literal["update"]
    participant: str
    round: int = Field(ge=0)
    base: str
    num_examples: int = Field(ge=1, le=MAX_EXAMPLES)
    num_tokens: int = Field(ge=1, le=MAX_EXAMPLES)
    metrics: Metrics
    codec: str | None = None


@dataclass(frozen=True)
class Update:
    """One participant's result of one round.

    Args:
        base: Fingerprint of the base weights it was trained over.
        tensors: Trained values by stable name; on the way with a codec its parts.
        num_examples: Usable examples the participant has (n_k).
        num_tokens: Completion tokens the participant has.
        metrics: Numbers about the training: `train_loss` (nats/token), `steps`, `seconds`.
        codec: What the parts were made by; None for values as they are.
    """

    participant: str
    round: int
    base: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    num_examples: int
    num_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    codec: str | None = None

    def to_bytes(self) -> bytes:
        """Safetensors with a JSON header; what is counted as bytes up."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        return serialization.pack(self.tensors, {"kind": "update", **said, "metrics": dict(self.metrics)})

    @classmethod
    def from_bytes(cls, data: bytes, expected: Expected) -> Update:
        """Reads an update that is what was asked for.

        Raises:
            UpdateRefusedError: Anything else, with the reason.
        """
        found, infos = serialization.inspect(data, max_bytes=expected.max_bytes, max_header=expected.max_header)
        header = expected.check_header(found)
        expected.check_layout(infos)
        tensors = expected.decoded(serialization.values(data, infos))
        expected.check_values(tensors)
        return cls(tensors=tensors, **header.model_dump(exclude={"kind", "codec"}, exclude_unset=True))


@dataclass(frozen=True)
class Expected:
    """What an update must be to be used: asked of this participant, in this round, over this base, of this shape."""

    participant: str
    round: int
    base: str
    layout: Mapping[str, TensorInfo]
    """type and shape of every value asked for"""
    num_examples: int | None = None
    """what the participant said it has when the federation began; None: not known"""
    num_tokens: int | None = None
    codec: Codec | None = None
    """what the delta travels as"""
    start: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """where the participant started; needed with a codec"""

    @cached_property
    def parts(self) -> Mapping[str, TensorInfo]:
        """Type and shape of every tensor that travels."""
        return self.layout if self.codec is None else self.codec.layout(self.layout)

    @cached_property
    def _largest(self) -> tuple[int, int]:
        longest = {
            "kind": "update",
            "participant": self.participant,
            "round": self.round,
            "base": self.base,
            "num_examples": MAX_EXAMPLES,
            "num_tokens": MAX_EXAMPLES,
            "metrics": dict.fromkeys(Metrics.model_fields, _LONGEST_NUMBER),
            "codec": self.codec.name if self.codec is not None else None,
        }
        return serialization.largest(self.parts, longest)

    @property
    def max_header(self) -> int:
        """bytes: the longest header of an update that is what was asked for."""
        return self._largest[0]

    @property
    def max_bytes(self) -> int:
        """The cap on what is read at all: no update that is what was asked for is larger."""
        return 8 + sum(self._largest)

    def decoded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained values: as they came, or start + delta.

        Raises:
            UpdateRefusedError: The codec cannot have made these parts.
        """
        if self.codec is None:
            return tensors
        delta = self.codec.decode(tensors, self.layout)
        return added(self.start, delta)

    def check_header(self, found: Mapping[str, Any]) -> UpdateHeader:
        """Who, when, over what, and plausible counts.

        Raises:
            UpdateRefusedError: With the reason.
        """
        wanted = {"kind": "update", "participant": self.participant, "round": self.round, "base": self.base}
        wanted["codec"] = self.codec.name if self.codec is not None else None
        for name, value in wanted.items():
            got = found.get(name)
            if got != value or type(got) is not type(value):
                _refuse(f"{name} is {_quoted(got)}, asked for was {value!r}")
        header = checked(UpdateHeader, found, what="the header", error=UpdateRefusedError)
        for name, joined_with in (("num_examples", self.num_examples), ("num_tokens", self.num_tokens)):
            if joined_with is not None and getattr(header, name) != joined_with:
                _refuse(f"{name} is {getattr(header, name):,}, but the participant joined with {joined_with:,}")
        return header

    def check_layout(self, infos: Mapping[str, TensorInfo]) -> None:
        """Exactly the tensors that were sent out.

        Raises:
            UpdateRefusedError: With the reason.
        """
        wanted = self.parts
        missing, extra = sorted(wanted.keys() - infos.keys()), sorted(infos.keys() - wanted.keys())
        if missing or extra:
            named = ([shown(n) for n in names[:2]] for names in (missing, extra))
            _refuse(f"it lacks {len(missing)} tensors {next(named)} and adds {len(extra)} {next(named)}")
        for name, info in wanted.items():
            if infos[name] != info:
                got = infos[name]
                _refuse(f"{name} is {got.dtype} {got.shape}, asked for was {info.dtype} {info.shape}")

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """No NaN, nothing infinite.

        Raises:
            UpdateRefusedError: With the name of the tensor.
        """
        wrong = serialization.not_finite(tensors)
        if wrong is not None:
            _refuse(f"{wrong} contains NaN or infinite values")


def _quoted(value: object) -> str:
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _refuse(reason: str) -> None:
    raise UpdateRefusedError(reason + ".")
