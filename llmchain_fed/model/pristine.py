"""What a base was when it was loaded by name, and what of it has changed since: exact, row by row.

Knows torch modules and checksums. Knows nothing about text, adapters' settings or the layout of a saved chain.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmchain_fed.errors import ChainFileError
from llmchain_fed.model.weights import is_adapter, stable_name

_ATTRIBUTE = "_llmchain_fed_pristine"
_ROWS, _VALUES, _BUFFER = "rows/", "values/", "buffer/"
# What says where a configuration comes from or how it computes, and the size that follows from the embeddings.
_IGNORED = ("vocab_size", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class Pristine:
    """Checksums of a base as its name alone loads it."""

    shapes: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, tuple[int, ...]]
    """stable name → CRC-32 of every row; a tensor of one dimension is one row"""
    buffers: Mapping[str, object]
    """stable name → what tells one value from another"""
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Changes:
    """What differs from the pristine base."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`rows/<name>` (k,) and `values/<name>` (k, …) for every parameter with other rows, `buffer/<name>` as it is"""
    vocabulary: int | None = None
    """rows of the embeddings, where they were resized"""
    config: dict[str, Any] = field(default_factory=dict)
    """configuration fields with another value"""
    whole: bool = False
    """so much differs, or in such a way, that only the whole base can tell"""


def record(base: nn.Module) -> None:
    """Remembers what the base is now; the record lies on the module and goes along with copies of it."""
    tensors = dict(_parameters(base))
    found = Pristine(
        shapes={n: tuple(t.shape) for n, t in tensors.items()},
        rows={n: _checksums(t) for n, t in tensors.items()},
        buffers={n: _stamp(t) for n, t in _buffers(base)},
        config=plain_config(base),
    )
    base.__dict__[_ATTRIBUTE] = found


def of(base: nn.Module) -> Pristine | None:
    """What was remembered of this base."""
    found: Pristine | None = base.__dict__.get(_ATTRIBUTE)
    return found


def digest(base: nn.Module) -> str:
    """128 bits over every value of the base, its parameters and buffers, as hex; adapters do not count."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted([*_parameters(base), *_buffers(base)]):
        found.update(f"{name}:{_stamp(tensor)};".encode())
    return found.hexdigest()


def changes(base: nn.Module, pristine: Pristine) -> Changes:
    """What differs from `pristine`, to be written beside the base's name."""
    tensors = dict(_parameters(base))
    config, exotic = _changed_config(plain_config(base), pristine.config)
    resized = {t.shape[0] for n, t in tensors.items() if n in pristine.shapes and _is_resized(t, pristine.shapes[n])}
    known = tensors.keys() == pristine.shapes.keys() and all(
        tuple(t.shape) == pristine.shapes[n] or _is_resized(t, pristine.shapes[n]) for n, t in tensors.items()
    )
    if exotic or not known or len(resized) > 1:
        return Changes(whole=True)
    written: dict[str, Tensor] = {}
    changed = total = 0
    for name, tensor in tensors.items():
        total += tensor.nbytes
        now, then = _checksums(tensor), pristine.rows[name]
        rows = [i for i, c in enumerate(now) if i >= len(then) or c != then[i]]
        if not rows and len(now) == len(then):
            continue
        index = torch.tensor(rows, dtype=torch.int64)
        written[_ROWS + name] = index
        written[_VALUES + name] = _as_rows(tensor.detach()).cpu()[index].contiguous()
        changed += written[_VALUES + name].nbytes
    if changed > total / 2:
        return Changes(whole=True)
    written |= {_BUFFER + n: _copied(t) for n, t in _buffers(base) if pristine.buffers.get(n) != _stamp(t)}
    return Changes(written, next(iter(resized), None), config)


def unsaved_buffers(base: nn.Module) -> dict[str, Tensor]:
    """The buffers that transformers does not write and makes anew, perhaps in another type than they are now."""
    known = base.state_dict().keys()
    named = [(n, b) for n, b in base.named_buffers() if n not in known and not is_adapter(n)]
    return {_BUFFER + stable_name(n): _copied(b) for n, b in named if b.is_floating_point()}


