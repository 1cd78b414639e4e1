"""Error feedback: what a lossy codec leaves out in one round is added to the next.

Knows codecs and named tensors. Knows nothing of rounds or of who sends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.serialization import TensorInfo, describe
from llmchain_fed.updates.transforms.base import RESIDUAL, Origin, UpdateTransform


class Encoding(UpdateTransform):
    """A delta as a codec's parts; with `feedback`, what they leave out is carried to the next round."""

    name = RESIDUAL
    keeps_names = False

    def __init__(self, codec: Codec, *, feedback: bool) -> None:
        self._codec, self._feedback = codec, feedback

    def carries(self, infos: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """A float32 residual of every tensor."""
        return {name: TensorInfo(torch.float32, info.shape) for name, info in infos.items() if self._feedback}

    def apply(
        self,
        delta: Mapping[str, Tensor],
        origin: Origin,  # noqa: ARG002
        carried: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parts of delta + residual, and the next residual; those of tensors not sent in this round stay."""
        parts, _, left = encode_with_feedback(self._codec, delta, carried if self._feedback else None)
        return parts, left if self._feedback else {}


@torch.no_grad()
def encode_with_feedback(
    codec: Codec, tensors: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Encodes tensors + residual; what that leaves out is the next residual (arXiv 1809.07599, 1901.09847).

    So all that was decoded, plus the last residual, is the sum of all deltas. Nothing passed in is changed: a round
    that comes to nothing drops the new residual and keeps the old one.

    Args:
        codec: Where it says no `lossy_feedback`, a residual is still sent but none is kept of these tensors.
        tensors: The true delta.
        residual: From the round before; names that are not in `tensors` are handed on as they are.

    Returns:
        The parts, what a receiver decodes from them, and the next residual.

    Raises:
        FederationError: Not finite, no float, or a residual of another shape.
    """
    before = dict(residual or {})
    for name in tensors.keys() & before.keys():
        if tensors[name].shape != before[name].shape:
            shapes = f"{tuple(before[name].shape)}, the delta's {tuple(tensors[name].shape)}"
            msg = f"the residual of {name} has shape {shapes}: it is of another model. Start without a residual."
            raise FederationError(msg)
    wanted = {n: t.float() + before[n] if n in before else t for n, t in tensors.items()}
    parts = codec.encode(wanted)
    decoded = codec.decode(parts, describe(wanted))
    after = {n: t for n, t in before.items() if n not in tensors}
    if codec.lossy_feedback:
        after |= {n: t.float() - decoded[n] for n, t in wanted.items()}
    return parts, decoded, after
