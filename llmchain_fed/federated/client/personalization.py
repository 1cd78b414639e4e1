"""Personal models: what one participant learns for itself, beside or after the global model.

Knows local training, adapters and one participant's data. Knows nothing about rounds, messages or other participants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.data import LocalData
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.evaluation import evaluate_locally
from llmchain_fed.training.loop import TrainingConfig, TrainingResult, train_locally
from llmchain_fed.updates.aggregation.base import A, B
from llmchain_fed.updates.low_rank import Factors, stack

MOST_STEPS = 10_000


@contextmanager
def loaded(model: LocalModel, state: GlobalState, over: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """The model holds `state`, with some values replaced, inside; the former ones are back afterwards."""
    with model.exclusive():
        former = GlobalState.of(model)
        try:
            GlobalState({**state.values, **(over or {})}, state.remainder).load(model)
            yield
        finally:
            former.load(model)


def train_ditto(
    model: LocalModel,
    state: GlobalState,
    personal: Mapping[str, Tensor],
    ditto: Ditto,
    data: Any,
    config: TrainingConfig,
    **place: Any,
) -> dict[str, Tensor]:
    """One round of Ditto's personal model, at the model's present rank.

    Args:
        model: Where to compute; left as it was.
        state: The global state of the round.
        personal: The personal factors so far; none before the first round, which starts at the global ones.
        ditto: λ and steps.
        data: The participant's training examples.
        config: How it trains.
        **place: Participant, round and position, as for `train_locally`.
    """
    config = config.replace(proximal_mu=ditto.lam)
    if ditto.max_steps is not None:
        config = config.replace(max_steps=ditto.max_steps, epochs=None)
    with loaded(model, state, personal):
        train_locally(model, data, config, anchor=state.values, **place)
        return model.trainable_state()


def fine_tune(
    model: LocalModel, state: GlobalState, data: Any, config: TrainingConfig, **place: Any
) -> tuple[dict[str, Tensor], TrainingResult]:
    """Factors after some steps from the global state, as one adapter that needs no remainder beside it."""
    with loaded(model, state):
        result = train_locally(model, data, config, **place)
        return with_remainder(model.trainable_state(), state.remainder, model.lora_scaling()), result


def with_remainder(
    values: Mapping[str, Tensor], remainder: Mapping[str, Factors], scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """Factors with the frozen remainder stacked beside them: one adapter that says the same alone."""
    found = dict(values)
    for layer, more in remainder.items():
        own = Factors(values[f"{layer}.{B}"], values[f"{layer}.{A}"])
        both = stack([own, Factors(more.b / scaling[layer], more.a)])
        found[f"{layer}.{A}"], found[f"{layer}.{B}"] = both.a.contiguous(), both.b.contiguous()
    return found


def adaptation_curve(
    model: LocalModel, state: GlobalState, data: LocalData, config: TrainingConfig, steps: Sequence[int], **place: Any
) -> list[dict[str, float]]:
    """Held-out loss after k optimizer steps from the global state, for every k of `steps`; nothing is kept."""
    single = config.replace(max_steps=1, epochs=None, keep_optimizer=True)
    found, optimizer = [], None
    with loaded(model, state):
        for done in range(max(steps) + 1):
            if done in steps:
                loss = evaluate_locally(model, data.held_out(), precision=config.precision).loss
                found.append({"steps": done, "loss": loss})
            if done < max(steps):
                result = train_locally(model, data.train(), single, first_step=done, optimizer_state=optimizer, **place)
                optimizer = result.optimizer_state
    return found


def side_by_side(
    model: LocalModel, state: GlobalState, personal: str | None, data: LocalData, config: TrainingConfig
) -> dict[str, float]:
    """Held-out loss of the bare base, of the global model and of the personal one, where there is one."""

    def loss(of: LocalModel) -> float:
        return evaluate_locally(of, data.held_out(), precision=config.precision).loss

    found = {}
    if model.adapters:
        found["base"] = loss(model.without_adapter())
    with loaded(model, state):
        found["global"] = loss(model)
    if personal is not None:
        found["personal"] = loss(model.with_adapter(personal))
    return found


def steps_config(config: TrainingConfig, steps: int, lr: float | None) -> TrainingConfig:
    """The participant's configuration for so many steps of fine-tuning.

    Raises:
        ConfigError: No positive count.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        msg = f"steps is a count of at least 1, got {steps!r}."
        raise ConfigError(msg)
    if steps > MOST_STEPS:
        msg = f"{steps:,} steps are more than a personal model is given ({MOST_STEPS:,}): train it in rounds instead."
        raise ConfigError(msg)
    options: dict[str, Any] = {"max_steps": steps, "epochs": None, "keep_optimizer": False}
    if lr is not None:
        options["learning_rate"] = lr
    found: TrainingConfig = config.replace(**options)
    return found
