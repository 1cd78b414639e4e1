"""Tasks: what a server may ask of a participant, a small frozen type each. Every field has its type and its range.

Knows fields. Knows nothing of models, of the tensors that come with a task, or of what is done with either. How a task
becomes bytes stands in `messages`, what it is answered with in `answers`, what a participant does in
`client/operations.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, FederationError, LLMChainFedError
from llmchain_fed.federated.target import ContractData, Digest
from llmchain_fed.training.loss import Precision
from llmchain_fed.training.metrics import MAX_METRICS, MAX_NAME
from llmchain_fed.untrusted import Strict
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import Part

MAX_CURVE = 10_001
"""points of an adaptation curve"""
FederationId = Annotated[str, StringConstraints(pattern=r"^[!-~]+$", max_length=64)]
"""what tells a federation from others: printable ASCII, in messages and in checkpoints"""
MAX_AGGREGATION = 100
"""characters of a rule's name"""
REMEDY = "Hub and participants run the same version of llmchain-fed, whose hub sends nothing of the kind."
_VERSION = r"[0-9A-Za-z]{1,64}/[0-9]{1,12}/([0-9]{1,6}x[-+.0-9A-Za-z]{1,32})?"

_Round = Annotated[int, Field(ge=1, le=2**31)]
_Steps = Annotated[int, Field(ge=1, le=2**31)]
_Count = Annotated[int, Field(ge=0, le=2**31)]
_Rate = Annotated[float, Field(gt=0.0)]
_Seconds = Annotated[float, Field(gt=0.0)]


def _known(codec: str) -> str:
    try:
        make_codec(codec)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return codec


_Codec = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]{0,15}(:[-+.0-9e]{1,30})?$"), AfterValidator(_known)]
_Version = Annotated[str, StringConstraints(pattern=f"^{_VERSION}$")]
_Against = Annotated[str, StringConstraints(pattern=f"^({_VERSION}|start:[0-9a-f]{{1,64}})$")]
_Number = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}$")]
_RoundText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=untrusted.MAX_NAME)]
MAX_LABELS = 1000
_Label = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
MetricName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]
_Weights = Annotated[dict[_Label, _Rate], Field(max_length=MAX_LABELS)]
_MOST_TENSORS = 2**17  # names of them: a header has no room for more
_MOST_OPTIONS = 1000  # of a group of an optimizer's, or what it keeps of one tensor
_Chosen = Annotated[list[_Name], Field(min_length=1, max_length=_MOST_TENSORS, fail_fast=True)]
_Options = Annotated[dict[_Name, Any], Field(max_length=_MOST_OPTIONS)]


class Task(Strict):
    """What a server asks of a participant. It travels as JSON; what comes with tensors is a `TensorTask`."""

    operation: ClassVar[str]
    """its name: in messages, in a site's policy, in its audit file"""
    max_message: ClassVar[int] = 2**16
    """bytes that its JSON may have"""
    counts_as_training: ClassVar[bool]
    """whether it is one of the trainings of which a site's policy allows so many (`max_rounds`)"""
    measured: ClassVar[int]
    """held-out losses that its answer tells, of which a site's policy allows so many (`max_evaluations`)"""

    def losses(self, *, held_out: bool) -> int:  # noqa: ARG002
        """The same of this task, at a participant that has held-out examples or none."""
        return self.measured

    @classmethod
    def of(cls, error: type[LLMChainFedError] = FederationError, /, **fields: Any) -> Self:
        """A task of these fields.

        Raises:
            FederationError: One is unknown, of another type or out of range; or another `error`.
        """
        return untrusted.checked(cls, fields, what=f"the {cls.operation} task", error=error)


class TensorTask(Task):
    """A task that comes with tensors."""


class StateTask(TensorTask):
    """A task on the global state, which comes with it or with what changed in it (`StateHeader`)."""

    round: _Round
    """counts from 1: the one that is under way, or the next one; those before it count, and no other"""
    base: Digest
    """fingerprint of the base weights"""
    seconds: _Seconds | None = None
    """after which nobody waits any more"""

    @property
    def index(self) -> int:
        """The round counted from 0, from which seeds, samplers and rules draw."""
        return self.round - 1


class StateHeader(Strict):
    """What the tensors of a message make of the global state: all of it, or what changed since a version."""

    version: _Version | None = None
    against: _Against | None = None
    coded: _Codec | None = None
    # who lacks more changes than these is refused once, and then sent everything
    coded_names: dict[_Number, Part | _Chosen] | None = Field(default=None, max_length=1000)
    appended: dict[_Name, Annotated[int, Field(ge=1, le=2**31)]] | None = Field(default=None, max_length=_MOST_TENSORS)

    @model_validator(mode="after")
    def _one_state(self) -> Self:
        if self.against is not None and self.version is None:
            _refuse("`against` is the former version of a state, and no `version` is given")
        if bool(self.coded) != bool(self.coded_names):
            _refuse("`coded` and `coded_names` go together")
        if (self.coded_names or self.appended) and self.against is None:
            _refuse("`coded_names` and `appended` change a state, and `against` names none")
        return self


# --- joining and leaving ----------------------------------------------------------------------------------------------