@torch.no_grad()
def apply(base: Any, tensors: Mapping[str, Tensor], vocabulary: int | None, config: Mapping[str, Any]) -> None:
    """Makes a pristine base the changed one.

    Raises:
        ChainFileError: The changes belong to another base.
    """
    if vocabulary is not None:
        # rows that the base does not have are all among the changes; memory is taken for no others
        known_rows = base.get_input_embeddings().weight.shape[0]
        new = max((len(t) for n, t in tensors.items() if n.startswith(_VALUES) and t.dim()), default=0)
        if vocabulary > known_rows + new:
            msg = (
                f"the saved chain has {vocabulary:,} rows of embeddings, the base has {known_rows:,} and {new:,} were "
                "saved. Save the chain again."
            )
            raise ChainFileError(msg)
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    known = plain_config(base)
    for name, value in config.items():
        if name not in known:
            msg = f"the saved chain sets {name!r}, which the base's configuration does not have. Save the chain again."
            raise ChainFileError(msg)
        setattr(base.config, name, value)
    own, buffers = dict(_parameters(base)), dict(base.named_buffers())
    for key, index in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "values":
            continue
        if kind == "buffer" and name in buffers and buffers[name].shape == index.shape:
            place, _, leaf = name.rpartition(".")
            base.get_submodule(place)._buffers[leaf] = index.to(buffers[name].device)
            continue
        values, target = tensors.get(_VALUES + name), own.get(name)
        rows = _as_rows(target) if target is not None else None
        fits = (
            kind == "rows"
            and values is not None
            and rows is not None
            and index.dtype == torch.int64
            and index.dim() == 1
            and values.shape == (len(index), *rows.shape[1:])
            and values.dtype == rows.dtype
            and (not len(index) or 0 <= int(index.min()) <= int(index.max()) < len(rows))
        )
        if not fits:
            msg = f"the changes to {name!r} do not fit the base: they are another base's. Save the chain again."
            raise ChainFileError(msg)
        rows[index.to(rows.device)] = values.to(rows.device)  # type: ignore[index, union-attr]


def plain_config(base: Any) -> dict[str, Any]:
    """The module's configuration as data; empty without one."""
    config: Any = getattr(base, "config", None)
    found: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: v for k, v in found.items() if k not in _IGNORED and not k.startswith("_")}


def _changed_config(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Fields with another value, and whether one of them is more than a plain value."""
    changed = {k: v for k, v in now.items() if k not in then or then[k] != v}
    exotic = bool(then.keys() - now.keys()) or any(k not in then or not _is_plain(v) for k, v in changed.items())
    return changed, exotic


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_resized(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    same = len(shape) == tensor.dim() and tuple(tensor.shape[1:]) == shape[1:]
    return tensor.dim() >= 2 and same and tensor.shape[0] != shape[0]


def _parameters(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stable name → parameter of the base itself, tied ones once."""
    for name, parameter in base.named_parameters():
        if not is_adapter(name) and parameter.device.type != "meta":
            yield stable_name(name), parameter


def _buffers(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stable name → buffer of the base itself."""
    for name, buffer in base.named_buffers():
        if not is_adapter(name) and buffer.device.type != "meta":
            yield stable_name(name), buffer


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _stamp(tensor: Tensor) -> str:
    """Type, shape and every value, in a few letters."""
    rows = b"".join(c.to_bytes(4, "little") for c in _checksums(tensor))
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.blake2b(rows, digest_size=16).hexdigest()}"


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else tensor.reshape(1, -1)


def _checksums(tensor: Tensor) -> tuple[int, ...]:
    rows = _as_rows(tensor.detach()).cpu().contiguous()
    if not rows.numel():
        return (0,) * len(rows)
    raw = rows.reshape(len(rows), -1).view(torch.uint8).numpy()
    return tuple(zlib.crc32(row) for row in raw)
