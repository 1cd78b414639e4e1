"""Named tensors and a JSON header as bytes: safetensors, read without trusting it.

Knows the safetensors layout. Knows nothing of what the tensors mean. No pickle, no code, no class names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from llmchain_fed import untrusted
from llmchain_fed.errors import ParticipantError, UpdateRefusedError
from llmchain_fed.model.weights import all_finite

_KEY = "llmchain_fed"
MAX_HEADER = 16 * 2**20
"""bytes: names and shapes of some 100,000 tensors"""
_ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')  # of a tensor, beside its name and numbers
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's type and shape, known before its values are touched."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def describe(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Type and shape of every tensor."""
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Tensors and a JSON-able header as bytes."""
    data: bytes = save(dict(tensors), metadata={_KEY: json.dumps(header, allow_nan=False)})
    return data


def read_json(data: bytes, *, most: int = MAX_HEADER) -> dict[str, Any]:
    """A JSON object that came from elsewhere: no name twice, no constant that JSON has not, within bounds.

    Raises:
        ParticipantError: It is none.
    """
    return untrusted.read_json(data, most=most, what="the message", error=ParticipantError)


def inspect(
    data: bytes, *, max_bytes: int, max_header: int = MAX_HEADER
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The header and what tensors there are, in the order in which they lie, without reading their values.

    `max_header` is of what stands before the values; `largest` says it where the tensors are known.

    Raises:
        UpdateRefusedError: Larger than that, not safetensors, no header of ours, a type that is not of ours, or a
            layout in which the values do not lie side by side.
    """
    if len(data) > max_bytes and int.from_bytes(data[:8], "little") <= len(data):  # a pickle is better called one
        msg = f"{len(data):,} bytes arrived where at most {max_bytes:,} fit what was asked for."
        raise UpdateRefusedError(msg)
    metadata, found = untrusted.read_safetensors_header(
        data, max_header=max_header, what="the message", error=UpdateRefusedError
    )
    if _KEY not in metadata or any(t.dtype not in DTYPES for t in found.values()):
        odd = next((n for n, t in found.items() if t.dtype not in DTYPES), None)
        what = f"{untrusted.shown(odd)} is {found[odd].dtype}" if odd is not None else f"it has no {_KEY!r}"
        msg = f"the safetensors header is not one of ours: {what}."
        raise UpdateRefusedError(msg)
    header = untrusted.read_json(
        metadata[_KEY], most=max_header, what="the header of the message", error=UpdateRefusedError
    )
    return header, {name: TensorInfo(DTYPES[t.dtype], t.shape) for name, t in found.items()}


def peek(header: bytes | bytearray) -> dict[str, Any]:
    """Our header within a safetensors header, of which nothing else is looked at.

    Raises:
        ParticipantError: There is none.
    """
    found = read_json(bytes(header), most=len(header))
    inner = found["__metadata__"][_KEY] if isinstance(found.get("__metadata__"), dict) else None
    if not isinstance(inner, str):
        msg = f"the safetensors header has no {_KEY!r}."
        raise ParticipantError(msg)
    return untrusted.read_json(inner, most=len(header), what="the header of the message", error=ParticipantError)


def largest(infos: Mapping[str, TensorInfo], own: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the longest header that `pack` makes of such tensors, and of their values: no message of them has more.

    `own` is the header of ours with the longest values that it may have.
    """
    values, names = sum(info.nbytes for info in infos.values()), "".join(infos)
    plain = names.isascii() and names.isprintable() and "\\" not in names and '"' not in names
    entries = len(infos) * (_ENTRY + 2 * len(str(values))) + sum(len(str(info.shape)) for info in infos.values())
    written = len(names) * (1 if plain else 6)  # at most: \u00e9
    ours = len(json.dumps({"__metadata__": {_KEY: json.dumps(own)}}))
    return entries + written + ours + 8, values  # a header is filled up to eight bytes


def values(data: bytes, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The tensors of bytes that `inspect` has passed: views into one copy of them, side by side in memory."""
    start = 8 + int.from_bytes(data[:8], "little")
    block = torch.frombuffer(bytearray(memoryview(data)[start:]), dtype=torch.uint8) if len(data) > start else None
    tensors, at = {}, 0
    for name, info in infos.items():
        part = block[at : at + info.nbytes].view(info.dtype) if block is not None else torch.empty(0, dtype=info.dtype)
        tensors[name] = part.reshape(info.shape)
        at += info.nbytes
    return tensors


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """One flat view over tensors that follow each other in one block of memory, else None."""
    first = tensors[0]
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.untyped_storage().data_ptr() == storage
        if not same or tensor.storage_offset() != end or not tensor.is_contiguous():
            return None
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,), first.storage_offset())


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that contains NaN or infinite values; one pass over those that lie side by side."""
    found = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    block = side_by_side(list(found.values())) if found else None
    if block is not None and math.isfinite(float(block.sum(dtype=torch.float32))):
        return None
    return next((name for name, tensor in found.items() if not all_finite(tensor)), None)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The L2 norm of a − b over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(a[n].float() - b[n].float())) for n in a))
