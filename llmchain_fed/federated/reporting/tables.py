"""Tables: a history in rows and columns, for people and for frames.

Knows records. Knows nothing of how rounds come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmchain_fed.untrusted import one_line, printable

if TYPE_CHECKING:
    from llmchain_fed.federated.history import ParticipantRecord, RoundRecord

HEADINGS = ("round", "trained", "train loss", "held-out loss", "metrics", "up / down", "seconds", "notes")
_METRICS = HEADINGS.index("metrics")
_LONGEST = 3000  # characters of notes


def rows_of(rounds: Sequence[RoundRecord]) -> list[tuple[str, ...]]:
    """The headings and a row for each round; metrics have a column where there are any."""
    rows = [HEADINGS, *(cells_of(record) for record in rounds)]
    if any(record.metrics for record in rounds):
        return rows
    return [cells[:_METRICS] + cells[_METRICS + 1 :] for cells in rows]


def cells_of(record: RoundRecord) -> tuple[str, ...]:
    """A round under the headings."""
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
        ", ".join(f"{one_line(key)} {_number(value)}" for key, value in record.metrics.items()) or "–",
        f"{size(record.bytes_up)} / {size(record.bytes_down + record.evaluation_bytes)}",
        f"{record.seconds:.1f}",
        printable(said, _LONGEST),
    )


def columns_of(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """Column → value for each round and participant, with a column for each metric."""
    return [
        {"round": record.round, "participant": name} | _flat(each) | {"round_notes": record.notes}
        for record in rounds
        for name, each in record.participants.items()
    ]


def _flat(record: ParticipantRecord) -> dict[str, Any]:
    """A participant's numbers with a column for each metric."""
    found = asdict(record)
    after, before = found.pop("metrics"), found.pop("metrics_before")
    found |= {f"metric_{key}": value for key, value in after.items()}
    return found | {f"metric_{key}_before": value for key, value in before.items()}


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
