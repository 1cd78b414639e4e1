"""Fewer bits for a value: bfloat16, and integers of 8 and 4 bits with a scale for each block.

Knows named tensors and numbers. Knows nothing of rounds, participants or how bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError, UpdateRefusedError
from llmchain_fed.model.weights import all_finite
from llmchain_fed.updates.codecs.base import check_layout, flattened, owner_of, refuse_where, sizes_of, unflattened
from llmchain_fed.updates.serialization import TensorInfo, describe

MAX_BLOCK = 2**16  # values: a tensor shorter than a block is padded to one while it is encoded


@dataclass(frozen=True)
class BF16:
    """Every value rounded to bfloat16: half of float32, two to three significant digits, no residual to keep.

    >>> BF16().encode({"w": torch.tensor([1.0, 1.001])})["values"]
    tensor([1., 1.], dtype=torch.bfloat16)
    """

    name: ClassVar[str] = "bf16"
    lossy_feedback: ClassVar[bool] = False
    needs_feedback: ClassVar[bool] = False

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`values` bfloat16 (N,)."""
        return {"values": TensorInfo(torch.bfloat16, (sum(sizes_of(infos).values()),))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rounds to nearest; raises FederationError also for what bfloat16 cannot represent (beyond 3.39e38)."""
        values = flattened(tensors).bfloat16()
        if not all_finite(values):  # float32 reaches a little further
            name = owner_of(~values.isfinite(), sizes_of(describe(tensors)))
            msg = f"{name} contains values infinite in bfloat16, which no sum can use. Lower the learning rate."
            raise FederationError(msg)
        return {"values": values}

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """The values as float32; refuses NaN and infinity."""
        check_layout(self, parts, infos)
        refuse_where(~parts["values"].isfinite(), sizes_of(infos), "contains NaN or infinite values")
        return unflattened(parts["values"].float(), infos)


@dataclass(frozen=True)
class Int8:
    """Blockwise absmax quantisation to 8 bits (arXiv 2110.02861, with an even grid).

    A block's scale is its largest magnitude a, one step is a/127, and the code of x is round(127·x/a): nothing is
    further off than half a step, 0 and ±a are exact. (a travels, not a/127: in float32 127·(a/127) need not be a, and
    a/127 underflows first.) Blocks never cross a tensor's border; the last one may be short.

    Args:
        block: values that share a scale.

    >>> parts = Int8().encode({"w": torch.tensor([-2.0, 0.0, 1.0])})
    >>> parts["codes"].tolist(), parts["scales"].tolist()
    ([-127, 0, 64], [2.0])
    """

    name: ClassVar[str] = "int8"
    lossy_feedback: ClassVar[bool] = True
    needs_feedback: ClassVar[bool] = False
    _levels: ClassVar[int] = 127
    block: int = 256

    def __post_init__(self) -> None:
        if type(self.block) is not int or not 1 <= self.block <= MAX_BLOCK:
            share = f"`block` is the number of values that share a scale, 1 to {MAX_BLOCK:,}"
            msg = f"{type(self).__name__}: {share}, got {self.block!r:.80}."
            raise ConfigError(msg)

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`codes` int8 (N,), `scales` float32 (number of blocks,)."""
        sizes = sizes_of(infos)
        scales = sum(_blocks(sizes, self.block).values())
        return {"codes": self._codes_info(sum(sizes.values())), "scales": TensorInfo(torch.float32, (scales,))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rounds to the nearest code, ties to even."""
        sizes = sizes_of(describe(tensors))
        grid = _grid(flattened(tensors), sizes, self.block)  # (blocks, block)
        scales = grid.abs().amax(dim=1)
        grid.div_(torch.where(scales > 0, scales, 1.0)[:, None])  # first: 127/a would overflow for a tiny a
        codes = _ungrid(grid.mul_(self._levels).round_().to(torch.int8), sizes, self.block)
        return {"codes": self._pack(codes), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """codes/127 · scale; refuses the code −128, and scales that are negative, NaN or infinite."""
        check_layout(self, parts, infos)
        sizes, scales = sizes_of(infos), parts["scales"]
        codes = self._unpack(parts["codes"], sum(sizes.values()))
        refuse_where(codes < -self._levels, sizes, f"has a code beyond ±{self._levels}")
        wrong = ~((scales >= 0) & (scales < math.inf))  # this way round NaN is wrong, too
        refuse_where(wrong, _blocks(sizes, self.block), "has scales that are negative, NaN or infinite")
        grid = _grid(codes.float(), sizes, self.block)
        # first to [-1, 1]: ±1 · a is a to the bit, and nothing overflows
        return unflattened(_ungrid(grid.div_(self._levels).mul_(scales[:, None]), sizes, self.block), infos)

    def _codes_info(self, total: int) -> TensorInfo:
        return TensorInfo(torch.int8, (total,))

    def _pack(self, codes: Tensor) -> Tensor:
        return codes

    def _unpack(self, codes: Tensor, total: int) -> Tensor:  # noqa: ARG002
        return codes


@dataclass(frozen=True)
class Int4(Int8):
    """As `Int8`, with codes −7 … 7, two a byte (uint8): the first in the low four bits, each as code + 8.

    >>> parts = Int4().encode({"w": torch.tensor([7.0, -2.0, 0.0])})
    >>> [f"{byte:02x}" for byte in parts["codes"].tolist()], parts["scales"].tolist()
    (['6f', '88'], [7.0])
    """

    name: ClassVar[str] = "int4"
    needs_feedback: ClassVar[bool] = True
    _levels: ClassVar[int] = 7
    block: int = 64

    def _codes_info(self, total: int) -> TensorInfo:
        return TensorInfo(torch.uint8, ((total + 1) // 2,))

    def _pack(self, codes: Tensor) -> Tensor:
        nibbles = torch.full((codes.numel() + codes.numel() % 2,), 8, dtype=torch.uint8)  # code 0 fills the last byte
        nibbles[: codes.numel()] = (codes + 8).to(torch.uint8)
        return nibbles[0::2] | nibbles[1::2] << 4

    def _unpack(self, codes: Tensor, total: int) -> Tensor:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=1).view(-1).to(torch.int8) - 8
        if nibbles[total:].any():
            msg = f"the codes go on after the last value, with {int(nibbles[total])}: not this codec's work."
            raise UpdateRefusedError(msg)
        return nibbles[:total]


def _blocks(sizes: Mapping[str, int], block: int) -> dict[str, int]:
    return {name: -(-size // block) for name, size in sizes.items()}


def _grid(flat: Tensor, sizes: Mapping[str, int], block: int) -> Tensor:
    """(N,) → (blocks, block): every tensor's last block is filled up with zeros."""
    if all(size % block == 0 for size in sizes.values()):
        return flat.view(-1, block)
    lengths = [count * block for count in _blocks(sizes, block).values()]
    grid = flat.new_zeros(sum(lengths))
    for padded, piece in zip(torch.split(grid, lengths), torch.split(flat, list(sizes.values())), strict=True):
        padded[: piece.numel()] = piece
    return grid.view(-1, block)


def _ungrid(grid: Tensor, sizes: Mapping[str, int], block: int) -> Tensor:
    """The reverse of `_grid`."""
    pieces = torch.split(grid.view(-1), [count * block for count in _blocks(sizes, block).values()])
    cut = [padded[:size] for padded, size in zip(pieces, sizes.values(), strict=True)]
    return grid.view(-1) if sum(sizes.values()) == grid.numel() else torch.cat(cut)
