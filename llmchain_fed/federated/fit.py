"""Fit: several rounds one after the other, when to stop before the last, and with which round's weights to end.

Knows the server's rounds and their records. Knows nothing about how one is run, checkpoints or who watches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError, QuorumError
from llmchain_fed.federated.callbacks import Stop
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.loop import run_round
from llmchain_fed.federated.measures.kept import Keeper
from llmchain_fed.federated.measures.monitor import LOSS, Monitored, Patience, check_known, resolved
from llmchain_fed.federated.server.divergence import OnDivergence, checked_on_divergence
from llmchain_fed.federated.server.server import Server

Keep = Literal["last", "best"]
_MOST_ROUNDS = 2**31
_ALIKE = 1e-4
"""how far two values of the same weights are apart by rounding, batches and precision"""
_OTHER_EXAMPLES = (
    "the weights that it begins with were worth something else before: held-out examples, or what measures them, are "
    "others, and the best round and patience begin anew"
)


@dataclass
class Fit:
    """So many rounds, what ends them early, and what is monitored."""

    server: Server
    rounds: int
    monitor: str
    """the name of the value that rounds are judged by"""
    keep: Keep
    patience: int | None
    min_delta: float
    of: int | None
    """how many the whole federation has, where that is more than those up to this fit's last"""
    stops: bool
    """whether a round that diverges is the last"""
    monitored: Monitored = field(default_factory=Monitored)
    waiting: Patience | None = None
    former: RoundRecord | None = None
    """the round whose weights it begins with, until the first of its own rounds has measured them again"""

    @classmethod
    def asked(
        cls,
        server: Server,
        rounds: int,
        *,
        patience: int | None,
        min_delta: float,
        monitor: str,
        keep: Keep,
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
            msg = (
                f"min_delta is a finite number of what is monitored (nats per token), 0 or more, got {min_delta!r:.80}."
            )
            raise ConfigError(msg)
        if keep not in get_args(Keep):
            msg = f"keep is 'last' (the weights of the last round) or 'best' (by monitor=), got {keep!r:.80}."
            raise ConfigError(msg)
        check_known(monitor, server.evaluator)
        if (keep == "best" or monitor != LOSS) and not measured:
            msg = f"keep='best' and monitor={monitor!r} need evaluation=…, which says what is measured on."
            raise ConfigError(msg)
        if server.evaluator.metrics and not measured:
            msg = "metrics=… are measured on held-out examples: say which by evaluation=…, such as evaluation=0.2."
            raise ConfigError(msg)
        stops = checked_on_divergence(on_divergence, measured=measured)
        return cls(server, rounds, monitor, keep, patience, min_delta, of, stops)

    def run(
        self,
        join: Callable[[], object],
        begins: Callable[[int, tuple[str, ...]], object],
        completed: Callable[[RoundRecord], Stop | None],
        keeper: Keeper,
    ) -> bool:
        """Runs them, and lets participants join before each; where it stops early the history says why.

        Who `begins` and has `completed` a round is told as `run_round` tells it. The `keeper` has the best, if that is
        wanted; whether it ends with that, and not with the last.

        Raises:
            ConfigError: Nothing is measured that could end it early, as shows once everybody has joined.
        """
        self.server.planned = max(self.of or 0, self.server.round + self.rounds)
        try:
            self._run(join, begins, completed, keeper)
        finally:
            self.server.planned = None
        self.server.patience = []
        return self.keep == "best" and keeper.finish()

    def _run(
        self,
        join: Callable[[], object],
        begins: Callable[[int, tuple[str, ...]], object],
        completed: Callable[[RoundRecord], Stop | None],
        keeper: Keeper,
    ) -> None:
        history, best = self.server.history, self.keep == "best"
        for left in reversed(range(self.rounds)):
            join()  # a round's seconds begin with its broadcast: an engine's start is not a round's cost
            if left == self.rounds - 1:
                self._begin()
                if best:
                    keeper.begin(self.monitored)
            why: list[str] = []

            def ends(record: RoundRecord, left: int = left, why: list[str] = why) -> None:
                why += self._judge(record, last=not left)
                if best:
                    keeper.judged()
                stop = completed(record)
                why += [stop.reason] if stop is not None else []
                if best:
                    keeper.completed(record)

            try:
                run_round(self.server, begins, ends)
            except QuorumError:
                if not self.stops or self.server.diverged is None:
                    raise
                history.stopped_early = self.server.diverged
                break
            if why:
                history.stopped_early = why[0] if left else None  # the last round ends it anyway
                break

    def _begin(self) -> None:
        """Before the first round: what is monitored is measured by somebody, and counts on where it was."""
        server, history = self.server, self.server.history
        self._check_measured()
        found = server.peek() if self.monitor != LOSS else None
        self.monitored = resolved(self.monitor, server.evaluator, found)
        number = history.kept or server.round
        former = next((record for record in history if record.round == number), None)
        # the version is a count of loads and a hash; weights that somebody else has changed are worth something else
        if former is not None and former.weights_version.rpartition("-")[2] == server.model.weights_hash:
            self.former = former
        state = server.patience if history.monitor in (None, self.monitor) else []
        if history.monitor != self.monitor:
            best = self.monitored.best(history)
            history.monitor, history.best = self.monitor, best.round if best is not None else None
        if self.patience is not None:
            self.waiting = Patience(self.patience, self.min_delta, state, self.monitored, history)

    def _judge(self, record: RoundRecord, *, last: bool) -> list[str]:
        """Notes which round is best so far; why this one is the last before its time."""
        server, history = self.server, self.server.history
        if self.former is not None and not record.members_changed and not self._measures_as(self.former, record):
            record.notes.append(_OTHER_EXAMPLES)
            history.best = None
            self.waiting = Patience(self.patience, self.min_delta, (), self.monitored) if self.patience else None
        self.former, waiting = None, self.waiting
        over = waiting is not None and waiting.over(record)
        diverged = server.diverged if self.stops else None
        why = [diverged] if diverged else [str(waiting)] if over else []
        server.patience = waiting.state() if waiting is not None and not why and not last else []
        self.monitored.judge(record, history)
        return why

    def _measures_as(self, former: RoundRecord, record: RoundRecord) -> bool:
        """Whether weights that a round ended with are worth as much before the next: else what measures is another."""
        sides = self.monitored.apart(self.monitored.measured(record, before=True), self.monitored.measured(former))
        return sides is None or math.isclose(*sides, rel_tol=_ALIKE, abs_tol=_ALIKE)

    def _check_measured(self) -> None:
        """Makes sure that what is to end it early is measured; of participants elsewhere that shows once all are in."""
        server, joined = self.server, self.server.client_manager.joined
        wanted = self.stops or self.patience is not None or self.keep == "best"
        if not wanted or server.evaluator.is_shared or server.runtime.sequential:
            return
        if joined.keys() >= set(server.runtime.nodes()) and not any(hello.held_out for hello in joined.values()):
            msg = (
                "patience, keep='best' and on_divergence='stop' go by what is held out, and all participants have "
                "joined and none of them holds out examples. Let one hold out some where it is, as "
                "Participant(held_out=…), or pass evaluation=examples, one set for all."
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
