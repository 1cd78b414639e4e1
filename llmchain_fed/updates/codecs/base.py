"""What a codec is: a delta as few, smaller tensors, and back; and how tensors lie one after another in its parts.

Knows named tensors and numbers. Knows no codec.

What a codec makes has a layout that follows from names and shapes alone, so that a receiver can state it before it
reads a value. All tensors share one part each for codes, scales, …, in the order of their sorted names: hundreds of
LoRA factors cost one entry in the header.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError, UpdateRefusedError
from llmchain_fed.model.weights import all_finite
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.serialization import TensorInfo, describe

MAX_INDEX = 2**31  # int32 indices


class Codec(Protocol):
    """Named float tensors to few flat parts and back.

    A federation uses those of this module, which participants elsewhere make from `spec`'s text: no code travels.
    """

    @property
    def name(self) -> str:
        """What records call it."""

    @property
    def lossy_feedback(self) -> bool:
        """Whether what it leaves out is kept and added to the next round's delta."""

    @property
    def needs_feedback(self) -> bool:
        """Whether it leaves out so much that nothing good is learnt where that cannot be kept."""

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Type and shape of every part, from names and shapes alone; the types of `infos` play no role."""

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts; raises FederationError, with the tensor's name, for what is not finite or no float."""

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """float32 tensors in the shapes of `infos`; raises UpdateRefusedError for parts that `encode` cannot make."""


def encoded_bytes(codec: Codec, infos: Mapping[str, TensorInfo]) -> int:
    """Size of all parts in bytes, known before anything is encoded; a message adds its header."""
    return sum(info.nbytes for info in codec.layout(infos).values())


# --- shared: (N,) is all values, tensor after tensor in the order of their names --------------------------------------


def sizes_of(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """How many values each tensor has, in the order of the names."""
    return {name: math.prod(infos[name].shape) for name in sorted(infos)}


def flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """A float32 copy (N,) of all values, once they are known to be finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            msg = f"{name} is {tensor.dtype}; a delta is floating point. Encode trained weights only."
            raise FederationError(msg)
    sizes = sizes_of(describe(tensors))
    flat = torch.empty(sum(sizes.values()), dtype=torch.float32)
    for name, piece in zip(sizes, torch.split(flat, list(sizes.values())), strict=True):
        piece.copy_(tensors[name].detach().reshape(-1))
    if not all_finite(flat):
        name = owner_of(~flat.isfinite(), sizes)
        msg = f"{name} contains NaN or values infinite in float32, which no code stands for. Lower the learning rate."
        raise FederationError(msg)
    return flat


def unflattened(flat: Tensor, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Views into (N,), side by side in memory, which the running mean adds in one pass."""
    pieces = torch.split(flat, list(sizes_of(infos).values()))
    return {name: piece.view(infos[name].shape) for name, piece in zip(sorted(infos), pieces, strict=True)}


def check_layout(codec: Codec, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> None:
    """Raises UpdateRefusedError, with the part's name, if the parts are not those that the codec makes of `infos`."""
    wanted, got = codec.layout(infos), describe(parts)
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            found = f"asked for was {wanted.get(name, 'nothing')!s:.200}, found {got.get(name, 'nothing')!s:.200}"
            msg = f"{codec.name}, part {shown(name)}: {found}. Both sides must use one codec with the same options."
            raise UpdateRefusedError(msg)


def owner_of(where: Tensor, counts: Mapping[str, int]) -> str:
    """The tensor of the first True, where every tensor has that many entries."""
    ends = list(itertools.accumulate(counts.values()))
    return list(counts)[bisect.bisect_right(ends, int(where.nonzero()[0]))]


def refuse_where(wrong: Tensor, counts: Mapping[str, int], what: str) -> None:
    """Raises UpdateRefusedError, with the tensor's name, where one of its entries is wrong."""
    if wrong.any():
        msg = f"{owner_of(wrong, counts)} {what}: `encode` makes no such parts, and nobody could use them."
        raise UpdateRefusedError(msg)
