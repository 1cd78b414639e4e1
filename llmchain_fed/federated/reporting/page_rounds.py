"""The part of a page that goes by rounds: charts, the table of all rounds, and metrics beside loss.

Knows records, and which of their figures a person reads. Knows nothing of how a chart is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from llmchain_fed.federated.reporting.outcomes import settled
from llmchain_fed.federated.reporting.page_charts import MOST_NAMED, Line, Point, lines_chart, picture
from llmchain_fed.federated.reporting.page_text import (
    NONE,
    finite,
    inline,
    number,
    numbers,
    score_digits,
    signed,
    sizes,
    spans,
    table,
    who,
)

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord

_OPEN = 150  # cells of a table by participant that is unfolded from the beginning


def _names(history: History) -> list[str]:
    return list(dict.fromkeys(name for record in history for name in record.participants))


def unit_of(history: History) -> str:
    """What losses are counted in."""
    return "nats per example" if history[-1].loss == "labels" else "nats per token"


# --- charts ---------------------------------------------------------------------------------------------------------


def _held_out(history: History, name: str | None, label: str) -> Line:
    """Before the first round and after each; where members changed a new part begins."""
    parts: list[list[Point]] = []
    for record in history:
        found = record if name is None else record.participants.get(name)
        before, after = (finite(found.held_out_before), finite(found.held_out_after)) if found else (None, None)
        goes_on = parts and parts[-1][-1][0] == record.round - 1 and not record.members_changed
        if not goes_on and before is not None:
            parts.append([(record.round - 1, before)])
        if after is not None:
            if not parts or (not goes_on and before is None):
                parts.append([])
            parts[-1].append((record.round, after))
    return Line(label, [part for part in parts if part])


def _train(history: History, of: Callable[[RoundRecord], float | None], label: str) -> Line:
    found = [(record.round, finite(of(record))) for record in history]
    points: list[Point] = [(number, loss) for number, loss in found if loss is not None]
    return Line(label, [points] if points else [])


def held_out_lines(history: History) -> list[Line]:
    """One line a participant, or the common one where nobody has a loss of its own."""
    lines = [_held_out(history, name, name) for name in _names(history)]
    return lines if any(line.parts for line in lines) else [_held_out(history, None, "all together")]


def charts(history: History) -> str:
    """Held-out and training loss over the rounds."""
    changed = [record.round for record in history if record.members_changed]
    unit, names = unit_of(history), _names(history)
    trained = [
        _train(history, lambda r, n=name: r.participants[n].train_loss if n in r.participants else None, name)  # type: ignore[misc]
        for name in names
    ]
    found = [
        ("Held-out loss", "after each round", held_out_lines(history), _held_out(history, None, "all together")),
        (
            "Training loss",
            "mean over each round's steps",
            trained,
            _train(history, lambda r: r.train_loss, "mean of all"),
        ),
    ]
    figures = []
    for heading, when, lines, whole in found:
        drawn = lines_chart(lines, label=f"{heading} by round, {unit}", whole=whole, changed=changed)
        many = " Thin lines are participants, the thick one is all together." if len(lines) > MOST_NAMED else ""
        broken = " Members changed at the dashed line: held-out losses are of other texts after it." if changed else ""
        caption = f"<figcaption><b>{heading}</b>{unit}, {when}; lower is better.{many}{broken}</figcaption>"
        figures.append(f"<figure>{caption}{drawn}</figure>" if drawn else "")
    return "".join(figures)


def held_out_picture(history: History, title: str) -> str:
    """The chart of held-out losses as an SVG of its own: what fits into a README."""
    return picture(held_out_lines(history), label=title)


# --- tables ---------------------------------------------------------------------------------------------------------


def every_round(history: History) -> str:
    """A line for each round, and losses by participant beneath it."""
    records = history.rounds
    pooled = [finite(r.held_out_after) for r in records]
    moved = [r.bytes_up for r in records] + [r.bytes_down + r.evaluation_bytes for r in records]
    unit, both = sizes(moved)  # one unit for both ways
    ups, downs = both[: len(records)], both[len(records) :]
    clock, seconds = spans([r.seconds for r in records])
    begin = max((n for n, r in enumerate(records) if r.members_changed), default=0)  # before, losses are of others
    known = [(loss, n) for n, loss in enumerate(pooled) if loss is not None and n >= begin]
    best = min(known)[1] if known and len(records) > 1 else None
    kept = settled(history)[-1] if len(settled(history)) < len(records) else None
    columns = [
        ("round", [_number_of(r, lowest=n == best, kept=r is kept) for n, r in enumerate(records)]),
        ("took part", [f"{len(r.trained)} of {r.asked}" for r in records]),
        ("training loss", numbers([finite(r.train_loss) for r in records])),
        ("held-out loss", numbers(pooled) if known else []),
        *((inline(name, 40), cells) for name, cells in _scores(records)),
        (f"up<small>{unit}</small>", ups),
        (f"down<small>{unit}</small>", downs),
        (f"time<small>{clock}</small>", seconds),
    ]
    columns = [(heading, cells) for heading, cells in columns if cells]
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    stopped = f"<p>It ended early: {inline(history.stopped_early)}.</p>" if history.stopped_early else ""
    marks = {best: "best"} if best is not None else None
    whole = table([heading for heading, _ in columns], rows, what="every round", marks=marks)
    return whole + stopped + _by_participant(history, "Held-out loss", lambda p: p.held_out_after) + _by_participant(
        history, "Training loss", lambda p: p.train_loss
    )  # fmt: skip


def _scores(records: Sequence[RoundRecord]) -> Iterator[tuple[str, list[str]]]:
    """Metrics of all together, a column each."""
    for name in dict.fromkeys(name for record in records for name in _metrics(record)):
        values = [_metrics(record).get(name) for record in records]
        yield name, numbers(values, score_digits(values))


def _number_of(record: RoundRecord, *, lowest: bool, kept: bool) -> str:
    tags = [word for word, so in (("lowest", lowest), ("kept", kept)) if so]
    return f"{record.round}" + (f' <span class="tag">{", ".join(tags)}</span>' if tags else "")


def _by_participant(history: History, heading: str, of: Callable[[ParticipantRecord], float | None]) -> str:
    names = _names(history)
    columns = [[finite(of(r.participants[n])) if n in r.participants else None for r in history] for n in names]
    if not any(value is not None for column in columns for value in column):
        return ""
    flat = numbers([value for column in columns for value in column])
    size = len(history)
    cells = [flat[n * size : (n + 1) * size] for n in range(len(names))]
    rows = list(zip([f"{r.round}" for r in history], *cells, strict=True))
    inner = table(["round", *map(who, names)], rows, what=f"{heading} by participant", kind="matrix")
    unfolded = " open" if size * len(names) <= _OPEN else ""
    return f"<details{unfolded}><summary>{heading} of each participant, after each round</summary>{inner}</details>"


# --- metrics beside loss -------------------------------------------------------------------------------------------


def _metrics(record: RoundRecord | ParticipantRecord | None, field: str = "metrics") -> Mapping[str, float]:
    """Name → value, of a record that has some."""
    found = getattr(record, field, None)
    return found if isinstance(found, Mapping) else {}


def metric_names(history: History) -> list[str]:
    """Of all metrics beside loss."""
    found: list[RoundRecord | ParticipantRecord] = [*history, *(p for r in history for p in r.participants.values())]
    return list(dict.fromkeys(name for each in found for name in _metrics(each)))


def metrics(history: History) -> str:
    """Every metric before the first round and after the last, by participant."""
    names, rounds = metric_names(history), settled(history)
    if not names:
        return ""
    people: list[tuple[str, Callable[[RoundRecord], RoundRecord | ParticipantRecord | None]]]
    people = [("All together", lambda record: record)]
    people += [(who(n), lambda record, n=n: record.participants.get(n)) for n in _names(history)]  # type: ignore[misc]
    found = []
    for name in names:
        ends = []
        for _, of in people:
            before = [finite(_metrics(of(r), "metrics_before").get(name)) for r in rounds]
            after = [finite(_metrics(of(r)).get(name)) for r in rounds]
            first = next((value for value in before if value is not None), None)
            ends.append((first, next((value for value in reversed(after) if value is not None), None)))
        digits = score_digits([value for pair in ends for value in pair])
        rows = [
            [label, number(a, digits), number(b, digits), signed(b - a, digits) if None not in (a, b) else NONE]  # type: ignore[operator]
            for n, ((label, _), (a, b)) in enumerate(zip(people, ends, strict=True))
            if n or (a, b) != (None, None)
        ]
        inner = table(["participant", "before", "after", "change"], rows, what=name)
        found.append(f"<h3>{inline(name, 80)}</h3>{inner}")
    lead = "<p>Computed by each participant on its own held-out texts; of all together, weighted by their number.</p>"
    return f"<section>\n<h2>Metrics beside loss</h2>\n{lead}{''.join(found)}\n</section>\n"
