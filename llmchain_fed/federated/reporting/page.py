"""Page: a history as one HTML file that whoever took part can read. Its order, its head, and what helped whom.

Knows records and what was known of the federation. Knows nothing of files, or of how a chart is drawn.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.history_file import AboutData
from llmchain_fed.federated.reporting import page_sections as sections
from llmchain_fed.federated.reporting.outcomes import MARGIN, WORDS, Outcome, outcomes, settled
from llmchain_fed.federated.reporting.page_charts import bell
from llmchain_fed.federated.reporting.page_comparison import arms_table, check_of, other_rounds
from llmchain_fed.federated.reporting.page_rounds import charts, every_round, metric_names, metrics
from llmchain_fed.federated.reporting.page_style import SHEET
from llmchain_fed.federated.reporting.page_text import NONE, digits_of, inline, number, sizes, spans, who
from llmchain_fed.untrusted import checked

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History
_FLATTERS = "held-out loss flatters"  # as notes on what is both trained on and held out end


def page(history: History, *, title: str | None, comparison: Any, samples: bool) -> str:
    """The whole page.

    Raises:
        ConfigError: There is nothing to report, or `comparison` or `history.about` is none.
    """
    if not len(history):
        msg = "this history has no completed round, so there is nothing to report. Call fit(rounds=…) first."
        raise ConfigError(msg)
    remedy = "Leave it as fit() made it, or set it to {}."
    about = checked(AboutData, history.about, what="history.about", error=ConfigError, remedy=remedy)
    names = list(dict.fromkeys(name for record in history for name in record.participants))
    headline = title or f"What {len(names)} participant{'s' if len(names) != 1 else ''} learnt together"
    quoted = sections.quoted(history) if samples else []
    content = [
        _helped(history, about, comparison),
        metrics(history),
        _section("How it went", charts(history)),
        _section("Every round", every_round(history)),
        _section("What left, and what came", sections.what_left(history, about)),
        _section("The data", sections.data(history, about)),
        _section("Held-out texts, before and after", sections.samples_of(history, quoted)),
        _section("What went otherwise than planned", sections.notes(history)),
        _section("Model and options", sections.model_and_options(about)),
        _section("Privacy", sections.privacy(about, quoted)),
    ]
    style = base64.b64encode(hashlib.sha256(SHEET.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    version = about.versions.get("llmchain-fed", "")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="robots" content="noindex">
<title>{inline(headline)}</title>
<style>{SHEET}</style>
</head>
<body>
<header>
<h1><bdi>{inline(headline)}</bdi></h1>
{_subtitle(about)}
{_facts(history, len(names))}
{sections.warning(quoted)}
</header>
<main>
{"".join(part for part in content if part)}
</main>
<footer><p>Written by llmchain_fed{f" {inline(version, 40)}" if version else ""} from the history of the federation
alone: the same history gives the same page.</p></footer>
</body>
</html>
"""


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>\n" if content else ""


def _subtitle(about: AboutData) -> str:
    model = f"{inline(about.model.name, 80)}" if about.model is not None and about.model.name else ""
    date = sections.dates(about)
    said = " · ".join(part for part in (model, date) if part)
    return f"<p>{said}</p>" if said else ""


