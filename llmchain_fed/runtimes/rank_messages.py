"""RankMessages: whole messages between the ranks of a process group, each watched while it is waited for.

Knows gloo's tensors, sizes and signs of life. Knows nothing of operations or of what a message is for. A message is
whole or the group's end: what follows would be taken for its rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmchain_fed.errors import FederationError
from llmchain_fed.runtimes import process_group, ranks
from llmchain_fed.runtimes.aside import Aside
from llmchain_fed.runtimes.messaging.heads import HeadT
from llmchain_fed.runtimes.process_group import LEADER
from llmchain_fed.untrusted import shown

_SLICE = 0.5  # seconds between looks at heartbeats
OUTCOMES = 2.0
"""seconds in which a leader that goes down hands all ranks what the rounds so far have brought"""


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
                for size, limit, what in zip(sizes, (ranks.MAX_HEAD, most), ("head", "body"), strict=True):
                    if not 0 <= size <= limit:
                        msg = f"a {what} of {size:,} bytes was announced where at most {limit:,} make sense."
                        raise FederationError(msg)
            text, body = (self._fill(torch.empty(size, dtype=torch.uint8), rank) for size in sizes)
        with self.making_sense(rank):
            head = ranks.read_head(text.numpy().tobytes(), kinds, "its head")
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
        """Waits for one message from or to a rank, as long as it shows signs of life; False where it is not taken.

        Raises:
            FederationError: It shows none, has taken too long, or leads and has stopped.
        """
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
