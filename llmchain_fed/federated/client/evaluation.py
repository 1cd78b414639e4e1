"""The operations `evaluate` and `side_by_side`: held-out losses under the global state, metrics, samples of answers.

Knows a client's held-out examples, what of them may leave, and its personal model. Knows nothing of other participants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmchain_fed.chain.labels import Classification
from llmchain_fed.data.examples import Example, RawText, wanted_text
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.errors import DeadlineError, LLMChainFedError
from llmchain_fed.federated.client import personalization
from llmchain_fed.federated.client.personalization import loaded
from llmchain_fed.federated.protocol.answers import EvaluateAnswer, MetricAnswer, SideBySideAnswer
from llmchain_fed.federated.protocol.finiteness import told
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import EvaluateTask, SideBySideTask
from llmchain_fed.federated.target import ChainAnswer, Target
from llmchain_fed.training.metrics import BUILT_IN, COLLAPSED, Function, computed, unknown_metric
from llmchain_fed.updates.update import MAX_EXAMPLES

if TYPE_CHECKING:
    from llmchain_fed.federated.client.client import Client


ABSENT = "this participant has no metric of that name"
_TOGETHER = 32  # examples between two looks whether anybody still waits


def evaluate(client: Client, task: EvaluateTask, state: GlobalState) -> EvaluateAnswer:
    """The held-out loss of the global state, with what of it is this participant's own; and the metrics' values."""
    _, progress = client.progress.before(task.round)
    with loaded(client.model, state, progress.private):
        result = client.measure(client.model)
        answers = Answers(client.target, task.answer_tokens, client.time_limit(task.seconds, "measuring"))
        measured = _measured(client, task, answers)
        samples = _samples(client, task, answers)
    labels = client.config.labels
    told_label = client.limits is None or COLLAPSED in client.limits.metrics
    collapsed = labels.index(result.collapsed) if labels and told_label and result.collapsed is not None else None
    answer: dict[str, Any] = {**told(result.loss), **measured, **samples, "collapsed": collapsed}
    return EvaluateAnswer(tokens=result.tokens, examples=result.examples, **answer)


def side_by_side(client: Client, task: SideBySideTask, state: GlobalState) -> SideBySideAnswer:
    """The held-out losses of the base, of the global state and of the personal model, of what there is."""
    return personalization.losses(client, state, client.progress.before(task.round)[1])


class Answers:
    """A chain's answers to examples under the weights of now, each made once."""

    def __init__(self, target: Target, longest: int | None, check: Callable[[], None] = lambda: None) -> None:
        self._target, self._longest, self._check = target, longest, check
        self._made: list[ChainAnswer] = []

    def first(self, examples: Sequence[Example | RawText]) -> list[ChainAnswer]:
        """Those to the first examples of a list that is always the same."""
        while len(self._made) < len(examples):
            self._check()
            at = len(self._made)
            self._made += self._target.answer(examples[at : at + _TOGETHER], self._longest)
        return self._made[: len(examples)]

    def classified(
        self, examples: Sequence[Example | RawText], labels: Sequence[str]
    ) -> tuple[list[str], list[dict[str, float]]]:
        """The most probable of the labels for each, and the probabilities of all."""
        found: list[Classification] = []
        for at in range(0, len(examples), _TOGETHER):
            self._check()
            found += self._target.classify(examples[at : at + _TOGETHER], labels)
        return [each.label for each in found], [each.probabilities for each in found]


