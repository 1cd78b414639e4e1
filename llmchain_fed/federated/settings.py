"""Settings: what a server runs with, made of the options that a user gives.

Knows how options become what can be written (`config_of`) and what they stand for (`Settings`). Knows nothing about
what each option may be, which stands in `options`, or how rounds are run.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmchain_fed._config import unknown_option
from llmchain_fed.data.sources.columns import checked_columns
from llmchain_fed.data.split import Split
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.options import AGAIN, CODE, EXAMPLES, FederationConfig, FederationOptions
from llmchain_fed.recipes.labels import checked_labels
from llmchain_fed.training.batch_sampler import BatchSampler
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_step import GradientStep
from llmchain_fed.training.metrics import BUILT_IN, Metric, checked_metrics
from llmchain_fed.training.names import meant_in_federation
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation import AGGREGATIONS, make_aggregation
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.codecs import make_codec, spec
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer, ServerOptimizer
from llmchain_fed.updates.transforms import checked_transforms
from llmchain_fed.updates.transforms.base import UpdateTransform

_F = TypeVar("_F", bound=Callable[..., Any])
_OF_TRAINING = TrainingConfig.model_fields.keys()
_BESIDE: Mapping[str, Any] = {
    "llm": None,
    "lr": None,
    "batch_size": None,
    "runtime": None,
    "callbacks": (),
    "progress": True,
}


def showing_options(function: _F) -> _F:
    """Gives a function over `FederationOptions` the signature in which each stands by name and with its default.

    A notebook then completes them, and `help` shows them.
    """
    plain = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_BESIDE[name] if name in _BESIDE else FederationConfig.model_fields[name].default,
            annotation=annotation,
        )
        for name, annotation in FederationOptions.__annotations__.items()
    ]
    function.__signature__ = inspect.Signature([*plain, *options])  # type: ignore[attr-defined] # functions have it
    return function


def training_of(options: FederationOptions, optimizer: Any = None) -> TrainingConfig:
    """One configuration out of `training` and what is short for its options.

    Raises:
        ConfigError: An option is given in both places with two values.
    """
    training = options.get("training")
    if training is not None and not isinstance(training, TrainingConfig):
        msg = f"training is a TrainingConfig, got {type(training).__name__}. Write TrainingConfig(…)."
        raise ConfigError(msg)
    config = training or TrainingConfig()
    short = {"optimizer": ("optimizer", optimizer), "lr": ("learning_rate", options.get("lr"))}
    changes = {}
    for name, (field, value) in (short | {"batch_size": ("batch_size", options.get("batch_size"))}).items():
        if value is None:
            continue
        if field in config.model_fields_set and getattr(config, field) != value:
            msg = f"{name}={value!r} contradicts training.{field}={getattr(config, field)!r}. Give it once."
            raise ConfigError(msg)
        changes[field] = value
    if "seed" not in config.model_fields_set:
        changes["seed"] = options.get("seed", 0)
    replaced: TrainingConfig = config.replace(**changes)
    return replaced


def config_of(options: FederationOptions, training: TrainingConfig) -> FederationConfig:
    """The options as they can be written down, with what `training_of` makes of them; code stands there by its name.

    Raises:
        ConfigError: One is unknown, or out of its range.
    """
    for name in options:
        if name not in FederationOptions.__annotations__:
            hint = f". It is one of training's: training=TrainingConfig({name}=…)" if name in _OF_TRAINING else ""
            known = [*FederationOptions.__annotations__, "optimizer"]
            raise ConfigError(unknown_option(name, known, None if hint else meant_in_federation(name)) + hint)
    plain: dict[str, Any] = {n: value for n, value in options.items() if n in FederationConfig.model_fields}
    plain["training"] = training
    if "columns" in plain:
        plain["columns"] = checked_columns(plain["columns"])
    if not isinstance(optimizer := training.optimizer, str):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        plain["optimizer"] = _code(kind.__qualname__, "" if kind is optimizer else f" {optimizer.defaults!r}")
        others = training.model_fields_set - {"optimizer"}
        plain["training"] = TrainingConfig(**{name: getattr(training, name) for name in sorted(others)})
    rule = make_aggregation(options.get("aggregation", "fedavg"))
    plain["aggregation"] = rule.name if AGGREGATIONS.get(rule.name) is rule else _code(rule.name)
    server_optimizers.check(moves := options.get("server_optimizer"))
    if isinstance(moves, ResumableServerOptimizer):
        plain["server_optimizer"] = moves.settings()
    elif moves is not None:
        plain["server_optimizer"] = _code(type(moves).__qualname__)
    plain |= {n: spec(make_codec(plain[n])) for n in ("codec", "broadcast_codec") if n in plain}
    plain["transforms"] = [_code(t.name) for t in checked_transforms(options.get("transforms"))] or None
    plain["metrics"] = [_written(metric) for metric in checked_metrics(options.get("metrics"), elsewhere=True)] or None
    if (labels := options.get("labels")) is not None:
        plain["labels"] = list(checked_labels(labels))
    for name in ("gradient_step", "batch_sampler"):
        if (given := options.get(name)) is not None:
            if not callable(given):
                msg = f"{name} is a function of your own, as docs/extending.md shows, got {given!r:.80}."
                raise ConfigError(msg)
            plain[name] = _code(getattr(given, "__qualname__", type(given).__qualname__))
    evaluation = plain.get("evaluation")
    if isinstance(evaluation, Split) and callable(evaluation.by):
        plain["evaluation"] = _code(f"Split(by={getattr(evaluation.by, '__qualname__', 'a function')})")
    elif not isinstance(evaluation, (numbers.Real, Split, type(None))):
        plain["evaluation"] = EXAMPLES
    return FederationConfig(**plain)


def _written(metric: Metric) -> str | dict[str, Any]:
    """A metric as a file has it."""
    if metric.code:
        return _code(metric.name)
    if metric.name in BUILT_IN or metric.maximize is None:
        return metric.name
    return {"name": metric.name, "maximize": metric.maximize}


def _code(name: str, options: str = "") -> str:
    return f"{CODE}{name[:200]}{options[: 2**14]}{AGAIN}"


@dataclass(frozen=True)
class Settings:
    """What a server runs with: the options, and what they stand for."""

    config: FederationConfig
    rule: Rule
    layout: LoraLayout | None
    training: TrainingConfig
    server_optimizer: ServerOptimizer | None
    transforms: tuple[UpdateTransform, ...]
    gradient_step: GradientStep | None
    batch_sampler: BatchSampler | None

    @property
    def codec(self) -> Codec | None:
        """How updates travel; None: as they are."""
        return make_codec(self.config.codec)

    @property
    def broadcast_codec(self) -> Codec | None:
        """How the global state travels."""
        return make_codec(self.config.broadcast_codec)


def sampled(wanted: float | None, present: int) -> int:
    """How many of those who are there take part: a count that was valid once asks for all where fewer are left."""
    if wanted is None:
        return max(present, 1)
    return max(1, round(wanted * present)) if isinstance(wanted, float) else min(wanted, present)


def check_counts(config: FederationConfig, available: int) -> None:
    """Makes sure that a round of so many participants can be what the options say; of none nothing is known yet.

    Raises:
        ConfigError: More are to be sampled than there are, or a quorum is asked for that no round can meet.
    """
    wanted, quorum = config.participants_per_round, config.quorum
    if type(wanted) is int and wanted > max(available, 1):
        msg = f"participants_per_round is a share in (0, 1] or a count up to {available}, got {wanted!r}."
        raise ConfigError(msg)
    if available and quorum > (most := sampled(wanted, available)):
        msg = f"a quorum of {quorum} can never be met by {most} participants a round. Lower it or sample more."
        raise ConfigError(msg)
