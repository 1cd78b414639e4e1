"""Experiment: which trials a comparison is made of, which learning rate each arm gets, and what is said meanwhile.

Knows arms, seeds, a grid and a store of finished trials. Knows nothing about how a trial trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmchain_fed.data.examples import read_examples
from llmchain_fed.errors import ConfigError, NonFiniteLossError
from llmchain_fed.federated.comparison import rows
from llmchain_fed.federated.comparison.arms import (
    ALONE,
    BASE,
    CENTRALISED,
    LOSS,
    PERSONAL,
    Arm,
    name_of,
)
from llmchain_fed.federated.comparison.measuring import Values
from llmchain_fed.federated.comparison.results import ArmResult, Comparison
from llmchain_fed.federated.comparison.store import Store
from llmchain_fed.federated.comparison.trials import ALL, Bench, Trial, TrialResult
from llmchain_fed.federated.reporting.lines import span

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """An arm as it is trained: the centralised one at one batch size, the one of all who are alone by one of them."""

    arm: str
    participant: str | None = None
    batch_size: int | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.arm}, batch {self.batch_size}" if self.batch_size is not None else self.arm

    def trial(self, seed: int, lr: float | None, *, choosing: bool = False) -> Trial:
        """It, with a seed and a learning rate."""
        return Trial(self.arm, seed, lr, self.participant, self.batch_size, choosing)


@dataclass
class Experiment:
    """A comparison that is run."""

    bench: Bench
    arms: Sequence[str | Arm]
    seeds: Sequence[int]
    grid: Sequence[float]
    store: Store
    say: Say
    notes: list[str] = field(default_factory=list)
    _ends: dict[str, list[str]] = field(default_factory=dict)
    """whose learning rate is the grid's smallest, or largest"""
    _done: int = 0
    _of: int = 0

    def run(self) -> Comparison:
        """All trials that are not finished yet, and what all of them show.

        Raises:
            LLMChainFedError: What an arm raises; finished trials are kept.
        """
        self._announce()
        results: list[ArmResult] = []
        scores: dict[str, float] = {}
        for arm in self.arms:
            if isinstance(arm, Arm):
                results.append(self._own(arm))
                continue
            for title, variants in self._titled(arm).items():
                result, score = self._measured(title, variants)
                results.append(result)
                scores[title] = score
        config, clients = self.bench.training, self.bench.clients
        own = {arm.name for arm in self.arms if isinstance(arm, Arm)}
        less = {m for arm in self.arms if isinstance(arm, Arm) for m in arm.minimize}
        names = {m for each in results if each.name not in own for m in each.measures} - {LOSS}
        directions = self.bench.directions(sorted(names)) | dict.fromkeys(less, False)
        if any(name_of(arm) == PERSONAL for arm in self.arms) and self.bench.rounds == 1:
            self.notes.append("personal: of one round, the last is each participant's own, so it is alone's training")
        for end, who in self._ends.items():
            self.notes.append(
                f"best at the grid's {end} learning rate, beyond which there may be a better one: {'; '.join(who)}"
            )
        return Comparison(
            results,
            seeds=self.seeds,
            weights={
                n: {LOSS: rows.weight_of(held_out, clients[n].config), "examples": len(held_out)}
                for n, held_out in self.bench.held_out.items()
            },
            rounds=self.bench.rounds,
            unit="nats per example" if config.loss == "labels" else "nats per token",
            grid=self.grid,
            minimize=(LOSS, *(m for m, more in directions.items() if more is False)),
            undirected=[m for m, more in directions.items() if more is None],
            centralised=_better({t: score for t, score in scores.items() if t.startswith(CENTRALISED)}),
            notes=self.notes,
        )

    # --- which trials -----------------------------------------------------------------------------------------------

    def _titled(self, arm: str) -> dict[str, list[Variant]]:
        """The table's rows of an arm, and what is trained for each."""
        if arm == ALONE:
            return {arm: [Variant(arm, participant=name) for name in self.bench.clients]}
        if arm == CENTRALISED:
            one = self.bench.training.batch_size
            sizes = dict.fromkeys((one, one * len(self.bench.clients)))
            found = [Variant(arm, batch_size=size) for size in sizes]
            return {variant.title: [variant] for variant in found}
        return {arm: [Variant(arm)]}

    def _choices(self, variant: Variant) -> list[Trial]:
        if variant.arm == BASE or len(self.grid) < 2:
            return []
        return [variant.trial(self.seeds[0], lr, choosing=True) for lr in self.grid]

    def _announce(self) -> None:
        """Arms × seeds × seconds, before the first trial."""
        titled = {t: v for arm in self.arms if not isinstance(arm, Arm) for t, v in self._titled(arm).items()}
        trained = {title: variants for title, variants in titled.items() if variants[0].arm != BASE}
        choosing = len(self.grid) if len(self.grid) > 1 else 0
        per_arm = len(self.seeds) + choosing
        self._of = per_arm * sum(map(len, trained.values()))
        others = [arm.name for arm in self.arms if isinstance(arm, Arm)]
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        rates = f" and {choosing} learning rates on a validation part" if choosing else ""
        self.say(f"compare: {'; '.join([*titled, *others])}: {len(trained)} trained × {seeds}{rates}")
        seconds = self.bench.seconds_of_training() if trained else None
        if seconds is not None:
            kept = f"; what is kept in {self.store.folder} is not run again" if self.store.folder is not None else ""
            self.say(
                f"compare: {len(trained)} arms × {per_arm} trainings × {seconds:.1f} s (the plan's): about "
                f"{span(len(trained) * per_arm * seconds)} of training, and measuring{kept}"
            )

    # --- running ----------------------------------------------------------------------------------------------------

    def _measured(self, title: str, variants: Sequence[Variant]) -> tuple[ArmResult, float]:
        """One row of the table; and its score on the validation part, infinite where nothing was chosen."""
        chosen, score = {}, math.inf
        for variant in variants:
            lr, score = self._chosen(variant)
            if lr is not None:
                chosen[variant.participant or ALL] = lr
        values: dict[int, dict[str, Values]] = {seed: {} for seed in self.seeds}
        seconds = 0.0
        for seed in self.seeds if variants[0].arm != BASE else self.seeds[:1]:
            for variant in variants:
                outcome = self._outcome(variant.trial(seed, chosen.get(variant.participant or ALL)))
                if outcome.diverged is not None:
                    msg = (
                        f"the arm {title!r} diverged with seed {seed}: {outcome.diverged} Give compare a smaller grid=."
                    )
                    raise NonFiniteLossError(msg)
                values[seed] |= outcome.values
                seconds += outcome.seconds
        if variants[0].arm == BASE:
            values = dict.fromkeys(self.seeds, values[self.seeds[0]])
        seen = sum(self.bench.examples_seen(v.trial(self.seeds[0], None)) for v in variants)
        trained = 1 if variants[0].arm == BASE else len(self.seeds)
        return ArmResult(title, values, chosen, seen, seconds / trained), score

    def _chosen(self, variant: Variant) -> tuple[float | None, float]:
        """The learning rate that was best on the validation part, and how good it was."""
        if variant.arm == BASE:
            return None, math.inf
        trials = self._choices(variant)
        if not trials:
            return self.grid[0], math.inf
        if not self.bench.validation:
            msg = (
                "no participant has two different examples to set a validation part apart from, by which a learning "
                "rate could be chosen. Give grid=[one learning rate]."
            )
            raise ConfigError(msg)
        scores = {trial.lr: self._score(variant, self._outcome(trial)) for trial in trials}
        best = min(scores, key=scores.__getitem__)
        who = f"{variant.title} ({variant.participant})" if variant.participant is not None else variant.title
        if not math.isfinite(scores[best]):
            msg = f"the arm {who!r} diverged with every learning rate of {list(self.grid)}. Give compare smaller ones."
            raise NonFiniteLossError(msg)
        assert best is not None
        if best in (min(self.grid), max(self.grid)):
            end = "smallest" if best == min(self.grid) else "largest"
            self._ends.setdefault(end, []).append(who)
        return best, scores[best]

    def _score(self, variant: Variant, outcome: TrialResult) -> float:
        """The validation loss: each one's own of an arm of own models, else of all together."""
        if outcome.diverged is not None:
            return math.inf
        validation, clients = self.bench.validation, self.bench.clients
        weights = {n: rows.weight_of(data, clients[n].config) for n, data in validation.items()}

        def pooled(values: Values) -> float:
            return sum(weights[n] * values[n][LOSS] for n in weights) / sum(weights.values())

        losses = []
        for owner, values in outcome.values.items():
            own = variant.arm in (ALONE, PERSONAL) and owner in values
            losses.append(values[owner][LOSS] if own else pooled(values))
        found = sum(losses) / len(losses)
        return found if math.isfinite(found) else math.inf

    def _outcome(self, trial: Trial) -> TrialResult:
        """What a trial gave: kept, or run now and kept."""
        outcome = self.store.get(trial)
        if outcome is None:
            outcome = self.bench.run(trial)
            self.store.put(trial, outcome)
        if trial.arm != BASE:
            self._done += 1
            who = f" ({trial.participant})" if trial.participant is not None else ""
            at = f" at batch {trial.batch_size}" if trial.batch_size is not None else ""
            step = "choosing, " if trial.choosing else ""
            self.say(
                f"compare: {self._done} of {self._of}: {trial.arm}{who}{at}, {step}seed {trial.seed}, learning rate "
                f"{trial.lr:g}: {'diverged' if outcome.diverged else span(outcome.seconds)}"
            )
        return outcome

    def _own(self, arm: Arm) -> ArmResult:
        values: dict[int, dict[str, Values]] = {}
        seconds = 0.0
        for seed in self.seeds:
            trial = Trial(arm.name, seed, code=arm.code)
            outcome = self.store.get(trial)
            if outcome is None:
                began = time.perf_counter()
                train, held_out = raw_examples(self.bench)
                found = arm.measured(train, held_out, seed)
                outcome = TrialResult({ALL: found}, time.perf_counter() - began)
                self.store.put(trial, outcome)
                self.say(f"compare: {arm.name}, seed {seed}: {span(outcome.seconds)}")
            values[seed] = outcome.values
            seconds += outcome.seconds
        return ArmResult(arm.name, values, {}, None, seconds / len(self.seeds))


