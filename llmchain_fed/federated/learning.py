"""FederatedLearning: the short form of FederatedAveraging, one round per epoch.

Knows FederatedAveraging and nothing below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.averaging import FederatedAveraging
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.options import FederationOptions
from llmchain_fed.federated.settings import showing_options, training_of
from llmchain_fed.training.schedule import check_planned


class FederatedLearning:
    """The short form: one data source per participant, one round per epoch. All else is as for `FederatedAveraging`.

    Args:
        data_loader: One source per participant: a mapping, a list, or a single DataLoader for a single participant.
    """

    @showing_options
    def __init__(
        self,
        model: Any,
        data_loader: Any,
        optimizer: Any = None,
        *,
        checkpoint_dir: str | Path | None = None,
        **options: Unpack[FederationOptions],
    ) -> None:
        if "participants" in options:
            msg = "the participants are the data loaders. Pass data_loader, or use FederatedAveraging(participants=…)."
            raise ConfigError(msg)
        if not isinstance(data_loader, Mapping):
            sources = data_loader if isinstance(data_loader, (list, tuple)) else [data_loader]
            data_loader = dict(enumerate(sources))
        check_planned(training_of(options, optimizer), "FederatedLearning")
        self.federation = FederatedAveraging(
            model, participants=data_loader, optimizer=optimizer, checkpoint_dir=checkpoint_dir, **options
        )

    def train(self, epoch: int) -> RoundRecord:
        """One round over all participants.

        Args:
            epoch: Shown nowhere, counted nowhere: rounds count themselves (`history`).
        """
        del epoch
        return self.federation.fit(rounds=1)[-1]

    def get_global_model(self) -> Any:
        """What was passed in, with the averaged weights."""
        return self.federation.get_model()

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self.federation.history
