"""Operations: what a participant answers. An open registry of task types, each with what a client does when asked.

Knows tasks and who does their work. Knows nothing of how messages come, or of what a site's policy allows: that names
operations as they are called here.

Another operation needs no change in this package: a `Task` with its fields, a `TaskAnswer` with its own, a function,
and

    register_task(Statistics, statistics)

in the process of the participant, before its client is asked. The server asks by `server.asking.ask`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.federated.client import evaluation, joining, personalization, state, training
from llmchain_fed.federated.protocol.answers import TaskAnswer
from llmchain_fed.federated.protocol.tasks import (
    CurveTask,
    EvaluateTask,
    HelloTask,
    PersonalizeTask,
    PersonalStateTask,
    SideBySideTask,
    StateTask,
    StopTask,
    Task,
    TensorTask,
    TimeStepTask,
    TrainTask,
)
from llmchain_fed.untrusted import shown


@dataclass(frozen=True)
class TaskType:
    """An operation: its task's fields, and what a client does."""

    task: type[Task]
    work: Callable[..., TaskAnswer | bytes]
    """`work(client, task)`; for a `StateTask` `work(client, task, state)`"""
    check: Callable[..., None] | None = None
    """`check(client, task, layout, infos)`: whether a `TensorTask` may be asked, before a value of it is read"""


_TYPES: dict[str, TaskType] = {}
_BUILT_IN: set[str] = set()


def register_task(
    task: type[Task],
    work: Callable[..., TaskAnswer | bytes],
    *,
    check: Callable[..., None] | None = None,
) -> None:
    """Lets clients of this process answer one more operation.

    Args:
        task: Its fields, with their types and ranges; `task.operation` is the name by which a policy allows it.
        work: What a client does: `work(client, task)`, or `work(client, task, state)` where it is a `StateTask`. It
            keeps to `client.limits` by itself, and lets no text leave.
        check: `check(client, task, layout, infos)` of a `StateTask`: raises where it may not be asked.

    Raises:
        ConfigError: The name is none or is taken, the task brings tensors that are no global state, or it does not say
            what of it a site's policy limits; or a check is given that nobody would call.
    """
    if not (isinstance(task, type) and issubclass(task, Task) and callable(work)):
        msg = f"register_task takes a subclass of Task and a function, got {task!r:.80} and {work!r:.80}."
        raise ConfigError(msg)
    name = getattr(task, "operation", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        msg = f"{task.__name__}.operation is a name of small letters, such as 'statistics', got {name!r:.80}."
        raise ConfigError(msg)
    former = _TYPES[name].task if name in _TYPES else task  # a notebook's cell, run again, defines its class anew
    if name in _BUILT_IN or (former.__module__, former.__qualname__) != (task.__module__, task.__qualname__):
        msg = f"the operation {name!r} is taken, by {_TYPES[name].task.__name__}. Give {task.__name__} another name."
        raise ConfigError(msg)
    if issubclass(task, TensorTask) and not issubclass(task, (StateTask, PersonalStateTask)):
        msg = f"{task.__name__} brings tensors of which nothing is known. Make it a Task, or a StateTask."
        raise ConfigError(msg)
    if check is not None and not issubclass(task, TensorTask):
        msg = f"{task.__name__} brings no state, and what it may be asked is for its work to look at. Leave out check=."
        raise ConfigError(msg)
    unsaid = [limited for limited in ("counts_as_training", "measured") if not hasattr(task, limited)]
    if unsaid:
        msg = (
            f"{task.__name__} does not say {', '.join(unsaid)}: a site's policy limits trainings and held-out losses. "
            "Say `counts_as_training, measured = False, 0` where it neither trains nor tells a loss."
        )
        raise ConfigError(msg)
    _TYPES[name] = TaskType(task, work, check)


def operations() -> tuple[str, ...]:
    """The names of all operations there are."""
    return tuple(_TYPES)


def task_type(operation: str) -> TaskType:
    """The operation of a name.

    Raises:
        FederationError: There is none.
    """
    if operation not in _TYPES:
        msg = f"unknown operation '{shown(operation, 40)}'; a client answers {', '.join(_TYPES)}."
        raise FederationError(msg)
    return _TYPES[operation]


register_task(HelloTask, joining.join)
register_task(TrainTask, training.train, check=training.check)
register_task(PersonalizeTask, personalization.personalize, check=personalization.check)
register_task(EvaluateTask, evaluation.evaluate)
register_task(SideBySideTask, evaluation.side_by_side)
register_task(CurveTask, personalization.curve, check=personalization.check_curve)
register_task(TimeStepTask, training.time_step, check=training.check_time_step)
register_task(PersonalStateTask, state.exchange, check=state.check)
register_task(StopTask, joining.leave)
_BUILT_IN |= _TYPES.keys()
