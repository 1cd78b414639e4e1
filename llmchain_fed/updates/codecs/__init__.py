"""Codecs: a delta as few, smaller tensors, and back.

Knows named tensors and numbers. Knows nothing of rounds, participants or how bytes travel.

What a codec makes has a layout that follows from names and shapes alone, so that a receiver can state it before it
reads a value. All tensors share one part each for codes, scales, …, in the order of their sorted names: hundreds of
LoRA factors cost one entry in the header. Lossy codecs go with error feedback: what one round leaves out, the next
one adds.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError, UpdateRefusedError
from llmchain_fed.model.weights import all_finite
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.serialization import TensorInfo, describe

_MAX_BLOCK = 2**16  # values: a tensor shorter than a block is padded to one while it is encoded
_MAX_INDEX = 2**31  # int32 indices
_LONGEST = 40  # characters of a codec's name and option


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

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Type and shape of every part, from names and shapes alone; the types of `infos` play no role."""

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts; raises FederationError, with the tensor's name, for what is not finite or no float."""

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """float32 tensors in the shapes of `infos`; raises UpdateRefusedError for parts that `encode` cannot make."""


@dataclass(frozen=True)
class BF16:
    """Every value rounded to bfloat16: half of float32, two to three significant digits, no residual to keep.

    >>> BF16().encode({"w": torch.tensor([1.0, 1.001])})["values"]
    tensor([1., 1.], dtype=torch.bfloat16)
    """

    name: ClassVar[str] = "bf16"
    lossy_feedback: ClassVar[bool] = False

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`values` bfloat16 (N,)."""
        return {"values": TensorInfo(torch.bfloat16, (sum(_sizes(infos).values()),))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rounds to nearest; raises FederationError also for what bfloat16 cannot hold (beyond 3.39e38)."""
        values = _flat(tensors).bfloat16()
        if not all_finite(values):  # float32 reaches a little further
            name = _owner(~values.isfinite(), _sizes(describe(tensors)))
            msg = f"{name} holds values infinite in bfloat16, which no sum can use. Lower the learning rate."
            raise FederationError(msg)
        return {"values": values}

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """The values as float32; refuses NaN and infinity."""
        _check_layout(self, parts, infos)
        _refuse_where(~parts["values"].isfinite(), _sizes(infos), "holds NaN or infinite values")
        return _split(parts["values"].float(), infos)


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
    _levels: ClassVar[int] = 127
    block: int = 256

    def __post_init__(self) -> None:
        if type(self.block) is not int or not 1 <= self.block <= _MAX_BLOCK:
            share = f"`block` is the number of values that share a scale, 1 to {_MAX_BLOCK:,}"
            msg = f"{type(self).__name__}: {share}, got {self.block!r:.80}."
            raise ConfigError(msg)

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`codes` int8 (N,), `scales` float32 (number of blocks,)."""
        sizes = _sizes(infos)
        scales = sum(_blocks(sizes, self.block).values())
        return {"codes": self._codes_info(sum(sizes.values())), "scales": TensorInfo(torch.float32, (scales,))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rounds to the nearest code, ties to even."""
        sizes = _sizes(describe(tensors))
        grid = _grid(_flat(tensors), sizes, self.block)  # (blocks, block)
        scales = grid.abs().amax(dim=1)
        grid.div_(torch.where(scales > 0, scales, 1.0)[:, None])  # first: 127/a would overflow for a tiny a
        codes = _ungrid(grid.mul_(self._levels).round_().to(torch.int8), sizes, self.block)
        return {"codes": self._pack(codes), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """codes/127 · scale; refuses the code −128, and scales that are negative, NaN or infinite."""
        _check_layout(self, parts, infos)
        sizes, scales = _sizes(infos), parts["scales"]
        codes = self._unpack(parts["codes"], sum(sizes.values()))
        _refuse_where(codes < -self._levels, sizes, f"has a code beyond ±{self._levels}")
        wrong = ~((scales >= 0) & (scales < math.inf))  # this way round NaN is wrong, too
        _refuse_where(wrong, _blocks(sizes, self.block), "has scales that are negative, NaN or infinite")
        grid = _grid(
            codes.float(), sizes, self.block
        )  # first to [-1, 1]: ±1 · a is a to the bit, and nothing overflows
        return _split(_ungrid(grid.div_(self._levels).mul_(scales[:, None]), sizes, self.block), infos)

    def _codes_info(self, total: int) -> TensorInfo:
        return TensorInfo(torch.int8, (total,))

    def _pack(self, codes: Tensor) -> Tensor:
        return codes

    def _unpack(self, codes: Tensor, total: int) -> Tensor:  # noqa: ARG002
        return codes


@dataclass(frozen=True)
class Int4(Int8):
    """As `Int8`, with codes −7 … 7, two a byte (uint8): the first in the low four bits, each as code + 8.

    Args:
        block: values that share a scale.

    >>> parts = Int4().encode({"w": torch.tensor([7.0, -2.0, 0.0])})
    >>> [f"{byte:02x}" for byte in parts["codes"].tolist()], parts["scales"].tolist()
    (['6f', '88'], [7.0])
    """

    name: ClassVar[str] = "int4"
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


@dataclass(frozen=True)
class TopK:
    """Only the largest magnitudes of every tensor, with their places (arXiv 1809.07599).

    Of n values k = max(1, ⌈ratio·n⌉) are sent; of equal ones the first. Without error feedback most of a delta would
    never arrive.

    Args:
        ratio: share of the values that is sent, above 0 up to 1.

    >>> parts = TopK(0.5).encode({"w": torch.tensor([0.1, -3.0, 2.0, 0.0])})
    >>> parts["indices"].tolist(), parts["values"].tolist()
    ([1, 2], [-3.0, 2.0])
    """

    name: ClassVar[str] = "topk"
    lossy_feedback: ClassVar[bool] = True
    ratio: float = 0.1

    def __post_init__(self) -> None:
        if type(self.ratio) not in (int, float) or not 0 < self.ratio <= 1:
            msg = f"TopK: `ratio` is the share of values that is sent, above 0 up to 1, got {self.ratio!r:.80}."
            raise ConfigError(msg)

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`indices` int32 (K,), counted within each tensor, and `values` float32 (K,); K = Σ k."""
        total = sum(self._counts(_sizes(infos)).values())
        return {"indices": TensorInfo(torch.int32, (total,)), "values": TensorInfo(torch.float32, (total,))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest magnitudes, in the order of their places."""
        sizes = _sizes(describe(tensors))
        counts = self._counts(sizes)
        indices, values = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.float32)]
        for name, part in zip(sizes, torch.split(_flat(tensors), list(sizes.values())), strict=True):
            if not counts[name]:
                continue
            magnitude = part.abs()
            least = magnitude.kthvalue(sizes[name] - counts[name] + 1).values
            chosen = magnitude > least
            missing = counts[name] - int(chosen.sum())  # several may be as large as the smallest that is sent
            chosen[(magnitude == least).nonzero()[:missing, 0]] = True
            places = chosen.nonzero()[:, 0]
            indices.append(places.to(torch.int32))
            values.append(part[places])
        return {"indices": torch.cat(indices), "values": torch.cat(values)}

    def decode(self, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """Zeros but for what was sent; refuses indices outside their tensor or not strictly increasing within it."""
        _check_layout(self, parts, infos)
        sizes, indices, values = _sizes(infos), parts["indices"].long(), parts["values"]
        counts = self._counts(sizes)
        _refuse_where(~values.isfinite(), counts, "holds NaN or infinite values")
        extents, repeats = (torch.tensor(list(n.values()), dtype=torch.long) for n in (sizes, counts))
        outside = (indices < 0) | (indices >= extents.repeat_interleave(repeats))
        _refuse_where(outside, counts, "has indices outside of it")
        places = indices + (extents.cumsum(0) - extents).repeat_interleave(repeats)
        # all are inside their tensor by now, so the order across tensors is right wherever the one within is
        _refuse_where(places.diff(prepend=places.new_tensor([-1])) <= 0, counts, "has indices out of order or twice")
        dense = torch.zeros(sum(sizes.values()), dtype=torch.float32)
        dense[places] = values
        return _split(dense, infos)

    def _counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        for name, size in sizes.items():
            if size > _MAX_INDEX:
                msg = f"{name} has {size:,} values, an int32 index reaches {_MAX_INDEX:,}. Use codec='int8'."
                raise FederationError(msg)
        return {name: min(size, max(1, math.ceil(self.ratio * size))) for name, size in sizes.items()}


CODECS: Mapping[str, Callable[[], Codec]] = {"bf16": BF16, "int8": Int8, "int4": Int4, "topk": TopK}
_WITH_OPTION: Mapping[str, Callable[[str], Codec]] = {
    "int8": lambda block: Int8(int(block)),
    "int4": lambda block: Int4(int(block)),
    "topk": lambda share: TopK(float(share)),
}
_VALID = f"Valid: {', '.join(CODECS)}, topk:<ratio> such as topk:0.01, int8:<block> and int4:<block> such as int8:64"


def make_codec(choice: str | Codec | None) -> Codec | None:
    """The codec of that name (`"topk:0.01"`, `"int8:64"`: with that option), or the object itself; None stays None.

    Raises:
        ConfigError: Unknown, or an option out of range; the valid names are listed.

    >>> make_codec("topk:0.01"), make_codec("int8:64")
    (TopK(ratio=0.01), Int8(block=64))
    """
    valid = f"{_VALID}, an object of these such as Int8(block=64), or None."
    if choice is None:
        return None
    if not isinstance(choice, str):
        methods = all(callable(getattr(choice, method, None)) for method in ("layout", "encode", "decode"))
        if isinstance(choice, type) or not methods or not all(hasattr(choice, a) for a in ("name", "lossy_feedback")):
            msg = f"{choice!r:.80} is no object with name, lossy_feedback, layout, encode and decode. {valid}"
            raise ConfigError(msg)
        return choice
    name, colon, option = choice.partition(":")
    if len(choice) > _LONGEST:
        msg = f"unknown codec '{shown(choice)}'. {valid}"
        raise ConfigError(msg)
    if name not in CODECS or (colon and name not in _WITH_OPTION):
        msg = f"unknown codec '{shown(choice)}'. {valid}"
        raise ConfigError(msg)
    try:
        return _WITH_OPTION[name](option) if colon else CODECS[name]()
    except ValueError:
        msg = f"codec '{shown(choice)}': '{shown(option)}' is no number. {valid}"
        raise ConfigError(msg) from None


def spec(codec: Codec | None) -> str | None:
    """The text from which `make_codec` makes an equal codec elsewhere; None stays None.

    Raises:
        ConfigError: A codec of one's own: no code travels.

    >>> spec(TopK(ratio=0.01)), spec(Int8(block=64)), spec(Int8())
    ('topk:0.01', 'int8:64', 'int8')
    """
    if codec is None:
        return None
    found = str(codec.name)
    if isinstance(codec, TopK):
        found = f"topk:{codec.ratio!r}"
    elif isinstance(codec, Int8) and codec.block != type(codec).block:
        found = f"{found}:{codec.block}"
    if found.partition(":")[0] not in CODECS or make_codec(found) != codec:
        msg = f"{codec!r:.80} is code of your own, and no code travels to participants. {_VALID}."
        raise ConfigError(msg)
    return found


def encoded_bytes(codec: Codec, infos: Mapping[str, TensorInfo]) -> int:
    """Size of all parts in bytes, known before anything is encoded; a message adds its header."""
    return sum(info.nbytes for info in codec.layout(infos).values())


def ratio(codec: Codec, infos: Mapping[str, TensorInfo]) -> float:
    """Bytes of the parts over bytes of the same values in float32; 1 where there is no value.

    >>> ratio(Int8(), {"w": TensorInfo(torch.float32, (256, 256))})
    0.25390625
    """
    plain = 4 * sum(_sizes(infos).values())
    return encoded_bytes(codec, infos) / plain if plain else 1.0


# --- shared: (N,) is all values, tensor after tensor in the order of their names --------------------------------------


def _sizes(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    return {name: math.prod(infos[name].shape) for name in sorted(infos)}


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """A float32 copy (N,) of all values, once they are known to be finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            msg = f"{name} is {tensor.dtype}; a delta is floating point. Encode trained weights only."
            raise FederationError(msg)
    sizes = _sizes(describe(tensors))
    flat = torch.empty(sum(sizes.values()), dtype=torch.float32)
    for name, piece in zip(sizes, torch.split(flat, list(sizes.values())), strict=True):
        piece.copy_(tensors[name].detach().reshape(-1))
    if not all_finite(flat):
        name = _owner(~flat.isfinite(), sizes)
        msg = f"{name} holds NaN or values infinite in float32, which no code stands for. Lower the learning rate."
        raise FederationError(msg)
    return flat


def _split(flat: Tensor, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Views into (N,), side by side in memory, which the running mean adds in one pass."""
    pieces = torch.split(flat, list(_sizes(infos).values()))
    return {name: piece.view(infos[name].shape) for name, piece in zip(sorted(infos), pieces, strict=True)}


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


def _check_layout(codec: Codec, parts: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> None:
    wanted, got = codec.layout(infos), describe(parts)
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            found = f"asked for was {wanted.get(name, 'nothing')!s:.200}, found {got.get(name, 'nothing')!s:.200}"
            msg = f"{codec.name}, part {shown(name)}: {found}. Both sides must use one codec with the same options."
            raise UpdateRefusedError(msg)


def _owner(where: Tensor, counts: Mapping[str, int]) -> str:
    """The tensor of the first True, where every tensor has that many entries."""
    ends = list(itertools.accumulate(counts.values()))
    return list(counts)[bisect.bisect_right(ends, int(where.nonzero()[0]))]


def _refuse_where(wrong: Tensor, counts: Mapping[str, int], what: str) -> None:
    if wrong.any():
        msg = f"{_owner(wrong, counts)} {what}: `encode` makes no such parts, and nobody could use them."
        raise UpdateRefusedError(msg)
