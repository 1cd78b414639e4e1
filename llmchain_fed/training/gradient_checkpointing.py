"""Gradient checkpointing: activations computed anew in the backward pass, so that they need not be kept.

Knows how transformers turns it on. Knows nothing about losses, optimizers or data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmchain_fed.errors import ConfigError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loss import transformers_model


def check_checkpointing(model: LocalModel, config: TrainingConfig) -> None:
    """Makes sure that the model can do what the options ask for.

    Raises:
        ConfigError: `gradient_checkpointing` is asked for, and the module has none.
    """
    if config.gradient_checkpointing:
        _checkpointed(model.module)


@contextmanager
def checkpointing(module: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Inside, the backward pass computes activations anew; afterwards the module is as it was.

    A module that its owner has set so stays so. Gradients are the same, dropout's draws included
    (`torch.utils.checkpoint`, without reentrance: adapters need no gradient of the inputs then).

    Raises:
        ConfigError: The module has none.
    """
    model = _checkpointed(module) if wanted else None
    if model is None or any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        yield
        return
    how = {"use_reentrant": False}
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.24 renamed it
    model.activation_checkpointing_enable(how) if new else model.gradient_checkpointing_enable(how)
    try:
        yield
    finally:
        model.activation_checkpointing_disable() if new else model.gradient_checkpointing_disable()


def _checkpointed(module: nn.Module) -> Any:
    model = transformers_model(module)
    if model is None or not getattr(model, "supports_gradient_checkpointing", False):
        msg = (
            f"{type(model if model is not None else module).__name__} has no gradient checkpointing of transformers'. "
            "Leave gradient_checkpointing out; micro_batch_size saves memory, too."
        )
        raise ConfigError(msg)
    return model
