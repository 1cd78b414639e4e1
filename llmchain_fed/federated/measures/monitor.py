"""Monitor: the value by which a fit is stopped and its best round chosen, and when it has stopped getting better.

Knows records and which way is better. Knows nothing about how a round is run or weights are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.measures.pooling import witnesses
from llmchain_fed.federated.server.evaluation import Evaluator, Measurement
from llmchain_fed.training.metrics import unknown_metric

LOSS = "held_out_loss"


@dataclass(frozen=True)
class Monitored:
    """A value of records, and which way is better."""

    name: str = LOSS
    maximize: bool = False

    def __str__(self) -> str:
        return "held-out loss" if self.name == LOSS else self.name

    def pooled(self, record: RoundRecord) -> tuple[float | None, float | None]:
        """All participants' together, before and after a round; None where it was not measured, or is not finite."""
        if self.name == LOSS:
            return _finite(record.held_out_before), _finite(record.held_out_after)
        return record.metrics_before.get(self.name), record.metrics.get(self.name)

    def own(self, record: RoundRecord) -> dict[str, tuple[float, float]]:
        """Each participant's, of those who were measured before and after it."""
        people = record.participants.items()
        if self.name == LOSS:
            found = {n: (p.held_out_before, p.held_out_after) for n, p in people}
        else:
            found = {n: (p.metrics_before.get(self.name), p.metrics.get(self.name)) for n, p in people}
        return {n: (old, new) for n, (old, new) in found.items() if old is not None and new is not None}

    def improves(self, new: float, old: float, by: float = 0.0) -> bool:
        """Whether one value is better than another by more than so much."""
        return new > old + by if self.maximize else new < old - by

    def best(self, history: History, among: Collection[int] | None = None) -> RoundRecord | None:
        """The first of the rounds with the best value, since members last changed; None where none has one.

        Args:
            history: The rounds.
            among: Numbers of the rounds that count; all by default.
        """
        found: RoundRecord | None = None
        for record in history:
            if record.members_changed:  # its values are over other examples
                found = None
            value = self.pooled(record)[1]
            if value is None or (among is not None and record.round not in among):
                continue
            former = self.pooled(found)[1] if found is not None else None
            if former is None or self.improves(value, former):
                found = record
        return found

    def judge(self, record: RoundRecord, history: History) -> None:
        """Notes in the history which round is the best so far, once this one is over."""
        if record.members_changed:
            history.best = None
        among = {record.round} | ({history.best} if history.best is not None else set())
        best = self.best(history, among)
        history.best = best.round if best is not None else history.best


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def check_known(name: object, evaluator: Evaluator) -> str:
    """The name of what is monitored, if it can be told before anything is measured that nobody has it.

    Raises:
        ConfigError: Nobody measures that.
    """
    if not isinstance(name, str):
        msg = f'monitor is "held_out_loss" or the name of a metric\'s value, got {name!r:.80}.'
        raise ConfigError(msg)
    known = [metric.name for metric in evaluator.metrics]
    named = all(not metric.code for metric in evaluator.metrics)  # what a function calls its values, it alone knows
    if name != LOSS and name not in known and named:
        raise ConfigError(_nobody(name, [LOSS, *known], {}))
    return name


def resolved(name: str, evaluator: Evaluator, found: Measurement | None) -> Monitored:
    """What is monitored, once it has been measured for the first time.

    Raises:
        ConfigError: No participant has it, or which way is better was not said.
    """
    if name == LOSS:
        return Monitored()
    sides = [*found.own.values(), found.shared] if found is not None else []
    if not any(name in side.get("metrics", {}) for side in sides):
        there = dict.fromkeys(key for side in sides for key in side.get("metrics", {}))
        missing = {n: why for side in sides for n, why in side.get("missing", {}).items()}
        raise ConfigError(_nobody(name, [LOSS, *there], missing))
    metric = next(metric for metric in evaluator.metrics if metric.name == evaluator.owners[name])
    if metric.maximize is None:
        msg = (
            f"monitor={name!r} needs to know which way is better. Write Metric(…, maximize=True), or maximize=False, "
            f"for {metric.name!r} in metrics=[…]."
        )
        raise ConfigError(msg)
    return Monitored(name, metric.maximize)


def decided(name: str | None, evaluator: Evaluator) -> Monitored | None:
    """What an earlier fit monitored, by default the held-out loss; None where that is not measured any more."""
    if name in (None, LOSS):
        return Monitored()
    metric = next((metric for metric in evaluator.metrics if metric.name == evaluator.owners.get(str(name))), None)
    return Monitored(str(name), metric.maximize) if metric is not None and metric.maximize is not None else None


def _nobody(name: str, known: Sequence[str], missing: Mapping[str, str]) -> str:
    why = f" What is missing: {'; '.join(f'{n}: {reason}' for n, reason in missing.items())}." if missing else ""
    return f"monitor: no participant computes it: {unknown_metric(name, known, 'value')}.{why} Name it in metrics=[…]."


def stands_still(record: RoundRecord, min_delta: float, monitored: Monitored | None = None) -> bool:
    """Whether enough participants' own values have not improved in a round to believe a pool that has not.

    Args:
        record: With the values of those who were measured; of none, where the hub measured for itself.
        min_delta: What counts as an improvement, such as nats per token.
        monitored: Which value; by default the held-out loss.
    """
    monitored = monitored or Monitored()
    known = monitored.own(record)
    still = [n for n, (old, new) in known.items() if not monitored.improves(new, old, min_delta)]
    return not known or witnesses(known, still)


class Patience:
    """Says when the monitored value has stopped improving.

    Args:
        rounds: How many rounds without improvement are too many.
        min_delta: What counts as an improvement, in the value's own unit.
        state: `state()` of a run that was interrupted, from which it counts on.
        monitored: Which value.
    """

    def __init__(
        self, rounds: int, min_delta: float, state: Sequence[float], monitored: Monitored | None = None
    ) -> None:
        self._rounds, self._min_delta, self._monitored = rounds, min_delta, monitored or Monitored()
        self._best: float | None = float(state[0]) if state else None
        self._waited = int(state[1]) if state else 0

    def __str__(self) -> str:
        by = f" by {self._min_delta}" if self._min_delta else ""
        return f"{self._monitored} did not improve{by} for {self._waited} round{'s' if self._waited != 1 else ''}"

    def state(self) -> list[float]:
        """The best value so far and the rounds since, for a checkpoint."""
        return [self._best, self._waited] if self._best is not None else []

    def over(self, record: RoundRecord, *, shared: bool) -> bool:
        """Whether to stop after a round.

        Where the value has not improved, a round counts if it was measured on one set that is shared by all, or on so
        many participants' that no single one says so alone.
        """
        before, after = self._monitored.pooled(record)
        if after is None:
            return False
        if self._best is None:
            self._best = before
        improved = self._best is None or self._monitored.improves(after, self._best, self._min_delta)
        if not (improved or shared or stands_still(record, self._min_delta, self._monitored)):
            return False
        self._best, self._waited = (after, 0) if improved else (self._best, self._waited + 1)
        return self._waited >= self._rounds
