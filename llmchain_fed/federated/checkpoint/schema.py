"""Schema: what a federation's checkpoint says beside its tensors, every field of its type and in its range.

Knows the options that a federation writes. Knows nothing of files, tensors or how a hub goes on. Whoever can write a
checkpoint can write digests as well, so nothing in it is believed: an option that no federation writes is refused, a
class is one of a table, and no path is read from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import FailFast, Field

from llmchain_fed.errors import CheckpointError, ConfigError
from llmchain_fed.federated.checkpoint.files import MANIFEST, Checkpoint
from llmchain_fed.federated.history import History
from llmchain_fed.federated.history_file import MOST_PARTICIPANTS, Name, Texts
from llmchain_fed.federated.options import AGAIN, CODE, EXAMPLES, Ditto, FederationConfig, FederationOptions
from llmchain_fed.federated.participant import Alpha, Rank
from llmchain_fed.federated.protocol.tasks import FederationId
from llmchain_fed.federated.target import ContractData
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import Strict, checked, shown
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.codecs import make_codec

PartT = TypeVar("PartT", bound=Strict)
_Word = Annotated[str, Field(max_length=200)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Numbers = Annotated[dict[Name, Any], Field(max_length=1_000_000)]


class Declaration(Strict):
    """What a participant said of itself when it joined."""

    examples: _Positive | None
    tokens: _Positive | None
    rank: Rank | None
    alpha: Alpha | None
    options: _Word | None


class _Participants(Strict):
    names: Annotated[list[Name], FailFast(), Field(max_length=MOST_PARTICIPANTS)]


class About(Strict):
    """All that a manifest says beside names of files, its parts as they were found."""

    contract: Any
    config: Any
    participants: Annotated[list[Name], FailFast(), Field(max_length=MOST_PARTICIPANTS)]
    federation: FederationId
    declarations: Annotated[dict[Name, Any], Field(max_length=MOST_PARTICIPANTS)]
    history: Any
    patience: Annotated[list[int], FailFast(), Field(max_length=2)]
    round_notes: Texts
    members_changed: bool
    server_optimizer: _Numbers
    """what is JSON of its memory"""


@dataclass(frozen=True)
class Contents:
    """A checkpoint that makes sense, whether or not it fits a model."""

    found: Checkpoint
    about: About
    config: FederationConfig
    history: History

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
        about = _part(found, About, found.about, "")
        _part(found, ContractData, about.contract, "contract")
        for name, declaration in about.declarations.items():
            _part(found, Declaration, declaration, f"declarations.{shown(name)}")
        with _said_of(found, "history"):
            what = f"{found.where}: {MANIFEST}, `about.history`,"
            history = History.from_dict(about.history, what=what, error=CheckpointError, remedy=found.remedy)
        _check(found, about, history)
        with _said_of(found, "config"):
            config = _config_of(about.config)
        return cls(found, about, config, history)


def identity(about: Mapping[str, Any]) -> tuple[FederationConfig, list[str]]:
    """The options, and who takes part, of a checkpoint of which no more is read.

    Raises:
        CheckpointError: A field is unknown or missing, of another type or out of range.
    """
    names = {"names": about.get("participants")}
    found = checked(_Participants, names, what=f"{MANIFEST}, `about.participants`,", error=CheckpointError)
    try:
        return _config_of(about.get("config")), found.names
    except Exception as error:
        msg = f"{MANIFEST}, `about.config`, makes no sense: {shown(str(error), 300).rstrip('.')}."
        raise CheckpointError(msg) from None


def _config_of(data: object) -> FederationConfig:
    """The options that a checkpoint contains, each of them there and in its range."""
    if not isinstance(data, dict) or data.keys() != FederationConfig.model_fields.keys():
        names = data.keys() ^ FederationConfig.model_fields.keys() if isinstance(data, dict) else data
        msg = f"it is no mapping of all options and no other ({shown(names, 200)})"
        raise ConfigError(msg)
    for name, most in (("training", len(TrainingConfig.model_fields)), ("personal", len(Ditto.model_fields))):
        if isinstance(data[name], dict) and len(data[name]) > most:  # each unknown one would become an error object
            msg = f"`{name}` has {len(data[name]):,} options, of which there are {most}"
            raise ConfigError(msg)
    config = FederationConfig(**data)
    for name in ("codec", "broadcast_codec"):
        make_codec(getattr(config, name))
    settings = config.server_optimizer
    if isinstance(settings, dict) and server_optimizers.is_known(settings):
        server_optimizers.from_settings(settings)
    return config


def options_again(config: FederationConfig, given: FederationOptions, optimizer: Any) -> FederationOptions:
    """The options with which a federation goes on: those of then, and over them what is given again.

    Raises:
        ConfigError: What is code, or examples, is not given again.
    """
    merged: dict[str, Any] = {name: getattr(config, name) for name in FederationConfig.model_fields}
    merged |= given
    if merged.pop("optimizer") is not None and optimizer is None and given.get("training") is None:
        merged["optimizer"] = config.optimizer
    if given.get("training") is None:
        short = {"learning_rate": given.get("lr"), "batch_size": given.get("batch_size"), "optimizer": optimizer}
        merged["training"] = config.training.replace(**{n: value for n, value in short.items() if value is not None})
    if config.transforms and "transforms" not in given:
        were = ", ".join(each.removesuffix(AGAIN) for each in config.transforms)
        msg = f"the run's transforms were {were}. Pass transforms= again."
        raise ConfigError(msg)
    own = [each.removesuffix(AGAIN) for each in config.metrics or () if isinstance(each, str) and each.startswith(CODE)]
    if own and "metrics" not in given:
        msg = f"the run's metrics were {', '.join(own)}. Pass metrics= again."
        raise ConfigError(msg)
    for name, value in merged.items():
        if isinstance(value, str) and (value == EXAMPLES or value.startswith(CODE)):
            msg = f"the run's {name} was {value.removesuffix(AGAIN)}. Pass {name}= again."
            raise ConfigError(msg)
    if isinstance(settings := merged["server_optimizer"], dict):
        merged["server_optimizer"] = server_optimizers.from_settings(settings)
    return cast(FederationOptions, merged)


def _part(found: Checkpoint, model: type[PartT], part: Any, name: str) -> PartT:
    what = f"{found.where}: {MANIFEST}, `about{'.' if name else ''}{name}`,"
    return checked(model, part, what=what, error=CheckpointError, remedy=found.remedy)


def _check(found: Checkpoint, about: About, history: History) -> None:
    """What fields must be to each other."""
    wrong = None
    if [record.round for record in history] != list(range(1, found.round + 1)):
        wrong = f"`about.history` is not one of rounds 1 to {found.round}"
    elif len(set(about.participants)) < len(about.participants):
        wrong = "`about.participants` names somebody twice"
    elif about.patience and not _is_patience(about.patience, found.round):
        wrong = f"`about.patience` is no count of rounds with a round of these: {shown(about.patience)}"
    elif strangers := [*(about.declarations.keys() | found.participants.keys()) - set(about.participants)][:1]:
        wrong = f"{shown(strangers[0])}, of whom it says something, is not among `about.participants`"
    if wrong is not None:
        msg = f"{MANIFEST} makes no sense: {wrong}"
        raise found.unusable(msg)


def _is_patience(state: list[int], rounds: int) -> bool:
    """Whether it may be `Patience.state()` of so many rounds."""
    if len(state) != 2:
        return False
    waited, where = state
    return 0 <= waited <= rounds and 1 <= abs(where) <= rounds


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
