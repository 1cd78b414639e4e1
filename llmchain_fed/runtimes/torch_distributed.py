"""TorchDistributed: participants spread over the ranks of a `torchrun` job. For a trusted cluster.

Knows process groups, ranks and bytes. Knows nothing about models, rounds or aggregation. Neither encrypted nor
authenticated: whoever reaches the master port takes part. Across organisations use NVFlare.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmchain_fed.errors import ConfigError, DuplicateParticipantError, FederationError
from llmchain_fed.federated.runtime import InProcess, Operation, Payload, Runtime, TaskHandler, payload_for
from llmchain_fed.runtimes import process_group, ranks
from llmchain_fed.runtimes.heartbeat import Aside
from llmchain_fed.runtimes.messaging import error_codes
from llmchain_fed.runtimes.messaging.answer_sizes import AnswerSizes
from llmchain_fed.runtimes.process_group import LEADER
from llmchain_fed.untrusted import Strict, machine_memory, shown

_SLICE = 0.5  # seconds between looks at heartbeats
# seconds in which a leader that goes down hands out what the rounds so far have brought, to one rank and to all
_OUTCOME, _OUTCOMES = 1.0, 2.0
_HeadT = TypeVar("_HeadT", bound=Strict)


class TorchDistributed(Runtime):
    """Every rank runs the same script and holds its own participants; rank 0 also leads the loop and aggregates.

    `FederatedAveraging(chain, participants=mine, runtime=TorchDistributed()).fit(3)` on every rank, started by
    `torchrun --nproc-per-node 3 script.py`; afterwards every rank's chain has the averaged weights. A rank may hold
    several participants or none. Messages are JSON and update bytes, point to point over gloo, also where there are
    GPUs; answers are taken in the order of ranks, so that a rerun gives the same weights bit for bit.

    A rank answers once all its participants are done. One that dies, is frozen (its heartbeat, which goes on while it
    trains, is not seen for `patience`) or has no answer for `timeout` ends the job with an error that names it and its
    participants, and with a line on stderr at once; `torchrun --max-restarts` starts all anew. So does one whose
    message makes no sense, or is larger than any answer to what it was asked, before memory is taken for it. Make this
    object before the model is loaded: it picks each rank's GPU.

    Args:
        timeout: seconds a rank may work on an answer: more than all its participants take for a round together.
        patience: seconds without a sign of life of a rank's process after which it counts as frozen or gone; in a
            process group of yours that has no store to see them in, a line says that nobody is watched.
        threads: For torch, per rank. None: this machine's cores divided by its ranks, so that ranks do not fight
            for them.

    Raises:
        ConfigError: The process was not started by torchrun, or with nonsense options.
        FederationError: The ranks do not find each other within `timeout`.
    """

    def __init__(self, *, timeout: float = 1800.0, patience: float = 60.0, threads: int | None = None) -> None:
        for name, least, given in (("timeout", 0, timeout), ("patience", 2, patience)):
            if not given > least:
                of = f"more than {least} seconds" if least else "a positive number of seconds"
                msg = f"{name} is {of}, got {given!r}."
                raise ConfigError(msg)
        self._timeout, self._patience = timeout, patience
        group = process_group.join(timedelta(seconds=timeout))
        self._group, self._heartbeat, self._host = group.messages, group.heartbeat, group.host
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        torch.set_num_threads(threads or max(1, process_group.cores() // ranks_here))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())
        self._hosted = InProcess()
        self._homes: dict[str, int] = {}
        self._broken: str | None = None
        self._torn: set[int] = set()
        """ranks to which no whole message can be sent any more"""
        self._joined = False
        self._sizes = AnswerSizes()

    def __repr__(self) -> str:
        return f"TorchDistributed(rank {self.rank} of {self.world_size}, {len(self._homes)} participants)"

    # --- the seam ---------------------------------------------------------------------------------------------------

    replicated = True

    @property
    def local(self) -> Mapping[str, TaskHandler]:
        """This rank's participants."""
        return self._hosted.local

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == LEADER

    def host(self, clients: Mapping[str, TaskHandler]) -> None:
        """Lets this rank's participants join; every rank calls it once, with its own or with none.

        Raises:
            DuplicateParticipantError: Two ranks have a participant of one name; raised on every rank.
            ConfigError: It was called before: one federation an object.
            FederationError: A rank is gone.
        """
        if self._joined:
            msg = (
                "this TorchDistributed carries a federation already: make one for each, in the same order on all ranks."
            )
            raise ConfigError(msg)
        self._joined, self._hosted = True, InProcess(clients)
        if self.leads:
            homes: list[tuple[str, int]] = [(name, LEADER) for name in clients]
            for rank in self._others():
                joining, _ = self._receive(rank, ranks.Joining, most=0)
                homes += [(name, rank) for name in joining.names]
            names = [name for name, _ in homes]
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            for rank in self._others():
                told = {"names": names, "ranks": [home for _, home in homes], "twice": twice}
                self._send(rank, told, _tensor(b""))
        else:
            self._send(LEADER, {"names": list(clients)}, _tensor(b""))
            found, _ = self._receive(LEADER, ranks.Homes, most=0)
            homes, twice = list(zip(found.names, found.ranks, strict=True)), found.twice
        if twice:
            both = [rank for name, rank in homes if name == twice[0]]
            msg = f"ranks {both} both have a participant {shown(twice[0])!r}: their updates could not be told apart."
            raise DuplicateParticipantError(msg)
        self._homes = dict(homes)

    def nodes(self) -> list[str]:
        """All ranks' participants, in the order of ranks."""
        return list(self._homes)

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._sizes.expect(num_bytes, op)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """Lets all ranks work at the same time; yields rank 0's answers first, then the others' in order.

        Args:
            op: What they are asked to do.
            nodes: The names of those who are asked.
            payload: The same bytes for all, or each node's own by name.
            timeout: seconds each participant may take for itself.

        Raises:
            FederationError: A node nobody knows; a rank that died or is silent, by name.
        """
        self._check_usable()
        wanted: dict[int, list[str]] = {}
        for node in nodes:
            if node not in self._homes:
                msg = f"there is no participant {node!r}. Known: {', '.join(self._homes)}."
                raise FederationError(msg)
            wanted.setdefault(self._homes[node], []).append(node)
        mine = wanted.pop(LEADER, [])
        for rank, names in wanted.items():
            parts, which = ranks.distinct(payload, names)
            head = {"op": op, "nodes": names, "timeout": timeout, "which": which, "sizes": [len(p) for p in parts]}
            self._send(rank, head, _tensor(parts[0] if len(parts) == 1 else b"".join(parts)))
        outstanding = [(rank, name) for rank in sorted(wanted) for name in wanted[rank]]
        try:
            yield from self._hosted.call(op, mine, payload, timeout)
            while outstanding:
                rank, name = outstanding[0]
                answer = self._answer(rank, self._sizes.most(op, len(payload_for(payload, name))))
                outstanding.pop(0)
                yield name, answer
        finally:  # one that stops listening leaves no answer behind for the next call
            if self._broken is None:
                for rank, name in outstanding:
                    self._answer(rank, self._sizes.most(op, len(payload_for(payload, name))))

    def follow(self, adopt: Callable[[bytes], None]) -> None:
        """Answers rank 0 until it publishes, on the ranks that do not lead.

        Raises:
            FederationError: Rank 0 failed (what it published is adopted before), or is gone.
        """
        self._check_usable()
        while True:
            head, body = self._receive(LEADER, ranks.Task, ranks.Ended, most=machine_memory())
            if not isinstance(head, ranks.Task):
                assert isinstance(head, ranks.Ended)
                adopt(body)
                if head.error is not None:
                    raise self._told(error_codes.said(head.error.model_dump()))
                return
            # all first, then the answers: a send waits until rank 0 comes round to this rank
            with self._making_sense(LEADER):
                given = ranks.by_node(body, head, self.local)
            del body
            op: Any = head.op  # any that the peers know
            answers = [answer for _, answer in self._hosted.call(op, head.nodes, given, head.timeout)]
            del given
            for answer in answers:
                error, body = (error_codes.to_plain(answer), b"") if isinstance(answer, Exception) else (None, answer)
                if not self._send(LEADER, {"error": error}, _tensor(body)):
                    break  # nobody takes it any more: what comes next is how the loop ended

    def publish(self, outcome: bytes, error: BaseException | None = None) -> None:
        """Ends the other ranks' `follow`, on rank 0; those that cannot be reached after an error are left out."""
        head = {"error": error_codes.to_plain(error) if error is not None else None}
        body, until = _tensor(outcome), time.monotonic() + _OUTCOMES
        for rank in self._others():
            broken = self._broken is not None  # then some are at work, and are told by their heartbeat
            if rank in self._torn or (broken and time.monotonic() > until):
                continue
            try:
                self._send(rank, head, body, seconds=_OUTCOME if broken else 0.0)
            except FederationError:
                if error is None:
                    raise

    def close(self) -> None:
        """Leaves the process group, if this object made it."""
        process_group.leave()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _answer(self, rank: int, most: int) -> bytes | Exception:
        head, body = self._receive(rank, ranks.Ended, most=most)
        return body if head.error is None else error_codes.from_same_script(head.error.model_dump())

    def _send(self, rank: int, head: Mapping[str, Any], body: Tensor, seconds: float = 0.0) -> bool:
        """Two sizes, the JSON head, the body; False where the leader has stopped before it took them."""
        text = json.dumps(head).encode()
        with self._whole(rank):
            sizes = torch.tensor([len(text), body.numel()])
            parts = [part for part in (sizes, _tensor(text), body) if part.numel()]
            group = self._group
            return self._watched(rank, lambda: [dist.send(p, rank, group=group) for p in parts], seconds, sends=True)

    def _receive(self, rank: int, *kinds: type[_HeadT], most: int) -> tuple[_HeadT, bytes]:
        """A message of one of these kinds, whose body has at most so many bytes."""
        with self._whole(rank):
            sizes = self._fill(torch.empty(2, dtype=torch.int64), rank).tolist()
            with self._making_sense(rank):
                for size, limit, what in zip(sizes, (ranks.MAX_HEAD, most), ("head", "body"), strict=True):
                    if not 0 <= size <= limit:
                        msg = f"a {what} of {size:,} bytes was announced where at most {limit:,} make sense."
                        raise FederationError(msg)
            text, body = (self._fill(torch.empty(size, dtype=torch.uint8), rank) for size in sizes)
        with self._making_sense(rank):
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
    def _making_sense(self, rank: int) -> Iterator[None]:
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
        # Rank 0 may wait for each of the others in turn, so they must be more patient with it than it is with them.
        most = seconds or (self._timeout if self.leads else self._timeout * (self.world_size + 1))
        message, waited, alive = Aside(wait), 0.0, self._heartbeat
        while not message.over(_SLICE):
            waited += _SLICE  # not by the clock: a process that was stopped itself has not waited
            if alive is not None and max(alive.silent(rank), alive.unanswered) > self._patience:
                raise self._frozen(rank)
            if alive is not None and alive.stopped is not None and not self.leads:
                why, ago = alive.stopped
                if sends:
                    return False
                if ago > _OUTCOMES + _SLICE:
                    raise self._told(why)
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
        return self._lost(rank if self.leads else LEADER, f"{silent}; its process is not answering")

    def _lost(self, rank: int, what: str | BaseException) -> FederationError:
        """A rank that cannot be gone on with: what it does, or the error of whatever was done with it."""
        if isinstance(what, BaseException):
            word = self._heartbeat.word_of(rank) if self._heartbeat is not None else None
            gone = "is gone" if self.leads else "is gone or gave up (its own error says why)"
            what = f"{gone}: {process_group.words(what)}" if word is None else f"ended: {word}"
        names = ", ".join(repr(shown(name)) for name, home in self._homes.items() if home == rank)[:300]
        self._torn.add(rank)
        return self._over(f"rank {rank} ({names or 'no participants'}) {what}")

    def _told(self, why: str) -> FederationError:
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
            if self.leads and self._heartbeat is not None:
                self._heartbeat.stop(f"FederationError: {self._broken}")
        return FederationError(self._broken)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise FederationError(self._broken)

    def _others(self) -> range:
        return range(LEADER + 1, self.world_size)


def _tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor, shape (n,)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
