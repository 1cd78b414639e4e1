"""One HTML file that shows how a federation went: readable on a phone, complete without a network.

Knows numbers, plots and HTML. Knows nothing about models, chains or federation: it is given plain dicts.
Numbers may be missing, None or NaN; they show as a dash, leave a gap in the plots and stay out of the means.
"""

import base64
import html
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from llmchain_fed.storage.own_files import write_whole

Row = Mapping[str, Any]

_COLUMNS = {"participant": 0.0, "prompt": 0.11, "before": 0.33, "after": 0.56, "reference": 0.79}
"""of a picture's samples: where each begins, as a share of the width"""
COLOURS = ("#3454d1", "#e07a1f", "#1a936f", "#c2338b", "#7a5cc9", "#0f9bb3", "#a23b3b", "#6b7a1e")
STYLE = """
*{box-sizing:border-box} body{margin:0;background:#f4f6fa;color:#1c2433;font:16px/1.55 system-ui,sans-serif}
header div,main{max-width:1040px;margin:0 auto;padding:0 16px} h2{font-size:1.2rem;margin:40px 0 12px}
header{background:linear-gradient(120deg,#1f2d5c,#3454d1 60%,#1a936f);color:#fff;padding:40px 0 72px}
h1{font-size:clamp(1.5rem,5vw,2.3rem);margin:0;line-height:1.2} header p{margin:8px 0 0;opacity:.85}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.facts{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:-44px}
.card{background:#fff;border-radius:14px;padding:16px 18px;box-shadow:0 4px 16px #1c243312;min-width:0}
.card b{display:block;font-size:1.3rem;line-height:1.25} table,b{font-variant-numeric:tabular-nums}
small,dt,th,footer{color:#5c677d;font-size:.82rem} img{width:100%;height:auto;display:block}
.scroll{overflow-x:auto} table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid #e6eaf1;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
tr:last-child td{border-bottom:0} td.words{white-space:normal;text-align:left;min-width:180px}
details{margin:8px 0} summary{cursor:pointer;font-weight:600} dl{margin:0} dt{margin-top:8px}
dd{margin:2px 0 0;padding:6px 10px;border-left:3px solid #d5dbe6;border-radius:4px;background:#f7f9fc;
white-space:pre-wrap;overflow-wrap:anywhere} dd.after{border-color:#1a936f;background:#eefaf5}
.who{background:#e8edff;color:#2a44ad;border-radius:99px;padding:2px 10px;font-size:.8rem;font-weight:600}
ul{margin:0;padding-left:20px} li{margin:6px 0} footer{padding:40px 0}
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary_rows: Sequence[Row],
    samples: Sequence[Row],
    history_json: Row,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report and return its path. All text is escaped; nothing is loaded from elsewhere.

    Args:
        path: the .html file; missing folders are made.
        title: the headline.
        summary_rows: one mapping per line of the summary table; its keys are the columns. The first names the
            participant; "chrf_before" and "chrf_after" (0–100), where present, become the bar chart.
        samples: mappings with participant, prompt, reference, before, after; none: those of the last round.
        history_json: {"rounds": [{"round", "seconds", "samples", "participants": {name: {"bytes_up", …}}}]}.
        notes: what a reader should know: settings, limits, how to reproduce.
    """
    rounds: list[Row] = list(history_json.get("rounds") or [])
    shown = samples or (rounds[-1].get("samples") if rounds else None) or []
    figures = [
        ("Held-out loss, nats per token (lower is better)", _loss_plot(rounds)),
        ("chrF, before and after (higher is better)", _chrf_plot(summary_rows)),
        ("Megabytes per round, all participants", _bytes_plot(rounds)),
    ]
    plots = "".join(
        f'<div class="card"><small>{text}</small><img alt="{text}" src="{uri}"></div>' for text, uri in figures if uri
    )
    facts = "".join(
        f'<div class="card"><small>{name}</small><b>{value}</b></div>' for name, value in _facts(rounds, summary_rows)
    )
    tables = "".join(
        f"<details><summary>Round {_text(r.get('round'))} ({_text(r.get('seconds'))} s)</summary>"
        + _table([{"participant": name, **values} for name, values in _participants(r).items()])
        + "</details>"
        for r in rounds
    )
    sections = [
        ("Summary", summary_rows and f'<div class="card">{_table(summary_rows)}</div>'),
        ("How it went", plots and f'<div class="grid">{plots}</div>'),
        ("Before and after", shown and f'<div class="grid">{"".join(map(_sample, shown))}</div>'),
        ("Every round", tables and f'<div class="card">{tables}</div>'),
        (
            "Notes",
            notes and f'<div class="card"><ul>{"".join(f"<li>{_text(n)}</li>" for n in notes)}</ul></div>',
        ),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>
<body><header><div><h1>{_text(title)}</h1><p>Each participant trained on its own data; only weight updates
were shared.</p></div></header><main><div class="facts">{facts}</div>{body}
<footer>Written by llmchain_fed.</footer></main></body></html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def write_picture(
    path: str | Path, *, title: str, summary_rows: Sequence[Row], samples: Sequence[Row], history_json: Row
) -> None:
    """Write the report's plots and one sample of each participant as one small SVG: what fits into a README.

    Args:
        path: the .svg file; missing folders are made.
        title: the headline.
        summary_rows: as for `write_report`.
        samples: as for `write_report`; the first of each participant is shown.
        history_json: as for `write_report`.
    """
    figure = Figure(figsize=(9, 5.4), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    losses, scores, texts = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    _draw_losses(losses, list(history_json.get("rounds") or []))
    losses.set_title("held-out loss, nats per token", fontsize=10)
    _draw_bars(scores, *_chrf_columns(summary_rows))
    scores.set_title("chrF before and after", fontsize=10)
    for axes in (losses, scores):
        axes.spines[["top", "right"]].set_visible(False)
    first = {sample["participant"]: sample for sample in reversed(samples)}
    lines = [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *(first[name] for name in reversed(first))]
    texts.axis("off")
    for row, line in enumerate(lines):
        for key, place in _COLUMNS.items():
            text = textwrap.shorten(str(line[key]), 32, placeholder=" …")
            height = 1 - (row + 0.5) / len(lines)
            texts.text(place, height, text, fontsize=8, weight="normal" if row else "bold", in_layout=False)
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _participants(record: Row) -> dict[str, Row]:
    return {name: values or {} for name, values in (record.get("participants") or {}).items()}


def _number(value: Any) -> float:
    """A finite float; NaN for whatever is not one."""
    known = hasattr(value, "__float__") and not isinstance(value, bool) and math.isfinite(float(value))
    return float(value) if known else math.nan


def _text(value: Any) -> str:
    """Any value as escaped text; missing numbers become a dash."""
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_text, value)) or "–"
    if isinstance(value, (str, bool)):
        return html.escape(str(value))
    if math.isnan(number := _number(value)):
        return "–"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.3g}"


