"""Callback: what a federation tells those who watch it, one or several; and what of a round is worth watching.

Knows the names of the hooks and how a record becomes flat numbers and texts. Knows no tracker, and nothing of how
rounds come about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import one_line, printable

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, RoundRecord, Sample
    from llmchain_fed.federated.server.attendance import Attendance, AttendanceChange

_LONGEST = 10_000  # characters of a sample's text


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round of a fit."""

    options: Mapping[str, Any]
    """the federation's settings, flat and fit for JSON: model, fingerprint, aggregation, learning rate …"""
    participants: tuple[str, ...]
    """names"""
    start_round: int
    """rounds completed before this fit: its first record has the number `start_round + 1`"""
    rounds: int
    """how many this fit will run at most"""
    total: int | None = None
    """how many the whole federation has, where this fit is a part of it"""
    attendance: Attendance | None = None
    """who is in and out, and who is waited for; it is kept while the fit runs, and is read only"""


@dataclass(frozen=True)
class Stop:
    """Ends training, with a reason: what `Callback.on_round_end` may return.

    >>> Stop("the budget is spent")
    Stop(reason='the budget is spent')
    """

    reason: str


class Callback:
    """Hears of a fit as it goes. Every method does nothing: override those you need.

    What a callback raises ends the fit like any other error; rounds already recorded are kept. Several fits on one
    callback follow each other: `on_fit_begin` is called for each, and every one that began ends with exactly one of
    `on_fit_end` and `on_error`.

    >>> class Losses(Callback):
    ...     def on_round_end(self, record, history):
    ...         print(record.round, metrics_of(record)["held_out/after"])
    """

    def on_fit_begin(self, run: RunInfo) -> None:
        """Before the first round."""

    def on_attendance(self, change: AttendanceChange) -> None:
        """Somebody goes out, or comes back; also between fits, where something else is asked of participants."""

    def on_round_begin(self, number: int, asked: tuple[str, ...]) -> None:
        """Before a round, whose number counts from 1: everyone who is there has joined, and these will be asked."""

    def on_round_end(self, record: RoundRecord, history: History) -> Stop | None:
        """After a round has been loaded into the chain, recorded and checkpointed; `history` ends with `record`.

        `Stop(reason)` ends the fit after this round, and `history.stopped_early` says the reason; None goes on.
        """

    def on_fit_end(self, history: History) -> None:
        """After the last round; `history` contains earlier fits' rounds too."""

    def on_error(self, error: BaseException) -> None:
        """Fit ends with this error, which may be a KeyboardInterrupt; the earlier rounds are kept."""


class Callbacks:
    """Those given, one or several, in their order, after the `first`, which are our own.

    Raises:
        ConfigError: One of them is no `Callback`.
    """

    def __init__(self, given: Any, first: tuple[Callback, ...] = ()) -> None:
        self._all: tuple[Callback, ...] = (*first, *(given if isinstance(given, (list, tuple)) else (given,)))
        for item in self._all:
            if not isinstance(item, Callback):
                msg = f"callbacks are objects of Callback, such as ConsoleTable(), got {item!r:.80}."
                raise ConfigError(msg)

    def watch(self, run: RunInfo, history: History, fit: Callable[[], object]) -> None:
        """Tells them of the fit before and after it, or of the error that it, or one of them, ends with."""
        begun: list[Callback] = []
        try:
            for callback in self._all:
                begun.append(callback)  # before the call: one that has half begun must still be told of an error
                callback.on_fit_begin(run)
            fit()
            while begun:
                begun.pop(0).on_fit_end(history)
        except BaseException as error:
            for callback in begun:
                try:
                    callback.on_error(error)
                except Exception as second:
                    error.add_note(f"{callback!r} failed as well: {second}")
            raise

    def attendance_changed(self, change: AttendanceChange) -> None:
        """Tells them who is out, or back."""
        for callback in self._all:
            callback.on_attendance(change)

    def round_begins(self, number: int, asked: tuple[str, ...]) -> None:
        """Tells them who is asked in a round."""
        for callback in self._all:
            callback.on_round_begin(number, asked)

    def round_ended(self, record: RoundRecord, history: History) -> Stop | None:
        """Tells them of a round; gives back what the first of those said who want to stop.

        Raises:
            ConfigError: One returned True or a text, which is no `Stop`.
        """
        found: list[tuple[Callback, Any]] = [(each, each.on_round_end(record, history)) for each in self._all]
        for callback, said in found:
            if said is True or said is Stop or isinstance(said, str):
                msg = f"{callback!r:.80} returned {said!r:.80} from on_round_end. To end training return Stop(reason)."
                raise ConfigError(msg)
        return next((said for _, said in found if isinstance(said, Stop)), None)


