"""Messages: what a hub may ask of a participant. Every field of every operation has its type and its range.

Knows headers. Knows nothing of models, of the tensors that come with a header, or of what is done with either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.federated.target import ContractData, Digest
from llmchain_fed.training.loss import Precision
from llmchain_fed.untrusted import Strict
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import Part

MAX_HELLO = 2**16
"""bytes: a contract, the options of training and an id"""
MAX_CURVE = 10_001
"""points of an adaptation curve"""
FederationId = Annotated[str, StringConstraints(pattern=r"^[!-~]+$", max_length=64)]
"""what tells a federation from others: printable ASCII, in messages and in checkpoints"""
MAX_AGGREGATION = 100
"""characters of a rule's name"""
_REMEDY = "Hub and participants run the same version of llmchain-fed, whose hub sends nothing of the kind."
_VERSION = r"[0-9A-Za-z]{1,64}/[0-9]{1,12}/([0-9]{1,6}x[-+.0-9A-Za-z]{1,32})?"

_Round = Annotated[int, Field(ge=0, le=2**31)]
_Steps = Annotated[int, Field(ge=1, le=2**31)]
_Rate = Annotated[float, Field(gt=0.0)]
_Seconds = Annotated[float, Field(gt=0.0)]


def _known(codec: str) -> str:
    try:
        make_codec(codec)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return codec


def _only_true(asked: bool) -> bool:  # noqa: FBT001 (pydantic's)
    if not asked:
        _refuse("it is said, as true, or not at all")
    return asked


