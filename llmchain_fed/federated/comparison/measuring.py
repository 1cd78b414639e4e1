"""What the weights that are in the model now are worth, on each participant's texts: the one place that measures.

Knows clients and their held-out examples. Knows nothing about how the weights came about.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.comparison.arms import LOSS
from llmchain_fed.training.evaluation import evaluate_as

Values = dict[str, dict[str, float]]
"""participant whose texts they are → name of a metric → value"""


def values_of(clients: Mapping[str, Client], validation: Mapping[str, EncodedExamples] | None = None) -> Values:
    """The values on each participant's held-out texts, or on its validation part where that is given."""
    found: Values = {}
    for name, client in clients.items():
        if validation is None:
            found[name] = {LOSS: client.measure(client.model).loss}
        elif name in validation:
            loss = evaluate_as(client.config, client.model, validation[name], client.target.prompt).loss
            found[name] = {LOSS: loss}
    return found