def values_of(
    metrics: Mapping[str, Function | str],
    answers: Answers,
    examples: Sequence[Example | RawText],
    prompt: Prompt | None,
    labels: Sequence[str] | None,
    told_of: Callable[[BaseException], str],
    leaves: Collection[str] | None = None,
) -> list[MetricAnswer]:
    """Each metric's values over examples: name → its function, or why there is none.

    What one raises is told of by `told_of`, and the others go on. With `leaves`, values of other names stay here, and
    nothing is quoted: what a function calls its values, and what it returns instead of a number, may be an example.
    """
    found = {name: MetricAnswer(name=name, error=fn) for name, fn in metrics.items() if isinstance(fn, str)}
    functions = {name: fn for name, fn in metrics.items() if not isinstance(fn, str)}
    try:
        material = _material(answers, examples, prompt, labels) if functions else ()
    except DeadlineError:
        raise
    except LLMChainFedError as error:
        return [found.get(name) or MetricAnswer(name=name, error=told_of(error)) for name in metrics]
    for name, fn in functions.items():
        try:
            values, wrong = computed(fn, name, *material, quote=leaves is None)
            stay = values.keys() - leaves if leaves is not None else set()
            kept = "values that the site's policy does not list stay here" if stay else None
            said = "; ".join(text for text in (wrong, kept) if text) or None
            found[name] = MetricAnswer(name=name, values={k: v for k, v in values.items() if k not in stay}, error=said)
        except Exception as error:  # whatever somebody's function raises
            found[name] = MetricAnswer(name=name, error=told_of(error))
    return [found[name] for name in metrics]


def noting_strangers(
    found: list[MetricAnswer], wanted: Sequence[str], labels: Sequence[str] | None
) -> list[MetricAnswer]:
    """The same, of which the first says how many wanted texts no prediction can equal, if there are any."""
    count = sum(text not in labels for text in wanted) if labels else 0
    if not count or not found:
        return found
    said = f"{count} of {len(wanted)} held-out completions are none of the labels"
    first, *others = found
    return [first.model_copy(update={"error": f"{first.error}; {said}" if first.error else said}), *others]


def _material(
    answers: Answers, examples: Sequence[Example | RawText], prompt: Prompt | None, labels: Sequence[str] | None
) -> tuple[Any, ...]:
    """What metrics are computed from: predictions, references, inputs, and probabilities where there are labels."""
    probabilities = None
    if labels:
        predictions, probabilities = answers.classified(examples, labels)
    else:  # where the chain itself fails it has answered nothing
        predictions = ["" if answer.failed else answer.text for answer in answers.first(examples)]
    inputs = [example.prompt if isinstance(example, RawText) else example.inputs for example in examples]
    return predictions, [wanted_text(example, prompt) for example in examples], inputs, probabilities


def _measured(client: Client, task: EvaluateTask, answers: Answers) -> dict[str, Any]:
    if not task.metrics:
        return {}
    examples = client.data.first_held_out(MAX_EXAMPLES)
    own = {name: _function(client, name) for name in task.metrics}
    if not examples:
        own = dict.fromkeys(own, "the held-out examples are a DataLoader, whose texts nobody has")
    leaves = client.limits.metrics if client.limits is not None else None
    found = values_of(own, answers, examples, client.target.prompt, task.labels, client.told_of, leaves)
    if client.limits is None:  # elsewhere the labels are of the hub's choice: a count would tell it what is held out
        wanted = [wanted_text(example, client.target.prompt) for example in examples]
        found = noting_strangers(found, wanted, task.labels)
    return {"metrics": found, "measured": len(examples)} if examples else {"metrics": found}


def _function(client: Client, name: str) -> Function | str:
    """What computes a metric here, or why nothing does."""
    if client.limits is not None and name not in client.limits.metrics:
        return "the site's policy does not let it leave"
    found = client.metrics.get(name) or BUILT_IN.get(name)
    if found is None and client.limits is None:
        return unknown_metric(name, [*client.metrics, *BUILT_IN])
    return found or ABSENT


def _samples(client: Client, task: EvaluateTask, answers: Answers) -> Mapping[str, Any]:
    """As many held-out examples with the chain's answers as are wanted and may leave; or why there are none."""
    allowed = task.samples if client.limits is None else min(task.samples, client.limits.samples)
    if task.samples and not allowed:
        return {"samples_error": "the site's policy lets no samples leave"}
    chosen = client.data.first_held_out(allowed)
    if not chosen:
        return {}
    try:
        pairs = answers.first(chosen)
    except DeadlineError:
        raise
    except LLMChainFedError as error:  # the loss is worth having without them
        return {"samples_error": client.told_of(error), "samples": []}
    wanted = (wanted_text(example, client.target.prompt) for example in chosen)
    found = ({"prompt": a.prompt, "reference": w, "answer": a.text} for w, a in zip(wanted, pairs, strict=True))
    return {"samples": list(found)}
