"""Personalizing: asks participants for personal models and for losses side by side, and reads what they answer.

Knows the hub and the messages. Knows nothing about how a participant trains for itself: that is `personal`.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field

from llmchain_fed.errors import ConfigError, FederationError, LLMChainFedError, ParticipantError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.history import told_of
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol import finiteness
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import MAX_CURVE
from llmchain_fed.federated.runtime import InProcess, Operation, Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.adapters import GLOBAL
from llmchain_fed.untrusted import Strict, checked, decoding
from llmchain_fed.updates import serialization
from llmchain_fed.updates.update import MAX_SECONDS

ModelT = TypeVar("ModelT", bound=BaseModel)
_KINDS = ("base", "global", "personal")
_ANSWER = 2**20  # bytes: losses at some thousand counts of steps


def _loss(found: Any) -> float:
    if (number := finiteness.number(found)) is None:
        msg = "no loss"
        raise ValueError(msg)
    return number


# a loss of a model that has diverged is NaN, and shown as that
Loss = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_loss)]


class LossesAnswer(Strict):
    """Held-out losses side by side, of what there is."""

    base: Loss = 0.0
    global_: Loss = Field(default=0.0, alias="global")
    personal: Loss = 0.0

    def by_kind(self) -> dict[str, float]:
        """Those that were sent."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class FineTunedAnswer(Strict):
    """What fine-tuning for one participant did."""

    train_loss: Loss
    steps: int = Field(default=0, ge=0)
    seconds: float = Field(ge=0, le=MAX_SECONDS)
    losses: LossesAnswer = LossesAnswer()


class CurvePoint(Strict):
    """A held-out loss after so many steps."""

    steps: int = Field(ge=0)
    loss: Loss


class CurveAnswer(Strict):
    """Held-out losses over steps of adaptation."""

    curve: list[CurvePoint] = Field(max_length=MAX_CURVE, fail_fast=True)


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
    if type(steps) is not int or steps < 1:
        msg = f"steps is a count of at least 1, got {steps!r}."
        raise ConfigError(msg)
    _check_lr(lr)
    answer = _ask(server, "train", participant, {"personal": {"steps": steps, "lr": lr}})
    found = _checked(FineTunedAnswer, answer, participant)
    return Personalized(participant, steps, found.train_loss, found.seconds, found.losses.by_kind())


def compare(server: Server, participants: Sequence[str] | None) -> dict[str, dict[str, float]]:
    """Losses side by side; see `FederatedAveraging.compare`."""
    holders = [n for n, hello in server.client_manager.joined.items() if hello.held_out]
    wanted = holders if participants is None else list(participants)
    if strangers := [n for n in wanted if n not in holders]:
        msg = f"{strangers} hold out no examples. Those who do: {', '.join(holders) or 'nobody; pass evaluation='}."
        raise ConfigError(msg)
    asked = ((n, _ask(server, "evaluate", n, {"side_by_side": True})) for n in wanted)
    return {n: _checked(LossesAnswer, answer, n).by_kind() for n, answer in asked}


def curve(server: Server, participant: str, steps: Sequence[int], lr: float | None) -> dict[int, float]:
    """Held-out loss over steps of adaptation; see `FederatedAveraging.adaptation_curve`."""
    wanted = _checked_steps(steps)
    _check_lr(lr)
    if not server.client_manager.joined[participant].held_out if participant in server.client_manager.joined else False:
        msg = f"participant {participant!r} holds out no examples to measure on. Pass evaluation=, or held_out=."
        raise ConfigError(msg)
    return _curve(_ask(server, "train", participant, {"curve": wanted, "lr": lr}), wanted, participant)


def curve_of_stranger(
    server: Server, participant: Participant, steps: Sequence[int], lr: float | None
) -> dict[int, float]:
    """The same for one that takes no part, in this process; nothing of it stays."""
    wanted = _checked_steps(steps)
    _check_lr(lr)
    if participant.held_out is None:
        msg = f"participant {participant.name!r} has no held_out= to measure on."
        raise ConfigError(msg)
    if participant.name in server.transport.nodes():
        msg = f"{participant.name!r} takes part already: pass its name, or give the newcomer another."
        raise ConfigError(msg)
    runtime = InProcess({participant.name: Client(server.target, participant, server.settings.training)})
    remainder = server.publish().remainder
    broadcast = Broadcast(None, server.broadcast.layout)  # its own: what the others hold, and who is there, stays
    broadcast.publish(GlobalState(server.broadcast.state_for(), remainder), "")
    broadcast.joined(participant.name, None, participant.rank, participant.alpha)
    what = {"curve": wanted, "lr": lr}
    return _curve(_answer(server, broadcast, runtime, "train", participant.name, what), wanted, participant.name)


def _ask(server: Server, op: Operation, participant: str, what: Mapping[str, Any]) -> bytes:
    if participant not in server.client_manager.joined:
        why = server.client_manager.absent.get(participant)
        there = ", ".join(server.client_manager.joined) or "nobody"
        reason = told_of(why) if why is not None else "nobody of that name"
        msg = f"participant {participant!r} is not there ({reason}). There: {there}."
        raise ConfigError(msg) if why is None else FederationError(msg)
    server.publish()
    return _answer(server, server.broadcast, server.transport, op, participant, what)


def _answer(
    server: Server, broadcast: Broadcast, runtime: Runtime, op: Operation, participant: str, what: Mapping[str, Any]
) -> bytes:
    header = {
        "kind": "task",
        "round": server.round,
        "base": server.model.fingerprint(),
        "seconds": server.settings.deadline,
    }
    (sent,) = broadcast.call(runtime, op, [participant], header | dict(what), server.settings.deadline)
    if isinstance(sent.answer, Exception):
        if participant in runtime.local and isinstance(sent.answer, LLMChainFedError):
            raise sent.answer
        msg = f"participant {participant!r}: {told_of(sent.answer)}"
        raise FederationError(msg) from sent.answer
    return sent.answer


def _checked_steps(steps: Sequence[int]) -> list[int]:
    found = list(steps) if isinstance(steps, Iterable) else []
    if not found or any(type(k) is not int or k < 0 for k in found):
        msg = f"steps are counts of 0 or more, such as (0, 1, 2), got {found or steps!r:.80}."
        raise ConfigError(msg)
    return sorted(set(found))


def _check_lr(lr: float | None) -> None:
    number = isinstance(lr, (int, float)) and not isinstance(lr, bool)
    if lr is not None and not (number and 0 < lr <= sys.float_info.max):
        msg = f"lr is a positive number, got {lr!r:.80}."
        raise ConfigError(msg)


def _curve(answer: bytes, wanted: list[int], participant: str) -> dict[int, float]:
    points = _checked(CurveAnswer, answer, participant).curve
    measured = sorted(point.steps for point in points)
    if measured != wanted:
        msg = f"{participant!r} measured at {measured!s:.80}, asked for was {wanted!s:.80}."
        raise ParticipantError(msg)
    found = {point.steps: point.loss for point in points}
    return {k: found[k] for k in wanted}


def _checked(model: type[ModelT], answer: bytes, participant: str) -> ModelT:
    """A participant's answer, of which every field has its type and its range.

    Raises:
        ParticipantError: It makes no sense.
    """
    what = f"what {participant!r} answers"
    with decoding(what, ParticipantError):
        return checked(model, serialization.read_json(answer, most=_ANSWER), what=what, error=ParticipantError)
