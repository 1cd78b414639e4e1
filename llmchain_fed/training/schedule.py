"""Schedule: how many optimizer steps a training has, and what the learning rate is at each of them.

Knows counts and rates. Knows nothing about losses, or about who else takes part in a federation's rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import ConfigError
from llmchain_fed.training.config import TrainingConfig

_COUNTS = 0.1  # of a round's largest learning rate: a step below it moves little


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step of one round, as a share of `TrainingConfig.learning_rate`.

    With `w` steps of warm-up of `total`, the share at step `t` (from 0) is t / w before step w; from then on it is 1
    ("constant"), (total − t) / (total − w) ("linear"), or (1 + cos(π · (t − w) / (total − w))) / 2 ("cosine",
    arXiv 1608.03983 without restarts). They are the values of transformers' get_scheduler; it never exceeds 1.

    >>> schedule = Schedule("linear", total=6, warmup=2)
    >>> [schedule.share(step) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """

    kind: str
    total: int
    """steps that it runs over"""
    warmup: int = 0
    first: int = 0
    """which of them is the round's first"""
    steps: int | None = None
    """of the round; what somebody's own draw takes beyond them has the last one's rate"""

    @classmethod
    def of(cls, config: TrainingConfig, steps: int | None, round: int, rounds: int | None) -> Schedule | None:  # noqa: A002 (the field's own word)
        """The schedule of one round; None where the rate never changes.

        Args:
            config: The options.
            steps: Of this round; None where a DataLoader does not know.
            round: The round, counted from 0.
            rounds: How many the federation has; None: this training is all there is.

        Raises:
            ConfigError: Nobody knows how many steps there are.
        """
        if not config.scheduled:
            return None
        if steps is None:
            msg = (
                f"lr_schedule={config.lr_schedule!r} needs to know how many steps a round has, and the DataLoader does "
                "not say how many batches it gives. Set max_steps, or give its dataset a length."
            )
            raise ConfigError(msg)
        whole = rounds is None or config.lr_schedule_over == "round"
        total, first = (steps, 0) if whole or rounds is None else (steps * max(rounds, round + 1), steps * round)
        warmup = config.warmup if isinstance(config.warmup, int) else math.ceil(total * config.warmup)
        return cls(config.lr_schedule, total, warmup, first, steps)

    def share(self, step: int) -> float:
        """The share at a step of the round, counted from 0."""
        at = self.first + (step if self.steps is None else min(step, self.steps - 1))
        if at < self.warmup:
            return at / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min((at - self.warmup) / max(1, self.total - self.warmup), 1.0)
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    def counts(self, step: int) -> bool:
        """Whether a step of the round moves the weights by more than a tenth of what its largest rate could.

        In a round whose rates are all 0, the beginning of a long warm-up, none moves them, and all count alike.
        """
        last = max((self.steps or 1) - 1, 0)
        largest = self.share(min(max(self.warmup - self.first, 0), last))
        return largest == 0 or self.share(step) > _COUNTS * largest


def check_planned(config: TrainingConfig, who: str | None = None) -> None:
    """Makes sure that no schedule runs over a federation's rounds, of which `who` does not know how many there are.

    Raises:
        ConfigError: One does.
    """
    if config.scheduled and config.lr_schedule_over == "federation":
        msg = (
            "the learning rate's schedule or warm-up runs over all rounds of the federation, and "
            f"{f'{who} does not know' if who else 'nobody said'} how many those are. Use FederatedAveraging's "
            'fit(rounds), or TrainingConfig(lr_schedule_over="round").'
        )
        raise ConfigError(msg)


class LearningRate:
    """Sets an optimizer's learning rate before each step, and puts its own back at the end.

    Args:
        optimizer: Its rate as it is now is what shares are of.
        schedule: None leaves it alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule | None) -> None:
        self._groups, self._schedule = optimizer.param_groups, schedule
        self._base = [group["lr"] for group in self._groups]

    def before(self, step: int) -> None:
        """Sets it for a step, counted from 0."""
        if self._schedule is not None:
            self._set(self._schedule.share(step))

    def restore(self) -> None:
        """An optimizer that is kept goes on from the rate that it was made with."""
        if self._schedule is not None:
            self._set(1.0)

    def _set(self, share: float) -> None:
        for group, base in zip(self._groups, self._base, strict=True):
            group["lr"] = base * share


# --- how many steps there are -----------------------------------------------------------------------------------------


def steps_of(data: Any, config: TrainingConfig) -> int | None:
    """Optimizer steps of one training; None where a DataLoader does not know its length."""
    if config.max_steps is not None:
        return config.max_steps
    per_pass = steps_per_pass(data, config)
    return per_pass * (config.epochs or 1) if per_pass is not None else None


def steps_per_pass(data: Any, config: TrainingConfig) -> int | None:
    """Optimizer steps of one pass over the examples; likewise."""
    if isinstance(data, EncodedExamples):
        return -(-len(data) // config.batch_size)
    return batches_per_pass(data)


def batches_per_pass(loader: Any) -> int | None:
    """How many batches a DataLoader gives; None where its dataset does not know."""
    try:
        return len(loader)
    except TypeError:
        return None
