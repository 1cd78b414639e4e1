"""FederationConfig: every option of a federation that can be written down and decides how it goes on, once.

Knows what each option may be, and turns what a user gives into what can be written (`config_of`) and into what a server
runs with (`Settings`). Knows nothing about how rounds are run. A new option is a field here, a line of
`FederationOptions`, and its user: the constructor, checkpoints, the federation's file and docs/options.md follow.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypedDict, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, field_serializer, field_validator

from llmchain_fed._config import FrozenConfig, unknown_option
from llmchain_fed.data.examples import Examples
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.callbacks import Callback
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.training.batch_sampler import BatchSampler
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_step import GradientStep
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation import AGGREGATIONS, Weighting, make_aggregation
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.aggregation.weight_share import Share
from llmchain_fed.updates.codecs import make_codec, spec
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.collection import Collection
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer, ServerOptimizer
from llmchain_fed.updates.transforms import UpdateTransform, checked_transforms

CODE, EXAMPLES = "code: ", "examples: given beside the options (give them again on resume)"
_MAY_DIFFER: Final = object()
_T = TypeVar("_T")
MayDiffer = Annotated[_T, _MAY_DIFFER]
"""an option that may be given otherwise when a federation goes on; every other one decides what is learnt"""
Count = Annotated[int, Field(ge=0, le=10**9)]
AtLeastOne = Annotated[int, Field(ge=1, le=10**9)]
Code = Annotated[str, Field(max_length=2**16, pattern=f"^{CODE}")]
Word = Annotated[str, Field(min_length=1, max_length=400)]


def _is_share(value: object) -> bool:
    return type(value) is float and 0 < value <= 1


def _sample(value: Any) -> Any:
    if value is None or _is_share(value) or (type(value) is int and 1 <= value < 2**63):
        return value
    msg = "a share in (0, 1] or a count of at least 1 is wanted"
    raise ValueError(msg)


def _held_out(value: Any) -> Any:
    if value in (None, EXAMPLES) or (_is_share(value) and value < 1):
        return value
    msg = "as a share it lies between 0 and 1"
    raise ValueError(msg)


class FederationConfig(FrozenConfig):
    """What decides how a federation goes on, besides its chain and its participants' examples.

    `fed.config` shows it, a checkpoint has it, and a federation's file is it. What is code (a rule or an optimizer of
    your own) stands here by its name, as "code: … (give it again on resume)".

    >>> FederationConfig(aggregation="fedit", quorum=2)
    FederationConfig(aggregation='fedit', quorum=2)
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    training: TrainingConfig = TrainingConfig()
    """how participants train; `lr=`, `batch_size=` and `optimizer=` are short for three of its options"""
    optimizer: Code | None = None
    """the participants' optimizer where it is code: a torch.optim class, or an instance taken as the template"""
    aggregation: Word = "fedavg"
    """the server's rule: "fedavg", "fednova"; for LoRA "fedit", "ffa", "rolora", "fedsa", "fedsvd", "fedex", "flora",
    "flexlora" (what each promises: `llmchain_fed.updates.aggregation`); or your own `Collection` or `Rule`"""
    server_optimizer: dict[str, Any] | Code | None = None
    """moves the global weights along the mean update: `FedAdam()`, `DiLoCo()` …, in a file {class: FedAdam, lr: 0.01};
    None loads the mean itself. One of your own needs `state_dict` and `load_state_dict` to go on from a checkpoint with
    its memory"""
    codec: Word | None = None
    """what updates travel as: "bf16", "int8", "int4", "topk" or "topk:0.01", with error feedback; None sends the
    trained values bit by bit"""
    broadcast_codec: Word | None = None
    """likewise for changes of the global weights on their way to the participants"""
    transforms: Annotated[list[Code], Field(max_length=100)] | None = None
    """what happens to an update at its participant before it is sent, one after the other and before the codec:
    `UpdateTransform` objects of your own, for participants of this process"""
    gradient_step: Code | None = None
    """how a batch becomes a gradient at a participant of this process: a `GradientStep` of your own, which all of them
    share; None is the gradient of the mean loss"""
    batch_sampler: Code | None = None
    """how batches are drawn there: a `BatchSampler` of your own; None draws batches of similar length"""
    personal: Ditto | None = None
    """`Ditto(lam=…)`, in a file {lam: 0.1}: every participant also trains a personal adapter"""
    weighting: Weighting = "examples"
    """what an update counts by: "examples" (n_k), "tokens" or "equal"; counts are what a participant declares when it
    joins, nobody else can know them"""
    max_weight_share: Share | None = None
    """the largest share of a round that one update may weigh, such as 0.4; what is cut goes to the others in
    proportion, and where no more than 1/share take part all weigh the same. Up to 1/share updates are kept until all
    are in"""
    participants_per_round: Annotated[int | float | None, BeforeValidator(_sample)] = None
    """how many are sampled each round: a count, or a share as a float; None asks all"""
    quorum: MayDiffer[AtLeastOne] = 1
    """participants, and updates, without which a round fails; who is out meanwhile, and why, stands in `attendance`"""
    deadline: MayDiffer[Annotated[float, Field(gt=0, le=1e9)] | None] = None
    """seconds a round's training may take; who is later is dropped and recorded. None sets none, and yet nobody in
    another process is waited for longer than a day, which is also a site's `max_seconds` by default"""
    retries: MayDiffer[Count] = 0
    """how often a participant that could not be reached, or failed elsewhere, is asked again in a round"""
    evaluation: MayDiffer[Annotated[float | str | None, BeforeValidator(_held_out)]] = None
    """what held-out loss is measured on: a share of each participant's examples set apart (0.1); or examples, a mapping
    name → examples or one set for all, which no file stores"""
    samples: MayDiffer[Count | None] = None
    """held-out examples per participant whose answers are recorded before and after each round; None is 1 where
    participants are in this process, and 0 elsewhere"""
    keep_checkpoints: MayDiffer[AtLeastOne | None] = 3
    """how many of the newest are kept; None keeps all"""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """decides sampling, the order of data and dropout"""

    @field_validator("training")
    @classmethod
    def _by_name(cls, training: TrainingConfig) -> TrainingConfig:
        if training.to_plain() is None:
            msg = "an optimizer that is code cannot be written down. Name it: 'adamw', 'adam' or 'sgd'"
            raise ValueError(msg)
        return training

    @field_serializer("training")
    def _as_given(self, training: TrainingConfig) -> dict[str, Any] | None:
        return training.to_plain()

    def decisive(self) -> dict[str, Any]:
        """The options that a federation must go on with as it began, as JSON."""
        fields = FederationConfig.model_fields
        return self.model_dump(mode="json", include={n for n in fields if _MAY_DIFFER not in fields[n].metadata})


