"""Monitor: the value by which a fit is stopped and its best round chosen, and when it has stopped getting better.

Knows records and which way is better. Knows nothing about how a round is run or weights are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.measures.pooling import witnesses
from llmchain_fed.federated.server.evaluation import Evaluator, Measurement
from llmchain_fed.training.metrics import unknown_metric

LOSS = "held_out_loss"


@dataclass(frozen=True)
class Measured:
    """A value under one set of global weights: of all together, and each participant's own."""

    pool: float | None
    own: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Monitored:
    """A value of records, and which way is better.

    Values are compared over the same participants: where one was away, or could not measure, at one side only, the pool
    without it would be better or worse for that alone. Then the means over those who are at both sides are compared,
    each participant weighing alike, since records have values and not what they weigh.
    """

    name: str = LOSS
    maximize: bool = False
    shared: bool = False
    """whether the pool is over one set that belongs to nobody, so that it does not matter who else has measured"""

    def __str__(self) -> str:
        return "held-out loss" if self.name == LOSS else self.name

    def measured(self, record: RoundRecord, *, before: bool = False) -> Measured:
        """What a record has under the weights after its round, or before it; what is not finite is as not measured."""
        if self.name == LOSS:
            pool = record.held_out_before if before else record.held_out_after
            own = {n: p.held_out_before if before else p.held_out_after for n, p in record.participants.items()}
        else:
            pool = (record.metrics_before if before else record.metrics).get(self.name)
            sides = {n: p.metrics_before if before else p.metrics for n, p in record.participants.items()}
            own = {n: values.get(self.name) for n, values in sides.items()}
        return Measured(_finite(pool), {n: v for n, value in own.items() if (v := _finite(value)) is not None})

    def apart(self, new: Measured, old: Measured) -> tuple[float, float] | None:
        """Two values over the same examples; None where there are none."""
        if new.pool is None or old.pool is None:
            return None
        if self.shared or new.own.keys() == old.own.keys():
            return new.pool, old.pool
        common = [name for name in new.own if name in old.own]
        if not common:
            return None
        ours, theirs = (math.fsum(side.own[n] for n in common) / len(common) for side in (new, old))
        return ours, theirs

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
            value = self.measured(record)
            if value.pool is None or (among is not None and record.round not in among):
                continue
            sides = self.apart(value, self.measured(found)) if found is not None else None
            if found is None or (sides is not None and self.improves(*sides)):
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
        return Monitored(shared=evaluator.is_shared)
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
    return Monitored(name, metric.maximize, evaluator.is_shared)


def decided(name: str | None, evaluator: Evaluator) -> Monitored | None:
    """What an earlier fit monitored, by default the held-out loss; None where that is not measured any more."""
    if name in (None, LOSS):
        return Monitored(shared=evaluator.is_shared)
    metric = next((metric for metric in evaluator.metrics if metric.name == evaluator.owners.get(str(name))), None)
    known = metric is not None and metric.maximize is not None
    return Monitored(str(name), bool(metric.maximize), evaluator.is_shared) if metric is not None and known else None


def _nobody(name: str, known: Sequence[str], missing: Mapping[str, str]) -> str:
    why = f" What is missing: {'; '.join(f'{n}: {reason}' for n, reason in missing.items())}." if missing else ""
    return f"monitor: no participant computes it: {unknown_metric(name, known, 'value')}.{why} Name it in metrics=[…]."


def stands_still(new: Measured, old: Measured, min_delta: float, monitored: Monitored) -> bool:
    """Whether enough participants' own values are no better to believe a pool that is not.

    Args:
        new: With the values of those who were measured; of none, where the hub measured for itself.
        old: What they are compared with.
        min_delta: What counts as an improvement, such as nats per token.
        monitored: Which value.
    """
    both = [name for name in new.own if name in old.own]
    still = [name for name in both if not monitored.improves(new.own[name], old.own[name], min_delta)]
    return not both or witnesses(both, still)


class Patience:
    """Says when the monitored value has stopped improving.

    Args:
        rounds: How many rounds without improvement are too many.
        min_delta: What counts as an improvement, in the value's own unit.
        state: `state()` of a run that was interrupted, from which it counts on.
        monitored: Which value.
        history: The rounds that the state speaks of.
    """

    def __init__(
        self,
        rounds: int,
        min_delta: float,
        state: Sequence[int] = (),
        monitored: Monitored | None = None,
        history: Iterable[RoundRecord] = (),
    ) -> None:
        self._rounds, self._min_delta, self._monitored = rounds, min_delta, monitored or Monitored()
        self._best: Measured | None = None
        self._waited = self._where = 0
        if state:
            waited, where = state
            record = next((record for record in history if record.round == abs(where)), None)
            if record is not None:
                self._waited, self._where = waited, where
                self._best = self._monitored.measured(record, before=where < 0)

    def __str__(self) -> str:
        by = f" by {self._min_delta}" if self._min_delta else ""
        return f"{self._monitored} did not improve{by} for {self._waited} round{'s' if self._waited != 1 else ''}"

    def state(self) -> list[int]:
        """The rounds since the best, and where that was, for a checkpoint: n after round n, -n before it."""
        return [self._waited, self._where] if self._best is not None else []

    def over(self, record: RoundRecord) -> bool:
        """Whether to stop after a round.

        A value is compared with the best so far, at first with that before the first round, or after members changed.
        Where it has not improved, a round counts if it was measured on one set that is shared by all, or on so many
        participants' that no single one says so alone.
        """
        before, after = (self._monitored.measured(record, before=side) for side in (True, False))
        if after.pool is None:
            return False
        if (self._best is None or record.members_changed) and before.pool is not None:
            self._best, self._where = before, -record.round
        sides = self._monitored.apart(after, self._best) if self._best is not None else None
        if self._best is not None and sides is None:  # of nobody who was measured then
            return False
        if sides is None or self._monitored.improves(*sides, self._min_delta):
            self._best, self._where, self._waited = after, record.round, 0
            return False
        assert self._best is not None
        if self._monitored.shared or stands_still(after, self._best, self._min_delta, self._monitored):
            self._waited += 1
        return self._waited >= self._rounds
