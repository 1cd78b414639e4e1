"""Evaluator: held-out loss and sample answers, measured where the held-out examples are.

Knows the transport's `evaluate` operation and the records it fills. Knows nothing about training or aggregation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from llmchain_fed.data import Examples
from llmchain_fed.errors import ConfigError
from llmchain_fed.evaluation import evaluate_locally
from llmchain_fed.federated import wire
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord, Sample
from llmchain_fed.federated.participant import Participant, hold_out
from llmchain_fed.federated.peer import Trainee
from llmchain_fed.federated.runtime import Transport
from llmchain_fed.training import encoded

_SHARED = ""  # the name under which a set that belongs to no participant is measured
_SAMPLE_TOKENS = 32


class Evaluator:
    """Measures the current global weights on held-out examples.

    Args:
        trainee: The model in this process.
        evaluation: A share to hold out, a mapping name → examples, examples for all, or None.
        samples: answers recorded per participant.
        seed: Decides what is held out.
    """

    def __init__(
        self, trainee: Trainee, evaluation: float | Mapping[str, Examples] | Examples | None, *, samples: int, seed: int
    ) -> None:
        if isinstance(evaluation, (int, float)) and (isinstance(evaluation, bool) or not 0 < evaluation < 1):
            msg = f"evaluation as a share lies between 0 and 1, got {evaluation!r}."
            raise ConfigError(msg)
        if not isinstance(samples, int) or samples < 0:
            msg = f"samples is a count of 0 or more, got {samples!r}."
            raise ConfigError(msg)
        if isinstance(evaluation, Mapping):
            evaluation = {str(name): examples for name, examples in evaluation.items()}
        self._trainee, self._evaluation, self._samples, self._seed = trainee, evaluation, samples, seed
        self._shared: Any = None
        self._holders: set[str] = set()
        self._latest: tuple[str, dict[str, Any]] | None = None

    @property
    def active(self) -> bool:
        """Whether there is anything to measure on."""
        return self._evaluation is not None or bool(self._holders)

    def divide(self, participants: dict[str, Participant]) -> dict[str, Participant]:
        """The participants with their held-out examples set apart.

        Raises:
            ConfigError: Held-out examples for a participant that does not exist.
        """
        evaluation = self._evaluation
        if isinstance(evaluation, Mapping):
            strangers = sorted(evaluation.keys() - participants.keys())
            if strangers:
                msg = f"evaluation names {strangers}, who take no part. Participants: {', '.join(participants)}."
                raise ConfigError(msg)
            participants = {
                n: Participant(n, p.examples, evaluation.get(n, p.held_out), p.training)
                for n, p in participants.items()
            }
        elif isinstance(evaluation, float):
            prompt = self._trainee.prompt
            participants = {n: hold_out(p, evaluation, prompt, self._seed) for n, p in participants.items()}
        self._holders = {n for n, p in participants.items() if p.held_out is not None}
        return participants

    def measure(self, transport: Transport, joined: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Name → loss, tokens, samples of the weights as they are now; the last answer again if they are the same."""
        holders = [n for n, hello in joined.items() if hello.get("held_out")]
        shared = self._evaluation is not None and not isinstance(self._evaluation, (float, Mapping))
        if not holders and not shared:
            return {}
        version = self._trainee.model.weights_hash
        if self._latest is not None and self._latest[0] == version:
            return {**self._latest[1], "seconds": 0.0}
        started = time.perf_counter()
        found: dict[str, Any] = {}
        if holders:
            header = {"kind": "evaluate", "samples": self._samples, "sample_tokens": _SAMPLE_TOKENS}
            payload = wire.pack(self._trainee.model.trainable_state(), header)
            for name, answer in transport.call("evaluate", holders, payload):
                found[name] = {"error": str(answer)} if isinstance(answer, Exception) else json.loads(answer)
        if shared:
            if self._shared is None:  # read once: it may be a generator
                self._shared = encoded(self._evaluation, self._trainee.model, self._trainee.prompt, None)
            result = evaluate_locally(self._trainee.model, self._shared)
            found[_SHARED] = {"loss": result.loss, "tokens": result.tokens}
        self._latest = (version, found)
        return {**found, "seconds": time.perf_counter() - started}

    def fill(self, record: RoundRecord, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Writes both measurements into the round's record."""
        if not before:
            return
        record.evaluation_seconds = before["seconds"] + after["seconds"]
        record.held_out_before, record.held_out_after = _pooled(before), _pooled(after)
        for name, target in record.participants.items():
            _fill_participant(target, before.get(name, {}), after.get(name, {}))
            for old, new in zip(
                before.get(name, {}).get("samples", []), after.get(name, {}).get("samples", []), strict=False
            ):
                record.samples.append(Sample(name, old["prompt"], old["reference"], old["answer"], new["answer"]))


def _fill_participant(target: ParticipantRecord, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    target.held_out_before, target.held_out_after = before.get("loss"), after.get("loss")
    for side in (before, after):
        if "error" in side:
            target.notes.append(f"its evaluation failed: {side['error']}")


def _pooled(found: Mapping[str, Any]) -> float | None:
    """Mean over all held-out tokens; the shared set alone, where there is one."""
    parts = [v for k, v in found.items() if k != "seconds" and "loss" in v]
    parts = [found[_SHARED]] if _SHARED in found else parts
    tokens = sum(p["tokens"] for p in parts)
    return sum(p["loss"] * p["tokens"] for p in parts) / tokens if tokens else None
