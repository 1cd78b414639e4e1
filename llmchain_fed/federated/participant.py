"""Participant: a name, examples that stay where they are, and what this participant does differently.

Knows the forms of examples. Knows nothing about rounds or other participants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from llmchain_fed._config import plain_number
from llmchain_fed.data.examples import Examples, is_ready_tensors, with_columns
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.sides import divide
from llmchain_fed.data.sources.columns import checked_columns
from llmchain_fed.data.sources.readers import is_table
from llmchain_fed.data.split import Split
from llmchain_fed.errors import ConfigError, DataError, DuplicateParticipantError, EmptyParticipantError
from llmchain_fed.untrusted import shown

ALPHAS = (1e-3, 2.0**16)
"""the smallest and the largest LoRA alpha that make sense: alpha/rank scales what is learnt, and is divided by"""
LARGEST_RANK = 2**16
Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]
Alpha = Annotated[float, Field(ge=ALPHAS[0], le=ALPHAS[1])]
_TRAINED_ON = ("train", "training")
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")  # the better ones first


@dataclass(frozen=True)
class Participant:
    """A device, hospital, publisher or bank that has examples.

    >>> Participant("django", [("Page locked", "Page verrouillée")])
    Participant('django')

    Args:
        name: Unique in its federation.
        examples: What it trains on, in any form of `read_examples`.
        held_out: What it is evaluated on; never trained on: examples, or a `Split` that sets some of its own apart,
            or the share of one.
        columns: Variable of the prompt, or "completion" → column of its examples and of what it holds out, where they
            are called otherwise; the federation's `columns` by default.
        training: Options of `TrainingConfig` that differ for it: a slow device takes `{"max_steps": 4}`.
        rank: LoRA rank it trains with, at most the chain's own; for the rules `flora` and `flexlora`.
        alpha: LoRA alpha that goes with that rank; the chain's own by default, as `LoraConfig(r=rank)` would have it.
        chain: Its own composed chain, with its own retriever and documents, around the federation's model; the
            federation's by default. Prompts are the same, and what else it does stays here.
    """

    name: str
    examples: Examples = field(repr=False)
    held_out: Examples | Split | float | None = field(default=None, repr=False)
    training: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    chain: Any = field(default=None, repr=False)
    columns: Mapping[str, str | int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.name is None or len(str(self.name).splitlines()) > 1:
            msg = f"{self.name!r:.80} is no participant's name: it stands in tables and logs. Give it one line of text."
            raise ConfigError(msg)
        object.__setattr__(self, "name", str(self.name))  # numbers are names too, and travel as text
        if isinstance(plain_number(self.held_out), float):  # as evaluation= takes it
            object.__setattr__(self, "held_out", Split(plain_number(self.held_out)))
        object.__setattr__(self, "rank", plain_number(self.rank))
        object.__setattr__(self, "alpha", plain_number(self.alpha))
        if not self.name:
            msg = "a participant needs a name: it is how updates, history and errors refer to it."
            raise ConfigError(msg)
        try:
            self.name.encode()
        except UnicodeEncodeError:
            msg = f"participant {self.name!r}: half a surrogate pair cannot be sent or written. Choose another name."
            raise ConfigError(msg) from None
        if not isinstance(self.training, Mapping):
            msg = (
                f"participant {self.name!r}: training is a mapping of the options that differ, such as "
                f'{{"max_steps": 4}}, got {type(self.training).__name__}.'
            )
            raise ConfigError(msg)
        object.__setattr__(self, "columns", checked_columns(self.columns))
        if self.rank is not None and (type(self.rank) is not int or not 1 <= self.rank <= LARGEST_RANK):
            most = f"at most {LARGEST_RANK:,}"
            msg = f"participant {self.name!r}: rank is a count of at least 1, {most}, got {shown(self.rank)}."
            raise ConfigError(msg)
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and self.rank is not None and ALPHAS[0] <= self.alpha <= ALPHAS[1]):
            fits = f"from {ALPHAS[0]} to {ALPHAS[1]:,.0f}"
            msg = (
                f"participant {self.name!r}: alpha is positive and goes with a rank, got {shown(self.alpha)} ({fits})."
            )
            raise ConfigError(msg)

    def with_columns(self, columns: Mapping[str, str | int] | None) -> Participant:
        """Itself with these columns, unless it has columns of its own."""
        return self if columns is None or self.columns is not None else replace(self, columns=columns)

    def __repr__(self) -> str:
        training = f", training={dict(self.training)}" if self.training else ""
        return f"Participant({self.name!r}{training}{f', rank={self.rank}' if self.rank else ''})"


def as_participants(given: Mapping[Any, Any] | Iterable[Participant] | None) -> dict[str, Participant]:
    """Participants by name, from a mapping name → examples or from a list of `Participant`.

    Raises:
        ConfigError: Neither of these, or no name; or the splits of one data set.
        DuplicateParticipantError: A name occurs twice.
    """
    if given is None:
        return {}
    found: list[Any]
    if isinstance(given, Mapping):
        _refuse_splits(given)
        found = [v if isinstance(v, Participant) else Participant(k, v) for k, v in given.items()]
        for key, item in zip(given, found, strict=True):
            if item.name != str(key):
                msg = f"participant {item.name!r} stands under the name {key!r}. Make the two equal, or pass a list."
                raise ConfigError(msg)
    elif isinstance(given, Iterable) and not isinstance(given, str) and not is_table(given):
        found = list(given)
    else:
        found = [given]
    for item in found:
        if not isinstance(item, Participant):
            msg = (
                f"participants are a mapping of names to examples or a list of Participant, got {type(item).__name__}. "
                'Give examples a name: participants={"a": examples}.'
            )
            raise ConfigError(msg)
    by_name = {item.name: item for item in found}
    if len(by_name) < len(found):
        names = [item.name for item in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        msg = (
            f"two participants are called {twice[0]!r}: their updates could not be told apart. Give each its own name."
        )
        raise DuplicateParticipantError(msg)
    return by_name


def _refuse_splits(given: Mapping[Any, Any]) -> None:
    """Makes sure that the participants are not train, validation and test: all three would be trained on."""
    of_datasets = type(given).__name__.endswith("DatasetDict")  # also the iterable kind
    bare = [str(key) for key, value in given.items() if not isinstance(value, Participant)]
    known = {key: split for key in bare if (split := _split_named(key, loosely=of_datasets)) is not None}
    if not known or (len(known) < len(given) and not of_datasets):
        return
    ranked = [(split, key) for key, split in known.items()]
    train = next((key for split, key in ranked if split in _TRAINED_ON), None)
    held_out = sorted((_HELD_OUT.index(split), key) for split, key in ranked if split in _HELD_OUT)
    remedy = f'participants={{"me": d[{train or next(iter(given))!r}]}}'
    if held_out and train is not None:
        remedy += f", evaluation=d[{held_out[0][1]!r}]"
    remedy = remedy.replace("d['", 'd["').replace("']", '"]')
    msg = (
        f"{', '.join(map(repr, given))} are the splits of one data set, and as participants each would be trained on, "
        f"what is meant for evaluation too. Pass {remedy}; participants who are really called so are given as "
        f"Participant({next(iter(known))!r}, …) values."
    )
    raise ConfigError(msg)


def _split_named(key: str, *, loosely: bool) -> str | None:
    """The split that a key names; loosely also in "train_sft" or "validation-matched", as published data sets have."""
    word = key.strip().lower()
    if loosely:
        word = re.split(r"[^a-z]", word, maxsplit=1)[0]
    return word if word in (*_TRAINED_ON, *_HELD_OUT) else None


def hold_out(participant: Participant, split: Split, prompt: Prompt | None, seed: int) -> Participant:
    """The participant with a part of its examples set apart for evaluation; its own `Split` goes before this one.

    One that holds out examples already stays as it is.

    Raises:
        ConfigError: The examples are a DataLoader, whose batches cannot be divided.
        DataError: The examples cannot be read, or divided so.
        EmptyParticipantError: One of the sides would be empty.
    """
    if participant.held_out is not None and not isinstance(participant.held_out, Split):
        return participant
    if is_ready_tensors(participant.examples):
        msg = (
            f"a share of {participant.name!r}'s DataLoader cannot be held out. Pass "
            "Participant(held_out=another loader)."
        )
        raise ConfigError(msg)
    own = participant.held_out if participant.held_out is not None else split
    source = with_columns(participant.examples, participant.columns)
    try:
        train, held_out = divide(source, prompt, own, seed, participant.name)
    except EmptyParticipantError:
        raise
    except DataError as error:
        raise type(error)(f"participant {participant.name!r}: {error}") from None  # noqa: EM102
    return replace(participant, examples=train, held_out=held_out)
