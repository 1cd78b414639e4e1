"""Plan: what a federation will take, before it is run. Bytes and memory by size, time by one timed optimizer step.

Knows the hub's sizes. Trains one step and throws it away.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from llmchain_fed.federated import wire
from llmchain_fed.federated.codecs import Codec, encoded_bytes
from llmchain_fed.federated.history import size
from llmchain_fed.federated.hub import Hub
from llmchain_fed.federated.options import sample_size
from llmchain_fed.federated.rule import Part, selected
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.wire import TensorInfo

_HEADER = 400  # bytes: what a message says beside its tensors' names


@dataclass(frozen=True)
class Plan:
    """A projection; bytes are within the size of headers of what the ledger will say, time is a rough guide."""

    rounds: int
    participants: int
    """that train in a round"""
    bytes_up: int
    """of all updates in all rounds"""
    bytes_down: int
    """of all global weights on their way to participants, those for evaluation included"""
    memory: int
    """bytes at the hub: model, global state and its copies, and the updates that the rule keeps"""
    seconds: float | None
    """of local training: one timed step × steps × participants that share this process, or the slowest one's"""
    seconds_per_step: float | None

    def __str__(self) -> str:
        time = "time unknown"
        if self.seconds is not None:
            long = self.seconds >= 3600
            time = f"{self.seconds / 3600:.1f} h of training" if long else f"{self.seconds:.0f} s of training"
        return (
            f"{self.rounds} rounds × {self.participants} participants: {size(self.bytes_up)} up, "
            f"{size(self.bytes_down)} down, {size(self.memory)} of memory at the hub, {time}"
        )


def plan_of(hub: Hub, rounds: int, *, evaluates: bool) -> Plan:
    """The projection for so many more rounds.

    Args:
        hub: After its participants have joined.
        rounds: How many.
        evaluates: Whether every round is measured before and after.
    """
    settings = hub.settings
    present = hub.roster.present()
    chosen = sample_size(settings.per_round, len(present))
    hub.publish()
    up, down, kept = 0, 0.0, 0
    remainder = _Remainder(hub, chosen)
    for number in range(hub.round, hub.round + rounds):
        update = sum(_update_bytes(hub, node, number) for node in present) * chosen // len(present)
        up += update
        kept = max(kept, update)
        if number == hub.round:
            first = sum(len(hub.broadcast.message(n, {})) for n in present)
            down += first * (1 if evaluates else chosen / len(present))
        change = _change_bytes(hub, number) + remainder.grow()
        last = number == hub.round + rounds - 1
        if not last or evaluates:  # the change that this round makes travels to whoever is asked next
            down += (len(present) if evaluates else chosen) * change
    timed = _timed_steps(hub, present[:1] if isinstance(hub.transport, InProcess) else present)
    seconds = None
    if timed:
        steps = max(seconds * count for seconds, count in timed)
        seconds = steps * rounds * (chosen if isinstance(hub.transport, InProcess) else 1)
    return Plan(
        rounds=rounds,
        participants=chosen,
        bytes_up=int(up),
        bytes_down=int(down),
        memory=_memory(hub, kept) + 3 * remainder.bytes,
        seconds=seconds,
        seconds_per_step=max(s for s, _ in timed) if timed else None,
    )


def _message_bytes(infos: dict[str, TensorInfo], codec: Codec | None) -> int:
    if codec is not None:
        return encoded_bytes(codec, infos) + _HEADER
    entries = {n: {"dtype": "F32", "shape": i.shape, "data_offsets": [10**7, 10**7]} for n, i in infos.items()}
    return sum(i.nbytes for i in infos.values()) + len(json.dumps(entries, separators=(",", ":"))) + _HEADER


def _infos(hub: Hub, node: str | None, part: Part) -> dict[str, TensorInfo]:
    values = hub.broadcast.state_for(node)
    return wire.describe({n: values[n] for n in selected(values, part)})


def _update_bytes(hub: Hub, node: str, number: int) -> int:
    return _message_bytes(_infos(hub, node, hub.settings.rule.shares(number)), hub.settings.codec)


def _change_bytes(hub: Hub, number: int) -> int:
    """What of a round's outcome each receiver is sent, the remainder apart."""
    rule = hub.settings.rule
    whole = rule.refactor is not None or not rule.linear
    return _message_bytes(_infos(hub, None, "all" if whole else rule.shares(number)), hub.settings.broadcast_codec)


class _Remainder:
    """How the frozen remainder of FedEx and FLoRA grows: by rank, up to what its matrix can hold."""

    def __init__(self, hub: Hub, updates: int) -> None:
        layout, values = hub.settings.layout, hub.broadcast.state_for()
        self._layers: list[list[int]] = []  # rank, rank a round adds, m + n, min(m, n)
        grows = {"fedex": updates - 1, "flora": updates}.get(hub.settings.rule.name, 0)
        for layer in layout.layers if layout is not None and grows else []:
            pair = layout.factors(values, layer) if layout is not None else None
            if pair is not None:
                sides = pair.b.shape[0] + pair.a.shape[1]
                self._layers.append([0, grows * pair.rank, sides, pair.full_rank])

    def grow(self) -> int:
        """Bytes of a round's increment; all of a layer's factors, once they had to be brought back."""
        sent = 0
        for layer in self._layers:
            rank, more, sides, most = layer
            layer[0] = min(rank + more, most)
            sent += 4 * sides * (more if rank + more <= most else most)
        return sent

    @property
    def bytes(self) -> int:
        """Size of the factors now."""
        return sum(4 * rank * sides for rank, _, sides, _ in self._layers)


def _timed_steps(hub: Hub, nodes: list[str]) -> list[tuple[float, int]]:
    """(seconds of a step, steps a round) where somebody says so."""
    found = []
    header = {"kind": "task", "round": hub.round, "base": hub.model.fingerprint(), "time_step": True}
    for sent in hub.broadcast.call(hub.transport, "train", nodes, header, hub.settings.deadline):
        if isinstance(sent.answer, bytes):
            said = wire.read_json(sent.answer)
            seconds, steps = said.get("seconds"), said.get("steps")
            if isinstance(seconds, float) and type(steps) is int and steps > 0:
                found.append((seconds, steps))
    return found


def _memory(hub: Hub, updates: int) -> int:
    model = sum(p.numel() * p.element_size() for p in hub.model.parameters())
    state = sum(t.numel() * t.element_size() for t in hub.broadcast.state_for().values())
    keeps = updates if not hub.settings.rule.linear else state
    return model + 4 * state + keeps  # what participants hold, where the round began, its mean, a message