def _total(record: Row, key: str) -> float:
    numbers = (_number(values.get(key)) for values in _participants(record).values())
    return sum(number for number in numbers if not math.isnan(number))


def _means(pairs: Iterable[tuple[Any, Any]]) -> str | None:
    """The two means, over the pairs that have both numbers: else they would not be about the same thing."""
    known = [(a, b) for a, b in ((_number(a), _number(b)) for a, b in pairs) if not math.isnan(a + b)]
    return f"{fmean(a for a, _ in known):.3g} → {fmean(b for _, b in known):.3g}" if known else None


def _facts(rounds: Sequence[Row], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The few numbers at the top of the page."""
    first, last = (_participants(rounds[i]) if rounds else {} for i in (0, -1))
    loss = _means((first[n].get("held_out_before"), last[n].get("held_out_after")) for n in first if n in last)
    chrf = _means((row.get("chrf_before"), row.get("chrf_after")) for row in rows)
    moved = ("bytes_up", "bytes_down", "evaluation_bytes")
    megabytes = sum(_total(r, name) for r in rounds for name in moved) / 1e6
    facts = [
        ("participants", str(len({name for r in rounds for name in _participants(r)}))),
        ("rounds", str(len(rounds))),
        ("mean held-out loss", loss),
        ("mean chrF", chrf),
        ("moved in all", f"{megabytes:,.3g} MB" if megabytes < 1000 else f"{megabytes / 1000:.3g} GB"),
    ]
    return [(name, value) for name, value in facts if value and value not in ("0", "0 MB")]


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(column.replace('_', ' ').replace('chrf', 'chrF'))}</th>" for column in columns)
    lines = ""
    for cells in ([row.get(column) for column in columns] for row in rows):
        kinds = [' class="words"' if cell and isinstance(cell, (list, tuple)) else "" for cell in cells]
        tds = (f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(cells, kinds, strict=True))
        lines += f"<tr>{''.join(tds)}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _sample(sample: Row) -> str:
    parts = {"prompt": "Prompt", "before": "Before", "after": "After", "reference": "Reference"}
    items = "".join(
        f'<dt>{name}</dt><dd class="{key}">{_text(sample.get(key)) or "(nothing)"}</dd>' for key, name in parts.items()
    )
    return f'<div class="card"><span class="who">{_text(sample.get("participant"))}</span><dl>{items}</dl></div>'


def _axes() -> tuple[Any, Any]:
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6eaf1")
    axes.set_axisbelow(True)
    return figure, axes


def _uri(figure: Any) -> str:
    """The figure for an <img> of its own, so that the identifiers inside the SVGs cannot clash."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report"}):  # the same numbers give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _round_names(rounds: Sequence[Row]) -> list[str]:
    return [str(r.get("round", i)) for i, r in enumerate(rounds, start=1)]


