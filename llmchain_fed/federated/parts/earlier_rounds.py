"""EarlierRounds: which round was the best, and back to one that has been.

Knows that rounds are kept, and where. Knows nothing about how they are run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from llmchain_fed.federated.checkpoint.manager import CheckpointManager
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.measures.kept import Keeper
from llmchain_fed.federated.server.server import Replication


class EarlierRounds(ABC):
    """The part of `FederatedAveraging` that is about rounds before the newest."""

    _checkpoints: CheckpointManager
    _keeper: Keeper
    _replication: Replication
    _show_adapters: Callable[[], None]

    @property
    @abstractmethod
    def history(self) -> History:
        """The rounds so far."""

    @abstractmethod
    def _check_closed(self) -> None: ...

    @property
    def best(self) -> RoundRecord | None:
        """The round with the best pooled value of what the latest `fit` monitored; None before any was measured.

        A `step()` counts by the same value, at first by the held-out loss.
        """
        number = self.history.best
        return next((record for record in self.history if record.round == number), None)

    def load_best(self) -> RoundRecord:
        """Loads the best round's weights, as `fit(keep="best")` does at its end; personal models go back with them.

        For a fit with `keep="best"` that was interrupted, or one with `keep="last"` whose best round is the newest or
        lies in a checkpoint.

        Returns:
            That round's record. History and round numbers stay as they are, and further rounds go on from here.

        Raises:
            FederationError: No round has been measured, or the weights of the best are not kept; nothing has changed.
            CheckpointError: Its checkpoint is damaged; nothing has changed.
        """
        self._check_closed()

        def work() -> None:
            if self._keeper.load():
                self._checkpoints.save()  # where this goes on, it goes on with these weights
                self._show_adapters()

        self._replication.do(work)
        best = self.best
        assert best is not None  # load() says where there is none
        return best

    def roll_back(self, to: int) -> None:
        """Takes the federation back to the end of an earlier round, as its checkpoint has it; later ones are dropped.

        Raises:
            CheckpointError: There is no checkpoint of that round, or it is damaged; nothing has changed.
        """
        self._check_closed()
        self._checkpoints.roll_back(to)
        self._keeper.forget()