_Codec = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]{0,15}(:[-+.0-9e]{1,30})?$"), AfterValidator(_known)]
_Version = Annotated[str, StringConstraints(pattern=f"^{_VERSION}$")]
_Against = Annotated[str, StringConstraints(pattern=f"^({_VERSION}|start:[0-9a-f]{{1,64}})$")]
_Number = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}$")]
_RoundText = Annotated[str, StringConstraints(pattern=r"^(-1|[0-9]{1,10})$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=untrusted.MAX_NAME)]
_MOST_TENSORS = 2**17  # names of them: a header has no room for more
_MOST_OPTIONS = 1000  # of a group of an optimizer's, or what it keeps of one tensor
_Chosen = Annotated[list[_Name], Field(min_length=1, max_length=_MOST_TENSORS, fail_fast=True)]
_Options = Annotated[dict[_Name, Any], Field(max_length=_MOST_OPTIONS)]


class TrainingOptions(Strict):
    """The options of `TrainingConfig` that can travel: no class, nothing that is called."""

    learning_rate: _Rate | None = None
    batch_size: int = Field(default=16, ge=1, le=2**24)
    micro_batch_size: int | None = Field(default=None, ge=1, le=2**24)
    epochs: int | None = Field(default=None, ge=1, le=2**31)
    max_steps: int | None = Field(default=None, ge=1, le=2**53)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float | None = Field(default=None, ge=0.0)
    max_grad_norm: float | None = Field(default=None, gt=0.0)
    max_length: int | None = Field(default=None, ge=2, le=2**31)
    tolerance: float = Field(default=0.05, ge=0.0, le=1.0)
    proximal_mu: float = Field(default=0.0, ge=0.0)
    precision: Precision = "fp32"
    keep_optimizer: bool = False
    seed: int = 0


class HelloMessage(Strict):
    """Who asks: on which contract, with which options, in which federation, by which rule."""

    contract: ContractData
    training: TrainingOptions | None = None
    federation: FederationId
    aggregation: str | None = Field(default=None, min_length=1, max_length=MAX_AGGREGATION)


class _OnState(Strict):
    """What is said of the global state that the message brings, or changes."""

    round: _Round
    base: Digest
    seconds: _Seconds | None = None
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


class _Pull(Strict):
    lam: float = Field(default=0.1, ge=0.0)
    max_steps: _Steps | None = None


class _FineTuning(Strict):
    steps: _Steps
    lr: _Rate | None = None


class TrainMessage(_OnState):
    """Training: for an update, for a personal model, for a curve of losses, or to see how long a step takes."""

    kind: Literal["task"] = "task"
    trains: Part = "all"
    shares: Part = "all"
    codec: _Codec | None = None
    feedback: bool = False
    ditto: _Pull | None = None
    personal: _FineTuning | None = None
    curve: Annotated[list[_Round], Field(min_length=1, max_length=MAX_CURVE, fail_fast=True)] | None = None
    lr: _Rate | None = None
    time_step: Annotated[bool, AfterValidator(_only_true)] | None = None

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        others = [n for n in ("personal", "curve") if getattr(self, n) is not None] + ["time_step"] * (
            self.time_step is True
        )
        if len(others) > 1:
            _refuse(f"{' and '.join(f'`{n}`' for n in others)} are one message each")
        of_updates = {"trains", "shares", "codec", "feedback", "ditto"} & self.model_fields_set
        if others and of_updates:
            _refuse(f"`{min(of_updates)}` is said of an update, and `{others[0]}` ends in none")
        if self.lr is not None and self.curve is None:
            _refuse("`lr` is the learning rate of a `curve`")
        if self.curve is not None and self.curve != sorted(set(self.curve)):
            _refuse("the steps of a `curve` increase")
        if {self.trains, self.shares} == {"A", "B"}:
            _refuse(f"it shares {self.shares!r}, which it does not train")
        if self.feedback and self.codec is None:
            _refuse("`feedback` is what a `codec` leaves out, and none is given")
        return self


class EvaluateMessage(_OnState):
    """A held-out loss, with answers to some examples; or losses side by side."""

    kind: Literal["evaluate", "task"] = "evaluate"
    samples: int = Field(default=0, ge=0, le=10**9)
    sample_tokens: int | None = Field(default=None, ge=1, le=2**20)
    side_by_side: bool = False

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        if self.samples and self.sample_tokens is None:
            _refuse("`samples` goes with `sample_tokens`")
        if self.side_by_side and self.samples:
            _refuse("`side_by_side` tells losses alone, without `samples`")
        return self


class _Optimizer(Strict):
    values: dict[_Number, _Options] = Field(max_length=_MOST_TENSORS)
    param_groups: list[_Options] = Field(max_length=1000, fail_fast=True)


class _Place(Strict):
    next_step: int = Field(ge=0, le=2**53)
    optimizer: _Optimizer | None


class StateMessage(Strict):
    """Where a participant stands: asked for, or given back."""

    kind: Literal["personal_state"] = "personal_state"
    round: _Round | None = None
    progress: dict[_RoundText, _Place] | None = Field(default=None, min_length=1, max_length=1000)
    new_pass: bool = False

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        if self.new_pass and self.progress is None:
            _refuse("`new_pass` is said of a `progress`, and none is given")
        return self


class _StopMessage(Strict):
    pass


_KINDS: Mapping[str, type[Strict]] = {
    "train": TrainMessage,
    "evaluate": EvaluateMessage,
    "personal_state": StateMessage,
}


def _refuse(why: str) -> None:
    raise ValueError(why)


def checked_header(op: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """The header of `train`, `evaluate` or `personal_state`, without the fields that say nothing (null).

    Raises:
        FederationError: A field that is unknown, missing, of another type or out of range; or a combination of fields
            that makes no sense.
    """
    untrusted.checked(_KINDS[op], dict(header), what=f"the {op} message", error=FederationError, remedy=_REMEDY)
    return {name: value for name, value in header.items() if value is not None}


def read_hello(payload: bytes) -> dict[str, Any]:
    """A hello's JSON, of which nothing is checked yet: `check_contract` first, which says that versions differ.

    Raises:
        FederationError: It is no JSON object.
    """
    return untrusted.read_json(payload, most=MAX_HELLO, what="the hello", error=FederationError)


def checked_hello(asked: Mapping[str, Any]) -> HelloMessage:
    """The hello's fields.

    Raises:
        FederationError: See `checked_header`.
    """
    return untrusted.checked(HelloMessage, dict(asked), what="the hello", error=FederationError, remedy=_REMEDY)


def check_stop(payload: bytes) -> None:
    """Makes sure that a stop says nothing else.

    Raises:
        FederationError: It does.
    """
    found = untrusted.read_json(payload, most=64, what="the stop message", error=FederationError)
    untrusted.checked(_StopMessage, found, what="the stop message", error=FederationError, remedy=_REMEDY)
