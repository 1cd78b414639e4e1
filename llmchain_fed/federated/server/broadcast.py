"""Broadcast: sends participants what they lack of the global state, and no more.

Knows what each participant has, codecs and the runtime. Knows nothing about rules or about what is done with the
state. A participant that lost what it had says so and is sent everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmchain_fed import untrusted
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.global_state import CODED, STALE, START, GlobalState, Version, is_start_of, named
from llmchain_fed.federated.protocol.tasks import StateHeader, StateTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.model.weights import change_stamp
from llmchain_fed.updates import serialization
from llmchain_fed.updates.codecs import spec
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.lora_layout import PARTS, LoraLayout, selected
from llmchain_fed.updates.low_rank import Factors


class KnownVersion(NamedTuple):
    """Which version of the global state a participant is known to have.

    | what it has | `version` | `found` | a message to it |
    |---|---|---|---|
    | nothing that is known: it is new, was lost, or said that it is stale | None | False | brings everything |
    | the first state, which it found in its own model | 0 | True | what changed since, against `start:<digest>` |
    | what it was sent last | its number | False | what changed since, against that version |
    """

    version: int | None = None
    found: bool = False


class Sent(NamedTuple):
    """One participant's answer, and the bytes that went there for it."""

    node: str
    answer: bytes | Exception
    bytes: int


@dataclass(frozen=True)
class _Grown:
    """A layer's remainder: its factors, and what rank they had before each version that added to them."""

    factors: Factors
    before: tuple[tuple[int, int], ...]
    """(version, rank before it), oldest first"""
    stamp: bytes = field(init=False)
    """tells whether they were written into since: they are those that the model answers with"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamp", self._stamp_now())

    def _stamp_now(self) -> bytes:
        return change_stamp({"a": self.factors.a, "b": self.factors.b})

    def rank_shared_with(self, new: Factors) -> int:
        """How much of `new`, from its beginning, is this remainder: all of it or nothing."""
        return self.factors.rank if is_start_of(self.factors, new) and self.stamp == self._stamp_now() else 0

    def after(self, version: int) -> int | None:
        """From which rank on the factors are newer than that version; None where nothing is."""
        return next((rank for number, rank in self.before if number > version), None)


@dataclass(frozen=True)
class _Codes:
    """The change that made a version, as a codec's parts."""

    number: int
    names: list[str]
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


