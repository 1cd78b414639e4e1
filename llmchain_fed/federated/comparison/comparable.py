"""Comparable: whether a federation's arms can see the same examples and be measured on the same texts.

Knows a federation's options and its participants. Knows nothing about arms.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.server.server import Server


def check_comparable(server: Server, clients: Mapping[str, Client]) -> None:
    """Makes sure that a federation's arms can see the same examples and be measured on the same texts.

    Raises:
        ConfigError: Which of its options keeps them from it.
    """
    if not clients:
        msg = "there is nobody to compare. Pass participants={name: examples, …}."
        raise ConfigError(msg)
    if server.settings.config.participants_per_round is not None:
        msg = (
            "participants_per_round asks some alone in each round, and the arms of a comparison see the same examples. "
            "Leave it out for the comparison."
        )
        raise ConfigError(msg)
    without = [name for name, client in clients.items() if not client.data.holds_out]
    if server.evaluator.is_shared or without:
        who = "evaluation= is one set for all" if server.evaluator.is_shared else f"{without[:5]} hold out no examples"
        msg = (
            f"compare measures every participant on its own texts, and {who}. Pass evaluation=0.2, evaluation={{name: "
            f"examples}} or Participant(held_out=…)."
        )
        raise ConfigError(msg)
    for name, client in clients.items():
        own = {"learning_rate", "seed"} & client.participant.training.keys()
        if own:
            msg = (
                f"participant {name!r} has its own {' and '.join(sorted(own))}, and compare decides that for each arm. "
                "Leave it out for the comparison."
            )
            raise ConfigError(msg)
        if not (
            isinstance(client.data.train(), EncodedExamples) and isinstance(client.data.held_out(), EncodedExamples)
        ):
            msg = (
                f"participant {name!r} has a DataLoader, whose batches can be neither pooled nor divided. Pass its "
                "examples instead."
            )
            raise ConfigError(msg)
