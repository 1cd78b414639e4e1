"""How a comparison is shown: a table per metric whose digits stand alike, and the gains with their intervals.

Knows text and HTML. Knows nothing about how the numbers came about.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.federated.comparison.results import Comparison, ComparisonRow, Gain

_MOST = 8  # participants with a column of their own; all are in to_pandas()
_STYLE = "text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap"

_NO_SD = " " * len(" ± 0.000")
_UNSEEN = "<span style='visibility:hidden'> ± 0.000</span>"  # of the same width as an sd


def as_text(comparison: Comparison) -> str:
    """For a terminal."""
    parts = ["\n".join([title, *_aligned(cells)]) for title, cells in _tables(comparison)]
    return "\n\n".join([*parts, *_notes(comparison)])


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]


def as_html(comparison: Comparison) -> str:
    """For a notebook."""
    parts = []
    for title, (head, *body) in _tables(comparison):
        rows = ""
        for row in body:
            first, *rest = (html.escape(cell).replace(_NO_SD, _UNSEEN) for cell in row)
            rows += f"<tr><th style='text-align:left'>{first}</th>"
            rows += "".join(f"<td style='{_STYLE}'>{cell}</td>" for cell in rest) + "</tr>"
        headings = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        parts.append(
            f"<table><caption>{html.escape(title)}</caption><thead><tr>{headings}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    notes = "".join(f"<p style='white-space:pre-line'>{html.escape(text)}</p>" for text in _notes(comparison))
    return "".join(parts) + notes


def _tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """(title, cells with the headings first): each metric's arms, then the gains of all."""
    found = [(_title(comparison, m), [_headings(comparison), *_cells(comparison, m)]) for m in comparison.metrics]
    by_pair: dict[tuple[str, str, str], list[str]] = {}
    for gain in comparison.gains():
        by_pair.setdefault((gain.arm, gain.over, gain.metric), []).append(_difference(gain))
    if by_pair:
        cells = [
            [f"{one_line(a, 60)} over {one_line(b, 60)}, {one_line(m)}", *both] for (a, b, m), both in by_pair.items()
        ]
        title = "gain (above 0 is better) with its 95 % interval over seeds and participants"
        found.append((title, [["", "own texts", "pooled"], *cells]))
    return found


def _difference(gain: Gain) -> str:
    between = "no interval" if gain.interval is None else f"[{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{gain.mean:+.3f} {between}"


def gain_line(gain: Gain) -> str:
    """A gain as a sentence."""
    return f"{one_line(gain.arm)} over {one_line(gain.over)}, {one_line(gain.metric)}, {gain.on}: {_difference(gain)}"


def _title(comparison: Comparison, metric: str) -> str:
    unit = f", {comparison.unit}" if metric == "loss" else ""
    better = "less is better" if metric in comparison.minimize else "more is better"
    better = "nobody said which way is better" if metric in comparison.undirected else better
    seeds = len(comparison.seeds)
    over = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
    return f"{one_line(metric)}{unit} ({better}), {over}, {comparison.rounds} rounds"


def _shown(comparison: Comparison) -> Sequence[str]:
    return comparison.participants[:_MOST]


def _headings(comparison: Comparison) -> list[str]:
    names = [one_line(name, 20) for name in _shown(comparison)]
    return ["arm", "own texts", "pooled", *names, "learning rate", "examples seen", "seconds"]


def _cells(comparison: Comparison, metric: str) -> list[list[str]]:
    rows = [row for row in comparison.rows if row.metric == metric]
    shown = _shown(comparison)
    columns = [
        [_number(row.own, row.own_sd) for row in rows],
        [_number(row.pooled, row.pooled_sd) for row in rows],
        *([_number(row.participants[name], row.participants_sd[name]) for row in rows] for name in shown),
        [_rates(row) for row in rows],
        [f"{row.examples_seen:,}" if row.examples_seen else "–" for row in rows],
        [f"{row.seconds:.1f}" for row in rows],
    ]
    return [[one_line(row.arm, 60), *cells] for row, *cells in zip(rows, *columns, strict=True)]


def _number(mean: float, sd: float | None) -> str:
    """Three decimals in every row; where there is no sd its room stays free: means stand below each other."""
    return f"{mean:.3f} ± {sd:.3f}" if sd is not None else f"{mean:.3f}{_NO_SD}"


def _rates(row: ComparisonRow) -> str:
    found = sorted(set(row.learning_rate.values()))
    return " … ".join(f"{lr:g}" for lr in dict.fromkeys((found[0], found[-1]))) if found else "–"


def _notes(comparison: Comparison) -> list[str]:
    more = len(comparison.participants) - _MOST
    notes = [one_line(note) for note in comparison.notes]
    notes += [f"{more} more participants are in to_pandas()"] if more > 0 else []
    return ["\n".join(notes)] if notes else []
