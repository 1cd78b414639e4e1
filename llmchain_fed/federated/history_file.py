"""A history that is read back: which fields a record has, of which type and in which range.

Knows plain data, and how many rounds a file of it has. Knows nothing of records as objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from llmchain_fed.errors import ConfigError, LLMChainFedError
from llmchain_fed.training.metrics import LARGEST, MAX_METRICS, MAX_NAME, MAX_VALUES
from llmchain_fed.untrusted import Strict, checked, printable, read_file, read_json, shown

_LONGEST_TEXT = 2**20  # characters
_LONGEST_NAME = 2**16
_LARGEST = 2**30  # bytes of a file
MOST_PARTICIPANTS = 100_000
_MOST = 10_000_000  # rounds of a history, or samples of a round: no file has room for more


def _escaped(value: Any) -> Any:
    """What a terminal or a file would choke on is spelled out; whoever wrote a record did the same."""
    return printable(value, _LONGEST_TEXT) if isinstance(value, str) else value


def _measured(value: Any) -> Any:
    """A number that is not finite was not measured, as in `History.to_json`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Text = Annotated[str, BeforeValidator(_escaped)]
_MOST_TEXTS = 100_000
Texts = Annotated[list[Text], FailFast(), Field(max_length=_MOST_TEXTS)]
Name = Annotated[str, Field(max_length=_LONGEST_NAME)]
"""a participant's, which may contain anything that UTF-8 can"""
Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float | None, BeforeValidator(_measured)]
_Size = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_measured)]
_Seconds = Annotated[float, Field(ge=0)]


def _known(value: Any) -> Any:
    return {k: v for k, v in value.items() if _measured(v) is not None} if isinstance(value, dict) else value


_Metrics = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=MAX_NAME)], Annotated[float, Field(ge=-LARGEST, le=LARGEST)]],
    Field(max_length=MAX_METRICS * MAX_VALUES),
    BeforeValidator(_known),
]


class ParticipantData(Strict):
    """A `ParticipantRecord`; what is left out is as by default."""

    status: Literal["trained", "idle", "late", "absent", "failed", "refused"] = "absent"
    reason: Text | None = None
    train_loss: _Number = None
    held_out_before: _Number = None
    held_out_after: _Number = None
    examples: Count | None = None
    tokens: Count | None = None
    steps: Count | None = None
    seconds: _Size = None
    update_norm: _Size = None
    cosine_to_mean: _Number = None
    bytes_up: Count = 0
    bytes_down: Count = 0
    evaluation_bytes: Count = 0
    metrics: _Metrics = Field(default_factory=dict)
    metrics_before: _Metrics = Field(default_factory=dict)
    notes: Texts = Field(default_factory=list)


class SampleData(Strict):
    """A `Sample`."""

    participant: Name
    prompt: Text
    reference: Text
    before: Text | None = None
    after: Text | None = None


class RoundData(Strict):
    """A `RoundRecord`, its participants as they were found."""

    round: Count
    participants: Annotated[dict[Name, Any], Field(max_length=MOST_PARTICIPANTS)]
    held_out_before: _Number = None
    held_out_after: _Number = None
    metrics: _Metrics = Field(default_factory=dict)
    metrics_before: _Metrics = Field(default_factory=dict)
    update_norm: _Size = None
    aggregation_gap: _Size = None
    seconds: _Seconds = 0.0
    training_seconds: _Seconds = 0.0
    evaluation_seconds: _Seconds = 0.0
    weights_version: Text = ""
    samples: Annotated[list[SampleData], FailFast(), Field(max_length=_MOST)] = Field(default_factory=list)
    notes: Texts = Field(default_factory=list)
    members_changed: bool = False
    loss: Literal["tokens", "labels"] = "tokens"


_Word = Annotated[str, Field(max_length=1000), BeforeValidator(_escaped)]
_Few = Field(max_length=1000)
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Plain = bool | _Integer | Annotated[float, Field(allow_inf_nan=False)] | _Word | None


class TrainedModelData(Strict):
    """What is trained, for `AboutData`."""

    name: _Word = ""
    kind: _Word = ""
    parameters: Count = 0
    trained: Count = 0
    """of the parameters"""
    tensors: Count = 0
    """that are trained"""
    adapter: _Word | None = None
    fingerprint: _Word = ""
    device: _Word = ""


class AboutData(Strict):
    """What `about_of` says of a federation beside its rounds; what is left out is not known."""

    began: _Word | None = None
    """date and time with its zone, ISO 8601"""
    ended: _Word | None = None
    """the same of the latest round"""
    versions: Annotated[dict[_Word, _Word], _Few] = Field(default_factory=dict)
    model: TrainedModelData | None = None
    options: Annotated[dict[_Word, _Plain], _Few] = Field(default_factory=dict)
    shares: Literal["all", "A", "B", "A and B in turn"] | None = None
    """which of the trained tensors leave a participant"""
    simulated: bool | None = None
    """whether all participants ran in the hub's process"""
    data: Annotated[
        dict[Name, Annotated[dict[_Word, Count], Field(max_length=64)]], Field(max_length=MOST_PARTICIPANTS)
    ] = Field(default_factory=dict)
    """participant → counts of its examples, as in a `DataReport`, and `held_out`"""


class HistoryData(Strict):
    """A `History`, its rounds as they were found."""

    rounds: Annotated[list[Any], FailFast(), Field(max_length=_MOST)]
    stopped_early: Text | None = None
    about: AboutData = Field(default_factory=AboutData)
    monitor: Text | None = None
    best: Count | None = None
    kept: Count | None = None


def checked_rounds(
    data: HistoryData, *, what: str, error: type[LLMChainFedError], remedy: str = ""
) -> Iterator[tuple[RoundData, dict[str, ParticipantData]]]:
    """Each round and its participants, until one is found that is none; for that, see `History.from_dict`."""
    for number, found in enumerate(data.rounds):
        where = f"{what}, `rounds.{number}`,"
        record = checked(RoundData, found, what=where, error=error, remedy=remedy)
        people = {
            name: checked(
                ParticipantData, each, what=f"{where} `participants.{shown(name)}`,", error=error, remedy=remedy
            )
            for name, each in record.participants.items()
        }
        yield record, people


def rounds_in(path: Path) -> int:
    """How many rounds the history in a file has; 0 where there is none, or something else.

    Raises:
        ConfigError: It is so large that it is not looked at.
    """
    if not path.is_file():
        return 0
    data = read_file(path, most=_LARGEST, what="the history", error=ConfigError)
    try:
        found = read_json(data, most=_LARGEST, what="the history", error=ConfigError)
    except ConfigError:
        return 0
    rounds = found.get("rounds")
    return len(rounds) if isinstance(rounds, list) else 0
