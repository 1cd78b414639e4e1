"""Update: what leaves a participant after a round, and the checks it must pass before a value is used.

Knows named tensors and counts. Knows nothing about training, aggregation or how bytes travel.

Without a codec an update carries the trained values bit by bit; together with the broadcast it names, that is the
delta (`Update.delta`). A float32 difference would not give the trained values back: 0.5 → 1e-6 needs more digits than a
float32 near −0.5 has, and one participant would no longer equal plain fine-tuning. With a codec it carries the delta's
codes, and what they decode to is added to where the participant started.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmchain_fed.errors import UpdateRefusedError
from llmchain_fed.federated import wire
from llmchain_fed.federated.codecs import Codec
from llmchain_fed.federated.wire import TensorInfo
from llmchain_fed.weights import all_finite

_SLACK = 2**20  # bytes: for the header beside the values
MAX_EXAMPLES = 10**9


@dataclass(frozen=True)
class Update:
    """One participant's result of one round.

    Args:
        participant: Whose it is.
        round: The round it belongs to.
        base: Fingerprint of the base weights it was trained over.
        tensors: Trained values by stable name; on the way with a codec its parts.
        num_examples: Usable examples the participant holds (n_k).
        num_tokens: Completion tokens the participant holds.
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

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local − global, in float32, for the global `state` the participant started from."""
        return {n: t.float() - state[n].float() for n, t in self.tensors.items()}

    def to_bytes(self) -> bytes:
        """Safetensors with a JSON header; what is counted as bytes up."""
        header = {
            "kind": "update",
            "participant": self.participant,
            "round": self.round,
            "base": self.base,
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            "metrics": dict(self.metrics),
            "codec": self.codec,
        }
        return wire.pack(self.tensors, header)

    @classmethod
    def from_bytes(cls, data: bytes, expected: Expected) -> Update:
        """Reads an update that is what was asked for.

        Raises:
            UpdateRefusedError: Anything else, with the reason.
        """
        header, infos = wire.inspect(data, max_bytes=expected.max_bytes)
        expected.check_header(header)
        expected.check_layout(infos)
        tensors = expected.decoded(wire.values(data, infos))
        update = cls(
            participant=header["participant"],
            round=header["round"],
            base=header["base"],
            tensors=tensors,
            num_examples=header["num_examples"],
            num_tokens=header["num_tokens"],
            metrics={k: float(v) for k, v in header["metrics"].items()},
        )
        expected.check_values(update.tensors)
        return update


@dataclass(frozen=True)
class Expected:
    """What an update must be to be used: asked of this participant, in this round, over this base, of this shape."""

    participant: str
    round: int
    base: str
    layout: Mapping[str, TensorInfo]
    """type and shape of every value asked for"""
    num_examples: int | None = None
    """what the participant said it holds when the federation began; None: not known"""
    num_tokens: int | None = None
    codec: Codec | None = None
    """what the delta travels as"""
    start: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """where the participant started; needed with a codec"""

    @property
    def parts(self) -> Mapping[str, TensorInfo]:
        """Type and shape of every tensor that travels."""
        return self.layout if self.codec is None else self.codec.layout(self.layout)

    @property
    def max_bytes(self) -> int:
        """The cap on what is read at all."""
        return sum(info.nbytes + 256 for info in self.parts.values()) + _SLACK

    def decoded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained values: as they came, or start + delta.

        Raises:
            UpdateRefusedError: The codec cannot have made these parts.
        """
        if self.codec is None:
            return tensors
        delta = self.codec.decode(tensors, self.layout)
        return {n: (self.start[n].float() + change).to(self.layout[n].dtype) for n, change in delta.items()}

    def check_header(self, header: Mapping[str, Any]) -> None:
        """Who, when, over what, and plausible counts.

        Raises:
            UpdateRefusedError: With the reason.
        """
        wanted = {"kind": "update", "participant": self.participant, "round": self.round, "base": self.base}
        for name, value in wanted.items():
            if header.get(name) != value or type(header.get(name)) is not type(value):
                _refuse(f"{name} is {header.get(name)!r:.80}, asked for was {value!r}")
        for name in ("num_examples", "num_tokens"):
            count = header.get(name)
            if type(count) is not int or not 1 <= count <= MAX_EXAMPLES:
                _refuse(f"{name} is {count!r:.80}, not a plausible count")
        for name, joined_with in (("num_examples", self.num_examples), ("num_tokens", self.num_tokens)):
            if joined_with is not None and header[name] != joined_with:
                _refuse(f"{name} is {header[name]:,}, but the participant joined with {joined_with:,}")
        wanted_codec = self.codec.name if self.codec is not None else None
        if header.get("codec") != wanted_codec:
            _refuse(f"its codec is {header.get('codec')!r:.80}, asked for was {wanted_codec!r}")
        metrics = header.get("metrics")
        # compared, not asked math.isfinite: a JSON integer may be too large for a float
        if not isinstance(metrics, dict) or not all(
            type(v) in (int, float) and abs(v) <= sys.float_info.max for v in metrics.values()
        ):
            _refuse("its metrics are not finite numbers")

    def check_layout(self, infos: Mapping[str, TensorInfo]) -> None:
        """Exactly the tensors that were sent out.

        Raises:
            UpdateRefusedError: With the reason.
        """
        wanted = self.parts
        missing, extra = sorted(wanted.keys() - infos.keys()), sorted(infos.keys() - wanted.keys())
        if missing or extra:
            _refuse(f"it lacks {len(missing)} tensors {missing[:2]} and adds {len(extra)} {extra[:2]!s:.200}")
        for name, info in wanted.items():
            if infos[name] != info:
                got = infos[name]
                _refuse(f"{name} is {got.dtype} {got.shape}, asked for was {info.dtype} {info.shape}")

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """No NaN, nothing infinite.

        Raises:
            UpdateRefusedError: With the name of the tensor.
        """
        block = wire.side_by_side(list(tensors.values())) if tensors else None
        if block is not None and all_finite(block):  # one pass instead of hundreds; tensor by tensor only to name one
            return
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                _refuse(f"{name} holds NaN or infinite values")


def _refuse(reason: str) -> None:
    raise UpdateRefusedError(reason + ".")
