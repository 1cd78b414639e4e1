"""Fewer values: the largest of them and where they stand.

Knows named tensors and numbers. Knows nothing of rounds, participants or how bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.updates.codecs.base import MAX_INDEX, check_layout, flattened, refuse_where, sizes_of, unflattened
from llmchain_fed.updates.serialization import TensorInfo, describe


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
    needs_feedback: ClassVar[bool] = True
    ratio: float = 0.1

    def __post_init__(self) -> None:
        if type(self.ratio) not in (int, float) or not 0 < self.ratio <= 1:
            msg = f"TopK: `ratio` is the share of values that is sent, above 0 up to 1, got {self.ratio!r:.80}."
            raise ConfigError(msg)

    def layout(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`indices` int32 (K,), counted within each tensor, and `values` float32 (K,); K = Σ k."""
        total = sum(self._counts(sizes_of(infos)).values())
        return {"indices": TensorInfo(torch.int32, (total,)), "values": TensorInfo(torch.float32, (total,))}

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest magnitudes, in the order of their places."""
        sizes = sizes_of(describe(tensors))
        counts = self._counts(sizes)
        indices, values = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.float32)]
        for name, part in zip(sizes, torch.split(flattened(tensors), list(sizes.values())), strict=True):
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
        check_layout(self, parts, infos)
        sizes, indices, values = sizes_of(infos), parts["indices"].long(), parts["values"]
        counts = self._counts(sizes)
        refuse_where(~values.isfinite(), counts, "contains NaN or infinite values")
        extents, repeats = (torch.tensor(list(n.values()), dtype=torch.long) for n in (sizes, counts))
        outside = (indices < 0) | (indices >= extents.repeat_interleave(repeats))
        refuse_where(outside, counts, "has indices outside of it")
        places = indices + (extents.cumsum(0) - extents).repeat_interleave(repeats)
        # all are inside their tensor by now, so the order across tensors is right wherever the one within is
        refuse_where(places.diff(prepend=places.new_tensor([-1])) <= 0, counts, "has indices out of order or twice")
        dense = torch.zeros(sum(sizes.values()), dtype=torch.float32)
        dense[places] = values
        return unflattened(dense, infos)

    def _counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        for name, size in sizes.items():
            if size > MAX_INDEX:
                msg = f"{name} has {size:,} values, an int32 index reaches {MAX_INDEX:,}. Use codec='int8'."
                raise FederationError(msg)
        return {name: min(size, max(1, math.ceil(self.ratio * size))) for name, size in sizes.items()}