def metrics_of(record: RoundRecord) -> dict[str, float]:
    """A round as flat numbers, the same for every tracker.

    Losses are nats per completion token, times seconds; metrics stand under `metrics/<name>`. Each participant's
    numbers stand under `participant/<name>/<field of ParticipantRecord>`, its metrics there as `metric_<name>`; the
    part after the last slash never has one, so no two names collide whatever is in them. What was not measured, or is
    not finite, is left out.

    >>> from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
    >>> record = RoundRecord(3, {"a/b": ParticipantRecord("trained", train_loss=1.5, bytes_up=10)}, held_out_after=1.25)
    >>> found = metrics_of(record)
    >>> found["held_out/after"], found["train_loss"], found["bytes/up"], found["participant/a/b/train_loss"]
    (1.25, 1.5, 10.0, 1.5)
    >>> "held_out/before" in found
    False
    """
    found: dict[str, float | None] = {
        "held_out/before": record.held_out_before,
        "held_out/after": record.held_out_after,
        "train_loss": record.train_loss,
        "update_norm": record.update_norm,
        "aggregation_gap": record.aggregation_gap,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "bytes/evaluation": record.evaluation_bytes,
        "seconds/round": record.seconds,
        "seconds/training": record.training_seconds,
        "seconds/evaluation": record.evaluation_seconds,
        "participants/trained": len(record.trained),
        "participants/asked": record.asked,
    }
    found |= {f"metrics/{one_line(key)}": value for key, value in record.metrics.items()}
    for name, participant in record.participants.items():
        own = asdict(participant) | {f"metric_{one_line(key)}": value for key, value in participant.metrics.items()}
        for field, value in own.items():
            if isinstance(value, (int, float)):
                found[f"participant/{one_line(name)}/{field}"] = value
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def notes_of(record: RoundRecord) -> list[str]:
    """What concerns the whole round, who did not train and why, and what the learning guards found."""
    found = list(record.notes)
    found += [
        f"{name}: {p.status}" + (f" ({p.reason})" if p.reason else "")
        for name, p in record.participants.items()
        if p.status not in ("trained", "idle")
    ]
    found += [f"{name}: {note}" for name, p in record.participants.items() for note in p.notes]
    return [one_line(text) for text in found]


def samples_of(record: RoundRecord) -> dict[str, str]:
    """Participant → its samples of the round as Markdown, texts fenced so that nothing in them is markup."""
    grouped: dict[str, list[str]] = {}
    for sample in record.samples:
        grouped.setdefault(sample.participant, []).append(_markdown(sample))
    return {one_line(name): "\n\n---\n\n".join(texts) for name, texts in grouped.items()}


def _markdown(sample: Sample) -> str:
    parts = {"prompt": sample.prompt, "reference": sample.reference, "before": sample.before, "after": sample.after}
    return "\n\n".join(
        f"**{title}**\n\n{_fenced(printable(text, _LONGEST))}" for title, text in parts.items() if text is not None
    )


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # a fence inside the text is shorter, so it cannot close this one
    return f"{fence}\n{text}\n{fence}"
