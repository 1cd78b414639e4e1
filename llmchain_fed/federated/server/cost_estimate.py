"""Plan: what a federation will take, before it is run. Bytes and memory by size, time by one timed optimizer step.

Knows the hub's sizes. Trains one step and throws it away.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llmchain_fed.federated.protocol.answers import TimeStepAnswer
from llmchain_fed.federated.protocol.global_state import GlobalState, parted
from llmchain_fed.federated.protocol.tasks import TimeStepTask
from llmchain_fed.federated.reporting.tables import size
from llmchain_fed.federated.server.asking import ask, task_now
from llmchain_fed.federated.server.server import Server
from llmchain_fed.updates import serialization
from llmchain_fed.updates.codecs.base import Codec, encoded_bytes
from llmchain_fed.updates.lora_layout import Part, selected
from llmchain_fed.updates.serialization import TensorInfo

_HEADER = 400  # bytes: what a message says beside its tensors' names
_ENTRY = 90  # bytes: what it says of a tensor beside its name


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


def plan_of(server: Server, rounds: int) -> Plan:
    """The projection for so many more rounds, once participants have joined."""
    present = server.client_manager.present()
    with_held_out = [n for n in present if server.client_manager.joined[n].held_out]
    server.publish()
    in_process = server.runtime.sequential
    # before the bytes: it brings the state to them
    answers = ask(server, task_now(server, TimeStepTask), TimeStepAnswer, present[:1] if in_process else present)
    # one that makes no sense is as good as none
    timed = [(said.seconds, said.steps) for _, said in answers if isinstance(said, TimeStepAnswer) and said.steps]
    downlink, up, down, kept = _Downlink(server, present), 0, 0, 0
    down += sum(map(downlink.ask, with_held_out))
    for number in range(server.round, server.round + rounds):
        chosen = server.client_manager.sample(server.settings, number)
        down += sum(map(downlink.ask, chosen))
        update = sum(_update_bytes(server, node, number) for node in chosen)
        up, kept = up + update, max(kept, update)
        downlink.close(number, chosen)
        down += sum(map(downlink.ask, with_held_out))
    sampled = len(server.client_manager.sample(server.settings, server.round))
    seconds = None
    if timed:
        steps = max(seconds * count for seconds, count in timed)
        seconds = steps * rounds * (sampled if in_process else 1)
    return Plan(
        rounds=rounds,
        participants=sampled,
        bytes_up=up,
        bytes_down=down,
        memory=_memory(server, kept) + 3 * downlink.remainder.bytes,
        seconds=seconds,
        seconds_per_step=max(s for s, _ in timed) if timed else None,
    )


def _message_bytes(infos: dict[str, TensorInfo], codec: Codec | None) -> int:
    if codec is not None:
        return encoded_bytes(codec, infos) + _HEADER
    entries = {n: {"dtype": "F32", "shape": i.shape, "data_offsets": [10**7, 10**7]} for n, i in infos.items()}
    return sum(i.nbytes for i in infos.values()) + len(json.dumps(entries, separators=(",", ":"))) + _HEADER


def _infos(server: Server, node: str | None, part: Part) -> dict[str, TensorInfo]:
    values = server.broadcast.state_for(node)
    return serialization.describe({n: values[n] for n in selected(values, part)})


def _update_bytes(server: Server, node: str, number: int) -> int:
    rule, codec = server.settings.rule, server.settings.codec
    values = _infos(server, node, rule.shares(number))
    payload = rule.collection().payload(values)
    return _message_bytes(values if payload is None else dict(payload), codec)


class _Downlink:
    """What every participant lacks, by size, as rounds go by; what `Broadcast` will find out by comparing values."""

    def __init__(self, server: Server, nodes: list[str]) -> None:
        self._server, self._rule = server, server.settings.rule
        self.remainder = _Remainder(server)
        self._first: dict[str, set[str]] = {}  # names of what it lacks now, till it is asked
        self._begins: dict[str, list[int]] = {}  # and from which rank on the remainder
        self._sizes: dict[str, int] = {}
        for node in nodes:
            state, tensors = server.broadcast.lacks(node)
            values, remainder = parted(tensors)
            size = len(server.broadcast.message(node, task_now(server, TimeStepTask)))
            self._first[node], self._sizes[node] = set(values), size
            self._begins[node] = self.remainder.begins(remainder.keys(), state.appended or {})
        self._asked = dict.fromkeys(nodes, 0)  # closed rounds that it has been sent
        self._changes: list[Part] = []  # of each closed round

    def ask(self, node: str) -> int:
        """Bytes of the next message to it, which it then has."""
        since, begins = self._asked[node], self._begins.pop(node, None)
        first = self._first.pop(node, set())
        self._asked[node] = len(self._changes)
        if since == len(self._changes) and begins is not None:
            return self._sizes[node] + _HEADER
        infos = _infos(self._server, node, "all")
        names = first.union(*(selected(infos, part) for part in self._changes[since:]))
        whole = _message_bytes({n: infos[n] for n in infos if n in names}, None)
        lacks_values = bool(first & infos.keys())  # else what it lacked so far travels as codes, too
        coded = self._coded(since) + (self._sizes[node] if first else 0)
        return self.remainder.since(since, begins) + (whole if lacks_values else min(whole, coded))

    def _coded(self, since: int) -> int:
        """Bytes of the changes as codes, where they travel so."""
        codec, changes = self._server.settings.broadcast_codec, self._changes[since:]
        if codec is None:
            return sys.maxsize
        return sum(_message_bytes(_infos(self._server, None, part), codec) - _HEADER for part in changes) + _HEADER

    def close(self, number: int, nodes: list[str]) -> None:
        """A round of these participants is over."""
        part: Part = "all" if self._rule.rewrites else self._rule.shares(number)
        values = self._server.broadcast.state_for()
        # as the rule leaves it, B is zero before a round: what does not change does not travel
        zero_b = self._changes or not any(bool(values[n].any()) for n in selected(values, "B"))
        self._changes.append("A" if self._rule.restarts and zero_b else part)
        self.remainder.grow(nodes)


class _Remainder:
    """How the frozen remainder grows: by rank, up to the rank that its matrix can have."""

    def __init__(self, server: Server) -> None:
        layout = server.settings.layout
        self._server, self._more = server, server.settings.rule.remainder_rank
        layers = layout.layers if layout is not None and self._more is not None else []
        pairs = [layout.factors(server.broadcast.state_for(), layer) for layer in layers] if layout is not None else []
        self._sides = [(p.b.shape[0] + p.a.shape[1], p.full_rank) for p in pairs]
        self._layers = layers
        self._names = 2 * sum(len(layer) + _ENTRY for layer in layers)
        now = GlobalState.of(server.model).remainder
        self._ranks = [[now[layer].rank if layer in now else 0 for layer in layers]]  # after each round
        self._since: list[list[int]] = []  # rank from which on a round's outcome is sent

    def grow(self, nodes: list[str]) -> None:
        """A round of these participants."""
        layout = self._server.settings.layout
        if layout is None or self._more is None:
            return
        own = [self._server.broadcast.rank_of(node) or layout.rank or 0 for node in nodes]
        more, former = self._more(own), self._ranks[-1]
        fits = [rank + more <= most for rank, (_, most) in zip(former, self._sides, strict=True)]
        self._since.append([rank if fit else 0 for rank, fit in zip(former, fits, strict=True)])
        self._ranks.append([min(r + more, most) for r, (_, most) in zip(former, self._sides, strict=True)])

    def begins(self, sent: Collection[str], appended: Mapping[str, int]) -> list[int]:
        """From which rank on somebody lacks each layer now, who is sent these layers."""
        ranks = zip(self._layers, self._ranks[0], strict=True)
        return [appended.get(layer, 0) if layer in sent else rank for layer, rank in ranks]

    def since(self, closed: int, first: list[int] | None) -> int:
        """Bytes of what came after so many rounds, and of what was lacking before the first."""
        begins = [min(ranks) for ranks in zip(*self._since[closed:], *([first] if first else []), strict=True)]
        pairs = zip(begins, self._ranks[-1], self._sides, strict=False)  # no begins: nothing came
        sent = sum(4 * sides * (rank - begin) for begin, rank, (sides, _) in pairs)
        return sent + self._names if sent else 0

    @property
    def bytes(self) -> int:
        """Size of the factors now."""
        return sum(4 * rank * sides for rank, (sides, _) in zip(self._ranks[-1], self._sides, strict=True))


def _memory(server: Server, updates: int) -> int:
    model = sum(p.numel() * p.element_size() for p in server.model.parameters())
    state = sum(t.numel() * t.element_size() for t in server.broadcast.state_for().values())
    keeps = updates if server.settings.rule.keeps_updates else state
    start = state if server.runtime.sequential else 0  # to which `reset` goes back
    return model + 4 * state + start + keeps  # what participants have, where the round began, its mean, a message