class FederationOptions(TypedDict, total=False):
    """What `FederatedAveraging` takes by name: the fields of `FederationConfig`, as code where they can be code."""

    training: TrainingConfig | None
    aggregation: str | Collection | Rule
    server_optimizer: ServerOptimizer | None
    codec: str | Codec | None
    broadcast_codec: str | Codec | None
    transforms: Sequence[UpdateTransform] | None
    gradient_step: GradientStep | None
    batch_sampler: BatchSampler | None
    personal: Ditto | None
    weighting: Weighting
    max_weight_share: float | None
    participants_per_round: float | None
    quorum: int
    deadline: float | None
    retries: int
    evaluation: float | Mapping[str, Examples] | Examples | None
    samples: int | None
    keep_checkpoints: int | None
    seed: int
    # short for options of `training`
    lr: float | None
    batch_size: int | None
    # beside what is written down
    runtime: Runtime | None
    callbacks: Sequence[Callback]
    progress: bool


_BESIDE: Mapping[str, Any] = {"lr": None, "batch_size": None, "runtime": None, "callbacks": (), "progress": True}


def signature_of(function: Any) -> inspect.Signature:
    """The signature of a function over `FederationOptions`, each of them by name and with its default."""
    plain = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "options")]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_BESIDE[name] if name in _BESIDE else FederationConfig.model_fields[name].default,
            annotation=annotation,
        )
        for name, annotation in FederationOptions.__annotations__.items()
    ]
    return inspect.Signature([*plain, *options])


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
            raise ConfigError(unknown_option(name, [*FederationOptions.__annotations__, "optimizer"]))
    plain: dict[str, Any] = {n: value for n, value in options.items() if n in FederationConfig.model_fields}
    plain["training"] = training
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
    for name in ("gradient_step", "batch_sampler"):
        if (given := options.get(name)) is not None:
            if not callable(given):
                msg = f"{name} is a function of your own, as docs/extending.md shows, got {given!r:.80}."
                raise ConfigError(msg)
            plain[name] = _code(getattr(given, "__qualname__", type(given).__qualname__))
    if not isinstance(plain.get("evaluation", 0), (numbers.Real, type(None))):
        plain["evaluation"] = EXAMPLES
    return FederationConfig(**plain)


def _code(name: str, options: str = "") -> str:
    return f"{CODE}{name[:200]}{options[: 2**14]} (give it again on resume)"


@dataclass(frozen=True)
class Settings:
    """What a server runs with: the options, and what they stand for."""

    config: FederationConfig
    rule: Rule
    layout: LoraLayout | None
    training: TrainingConfig
    codec: Codec | None
    broadcast_codec: Codec | None
    server_optimizer: ServerOptimizer | None
    transforms: tuple[UpdateTransform, ...]
    gradient_step: GradientStep | None
    batch_sampler: BatchSampler | None


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
