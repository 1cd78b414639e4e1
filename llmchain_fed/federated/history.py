"""History: what happened in each round, as numbers, a table, plots and JSON.

Knows records. Knows nothing about how they came about.
"""

from __future__ import annotations

import html
import json
import math
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import ConfigError, LLMChainFedError, MissingExtraError, install
from llmchain_fed.federated.history_file import HistoryData, checked_rounds, rounds_in
from llmchain_fed.federated.reporting import tables
from llmchain_fed.federated.reporting.reports import Reports
from llmchain_fed.storage.own_files import write_whole
from llmchain_fed.untrusted import checked, one_line, printable, shown
from llmchain_fed.untrusted.text import DANGEROUS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


_LONGEST = 1000  # characters of what went wrong elsewhere


def told_of(error: BaseException) -> str:
    """Type and message of what went wrong, as a record says it: text from elsewhere can be shown and is bounded."""
    return one_line(f"{type(error).__name__}: {error}", _LONGEST)


@dataclass(slots=True)
class ParticipantRecord:
    """One participant in one round; None where it was not measured."""

    status: str = "absent"
    """trained, idle (not sampled), late (not done by the deadline), absent (not reached), failed (its work raised) or
    refused (its update was)"""
    reason: str | None = None
    train_loss: float | None = None
    """nats per completion token, mean over the round's steps"""
    held_out_before: float | None = None
    """nats per completion token under the global weights before the round"""
    held_out_after: float | None = None
    examples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    """of local training"""
    update_norm: float | None = None
    """L2 norm of local − global"""
    cosine_to_mean: float | None = None
    """between this update and the round's mean update, over some 1,000 evenly spaced coordinates; None where
    participants' ranks differ"""
    bytes_up: int = 0
    """of its update"""
    bytes_down: int = 0
    """of the weights it was sent to train"""
    evaluation_bytes: int = 0
    """of the weights it was sent to evaluate, and of its answers"""
    metrics: dict[str, float] = field(default_factory=dict)
    """over its held-out examples, under the global weights after the round; what it could not measure is missing"""
    metrics_before: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """learning guards: a zero update, one equal to another's, adapter tensors that never changed; in its first round
    what is both trained on and held out; held-out losses that are not finite"""


@dataclass
class Sample:
    """What the chain wrote for a held-out example before and after the round."""

    participant: str
    prompt: str
    reference: str
    before: str | None = None
    after: str | None = None


