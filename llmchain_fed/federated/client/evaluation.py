"""The operations `evaluate` and `side_by_side`: held-out losses under the global state, and samples of answers.

Knows a client's held-out examples, what of them may leave, and its personal model. Knows nothing of other participants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmchain_fed.data.examples import wanted_text
from llmchain_fed.errors import LLMChainFedError
from llmchain_fed.federated.client import personalization
from llmchain_fed.federated.client.personalization import loaded
from llmchain_fed.federated.protocol.answers import EvaluateAnswer, SideBySideAnswer
from llmchain_fed.federated.protocol.finiteness import told
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import EvaluateTask, SideBySideTask

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client


def evaluate(client: Client, task: EvaluateTask, state: GlobalState) -> EvaluateAnswer:
    """The held-out loss of the global state, with what of it is this participant's own."""
    _, progress = client.progress.before(task.round)
    with loaded(client.model, state, progress.private):
        result = client.measure(client.model)
        samples = _samples(client, task)
    labels = client.config.labels
    collapsed = labels.index(result.collapsed) if labels and result.collapsed is not None else None
    answer: dict[str, Any] = {**told(result.loss), **samples, "collapsed": collapsed}
    return EvaluateAnswer(tokens=result.tokens, examples=result.examples, **answer)


def side_by_side(client: Client, task: SideBySideTask, state: GlobalState) -> SideBySideAnswer:
    """The held-out losses of the base, of the global state and of the personal model, of what there is."""
    return personalization.losses(client, state, client.progress.before(task.round)[1])


def _samples(client: Client, task: EvaluateTask) -> Mapping[str, Any]:
    """As many held-out examples with the chain's answers as are wanted and may leave; or why there are none."""
    allowed = task.samples if client.limits is None else min(task.samples, client.limits.samples)
    if task.samples and not allowed:
        return {"samples_error": "the site's policy lets no samples leave"}
    chosen = client.data.first_held_out(allowed)
    if not chosen or task.sample_tokens is None:
        return {}
    try:
        pairs = client.target.answer(chosen, task.sample_tokens)
    except LLMChainFedError as error:  # the loss is worth having without them
        why = str(error) if client.limits is None else type(error).__name__
        return {"samples_error": why, "samples": []}
    wanted = (wanted_text(example, client.target.prompt) for example in chosen)
    found = ({"prompt": p, "reference": w, "answer": a} for w, (p, a) in zip(wanted, pairs, strict=False))
    return {"samples": list(found)}
