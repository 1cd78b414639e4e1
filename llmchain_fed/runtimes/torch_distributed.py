"""TorchDistributed: participants spread over the ranks of a `torchrun` job. For a trusted cluster.

Knows ranks, who is where, and bytes. Knows nothing about models, rounds or aggregation. Neither encrypted nor
authenticated: whoever reaches the master port takes part. Across organisations use NVFlare.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmchain_fed.errors import ConfigError, DuplicateParticipantError, FederationError
from llmchain_fed.federated.runtime import InProcess, Operation, Payload, Runtime, TaskHandler, payload_for
from llmchain_fed.runtimes import process_group
from llmchain_fed.runtimes.messaging import heads
from llmchain_fed.runtimes.messaging.chunked_calls import AnswerSizes
from llmchain_fed.runtimes.process_group import LEADER
from llmchain_fed.runtimes.rank_messages import (
    OUTCOMES,
    Ended,
    Homes,
    Joining,
    RankMessages,
    RankTask,
    by_node,
    distinct,
)
from llmchain_fed.untrusted import machine_memory, shown

_OUTCOME = 1.0  # seconds in which a leader that goes down hands one rank what the rounds so far have brought


class TorchDistributed(Runtime):
    """Every rank runs the same script and has its own participants; rank 0 also leads the loop and aggregates.

    `FederatedAveraging(chain, participants=mine, runtime=TorchDistributed()).fit(3)` on every rank, started by
    `torchrun --nproc-per-node 3 script.py`; afterwards every rank's chain has the averaged weights. A rank may have
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

    replicated = True

    def __init__(self, *, timeout: float = 1800.0, patience: float = 60.0, threads: int | None = None) -> None:
        for name, least, given in (("timeout", 0, timeout), ("patience", 2, patience)):
            if not given > least:
                of = f"more than {least} seconds" if least else "a positive number of seconds"
                msg = f"{name} is {of}, got {given!r}."
                raise ConfigError(msg)
        group = process_group.join(timedelta(seconds=timeout))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._homes: dict[str, int] = {}
        self._messages = RankMessages(group, self.rank, self.world_size, timeout, patience, self._homes)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        torch.set_num_threads(threads or max(1, process_group.cores() // ranks_here))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())
        self._hosted = InProcess()
        self._joined = False
        self._sizes = AnswerSizes()

    def __repr__(self) -> str:
        return f"TorchDistributed(rank {self.rank} of {self.world_size}, {len(self._homes)} participants)"

    # --- the seam ---------------------------------------------------------------------------------------------------

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
                joining, _ = self._messages.receive(rank, Joining, most=0)
                homes += [(name, rank) for name in joining.names]
            names = [name for name, _ in homes]
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            for rank in self._others():
                told = {"names": names, "ranks": [home for _, home in homes], "twice": twice}
                self._messages.send(rank, told, b"")
        else:
            self._messages.send(LEADER, {"names": list(clients)}, b"")
            found, _ = self._messages.receive(LEADER, Homes, most=0)
            homes, twice = list(zip(found.names, found.ranks, strict=True)), found.twice
        if twice:
            both = [rank for name, rank in homes if name == twice[0]]
            msg = f"ranks {both} both have a participant {shown(twice[0])!r}: their updates could not be told apart."
            raise DuplicateParticipantError(msg)
        self._homes.update(homes)

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

        `timeout` is seconds that each participant may take for itself.

        Raises:
            FederationError: A node nobody knows; a rank that died or is silent, by name.
        """
        self._messages.check_usable()
        wanted: dict[int, list[str]] = {}
        for node in nodes:
            if node not in self._homes:
                msg = f"there is no participant {node!r}. Known: {', '.join(self._homes)}."
                raise FederationError(msg)
            wanted.setdefault(self._homes[node], []).append(node)
        mine = wanted.pop(LEADER, [])
        for rank, names in wanted.items():
            parts, which = distinct(payload, names)
            head = {"op": op, "nodes": names, "timeout": timeout, "which": which, "sizes": [len(p) for p in parts]}
            self._messages.send(rank, head, parts[0] if len(parts) == 1 else b"".join(parts))
        outstanding = [(rank, name) for rank in sorted(wanted) for name in wanted[rank]]
        try:
            yield from self._hosted.call(op, mine, payload, timeout)
            while outstanding:
                rank, name = outstanding[0]
                answer = self._answer(rank, self._sizes.most(op, len(payload_for(payload, name))))
                outstanding.pop(0)
                yield name, answer
        finally:  # one that stops listening leaves no answer behind for the next call
            if not self._messages.over:
                for rank, name in outstanding:
                    self._answer(rank, self._sizes.most(op, len(payload_for(payload, name))))

    def follow(self, adopt: Callable[[bytes], None]) -> None:
        """Answers rank 0 until it publishes, on the ranks that do not lead.

        Raises:
            FederationError: Rank 0 failed (what it published is adopted before), or is gone.
        """
        self._messages.check_usable()
        while True:
            head, body = self._messages.receive(LEADER, RankTask, Ended, most=machine_memory())
            if not isinstance(head, RankTask):
                assert isinstance(head, Ended)
                adopt(body)
                if head.error is not None:
                    raise self._messages.told(heads.said(head.error.model_dump()))
                return
            # all first, then the answers: a send waits until rank 0 comes round to this rank
            with self._messages.making_sense(LEADER):
                given = by_node(body, head, self.local)
            del body
            op: Any = head.op  # any that the peers know
            answers = [answer for _, answer in self._hosted.call(op, head.nodes, given, head.timeout)]
            del given
            for answer in answers:
                error, body = (heads.to_plain(answer), b"") if isinstance(answer, Exception) else (None, answer)
                if not self._messages.send(LEADER, {"error": error}, body):
                    break  # nobody takes it any more: what comes next is how the loop ended

    def publish(self, outcome: bytes, error: BaseException | None = None) -> None:
        """Ends the other ranks' `follow`, on rank 0; those that cannot be reached after an error are left out."""
        head = {"error": heads.to_plain(error) if error is not None else None}
        until = time.monotonic() + OUTCOMES
        for rank in self._others():
            over = self._messages.over  # then some are at work, and are told by their heartbeat
            if rank in self._messages.torn or (over and time.monotonic() > until):
                continue
            try:
                self._messages.send(rank, head, outcome, seconds=_OUTCOME if over else 0.0)
            except FederationError:
                if error is None:
                    raise

    def close(self) -> None:
        """Leaves the process group, if this object made it."""
        process_group.leave()

    def _answer(self, rank: int, most: int) -> bytes | Exception:
        head, body = self._messages.receive(rank, Ended, most=most)
        return body if head.error is None else heads.from_same_script(head.error.model_dump())

    def _others(self) -> range:
        return range(LEADER + 1, self.world_size)
