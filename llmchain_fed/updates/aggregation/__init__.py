"""The server rules by name.

Knows which rules there are and what each promises. How they compute stands in `mean`, `fednova` and `lora`.

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
| flexlora | stack, cut to rank r by SVD | r_k(m+n) | r_k(m+n) | if r ≥ Σ r_k, else nearest | 2402.11505 |
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from llmchain_fed.errors import ConfigError
from llmchain_fed.updates.aggregation import lora
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.aggregation.fednova import FedNova
from llmchain_fed.updates.aggregation.mean import RunningMean
from llmchain_fed.updates.collection import Collection
from llmchain_fed.updates.lora_layout import Part

__all__ = ["AGGREGATIONS", "RunningMean", "Weighting", "make_aggregation"]

Weighting = Literal["examples", "tokens", "equal"]

_rule = partial(Rule, own=False)
_lora = partial(_rule, lora=True)
_mean = partial(_lora, collection=RunningMean, summable=True)
_stacking = partial(_lora, keeps_updates=True, keeps_product=True)


def _only_b(_: int) -> Part:
    return "B"


def _turn(number: int) -> Part:
    return "A" if number % 2 else "B"


AGGREGATIONS: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        _rule("fedavg", RunningMean, summable=True),
        _rule("fednova", FedNova),
        _mean("fedit"),
        _mean("ffa", trains=_only_b, shares=_only_b),
        _mean("rolora", trains=_turn, shares=_turn),
        _mean("fedsa", shares=lambda _: "A", personal=True),
        _mean("fedsvd", trains=_only_b, shares=_only_b, refactor=lora.orthonormal, regauges=True),
        _stacking("fedex", lora.FedEx, remainder_rank=lambda ranks: sum(ranks[1:])),
        _stacking("flora", lora.FLoRA, regauges=True, restarts=True, remainder_rank=sum, mixed_ranks=True),
        _stacking("flexlora", lora.FlexLoRA, regauges=True, mixed_ranks=True),
    )
}


def make_aggregation(choice: str | Collection | Rule) -> Rule:
    """The rule of that name, or one around a collection: it declares nothing but `summable`, where that says so.

    Raises:
        ConfigError: Unknown; the valid names are listed.
    """
    if isinstance(choice, Rule):
        return choice
    valid = ", ".join(sorted(AGGREGATIONS))
    if isinstance(choice, str) and choice in AGGREGATIONS:
        return AGGREGATIONS[choice]
    if isinstance(choice, Collection):
        name = str(getattr(choice, "name", type(choice).__name__))
        return Rule(name, lambda: choice, summable=getattr(choice, "summable", False) is True)
    if isinstance(choice, str):
        msg = f"unknown aggregation {choice!r}. Valid: {valid}, a Collection or a Rule."
        raise ConfigError(msg)
    msg = f"aggregation is a name ({valid}), a Collection with zero, add and finish, or a Rule, got {choice!r:.80}."
    raise ConfigError(msg)
