"""Fit: several rounds one after the other, and when to stop before the last.

Knows the server's rounds and their records. Knows nothing about how one is run, checkpoints or who watches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError, QuorumError
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.loop import run_round
from llmchain_fed.federated.server.divergence import OnDivergence, checked_on_divergence
from llmchain_fed.federated.server.evaluation import stands_still
from llmchain_fed.federated.server.server import Server

_MOST_ROUNDS = 2**31


@dataclass(frozen=True)
class Fit:
    """So many rounds, and what ends them early."""

    server: Server
    rounds: int
    of: int | None
    """how many the whole federation has, where that is more than those up to this fit's last"""
    patience: Patience | None
    stops: bool
    """whether a round that diverges is the last"""

    @classmethod
    def asked(
        cls,
        server: Server,
        rounds: int,
        *,
        patience: int | None,
        min_delta: float,
        on_divergence: OnDivergence,
        of: int | None = None,
    ) -> Fit:
        """The fit that a user asks for.

        Raises:
            ConfigError: An option makes no sense; see `FederatedAveraging.fit`.
        """
        patience, min_delta, of = plain_number(patience), plain_number(min_delta), plain_number(of)
        if of is not None and (type(of) is not int or not 1 <= of <= _MOST_ROUNDS):
            msg = f"of= is how many rounds the whole federation has, a whole number of at least 1, got {of!r:.80}."
            raise ConfigError(msg)
        # participants elsewhere may hold out examples of their own
        measured = server.evaluator.active or not server.runtime.sequential
        if patience is not None and (type(patience) is not int or patience < 1 or not measured):
            msg = "patience is at least 1 and needs evaluation=…, which says what held-out loss is measured on."
            raise ConfigError(msg)
        number = isinstance(min_delta, (int, float)) and not isinstance(min_delta, bool)
        if not (number and 0 <= min_delta <= sys.float_info.max):
            msg = f"min_delta is a finite number of nats per token, 0 or more, got {min_delta!r:.80}."
            raise ConfigError(msg)
        stops = checked_on_divergence(on_divergence, measured=measured)
        # it counts on where the fit that was interrupted stood
        waiting = Patience(patience, min_delta, server.patience) if patience is not None else None
        return cls(server, rounds, of, waiting, stops)

    def run(
        self,
        join: Callable[[], object],
        begins: Callable[[int, tuple[str, ...]], object],
        completed: Callable[[RoundRecord], object],
    ) -> None:
        """Runs them, and lets participants join before each; where it stops early the history says why.

        Who `begins` and has `completed` a round is told as `run_round` tells it.

        Raises:
            ConfigError: Nothing is measured that could end it early, as shows once everybody has joined.
        """
        self.server.planned = max(self.of or 0, self.server.round + self.rounds)
        try:
            self._run(join, begins, completed)
        finally:
            self.server.planned = None
        self.server.patience = []

    def _run(
        self,
        join: Callable[[], object],
        begins: Callable[[int, tuple[str, ...]], object],
        completed: Callable[[RoundRecord], object],
    ) -> None:
        for left in reversed(range(self.rounds)):
            join()  # a round's seconds begin with its broadcast: an engine's start is not a round's cost
            if left == self.rounds - 1:
                self._check_measured()
            why: list[str] = []

            def ends(record: RoundRecord, left: int = left, why: list[str] = why) -> None:
                over = self.patience is not None and self.patience.over(record, shared=self.server.evaluator.is_shared)
                diverged = self.server.diverged if self.stops else None
                why += [diverged] if diverged else [str(self.patience)] if over else []
                self.server.patience = self.patience.state() if self.patience is not None and not why and left else []
                completed(record)

            try:
                run_round(self.server, begins, ends)
            except QuorumError:
                if not self.stops or self.server.diverged is None:
                    raise
                self.server.history.stopped_early = self.server.diverged
                break
            if why:
                self.server.history.stopped_early = why[0] if left else None  # the last round ends it anyway
                break

    def _check_measured(self) -> None:
        """Makes sure that what is to end it early is measured; of participants elsewhere that shows once all are in."""
        server, joined = self.server, self.server.client_manager.joined
        if not (self.stops or self.patience) or server.evaluator.is_shared or server.runtime.sequential:
            return
        if joined.keys() >= set(server.runtime.nodes()) and not any(hello.held_out for hello in joined.values()):
            msg = (
                "patience and on_divergence='stop' go by held-out loss, and all participants have joined and none of "
                "them holds out examples. Let one hold out some where it is, as Participant(held_out=…), or pass "
                "evaluation=examples, one set for all."
            )
            raise ConfigError(msg)


def checked_rounds(what: str, rounds: int, server: Server) -> int:
    """How many rounds to run, if there are any and somebody to run them with.

    Raises:
        ConfigError: There are not.
    """
    rounds = plain_number(rounds)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        msg = f"{what} takes at least one round, got rounds={rounds!r}."
        raise ConfigError(msg)
    if not server.runtime.nodes():
        msg = "there is nobody to learn from. Pass participants={name: examples, …}, or use train() and step()."
        raise ConfigError(msg)
    return rounds


class Patience:
    """Says when held-out loss has stopped improving.

    Args:
        rounds: How many rounds without improvement are too many.
        min_delta: nats per token that count as an improvement.
        state: `state()` of a run that was interrupted, from which it counts on.
    """

    def __init__(self, rounds: int, min_delta: float, state: Sequence[float]) -> None:
        self._rounds, self._min_delta = rounds, min_delta
        self._best, self._waited = (float(state[0]), int(state[1])) if state else (float("inf"), 0)

    def __str__(self) -> str:
        by = f" by {self._min_delta}" if self._min_delta else ""
        return f"held-out loss did not improve{by} for {self._waited} round{'s' if self._waited != 1 else ''}"

    def state(self) -> list[float]:
        """The best loss so far and the rounds since, for a checkpoint."""
        return [self._best, self._waited] if self._best < float("inf") else []

    def over(self, record: RoundRecord, *, shared: bool) -> bool:
        """Whether to stop after a round.

        Where the loss has not improved, a round counts if it was measured on one set that is shared by all, or on so
        many participants' that no single one says so alone.
        """
        before, after = record.held_out_before, record.held_out_after
        if after is None:
            return False
        if self._waited == 0 and self._best == float("inf") and before is not None and math.isfinite(before):
            self._best = before
        improved = after < self._best - self._min_delta
        if not (improved or shared or stands_still(record, self._min_delta)):
            return False
        self._best, self._waited = (after, 0) if improved else (self._best, self._waited + 1)
        return self._waited >= self._rounds