@dataclass(repr=False)
class RoundRecord:
    """One completed round."""

    round: int
    participants: dict[str, ParticipantRecord]
    held_out_before: float | None = None
    """nats per token over all participants' held-out examples together"""
    held_out_after: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """after the round: the mean of the values of the participants who have one, weighted by their held-out examples, or
    the value over the one set for all; participants elsewhere weigh at most one half each where there are three"""
    metrics_before: dict[str, float] = field(default_factory=dict)
    """likewise under the global weights before it"""
    update_norm: float | None = None
    """L2 norm of how the global trainable values moved"""
    aggregation_gap: float | None = None
    """‖mean(BA) − mean(B)·mean(A)‖ / ‖mean(BA)‖: what averaging LoRA factors apart leaves out; None without LoRA"""
    seconds: float = 0.0
    """the whole round"""
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    weights_version: str = ""
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what concerns the whole round: that the federation diverges, that its members have changed"""
    members_changed: bool = False
    """whether members, or what they have, are others than in the round before (`resume(members="changed")`): its
    held-out losses are then over other examples"""
    loss: str = "tokens"
    """what losses are: "tokens" are nats per completion token, "labels" nats per example, over the labels"""

    @property
    def trained(self) -> list[str]:
        """Names of the participants whose updates were used."""
        return [name for name, record in self.participants.items() if record.status == "trained"]

    @property
    def asked(self) -> int:
        """How many participants the round wanted an update of: all but the idle."""
        return sum(record.status != "idle" for record in self.participants.values())

    @property
    def train_loss(self) -> float | None:
        """Nats per token, mean over those who trained."""
        losses = [
            r.train_loss for r in self.participants.values() if r.status == "trained" and r.train_loss is not None
        ]
        return sum(losses) / len(losses) if losses else None

    @property
    def bytes_up(self) -> int:
        """Bytes of all updates that arrived."""
        return sum(r.bytes_up for r in self.participants.values())

    @property
    def bytes_down(self) -> int:
        """Bytes of all broadcasts for training."""
        return sum(r.bytes_down for r in self.participants.values())

    @property
    def evaluation_bytes(self) -> int:
        """Bytes of evaluation: mostly weights on their way down, which training need not send again."""
        return sum(r.evaluation_bytes for r in self.participants.values())

    def __repr__(self) -> str:
        return f"RoundRecord({self.line()})"

    def __str__(self) -> str:
        return " | ".join(tables.rows_of([self])[1])

    def line(self, of: int | None = None) -> str:
        """The round in a line for an operator: each figure with what it is, and of how many rounds, if that is known.

        >>> RoundRecord(3, {"a": ParticipantRecord("trained", train_loss=1.5)}, seconds=2.5).line(of=10)
        'round 3 of 10 · 1 of 1 trained · train loss 1.500 · up / down 0 B / 0 B · 2.5 seconds'
        """
        number, trained, *figures, seconds, notes = tables.cells_of(self)
        named = [
            f"{heading} {cell}" for heading, cell in zip(tables.HEADINGS[2:], figures, strict=False) if cell != "–"
        ]
        first = f"round {number} of {of}" if of is not None else f"round {number}"
        return " · ".join([first, f"{trained} trained", *named, f"{seconds} seconds", *([notes] if notes else [])])


class History(Reports):
    """The rounds of a federation, oldest first.

    In a notebook it shows itself as a table. `to_pandas` has one row per round and participant, `plot` draws the
    losses, `report` writes a page for everyone who took part, `to_json` and `save` export everything.
    """

    def __init__(self, rounds: list[RoundRecord] | None = None) -> None:
        self.rounds = list(rounds or [])
        self.stopped_early: str | None = None
        """why `fit` ended before its rounds were used up"""
        self.about: dict[str, Any] = {}
        """what is known of the federation beside its rounds: model, options, versions, dates, counts of examples"""
        self.monitor: str | None = None
        """what the latest `fit` went by: "held_out_loss", or a metric's name"""
        self.best: int | None = None
        """number of the round whose pooled value of that is best, since members last changed"""
        self.kept: int | None = None
        """the round whose weights `fit(keep="best")` has left the chain with, where it is not the last"""

    def append(self, record: RoundRecord) -> None:
        """Adds a completed round."""
        self.rounds.append(record)
        self.kept = None

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.rounds)

    def __getitem__(self, index: int) -> RoundRecord:
        return self.rounds[index]

    def __repr__(self) -> str:
        rows = tables.rows_of(self.rounds)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self.endings())

    def endings(self) -> list[str]:
        """How the latest fit ended, in lines: why before its rounds were used up, and with which round's weights."""
        found = [f"stopped early: {one_line(self.stopped_early)}"] if self.stopped_early else []
        if self.kept is not None:
            found.append(f"the chain has the weights of round {self.kept}, the best by {one_line(self.monitor)}")
        return found

    def _repr_html_(self) -> str:
        heading, *rows = tables.rows_of(self.rounds)

        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in rows)
        note = "".join(f"<p>{html.escape(line)}</p>" for line in self.endings())
        return f"<table><thead>{row(heading, 'th')}</thead><tbody>{body}</tbody></table>{note}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        ends = {name: getattr(self, name) for name in ("stopped_early", "monitor", "best", "kept", "about")}
        return {"rounds": [asdict(r) for r in self.rounds]} | ends

    def to_json(self) -> str:
        """Everything as JSON that can be written and shown; numbers that are not finite, which JSON has not, are null.

        Characters that command a terminal, or that no encoding has, stand there as JSON's escapes.
        """
        text = json.dumps(finite(self.to_dict()), ensure_ascii=False, indent=1, allow_nan=False)
        return DANGEROUS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # of which all lie below 2¹⁶

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file, whole or not at all; a history with more rounds is never replaced.

        Raises:
            ConfigError: The file contains a history with more rounds than this one.
            OSError: It cannot be written; what was there is as it was.
        """
        path = Path(path)
        if (there := rounds_in(path)) > len(self):
            msg = (
                f"{shown(str(path), 300)!r} contains a history of {there} rounds, this one has {len(self)}: it is not "
                "replaced. Choose another file, or move that one away."
            )
            raise ConfigError(msg)
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o666
        write_whole(path, self.to_json(), mode=mode, follow=True)

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        *,
        what: str = "the history",
        error: type[LLMChainFedError] = ConfigError,
        remedy: str = "Give what to_dict() or to_json() gave.",
    ) -> History:
        """The reverse of `to_dict` and `to_json`, for data that came from anywhere.

        Every field has its type and its range; for what has not, an `error` is raised that says `what` was read and
        the `remedy`.
        """
        found = checked(HistoryData, data, what=what, error=error, remedy=remedy)
        history = cls()
        for record, people in checked_rounds(found, what=what, error=error, remedy=remedy):
            participants = {name: ParticipantRecord(**dict(each)) for name, each in people.items()}
            samples = [Sample(**dict(sample)) for sample in record.samples]
            history.append(RoundRecord(**{**dict(record), "participants": participants, "samples": samples}))
        history.stopped_early, history.about = found.stopped_early, found.about.model_dump(exclude_unset=True)
        history.stopped_early, history.monitor = found.stopped_early, found.monitor
        history.best, history.kept = found.best, found.kept
        return history

    def to_pandas(self) -> pd.DataFrame:
        """One row per round and participant; `notes` are the participant's, `round_notes` those of the whole round.

        Its metrics are columns `metric_<name>`, and those before the round `metric_<name>_before`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(f"to_pandas needs pandas: {install('plot', 'pandas')}") from error  # noqa: EM102
        rows = tables.columns_of(self.rounds)
        return pd.DataFrame(_mapped(rows, lambda leaf: printable(leaf) if isinstance(leaf, str) else leaf))

    def plot(self) -> Figure:
        """Training and held-out loss per participant over the rounds, and each metric with its pooled value.

        Losses are nats per token, or per example over labels.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from llmchain_fed.federated.reporting.plots import plotted

        return plotted(self)


def finite(value: Any) -> Any:
    """The same data with null for numbers that are not finite, which JSON has not."""
    return _mapped(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same data with every value in it changed."""
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else change(value)