def _better(scores: Mapping[str, float]) -> str | None:
    """The arm with the lowest score, or the only one; None where nothing tells two apart."""
    known = {title: score for title, score in scores.items() if math.isfinite(score)}
    if known:
        return min(known, key=known.__getitem__)
    return next(iter(scores)) if len(scores) == 1 else None


def raw_examples(bench: Bench) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Each participant's training and held-out examples as they are read, for a function of a user's own.

    Raises:
        ConfigError: They were a generator, which gives nothing a second time.
    """
    sides: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
    for name, client in bench.clients.items():
        for side, source in zip(sides, (client.participant.examples, client.participant.held_out), strict=True):
            if isinstance(source, Iterator):
                msg = f"the examples of {name!r} are a generator, and an arm of your own reads them again. Pass a list."
                raise ConfigError(msg)
            side[name] = [e for e in read_examples(source, client.target.prompt) if not e.empty]
    return sides


def about(
    bench: Bench, decisive: Mapping[str, Any], contract: Mapping[str, Any], start: str, share: float
) -> dict[str, Any]:
    """What decides the results of a comparison, as JSON; arms, seeds and learning rates may grow.

    Args:
        bench: With the participants' examples.
        decisive: The federation's options.
        contract: Base, adapter, prompt, tokenizer and version, as digests.
        start: The digest of the weights that all arms start from.
        share: That is set apart for choosing.
    """
    options = {k: v for k, v in decisive.items() if k not in ("seed", "training")}
    training = {k: v for k, v in (decisive.get("training") or {}).items() if k not in ("seed", "learning_rate")}
    own = {n: repr(c.config.replace(seed=0, learning_rate=1.0)) for n, c in bench.clients.items()}
    return {
        "participants": {n: [rows.digest_of(bench.data[n]), rows.digest_of(bench.held_out[n])] for n in bench.clients},
        "contract": dict(contract),
        "start": start,
        "options": options,
        "training": training,
        "participants' training": own,
        "metrics": bench.measured_by,
        "chain": bench.identity(),
        "rounds": bench.rounds,
        "validation": share,
    }