def _loss_plot(rounds: Sequence[Row]) -> str | None:
    figure, axes = _axes()
    return _uri(figure) if _draw_losses(axes, rounds) else None


def _draw_losses(axes: Any, rounds: Sequence[Row]) -> bool:
    """One curve for each participant; whether there was anything to draw."""
    for i, name in enumerate(dict.fromkeys(name for r in rounds for name in _participants(r))):
        records = [_participants(r).get(name, {}) for r in rounds]
        curve = [records[0].get("held_out_before"), *(record.get("held_out_after") for record in records)]
        heights = [_number(loss) for loss in curve]
        if not all(map(math.isnan, heights)):
            axes.plot(heights, marker="o", linewidth=2, color=COLOURS[i % len(COLOURS)], label=name)
    if not axes.lines:
        return False
    axes.set_xticks(range(len(rounds) + 1), ["start", *_round_names(rounds)])
    axes.set_xlabel("round")
    axes.legend(frameon=False)
    return True


def _bars(names: list[str], groups: dict[str, list[float]], *, axis: str = "") -> str | None:
    """Two bars for each name, or None where there is nothing to show."""
    if not any(height > 0 for heights in groups.values() for height in heights):
        return None
    figure, axes = _axes()
    _draw_bars(axes, names, groups)
    axes.set_xlabel(axis)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return _uri(figure)


def _draw_bars(axes: Any, names: list[str], groups: dict[str, list[float]]) -> None:
    for shift, colour, (group, heights) in zip((-0.2, 0.2), ("#b8c0cc", "#1a936f"), groups.items(), strict=True):
        bars = axes.bar([i + shift for i in range(len(names))], heights, 0.38, color=colour, label=group)
        if len(names) <= 6:
            texts = ["" if math.isnan(height) else f"{height:.3g}" for height in heights]
            axes.bar_label(bars, texts, fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0)


def _chrf_plot(rows: Sequence[Row]) -> str | None:
    return _bars(*_chrf_columns(rows))


def _chrf_columns(rows: Sequence[Row]) -> tuple[list[str], dict[str, list[float]]]:
    """The participants' names, and their chrF before and after."""
    columns = {name: [_number(row.get(f"chrf_{name}")) for row in rows] for name in ("before", "after")}
    return [str(next(iter(row.values()), "")) for row in rows], columns


def _bytes_plot(rounds: Sequence[Row]) -> str | None:
    down = [(_total(r, "bytes_down") + _total(r, "evaluation_bytes")) / 1e6 for r in rounds]
    columns = {"down": down, "up": [_total(r, "bytes_up") / 1e6 for r in rounds]}
    return _bars(_round_names(rounds), columns, axis="round")
