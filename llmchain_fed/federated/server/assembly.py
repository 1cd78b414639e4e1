"""Assembly: a server, and this process's clients, out of what a user gives.

Knows which parts there are and which of the options each is given. Knows nothing about how they work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from llmchain_fed.data.examples import is_ready_tensors
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated import compatibility
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.global_state_cache import GlobalStateCache
from llmchain_fed.federated.options import FederationConfig, FederationOptions
from llmchain_fed.federated.participant import Participant, as_participants
from llmchain_fed.federated.runtime import checked_runtime
from llmchain_fed.federated.server.evaluation import Evaluator
from llmchain_fed.federated.server.server import Server
from llmchain_fed.federated.settings import Settings, check_counts, config_of, training_of
from llmchain_fed.federated.target import Target
from llmchain_fed.model.adapters.switching import GLOBAL
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training import trainable
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_checkpointing import check_checkpointing
from llmchain_fed.training.metrics import Metric, checked_metrics
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation import make_aggregation
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.serialization import describe
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer
from llmchain_fed.updates.transforms import checked_transforms


def assemble(
    model: Any, participants: Any, optimizer: Any, options: FederationOptions
) -> tuple[Server, dict[str, Client], Callable[[Participant], Client]]:
    """A federation's server, this process's clients, and what makes one for a participant who comes later.

    They are checked as a whole; see `FederatedAveraging` for what it raises.
    """
    transforms = checked_transforms(options.get("transforms"))  # read once: it may be a generator
    moves = options.get("server_optimizer")  # as a mapping it is that of a file, or of another federation's config
    moves = server_optimizers.from_settings(moves) if isinstance(moves, Mapping) else moves
    options = cast("FederationOptions", {**options, "transforms": transforms, "server_optimizer": moves})
    training = training_of(options, optimizer)
    runtime = checked_runtime(options.get("runtime"))
    here = runtime.sequential or runtime.replicated
    metrics = checked_metrics(options.get("metrics"), elsewhere=not here)
    options = cast("FederationOptions", {**options, "metrics": metrics or None})
    config = config_of(options, training)
    target = Target.of(model, options.get("llm"))
    trainable.admit(target.model)
    check_checkpointing(target.model, training)
    target.check_savable()
    trainable.check_batches(target.model, training.micro_batch_size or training.batch_size)
    states = GlobalStateCache(target.model)

    def client(participant: Participant) -> Client:
        participant = participant.with_columns(config.columns)
        if config.batch_sampler is not None and is_ready_tensors(participant.examples):
            msg = (
                f"{participant.name!r} has a DataLoader, which draws its batches itself, so no batch_sampler can. Give "
                "its examples, or leave batch_sampler out."
            )
            raise ConfigError(msg)
        return Client(
            target,
            participant,
            training,
            global_states=states,
            transforms=transforms,
            gradient_step=options.get("gradient_step"),
            batch_sampler=options.get("batch_sampler"),
            progress=options.get("progress", True),
            metrics={metric.name: metric.fn for metric in metrics if not isinstance(metric.fn, str)},
        )

    named = {name: p.with_columns(config.columns) for name, p in as_participants(participants).items()}
    evaluator = _evaluator(config, options, training, target, sequential=runtime.sequential)
    if options.get("runtime") is not None and not runtime.replicated:
        _check_brought(named, config, evaluator, training.optimizer, elsewhere=not runtime.sequential)
    clients = {name: client(participant) for name, participant in evaluator.divide(named).items()}
    settings = _settings_of(config, options, training, target.model, clients.values())
    runtime.host(clients)
    evaluator.check_names(runtime.nodes())
    check_counts(config, len(runtime.nodes()))
    server = Server(target, runtime, evaluator, settings)
    server.begin()  # refuses a rule that does not fit the model now, not after the first round's training
    return server, clients, client


def _evaluator(
    config: FederationConfig, options: FederationOptions, training: TrainingConfig, target: Target, *, sequential: bool
) -> Evaluator:
    """What measures; a share of `evaluation` is in the options that are written down, examples are beside them."""
    metrics = cast("tuple[Metric, ...]", options.get("metrics") or ())  # `assemble` has checked them
    labels = config.labels or training.labels
    if not labels and (wanting := [metric.name for metric in metrics if metric.wants_probabilities]):
        msg = f"the metric {wanting[0]!r} is over probabilities of labels. Pass labels=[…], all answers that there are."
        raise ConfigError(msg)
    return Evaluator(
        target,
        options.get("evaluation") if isinstance(config.evaluation, str) else config.evaluation,
        training,
        samples=config.samples if config.samples is not None else int(sequential),
        seed=config.seed,
        columns=config.columns,
        metrics=metrics,
        labels=labels,
        answer_tokens=config.answer_tokens,
    )


def _settings_of(
    config: FederationConfig,
    options: FederationOptions,
    training: TrainingConfig,
    model: LocalModel,
    clients: Collection[Client],
) -> Settings:
    """The settings, if they make sense for this model and this process's participants with options of their own."""
    if model.adapter not in (None, GLOBAL):
        msg = (
            f"this chain answers with the adapter {model.adapter!r}, and a federation trains the chain's own. Pass the "
            "chain itself; personalize() makes adapters for participants."
        )
        raise ConfigError(msg)
    optimizer = options.get("server_optimizer")
    settings = Settings(
        config=config,
        rule=make_aggregation(options.get("aggregation", "fedavg")),
        layout=LoraLayout.of(model),
        training=training,
        # its own copy: the memory of another federation, or of a run before, must not move this one's weights
        server_optimizer=copy.deepcopy(optimizer) if isinstance(optimizer, ResumableServerOptimizer) else optimizer,
        transforms=tuple(options["transforms"] or ()),
        gradient_step=options.get("gradient_step"),
        batch_sampler=options.get("batch_sampler"),
    )
    for client in clients:
        compatibility.check_name(settings.rule, config.personal, client.name)
        compatibility.check_rank(settings.rule, client.name, client.participant.rank, settings.layout)
    compatibility.check(settings, [training, *(c.config for c in clients)], describe(model.trainable_parameters()))
    return settings


def _check_brought(
    named: Mapping[str, Participant],
    config: FederationConfig,
    evaluator: Evaluator,
    optimizer: Any,
    *,
    elsewhere: bool,
) -> None:
    """Makes sure that nothing is asked of a runtime's participants which only those of this process can do."""
    if named:
        msg = "give participants (they run in this process) or a runtime (which knows its own), not both."
        raise ConfigError(msg)
    if config.evaluation is not None and not evaluator.is_shared:
        msg = (
            "evaluation= as a share or by name sets apart examples of this process, and participants that a runtime "
            "brings have theirs elsewhere. Let them hold out some where they are, as Participant(held_out=…), or pass "
            "one set for all, which is measured here."
        )
        raise ConfigError(msg)
    code = [name for name in ("transforms", "gradient_step", "batch_sampler") if getattr(config, name) is not None]
    code += ["metrics"] * (elsewhere and not evaluator.is_shared and any(m.code for m in evaluator.metrics))
    if code:
        msg = (
            f"{', '.join(code)}: that is code, and no code travels to the participants that a runtime brings. Leave "
            "them out, or let participants= run in this process."
        )
        raise ConfigError(msg)
    if config.optimizer is not None and elsewhere:
        msg = (
            f"optimizer={optimizer!r:.60} cannot be told to participants elsewhere, because no code travels. Name it: "
            "'adamw', 'adam' or 'sgd'."
        )
        raise ConfigError(msg)
