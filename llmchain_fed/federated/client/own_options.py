"""What of training is a participant's own: its rank and scaling, its options over the federation's.

Knows participants, options and LoRA's layout. Knows nothing about messages or data.
"""

from __future__ import annotations

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.updates.lora_layout import LoraLayout


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
    return own
