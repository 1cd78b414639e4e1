"""Contents: what a federation's checkpoint says beside its tensors, every field of its type and in its range.

Knows the options that a federation writes. Knows nothing of files, tensors or how a hub goes on. Whoever can write a
checkpoint can write digests as well, so nothing in it is believed: an option that no federation writes is refused, a
class is one of a table, and no path is read from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, Field

from llmchain_fed.errors import CheckpointError
from llmchain_fed.federated.checkpoint.files import MANIFEST, Checkpoint
from llmchain_fed.federated.history import History
from llmchain_fed.federated.history_data import MOST_PARTICIPANTS, Name, Texts
from llmchain_fed.federated.participant import Alpha, Rank
from llmchain_fed.federated.protocol.tasks import FederationId
from llmchain_fed.federated.settings import FederationConfig, config_from
from llmchain_fed.federated.target import ContractData
from llmchain_fed.untrusted import Strict, checked, shown

PartT = TypeVar("PartT", bound=Strict)
_Word = Annotated[str, Field(max_length=200)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Numbers = Annotated[dict[Name, Any], Field(max_length=1_000_000)]


class Holding(Strict):
    """What a participant said it holds."""

    examples: _Positive | None
    tokens: _Positive | None
    rank: Rank | None
    alpha: Alpha | None
    options: _Word | None


class _Participants(Strict):
    names: Annotated[list[Name], FailFast(), Field(max_length=MOST_PARTICIPANTS)]


class _About(Strict):
    """All that a manifest says beside names of files, its parts as they were found."""

    contract: Any
    config: Any
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
    config: FederationConfig
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
        for name, holding in about.holdings.items():
            _part(found, Holding, holding, f"holdings.{shown(name)}")
        with _said_of(found, "history"):
            what = f"{found.where}: {MANIFEST}, `about.history`,"
            history = History.from_dict(about.history, what=what, error=CheckpointError, remedy=found.remedy)
        _check(found, about, history)
        with _said_of(found, "config"):
            config = config_from(about.config)
        return cls(
            found,
            about.contract,
            config,
            about.participants,
            about.federation,
            about.holdings,
            history,
            found.about["patience"],
            about.round_notes,
            about.members_changed,
            about.server_optimizer,
        )


def identity(about: Mapping[str, Any]) -> tuple[FederationConfig, list[str]]:
    """The options, and who takes part, of a checkpoint of which no more is read.

    Raises:
        CheckpointError: A field is unknown or missing, of another type or out of range.
    """
    names = {"names": about.get("participants")}
    found = checked(_Participants, names, what=f"{MANIFEST}, `about.participants`,", error=CheckpointError)
    try:
        return config_from(about.get("config")), found.names
    except Exception as error:
        msg = f"{MANIFEST}, `about.config`, makes no sense: {shown(str(error), 300).rstrip('.')}."
        raise CheckpointError(msg) from None


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
