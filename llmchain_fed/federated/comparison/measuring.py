"""What the weights that are in the model now are worth, on each participant's texts: the one place that measures.

Knows clients and their held-out examples. Knows nothing about how the weights came about.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client import evaluation
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.comparison.arms import LOSS
from llmchain_fed.federated.server.evaluation import Evaluator
from llmchain_fed.training.evaluation import evaluate_as
from llmchain_fed.training.metrics import BUILT_IN
from llmchain_fed.updates.update import MAX_EXAMPLES

Values = dict[str, dict[str, float]]
"""participant whose texts they are → name of a metric → value"""


def values_of(
    clients: Mapping[str, Client],
    validation: Mapping[str, EncodedExamples] | None = None,
    evaluator: Evaluator | None = None,
) -> Values:
    """The values on each participant's held-out texts, of the metrics too; or the loss on its validation part.

    Raises:
        ConfigError: A metric has no value.
    """
    found: Values = {}
    for name, client in clients.items():
        if validation is None:
            found[name] = {LOSS: client.measure(client.model).loss}
            if evaluator is not None and evaluator.metrics:
                found[name] |= _metrics_of(client, evaluator)
        elif name in validation:
            loss = evaluate_as(client.config, client.model, validation[name], client.target.prompt).loss
            found[name] = {LOSS: loss}
    return found


def _metrics_of(client: Client, evaluator: Evaluator) -> dict[str, float]:
    functions = {
        m.name: client.metrics.get(m.name) or BUILT_IN.get(m.name) or evaluation.ABSENT for m in evaluator.metrics
    }
    answers = evaluation.Answers(client.target, evaluator.answer_tokens)
    examples = client.data.first_held_out(MAX_EXAMPLES)
    found: dict[str, float] = {}
    for answer in evaluation.values_of(
        functions, answers, examples, client.target.prompt, evaluator.labels, client.told_of
    ):
        if answer.error is not None:
            msg = (
                f"the metric {answer.name!r} has no value for {client.name!r} ({answer.error}), and arms are compared "
                "by what all of them have. Mend it or leave it out."
            )
            raise ConfigError(msg)
        found |= answer.values
    return found
