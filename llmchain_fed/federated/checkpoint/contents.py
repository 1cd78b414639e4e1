"""Contents: what a federation's checkpoint says beside its tensors, every field of its type and in its range.

Knows the options that a federation writes. Knows nothing of files, tensors or how a hub goes on. Whoever can write a
checkpoint can write digests as well, so nothing in it is believed: an option that no federation writes is refused, a
class is one of a table, and no path is read from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import FailFast, Field

from llmchain_fed.errors import CheckpointError, ConfigError
from llmchain_fed.federated.checkpoint.files import MANIFEST, Checkpoint
from llmchain_fed.federated.client.personalization import Ditto
from llmchain_fed.federated.history import History
from llmchain_fed.federated.history_data import MOST_PARTICIPANTS, Count, Name, Texts
from llmchain_fed.federated.participant import Alpha, Rank
from llmchain_fed.federated.protocol.tasks import FederationId
from llmchain_fed.federated.target import ContractData
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import Strict, checked, shown
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation.weight_share import Share
from llmchain_fed.updates.codecs import make_codec

PartT = TypeVar("PartT", bound=Strict)
_Word = Annotated[str, Field(max_length=200)]
_Code = Annotated[str, Field(max_length=2**16)]  # a description of somebody's own code: it is shown and compared
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Numbers = Annotated[dict[Name, Any], Field(max_length=1_000_000)]


class Decisive(Strict):
    """The options that decide how a federation goes on; what is code stands there by its name."""

    aggregation: _Code
    training: Annotated[dict[_Word, Any], Field(max_length=len(TrainingConfig.model_fields))]
    weighting: Literal["examples", "tokens", "equal"]
    max_weight_share: Share | None = None
    codec: _Word | None
    transforms: Annotated[list[_Word], FailFast(), Field(max_length=100)]
    broadcast_codec: _Word | None
    server_optimizer: _Numbers | _Code | None
    personal: Annotated[dict[_Word, Any], Field(max_length=len(Ditto.model_fields))] | None
    participants_per_round: _Positive | Annotated[float, Field(gt=0, le=1)] | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Options(Strict):
    """The other options of a federation that are written; no other argument of it can stand in a checkpoint."""

    samples: Count
    quorum: _Positive
    deadline: Annotated[float, Field(gt=0)] | None
    retries: Count
    evaluation: Annotated[float, Field(gt=0, lt=1)] | None
    keep_checkpoints: _Positive | None
    evaluated: bool
    """whether held-out examples were given"""


class Holding(Strict):
    """What a participant said it holds."""

    examples: _Positive | None
    tokens: _Positive | None
    rank: Rank | None
    alpha: Alpha | None
    options: _Word | None


class _NamedOptimizer(Strict):
    """A participants' optimizer that is code."""

    class_: _Code = Field(alias="class")
    options: _Code


class _Participants(Strict):
    names: Annotated[list[Name], FailFast(), Field(max_length=MOST_PARTICIPANTS)]


class _About(Strict):
    """All that a manifest says beside names of files, its parts as they were found."""

    contract: Any
    decisive: Any
    options: Any
    participants: Annotated[list[Name], FailFast(), Field(max_length=MOST_PARTICIPANTS)]
    federation: FederationId
    holdings: Annotated[dict[Name, Any], Field(max_length=MOST_PARTICIPANTS)]
    history: Any
    patience: Annotated[list[float], FailFast(), Field(max_length=2)]
    round_notes: Texts
    members_changed: bool
    server_optimizer: _Numbers


