"""TrainingConfig: how one participant trains in one round.

Knows the options and torch's optimizer classes. Knows nothing about data, models or rounds.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmchain_fed._config import FrozenConfig
from llmchain_fed.errors import ConfigError
from llmchain_fed.recipes.labels import checked_labels
from llmchain_fed.training.loss import Precision
from llmchain_fed.training.names import meant_in_training

_BY_NAME = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
DEFAULT_LEARNING_RATE = 2e-4
_MOST_WEIGHT = 1e6


def _warmup(value: Any) -> Any:
    share = isinstance(value, float) and 0.0 <= value < 1.0
    if share or (type(value) is int and value >= 0):
        return value
    msg = "a share of the steps below 1.0, or a whole number of steps, is wanted"
    raise ValueError(msg)


class TrainingConfig(FrozenConfig):
    """How one participant trains in one round.

    >>> TrainingConfig(learning_rate=5e-4, max_steps=12)
    TrainingConfig(learning_rate=0.0005, max_steps=12)
    """

    learning_rate: float | None = Field(default=None, gt=0.0)
    """by default the optimizer instance's own, else 2e-4"""
    batch_size: int = Field(default=16, ge=1)
    """examples per optimizer step"""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """examples per forward pass, to save memory; the step is the same to rounding"""
    gradient_checkpointing: bool = False
    """computes activations anew in the backward pass instead of keeping them: the same gradients in much less memory,
    for a second forward pass"""
    epochs: int | None = Field(default=None, ge=1)
    """passes over the participant's examples per round; 1 unless `max_steps` is given"""
    max_steps: int | None = Field(default=None, ge=1)
    """optimizer steps per round instead; the next round goes on where this one ended"""
    optimizer: Any = "adamw"
    """"adamw", "adam", "sgd", a torch.optim class, or an instance whose class and settings are the template"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate goes on after the warm-up: it stays, or falls to 0 in a line or in half a cosine, as
    transformers' get_scheduler has them. `learning_rate` is the largest that is reached"""
    warmup: Annotated[int | float, BeforeValidator(_warmup), Field(ge=0, le=2**53)] = 0
    """over which the learning rate rises from 0: so many steps, or a share such as 0.1 of all steps"""
    lr_schedule_over: Literal["federation", "round"] = "federation"
    """what schedule and warm-up run over: all rounds of `fit(rounds)` (of `fit(…, of=…)` where that says more), as one
    training does in transformers and in FlowerTune; or every round anew. `personalize` and curves have the constant
    rate"""
    weight_decay: float | None = Field(default=None, ge=0.0, le=1e6)
    """by default the optimizer's own"""
    max_grad_norm: float | None = Field(default=None, gt=0.0)
    """clips the gradient's L2 norm; None is off"""
    max_length: int | None = Field(default=None, ge=2)
    """tokens: longer examples are left out and counted"""
    tolerance: float = Field(default=0.05, ge=0.0, le=1.0)
    """share of a participant's examples that may be left out because no answer could be their completion (an end token
    or stop string in it, characters that the vocabulary lacks); beyond it the participant is refused"""
    proximal_mu: float = Field(default=0.0, ge=0.0, le=1e6)
    """FedProx: adds mu/2 · ‖w − w_global‖² to the loss (arXiv 1812.06127)"""
    precision: Precision = "fp32"
    """bf16: forward and backward in bfloat16, weights and optimizer in float32"""
    keep_optimizer: bool = False
    """keep each participant's optimizer state for its next round instead of starting afresh"""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """decides the order of the data and dropout, together with participant and round"""
    loss: Literal["tokens", "labels"] = "tokens"
    """"labels": cross-entropy over `labels`, each scored as a whole text; held-out losses are nats per example then"""
    labels: tuple[str, ...] | None = None
    """all answers that there are, written exactly as the completions. With the loss "tokens" they train nothing, and a
    round's record says when all held-out examples are given the same one"""
    class_weight: Literal["balanced"] | dict[str, float] | None = None
    """what an example counts in the loss "labels", by its label; "balanced" is examples / (labels · examples of this
    label), of the participant's own. A label that a mapping leaves out counts 1"""

    @classmethod
    def meant(cls, name: str) -> str | None:
        """Where an option is that transformers, TRL or Flower have by this name."""
        return meant_in_training(name)

    @field_validator("labels", mode="before")
    @classmethod
    def _checked_labels(cls, labels: Any) -> Any:
        return None if labels is None else checked_labels(labels)

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.epochs is not None and self.max_steps is not None:
            msg = (
                f"give epochs ({self.epochs}) or max_steps ({self.max_steps}), not both: each decides "
                "when a round ends."
            )
            raise ConfigError(msg)
        self._optimizer_class()
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        if self.loss == "labels" and self.labels is None:
            msg = 'loss="labels" compares labels, and none are given. Write labels=["minor", "major"].'
            raise ConfigError(msg)
        if self.loss == "labels" and self.gradient_checkpointing:
            msg = (
                'loss="labels" reads a prompt once for all labels, and gradient checkpointing keeps nothing of it. '
                "Leave gradient_checkpointing out; micro_batch_size saves memory, too."
            )
            raise ConfigError(msg)
        if self.class_weight is None:
            return
        if self.loss != "labels":
            msg = 'class_weight weighs the examples of loss="labels", and the loss is "tokens". Choose that loss too.'
            raise ConfigError(msg)
        if isinstance(self.class_weight, dict):
            if strange := sorted(self.class_weight.keys() - set(self.labels or ())):
                msg = f"class_weight weighs {strange[0]!r:.80}, which is none of the labels {list(self.labels or ())}."
                raise ConfigError(msg)
            if wrong := [w for w in self.class_weight.values() if not 0.0 < w <= _MOST_WEIGHT]:
                msg = f"a class weight is a number above 0, at most {_MOST_WEIGHT:g}, got {wrong[0]!r}."
                raise ConfigError(msg)

    def _optimizer_class(self) -> type[torch.optim.Optimizer]:
        choice = self.optimizer
        if isinstance(choice, str) and choice in _BY_NAME:
            return _BY_NAME[choice]
        kind = choice if isinstance(choice, type) else type(choice)
        if issubclass(kind, torch.optim.LBFGS):
            msg = "LBFGS evaluates the loss several times a step, which this loop does not. Use adamw, adam or sgd."
            raise ConfigError(msg)
        if isinstance(choice, type) and issubclass(choice, torch.optim.Optimizer):
            return choice
        if isinstance(choice, torch.optim.Optimizer):
            if len(choice.param_groups) > 1:
                msg = (
                    f"the template optimizer has {len(choice.param_groups)} parameter groups; only one "
                    "setting for all can be copied. Use one group."
                )
                raise ConfigError(msg)
            return type(choice)
        msg = f"optimizer is one of {sorted(_BY_NAME)}, a torch.optim class or an instance of one, got {choice!r}."
        raise ConfigError(msg)

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate changes from step to step."""
        return self.lr_schedule != "constant" or bool(self.warmup)

    def to_plain(self) -> dict[str, Any] | None:
        """The options that were given, as JSON-able values; None where the optimizer is no name and cannot travel."""
        if not isinstance(self.optimizer, str):
            return None
        plain = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def make_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over `parameters`.

        Raises:
            ConfigError: The optimizer takes no `weight_decay` but one was given.
        """
        kind = self._optimizer_class()
        accepted = inspect.signature(kind).parameters
        options: dict[str, Any] = {}
        if isinstance(self.optimizer, torch.optim.Optimizer):
            group = self.optimizer.param_groups[0]
            options = {k: v for k, v in group.items() if k in accepted and k != "params"}
        if self.learning_rate is not None or "lr" not in options:
            options["lr"] = self.learning_rate or DEFAULT_LEARNING_RATE
        if self.weight_decay is not None:
            if "weight_decay" not in accepted:
                msg = f"{kind.__name__} takes no weight_decay. Leave it out or choose adamw, adam or sgd."
                raise ConfigError(msg)
            options["weight_decay"] = self.weight_decay
        return kind(parameters, **options)
