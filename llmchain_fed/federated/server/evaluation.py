"""Evaluator: held-out loss and sample answers, measured where the held-out examples are, and the pool of the losses.

Knows the `evaluate` operation and the records it fills. Knows nothing about training or aggregation.

The pool is the mean of the participants' losses, weighted by completion tokens: those that a participant declared when
it joined, or fewer. From three participants on, none weighs more than all others together, so at most one half; of two,
nobody could say whose count is the lie. What is decided by the pool (stopping early, divergence) moreover needs as many
witnesses as half of those who were measured: see `witnesses`. One that always claims to improve can delay an early
stop, not bring one about.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmchain_fed.data.encoding import encoded
from llmchain_fed.data.examples import Examples, with_columns
from llmchain_fed.data.split import Split
from llmchain_fed.errors import ConfigError, LLMChainFedError
from llmchain_fed.federated.history import History, RoundRecord, Sample, told_of
from llmchain_fed.federated.participant import Participant, hold_out
from llmchain_fed.federated.protocol import finiteness, messages
from llmchain_fed.federated.protocol.answers import EvaluateAnswer, Introduction
from llmchain_fed.federated.protocol.finiteness import told
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import EvaluateTask
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.broadcast import Broadcast
from llmchain_fed.federated.target import Target
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.evaluation import evaluate_as
from llmchain_fed.untrusted import one_line, printable

_SAMPLE_TOKENS = 32
_LONGEST = 10_000  # characters of a text that came from elsewhere
_SHORT = 1000  # and of one that says what went wrong
MEASURED = 3
"""participants from which on one alone neither weighs most nor decides"""
HALF = "it counts one half in the pooled held-out loss: it has more held-out tokens than all others together"
WHOLE = "it counts by its held-out tokens again in the pooled held-out loss"
Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """What was measured under one set of global weights."""

    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """participant → loss, tokens, samples, or the error"""
    shared: dict[str, Any] = field(default_factory=dict)
    """loss and tokens of the set that belongs to no participant"""
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
    ) -> None:
        if isinstance(evaluation, Mapping):
            evaluation = {str(name): examples for name, examples in evaluation.items()}
        elif isinstance(evaluation, float):
            evaluation = Split(evaluation)
        self._target, self._evaluation, self._training = target, evaluation, training
        self._samples, self._seed, self._columns = samples, seed, columns
        self._shared: Any = None
        self._with_held_out: set[str] = set()
        self._latest: tuple[int, Measurement] | None = None
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
            longest = self._training.max_length
            shared = with_columns(self._evaluation, self._columns)
            self._shared = encoded(shared, self._target.model, self._target.prompt, longest)
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
            return replace(self._latest[1], seconds=0.0, bytes={})
        started = time.perf_counter()
        found = Measurement()
        if with_held_out:
            task = EvaluateTask.of(
                round=number + 1, base=model.fingerprint(), samples=self._samples, sample_tokens=_SAMPLE_TOKENS
            )
            for name, answer, size in broadcast.call(runtime, task, with_held_out, timeout):
                found.own[name] = _read(answer, self._samples, joined[name].held_out_tokens)
                found.bytes[name] = size + (0 if isinstance(answer, Exception) else len(answer))
        if self.is_shared:
            how = self._training
            result = evaluate_as(how, model, self.shared(), self._target.prompt)
            found.shared.update(told(result.loss), tokens=result.tokens)
            if result.collapsed is not None and how.labels:
                found.shared["collapsed"] = how.labels.index(result.collapsed)
        self._latest = (version, found)
        return replace(found, seconds=time.perf_counter() - started)

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
            target.notes += finiteness.notes(old, new)
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


def _read(answer: bytes | Exception, samples: int, declared: int | None = None) -> dict[str, Any]:
    """A participant's numbers, and at most as many samples as were asked for; nothing else of what it sent.

    An answer that makes no sense counts as an error, like a missing one. All text in it can be shown and written. No
    more completion tokens count than it declared to hold out when it joined.
    """
    if isinstance(answer, Exception):
        return {"error": told_of(answer)}
    try:
        longest = EvaluateAnswer.longest(samples)
        found = messages.read_answer(EvaluateAnswer, answer, "its evaluation", longest)
    except LLMChainFedError as error:
        return {"error": one_line(error, _SHORT)}
    loss = finiteness.read({"loss": found.loss, "not_finite": found.not_finite})
    if loss is None:
        return {"error": f"its evaluation makes no sense: a loss of {found.loss} ({one_line(found.not_finite, 80)})"}
    kept: dict[str, Any] = loss | {"tokens": min(found.tokens, declared or found.tokens)}
    texts = (sample.model_dump() for sample in found.samples[:samples])
    kept["samples"] = [{key: printable(text, _LONGEST) for key, text in sample.items()} for sample in texts]
    if found.collapsed is not None:
        kept["collapsed"] = found.collapsed
    if found.samples_error is not None:
        kept["samples_error"] = one_line(found.samples_error, _SHORT)
    return kept


def _pooled(before: Measurement, after: Measurement) -> tuple[float | None, float | None, list[str]]:
    """The pool on both sides, and whose weight in it was cut; the shared set alone, where there is one."""
    if before.shared and after.shared:
        return before.shared["loss"], after.shared["loss"], []
    return pooled(before.own, after.own)


# --- one loss of all participants -------------------------------------------------------------------------------------


def pooled(before: Answers, after: Answers) -> tuple[float | None, float | None, list[str]]:
    """Mean over the same held-out tokens on both sides, and whose weight in it was cut.

    Who sent a loss that is not finite, on either side, is left out of both, and its record says so: one participant's
    numbers do not hide the others'.
    """
    both = [n for n in before if all(_is_finite(side.get(n, {})) for side in (before, after))]
    if not both:  # nobody's is finite on both sides: perhaps some are on one
        (old, cut), (new, _) = _mean(before), _mean(after)
        return (old, new, cut) if old is None or new is None else (None, new, [])
    weights, cut = capped({n: before[n]["tokens"] for n in both})
    total = sum(weights.values())
    sides = (sum(side[n]["loss"] * weights[n] for n in both) / total for side in (before, after))
    return next(sides), next(sides), cut


def capped(tokens: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Participant → what its loss weighs, and whose weight was cut; as they are where nobody has more than half.

    >>> capped({"a": 10, "b": 30, "c": 10**9})
    ({'a': 10, 'b': 30, 'c': 40}, ['c'])
    """
    weights = dict(tokens)
    largest = max(weights, key=weights.__getitem__)
    others = sum(weights.values()) - weights[largest]
    if len(weights) < MEASURED or weights[largest] <= others:
        return weights, []
    return weights | {largest: others}, [largest]


