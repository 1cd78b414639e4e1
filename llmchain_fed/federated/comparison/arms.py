"""Arm: one way to learn that a comparison measures. Five are known by name, others are a function of one's own.

Knows names and what a function of one's own may give back. Knows nothing about training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.comparison.code_digest import code_digest

BASE, ALONE, FEDERATED, CENTRALISED, PERSONAL = "base", "alone", "federated", "centralised", "personal"
BUILT_IN = (BASE, ALONE, FEDERATED, CENTRALISED, PERSONAL)
LOSS = "loss"

Found = Mapping[str, Mapping[str, float]]
"""participant → name of a metric → its value on that participant's held-out texts"""


@dataclass(frozen=True)
class Arm:
    """An arm of one's own, such as a cheap baseline: `Arm("tf-idf", fn)`.

    `fn(train, held_out, seed)` is given each participant's examples by name, as lists of `Example` (with `inputs` and
    `completion`), and gives back participant → name of a metric → value, on that participant's held-out examples.
    What it returns for a seed is kept in `out=`, by the arm's name and the function's own code, with its defaults and
    what it closes over (`code_digest`): where another function that it calls, or a file that it reads, has changed,
    give it another name.

    >>> Arm("majority", lambda train, held_out, seed: {name: {"accuracy": 0.5} for name in held_out})
    Arm('majority')

    Args:
        name: What tables call it; none of the five names that there are.
        fn: The function.
        minimize: Its metrics of which less is better, beside "loss".
    """

    name: str
    fn: Callable[[dict[str, list[Any]], dict[str, list[Any]], int], Found] = field(repr=False)
    minimize: Sequence[str] = field(default=(), repr=False)
    code: str = field(init=False, default="", repr=False, compare=False)
    """the digest of the function as it is when the arm is made: what it counts while it runs makes it no other"""

    def __post_init__(self) -> None:
        taken = isinstance(self.name, str) and self.name.startswith(CENTRALISED)
        if not isinstance(self.name, str) or not self.name.strip() or self.name in BUILT_IN or taken:
            msg = f"an arm of your own needs a name that is none of {', '.join(BUILT_IN)}, got {self.name!r:.80}."
            raise ConfigError(msg)
        if not callable(self.fn):
            msg = f"Arm({self.name!r:.80}, …): a function of (train, held_out, seed) is wanted, got {self.fn!r:.80}."
            raise ConfigError(msg)
        object.__setattr__(self, "code", code_digest(self.fn))

    def __repr__(self) -> str:
        return f"Arm({self.name!r})"

    def measured(
        self, train: dict[str, list[Any]], held_out: dict[str, list[Any]], seed: int
    ) -> dict[str, dict[str, float]]:
        """What the function finds, if that is numbers for every participant.

        Raises:
            ConfigError: It is something else.
            Exception: What the function raises, with a note of whose it is.
        """
        try:
            found = self.fn(train, held_out, seed)
        except Exception as error:  # whatever somebody's function raises
            error.add_note(
                f"raised by the function of the arm {self.name!r:.80}, which is given lists of Example by name"
            )
            raise
        people = dict(found) if isinstance(found, Mapping) else {}
        kept: dict[str, dict[str, float]] = {}
        for name in held_out:
            values = people.get(name)
            numbers = {str(k): plain_number(v) for k, v in values.items()} if isinstance(values, Mapping) else {}
            if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in numbers.values()):
                msg = (
                    f"the arm {self.name!r:.80} gave {values!r:.80} for {name!r:.80}. Return a mapping participant → "
                    "metric → finite number, for every participant."
                )
                raise ConfigError(msg)
            kept[name] = {k: float(v) for k, v in numbers.items()}
        return kept


def checked_arms(given: Iterable[str | Arm] | str | Arm) -> list[str | Arm]:
    """The arms that are asked for, each once.

    Raises:
        ConfigError: None, one that nobody knows, or two of one name.
    """
    found = [given] if isinstance(given, (str, Arm)) else list(given) if isinstance(given, Iterable) else []
    if not found:
        msg = f"compare needs arms: some of {', '.join(BUILT_IN)}, or Arm(name, function), got {given!r:.80}."
        raise ConfigError(msg)
    for arm in found:
        if not isinstance(arm, Arm) and arm not in BUILT_IN:
            msg = f"there is no arm {arm!r:.80}. There are {', '.join(BUILT_IN)}, and Arm(name, function) of your own."
            raise ConfigError(msg)
    names = [name_of(arm) for arm in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        msg = f"the arm {twice[0]!r:.80} is named twice. Name each once."
        raise ConfigError(msg)
    return found


def name_of(arm: str | Arm) -> str:
    """What tables call it."""
    return arm.name if isinstance(arm, Arm) else arm
