"""The operations `train` and `time_step`: local training from the global state, for an update or to be timed.

Knows local training, what of it is private, and a client's data, limits and progress. Knows nothing of other
participants or of what becomes of the update. The model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmchain_fed.errors import FederationError, PolicyError
from llmchain_fed.federated.client import personalization
from llmchain_fed.federated.client.limits import Counted, counted
from llmchain_fed.federated.client.personalization import loaded
from llmchain_fed.federated.client.state import Progress, fits
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.protocol.answers import TimeStepAnswer
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import TimeStepTask, TrainTask
from llmchain_fed.training.batch_sampler import Place
from llmchain_fed.training.loop import TrainingResult, train_locally
from llmchain_fed.training.schedule import Schedule, check_planned, steps_of
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.lora_layout import selected
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms import added, transformed
from llmchain_fed.updates.transforms.base import Origin
from llmchain_fed.updates.transforms.error_feedback import Encoding
from llmchain_fed.updates.update import Update

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client

# --- what may be asked ------------------------------------------------------------------------------------------------


def check(client: Client, task: TrainTask, layout: Layout, _infos: Mapping[str, TensorInfo]) -> None:
    """Makes sure, before a value is read, that a training may be asked.

    Raises:
        FederationError: It is about tensors that are not trained here.
        PolicyError: The limits do not allow it, or it asks for what is private.
    """
    data, (_, progress) = client.data.train(), client.progress.before(task.round)
    steps = steps_of(data, client.config)
    schedule = _schedule(client, task, steps)
    for part in (task.trains, task.shares):
        layout.check_part(part)
    _check_private(client, task, layout)
    _check_kept(client, task, layout, progress)
    limits, config = client.limits, client.config
    if limits is None:
        return
    limits.check_training(config)
    limits.check_parts(client.aggregation, task)
    limits.check_codec(task.codec)
    more = 0 if task.ditto is None else steps if task.ditto.max_steps is None else task.ditto.max_steps
    limits.check_steps(steps + more if steps is not None and more is not None else None)
    place = Place(client.name, task.index, progress.next_step)
    limits.check_update(data, config, place, client.batch_sampler, schedule)


def _schedule(client: Client, task: TrainTask, steps: int | None) -> Schedule | None:
    """How the learning rate of a round goes.

    Raises:
        ConfigError: It runs over the rounds of a federation of which nobody says how many it has.
    """
    if task.rounds is None:
        check_planned(client.config)
    return Schedule.of(client.config, steps, task.index, task.rounds)


def _check_private(client: Client, task: TrainTask, layout: Layout) -> None:
    """What a federation let this participant keep for itself never leaves, in whatever round it is asked for.

    A client of the server's own process follows the one federation it was made for. Another one remembers names as long
    as it lives: training the same examples from the same start, under another rule or another federation's name,
    would make the same values again.
    """
    private = (client.kept if client.follows else set()) | client.progress.private
    if asked := private & set(selected(layout.values, task.shares)):
        msg = (
            f"{len(asked)} of the tensors that are asked for, such as {min(asked)}, have been this participant's "
            "own in an earlier round: what is private never leaves. Start its peer anew for a federation of all."
        )
        raise PolicyError(msg)


def _check_kept(client: Client, task: TrainTask, layout: Layout, progress: Progress) -> None:
    """A kept optimizer knows the tensors that it was made for; its values were looked at when it was given back."""
    if progress.optimizer_state is None or not client.follows or not isinstance(client.config.optimizer, str):
        return
    shapes = [layout.values[n].shape for n in selected(layout.values, task.trains)]
    if not fits(progress.optimizer_state, client.config, shapes, values=False):
        msg = "the optimizer that was kept has trained other tensors than this round trains. Keep none, or go on."
        raise FederationError(msg)


def check_time_step(client: Client, _task: TimeStepTask, _layout: Layout, _infos: Mapping[str, TensorInfo]) -> None:
    """Makes sure that steps may be timed, by the limits."""
    client.data.train()
    if client.limits is not None:
        client.limits.check_training(client.config)
        client.limits.check_steps(_TIMED)


# --- what is done -----------------------------------------------------------------------------------------------------


def train(client: Client, task: TrainTask, state: GlobalState) -> bytes:
    """One round's training: its update as bytes. What of it stays here is in the client's progress then."""
    _, progress = client.progress.before(task.round)
    place = {**client.place(task), "first_step": progress.next_step, "rounds": task.rounds}
    trained, result = trained_values(client, task, state, progress, place)
    shared = {n: trained[n] for n in selected(trained, task.shares)}
    keeps = task.trains == "all" and task.shares != "all"  # what is trained and not shared belongs to the participant
    private = {n: t for n, t in trained.items() if n not in shared} if progress.private or keeps else {}
    codec, start = make_codec(task.codec), {n: state.values[n] for n in shared}
    transforms = [*client.transforms, *([Encoding(codec, feedback=task.feedback)] if codec else [])]
    parts, carried = shared, progress.carried
    if transforms:  # else values travel bit by bit, which a difference would not give back
        delta = {n: t.float() - start[n].float() for n, t in shared.items()}
        origin = Origin(client.name, task.index, result.examples, result.tokens, start)
        parts, carried = transformed(transforms, delta, origin, carried)
        parts = added(start, parts) if transforms[-1].keeps_names else parts
    pulled, own = progress.ditto, progress.personal
    if task.ditto is not None:
        ditto = Ditto(**task.ditto.model_dump(exclude_unset=True))
        pulled = personalization.train_ditto(client, state, pulled, ditto, place)
        own = {}  # an adapter made before this round is older than this one
    update = Update(
        participant=client.name,
        round=task.round,
        base=client.model.fingerprint(),
        tensors=parts,
        num_examples=result.examples,
        num_tokens=result.tokens,
        metrics={"train_loss": result.loss, "steps": result.steps, "seconds": result.seconds},
        codec=codec.name if codec is not None else None,
    )
    answer = update.to_bytes()
    client.kept |= private.keys()
    now = Progress(result.next_step, result.optimizer_state, carried, private, pulled, own)
    client.progress.trained(task.round, progress, now)
    return answer


def trained_values(
    client: Client, task: TrainTask, state: GlobalState, progress: Progress, place: Mapping[str, Any]
) -> tuple[dict[str, Tensor], TrainingResult]:
    """What local training makes of the tensors that are trained in this round."""
    model, limits, data = client.model, client.limits, client.data.train()
    schedule = _schedule(client, task, steps_of(data, client.config))
    data = counted(data, limits, schedule, progress.next_step if client.config.max_steps else 0)
    with loaded(model, state, progress.private), ExitStack() as inside:
        if task.trains != "all":
            names = model.trainable_parameters().keys()
            inside.enter_context(model.freezing(names - set(selected(names, task.trains))))
        more: dict[str, Any] = {"optimizer_state": progress.optimizer_state, "after_step": client.after_step()}
        result = train_locally(model, data, client.config, **more, **place)
        if isinstance(data, Counted) and limits is not None:
            data.check(limits)
        return model.trainable_state(), result


_TIMED = 2  # optimizer steps, the first of which also prepares


def time_step(client: Client, task: TimeStepTask, state: GlobalState) -> TimeStepAnswer:
    """Seconds of one optimizer step, the second of two, and how many a round has; nothing of them is kept."""
    data, config = client.data.train(), client.config
    place, single = client.place(task), personalization.steps_config(config, 1, None)
    with loaded(client.model, state):
        seconds = [train_locally(client.model, data, single, **place).seconds for _ in range(_TIMED)][-1]
    steps = steps_of(data, config)
    if client.batch_sampler is not None:
        drawn = client.batch_sampler(data, config, Place(client.name, task.index))
        steps = sum(1 for _ in drawn)  # as many as it draws are taken, whatever the options say
    return TimeStepAnswer(seconds=seconds, steps=steps or 0)