@dataclass(frozen=True)
class Contents:
    """A checkpoint that makes sense, whether or not it fits a model."""

    found: Checkpoint
    contract: Mapping[str, str]
    decisive: Mapping[str, Any]
    options: Mapping[str, Any]
    participants: list[str]
    federation: str
    holdings: Mapping[str, Mapping[str, Any]]
    history: History
    patience: list[float]
    round_notes: list[str]
    members_changed: bool
    server_optimizer: Mapping[str, Any]
    """what is JSON of its memory"""

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.found.round

    @classmethod
    def of(cls, found: Checkpoint) -> Contents:
        """The contents of a checkpoint's files.

        Raises:
            CheckpointError: A field is unknown or missing, of another type or out of range; which, and what to do.
        """
        about = _part(found, _About, found.about, "")
        _part(found, ContractData, about.contract, "contract")
        decisive = _part(found, Decisive, about.decisive, "decisive")
        _part(found, Options, about.options, "options")
        for name, holding in about.holdings.items():
            _part(found, Holding, holding, f"holdings.{shown(name)}")
        with _said_of(found, "history"):
            what = f"{found.where}: {MANIFEST}, `about.history`,"
            history = History.from_dict(about.history, what=what, error=CheckpointError, remedy=found.remedy)
        _check(found, about, history)
        _check_options(found, decisive)
        return cls(
            found,
            about.contract,
            about.decisive,
            about.options,
            about.participants,
            about.federation,
            about.holdings,
            history,
            found.about["patience"],
            about.round_notes,
            about.members_changed,
            about.server_optimizer,
        )


def identity(about: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The options that decide how a federation goes on, and who takes part, of a checkpoint of which no more is read.

    Raises:
        CheckpointError: A field is unknown or missing, of another type or out of range.
    """
    checked(Decisive, about.get("decisive"), what=f"{MANIFEST}, `about.decisive`,", error=CheckpointError)
    names = {"names": about.get("participants")}
    found = checked(_Participants, names, what=f"{MANIFEST}, `about.participants`,", error=CheckpointError)
    return about["decisive"], found.names


def _part(found: Checkpoint, model: type[PartT], part: Any, name: str) -> PartT:
    what = f"{found.where}: {MANIFEST}, `about{'.' if name else ''}{name}`,"
    return checked(model, part, what=what, error=CheckpointError, remedy=found.remedy)


def _check(found: Checkpoint, about: _About, history: History) -> None:
    """What fields must be to each other."""
    wrong = None
    if [record.round for record in history] != list(range(1, found.round + 1)):
        wrong = f"`about.history` is not one of rounds 1 to {found.round}"
    elif len(set(about.participants)) < len(about.participants):
        wrong = "`about.participants` names somebody twice"
    elif len(about.patience) == 1 or any(type(count) is not int or count < 0 for count in found.about["patience"][1:]):
        wrong = f"`about.patience` is no loss with a count of rounds: {shown(about.patience)}"
    elif strangers := [*(about.holdings.keys() | found.participants.keys()) - set(about.participants)][:1]:
        wrong = f"{shown(strangers[0])}, of whom it holds something, is not among `about.participants`"
    if wrong is not None:
        msg = f"{MANIFEST} makes no sense: {wrong}"
        raise found.unusable(msg)


def _check_options(found: Checkpoint, decisive: Decisive) -> None:
    """What has a reader of its own is read by it."""
    training = dict(decisive.training)
    if isinstance(training.get("optimizer"), dict):
        _part(found, _NamedOptimizer, training.pop("optimizer"), "decisive.training.optimizer")
    for name, value in training.items():
        with _said_of(found, f"decisive.training.{shown(name)}"):
            if isinstance(value, (dict, list)) or name not in TrainingConfig.model_fields:
                msg = f"{shown(value)} is no option of a TrainingConfig"
                raise ConfigError(msg)
    with _said_of(found, "decisive.training"):
        TrainingConfig(**training)
    with _said_of(found, "decisive.codec"):
        make_codec(decisive.codec)
    with _said_of(found, "decisive.broadcast_codec"):
        make_codec(decisive.broadcast_codec)
    if decisive.personal is not None:
        with _said_of(found, "decisive.personal"):
            Ditto(**decisive.personal)
    if isinstance(decisive.server_optimizer, dict) and server_optimizers.is_known(decisive.server_optimizer):
        with _said_of(found, "decisive.server_optimizer"):
            server_optimizers.from_settings(decisive.server_optimizer)


@contextmanager
def _said_of(found: Checkpoint, name: str) -> Iterator[None]:
    """What goes wrong within is the checkpoint's fault, and the message says where."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = f"{MANIFEST}, `about.{name}`, makes no sense: {shown(str(error), 300).rstrip('.')}"
        raise found.unusable(why) from None
