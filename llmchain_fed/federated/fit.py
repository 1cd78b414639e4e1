"""Fit: several rounds one after the other, and when to stop before the last.

Knows the server's rounds and their records. Knows nothing about how one is run, checkpoints or who watches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmchain_fed.errors import ConfigError, QuorumError
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.loop import run_round
from llmchain_fed.federated.server.divergence import OnDivergence, checked_on_divergence
from llmchain_fed.federated.server.pooling import stands_still
from llmchain_fed.federated.server.server import Server


@dataclass(frozen=True)
class Fit:
    """So many rounds, and what ends them early."""

    server: Server
    rounds: int
    patience: Patience | None
    stops: bool
    """whether a round that diverges is the last"""

    @classmethod
    def asked(
        cls, server: Server, rounds: int, *, patience: int | None, min_delta: float, on_divergence: OnDivergence
    ) -> Fit:
        """The fit that a user asks for; it counts on where an interrupted one was.

        Raises:
            ConfigError: An option makes no sense; see `FederatedAveraging.fit`.
        """
        # participants elsewhere may hold out examples of their own
        measured = server.evaluator.active or not server.runtime.sequential
        stop = checked_patience(patience, min_delta, measured=measured)
        if stop is not None:
            stop.go_on(server.patience)
        return cls(server, rounds, stop, checked_on_divergence(on_divergence, measured=measured))

    def run(
        self,
        join: Callable[[], object],
        begins: Callable[[int, tuple[str, ...]], object],
        completed: Callable[[RoundRecord], object],
    ) -> None:
        """Runs them; where it stops early the history says why.

        Args:
            join: Lets participants join before each round.
            begins: Is told of each before it is run: its number, counted from 1, and who is asked.
            completed: Is told of each afterwards.
        """
        for left in reversed(range(self.rounds)):
            join()  # a round's seconds begin with its broadcast: an engine's start is not a round's cost
            why: list[str] = []

            def ends(record: RoundRecord, left: int = left, why: list[str] = why) -> None:
                why += self._reasons_to_stop(record)
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
        self.server.patience = []

    def _reasons_to_stop(self, record: RoundRecord) -> list[str]:
        """Why this round is the last, where it is; patience counts it."""
        server, patience = self.server, self.patience
        over = patience is not None and patience.over(
            record.held_out_before,
            record.held_out_after,
            believed=server.evaluator.is_shared or stands_still(record, patience.min_delta),
        )
        return [server.diverged] if self.stops and server.diverged else [str(patience)] if over else []


def check_rounds(what: str, rounds: int, server: Server) -> None:
    """Makes sure that there are rounds to run, and somebody to run them with.

    Raises:
        ConfigError: There are not.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        msg = f"{what} takes at least one round, got rounds={rounds!r}."
        raise ConfigError(msg)
    if not server.runtime.nodes():
        msg = "there is nobody to learn from. Pass participants={name: examples, …}, or use train() and step()."
        raise ConfigError(msg)


class Patience:
    """Says when held-out loss has stopped improving.

    Args:
        rounds: How many rounds without improvement are too many.
        min_delta: nats per token that count as an improvement.
    """

    def __init__(self, rounds: int, min_delta: float) -> None:
        self._rounds, self.min_delta = rounds, min_delta
        self._best, self._waited = float("inf"), 0

    def __str__(self) -> str:
        by = f" by {self.min_delta}" if self.min_delta else ""
        return f"held-out loss did not improve{by} for {self._waited} round{'s' if self._waited != 1 else ''}"

    def state(self) -> list[float]:
        """The best loss so far and the rounds since, for a checkpoint."""
        return [self._best, self._waited] if self._best < float("inf") else []

    def go_on(self, state: Sequence[float]) -> None:
        """Counts on from `state()` of a run that was interrupted."""
        if state:
            self._best, self._waited = float(state[0]), int(state[1])

    def over(self, before: float | None, after: float | None, *, believed: bool = True) -> bool:
        """Whether to stop after a round.

        Args:
            before: Its held-out loss, None where it was not measured.
            after: Likewise.
            believed: Whether it counts where the loss has not improved.
        """
        if after is None:
            return False
        if self._waited == 0 and self._best == float("inf") and before is not None and math.isfinite(before):
            self._best = before
        improved = after < self._best - self.min_delta
        if not improved and not believed:
            return False
        self._best, self._waited = (after, 0) if improved else (self._best, self._waited + 1)
        return self._waited >= self._rounds


def checked_patience(rounds: int | None, min_delta: float, *, measured: bool) -> Patience | None:
    """`patience` and `min_delta`, if they make sense; None where nothing stops early.

    Args:
        rounds: `patience`.
        min_delta: Checked without patience, too.
        measured: Whether held-out loss is.

    Raises:
        ConfigError: No count, or nothing is measured; no finite number of 0 or more.
    """
    if rounds is not None and (type(rounds) is not int or rounds < 1 or not measured):
        msg = "patience is at least 1 and needs evaluation=…, which says what held-out loss is measured on."
        raise ConfigError(msg)
    number = isinstance(min_delta, (int, float)) and not isinstance(min_delta, bool)
    if not (number and 0 <= min_delta <= sys.float_info.max):
        msg = f"min_delta is a finite number of nats per token, 0 or more, got {min_delta!r:.80}."
        raise ConfigError(msg)
    return Patience(rounds, min_delta) if rounds is not None else None
