"""Which options of a federation go together, and why the others do not.

Knows what rules, codecs, server optimizers and personal models promise. Knows nothing about how they work.

| | mixed ranks | update codec | broadcast codec | server optimizer | kept optimizer | Ditto | personalize |
|---|---|---|---|---|---|---|---|
| fedavg, fednova (full weights) | no | yes | yes | yes | yes | no: LoRA only | no: LoRA only |
| fedavg, fednova, fedit, ffa | no | yes | yes | yes | yes | yes | yes |
| rolora | no | yes | yes | yes | no | yes | yes |
| fedsa | no | yes | yes | yes | yes | no: B is personal | no |
| fedsvd | no | bf16, int8 | no | Reptile alone | no | no | yes |
| fedex | no | yes | no | no | yes | no | yes |
| flora, flexlora | yes | bf16, int8 | no | no | no | no | yes |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.options import Ditto
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.updates.aggregation.base import LoraLayout, Rule
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.server_optimizers import Reptile

_FINE = ("bf16", "int8")  # codecs precise enough to go without error feedback


def check(
    rule: Rule,
    layout: LoraLayout | None,
    *,
    codec: Codec | None,
    broadcast_codec: Codec | None,
    server_optimizer: Any,
    ditto: Ditto | None,
    training: Sequence[TrainingConfig],
) -> None:
    """Makes sure that a federation's options agree, before anything starts.

    Raises:
        ConfigError: Two do not go together; the reason is given.
    """
    rule.check(layout)
    name = rule.name
    if server_optimizer is not None and not rule.linear:
        _refuse(
            f"aggregation={name!r} and a server optimizer",
            "it would move A and B apart, and their product would no longer be the participants' mean",
            "Leave server_optimizer out, or use a rule that is linear: fedit, ffa, rolora",
        )
    if server_optimizer is not None and rule.regauges and not isinstance(server_optimizer, Reptile):
        _refuse(
            f"aggregation={name!r} and {server_optimizer!r:.60}",
            "it writes the factors anew every round, so a momentum of the round before points elsewhere",
            "Use Reptile(step_size=…), which keeps none, or leave server_optimizer out",
        )
    if codec is not None and rule.regauges and codec.name not in _FINE:
        _refuse(
            f"aggregation={name!r} and codec={codec.name!r}",
            "it writes the factors anew every round, so what a codec left out in one round means nothing in the next, "
            "and error feedback cannot bring it back",
            f"Use {' or '.join(_FINE)}",
        )
    if broadcast_codec is not None and (rule.regauges or not rule.linear):
        why = "it writes the factors anew every round, so coding their change would blur the whole model"
        if not rule.regauges:
            why = "it takes the global factors from participants, who never saw what the codec had left out"
        _refuse(
            f"aggregation={name!r} and broadcast_codec={broadcast_codec.name!r}",
            why,
            "Leave broadcast_codec out; codec= for updates is fine",
        )
    if any(config.keep_optimizer for config in training) and (rule.regauges or name == "rolora"):
        _refuse(
            f"aggregation={name!r} and keep_optimizer",
            "the kept moments belong to the factors of the round before, which are others now",
            "Leave keep_optimizer out",
        )
    if ditto is not None:
        _check_ditto(rule, layout)


def _check_ditto(rule: Rule, layout: LoraLayout | None) -> None:
    what = f"aggregation={rule.name!r} and personal=Ditto(…)"
    if layout is None or layout.refused:
        _refuse(what, "personal models are LoRA adapters beside one base", "Give the chain a plain LoRA adapter")
    if rule.personal:
        _refuse(what, "its B is personal already", "Leave personal out: with_adapter(name) answers with it")
    if rule.regauges or not rule.linear:
        _refuse(
            what,
            "it rewrites the global factors or moves part of them into a remainder, so a personal model pulled towards "
            "them would be pulled to something else",
            "Use fedit, ffa or rolora, or fed.personalize() after the last round",
        )


def check_rank(rule: Rule, participant: str, rank: int | None, layout: LoraLayout | None) -> None:
    """Makes sure that a participant's own rank fits.

    Raises:
        ConfigError: The rule takes no mixed ranks, or the rank is larger than the chain's.
    """
    if rank is None:
        return
    if not rule.mixed_ranks:
        msg = (
            f"participant {participant!r} trains rank {rank}, and aggregation={rule.name!r} needs one rank for all: "
            "factors of different shapes have no mean. Use 'flora' or 'flexlora'."
        )
        raise ConfigError(msg)
    if layout is None or layout.rank is None or rank > layout.rank:
        msg = (
            f"participant {participant!r} trains rank {rank}, the chain has "
            f"{layout.rank if layout else 'no LoRA'}: it must be the largest. Give the chain a LoraConfig of that rank."
        )
        raise ConfigError(msg)


def _refuse(what: str, why: str, remedy: str) -> None:
    msg = f"{what} do not go together: {why}. {remedy}."
    raise ConfigError(msg)
