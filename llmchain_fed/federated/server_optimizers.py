"""The seam for how the aggregated values move the global weights.

The default, plain addition, loads the aggregate as it is. Knows named tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from llmchain_fed.errors import ConfigError


class ServerOptimizer(Protocol):
    """Moves the global weights along the pseudo-gradient D = Σ n_k/n · w_k − w (a descent step is +D)."""

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next global weights; called once a round, after every check has passed."""


def apply(
    optimizer: ServerOptimizer | None, state: Mapping[str, Tensor], aggregate: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The next global weights. Without an optimizer that is the aggregate itself, bit by bit."""
    if optimizer is None:
        return dict(aggregate)
    gradient = {name: aggregate[name].float() - state[name].float() for name in state}
    return {name: value.to(state[name].dtype) for name, value in optimizer.step(state, gradient).items()}


def check(optimizer: Any) -> None:
    """Makes sure that it has the one method.

    Raises:
        ConfigError: It has not.
    """
    if optimizer is not None and not callable(getattr(optimizer, "step", None)):
        msg = f"server_optimizer is an object with step(state, pseudo_gradient), got {optimizer!r}."
        raise ConfigError(msg)
