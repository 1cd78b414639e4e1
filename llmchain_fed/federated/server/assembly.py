"""Assembly: a server, and this process's clients, out of what a user gives.

Knows which parts there are and which of the options each is given. Knows nothing about how they work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated import compatibility
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.global_state_cache import GlobalStateCache
from llmchain_fed.federated.participant import Participant, as_participants
from llmchain_fed.federated.runtime import checked_runtime
from llmchain_fed.federated.server.evaluation import Evaluator
from llmchain_fed.federated.server.server import Server
from llmchain_fed.federated.settings import (
    FederationConfig,
    FederationOptions,
    Settings,
    check_counts,
    config_of,
    training_of,
)
from llmchain_fed.federated.target import Target
from llmchain_fed.model.adapters import GLOBAL
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training import trainable
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.updates.aggregation import make_aggregation
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.serialization import describe
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer
from llmchain_fed.updates.transforms import checked_transforms


@dataclass(frozen=True)
class Assembled:
    """What a federation in this process consists of."""

    server: Server
    clients: dict[str, Client]
    client: Callable[[Participant], Client]
    """makes one for a participant who comes later"""


def assemble(model: Any, participants: Any, optimizer: Any, options: FederationOptions) -> Assembled:
    """The server and the clients of a federation, checked as a whole; see `FederatedAveraging` for what it raises."""
    training = training_of(options, optimizer)
    config = config_of(options, training)
    target = Target.of(model)
    trainable.admit(target.model)
    target.check_savable()
    trainable.check_batches(target.model, training.micro_batch_size or training.batch_size)
    states, transforms = GlobalStateCache(target.model), options.get("transforms") or ()

    def client(participant: Participant) -> Client:
        return Client(target, participant, training, global_states=states, transforms=transforms)

    named, runtime = as_participants(participants), checked_runtime(options.get("runtime"))
    given = options.get("runtime") is not None and not runtime.replicated
    if given and named:
        msg = "give participants (they run in this process) or a runtime (which knows its own), not both."
        raise ConfigError(msg)
    if given and transforms:
        msg = (
            "transforms are code, and no code travels to the participants that a runtime brings. Leave them out, "
            "use codec=, or let participants= run in this process."
        )
        raise ConfigError(msg)
    if given and not runtime.sequential:
        _check_travels(config, training.optimizer)
    samples = config.samples if config.samples is not None else int(runtime.sequential)
    evaluator = Evaluator(target, options.get("evaluation"), training, samples=samples, seed=config.seed)
    clients = {name: client(participant) for name, participant in evaluator.divide(named).items()}
    settings = _settings_of(config, options, training, target.model, clients.values())
    if not given:
        runtime.host(clients)
    check_counts(config, len(runtime.nodes()))
    server = Server(target, runtime, evaluator, settings)
    server.begin()  # refuses a rule that does not fit the model now, not after the first round's training
    return Assembled(server, clients, client)


def _settings_of(
    config: FederationConfig,
    options: FederationOptions,
    training: TrainingConfig,
    model: LocalModel,
    peers: Iterable[Client],
) -> Settings:
    """The settings, if they make sense for this model and these participants.

    Args:
        config: The options as they can be written down.
        options: The same as they were given, with what is code.
        training: How participants train.
        model: What is trained.
        peers: Participants of this process, who may have options of their own.

    Raises:
        ConfigError: Two contradict each other.
    """
    if model.adapter not in (None, GLOBAL):
        msg = (
            f"this chain answers with the adapter {model.adapter!r}, and a federation trains the chain's own. Pass the "
            "chain itself; personalize() makes adapters for participants."
        )
        raise ConfigError(msg)
    rule, layout = make_aggregation(options.get("aggregation", "fedavg")), LoraLayout.of(model)
    optimizer, personal = options.get("server_optimizer"), config.personal
    transforms = checked_transforms(options.get("transforms") or ())
    codec, broadcast_codec = make_codec(config.codec), make_codec(config.broadcast_codec)
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
        transforms=transforms,
        model=describe(model.trainable_parameters()),
        max_weight_share=config.max_weight_share,
    )
    return Settings(
        config=config,
        rule=rule,
        layout=layout,
        training=training,
        codec=codec,
        broadcast_codec=broadcast_codec,
        # its own copy: the memory of another federation, or of a run before, must not move this one's weights
        server_optimizer=copy.deepcopy(optimizer) if isinstance(optimizer, ResumableServerOptimizer) else optimizer,
        weighting=config.weighting,
        personal=personal,
        per_round=config.participants_per_round,
        quorum=config.quorum,
        deadline=config.deadline,
        retries=config.retries,
        seed=config.seed,
        max_weight_share=config.max_weight_share,
        transforms=transforms,
    )


def _check_travels(config: FederationConfig, optimizer: Any) -> None:
    if config.optimizer is not None:
        msg = (
            f"optimizer={optimizer!r:.60} cannot be told to participants elsewhere, because no code travels. Name it: "
            "'adamw', 'adam' or 'sgd'."
        )
        raise ConfigError(msg)
