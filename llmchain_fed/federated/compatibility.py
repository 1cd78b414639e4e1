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

A transform that carries something from round to round goes where error feedback goes: not with fedsvd, flora, flexlora.
One that needs a sum goes with the rules that say they are summable: fedavg, fedit, ffa, rolora, fedsa, fedsvd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.settings import Settings
from llmchain_fed.model.adapters.switching import GLOBAL
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.updates.aggregation import AGGREGATIONS
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.codecs import CODECS
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.server_optimizers.adaptive import Reptile
from llmchain_fed.updates.transforms.base import UpdateTransform

_SUMMABLE = [name for name, rule in AGGREGATIONS.items() if rule.summable]
_MIXED = [repr(name) for name, rule in AGGREGATIONS.items() if rule.mixed_ranks]
_LINEAR = [
    name for name, rule in AGGREGATIONS.items() if rule.lora and rule.summable and not (rule.regauges or rule.personal)
]


def check(settings: Settings, training: Sequence[TrainingConfig], model: Mapping[str, TensorInfo]) -> None:
    """Makes sure that a federation's options agree, before anything starts, with each participant's training too.

    Raises:
        ConfigError: Two do not go together; the reason is given.
    """
    rule, server_optimizer = settings.rule, settings.server_optimizer
    rule.check(settings.layout)
    name = rule.name
    if server_optimizer is not None and rule.keeps_product:
        _refuse(
            f"aggregation={name!r} and a server optimizer",
            "it would move A and B apart, and their product would no longer be the participants' mean",
            f"Leave server_optimizer out, or use a rule that is linear: {', '.join(_LINEAR)}",
        )
    if server_optimizer is not None and rule.regauges and not isinstance(server_optimizer, Reptile):
        _refuse(
            f"aggregation={name!r} and {server_optimizer!r:.60}",
            "it writes the factors anew every round, so a momentum of the round before points elsewhere",
            "Use Reptile(step_size=…), which keeps none, or leave server_optimizer out",
        )
    _check_codecs(rule, settings.codec, settings.broadcast_codec)
    if any(config.keep_optimizer for config in training) and (rule.regauges or rule.alternates):
        _refuse(
            f"aggregation={name!r} and keep_optimizer",
            "the kept moments belong to the factors of the round before, which are others now",
            "Leave keep_optimizer out",
        )
    if settings.config.personal is not None:
        _check_ditto(rule, settings.layout)
    for transform in settings.transforms:
        _check_transform(transform, rule, model)
    _check_payload(settings, model)


def _check_codecs(rule: Rule, codec: Codec | None, broadcast_codec: Codec | None) -> None:
    name = rule.name
    if codec is not None and rule.regauges and codec.needs_feedback:
        _refuse(
            f"aggregation={name!r} and codec={codec.name!r}",
            "it writes the factors anew every round, so what a codec left out in one round means nothing in the next, "
            "and error feedback cannot bring it back",
            f"Use {' or '.join(name for name, made in CODECS.items() if not made().needs_feedback)}",
        )
    if broadcast_codec is not None and (rule.regauges or rule.keeps_product):
        why = "it writes the factors anew every round, so coding their change would blur the whole model"
        if not rule.regauges:
            why = "it takes the global factors from participants, who never saw what the codec had left out"
        _refuse(
            f"aggregation={name!r} and broadcast_codec={broadcast_codec.name!r}",
            why,
            "Leave broadcast_codec out; codec= for updates is fine",
        )


def _check_payload(settings: Settings, model: Mapping[str, TensorInfo]) -> None:
    rule, codec, transforms = settings.rule, settings.codec, settings.transforms
    asked = rule.collection().payload(model) is not None
    if asked and codec is not None:
        _refuse(
            f"aggregation={rule.name!r} and codec={codec.name!r}",
            "the rule asks for a payload of its own, which no codec makes",
            "Leave codec out",
        )
    if settings.config.max_weight_share is not None and (asked or any(transform.needs_sum for transform in transforms)):
        _refuse(
            "max_weight_share and updates that are only summed",
            "a hub that sees no single update cannot cut the weight of one",
            "Leave max_weight_share out",
        )
    if transforms and asked is transforms[-1].keeps_names:
        wanted = "a payload of its own" if asked else "values" if codec is None else "a delta for the codec"
        _refuse(
            f"aggregation={rule.name!r} and transform {transforms[-1].name!r:.80} at the end",
            f"asked for is {wanted}, and the transform makes something else",
            "Use those that belong together",
        )


def _check_transform(transform: UpdateTransform, rule: Rule, model: Mapping[str, TensorInfo]) -> None:
    what = f"aggregation={rule.name!r} and transform {transform.name!r:.80}"
    if transform.needs_sum and not rule.summable:
        _refuse(
            what,
            "only the sum of its outcomes means something, and the rule does not say that a sum is all it needs",
            f"Use {_either(_SUMMABLE)}, or declare your own rule summable if it is",
        )
    if transform.carries(model) and rule.regauges:
        _refuse(
            what,
            "the rule writes the factors anew every round, so what the transform carries means nothing in the next one",
            f"Use {_either(_LINEAR)}",
        )


def _check_ditto(rule: Rule, layout: LoraLayout | None) -> None:
    what = f"aggregation={rule.name!r} and personal=Ditto(…)"
    if layout is None or layout.refused:
        _refuse(what, "personal models are LoRA adapters beside one base", "Give the chain a plain LoRA adapter")
    if rule.personal:
        _refuse(what, "its B is personal already", "Leave personal out: with_adapter(name) answers with it")
    if rule.regauges or rule.keeps_product:
        _refuse(
            what,
            "it rewrites the global factors or moves part of them into a remainder, so a personal model pulled towards "
            "them would be pulled to something else",
            f"Use {_either(_LINEAR)}, or fed.personalize() after the last round",
        )


def check_name(rule: Rule, ditto: Ditto | None, participant: str) -> None:
    """Makes sure that a participant's personal models, where it gets any, can have its name.

    Raises:
        ConfigError: It is that of the federation's own adapter.
    """
    if participant == GLOBAL and (rule.personal or ditto is not None):
        msg = f"no participant can have personal models as {GLOBAL!r}: that is the federation's own adapter."
        raise ConfigError(msg)


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
            f"factors of different shapes have no mean. Use {_either(_MIXED)}."
        )
        raise ConfigError(msg)
    if layout is None or layout.rank is None or rank > layout.rank:
        msg = (
            f"participant {participant!r} trains rank {rank}, the chain has "
            f"{layout.rank if layout else 'no LoRA'}: it must be the largest. Give the chain a LoraConfig of that rank."
        )
        raise ConfigError(msg)


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _refuse(what: str, why: str, remedy: str) -> None:
    msg = f"{what} do not go together: {why}. {remedy}."
    raise ConfigError(msg)