class Broadcast:
    """Keeps versions of what participants have: the global state, or with a codec its copy as they decode it.

    With a codec a change travels as codes, of the difference between the global state and that copy: what one message
    loses, the next one brings, because the difference still has it (error feedback, arXiv 1809.07599). The codes of
    the last changes are kept for who was not asked meanwhile, as long as they are fewer bytes than the values.

    Args:
        codec: For changes; None sends changed tensors as they are.
        layout: Of the LoRA factors, to cut them for participants of a smaller rank.
        attendance: Is told who is asked, and who answers.
    """

    def __init__(self, codec: Codec | None, layout: LoraLayout | None, attendance: Attendance | None = None) -> None:
        self._codec, self.layout, self._attendance = codec, layout, attendance or Attendance()
        self._token = secrets.token_hex(8)
        self.number = 0
        """which version participants are sent now; another number means that something changed"""
        self._start = ""
        self._source: dict[str, Tensor] = {}  # the global values as they are
        self._values: dict[str, Tensor] = {}  # as participants have them: the same, but for what a codec left out
        self._stamps: dict[str, int] = {}
        self._remainder: dict[str, _Grown] = {}
        self._codes: list[_Codes] = []
        self._codes_since = 0  # the version from which on they are all there
        self._known: dict[str, KnownVersion] = {}
        self._ranks: dict[str, tuple[int, Mapping[str, float]]] = {}

    # --- what there is ----------------------------------------------------------------------------------------------

    def publish(self, state: GlobalState, digest: str) -> None:
        """Takes the global state as it is now; nothing travels yet.

        Args:
            state: What participants shall have; its tensors are kept, not copied.
            digest: The model's `weights_hash`, by which a participant may be found to have the first state already.
        """
        if not self._values:
            self._values, self._start = dict(state.values), digest
            self._source = dict(state.values)
            self._stamps = dict.fromkeys(state.values, 0)
            self._remainder = {n: _Grown(f, ((0, 0),)) for n, f in state.remainder.items()}
            return
        if state.values.keys() != self._source.keys():
            different = sorted(state.values.keys() ^ self._source.keys())
            msg = (
                f"the model's trainable tensors are others than when the federation began ({different[:3]} …). "
                "Freeze or unfreeze before FederatedAveraging is made, or make a new one."
            )
            raise FederationError(msg)
        changed = [n for n, t in state.values.items() if not torch.equal(t, self._source[n])]
        gone = [n for n in self._remainder if n not in state.remainder]
        known = {} if gone else self._remainder  # a message cannot take a layer away: everything is sent anew
        shared = {n: known[n].rank_shared_with(f) if n in known else 0 for n, f in state.remainder.items()}
        moved = [n for n, f in state.remainder.items() if shared[n] != f.rank]
        if not (changed or moved or gone):
            return
        self.number += 1
        self._source |= {n: state.values[n] for n in changed}
        if gone:  # rare, after rolling back
            self._known = {}
        if self._codec is not None and changed:
            self._encode(changed, state)
        else:
            self._values |= {n: state.values[n] for n in changed}
        self._stamps |= dict.fromkeys(changed, self.number)
        self._remainder = dict(known)
        for layer in moved:
            former = known[layer].before if shared[layer] else ()
            self._remainder[layer] = _Grown(state.remainder[layer], (*former, (self.number, shared[layer])))

    def _encode(self, changed: list[str], state: GlobalState) -> None:
        assert self._codec is not None
        difference = {n: state.values[n].float() - self._values[n].float() for n in changed}
        parts = self._codec.encode(difference)
        decoded = self._codec.decode(parts, serialization.describe({n: self._values[n] for n in changed}))
        for name, change in decoded.items():
            old = self._values[name]
            self._values[name] = (old.float() + change).to(old.dtype)
        self._codes.append(_Codes(self.number, changed, parts))
        while sum(codes.nbytes for codes in self._codes) > sum(t.nbytes for t in self._values.values()):
            self._codes_since = self._codes.pop(0).number

    def state_for(self, node: str | None = None) -> dict[str, Tensor]:
        """The trainable values that a participant starts from, at its own rank; not to be changed."""
        rank, scaling = self._ranks.get(node, (None, None)) if node is not None else (None, None)
        if rank is None or self.layout is None:
            return self._values
        return self.layout.at_rank(self._values, rank, scaling)

    def rank_of(self, node: str) -> int | None:
        """The LoRA rank of a participant that has one of its own."""
        return self._ranks[node][0] if node in self._ranks else None

    def scaling_of(self, node: str) -> Mapping[str, float] | None:
        """Layer → s of a participant whose rank is its own."""
        return self._ranks[node][1] if node in self._ranks else None

    # --- who has it -------------------------------------------------------------------------------------------------

    def joined(self, node: str, weights_hash: str | None, rank: int | None, alpha: float | None) -> None:
        """A participant has joined; None is what it did not say of its weights' hash and a LoRA rank of its own."""
        self._known.pop(node, None)
        self._ranks.pop(node, None)
        if rank is not None and self.layout is not None:
            self._ranks[node] = (rank, self.layout.scaling_at(rank, alpha))
        elif weights_hash is not None and weights_hash == self._start:
            self._known[node] = KnownVersion(0, found=True)

    def call(
        self,
        runtime: Runtime,
        task: StateTask,
        nodes: Sequence[str],
        timeout: float | None = None,
        *,
        largest: int | None = None,
    ) -> Iterator[Sent]:
        """Lets nodes do a task on the global state; yields their answers as `Runtime.call` does.

        An answer is waited for `timeout` seconds, and has at most `largest` bytes, where the runtime guards that.
        """
        if largest is not None:
            runtime.expect(largest)
        # One after the other where they are asked so anyway: a stale one is asked again at once, and updates come in
        # one order whoever had what, so that a resumed run adds them as an uninterrupted one does.
        for group in [[n] for n in nodes] if runtime.sequential else [list(nodes)]:
            yield from self._call(runtime, task, group, timeout)

    def _call(self, runtime: Runtime, task: StateTask, nodes: list[str], timeout: float | None) -> Iterator[Sent]:
        bytes_sent = dict.fromkeys(nodes, 0)
        waiting = nodes
        for attempt in range(2):
            payloads = self._payloads(waiting, task)
            stale = []
            alike = len({id(m) for m in payloads.values()}) == 1
            payload: Any = next(iter(payloads.values())) if alike else payloads
            answers = runtime.call(task.operation, waiting, payload, timeout) if waiting else ()
            for node, answer in self._attendance.following(task.operation, waiting, answers):
                bytes_sent[node] += len(payloads[node])
                if isinstance(answer, bytes) and answer == STALE and attempt == 0:
                    self._known[node] = KnownVersion()
                    stale.append(node)
                    continue
                self._known[node] = KnownVersion(self.number) if isinstance(answer, bytes) else KnownVersion()
                yield Sent(node, answer, bytes_sent[node])
            waiting = stale

    def message(self, node: str, task: StateTask) -> bytes:
        """The one message for one node."""
        return self._payloads([node], task)[node]

    def lacks(self, node: str) -> tuple[StateHeader, dict[str, Tensor]]:
        """What a message would bring to a node now: what its tensors make of the global state, and the tensors."""
        return self._brought(self._known.get(node, KnownVersion()), node)

    def _payloads(self, nodes: Sequence[str], task: StateTask) -> dict[str, bytes]:
        made: dict[tuple[KnownVersion, Any], bytes] = {}
        found = {}
        for node in nodes:
            rank = self._ranks.get(node)
            key = (self._known.get(node, KnownVersion()), (rank[0], next(iter(rank[1].values()))) if rank else None)
            if key not in made:
                state, tensors = self._brought(key[0], node)
                made[key] = messages.write(task, tensors, state)
            found[node] = made[key]
        return found

    def _brought(self, known: KnownVersion, node: str) -> tuple[StateHeader, dict[str, Tensor]]:
        rank = self.rank_of(node)
        suffix = "" if rank is None else f"{rank}x{next(iter(self._ranks[node][1].values()))!r}"
        head: dict[str, Any] = {"version": str(Version(self._token, self.number, suffix))}
        if known.version is not None:
            version = str(Version(self._token, known.version, suffix))
            head["against"] = START + self._start if known.found else version
        since = -1 if known.version is None else known.version
        changed = [n for n, stamp in self._stamps.items() if stamp > since]
        tensors: dict[str, Tensor] = {}
        codes = [codes for codes in self._codes if codes.number > since]
        all_there = known.version is not None and since >= self._codes_since and rank is None
        if all_there and sum(c.nbytes for c in codes) < sum(self._values[n].nbytes for n in changed):
            head |= {"coded": spec(self._codec), "coded_names": {str(c.number): self._named(c.names) for c in codes}}
            for each in codes:
                tensors |= {f"{CODED}{each.number}/{name}": part for name, part in each.parts.items()}
                changed = [n for n in changed if n not in each.names]
        values = self.state_for(node)
        tensors |= {n: values[n] for n in changed}
        begins = {n: first for n, grown in self._remainder.items() if (first := grown.after(since)) is not None}
        tensors |= named({n: self._remainder[n].factors.beyond(first) for n, first in begins.items()})
        head["appended"] = {n: first for n, first in begins.items() if first}
        return untrusted.checked(StateHeader, head, what="the state of a message", error=FederationError), tensors

    def _named(self, names: list[str]) -> str | list[str]:
        """Shorter, where they are one of the usual parts."""
        return next((part for part in PARTS if selected(self._values, part) == names), names)

    # --- on disk ----------------------------------------------------------------------------------------------------

    def copy_state(self) -> dict[str, Tensor]:
        """What participants have, where a codec makes that differ from the global state; else nothing."""
        return dict(self._values) if self._codec is not None else {}

    def restore(self, copy: Mapping[str, Tensor], state: GlobalState) -> None:
        """Goes on from a checkpoint: `copy_state()` of then, or nothing. Nobody is known to have anything."""
        self._source, self._values = dict(state.values), dict(copy or state.values)
        self._remainder = {n: _Grown(f, ((0, 0),)) for n, f in state.remainder.items()}
        self._token = secrets.token_hex(8)
        self.number, self._start, self._stamps = 0, "", dict.fromkeys(self._values, 0)
        self._known, self._codes, self._codes_since = {}, [], 0
