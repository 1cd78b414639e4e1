"""The options of a federation that have to agree with each other.

Knows TrainingConfig and counts. Knows nothing about rounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.server.pooling import stands_still
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import shown


def training_of(training: TrainingConfig | None, **given: Any) -> TrainingConfig:
    """One configuration out of `training` and the short options.

    Raises:
        ConfigError: An option is given in both places with two values.
    """
    if training is not None and not isinstance(training, TrainingConfig):
        msg = f"training is a TrainingConfig, got {type(training).__name__}. Write TrainingConfig(…)."
        raise ConfigError(msg)
    config = training or TrainingConfig()
    changes = {}
    for name, field in (
        ("optimizer", "optimizer"),
        ("lr", "learning_rate"),
        ("batch_size", "batch_size"),
        ("seed", "seed"),
    ):
        value = given[name]
        if value is None or (name == "seed" and "seed" in config.model_fields_set):
            continue
        if field in config.model_fields_set and getattr(config, field) != value:
            msg = f"{name}={value!r} contradicts training.{field}={getattr(config, field)!r}. Give it once."
            raise ConfigError(msg)
        changes[field] = value
    replaced: TrainingConfig = config.replace(**changes)
    return replaced


def sample_size(wanted: float | None, available: int) -> int:
    """How many participants a round samples.

    Raises:
        ConfigError: No share in (0, 1] and no count up to `available`.
    """
    if wanted is None:
        return max(available, 1)
    share = isinstance(wanted, float)
    if type(wanted) not in (int, float) or not (0 < wanted <= 1 if share else 1 <= wanted <= max(available, 1)):
        msg = f"participants_per_round is a share in (0, 1] or a count up to {available}, got {wanted!r}."
        raise ConfigError(msg)
    return max(1, round(wanted * available)) if share else int(wanted)


def sampled(wanted: float | None, present: int) -> int:
    """How many of those who are there now: a count that was valid once asks for all where fewer are left."""
    return min(wanted, present) if type(wanted) is int else sample_size(wanted, present)


def checked_quorum(quorum: int, sampled: int, available: int) -> int:
    """The quorum, if a round can meet it.

    Raises:
        ConfigError: It is no count, or larger than the sample; nothing is said where participants are yet to come.
    """
    if not isinstance(quorum, int) or isinstance(quorum, bool) or quorum < 1:
        msg = f"quorum is a count of at least 1, got {quorum!r}."
        raise ConfigError(msg)
    if quorum > sampled and available:
        msg = f"a quorum of {quorum} can never be met by {sampled} participants a round. Lower it or sample more."
        raise ConfigError(msg)
    return quorum


def check_travels(training: TrainingConfig) -> None:
    """Makes sure that participants in other organisations can be told how to train.

    Raises:
        ConfigError: The optimizer is a class or an instance, and no code travels.
    """
    if training.to_plain() is None:
        msg = (
            f"optimizer={training.optimizer!r:.60} cannot be told to participants elsewhere, because no code travels. "
            "Name it: 'adamw', 'adam' or 'sgd'."
        )
        raise ConfigError(msg)


def check_numbers(samples: int, seed: int) -> None:
    """Makes sure that `samples` and `seed` are whole numbers.

    Raises:
        ConfigError: One is none, or `samples` is below 0.
    """
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        msg = f"samples is a count of 0 or more, got {samples!r:.80}."
        raise ConfigError(msg)
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        msg = f"seed is a whole number, got {shown(seed)}: one of 64 bits, its sign included."
        raise ConfigError(msg)


def checked_waiting(deadline: float | None, retries: int) -> tuple[float | None, int]:
    """`deadline` and `retries`, if they make sense.

    Raises:
        ConfigError: No positive number of seconds, no count.
    """
    if deadline is not None and (
        isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not 0 < deadline < float("inf")
    ):
        msg = f"deadline is a positive number of seconds or None, got {deadline!r}."
        raise ConfigError(msg)
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        msg = f"retries is a count of 0 or more, got {retries!r}."
        raise ConfigError(msg)
    return deadline, retries


class Patience:
    """Says when held-out loss has stopped improving.

    Args:
        rounds: How many rounds without improvement are too many.
        min_delta: nats per token that count as an improvement.
    """

    def __init__(self, rounds: int, min_delta: float) -> None:
        self._rounds, self._min_delta = rounds, min_delta
        self._best, self._waited = float("inf"), 0

    def __str__(self) -> str:
        by = f" by {self._min_delta}" if self._min_delta else ""
        return f"held-out loss did not improve{by} for {self._waited} round{'s' if self._waited != 1 else ''}"

    def state(self) -> list[float]:
        """The best loss so far and the rounds since, for a checkpoint."""
        return [self._best, self._waited] if self._best < float("inf") else []

    def go_on(self, state: Sequence[float]) -> None:
        """Counts on from `state()` of a run that was interrupted."""
        if state:
            self._best, self._waited = float(state[0]), int(state[1])

    def is_believed(self, record: RoundRecord) -> bool:
        """Whether a round counts where the pooled loss has not improved: no single participant says so alone."""
        return stands_still(record, self._min_delta)

    def over(self, before: float | None, after: float | None, *, believed: bool = True) -> bool:
        """Whether to stop after a round.

        Args:
            before: Its held-out loss, None where it was not measured.
            after: Likewise.
            believed: Whether it counts where the loss has not improved.
        """
        if after is None:
            return False
        if self._waited == 0 and self._best == float("inf") and before is not None and math.isfinite(before):
            self._best = before
        improved = after < self._best - self._min_delta
        if not improved and not believed:
            return False
        self._best, self._waited = (after, 0) if improved else (self._best, self._waited + 1)
        return self._waited >= self._rounds


def checked_patience(rounds: int | None, min_delta: float, *, measured: bool) -> Patience | None:
    """`patience` and `min_delta`, if they make sense; None where nothing stops early.

    Args:
        rounds: `patience`.
        min_delta: Checked without patience, too.
        measured: Whether held-out loss is.

    Raises:
        ConfigError: No count, or nothing is measured; no finite number of 0 or more.
    """
    if rounds is not None and (type(rounds) is not int or rounds < 1 or not measured):
        msg = "patience is at least 1 and needs evaluation=…, which says what held-out loss is measured on."
        raise ConfigError(msg)
    number = isinstance(min_delta, (int, float)) and not isinstance(min_delta, bool)
    if not (number and 0 <= min_delta <= sys.float_info.max):
        msg = f"min_delta is a finite number of nats per token, 0 or more, got {min_delta!r:.80}."
        raise ConfigError(msg)
    return Patience(rounds, min_delta) if rounds is not None else None
