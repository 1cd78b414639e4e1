"""The operations `hello` and `stop`: a participant takes part in a federation as its server says, or no more.

Knows training options, the participant's own over the hub's, contracts and a client's data. Knows nothing of rounds.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from llmchain_fed.data.encoding import EncodedExamples, controls_of
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.state import ProgressByRound
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol.answers import Introduction, Nothing
from llmchain_fed.federated.protocol.tasks import HelloTask, StopTask
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_checkpointing import check_checkpointing
from llmchain_fed.training.label_loss import LabelGradient
from llmchain_fed.training.schedule import steps_of
from llmchain_fed.updates.lora_layout import LoraLayout

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client


def join(client: Client, task: HelloTask) -> Introduction:
    """Follows the federation's options from now on, and says what the participant has.

    Raises:
        ConfigError: The options make no sense.
        PolicyError: The limits do not allow them.
        LabelError: Over labels, a completion is none of them.
    """
    config, limits = _config_for(client, task), client.limits
    if limits is not None:
        limits.check_aggregation(task.aggregation)
        limits.check_training(config)
    check_checkpointing(client.model, config)
    with client.data.limiting(config):
        data = client.data.train()
        if limits is not None:
            limits.check_usable(data)
            limits.check_steps(steps_of(data, config))
        if config.loss == "labels":
            _check_labels(client, config)
        answer = introduction(client, config)
    if client.federation not in (None, task.federation):
        client.progress = ProgressByRound()  # another federation begins: nothing is carried over
    elif config != client.config:  # an optimizer goes on with the settings it was made with
        client.progress = client.progress.without_optimizers()
    client.config, client.aggregation, client.federation = config, task.aggregation, task.federation
    return answer


def _check_labels(client: Client, config: TrainingConfig) -> None:
    """Makes sure, before the first round, that every completion is a label: also of what is held out."""
    controls = controls_of(client.target.prompt)
    LabelGradient.of(client.data.train(), client.model, config, controls)
    if client.data.holds_out:
        LabelGradient.of(client.data.held_out(), client.model, config, controls)


def leave(client: Client, _task: StopTask) -> Nothing:
    """Forgets the federation."""
    client.progress, client.federation = ProgressByRound(), None
    client.global_states.forget()
    return Nothing()


def introduction(client: Client, config: TrainingConfig) -> Introduction:
    """What a participant says of itself: counts and digests."""
    data, participant = client.data.train(), client.participant
    said: dict[str, Any] = {
        "participant": client.name,
        "contract": client.target.contract(),
        "held_out": client.data.holds_out,
        "weights_hash": client.model.weights_hash,
        "rank": participant.rank,
        "alpha": participant.alpha,
        "options": hashlib.sha256(repr(config).encode()).hexdigest()[:16],
    }
    if isinstance(data, EncodedExamples):
        said["num_examples"], said["num_tokens"] = len(data), data.report.completion_tokens
        said["report"] = data.report.counts()
    held_out = client.data.held_out() if client.data.holds_out else None
    if isinstance(held_out, EncodedExamples):  # by which its held-out loss counts
        said["held_out_examples"], said["held_out_tokens"] = len(held_out), held_out.report.completion_tokens
        said["held_out_report"] = held_out.report.counts()
    if (found := client.data.overlap()) is not None:
        said["overlap"] = list(found)
    return Introduction(**said)


def _config_for(client: Client, task: HelloTask) -> TrainingConfig:
    """The federation's training options, the participant's own over them; its own alone in the hub's process."""
    if not client.follows:
        return client.config
    if task.training is None:
        msg = f"the hub did not say how {client.name!r} should train."
        raise ConfigError(msg)
    return own_config(TrainingConfig(**task.training.model_dump(exclude_unset=True)), client.participant)


def own_scaling(target: Target, participant: Participant) -> dict[str, float] | None:
    """Layer → s of a participant whose LoRA rank is its own.

    Raises:
        ConfigError: The model has no LoRA adapter, or a smaller one.
    """
    if participant.rank is None:
        return None
    layout = LoraLayout.of(target.model)
    if layout is None or layout.refused or layout.rank is None or participant.rank > layout.rank:
        have = "no plain LoRA adapter" if layout is None or layout.refused else f"rank {layout.rank}"
        msg = (
            f"participant {participant.name!r} wants rank {participant.rank}, and the model has {have}. A "
            "participant's rank is at most the adapter's: give the chain the largest one."
        )
        raise ConfigError(msg)
    return layout.scaling_at(participant.rank, participant.alpha)


def own_config(config: TrainingConfig, participant: Participant) -> TrainingConfig:
    """The federation's configuration with the participant's own options over it."""
    if not participant.training:
        return config
    options = dict(participant.training)
    if options.get("max_steps") is not None:  # of two ways to end a round its own counts
        options.setdefault("epochs", None)
    elif options.get("epochs") is not None:
        options.setdefault("max_steps", None)
    try:
        own: TrainingConfig = config.replace(**options)
    except ConfigError as error:
        msg = f"participant {participant.name!r}: {error}"
        raise ConfigError(msg) from None
    if (own.loss, own.labels) != (config.loss, config.labels):
        msg = (
            f"participant {participant.name!r}: the loss and its labels are the federation's, as losses of different "
            "kinds cannot be compared. Give them as training=TrainingConfig(loss=…, labels=…); class_weight may differ."
        )
        raise ConfigError(msg)
    return own
