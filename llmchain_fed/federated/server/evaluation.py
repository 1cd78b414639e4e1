"""Evaluator: held-out loss, metrics and sample answers, measured where the held-out examples are.

Knows the `evaluate` operation and the records it fills. Knows nothing about training or aggregation; what is made of
all participants' numbers together stands in `measures.pooling`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmchain_fed.data.encoding import encode_examples, encoded
from llmchain_fed.data.examples import (
    Example,
    Examples,
    RawText,
    is_ready_tensors,
    read_examples,
    wanted_text,
    with_columns,
)
from llmchain_fed.data.split import Split
from llmchain_fed.errors import ConfigError, DataError
from llmchain_fed.federated.client.evaluation import ABSENT, Answers, noting_strangers, values_of
from llmchain_fed.federated.history import History, RoundRecord, Sample, told_of
from llmchain_fed.federated.measures.pooling import pooled, pooled_metrics
from llmchain_fed.federated.measures.reading import kept_metrics, metric_notes, read_evaluation
from llmchain_fed.federated.participant import Participant, hold_out
from llmchain_fed.federated.protocol import finiteness
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.protocol.finiteness import told
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import EvaluateTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.evaluation import evaluate_as
from llmchain_fed.training.metrics import BUILT_IN, Function, Metric

HALF = "it counts one half in the pooled held-out loss: it has more held-out tokens than all others together"
WHOLE = "it counts by its held-out tokens again in the pooled held-out loss"


@dataclass(frozen=True)
class Measurement:
    """What was measured under one set of global weights."""

    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """participant → loss, tokens, metrics, samples, or the error"""
    shared: dict[str, Any] = field(default_factory=dict)
    """loss, tokens and metrics of the set that belongs to no participant"""
    trusted: bool = False
    """whether all were measured in this process"""
    seconds: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)
    """participant → what travelled to it and back"""


class Evaluator:
    """Measures the current global weights on held-out examples.

    Args:
        evaluation: A share or a `Split` to hold out, a mapping name → examples, examples for all, or None.
        training: How participants train: at the same length and precision the examples for all are measured.
        samples: answers recorded per participant.
        seed: Decides what is held out.
        columns: What the columns of examples for all are called.
        metrics: What is measured beside the loss.
        labels: With them predictions are the most probable of these.
        answer_tokens: that an answer has at most; None is as the chain has it.
    """

    def __init__(
        self,
        target: Target,
        evaluation: float | Split | Mapping[str, Examples] | Examples | None,
        training: TrainingConfig,
        *,
        samples: int,
        seed: int,
        columns: Mapping[str, str | int] | None = None,
        metrics: Sequence[Metric] = (),
        labels: Sequence[str] | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        if isinstance(evaluation, Mapping):
            evaluation = {str(name): examples for name, examples in evaluation.items()}
        elif isinstance(evaluation, float):
            evaluation = Split(evaluation)
        self._target, self._evaluation, self._training = target, evaluation, training
        self._samples, self._seed, self._columns = samples, seed, columns
        self.metrics, self.labels, self.answer_tokens = tuple(metrics), labels, answer_tokens
        self.owners: dict[str, str] = {}
        """value → the metric that has given it, of what was measured so far"""
        self._shared: Any = None
        self._shared_examples: list[Example | RawText] = []
        self._with_held_out: set[str] = set()
        self._latest: tuple[int, Measurement] | None = None
        self._told = True
        """whether a record says what the latest measurement cost"""
        self._half: tuple[int, str | None] | None = None
        """after how many rounds, and of whom its record said last that it counts one half"""

    @property
    def active(self) -> bool:
        """Whether there is anything to measure on."""
        return self._evaluation is not None or bool(self._with_held_out)

    @property
    def split(self) -> Split | None:
        """By what held-out examples are set apart from the participants' own, if so."""
        return self._evaluation if isinstance(self._evaluation, Split) else None

    @property
    def is_shared(self) -> bool:
        """Whether all are measured on one set that belongs to no participant, in this process."""
        return self._evaluation is not None and not isinstance(self._evaluation, (Split, Mapping))

    def shared(self) -> Any:
        """The set that belongs to no participant, encoded; None where there is none.

        Raises:
            DataError: It cannot be used.
        """
        if self._shared is None and self.is_shared:  # read once: it may be a generator
            given, longest, target = self._evaluation, self._training.max_length, self._target
            try:
                given = with_columns(given, self._columns)
                if self.metrics and not is_ready_tensors(given):
                    given = list(read_examples(given, target.prompt))
                    usable = (encode_examples([e], target.model, target.prompt, max_length=longest) for e in given)
                    self._shared_examples = [e for e, data in zip(given, usable, strict=True) if len(data)]
                self._shared = encoded(given, target.model, target.prompt, longest, whose="the set for all")
            except DataError as error:  # of whose rows it speaks, as those of participants say
                raise type(error)(f"evaluation: {error}") from None  # noqa: EM102
        return self._shared

    def divide(self, participants: dict[str, Participant]) -> dict[str, Participant]:
        """The participants of this process with their held-out examples set apart."""
        evaluation = self._evaluation
        if isinstance(evaluation, Mapping):
            participants = {n: replace(p, held_out=evaluation.get(n, p.held_out)) for n, p in participants.items()}
        for name, participant in participants.items():
            split = evaluation if isinstance(evaluation, Split) else participant.held_out
            if isinstance(split, Split):
                prompt = self._target.of_participant(participant).prompt
                participants = participants | {name: hold_out(participant, split, prompt, self._seed)}
        self._with_held_out = {n for n, p in participants.items() if p.held_out is not None}
        return participants

    def check_names(self, names: Iterable[str]) -> None:
        """Makes sure that whoever is given held-out examples takes part, here or in another process of the script.

        Raises:
            ConfigError: Somebody does not.
        """
        given: Iterable[str] = self._evaluation if isinstance(self._evaluation, Mapping) else ()
        if strangers := sorted(set(given) - set(names)):
            msg = f"evaluation names {strangers}, who take no part. Participants: {', '.join(names)}."
            raise ConfigError(msg)

    def measure(
        self,
        runtime: Runtime,
        broadcast: Broadcast,
        joined: Mapping[str, Introduction],
        number: int,
        timeout: float | None = None,
    ) -> Measurement | None:
        """The weights as they are now; the last answer again if they are the same; None where nothing is held out.

        With these weights `number` rounds are completed: participants are told the next one. Their answers are waited
        for `timeout` seconds.
        """
        with_held_out = [n for n, hello in joined.items() if hello.held_out]
        if not with_held_out and not self.is_shared:
            return None
        model = self._target.model
        broadcast.publish(GlobalState.of(model), model.weights_hash)
        version = broadcast.number
        if self._latest is not None and self._latest[0] == version:
            if not self._told:
                self._told = True
                return self._latest[1]
            return replace(self._latest[1], seconds=0.0, bytes={})
        started = time.perf_counter()
        found = Measurement(trusted=runtime.sequential)
        if with_held_out:
            for name, answer, size in broadcast.call(runtime, self._task(number + 1), with_held_out, timeout):
                hello = joined[name]
                found.own[name] = read_evaluation(
                    answer, self._samples, hello.held_out_tokens, self._names, hello.held_out_examples
                )
                found.bytes[name] = size + (0 if isinstance(answer, Exception) else len(answer))
        if self.is_shared:
            found.shared.update(self._measured_here())
        for own in (*found.own.values(), found.shared):
            self.owners |= own.get("owners", {})
        self._latest = (version, found)
        return replace(found, seconds=time.perf_counter() - started)

    def peek(self, *given: Any) -> Measurement | None:
        """`measure`, whose cost the next one with the same weights says again: the round that it belongs to."""
        found = self.measure(*given)
        if found is not None and self._latest is not None:
            self._latest = (self._latest[0], found)
            self._told = False
        return found

    @property
    def _names(self) -> list[str]:
        return [metric.name for metric in self.metrics]

    def _task(self, number: int) -> EvaluateTask:
        more: dict[str, Any] = {"metrics": self._names} if self.metrics else {}
        if self.metrics and self.labels:
            more["labels"] = list(self.labels)
        if self.answer_tokens is not None:
            more["answer_tokens"] = self.answer_tokens
        return EvaluateTask.of(round=number, base=self._target.model.fingerprint(), samples=self._samples, **more)

    def _measured_here(self) -> dict[str, Any]:
        """The set that belongs to no participant, under the weights as they are."""
        how, target, data = self._training, self._target, self.shared()
        result = evaluate_as(how, target.model, data, target.prompt)
        found: dict[str, Any] = {**told(result.loss), "tokens": result.tokens}
        if result.collapsed is not None and how.labels:
            found["collapsed"] = how.labels.index(result.collapsed)
        if self.metrics:
            own: dict[str, Function | str] = {
                m.name: BUILT_IN.get(m.fn, ABSENT) if isinstance(m.fn, str) else m.fn for m in self.metrics
            }
            answers = Answers(target, self.answer_tokens)
            values = values_of(own, answers, self._shared_examples, target.prompt, self.labels, told_of)
            wanted = [wanted_text(example, target.prompt) for example in self._shared_examples]
            values = noting_strangers(values, wanted, self.labels)
            found |= kept_metrics(values, self._names, len(self._shared_examples))
        return found

    def forget(self) -> None:
        """The next measurement is made anew, whatever was measured before."""
        self._latest = self._half = None

    def fill(
        self, record: RoundRecord, before: Measurement | None, after: Measurement | None, history: History
    ) -> None:
        """Writes what was measured before and after a round into its record.

        The rounds before it say whether something was said already.
        """
        if before is None or after is None:
            return
        record.evaluation_seconds = before.seconds + after.seconds
        record.held_out_before, record.held_out_after, cut = _pooled(before, after)
        record.metrics_before, record.metrics = _pooled_metrics(before), _pooled_metrics(after)
        record.notes += metric_notes(before.shared, after.shared)
        if after.shared.get("collapsed") is not None:
            record.notes.append(self._collapse(after.shared["collapsed"]))
        self._say_half(record, next(iter(cut), None), history)
        for name, target in record.participants.items():
            old, new = before.own.get(name, {}), after.own.get(name, {})
            target.held_out_before, target.held_out_after = old.get("loss"), new.get("loss")
            target.evaluation_bytes = before.bytes.get(name, 0) + after.bytes.get(name, 0)
            for key, what in (("error", "its evaluation failed"), ("samples_error", "no samples")):
                found = dict.fromkeys(side[key] for side in (old, new) if key in side)
                target.notes += [f"{what}: {error}" for error in found]
            target.metrics_before, target.metrics = dict(old.get("metrics", {})), dict(new.get("metrics", {}))
            target.notes += metric_notes(old, new) + finiteness.notes(old, new)
            if self._training.labels and new.get("collapsed") is not None:
                target.notes.append(self._collapse(new["collapsed"]))
            if target.status == "trained":
                target.notes += finiteness.notes(before.shared, after.shared, "the shared evaluation's loss")
            for was, now in zip(old.get("samples", []), new.get("samples", []), strict=False):
                record.samples.append(Sample(name, was["prompt"], was["reference"], was["answer"], now["answer"]))

    def _collapse(self, label: int) -> str:
        """What a record says where held-out examples are all given one label; the loss alone may fall all the same."""
        labels = self._training.labels or ()
        name = repr(labels[label])[:80] if label < len(labels) else "an unknown one"
        over_labels = self._training.loss == "labels"
        tip = 'Try class_weight="balanced" or more rounds.' if over_labels else 'Train with loss="labels".'
        return f"all held-out examples are taken for the label {name}, and not all have it. {tip}"

    def _say_half(self, record: RoundRecord, name: str | None, history: History) -> None:
        """Says of who counts one half that it does, when that begins and when it ends."""
        rounds = len(history)
        if self._half is None or self._half[0] != rounds:  # after a resume, or a round that failed
            self._half = rounds, _said_half(history)
        former = self._half[1]
        for who, note in ((former, WHOLE), (name, HALF)) if former != name else ():
            if who in record.participants:
                record.participants[who].notes.append(note)
        self._half = rounds + 1, name


def _said_half(history: History) -> str | None:
    """Who counts one half, as far as records have said."""
    for record in reversed(history.rounds):
        said = [(name, note) for name, p in record.participants.items() for note in (HALF, WHOLE) if note in p.notes]
        if said:
            return next((name for name, note in said if note == HALF), None)
    return None


def _pooled_metrics(found: Measurement) -> dict[str, float]:
    if found.shared:
        return dict(found.shared.get("metrics", {}))
    return pooled_metrics(found.own, trusted=found.trusted)


def _pooled(before: Measurement, after: Measurement) -> tuple[float | None, float | None, list[str]]:
    """The pool on both sides, and whose weight in it was cut; the shared set alone, where there is one."""
    if before.shared and after.shared:
        return before.shared["loss"], after.shared["loss"], []
    return pooled(before.own, after.own)
