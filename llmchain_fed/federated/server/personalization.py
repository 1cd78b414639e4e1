"""Personalizing: asks participants for personal models and for losses side by side, and reads what they answer.

Knows the server, tasks and answers. Knows nothing about how a participant trains for itself: that is the client's
`personalization`.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError, ParticipantError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import CurveAnswer, PersonalizeAnswer, SideBySideAnswer
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import CurveTask, PersonalizeTask, SideBySideTask
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.server.asking import ask_one, task_now
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.adapters.switching import GLOBAL

_KINDS = ("base", "global", "personal")


class SideBySide(Mapping[str, Mapping[str, float]]):
    """Participant → {"base", "global", "personal"} → held-out loss in nats per completion token; shows as a table.

    >>> SideBySide({"django": {"base": 4.1, "global": 1.8, "personal": 1.7}})
    participant   base  global  personal
    django       4.100   1.800     1.700
    """

    def __init__(self, losses: Mapping[str, Mapping[str, float]]) -> None:
        self._losses = {name: dict(found) for name, found in losses.items()}

    def __getitem__(self, participant: str) -> Mapping[str, float]:
        return self._losses[participant]

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def _rows(self) -> list[list[str]]:
        body = [[n, *(f"{f[k]:.3f}" if k in f else "–" for k in _KINDS)] for n, f in self._losses.items()]
        return [["participant", *_KINDS], *body]

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for name, *cells in rows:
            right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append(f"{name.ljust(widths[0])}  {right}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body]
        return f"<table>{''.join(lines)}</table>"


@dataclass(frozen=True)
class Personalized:
    """What fine-tuning for one participant did."""

    participant: str
    steps: int
    train_loss: float
    """nats per completion token, mean over the steps"""
    seconds: float
    losses: Mapping[str, float]
    """"base", "global", "personal" → held-out loss; empty where the participant holds nothing out"""


def personalize(server: Server, participant: str, steps: int, lr: float | None) -> Personalized:
    """Fine-tunes a personal adapter at the participant; see `FederatedAveraging.personalize`."""
    rule, layout = server.settings.rule, server.settings.layout
    if layout is None or layout.refused:
        msg = "personal models are LoRA adapters beside one base, and this model trains none. Give the chain LoRA."
        raise ConfigError(msg)
    if participant == GLOBAL:
        msg = f"no personal adapter can be called {GLOBAL!r}: that is the federation's own."
        raise ConfigError(msg)
    if rule.personal:
        msg = f"under aggregation={rule.name!r} every participant's B is personal already: use with_adapter(name)."
        raise ConfigError(msg)
    steps = plain_number(steps)
    if type(steps) is not int or steps < 1:
        msg = f"steps is a count of at least 1, got {steps!r}."
        raise ConfigError(msg)
    task = task_now(server, PersonalizeTask, steps=steps, lr=_checked_lr(lr))
    found = ask_one(server, task, PersonalizeAnswer, participant)
    return Personalized(participant, steps, found.train_loss, found.seconds, found.losses.by_kind())


def compare(server: Server, participants: Sequence[str] | None) -> dict[str, dict[str, float]]:
    """Losses side by side; see `FederatedAveraging.side_by_side`."""
    with_held_out = [n for n, hello in server.client_manager.joined.items() if hello.held_out]
    wanted = with_held_out if participants is None else list(participants)
    if strangers := [n for n in wanted if n not in with_held_out]:
        others = ", ".join(with_held_out) or "nobody; pass evaluation="
        msg = f"{strangers} hold out no examples. Those who do: {others}."
        raise ConfigError(msg)
    task = task_now(server, SideBySideTask)
    return {name: ask_one(server, task, SideBySideAnswer, name).by_kind() for name in wanted}


def curve(server: Server, participant: str, steps: Sequence[int], lr: float | None) -> dict[int, float]:
    """Held-out loss over steps of adaptation; see `FederatedAveraging.adaptation_curve`."""
    wanted = _checked_steps(steps)
    lr, hello = _checked_lr(lr), server.client_manager.joined.get(participant)
    if hello is not None and not hello.held_out:
        msg = f"participant {participant!r} holds out no examples to measure on. Pass evaluation=, or held_out=."
        raise ConfigError(msg)
    task = task_now(server, CurveTask, steps=wanted, lr=lr)
    return _curve(ask_one(server, task, CurveAnswer, participant), wanted, participant)


def curve_of_stranger(
    server: Server, participant: Participant, steps: Sequence[int], lr: float | None
) -> dict[int, float]:
    """The same for one that takes no part, in this process; nothing of it stays."""
    wanted, lr = _checked_steps(steps), _checked_lr(lr)
    if participant.held_out is None:
        msg = f"participant {participant.name!r} has no held_out= to measure on."
        raise ConfigError(msg)
    if participant.name in server.runtime.nodes():
        msg = f"{participant.name!r} takes part already: pass its name, or give the newcomer another."
        raise ConfigError(msg)
    name, task = participant.name, task_now(server, CurveTask, steps=wanted, lr=lr)
    settings = server.settings
    client = Client(
        server.target,
        participant.with_columns(settings.config.columns),
        settings.training,
        gradient_step=settings.gradient_step,
        batch_sampler=settings.batch_sampler,
    )
    runtime = InProcess({name: client})
    remainder = server.publish().remainder
    broadcast = Broadcast(None, server.broadcast.layout)  # its own: what the others have, and who is there, stays
    broadcast.publish(GlobalState(server.broadcast.state_for(), remainder), "")
    broadcast.joined(name, None, participant.rank, participant.alpha)
    (sent,) = broadcast.call(runtime, task, [name])
    if isinstance(sent.answer, Exception):
        raise sent.answer
    return _curve(messages.read_answer(CurveAnswer, sent.answer, f"what {name!r} answers"), wanted, name)


def _checked_steps(steps: Sequence[int]) -> list[int]:
    found = [plain_number(k) for k in steps] if isinstance(steps, Iterable) else []
    if not found or any(type(k) is not int or k < 0 for k in found):
        msg = f"steps are counts of 0 or more, such as (0, 1, 2), got {found or steps!r:.80}."
        raise ConfigError(msg)
    return sorted(set(found))


def _checked_lr(lr: float | None) -> float | None:
    lr = plain_number(lr)
    number = isinstance(lr, (int, float)) and not isinstance(lr, bool)
    if lr is not None and not (number and 0 < lr <= sys.float_info.max):
        msg = f"lr is a positive number, got {lr!r:.80}."
        raise ConfigError(msg)
    return lr


def _curve(answer: CurveAnswer, wanted: list[int], participant: str) -> dict[int, float]:
    measured = sorted(point.steps for point in answer.curve)
    if measured != wanted:
        msg = f"{participant!r} measured at {measured!s:.80}, asked for was {wanted!s:.80}."
        raise ParticipantError(msg)
    found = {point.steps: point.loss for point in answer.curve}
    return {k: found[k] for k in wanted}
