"""Named tensors and a JSON header as bytes: safetensors, read without trusting it.

Knows the safetensors layout. Knows nothing of what the tensors mean. No pickle, no code, no class names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llmchain_fed.errors import UpdateRefusedError

_KEY = "llmchain_fed"
_MAX_HEADER = 16 * 2**20  # bytes: names and shapes of some 100,000 tensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def inspect(data: bytes, *, max_bytes: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The header and what tensors there are, without reading their values.

    Raises:
        UpdateRefusedError: Larger than `max_bytes`, not safetensors, no header of ours, or a type that is no float.
    """
    if len(data) > max_bytes:
        raise UpdateRefusedError(f"{len(data):,} bytes arrived where at most {max_bytes:,} fit what was asked for.")  # noqa: EM102
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEADER):
        msg = f"not safetensors (it begins with {data[:4]!r}); nothing else is read, pickles least of all."
        raise UpdateRefusedError(msg)
    try:
        layout = json.loads(data[8 : 8 + size])
        header = json.loads(layout.pop("__metadata__")[_KEY], parse_constant=_no_constant)
        if not isinstance(header, dict):
            raise TypeError
        infos = {n: TensorInfo(DTYPES[t["dtype"]], tuple(map(int, t["shape"]))) for n, t in layout.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the safetensors header is not one of ours ({type(error).__name__}: {error})."
        raise UpdateRefusedError(msg) from None
    return header, infos


def values(data: bytes) -> dict[str, Tensor]:
    """The tensors of bytes that `inspect` has passed.

    Raises:
        UpdateRefusedError: The layout contradicts itself.
    """
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        msg = f"the safetensors layout contradicts itself ({error})."
        raise UpdateRefusedError(msg) from None
    return tensors


def _no_constant(name: str) -> float:
    msg = f"{name} in the header"
    raise ValueError(msg)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The L2 norm of a − b over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(a[n].float() - b[n].float())) for n in a))
