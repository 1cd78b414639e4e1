"""Headers of safetensors from elsewhere: which tensors lie where, before a value is touched.

Knows the layout of the format. Knows nothing of torch, or of what the tensors mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmchain_fed.untrusted.json_text import loads
from llmchain_fed.untrusted.text import DANGEROUS, ErrorType, refusal, shown

MAX_DIMENSIONS = 8
MAX_NAME = 512  # characters of a tensor's name
_MAX_COUNT = 2**48
_ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
_BREAKING = re.compile(f"{DANGEROUS.pattern}|[\n\t]")


class TensorHeader(NamedTuple):
    """A tensor's place as its file's header has it."""

    dtype: str
    """as the format spells it: F32, BF16, I8 …"""
    shape: tuple[int, ...]
    begin: int
    """bytes after the header"""
    end: int


def read_safetensors_header(
    data: bytes | memoryview, *, max_header: int, what: str, error: ErrorType, total: int | None = None
) -> tuple[dict[str, str], dict[str, TensorHeader]]:
    """Metadata and tensors of safetensors bytes, in the order in which they lie side by side; values are not read.

    Args:
        data: The whole, or at least its header, of which `total` then says the whole length.
        max_header: bytes of the header that make sense.
        what: Is read, for the message.
        error: Raised: not safetensors, a header that is too large, more than 8 dimensions, a name that is longer than
            512 characters or not printable, or a layout in which the values do not lie side by side.
        total: bytes of the whole.
    """
    whole = len(data) if total is None else total
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > whole - 8:
        raise refusal(
            error,
            f"{what} is not safetensors (it begins with {bytes(data[:4])!r}); nothing else is "
            "read, pickles least of all",
        )
    if size > max_header:
        raise refusal(error, f"{what} has a header of {size:,} bytes where at most {max_header:,} make sense")
    what_header = f"the safetensors header of {what}"
    # depth and integers are seen to below, entry by entry
    found = loads(data[8 : 8 + size], most=max_header, what=what_header, error=error, bounded=False)
    if not isinstance(found, dict):
        raise refusal(error, f"{what_header} is {type(found).__name__}, not a JSON object")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refusal(error, f"the metadata of {what} are no texts by name")
    if any(len(name) > MAX_NAME for name in found) or _BREAKING.search("".join(found)):
        odd = next(name for name in found if len(name) > MAX_NAME or _BREAKING.search(name))
        raise refusal(error, f"{what} has a tensor whose name is no name: {shown(odd)}")
    try:
        tensors = {name: _tensor(**entry) for name, entry in found.items()}
    except (TypeError, ValueError, KeyError):
        raise refusal(error, f"what {what_header} says of a tensor makes no sense: {_odd(found)}") from None
    in_order = sorted(tensors.items(), key=lambda item: item[1][2:])
    at = 0
    for name, tensor in in_order:
        size_of_one = length = _ITEM_SIZES[tensor.dtype]
        for count in tensor.shape:  # one after the other, so that no product grows beyond what can lie there
            if length <= whole:
                length *= count
        if tensor.begin != at or tensor.end != at + length or at % size_of_one:
            raise refusal(
                error,
                f"the safetensors layout of {what} contradicts itself: {shown(name)} lies at "
                f"{tensor.begin}–{tensor.end}, expected from {at}",
            )
        at = tensor.end
    if 8 + size + at != whole:
        raise refusal(error, f"the safetensors layout of {what} describes {8 + size + at:,} bytes of {whole:,}")
    return metadata, dict(in_order)


def _tensor(dtype: Any, shape: Any, data_offsets: Any) -> TensorHeader:
    """One entry of a header; anything else than its three fields, of their types, is an error."""
    begin, end = data_offsets
    if len(shape) > MAX_DIMENSIONS or type(shape) is not list or type(data_offsets) is not list:
        raise ValueError
    for count in shape:
        if type(count) is not int or not 0 <= count < _MAX_COUNT:
            raise ValueError
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _MAX_COUNT:
        raise ValueError
    _ITEM_SIZES[dtype]
    return TensorHeader(dtype, tuple(shape), begin, end)


def _odd(found: Mapping[str, Any]) -> str:
    """The first entry that is none."""
    for name, entry in found.items():
        try:
            _tensor(**entry)
        except (TypeError, ValueError, KeyError):
            return f"{shown(name)}: {shown(entry)}"
    return ""
