"""Comparison: what the arms of an experiment are worth, as a table, frame and JSON, and how sure a difference is.

Knows values by arm, seed, model and texts. Knows nothing about how they were measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from llmchain_fed.errors import ConfigError, MissingExtraError, install
from llmchain_fed.federated.comparison import bootstrap, table
from llmchain_fed.federated.comparison.arms import ALONE, CENTRALISED, FEDERATED, LOSS, PERSONAL
from llmchain_fed.federated.comparison.measuring import Values
from llmchain_fed.federated.comparison.trials import ALL
from llmchain_fed.federated.history import finite
from llmchain_fed.untrusted import printable

if TYPE_CHECKING:
    import pandas as pd

On = Literal["own", "pooled"]


@dataclass
class ArmResult:
    """One arm of a comparison."""

    name: str
    values: dict[int, dict[str, Values]]
    """seed → whose model ("": one for everybody) → whose texts → name of a metric → value"""
    learning_rate: dict[str, float] = field(default_factory=dict)
    """whose ("": everybody's) → the one that was chosen on the validation part; empty where nothing is trained"""
    examples_seen: int | None = None
    """presentations of examples in all rounds, all participants together; None of an arm of one's own"""
    seconds: float = 0.0
    """of one seed's training and measuring, mean over the seeds; those for choosing are not in it"""

    @property
    def measures(self) -> set[str]:
        """Names of all that was measured."""
        models = [model for of in self.values.values() for model in of.values()]
        return {name for model in models for metrics in model.values() for name in metrics}


@dataclass(frozen=True)
class ComparisonRow:
    """One arm by one metric: means over the seeds, and standard deviations between them (None of a single seed)."""

    arm: str
    metric: str
    own: float
    """mean over participants, each with the model it would use and on its own texts"""
    own_sd: float | None
    pooled: float
    """on everybody's texts together: a loss weighted by their completion tokens, all else by examples; where models are
    the participants' own, the mean over these models"""
    pooled_sd: float | None
    participants: dict[str, float]
    """each on its own texts"""
    participants_sd: dict[str, float | None]
    learning_rate: dict[str, float]
    examples_seen: int | None
    seconds: float


@dataclass(frozen=True)
class Gain:
    """By how much one arm is better than another; above 0 is better, whichever way the metric counts."""

    arm: str
    over: str
    metric: str
    on: str
    mean: float
    low: float | None
    """of the 95 % interval of the paired bootstrap; None where one seed and one participant give none"""
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        return table.gain_line(self)


class Comparison:
    """What `FederatedAveraging.compare` found.

    It shows itself as a table, in a notebook too; `rows` are the table's numbers, `to_pandas` has one row per arm,
    seed and participant, `to_json` everything, and `gain("federated", over="alone")` a difference with its interval.
    """

    def __init__(
        self,
        arms: Sequence[ArmResult],
        *,
        seeds: Sequence[int],
        weights: Mapping[str, Mapping[str, float]],
        rounds: int,
        unit: str,
        grid: Sequence[float] = (),
        minimize: Sequence[str] = (LOSS,),
        undirected: Sequence[str] = (),
        centralised: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.arms = {arm.name: arm for arm in arms}
        self.seeds, self.rounds = tuple(seeds), rounds
        self.weights = {name: dict(found) for name, found in weights.items()}
        """participant → what its held-out texts count in the pool: "loss" (completion tokens), "examples" (all else)"""
        self.unit, self.grid, self.minimize = unit, tuple(grid), tuple(minimize)
        self.undirected = tuple(undirected)
        """metrics of which nobody said whether more or less is better: they have values and no gains"""
        self.notes = tuple(notes)
        self._centralised = centralised

    @property
    def participants(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.weights)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What was measured, the loss first."""
        found = {name for arm in self.arms.values() for name in arm.measures}
        return tuple(sorted(found, key=lambda name: (name != LOSS, name)))

    @property
    def rows(self) -> list[ComparisonRow]:
        """One for each metric and arm that has it, in the order in which arms were given."""
        return [self._row(arm, m) for m in self.metrics for arm in self.arms.values() if self._has(arm, m)]

    def gain(self, arm: str, over: str, *, metric: str | None = None, on: On = "own") -> Gain:
        """How much better `arm` is than another, mean over seeds and participants, with a 95 % interval.

        The interval is a paired bootstrap of 2,000 resamples, in which seeds and participants are drawn anew, each for
        itself (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111): it says what other seeds and other participants
        like these might have shown. Of few participants it is rough. "centralised" means the one of both batch sizes
        that was better on the validation part.

        Args:
            arm: Its name.
            over: The other's.
            metric: By default the first of `metrics`.
            on: "own" texts of each participant, or those of all, "pooled".

        Raises:
            ConfigError: There is no such arm or metric, one of the arms does not have it, or nobody said which way is
                better by it.
        """
        if on not in get_args(On):
            msg = f"on is 'own' (each participant's texts) or 'pooled' (everybody's), got {on!r:.80}."
            raise ConfigError(msg)
        first, second = self._named(arm), self._named(over)
        metric = metric or next((m for m in self.metrics if self._has(first, m) and self._has(second, m)), LOSS)
        for each in (first, second):
            if not self._has(each, metric):
                msg = f"the arm {each.name!r} was not measured by {metric!r:.80}. Metrics: {', '.join(self.metrics)}."
                raise ConfigError(msg)
        if metric in self.undirected:
            msg = (
                f"nobody said which way is better by {metric!r:.80}. Write Metric(…, maximize=True), or maximize=False."
            )
            raise ConfigError(msg)
        sign = -1.0 if metric in self.minimize else 1.0
        difference = sign * (self._matrix(first, metric) - self._matrix(second, metric))  # (S, P, P)
        if on == "own":
            own = difference.diagonal(dim1=1, dim2=2)
            mean, found = float(own.mean()), bootstrap.interval(own)
        else:
            weights = self._weights(metric)
            mean = float((difference @ (weights / weights.sum())).mean())
            found = bootstrap.interval(difference, weights)
        low, high = found or (None, None)
        return Gain(first.name, second.name, metric, on, mean, low, high)

    def gains(self) -> list[Gain]:
        """Those that a reader asks for first: federated over all others, personal over alone and over federated."""
        pairs = [(FEDERATED, other) for other in self.arms if other not in (FEDERATED, PERSONAL)]
        pairs += [(PERSONAL, other) for other in (ALONE, FEDERATED)]
        there = [(self.arms[a], self.arms[b]) for a, b in pairs if a in self.arms and b in self.arms]
        return [
            self.gain(first.name, second.name, metric=metric, on=on)
            for metric in self.metrics
            if metric not in self.undirected
            for first, second in there
            if self._has(first, metric) and self._has(second, metric)
            for on in get_args(On)
        ]

    # --- forms ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return table.as_text(self)

    def _repr_html_(self) -> str:
        return table.as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "rounds": self.rounds,
            "seeds": list(self.seeds),
            "participants": self.weights,
            "unit": self.unit,
            "grid": list(self.grid),
            "rows": [asdict(row) for row in self.rows],
            "gains": [asdict(gain) for gain in self.gains()],
            "arms": [asdict(arm) for arm in self.arms.values()],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite, which JSON has not, are null."""
        return json.dumps(finite(self.to_dict()), indent=1, allow_nan=False)

    def to_pandas(self) -> pd.DataFrame:
        """One row per arm, seed, participant and metric: `own` and `pooled` values of the model that it would use.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(f"to_pandas needs pandas: {install('plot', 'pandas')}") from error  # noqa: EM102
        rows = []
        for row in self.rows:
            matrix, weights = self._matrix(self.arms[row.arm], row.metric), self._weights(row.metric)
            pooled = matrix @ (weights / weights.sum())
            for s, seed in enumerate(self.seeds):
                for p, name in enumerate(self.participants):
                    values = {"own": float(matrix[s, p, p]), "pooled": float(pooled[s, p])}
                    place = {"arm": row.arm, "seed": seed, "participant": printable(name), "metric": row.metric}
                    rows.append(place | values)
        return pd.DataFrame(rows)

    # --- numbers ----------------------------------------------------------------------------------------------------

    def _named(self, arm: str) -> ArmResult:
        if arm == CENTRALISED and arm not in self.arms and self._centralised is not None:
            arm = self._centralised
        if arm not in self.arms:
            msg = f"there is no arm {arm!r:.80} in this comparison. Arms: {', '.join(self.arms)}."
            raise ConfigError(msg)
        return self.arms[arm]

    def _has(self, arm: ArmResult, metric: str) -> bool:
        measured = [of for models in arm.values.values() for texts in models.values() for of in texts.values()]
        return bool(measured) and all(metric in of for of in measured)

    def _weights(self, metric: str) -> Tensor:
        kind = LOSS if metric == LOSS else "examples"
        return torch.tensor([found[kind] for found in self.weights.values()], dtype=torch.float64)

    def _matrix(self, arm: ArmResult, metric: str) -> Tensor:
        """`(seeds, participants, participants)`: the model that a participant would use, on each one's texts."""
        found = []
        for seed in self.seeds:
            models = arm.values[seed]
            own = [models.get(name, models.get(ALL, {})) for name in self.participants]
            found.append([[texts[q][metric] for q in self.participants] for texts in own])
        return torch.tensor(found, dtype=torch.float64)

    def _row(self, arm: ArmResult, metric: str) -> ComparisonRow:
        matrix = self._matrix(arm, metric)
        own = matrix.diagonal(dim1=1, dim2=2)  # (S, P)
        weights = self._weights(metric)
        pooled = (matrix @ (weights / weights.sum())).mean(1)  # (S,)
        each = {name: own[:, p].tolist() for p, name in enumerate(self.participants)}
        return ComparisonRow(
            arm=arm.name,
            metric=metric,
            own=float(own.mean()),
            own_sd=_sd(own.mean(1).tolist(), arm),
            pooled=float(pooled.mean()),
            pooled_sd=_sd(pooled.tolist(), arm),
            participants={name: statistics.fmean(values) for name, values in each.items()},
            participants_sd={name: _sd(values, arm) for name, values in each.items()},
            learning_rate=arm.learning_rate,
            examples_seen=arm.examples_seen,
            seconds=arm.seconds,
        )


def _sd(values: Sequence[float], arm: ArmResult) -> float | None:
    """Between seeds; an arm that no seed decides has none."""
    if len(values) < 2 or arm.examples_seen == 0 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)
