"""The operations `personalize` and `curve`, and Ditto: what one participant learns for itself.

Knows local training, adapters and one participant's data. Knows nothing about other participants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.state import Progress
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.protocol.answers import CurveAnswer, PersonalizeAnswer, SideBySideAnswer
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.finiteness import spelled
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import CurveTask, PersonalizeTask
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.batch_sampler import Place
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loop import train_locally
from llmchain_fed.updates.lora_layout import A, B
from llmchain_fed.updates.low_rank import Factors, stack
from llmchain_fed.updates.serialization import TensorInfo

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client

MOST_STEPS = 10_000


@contextmanager
def loaded(model: LocalModel, state: GlobalState, over: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """The model has `state`, with some values replaced, inside; the former ones are back afterwards."""
    with model.exclusive():
        former = GlobalState.of(model)
        try:
            GlobalState({**state.values, **(over or {})}, state.remainder).load(model)
            yield
        finally:
            former.load(model)


def train_ditto(
    client: Client, state: GlobalState, personal: Mapping[str, Tensor], ditto: Ditto, place: Mapping[str, Any]
) -> dict[str, Tensor]:
    """One round of Ditto's personal model, at the model's present rank; the model is left as it was.

    It goes on from the personal factors so far, in the first round from the global ones. `place` is what `Client.place`
    makes, and where the participant stands in its data.
    """
    config = client.config.replace(proximal_mu=ditto.lam)
    if ditto.max_steps is not None:
        config = config.replace(max_steps=ditto.max_steps, epochs=None)
    with loaded(client.model, state, personal):
        train_locally(client.model, client.data.train(), config, anchor=state.values, **place)
        return client.model.trainable_state()


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


def steps_config(config: TrainingConfig, steps: int, lr: float | None) -> TrainingConfig:
    """The participant's configuration for so many steps of fine-tuning.

    Raises:
        ConfigError: They are too many.
    """
    if steps > MOST_STEPS:
        msg = f"{steps:,} steps are more than a personal model is given ({MOST_STEPS:,}): train it in rounds instead."
        raise ConfigError(msg)
    options: dict[str, Any] = {"max_steps": steps, "epochs": None, "keep_optimizer": False}
    options |= {"lr_schedule": "constant", "warmup": 0}  # steps are taken one by one, or are none of a round's
    if lr is not None:
        options["learning_rate"] = lr
    found: TrainingConfig = config.replace(**options)
    return found


# --- the operations ---------------------------------------------------------------------------------------------------


def check(client: Client, task: PersonalizeTask, _layout: Layout, _infos: Mapping[str, TensorInfo]) -> None:
    """Makes sure that a personal model may be trained, by the limits: its mean training loss is told of them."""
    data, limits = client.data.train(), client.limits
    if limits is not None:
        limits.check_training(client.config, task.lr)
        config, place = steps_config(client.config, task.steps, task.lr), Place(client.name, task.index)
        limits.check_update(data, config, place, client.batch_sampler)
        limits.check_steps(task.steps)


def check_curve(client: Client, task: CurveTask, _layout: Layout, _infos: Mapping[str, TensorInfo]) -> None:
    """Makes sure that a curve may be measured, by the limits."""
    client.data.train()
    client.data.held_out()
    if client.limits is not None:
        client.limits.check_training(client.config, task.lr)
        client.limits.check_steps(task.steps[-1])


def personalize(client: Client, task: PersonalizeTask, state: GlobalState) -> PersonalizeAnswer:
    """Makes a personal model from the global one, and says what that did to the held-out loss."""
    config = steps_config(client.config, task.steps, task.lr)
    with loaded(client.model, state):
        result = train_locally(client.model, client.data.train(), config, **client.place(task))
        values = with_remainder(client.model.trainable_state(), state.remainder, client.model.lora_scaling())
    answer = {"train_loss": spelled(result.loss), "steps": result.steps, "seconds": result.seconds}
    progress = replace(client.progress.before(task.round)[1], personal=values)
    if client.data.holds_out:
        answer["losses"] = losses(client, state, progress)
    client.progress.personalized(task.round, values)
    return PersonalizeAnswer(**answer)


def curve(client: Client, task: CurveTask, state: GlobalState) -> CurveAnswer:
    """Held-out losses over steps of adaptation: it counts as a training, and ends when that would."""
    last, model, data = task.steps[-1], client.model, client.data
    single = steps_config(client.config, max(1, last), task.lr).replace(max_steps=1, keep_optimizer=True)
    points, place, optimizer = [], client.place(task), None
    with loaded(model, state):
        for done in range(last + 1):
            if done in task.steps:
                points.append({"steps": done, "loss": client.measure(model).loss})
            if done < last:
                result = train_locally(model, data.train(), single, first_step=done, optimizer_state=optimizer, **place)
                optimizer = result.optimizer_state
    return CurveAnswer(curve=spelled(points))


def losses(client: Client, state: GlobalState, progress: Progress) -> SideBySideAnswer:
    """The held-out losses of the bare base, the global model and the personal one in this progress, where there are."""
    model = client.model

    def loss(of: LocalModel) -> float:
        return client.measure(of).loss

    found = {"base": loss(model.without_adapter())} if model.adapters else {}
    with loaded(model, state):
        found["global"] = loss(model)
    if progress.has_own:
        add_adapter(client, own_model(client, progress, state))
        found["personal"] = loss(model.with_adapter(client.name))
    return SideBySideAnswer(**spelled(found))


def own_model(client: Client, progress: Progress, state: GlobalState) -> Mapping[str, Tensor]:
    """The personal model's factors as one adapter that needs no remainder beside it; there is one."""
    if progress.personal:
        return progress.personal
    own = {**state.values, **progress.private} if progress.private else progress.ditto
    return with_remainder(own, state.remainder, client.scaling or client.model.lora_scaling())


def add_adapter(client: Client, values: Mapping[str, Tensor]) -> None:
    """Makes the personal model an adapter of this process's model, by the participant's name."""
    client.model.add_adapter(client.name, values, scaling=client.scaling)
    client.shown = True
