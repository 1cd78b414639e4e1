"""RankMessages: what the ranks of a process group say to each other, each message watched while it is waited for.

Knows gloo's tensors, sizes and signs of life, heads, and which part of a body is whose. Knows nothing of what an
operation does. A message is whole or the group's end: what follows would be taken for its rest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from llmchain_fed import untrusted
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.runtime import Payload, payload_for
from llmchain_fed.runtimes import process_group
from llmchain_fed.runtimes.aside import Aside
from llmchain_fed.runtimes.messaging.heads import Fault, HeadT, first_of
from llmchain_fed.runtimes.process_group import LEADER
from llmchain_fed.untrusted import shown

MAX_HEAD = 8 * 2**20
"""bytes: the names of some 100,000 participants"""
Name = Annotated[str, Field(max_length=4096)]
_MOST = 2**20  # participants of a job
_Names = Annotated[list[Name], Field(max_length=_MOST, fail_fast=True)]
_Rank = Annotated[int, Field(ge=0, lt=2**20)]
_Size = Annotated[int, Field(ge=0, lt=2**48)]
_SLICE = 0.5  # seconds between looks at heartbeats
OUTCOMES = 2.0
"""seconds in which a leader that goes down hands all ranks what the rounds so far have brought"""


class Joining(untrusted.Strict):
    """A rank to the leader: whom it has."""

    names: _Names


class Homes(untrusted.Strict):
    """The leader to a rank: who is where, and who is in two places."""

    names: _Names
    ranks: Annotated[list[_Rank], Field(max_length=_MOST, fail_fast=True)]
    twice: _Names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.names) != len(self.ranks):
            msg = "there are more names than ranks, or fewer"
            raise ValueError(msg)
        return self


class RankTask(untrusted.Strict):
    """The leader to a rank: these participants do this; the body carries their payloads."""

    op: Annotated[str, Field(max_length=64)]
    nodes: _Names
    timeout: Annotated[float, Field(ge=0)] | None
    which: Annotated[list[_Rank], Field(max_length=_MOST, fail_fast=True)]
    sizes: Annotated[list[_Size], Field(min_length=1, max_length=_MOST, fail_fast=True)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.which) != len(self.nodes) or any(index >= len(self.sizes) for index in self.which):
            msg = "it does not say which payload is whose"
            raise ValueError(msg)
        return self


class Ended(untrusted.Strict):
    """The leader to a rank: the loop is over, the body is how it ended. A rank to the leader: the body is an answer."""

    error: Fault | None


def read_head(text: bytes, kinds: tuple[type[HeadT], ...], what: str) -> HeadT:
    """A head, which is the first of these kinds whose first field it has.

    Raises:
        FederationError: It is none of them.
    """
    found = untrusted.read_json(text, most=MAX_HEAD, what=what, error=FederationError)
    return first_of(kinds, found, what=what, error=FederationError)


def distinct(payload: Payload, names: list[str]) -> tuple[list[bytes], list[int]]:
    """The different payloads for these nodes, and which of them is whose."""
    parts: list[bytes] = []
    places: dict[int, int] = {}
    which = []
    for name in names:
        part = payload_for(payload, name)
        if id(part) not in places:
            places[id(part)] = len(parts)
            parts.append(part)
        which.append(places[id(part)])
    return parts, which


def by_node(body: bytes, task: RankTask, hosted: Mapping[str, Any]) -> Payload:
    """The reverse of `distinct`.

    Raises:
        FederationError: The body is not made of these parts, or a node is not one of this rank.
    """
    strangers = [name for name in task.nodes if name not in hosted]
    if strangers or sum(task.sizes) != len(body):
        why = (
            f"{untrusted.shown(strangers[0])} is not here" if strangers else "the body has another size than its parts"
        )
        msg = f"a task that makes no sense: {why}."
        raise FederationError(msg)
    if len(task.sizes) == 1:
        return body
    ends = list(itertools.accumulate(task.sizes))
    parts = [body[end - size : end] for end, size in zip(ends, task.sizes, strict=True)]
    return {name: parts[index] for name, index in zip(task.nodes, task.which, strict=True)}


class RankMessages:
    """Sends and receives messages, and says of a rank with which that cannot be gone on why that is.

    Args:
        group: The process group, its heartbeat and who keeps its store.
        rank: The rank of this process.
        world_size: How many ranks there are.
        timeout: seconds a rank may work on an answer.
        patience: seconds without a sign of life after which a rank counts as frozen or gone.
        homes: Participant → its rank, so that a rank's loss names its participants; it may be filled later.
    """

    def __init__(
        self,
        group: process_group.Group,
        rank: int,
        world_size: int,
        timeout: float,
        patience: float,
        homes: Mapping[str, int],
    ) -> None:
        self._group, self._heartbeat, self._host = group.messages, group.heartbeat, group.host
        self._leads, self._patience = rank == LEADER, patience
        # Rank 0 may wait for each of the others in turn, so they must be more patient with it than it is with them.
        self._most = timeout if self._leads else timeout * (world_size + 1)
        self._homes = homes
        self._broken: str | None = None
        self.torn: set[int] = set()
        """ranks to which no whole message can be sent any more"""

    @property
    def over(self) -> bool:
        """Whether a rank is lost, without which the group cannot go on."""
        return self._broken is not None

    def check_usable(self) -> None:
        """Makes sure that no rank is lost.

        Raises:
            FederationError: One is; the reason is that of the first.
        """
        if self._broken is not None:
            raise FederationError(self._broken)

    def send(self, rank: int, head: Mapping[str, Any], body: bytes, seconds: float = 0.0) -> bool:
        """Sends two sizes, the JSON head and the body; False where the leader has stopped before it took them.

        In `seconds` they must be taken; 0 is as long as the rank may work on an answer.

        Raises:
            FederationError: The rank is gone, frozen or silent; by its name.
        """
        text = json.dumps(head).encode()
        with self._whole(rank):
            sizes = torch.tensor([len(text), len(body)])
            parts = [part for part in (sizes, _tensor(text), _tensor(body)) if part.numel()]
            group = self._group
            return self._watched(rank, lambda: [dist.send(p, rank, group=group) for p in parts], seconds, sends=True)

    def receive(self, rank: int, *kinds: type[HeadT], most: int) -> tuple[HeadT, bytes]:
        """A message of one of these kinds, whose body has at most so many bytes.

        Raises:
            FederationError: The rank is gone, frozen or silent, or sent what makes no sense; by its name.
        """
        with self._whole(rank):
            sizes = self._fill(torch.empty(2, dtype=torch.int64), rank).tolist()
            with self.making_sense(rank):
                for size, limit, what in zip(sizes, (MAX_HEAD, most), ("head", "body"), strict=True):
                    if not 0 <= size <= limit:
                        msg = f"a {what} of {size:,} bytes was announced where at most {limit:,} make sense."
                        raise FederationError(msg)
            text, body = (self._fill(torch.empty(size, dtype=torch.uint8), rank) for size in sizes)
        with self.making_sense(rank):
            head = read_head(text.numpy().tobytes(), kinds, "its head")
        return head, body.numpy().tobytes()

    @contextmanager
    def _whole(self, rank: int) -> Iterator[None]:
        """A message to or from a rank, whole or the group's end: what follows would be taken for its rest."""
        try:
            yield
        except FederationError:
            raise
        except RuntimeError as error:
            raise self._lost(rank, error) from error
        except BaseException as error:
            self._lost(rank, f"was left in the middle of a message ({type(error).__name__})")
            raise

    @contextmanager
    def making_sense(self, rank: int) -> Iterator[None]:
        """What a rank sent that makes no sense ends the group's work as its loss does, and names it."""
        try:
            yield
        except FederationError as error:
            raise self._lost(rank, f"sent what makes no sense: {shown(str(error), 300)}") from error

    def _fill(self, tensor: Tensor, rank: int) -> Tensor:
        if tensor.numel():
            work = dist.irecv(tensor, rank, group=self._group)
            assert work is not None  # it is for ranks outside the group, of which there are none
            self._watched(rank, work.wait)
        return tensor

    def _watched(self, rank: int, wait: Callable[[], Any], seconds: float = 0.0, *, sends: bool = False) -> bool:
        """Waits for one message from or to a rank, as long as it shows signs of life; False where it is not taken."""
        most = seconds or self._most
        message, waited, alive = Aside(wait), 0.0, self._heartbeat
        while not message.over(_SLICE):
            waited += _SLICE  # not by the clock: a process that was stopped itself has not waited
            if alive is not None and max(alive.silent(rank), alive.unanswered) > self._patience:
                raise self._frozen(rank)
            if alive is not None and alive.stopped is not None and not self._leads:
                why, ago = alive.stopped
                if sends:
                    return False
                if ago > OUTCOMES + _SLICE:
                    raise self.told(why)
            if waited > most:
                raise self._lost(rank, f"was silent for {most:g} s, though its process runs")
        message.result()
        return True

    def _frozen(self, rank: int) -> FederationError:
        """A rank whose heart does not beat, or who keeps the store that would tell."""
        assert self._heartbeat is not None
        silent = (
            f"has given no sign of life for {self._patience:g} s: frozen (stopped, swapping), or its machine is gone"
        )
        if self._heartbeat.unanswered > self._patience and self._host != f"rank {LEADER}":
            return self._over(f"{self._host}, which keeps what the ranks share, {silent}")
        return self._lost(rank if self._leads else LEADER, f"{silent}; its process is not answering")

    def _lost(self, rank: int, what: str | BaseException) -> FederationError:
        """A rank that cannot be gone on with: what it does, or the error of whatever was done with it."""
        if isinstance(what, BaseException):
            word = self._heartbeat.word_of(rank) if self._heartbeat is not None else None
            gone = "is gone" if self._leads else "is gone or gave up (its own error says why)"
            what = f"{gone}: {process_group.words(what)}" if word is None else f"ended: {word}"
        names = ", ".join(repr(shown(name)) for name, home in self._homes.items() if home == rank)[:300]
        self.torn.add(rank)
        return self._over(f"rank {rank} ({names or 'no participants'}) {what}")

    def told(self, why: str) -> FederationError:
        """How the loop ended, in the leader's words."""
        found = f"rank {LEADER}, which leads, stopped: {why}"
        process_group.say(found)
        return FederationError(found)

    def _over(self, why: str) -> FederationError:
        """The group's end: said at once, to the other ranks too, which may be in whatever they do."""
        if self._broken is None:
            self._broken = (
                f"{why}. The group cannot go on without it: look at that rank's own output, or start with "
                "torchrun --max-restarts."
            )
            process_group.say(self._broken)
            if self._leads and self._heartbeat is not None:
                self._heartbeat.stop(f"FederationError: {self._broken}")
        return FederationError(self._broken)


def _tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor, shape (n,)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
