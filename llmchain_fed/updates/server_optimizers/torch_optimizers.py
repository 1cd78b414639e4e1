"""Server optimizers that are torch's own: any torch.optim class, and DiLoCo's choice of one.

Knows torch.optim. Knows nothing of rounds or models.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmchain_fed._config import check_by_name
from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.updates.server_optimizers.state import (
    Memory,
    check_finite,
    check_foreign,
    check_names,
    flattened,
    in_range,
    master,
    unflattened,
)


class TorchServerOptimizer:
    """Any torch.optim class on the gradient −D; `SGD` with lr=1 is plain FedAvg.

    Every step fills fresh float32 parameters with the global weights; only the torch optimizer's state per tensor is
    kept. Options are torch's, so are its defaults: AdamW, for one, decays the weights towards zero.

    Args:
        optimizer: The class; one that needs a closure (LBFGS) or sparse gradients, or that keeps state across tensors,
            cannot be used.
        **options: Passed to it: numbers, strings, booleans, None, or tuples of them.

    Raises:
        ConfigError: No such class, or options that it does not take.

    >>> optimizer = TorchServerOptimizer(torch.optim.SGD, lr=0.5)
    >>> optimizer, optimizer.step({"w": torch.zeros(1)}, {"w": torch.ones(1)})["w"]
    (TorchServerOptimizer(SGD, lr=0.5), tensor([0.5000]))
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            msg = f"TorchServerOptimizer takes a torch.optim class such as torch.optim.SGD, got {optimizer!r}."
            raise ConfigError(msg)
        self._class, self._options = optimizer, copy.deepcopy(options)
        self._memory: dict[str, Memory] = {}
        self._probe()

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"TorchServerOptimizer({self._class.__name__}{options})"

    def _probe(self) -> None:
        """One step on a parameter of no use: what cannot work shows now, not after the first round's training."""
        try:
            json.dumps(self._options, allow_nan=False)
            if self._options.get("maximize"):
                raise ValueError("maximize=True would move away from the participants")  # noqa: EM101
            parameter = nn.Parameter(torch.zeros(2, 2))
            optimizer = self._class([parameter], **self._options)
            before = repr(optimizer.state_dict()["param_groups"])
            parameter.grad = torch.ones(2, 2)
            optimizer.step()
            if repr(optimizer.state_dict()["param_groups"]) != before:
                raise ValueError("it keeps state across tensors, and a round may contain only some of them")  # noqa: EM101
            json.dumps([v for v in optimizer.state[parameter].values() if not isinstance(v, Tensor)], allow_nan=False)
        except Exception as error:
            msg = (
                f"{self!r} cannot step on named pseudo-gradients ({type(error).__name__}: {error!s:.200}). Choose "
                "other options, or an optimizer that needs nothing but dense gradients."
            )
            raise ConfigError(msg) from None

    def step(self, state: Mapping[str, Tensor], pseudo_gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next values, in the state's types; computed in float32 or better.

        Raises:
            FederationError: Names or shapes that are not the state's, a result that is not finite, or torch's optimizer
                cannot be used on these tensors.
        """
        check_names(state, pseudo_gradient)
        if not pseudo_gradient:
            return {}
        parameters = {name: nn.Parameter(master(state[name]).clone()) for name in pseudo_gradient}
        for name, parameter in parameters.items():
            parameter.grad = -pseudo_gradient[name].to(parameter)
        try:
            optimizer = self._class(list(parameters.values()), **self._options)
            known = {i: self._memory[n] for i, n in enumerate(parameters) if n in self._memory}
            # what an optimizer has from its making stays where nothing is remembered: torch 2.10's Adagrad makes its
            # sums there and nowhere else (https://github.com/pytorch/pytorch/blob/v2.10.0/torch/optim/adagrad.py)
            made = optimizer.state_dict()
            # deep copies: torch steps in place, and a step that fails must leave the memory as it was
            optimizer.load_state_dict(made | {"state": made["state"] | copy.deepcopy(known)})
            optimizer.step()
        except Exception as error:
            msg = f"{self!r} failed ({type(error).__name__}: {error!s:.200}); weights and memory are as they were."
            raise FederationError(msg) from error
        moved = {name: p.detach().to(state[name].dtype) for name, p in parameters.items()}
        memory = {name: dict(optimizer.state[p]) for name, p in parameters.items()}
        check_finite(self, moved, memory)
        self._memory = {**self._memory, **memory}
        return moved

    def settings(self) -> dict[str, Any]:
        """Class, torch's class and the options as JSON."""
        return {**self._kind(), "options": json.loads(json.dumps(self._options))}

    def _kind(self) -> dict[str, str]:
        return {"class": type(self).__name__, "optimizer": f"{self._class.__module__}.{self._class.__qualname__}"}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the memory as "slot/<tensor name>", the classes, and what torch keeps as plain numbers."""
        tensors, values = flattened(self._memory)
        return tensors, {**self._kind(), "values": values}

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ConfigError: It is another optimizer's.
        """
        check_foreign(numbers, self._kind(), "values")
        self._memory = unflattened(tensors, numbers["values"])


class DiLoCo(TorchServerOptimizer):
    """The outer optimizer of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on −D.

    >>> DiLoCo().step({"w": torch.zeros(1)}, {"w": torch.ones(1)})["w"]
    tensor([1.3300])
    """

    def __new__(cls, /, *values: Any, **options: Any) -> Self:
        """Refuses what the options are not, which Python would with a TypeError."""
        check_by_name(cls, ("lr", "momentum"), values, options)
        return super().__new__(cls)

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = in_range("DiLoCo", "lr", lr), in_range("DiLoCo", "momentum", momentum)
        # torch refuses nesterov without momentum, where it is plain SGD
        super().__init__(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def __repr__(self) -> str:
        return f"DiLoCo(lr={self.lr}, momentum={self.momentum})"

    def settings(self) -> dict[str, Any]:
        """Class and options as JSON."""
        return {"class": "DiLoCo", "lr": self.lr, "momentum": self.momentum}
