"""RunningMean: Σ n_k/n · w_k over updates as they arrive, without keeping them.

Pure numbers over named tensors. Knows nothing about rules or participants.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.updates.collection import Collection, Combined, Contribution, Round
from llmchain_fed.updates.serialization import side_by_side


class RunningMean(Collection):
    """Σ n_k/n · w_k, kept up to date update by update (West 1979), in float32 or better.

    The running form needs no total beforehand, keeps one state however many updates come, and is exact where it should
    be: one update gives its own values bit by bit, and so do identical ones.

    >>> mean = RunningMean()
    >>> mean.add(Contribution({"w": torch.tensor([1.0])}, weight=1))
    >>> mean.add(Contribution({"w": torch.tensor([5.0])}, weight=3))
    >>> mean.finish().values["w"]
    tensor([4.])
    """

    def __init__(self) -> None:
        self.zero()

    def zero(self, about: Round | None = None) -> None:  # noqa: ARG002 (a mean needs nothing but what is added)
        """Forgets what was added."""
        self._mean: dict[str, Tensor] = {}
        self._block: Tensor | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def add(self, given: Contribution) -> None:
        """Takes one participant's values in.

        Raises:
            FederationError: Names or shapes differ from the first ones.
        """
        tensors, weight = given.tensors, given.weight
        if not self._mean:
            self._begin(tensors)
            self._total = float(weight)
            return
        if tensors.keys() != self._mean.keys():
            msg = (
                "updates of different tensors cannot be averaged: "
                f"{sorted(tensors.keys() ^ self._mean.keys())[:3]} differ."
            )
            raise FederationError(msg)
        for name, tensor in tensors.items():  # all shapes first: a failure must not leave half an update in the mean
            if tensor.shape != self._mean[name].shape:
                msg = f"{name} has shape {tuple(tensor.shape)}, the others' is {tuple(self._mean[name].shape)}."
                raise FederationError(msg)
        self._total += weight
        share = weight / self._total
        block = side_by_side([tensors[name] for name in self._mean]) if self._block is not None else None
        if block is not None and self._block is not None:  # one pass over memory instead of hundreds of small ones
            self._block.lerp_(block.to(self._block.dtype), share)
            return
        for name, mean in self._mean.items():
            mean.lerp_(tensors[name].to(mean.dtype), share)  # mean += (w - mean) · n_k / n so far

    def _begin(self, tensors: Mapping[str, Tensor]) -> None:
        """The mean is the first update; its tensors lie side by side where they are of one type."""
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        types = {torch.promote_types(dtype, torch.float32) for dtype in self._dtypes.values()}
        if len(types) > 1:
            self._mean = {n: t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for n, t in tensors.items()}
            return
        self._block = torch.cat([t.reshape(-1).to(next(iter(types))) for t in tensors.values()])
        parts = torch.split(self._block, [t.numel() for t in tensors.values()])
        self._mean = {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}

    def finish(self) -> Combined:
        """The mean in the updates' own types.

        Raises:
            FederationError: No update was added.
        """
        if not self._mean:
            msg = "there is no update to average."
            raise FederationError(msg)
        return Combined({name: mean.to(self._dtypes[name], copy=True) for name, mean in self._mean.items()})