def _facts(history: History, people: int) -> str:
    unit, (moved,) = sizes([sum(r.bytes_up + r.bytes_down + r.evaluation_bytes for r in history)])
    clock, (took,) = spans([sum(record.seconds for record in history)])
    first, last = history[0].held_out_before, settled(history)[-1].held_out_after
    digits = digits_of([first, last])
    changed = any(record.members_changed for record in history.rounds[1:])
    loss = f"{number(first, digits)} → {number(last, digits)}" if None not in (first, last) and not changed else ""
    found = [
        ("participants", f"{people}"),
        ("rounds", f"{len(history)}"),
        ("held-out loss of all", loss),
        ("moved in all", f"{moved} {unit}"),
        ("time of all rounds", f"{took} {clock}"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in found if value)
    return f'<dl class="facts">{items}</dl>'


# --- did it help ------------------------------------------------------------------------------------------------------


def _helped(history: History, about: AboutData, comparison: Any) -> str:
    examples = {name: counts["held_out"] for name, counts in about.data.items() if "held_out" in counts}
    check_of(comparison, {name for record in history for name in record.participants})
    found = outcomes(history, examples, comparison)
    own = [outcome for outcome in found if outcome.name is not None]
    measured = [outcome for outcome in found if outcome.verdict != "unknown"]
    if not measured and not any(outcome.alone is not None for outcome in found):
        why = (
            "Nothing was held out, so whether it helped is not known. Give evaluation=0.1, for example, to measure it."
        )
        return _section("Did it help?", f"<p>{why}</p>{_metrics_hint(history)}")
    unit = "nats per example" if history[-1].loss == "labels" else "nats per token"
    if not any(outcome.verdict != "unknown" for outcome in own):
        own, lead = [], "The loss was measured on one set that is common to all, not at each participant."
    else:
        lead = _tally(own)
    shown = [outcome for outcome in found if outcome.name is None or outcome in own]
    values = [v for o in shown for v in (o.before, o.after, o.alone, o.together) if v is not None]
    digits, low, high = digits_of(values), min(values), max(values)
    room = 0.02 * (high - low) or 1.0
    alone = any(outcome.alone is not None for outcome in shown)
    items = "".join(_item(outcome, unit, digits, low - room if low > room else low, high + room) for outcome in shown)
    key = ["○ before", "● after", *(["◆ training alone"] if alone else [])]
    scale = f"held-out loss, {unit}, from {number(low, digits)} at the left to {number(high, digits)}: lower is better"
    note = "" if alone else (
        '<p class="soft">Whether training alone would have helped as much is not known here: '
        "<code>fed.compare()</code> measures it, and <code>history.report(…, comparison=…)</code> shows it.</p>"
    )  # fmt: skip
    criterion = (
        f'<p class="soft">Held-out loss says how badly the model foresees texts that it was not trained on. Better or '
        f"worse is a change of more than {100 * MARGIN:.0f} % of the loss before. It is one run: how far another would "
        f"differ is not known from it.{_flattered(history)}</p>"
    )
    legend = "".join(f"<span>{each}</span>" for each in (*key, scale))
    listed = f'<div class="key">{legend}</div><ol class="outcomes">{items}</ol>'
    arms = other_rounds(comparison, len(history)) + arms_table(comparison)
    return _section(
        "Did it help?",
        f"<p>{lead}</p>{listed}{_kept(history)}{criterion}{note}{arms}",
    )


def _flattered(history: History) -> str:
    """What weakens the page's first sentence where it does not hold."""
    notes = [note for record in history for p in record.participants.values() for note in p.notes]
    if not any(note.endswith(_FLATTERS) for note in notes):
        return ""
    return " Here some of these texts are trained on all the same (see what was otherwise than planned): it flatters."


def _kept(history: History) -> str:
    last = settled(history)[-1].round
    if last == history[-1].round:
        return ""
    by = getattr(history, "monitor", None)
    best = f"the best of {len(history)}" + (f" by {inline(by, 40)}" if by else "")
    said = f"The chain was left with the weights of round {last}, {best}: “after” is after that round."
    return f"<p>{said}</p>"


def _metrics_hint(history: History) -> str:
    return "<p>Other metrics stand below.</p>" if metric_names(history) else ""


def _tally(own: list[Outcome]) -> str:
    counts = [(sum(o.verdict == kind for o in own), kind) for kind in ("better", "same", "worse", "unknown")]
    words = {"better": "better", "same": "about the same", "worse": "worse", "unknown": "not measured"}
    said = [f"{count} {words[kind]}" for count, kind in counts if count]
    return f"Of {len(own)} participants, after against before on their own held-out texts: {', '.join(said)}."


def _item(outcome: Outcome, unit: str, digits: int, low: float, high: float) -> str:
    kind = outcome.verdict
    name = who(outcome.name) if outcome.name is not None else "All together"
    figures = f"{number(outcome.before, digits)}<i>→</i>{number(outcome.after, digits)}" if kind != "unknown" else NONE
    alone = f"<small>alone {number(outcome.alone, digits)}</small>" if outcome.alone is not None else ""
    drawn = bell(outcome.before, outcome.after, [("alone", outcome.alone)], low, high, kind)
    whole = ' class="whole"' if outcome.name is None else ""
    return (
        f'<li{whole}><div><h3>{name} <span class="verdict {kind}">{WORDS[kind]}</span></h3>'
        f"<p>{outcome.sentence(unit, digits)}</p></div>{drawn if kind != 'unknown' or alone else '<span></span>'}"
        f'<div class="numbers">{figures}{alone}</div></li>'
    )