class TrainingOptions(Strict):
    """The options of `TrainingConfig` that can travel: no class, nothing that is called."""

    learning_rate: _Rate | None = None
    batch_size: int = Field(default=16, ge=1, le=2**24)
    micro_batch_size: int | None = Field(default=None, ge=1, le=2**24)
    gradient_checkpointing: bool = False
    epochs: int | None = Field(default=None, ge=1, le=2**31)
    max_steps: int | None = Field(default=None, ge=1, le=2**53)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0, le=2**53)] | Annotated[float, Field(ge=0.0, lt=1.0)] = 0
    lr_schedule_over: Literal["federation", "round"] = "federation"
    weight_decay: float | None = Field(default=None, ge=0.0)
    max_grad_norm: float | None = Field(default=None, gt=0.0)
    max_length: int | None = Field(default=None, ge=2, le=2**31)
    tolerance: float = Field(default=0.05, ge=0.0, le=1.0)
    proximal_mu: float = Field(default=0.0, ge=0.0)
    precision: Precision = "fp32"
    keep_optimizer: bool = False
    seed: int = 0
    loss: Literal["tokens", "labels"] = "tokens"
    labels: list[_Label] | None = Field(default=None, min_length=2, max_length=MAX_LABELS, fail_fast=True)
    class_weight: Literal["balanced"] | _Weights | None = Field(default=None)


class HelloTask(Task):
    """Who asks: on which contract, with which options, in which federation, by which rule."""

    operation = "hello"
    counts_as_training, measured = False, 0

    contract: ContractData
    training: TrainingOptions | None = None
    federation: FederationId
    aggregation: str | None = Field(default=None, min_length=1, max_length=MAX_AGGREGATION)


class StopTask(Task):
    """The federation is over."""

    operation = "stop"
    counts_as_training, measured = False, 0
    max_message = 64


# --- training ---------------------------------------------------------------------------------------------------------


class Pull(Strict):
    """Ditto's options, as they travel: a personal model is trained, too."""

    lam: float = Field(default=0.1, ge=0.0)
    max_steps: _Steps | None = None


class TrainTask(StateTask):
    """Train for an update."""

    operation = "train"
    counts_as_training, measured = True, 0

    rounds: _Round | None = None
    """how many the federation will have, over which a schedule of the learning rate runs; None: nobody knows"""
    trains: Part = "all"
    shares: Part = "all"
    codec: _Codec | None = None
    feedback: bool = False
    ditto: Pull | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.rounds is not None and self.rounds < self.round:
            _refuse(f"round {self.round} is none of the {self.rounds} `rounds` that are planned")
        if {self.trains, self.shares} == {"A", "B"}:
            _refuse(f"it shares {self.shares!r}, which it does not train")
        if self.feedback and self.codec is None:
            _refuse("`feedback` is what a `codec` leaves out, and none is given")
        return self


class PersonalizeTask(StateTask):
    """Train a personal model from the global one."""

    operation = "personalize"
    counts_as_training, measured = True, 1

    steps: _Steps
    lr: _Rate | None = None

    def losses(self, *, held_out: bool) -> int:
        """None where nothing is held out: a personal model is worth having all the same."""
        return self.measured * held_out


class CurveTask(StateTask):
    """Measure the held-out loss after so many steps of adaptation, each of these."""

    operation = "curve"
    counts_as_training, measured = True, 0

    steps: Annotated[list[_Count], Field(min_length=1, max_length=MAX_CURVE, fail_fast=True)]
    lr: _Rate | None = None

    def losses(self, *, held_out: bool) -> int:  # noqa: ARG002
        """One for each point."""
        return len(self.steps)

    @model_validator(mode="after")
    def _increases(self) -> Self:
        if self.steps != sorted(set(self.steps)):
            _refuse("the `steps` of a curve increase")
        return self


class TimeStepTask(StateTask):
    """Say how long an optimizer step takes."""

    operation = "time_step"
    counts_as_training, measured = True, 0


# --- measuring --------------------------------------------------------------------------------------------------------


class EvaluateTask(StateTask):
    """Measure the held-out loss and metrics, with answers to some examples."""

    operation = "evaluate"
    counts_as_training, measured = False, 1

    samples: int = Field(default=0, ge=0, le=10**9)
    answer_tokens: int | None = Field(default=None, ge=1, le=2**24)
    """that an answer has at most; by default as the chain has it"""
    metrics: list[MetricName] = Field(default_factory=list, max_length=MAX_METRICS, fail_fast=True)
    labels: list[_Label] | None = Field(default=None, min_length=2, max_length=MAX_LABELS, fail_fast=True)
    """with them predictions are the most probable of these"""


class SideBySideTask(StateTask):
    """Measure the held-out loss of the base, of the global model and of the personal one."""

    operation = "side_by_side"
    counts_as_training, measured = False, 1


# --- where a participant stands ---------------------------------------------------------------------------------------


class KeptOptimizer(Strict):
    """An optimizer's state beside its tensors."""

    values: dict[_Number, _Options] = Field(max_length=_MOST_TENSORS)
    param_groups: list[_Options] = Field(max_length=1000, fail_fast=True)


class ProgressData(Strict):
    """Where a participant stood after a round, beside its tensors."""

    next_step: int = Field(ge=0, le=2**53)
    optimizer: KeptOptimizer | None


class PersonalStateTask(TensorTask):
    """Say where you stand before a round, or stand where this says; an answer can be given back as it is."""

    operation = "personal_state"
    counts_as_training, measured = False, 0

    round: _Round | None = None
    progress: dict[_RoundText, ProgressData] | None = Field(default=None, min_length=1, max_length=1000)
    new_pass: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.new_pass and self.progress is None:
            _refuse("`new_pass` is said of a `progress`, and none is given")
        return self


def _refuse(why: str) -> None:
    raise ValueError(why)