def witnesses(measured: Collection[str], wrong: Collection[str]) -> bool:
    """Whether enough participants say that something is wrong: half of them, or of fewer than three whoever does.

    Not two of any number: in many rounds of many participants somebody honest has a bad one by chance.

    >>> witnesses("abc", "c"), witnesses("abc", "bc"), witnesses("ab", "b"), witnesses("abcdefghi", "abcd")
    (False, True, True, False)
    """
    return 2 * len(wrong) >= len(measured) if len(measured) >= MEASURED else bool(wrong)


def stands_still(record: RoundRecord, min_delta: float) -> bool:
    """Whether enough participants' own losses have not improved in a round to believe a pool that has not.

    Args:
        record: With the losses of those who were measured; of none, where the hub measured for itself.
        min_delta: nats per token that count as an improvement.
    """
    losses = {n: (p.held_out_before, p.held_out_after) for n, p in record.participants.items()}
    known = {n: (old, new) for n, (old, new) in losses.items() if old is not None and new is not None}
    still = [n for n, (old, new) in known.items() if not new < old - min_delta]
    return not known or witnesses(known, still)


def _is_finite(own: Mapping[str, Any]) -> bool:
    loss = own.get("loss")
    return loss is not None and math.isfinite(loss)


def _mean(found: Answers) -> tuple[float | None, list[str]]:
    finite = {n: own for n, own in found.items() if _is_finite(own)}
    if not finite:
        return None, []
    weights, cut = capped({n: own["tokens"] for n, own in finite.items()})
    return sum(own["loss"] * weights[n] for n, own in finite.items()) / sum(weights.values()), cut
