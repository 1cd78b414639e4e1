"""The options of a federation, each once: `FederationConfig`, and the types of those that have options of their own.

Knows what each option may be. Knows nothing of what does as they say (`settings` makes of them what a server runs
with). A new option is a field of `FederationConfig`, a line of `FederationOptions`, and its user: the constructor,
checkpoints, the federation's file and docs/options.md follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypedDict, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, field_serializer, field_validator

from llmchain_fed._config import FrozenConfig
from llmchain_fed.data.split import Split
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.metrics import MAX_METRICS, MAX_NAME
from llmchain_fed.training.names import meant_in_federation
from llmchain_fed.updates.aggregation import Weighting
from llmchain_fed.updates.aggregation.weight_share import Share

if TYPE_CHECKING:
    from llmchain_fed.data.examples import Examples
    from llmchain_fed.federated.callbacks import Callback
    from llmchain_fed.federated.runtime import Runtime
    from llmchain_fed.training.batch_sampler import BatchSampler
    from llmchain_fed.training.gradient_step import GradientStep
    from llmchain_fed.training.metrics import Function, Metric
    from llmchain_fed.updates.aggregation.base import Rule
    from llmchain_fed.updates.codecs.base import Codec
    from llmchain_fed.updates.collection import Collection
    from llmchain_fed.updates.server_optimizers import ServerOptimizer
    from llmchain_fed.updates.transforms.base import UpdateTransform

CODE, EXAMPLES = "code: ", "examples: given beside the options (give them again on resume)"
AGAIN = " (give it again on resume)"  # at the end of what is code
_HELD_OUT = {"anyOf": [{"type": kind} for kind in ("number", "string", "object", "null")]}
_MAY_DIFFER: Final = object()
_T = TypeVar("_T")
MayDiffer = Annotated[_T, _MAY_DIFFER]
"""an option that may be given otherwise when a federation goes on; every other one decides what is learnt"""
Count = Annotated[int, Field(ge=0, le=10**9)]
AtLeastOne = Annotated[int, Field(ge=1, le=10**9)]
Code = Annotated[str, Field(max_length=2**16, pattern=f"^{CODE}")]
Word = Annotated[str, Field(min_length=1, max_length=400)]


class Ditto(FrozenConfig):
    """Every participant also trains a personal model, which is pulled to the global one (arXiv 2012.04221).

    The personal model minimises its own loss + λ/2·‖v − w‖², with w the global weights of the round; the global model
    is trained as without it. λ = 0 is local training alone. With SGD a step needs lr·λ < 2. All of the personal adapter
    is trained, also under `ffa` and `rolora`, which train one factor of the global one.

    >>> Ditto(lam=0.5)
    Ditto(lam=0.5)
    """

    lam: float = Field(default=0.1, ge=0.0, le=1e6, allow_inf_nan=False)
    """λ; 0.1 is NVFlare's default"""
    max_steps: int | None = Field(default=None, ge=1)
    """optimizer steps of the personal model a round; as many as the global training's by default"""


def _is_share(value: object) -> bool:
    return type(value) is float and 0 < value <= 1


def _sample(value: Any) -> Any:
    if value is None or _is_share(value) or (type(value) is int and 1 <= value < 2**63):
        return value
    msg = "a share in (0, 1] or a count of at least 1 is wanted"
    raise ValueError(msg)


def _held_out(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = Split.from_plain(value)
    if value is None or isinstance(value, Split) or (isinstance(value, str) and value.startswith((EXAMPLES, CODE))):
        return value
    if _is_share(value) and value < 1:
        return value
    msg = "as a share it lies between 0 and 1"
    raise ValueError(msg)


def _a_metric(value: Any) -> Any:
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME + len(CODE + AGAIN):
        return value
    if isinstance(value, dict) and value.keys() == {"name", "maximize"}:
        name, maximize = value["name"], value["maximize"]
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME and isinstance(maximize, bool):
            return value
    msg = "a name is wanted, or {name: …, maximize: true}"
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
    None loads the mean itself. One of your own needs `settings`, `state_dict` and `load_state_dict` to go on from a
    checkpoint with its memory"""
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
    evaluation: MayDiffer[Annotated[Any, BeforeValidator(_held_out), WithJsonSchema(_HELD_OUT)]] = None
    """what held-out loss is measured on: a share of each participant's examples set apart (0.1), `Split(…)`, which says
    by which group or time; or examples, a mapping name → examples or one set for all, which no file stores"""
    columns: MayDiffer[Annotated[dict[Word, Word | int], Field(min_length=1, max_length=64)] | None] = None
    """variable of the prompt, or "completion" → column of the examples, where tables call them otherwise; of the
    participants here that have no `columns` of their own, and of `evaluation` as examples"""
    samples: MayDiffer[Count | None] = None
    """held-out examples per participant whose answers are recorded before and after each round; None is 1 where
    participants are in this process, and 0 elsewhere"""
    answer_tokens: MayDiffer[AtLeastOne | None] = None
    """tokens that an answer to a held-out example has at most, for samples and metrics; None is as many as the chain's
    own `max_new_tokens`"""
    metrics: MayDiffer[
        Annotated[list[Annotated[Any, BeforeValidator(_a_metric)]], Field(max_length=MAX_METRICS)] | None
    ] = None
    """what held-out answers are measured by, beside the loss: "accuracy", "f1", "auc", "exact_match", "chrf",
    "rouge_l"; functions of your own, or `Metric(fn, maximize=True)`, for participants of this process; and names that
    sites register, in a file also as {name: sens, maximize: true}"""
    labels: MayDiffer[Annotated[list[Word], Field(min_length=2, max_length=1000)] | None] = None
    """with them predictions are the most probable of these texts, as `classify` says; None is `training.labels`, and
    without these the chain's answers"""
    keep_checkpoints: MayDiffer[AtLeastOne | None] = 3
    """how many of the newest are kept; None keeps all"""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """decides sampling, the order of data and dropout"""

    @classmethod
    def meant(cls, name: str) -> str | None:
        """Where an option is that transformers, TRL or Flower have by this name."""
        return meant_in_federation(name)

    @field_validator("training")
    @classmethod
    def _by_name(cls, training: TrainingConfig) -> TrainingConfig:
        if training.to_plain() is None:
            msg = "an optimizer that is code cannot be written down. Name it: 'adamw', 'adam' or 'sgd'"
            raise ValueError(msg)
        return training

    @field_serializer("evaluation")
    def _split_as_given(self, evaluation: Any) -> Any:
        return evaluation.to_plain() if isinstance(evaluation, Split) else evaluation

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
    evaluation: float | Split | Mapping[str, Examples] | Examples | None
    columns: Mapping[str, str | int] | None
    samples: int | None
    answer_tokens: int | None
    metrics: Sequence[str | Function | Metric] | None
    labels: Sequence[str] | None
    keep_checkpoints: int | None
    seed: int
    # short for options of `training`
    lr: float | None
    batch_size: int | None
    # beside what is written down
    llm: Any
    runtime: Runtime | None
    callbacks: Sequence[Callback]
    progress: bool
