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

from llmchain_fed.errors import ParticipantError, UpdateRefusedError

_KEY = "llmchain_fed"
_MAX_HEADER = 16 * 2**20  # bytes: names and shapes of some 100,000 tensors
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


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object that came from elsewhere; constants that JSON has not, and names given twice, are refused.

    Raises:
        ParticipantError: It is none.
    """
    try:
        found = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        msg = f"the message is no JSON of ours ({type(error).__name__}: {error!s:.200})."
        raise ParticipantError(msg) from None
    if not isinstance(found, dict):
        msg = f"the message is {type(found).__name__}, not a JSON object."
        raise ParticipantError(msg)
    return found


def inspect(data: bytes, *, max_bytes: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The header and what tensors there are, without reading their values.

    Raises:
        UpdateRefusedError: Larger than `max_bytes`, not safetensors, no header of ours, a type that is no float, or a
            layout in which the values do not lie side by side.
    """
    if len(data) > max_bytes:
        msg = f"{len(data):,} bytes arrived where at most {max_bytes:,} fit what was asked for."
        raise UpdateRefusedError(msg)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEADER):
        msg = f"not safetensors (it begins with {data[:4]!r}); nothing else is read, pickles least of all."
        raise UpdateRefusedError(msg)
    try:
        layout = json.loads(data[8 : 8 + size], object_pairs_hook=_no_duplicates)
        header = json.loads(layout.pop("__metadata__")[_KEY], parse_constant=_no_constant)
        if not isinstance(header, dict):
            raise TypeError("no mapping")  # noqa: EM101
        infos = {n: TensorInfo(DTYPES[t["dtype"]], _counts(t["shape"])) for n, t in layout.items()}
        offsets = {n: _counts(t["data_offsets"]) for n, t in layout.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the safetensors header is not one of ours ({type(error).__name__}: {error!s:.200})."
        raise UpdateRefusedError(msg) from None
    in_order = sorted(infos, key=lambda n: offsets[n])
    at = 0
    for name in in_order:
        if offsets[name] != (at, at + infos[name].nbytes) or at % infos[name].dtype.itemsize:
            msg = (
                f"the safetensors layout contradicts itself: {name:.80} lies at {offsets[name]!s:.80}, "
                f"expected from {at}."
            )
            raise UpdateRefusedError(msg)
        at += infos[name].nbytes
    if 8 + size + at != len(data):
        msg = f"the safetensors layout contradicts itself: it describes {8 + size + at:,} bytes of {len(data):,}."
        raise UpdateRefusedError(msg)
    return header, {name: infos[name] for name in in_order}


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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return found


def _counts(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(count) is int and count >= 0 for count in found):
        msg = f"{found!r:.80} is no list of counts"
        raise ValueError(msg)
    return tuple(found)


def _no_constant(name: str) -> float:
    msg = f"{name} in the header"
    raise ValueError(msg)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The L2 norm of a − b over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(a[n].float() - b[n].float())) for n in a))
