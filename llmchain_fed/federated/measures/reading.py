"""Reading what participants measured: their numbers and texts, within bounds, whoever sent them.

Knows answers to `evaluate`, and what a record says of what is missing. Knows nothing about models or rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmchain_fed.errors import LLMChainFedError
from llmchain_fed.federated.history import told_of
from llmchain_fed.federated.protocol import finiteness, messages
from llmchain_fed.federated.protocol.answers import EvaluateAnswer, MetricAnswer
from llmchain_fed.training.metrics import MAX_NAME
from llmchain_fed.untrusted import one_line, printable

_LONGEST = 10_000  # characters of a text that came from elsewhere
_SHORT = 1000  # and of one that says what went wrong


def read_evaluation(
    answer: bytes | Exception,
    samples: int,
    declared: int | None = None,
    metrics: Sequence[str] = (),
    examples: int | None = None,
) -> dict[str, Any]:
    """A participant's numbers, and at most as many samples and metrics as were asked for; nothing else of what it sent.

    An answer that makes no sense counts as an error, like a missing one. All text in it can be shown and written. No
    more completion tokens count than it declared to hold out when it joined.
    """
    if isinstance(answer, Exception):
        return {"error": told_of(answer)}
    try:
        longest = EvaluateAnswer.longest(samples, len(metrics))
        found = messages.read_answer(EvaluateAnswer, answer, "its evaluation", longest)
    except LLMChainFedError as error:
        return {"error": one_line(error, _SHORT)}
    loss = finiteness.read({"loss": found.loss, "not_finite": found.not_finite})
    if loss is None:
        return {"error": f"its evaluation makes no sense: a loss of {found.loss} ({one_line(found.not_finite, 80)})"}
    kept: dict[str, Any] = loss | {"tokens": min(found.tokens, declared or found.tokens)}
    texts = (sample.model_dump() for sample in found.samples[:samples])
    kept["samples"] = [{key: printable(text, _LONGEST) for key, text in sample.items()} for sample in texts]
    if metrics:
        kept |= kept_metrics(found.metrics, metrics, min(found.measured or 1, examples or found.measured or 1))
    if found.collapsed is not None:
        kept["collapsed"] = found.collapsed
    if found.samples_error is not None:
        kept["samples_error"] = one_line(found.samples_error, _SHORT)
    return kept


def kept_metrics(answers: Iterable[MetricAnswer], names: Sequence[str], measured: int) -> dict[str, Any]:
    """Values, whose they are, and what is said of those that are missing; of those that were asked for, each once."""
    said = {answer.name: answer for answer in reversed(list(answers)) if answer.name in names}
    values: dict[str, float] = {}
    owners: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in names:
        if (answer := said.get(name)) is None:
            missing[name] = "it was not answered"
            continue
        for key, value in answer.values.items():
            key = one_line(key, MAX_NAME).replace("/", "_")
            if key in values:
                missing[name] = f"{key!r} is another metric's, too"
            else:
                values[key], owners[key] = value, name
        if answer.error is not None or not answer.values:
            missing[name] = one_line(answer.error or "it has no value", _SHORT)
    return {"metrics": values, "owners": owners, "missing": missing, "measured": measured}


def metric_notes(*sides: Mapping[str, Any]) -> list[str]:
    """What a record says of metrics that are missing, before or after a round."""
    found: dict[str, None] = {}
    for side in sides:
        there = set(side.get("owners", {}).values())
        for name, why in side.get("missing", {}).items():
            found[f"{name}: {why}" if name in there else f"no {name}: {why}"] = None
    return list(found)
