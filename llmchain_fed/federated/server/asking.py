"""Asking: one task for several participants, and what each of them answers, read within bounds.

Knows tasks, answers and who has joined. Knows nothing of what is done with an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from llmchain_fed.errors import ConfigError, FederationError, LLMChainFedError, ParticipantError
from llmchain_fed.federated.history import told_of
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import TaskAnswer
from llmchain_fed.federated.protocol.tasks import StateTask, Task
from llmchain_fed.federated.server.server import Server

TaskT = TypeVar("TaskT", bound=StateTask)
AnswerT = TypeVar("AnswerT", bound=TaskAnswer)


def ask(
    server: Server, task: Task, answer: type[AnswerT], participants: Iterable[str] | None = None
) -> Iterator[tuple[str, AnswerT | Exception]]:
    """Yields each participant's answer to a task, or why there is none: it is not there, refuses, or makes no sense.

    A `StateTask` comes with the global state as it was published last. All who have joined are asked by default.
    """
    names = server.client_manager.present() if participants is None else list(participants)
    if isinstance(task, StateTask):
        sent = server.broadcast.call(server.runtime, task, names, server.settings.config.deadline)
        found: Iterator[tuple[str, bytes | Exception]] = ((node, data) for node, data, _ in sent)
    else:
        found = server.runtime.call(task.operation, names, messages.write(task), server.settings.config.deadline)
        found = server.client_manager.attendance.following(task.operation, names, found)
    for name, data in found:
        if isinstance(data, Exception):
            yield name, data
            continue
        try:
            yield name, messages.read_answer(answer, data, f"what {name!r} answers")
        except ParticipantError as error:
            yield name, error


def ask_one(server: Server, task: StateTask, answer: type[AnswerT], participant: str) -> AnswerT:
    """One participant's answer to a task on the global state as it is now.

    Raises:
        ConfigError: Nobody of that name.
        FederationError: It is not there, or refuses.
        ParticipantError: What it answers makes no sense.
        LLMChainFedError: Its own error, where it is in this process.
    """
    if participant not in server.client_manager.joined:
        why = server.client_manager.absent.get(participant)
        there = ", ".join(server.client_manager.joined) or "nobody"
        reason = told_of(why) if why is not None else "nobody of that name"
        msg = f"participant {participant!r} is not there ({reason}). There: {there}."
        raise ConfigError(msg) if why is None else FederationError(msg)
    server.publish()
    ((_, found),) = ask(server, task, answer, [participant])
    if not isinstance(found, Exception):
        return found
    if isinstance(found, ParticipantError) or (server.runtime.sequential and isinstance(found, LLMChainFedError)):
        raise found
    msg = f"participant {participant!r}: {told_of(found)}"
    raise FederationError(msg) from found


def task_now(server: Server, kind: type[TaskT], **fields: object) -> TaskT:
    """A task between rounds on the global state as it is now; what a user gave for its fields may be out of range.

    Raises:
        ConfigError: It is.
    """
    now = {"round": server.round + 1, "base": server.model.fingerprint(), "seconds": server.settings.config.deadline}
    return kind.of(ConfigError, **now, **fields)
