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


@dataclass
class RoundRecord:
    """One completed round."""

    round: int
    participants: dict[str, ParticipantRecord]
    held_out_before: float | None = None
    """nats per token over all participants' held-out examples together"""
    held_out_after: float | None = None
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

    def __str__(self) -> str:
        return " | ".join(_cells(self))

    def line(self, of: int | None = None) -> str:
        """The round in a line for an operator: each figure with what it is, and of how many rounds, if that is known.

        >>> RoundRecord(3, {"a": ParticipantRecord("trained", train_loss=1.5)}, seconds=2.5).line(of=10)
        'round 3 of 10 · 1 of 1 trained · train loss 1.500 · up / down 0 B / 0 B · 2.5 seconds'
        """
        number, trained, *figures = _cells(self)
        named = [f"{heading} {cell}" for heading, cell in zip(_HEADINGS[2:5], figures, strict=False) if cell != "–"]
        seconds, notes = figures[3:]
        first = f"round {number} of {of}" if of is not None else f"round {number}"
        return " · ".join([first, f"{trained} trained", *named, f"{seconds} seconds", *([notes] if notes else [])])


_HEADINGS = ("round", "trained", "train loss", "held-out loss", "up / down", "seconds", "notes")


class History:
    """The rounds of a federation, oldest first.

    In a notebook it shows itself as a table. `to_pandas` has one row per round and participant, `plot` draws the
    losses, `to_json` and `save` export everything.
    """

    def __init__(self, rounds: list[RoundRecord] | None = None) -> None:
        self.rounds = list(rounds or [])
        self.stopped_early: str | None = None
        """why `fit` ended before its rounds were used up"""

    def append(self, record: RoundRecord) -> None:
        """Adds a completed round."""
        self.rounds.append(record)

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.rounds)

    def __getitem__(self, index: int) -> RoundRecord:
        return self.rounds[index]

    def __repr__(self) -> str:
        rows = [_HEADINGS, *(_cells(r) for r in self.rounds)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + ([f"stopped early: {one_line(self.stopped_early)}"] if self.stopped_early else []))

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(_cells(r), "td") for r in self.rounds)
        note = f"<p>stopped early: {html.escape(one_line(self.stopped_early))}</p>" if self.stopped_early else ""
        return f"<table><thead>{row(_HEADINGS, 'th')}</thead><tbody>{body}</tbody></table>{note}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"rounds": [asdict(r) for r in self.rounds], "stopped_early": self.stopped_early}

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
        history.stopped_early = found.stopped_early
        return history

    def to_pandas(self) -> pd.DataFrame:
        """One row per round and participant; `notes` are the participant's, `round_notes` those of the whole round.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(f"to_pandas needs pandas: {install('plot', 'pandas')}") from error  # noqa: EM102
        rows = [
            {"round": r.round, "participant": n} | asdict(p) | {"round_notes": r.notes}
            for r in self.rounds
            for n, p in r.participants.items()
        ]
        return pd.DataFrame(_mapped(rows, lambda leaf: printable(leaf) if isinstance(leaf, str) else leaf))

    def plot(self) -> Figure:
        """Training and held-out loss per participant over the rounds, in nats per token, or per example over labels.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingExtraError(f"plot needs matplotlib: {install('plot', 'matplotlib')}") from error  # noqa: EM102
        figure: Figure
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        plt.close(figure)  # a notebook shows what a cell returns; left open, it would show it twice
        unit = "nats per example" if self.rounds and self.rounds[-1].loss == "labels" else "nats per token"
        names = list(dict.fromkeys(n for r in self.rounds for n in r.participants))
        for name in names:
            found = [(r.round, r.participants[name]) for r in self.rounds if name in r.participants]
            train = [(n, p.train_loss) for n, p in found if p.train_loss is not None]
            held_out = [(n, p.held_out_after) for n, p in found if p.held_out_after is not None]
            if found and found[0][1].held_out_before is not None:
                held_out = [(found[0][0] - 1, found[0][1].held_out_before), *held_out]
            for axes, points in ((left, train), (right, held_out)):
                if points:  # a dollar would begin a formula
                    axes.plot(*zip(*points, strict=True), marker="o", label=one_line(name, 80).replace("$", r"\$"))
        for axes, title in ((left, "training"), (right, "held out")):
            axes.set(title=title, xlabel="round", ylabel=unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if axes.lines:
                axes.legend()
        return figure


def _cells(record: RoundRecord) -> tuple[str, ...]:
    notes = list(record.notes)
    notes += [f"{n}: {r.status}" for n, r in record.participants.items() if r.status not in ("trained", "idle")]
    notes += [f"{n}: {note}" for n, r in record.participants.items() for note in r.notes]
    held_out = f"{_number(record.held_out_before)} → {_number(record.held_out_after)}"
    said = "; ".join(notes[:3]) + (f" … and {len(notes) - 3} more" if len(notes) > 3 else "")
    return (
        str(record.round),
        f"{len(record.trained)} of {record.asked}",
        _number(record.train_loss),
        held_out if record.held_out_after is not None else "–",
        f"{size(record.bytes_up)} / {size(record.bytes_down + record.evaluation_bytes)}",
        f"{record.seconds:.1f}",
        printable(said, 3 * _LONGEST),
    )


def finite(value: Any) -> Any:
    """The same data with null for numbers that are not finite, which JSON has not."""
    return _mapped(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same data with every value in it changed."""
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else change(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of ten.

    >>> size(19_538_112)
    '19.5 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
