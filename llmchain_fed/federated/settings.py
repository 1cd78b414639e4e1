"""Settings: the options that decide how a federation goes on, checked one by one and against each other.

Knows what each option may be. Knows nothing about how rounds are run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated import compatibility
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.personalization import Ditto
from llmchain_fed.federated.options import checked_quorum, checked_waiting, sample_size
from llmchain_fed.model.adapters import GLOBAL
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation import Weighting, make_aggregation
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.aggregation.weight_share import checked_share
from llmchain_fed.updates.codecs import make_codec, spec
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.serialization import describe
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer, ServerOptimizer
from llmchain_fed.updates.transforms import UpdateTransform


@dataclass(frozen=True)
class Settings:
    """What decides how a federation goes on, besides its data."""

    rule: Rule
    layout: LoraLayout | None
    training: TrainingConfig
    weighting: Weighting
    codec: Codec | None
    broadcast_codec: Codec | None
    server_optimizer: ServerOptimizer | None
    personal: Ditto | None
    per_round: int | float | None
    quorum: int
    deadline: float | None
    retries: int
    seed: int
    max_weight_share: float | None = None
    transforms: tuple[UpdateTransform, ...] = ()


def make_settings(
    model: LocalModel, training: TrainingConfig, peers: Iterable[Client], available: int, **given: Any
) -> Settings:
    """The settings, if they make sense for this model and these participants.

    Args:
        model: What is trained.
        training: How participants train.
        peers: Participants of this process, who may have options of their own.
        available: How many participants there are.
        **given: The other options of `FederatedAveraging`, by its names.

    Raises:
        ConfigError: One is out of range, or two contradict each other.
    """
    if model.adapter not in (None, GLOBAL):
        msg = (
            f"this chain answers with the adapter {model.adapter!r}, and a federation trains the chain's own. Pass the "
            "chain itself; personalize() makes adapters for participants."
        )
        raise ConfigError(msg)
    rule, layout = make_aggregation(given["aggregation"]), LoraLayout.of(model)
    optimizer, personal, weighting = given["server_optimizer"], given["personal"], given["weighting"]
    server_optimizers.check(optimizer)
    if weighting not in ("examples", "tokens", "equal"):
        msg = f"weighting is 'examples', 'tokens' or 'equal', got {weighting!r}."
        raise ConfigError(msg)
    if personal is not None and not isinstance(personal, Ditto):
        msg = f"personal is Ditto(lam=…) or None, got {personal!r}."
        raise ConfigError(msg)
    deadline, retries = checked_waiting(given["deadline"], given["retries"])
    codec, broadcast_codec = make_codec(given["codec"]), make_codec(given["broadcast_codec"])
    for choice in (codec, broadcast_codec):
        spec(choice)  # refuses what could not be named to participants
    configs = [training]
    for peer in peers:
        if peer.participant.name == GLOBAL and (rule.personal or personal is not None):
            msg = f"no participant can have personal models as {GLOBAL!r}: that is the federation's own adapter."
            raise ConfigError(msg)
        compatibility.check_rank(rule, peer.participant.name, peer.participant.rank, layout)
        configs.append(peer.config)
    compatibility.check(
        rule,
        layout,
        codec=codec,
        broadcast_codec=broadcast_codec,
        server_optimizer=optimizer,
        ditto=personal,
        training=configs,
        transforms=given["transforms"],
        model=describe(model.trainable_parameters()),
        max_weight_share=given["max_weight_share"],
    )
    per_round = given["participants_per_round"]
    return Settings(
        rule=rule,
        layout=layout,
        training=training,
        weighting=weighting,
        codec=codec,
        broadcast_codec=broadcast_codec,
        # its own copy: the memory of another federation, or of a run before, must not move this one's weights
        server_optimizer=copy.deepcopy(optimizer) if isinstance(optimizer, ResumableServerOptimizer) else optimizer,
        personal=personal,
        per_round=per_round,
        quorum=checked_quorum(given["quorum"], sample_size(per_round, available), available),
        deadline=deadline,
        retries=retries,
        seed=given["seed"],
        max_weight_share=checked_share(given["max_weight_share"]),
        transforms=given["transforms"],
    )
