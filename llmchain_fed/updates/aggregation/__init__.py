"""The server rules by name.

Knows which rules there are and what each promises. How they compute stands in `running_mean` and `lora_rules`.

For a layer W (m, n) with LoRA factors B (m, r) and A (r, n), K participants, values per participant and round:

| name | server rule | uplink | downlink | exact | paper (arXiv) |
|---|---|---|---|---|---|
| fedavg | every tensor ← its mean | all | all | full weights: yes; LoRA: as fedit | 1602.05629 |
| fednova | w + τ_eff · Σ p_k (w_k − w)/τ_k | all | all | as fedavg | 2007.07481 |
| fedit | A ← Ā, B ← B̄ | r(m+n) | r(m+n) | no: the baseline | 2305.05644 |
| ffa | A stays at its start, B ← B̄ | rm | rm | yes | 2403.12313 |
| rolora | odd rounds B ← B̄, even rounds A ← Ā | rm or rn | as the uplink before | yes | 2409.02346 |
| fedsa | A ← Ā; every participant keeps its own B | rn | rn | no common product | 2410.01463 |
| fedsvd | B ← B̄, then B·A = USVᵀ: A ← Vᵀ, B ← US | rm | r(m+n) | yes | 2505.12805 |
| fedex | A ← Ā, B ← B̄, rest to a frozen remainder | r(m+n) | r(m+n) + (K−1)r(m+n) | yes | 2410.09432 |
| flora | stack to the remainder, LoRA anew | r_k(m+n) | rn + Σr_k(m+n) | yes, also mixed ranks | 2409.05976 |
| flexlora | stack, cut to rank r by SVD | r_k(m+n) | r_k(m+n) | if r holds Σ r_k, else nearest | 2402.11505 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.updates.aggregation import lora
from llmchain_fed.updates.aggregation.base import Accumulator, Aggregation, Combined, Contribution, Plain, Round, Rule
from llmchain_fed.updates.aggregation.mean import RunningMean, weighted_average
from llmchain_fed.updates.server_optimizers.state import check_names, check_tensors

__all__ = [
    "AGGREGATIONS",
    "Accumulator",
    "Aggregation",
    "FedNova",
    "RunningMean",
    "Weighting",
    "make_aggregation",
    "weighted_average",
]

Weighting = Literal["examples", "tokens", "equal"]


class FedNova:
    """w + τ_eff · Σ p_k (w_k − w)/τ_k with τ_eff = Σ p_k τ_k: who takes more steps does not pull harder.

    arXiv 2007.07481, whose τ_k counts steps of plain SGD; for other optimizers it is the same normalisation by the
    number of steps. With equal step counts it is FedAvg.
    """

    def __init__(self, round_: Round) -> None:
        self._state = round_.state
        self._mean = RunningMean()
        self._steps = 0.0
        self._total = 0.0

    def check(self, given: Contribution) -> None:
        """Makes sure that a participant's change can be divided by its steps.

        Raises:
            FederationError: It does not say how many they were.
        """
        if given.steps is None or given.steps < 1:
            msg = (
                f"fednova divides by local steps, and the update says {given.steps!r}. Its participant must count them."
            )
            raise FederationError(msg)

    def add(self, given: Contribution) -> None:
        """Takes in one participant's change per step."""
        self.check(given)
        assert given.steps is not None
        changes = {n: (t.float() - self._state[n].float()) / given.steps for n, t in given.tensors.items()}
        self._mean.add(changes, given.weight)
        self._steps += given.steps * given.weight
        self._total += given.weight

    def combine(self) -> Combined:
        """The normalised mean, added to where the round began."""
        change, tau = self._mean.result(), self._steps / max(self._total, 1e-300)
        return Combined({n: (self._state[n].float() + tau * c).to(self._state[n].dtype) for n, c in change.items()})


class _Own(Plain):
    """Lets an accumulator of a user's own collect, and makes sure that what it says are tensors of the model."""

    def __init__(self, name: str, accumulator: Any, state: Mapping[str, Tensor]) -> None:
        if not all(callable(getattr(accumulator, method, None)) for method in ("add", "result")):
            msg = f"aggregation {name!r:.80}: start() returns an object with add and result, got {accumulator!r:.80}."
            raise ConfigError(msg)
        super().__init__(accumulator)
        self._name, self._state = name, state

    def combine(self) -> Combined:
        combined = super().combine()
        check_tensors(f"aggregation {self._name!r:.80}", combined.values)
        check_names(self._state, combined.values)
        return combined


def _mean(_: Round) -> Plain:
    return Plain(RunningMean())


AGGREGATIONS: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("fedavg", _mean),
        Rule("fednova", FedNova),
        Rule("fedit", _mean, lora=True),
        Rule("ffa", _mean, trains=lambda _: "B", shares=lambda _: "B", lora=True, exact=True),
        Rule(
            "rolora",
            _mean,
            trains=lambda number: "A" if number % 2 else "B",
            shares=lambda number: "A" if number % 2 else "B",
            lora=True,
            exact=True,
        ),
        Rule("fedsa", _mean, shares=lambda _: "A", lora=True, personal=True),
        Rule(
            "fedsvd",
            _mean,
            trains=lambda _: "B",
            shares=lambda _: "B",
            refactor=lora.orthonormal,
            lora=True,
            exact=True,
            regauges=True,
        ),
        Rule("fedex", lora.FedEx, lora=True, exact=True, linear=False),
        Rule("flora", lora.FLoRA, lora=True, exact=True, linear=False, regauges=True, mixed_ranks=True),
        Rule("flexlora", lora.FlexLoRA, lora=True, linear=False, regauges=True, mixed_ranks=True),
    )
}


def make_aggregation(choice: str | Aggregation | Rule) -> Rule:
    """The rule of that name, or one around the object.

    Raises:
        ConfigError: Unknown; the valid names are listed.
    """
    if isinstance(choice, Rule):
        return choice
    valid = ", ".join(sorted(AGGREGATIONS))
    if isinstance(choice, str):
        if choice not in AGGREGATIONS:
            msg = f"unknown aggregation {choice!r}. Valid: {valid}, or an object with start()."
            raise ConfigError(msg)
        return AGGREGATIONS[choice]
    start: Any = getattr(choice, "start", None)
    if not callable(start):
        msg = f"aggregation is a name ({valid}) or an object with start(state), got {choice!r}."
        raise ConfigError(msg)

    name = str(getattr(choice, "name", type(choice).__name__))

    def begin(round_: Round) -> Plain:
        copies = {n: t.clone() for n, t in round_.state.items()}  # the state itself is what participants are sent
        return _Own(name, start(copies), round_.state)

    return Rule(name, begin)
