"""Personalizing: asks participants for personal models and for losses side by side, and reads what they answer.

Knows the hub and the messages. Knows nothing about how a participant trains for itself: that is `personal`.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmchain_fed.adapters import GLOBAL
from llmchain_fed.errors import ConfigError, FederationError, LLMChainFedError, ParticipantError
from llmchain_fed.federated import finiteness, wire
from llmchain_fed.federated.hub import Hub
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.peer import LocalPeer
from llmchain_fed.federated.runtime import InProcess, Operation

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


def personalize(hub: Hub, participant: str, steps: int, lr: float | None) -> Personalized:
    """Fine-tunes a personal adapter at the participant; see `FederatedAveraging.personalize`."""
    rule, layout = hub.settings.rule, hub.settings.layout
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
    answer = _ask(hub, "train", participant, {"personal": {"steps": steps, "lr": lr}})
    numbers = _numbers(answer, ("train_loss", "seconds"), participant)
    losses = _losses(answer.get("losses", {}), participant)
    return Personalized(participant, steps, numbers["train_loss"], numbers["seconds"], losses)


def compare(hub: Hub, participants: Sequence[str] | None) -> dict[str, dict[str, float]]:
    """Losses side by side; see `FederatedAveraging.compare`."""
    holders = [n for n, hello in hub.roster.joined.items() if hello.held_out]
    wanted = holders if participants is None else list(participants)
    if strangers := [n for n in wanted if n not in holders]:
        msg = f"{strangers} hold out no examples. Those who do: {', '.join(holders) or 'nobody; pass evaluation='}."
        raise ConfigError(msg)
    return {n: _losses(_ask(hub, "evaluate", n, {"side_by_side": True}), n) for n in wanted}


def curve(hub: Hub, participant: str, steps: Sequence[int], lr: float | None) -> dict[int, float]:
    """Held-out loss over steps of adaptation; see `FederatedAveraging.adaptation_curve`."""
    wanted = _checked_steps(steps)
    _check_lr(lr)
    if not hub.roster.joined[participant].held_out if participant in hub.roster.joined else False:
        msg = f"participant {participant!r} holds out no examples to measure on. Pass evaluation=, or held_out=."
        raise ConfigError(msg)
    return _curve(_ask(hub, "train", participant, {"curve": wanted, "lr": lr}), wanted, participant)


def curve_of_stranger(hub: Hub, participant: Participant, steps: Sequence[int], lr: float | None) -> dict[int, float]:
    """The same for one that takes no part, in this process; nothing of it stays."""
    wanted = _checked_steps(steps)
    _check_lr(lr)
    if participant.held_out is None:
        msg = f"participant {participant.name!r} has no held_out= to measure on."
        raise ConfigError(msg)
    if participant.name in hub.transport.nodes():
        msg = f"{participant.name!r} takes part already: pass its name, or give the newcomer another."
        raise ConfigError(msg)
    peer = LocalPeer(hub.trainee, participant, hub.settings.training)  # what it is sent, it alone holds
    header = _header(hub) | {"curve": wanted, "lr": lr}
    hub.publish()
    hub.broadcast.joined(participant.name, None, participant.rank, participant.alpha)
    try:
        answer = peer.handle("train", hub.broadcast.message(participant.name, header))
    finally:  # whoever trains under this name later has a rank of its own
        hub.broadcast.joined(participant.name, None, None, None)
    return _curve(wire.read_json(answer), wanted, participant.name)


def _header(hub: Hub) -> dict[str, Any]:
    return {"kind": "task", "round": hub.round, "base": hub.model.fingerprint(), "seconds": hub.settings.deadline}


def _ask(hub: Hub, op: Operation, participant: str, what: Mapping[str, Any]) -> dict[str, Any]:
    if participant not in hub.roster.joined:
        why = hub.roster.absent.get(participant)
        there = ", ".join(hub.roster.joined) or "nobody"
        msg = f"participant {participant!r} is not there ({why or 'nobody of that name'}). There: {there}."
        raise ConfigError(msg) if why is None else FederationError(msg)
    hub.publish()
    header = _header(hub) | dict(what)
    (sent,) = hub.broadcast.call(hub.transport, op, [participant], header, hub.settings.deadline)
    if isinstance(sent.answer, Exception):
        if isinstance(hub.transport, InProcess) and isinstance(sent.answer, LLMChainFedError):
            raise sent.answer
        msg = f"participant {participant!r}: {type(sent.answer).__name__}: {sent.answer}"
        raise FederationError(msg) from sent.answer
    return wire.read_json(sent.answer)


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


def _curve(answer: Mapping[str, Any], wanted: list[int], participant: str) -> dict[int, float]:
    points = answer.get("curve")
    if not isinstance(points, list) or not all(isinstance(p, dict) for p in points):
        msg = f"what {participant!r} answers is no curve: {answer!r:.120}"
        raise ParticipantError(msg)
    found = {p.get("steps"): _numbers(p, ("loss",), participant)["loss"] for p in points}
    if sorted(found, key=str) != sorted(wanted, key=str):
        msg = f"{participant!r} measured at {list(found)!r:.80}, asked for was {wanted}."
        raise ParticipantError(msg)
    return {k: found[k] for k in wanted}


def _losses(answer: Any, participant: str) -> dict[str, float]:
    known = [kind for kind in _KINDS if isinstance(answer, dict) and kind in answer]
    return _numbers(answer, known, participant) if known else {}


def _numbers(answer: Mapping[str, Any], names: Sequence[str], participant: str) -> dict[str, float]:
    """These of an answer's numbers; a loss of a model that has diverged is NaN, and shown as that."""
    numbers = {name: found for name in names if (found := finiteness.number(answer.get(name))) is not None}
    if len(numbers) < len(names):
        msg = f"what {participant!r} answers makes no sense: {answer!r:.120}"
        raise ParticipantError(msg)
    return numbers
