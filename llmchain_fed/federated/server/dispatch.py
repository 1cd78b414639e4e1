"""Dispatcher: lets participants join and train within a deadline, and asks again who could not be reached.

Knows runtimes, who takes part and the clock. Knows nothing about aggregation or about what an update must be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from llmchain_fed.errors import ConfigError, DeadlineError, ParticipantError, TransportError
from llmchain_fed.federated.compatibility import check_rank
from llmchain_fed.federated.history import ParticipantRecord
from llmchain_fed.federated.protocol.tasks import TrainTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.server.client_manager import ClientManager
from llmchain_fed.federated.server.round import Arrival, too_few
from llmchain_fed.federated.settings import Settings

_PAUSE = 2.0  # seconds before the first retry; the n-th waits n times as long


class Dispatcher:
    """Asks participants, as patiently as a federation's options say."""

    def __init__(
        self, runtime: Runtime, client_manager: ClientManager, broadcast: Broadcast, settings: Settings
    ) -> None:
        self._runtime, self._client_manager, self._broadcast = runtime, client_manager, broadcast
        self._rule, config = settings.rule, settings.config
        self._deadline, self._retries, self._quorum = config.deadline, config.retries, config.quorum

    def join(self, number: int) -> list[str]:
        """Lets everyone join a round who is there, and returns who has now; if too few are, the others are asked again.

        Raises:
            QuorumError: Too few; every reason is listed.
            LLMChainFedError: See `ClientManager.join`.
        """
        joined: list[str] = []
        for attempt in range(self._retries + 1):
            time.sleep(_PAUSE * attempt)
            joined += self._join(self._deadline, again=attempt > 0)
            if len(self._client_manager.joined) >= self._quorum:
                return joined
        raise too_few(number, len(self._client_manager.joined), self._quorum, self._client_manager.reasons)

    def _join(self, timeout: float | None, *, again: bool) -> list[str]:
        newcomers = self._client_manager.join(timeout=timeout, again=again)
        for name in newcomers:
            hello = self._client_manager.joined[name]
            try:
                check_rank(self._rule, name, hello.rank, self._broadcast.layout)
            except ConfigError as error:
                self._client_manager.leave(name, ParticipantError(str(error)))
            else:
                self._broadcast.joined(name, hello.weights_hash, hello.rank, hello.alpha)
        return [name for name in newcomers if name in self._client_manager.joined]

    def train(self, task: TrainTask, chosen: list[str], largest: int) -> Iterator[Arrival]:
        """Lets the chosen train; yields what arrives of each of them once, as it arrives, and at last who did not.

        No answer exceeds `largest` bytes.
        """
        until = time.monotonic() + self._deadline if self._deadline is not None else None
        waiting, sent = chosen, dict.fromkeys(chosen, 0)
        missed: dict[str, Exception] = {}
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(_PAUSE * attempt)
                if until is not None and time.monotonic() >= until:
                    break
                self._join(_left(until), again=True)  # one that has restarted must be told anew how to train
            asked = [name for name in waiting if name in self._client_manager.joined]
            missed = {name: self._client_manager.absent[name] for name in waiting if name not in asked}
            for name, answer, size in self._broadcast.call(self._runtime, task, asked, _left(until), largest=largest):
                sent[name] += size if not isinstance(answer, TransportError) else 0  # whether it came there at all
                if isinstance(answer, (ParticipantError, TransportError)):
                    self._client_manager.leave(name, answer)
                    missed[name] = answer
                    continue
                hello = self._client_manager.joined[name]
                yield Arrival(name, answer, sent[name], hello.num_examples, hello.num_tokens)
            waiting = list(missed)
            if not waiting:
                break
        yield from (Arrival(name, error, sent[name]) for name, error in missed.items())

    def judge(self, arrival: Arrival, record: ParticipantRecord) -> None:
        """Tells what became of an answer; a record begins with the first reason of the absence that it is part of."""
        attendance, (name, answer) = self._client_manager.attendance, arrival[:2]
        if record.status == "trained":
            attendance.worked(name)
        elif isinstance(answer, DeadlineError):
            attendance.late(name, answer)
        else:
            why = answer if isinstance(answer, Exception) else record.reason or "UpdateRefusedError"
            attendance.out(name, why, lasting=not isinstance(answer, TransportError))
        if record.reason is not None:
            record.reason = attendance.told(name, record.reason)


def _left(until: float | None) -> float | None:
    return max(until - time.monotonic(), 0.0) if until is not None else None
