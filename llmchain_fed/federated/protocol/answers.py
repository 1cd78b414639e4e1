"""Answers: what a participant says to a hub beside its update, a small frozen type each, read within bounds.

Knows fields, their types and ranges. Knows nothing of what is asked, or of what is done with an answer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from llmchain_fed.data.report import DataReport
from llmchain_fed.federated.client.data import Overlap
from llmchain_fed.federated.participant import Alpha, Rank
from llmchain_fed.federated.protocol import finiteness
from llmchain_fed.federated.protocol.tasks import MAX_CURVE, MAX_LABELS, MetricName
from llmchain_fed.federated.target import ContractData, Digest
from llmchain_fed.training.metrics import LARGEST, MAX_METRICS, MAX_VALUES
from llmchain_fed.untrusted import Strict, shown
from llmchain_fed.updates.update import MAX_EXAMPLES, MAX_SECONDS

_Counts = Annotated[dict[str, Annotated[int, Field(ge=0, le=MAX_EXAMPLES)]], Field(max_length=64)]
"""a `DataReport`"""
_Count = Annotated[int, Field(ge=1, le=MAX_EXAMPLES)]
_PER_SAMPLE = 2**18  # bytes of a held-out example with its answer
_PER_METRIC = 2**15  # bytes of its values and of an error
_MOST_SAMPLES = 100_000


class TaskAnswer(Strict):
    """What a participant answers, as JSON."""

    max_bytes: ClassVar[int] = 2**20


class Introduction(TaskAnswer):
    """What a participant says of itself when it joins: counts and digests."""

    max_bytes = 2**16  # an honest one has some two thousand

    participant: str
    contract: ContractData
    held_out: bool = False
    num_examples: _Count | None = None
    """usable examples; None where only training will tell"""
    num_tokens: _Count | None = None
    """completion tokens"""
    report: _Counts | None = None
    held_out_examples: _Count | None = None
    held_out_tokens: _Count | None = None
    """completion tokens of what it holds out, by which its held-out loss counts; None where only evaluating tells"""
    held_out_report: _Counts | None = None
    """what became of what it holds out"""
    weights_hash: Digest | None = None
    """hash of the weights it has before it is sent any"""
    rank: Rank | None = None
    """its own LoRA rank, if it has one"""
    alpha: Alpha | None = None
    options: Digest | None = None
    """digest of the training options it follows, its own included"""
    overlap: list[int] | None = Field(default=None, max_length=3, fail_fast=True)

    @property
    def data_report(self) -> DataReport | None:
        """What became of its examples."""
        return DataReport(**self.report) if self.report is not None else None

    @property
    def held_out_notes(self) -> list[str]:
        """What a record should say of what it holds out and is not measured on."""
        counts = self.held_out_report
        return DataReport(**counts).notes("held-out examples") if counts is not None else []

    @property
    def overlapping(self) -> Overlap | None:
        """What of its held-out examples it trains on."""
        return Overlap.read(self.overlap, MAX_EXAMPLES) if self.overlap is not None else None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What it counts must be where its counts come from."""
        self._is_supported(self.report, "num_examples", "num_tokens")
        self._is_supported(self.held_out_report, "held_out_examples", "held_out_tokens")
        if self.alpha is not None and self.rank is None:
            _refuse("it has an alpha without a rank of its own: give it both")
        if not self.held_out and (self.held_out_examples or self.held_out_tokens):
            _refuse("it counts held-out examples and says that it has none")
        if self.num_examples is not None and self.num_tokens is not None and self.num_tokens < self.num_examples:
            _refuse(f"it counts fewer completion tokens ({self.num_tokens:,}) than examples ({self.num_examples:,})")
        try:
            _ = self.overlapping
        except ValueError:
            _refuse(f"its overlap is {shown(self.overlap)}")
        return self

    def _is_supported(self, counts: dict[str, int] | None, examples: str, tokens: str) -> None:
        if counts is None:
            return
        if strange := sorted(counts.keys() - DataReport().counts().keys()):
            _refuse(f"its report counts {shown(strange[0])!r}")
        report = DataReport(**counts)
        for name, supported in ((examples, report.used), (tokens, report.completion_tokens)):
            if (count := getattr(self, name)) != supported:
                _refuse(f"{name} is {count}, its data report supports {supported:,}")


# --- held-out losses --------------------------------------------------------------------------------------------------


class SampleAnswer(Strict):
    """A held-out example and what the chain made of it."""

    prompt: str
    reference: str
    answer: str


class MetricAnswer(Strict):
    """A metric's values, and why there are none, or not all."""

    name: MetricName
    values: dict[MetricName, Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]] = Field(
        default_factory=dict, max_length=MAX_VALUES
    )
    error: str | None = None


class EvaluateAnswer(TaskAnswer):
    """A held-out loss, metrics and samples; `finiteness.read` reads the loss."""

    loss: float | None
    not_finite: str | None = None
    tokens: int = Field(ge=1, le=MAX_EXAMPLES)
    examples: int | None = Field(default=None, ge=1, le=MAX_EXAMPLES)
    collapsed: int | None = Field(default=None, ge=0, lt=MAX_LABELS)
    """which of the federation's labels all its held-out examples are taken for, though not all have it"""
    metrics: list[MetricAnswer] = Field(default_factory=list, max_length=MAX_METRICS, fail_fast=True)
    measured: int | None = Field(default=None, ge=1, le=MAX_EXAMPLES)
    """examples that the metrics are over"""
    samples: list[SampleAnswer] = Field(default_factory=list, max_length=_MOST_SAMPLES, fail_fast=True)
    samples_error: str | None = None

    @classmethod
    def longest(cls, samples: int, metrics: int = 0) -> int:
        """Bytes that one with so many samples and metrics may have."""
        return 2**16 + _PER_SAMPLE * samples + _PER_METRIC * metrics


def _loss(found: Any) -> float:
    if (number := finiteness.number(found)) is None:
        msg = "no loss"
        raise ValueError(msg)
    return number


# a loss of a model that has diverged is NaN, and shown as that
Loss = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_loss)]


class SideBySideAnswer(TaskAnswer):
    """Held-out losses side by side, of what there is."""

    base: Loss = 0.0
    global_: Loss = Field(default=0.0, alias="global")
    personal: Loss = 0.0

    def by_kind(self) -> dict[str, float]:
        """Those that were sent."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class PersonalizeAnswer(TaskAnswer):
    """What fine-tuning for one participant did."""

    train_loss: Loss
    steps: int = Field(default=0, ge=0)
    seconds: float = Field(ge=0, le=MAX_SECONDS)
    losses: SideBySideAnswer = SideBySideAnswer()


class CurvePoint(Strict):
    """A held-out loss after so many steps."""

    steps: int = Field(ge=0)
    loss: Loss


class CurveAnswer(TaskAnswer):
    """Held-out losses over steps of adaptation."""

    curve: list[CurvePoint] = Field(max_length=MAX_CURVE, fail_fast=True)


class TimeStepAnswer(TaskAnswer):
    """What a participant says of its steps."""

    max_bytes = 2**12

    seconds: float = Field(ge=0, le=MAX_SECONDS)
    """of one"""
    steps: int = Field(ge=0, le=MAX_EXAMPLES)
    """a round"""


class Nothing(TaskAnswer):
    """The answer to a stop."""


def _refuse(why: str) -> None:
    raise ValueError(why)
