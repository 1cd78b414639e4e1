"""The parts of a page that are no figures of a round: what left, data, samples, notes, model, options, privacy.

Knows records and what was known of the federation, in words. Knows nothing of charts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llmchain_fed.data.report import DataReport
from llmchain_fed.federated.history_file import AboutData
from llmchain_fed.federated.options import FederationConfig
from llmchain_fed.federated.reporting.about import options_of
from llmchain_fed.federated.reporting.lines import reason_of
from llmchain_fed.federated.reporting.outcomes import settled
from llmchain_fed.federated.reporting.page_text import NONE, block, inline, listed, ranges, sizes, table, who

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, Sample

_MOST_SAMPLES, _MOST_NOTES = 60, 200
_MONTHS = [*("January", "February", "March", "April", "May", "June", "July", "August"), "September", "October"]
_MONTHS += ["November", "December"]  # strftime's depend on where it runs
_STATUS = {
    "absent": "was not there",
    "late": "was not done by the deadline",
    "failed": "failed at its work",
    "refused": "sent an update that was refused",
}


def _names(history: History) -> list[str]:
    return list(dict.fromkeys(name for record in history for name in record.participants))


def dates(about: AboutData) -> str:
    """When it was, as far as that is known."""
    found = []
    for moment in (about.began, about.ended):
        try:
            at = datetime.fromisoformat(moment or "")
        except ValueError:
            return ""
        found.append(f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M}")
    zone = " UTC" if (about.ended or "").endswith("+00:00") else ""
    first, last = found
    if first == last:
        return f"{first}{zone}"
    day, clock = last.rsplit(", ", 1)
    return f"{first} to {clock if first.startswith(day) else last}{zone}"


# --- what left ------------------------------------------------------------------------------------------------------


def what_left(history: History, about: AboutData) -> str:
    """Bytes by participant, and the kinds of data that they were."""
    names = _names(history)
    found = [[r.participants[n] for r in history if n in r.participants] for n in names]
    ups = [sum(p.bytes_up for p in each) for each in found]
    downs = [sum(p.bytes_down for p in each) for each in found]
    asked = [sum(p.evaluation_bytes for p in each) for each in found]
    columns = [ups, downs, asked]
    cells = [sizes([*column, sum(column)]) for column in columns]
    headings = ["its updates, up", "weights, down", "evaluation, both ways"]
    heads = ["participant", *(f"{h}<small>{unit}</small>" for h, (unit, _) in zip(headings, cells, strict=True))]
    rows = list(zip([*map(who, names), "All"], *(column for _, column in cells), strict=True))
    lead = "Examples that were trained on stayed where they were. This is what crossed the border, over all rounds."
    if about.simulated:
        lead = (
            "All participants ran in one process, as in a simulation: nothing left a machine. This is what would have "
            "crossed the border between organisations, over all rounds."
        )
    kinds = "".join(f"<dt>{kind}</dt><dd>{said}</dd>" for kind, said in _kinds(history, about))
    whole = table(heads, rows, what="bytes by participant", marks={len(names): "sum"})
    return f'<p>{lead}</p>{whole}<dl class="kinds">{kinds}</dl>'


def _kinds(history: History, about: AboutData) -> list[tuple[str, str]]:
    quoting = [record for record in history if record.samples]
    texts = len({(s.participant, s.prompt, s.reference) for record in quoting for s in record.samples})
    people = list(dict.fromkeys(s.participant for record in quoting for s in record.samples))
    metrics = list(dict.fromkeys(name for record in history for name in getattr(record, "metrics", None) or {}))
    losses = "of training, each round; and of held-out texts before and after it, where there are any"
    more = f"; the metrics {', '.join(inline(name, 40) for name in metrics[:20])}" if metrics else ""
    found = [
        ("Changes of weights", _weights(about)),
        ("Counts", "of examples, tokens, steps and seconds; how many examples were left out, by reason"),
        ("Losses", f"{losses}{more}. Of a small set a loss says something about its texts."),
        ("Digests", "of base weights, prompt, tokenizer and options, by which all know that they train the same"),
    ]
    said = "none: no sample was asked for" if not texts else (
        f"{texts:,} of {listed(people)}: prompt, reference, and the answers before and after each round"
    )  # fmt: skip
    return [*found, ("Held-out texts", said)]


def _weights(about: AboutData) -> str:
    """What an update has in it, as far as that is known."""
    model, codec = about.model, about.options.get("codec")
    if model is None:
        return "one update a round of each who trained"
    of = f"{model.tensors:,} tensors with {model.trained:,} values in all are trained"
    factors = {"A": "their factors A leave, the factors B stay", "B": "their factors B leave, the factors A stay"}
    factors |= {"A and B in turn": "one round their factors A leave, the next their factors B"}
    part = f"; {factors[about.shares]}" if about.shares in factors else "; all of them leave"
    how = f"as {inline(codec, 40)}, what that leaves out follows in later rounds" if codec else "value by value"
    adapter = f" of the adapter ({inline(model.adapter, 80)})" if model.adapter else ", the model's own"
    return f"{of}{adapter}{part}, {how}"


# --- the data -------------------------------------------------------------------------------------------------------


def data(history: History, about: AboutData) -> str:
    """Counts of examples by participant: used, held out, left out and why."""
    counted = {f.name for f in fields(DataReport) if f.init}
    rows = []
    for name in _names(history):
        counts = about.data.get(name, {})
        report = DataReport(**{key: count for key, count in counts.items() if key in counted})
        known = [r.participants[name] for r in history if name in r.participants]
        used = report.used or next((p.examples for p in reversed(known) if p.examples), None)
        left, kept = inline(report.left_out_in_words) or NONE, inline(report.kept_in_words) or NONE
        rounds = sum(p.status == "trained" for p in known)
        tokens = report.completion_tokens or None
        cells = (used, tokens, counts.get("held_out"))
        rows.append([who(name), *(f"{c:,}" if c else NONE for c in cells), f"{rounds} of {len(history)}", left, kept])
    headings = ["participant", "trained on", "tokens learnt", "held out", "rounds", "left out", "used, but"]
    note = '<p class="soft">Counts are what each participant declared. Texts longer than the model takes, empty ones '
    note += "and those that no answer could be are left out, never cut.</p>"
    return table(headings, rows, what="counts of examples", words=(5, 6)) + note


# --- held-out texts -------------------------------------------------------------------------------------------------


def quoted(history: History) -> list[Sample]:
    """The samples that stand on the page: those of the last round that has some, at most so many a participant."""
    last = next((record for record in reversed(settled(history)) if record.samples), None)
    if last is None:
        return []
    people = dict.fromkeys(sample.participant for sample in last.samples)
    most = max(1, _MOST_SAMPLES // len(people))
    found: list[Sample] = []
    for name in list(people)[:_MOST_SAMPLES]:
        found += [sample for sample in last.samples if sample.participant == name][:most]
    return found


def warning(samples: Sequence[Sample]) -> str:
    """Beside the title: that the page quotes texts, and whose."""
    if not samples:
        return ""
    people = list(dict.fromkeys(sample.participant for sample in samples))
    return (
        f'<p class="warn">This page quotes {len(samples)} held-out text{"s" if len(samples) != 1 else ""} of '
        f"{listed(people)}, with reference and answers. Hand it on only to those who may read them.</p>"
    )


def samples_of(history: History, samples: Sequence[Sample]) -> str:
    """Each text with what the chain made of it before the first round and after the last that has it."""
    if not samples:
        return ""
    earliest: dict[tuple[str, str, str], tuple[int, str | None]] = {}
    for record in history:
        for s in record.samples:
            earliest.setdefault((s.participant, s.prompt, s.reference), (record.round, s.before))
    last = next(record for record in reversed(settled(history)) if record.samples)
    shown = [_sample(s, *earliest[s.participant, s.prompt, s.reference], last.round) for s in samples]
    more = len(last.samples) - len(samples)
    rest = f'<p class="soft">{more:,} more of this round stand in the history.</p>' if more > 0 else ""
    lead = (
        f"<p>Answers on texts that the model was not trained on, by the weights before round {history[0].round} and "
        f"after round {last.round}. They are examples, not the best ones; a line break is shown as ↵.</p>"
    )
    return lead + "".join(shown) + rest


def _sample(sample: Sample, first: int, before: str | None, last: int) -> str:
    def answer(text: str | None, kind: str = "") -> str:
        if text is None:
            return '<dd class="none">not recorded</dd>'
        return f'<dd dir="auto" class="{kind}">{block(text)}</dd>' if text else '<dd class="none">(nothing)</dd>'

    same = " · the answer is the reference" if sample.after is not None and sample.after == sample.reference else ""
    items = [
        ("prompt", answer(sample.prompt)),
        (f"before round {first}", answer(before)),
        (f"after round {last}", answer(sample.after, "now")),
        ("reference", answer(sample.reference)),
    ]
    inner = "".join(f"<dt>{name}</dt>{said}" for name, said in items)
    return (
        f'<article class="sample"><h3>{who(sample.participant)} <span>held-out text{same}</span></h3>'
        f"<dl>{inner}</dl></article>"
    )


# --- what else ------------------------------------------------------------------------------------------------------


def notes(history: History) -> str:
    """Absences, refusals and what guards found, each once with its rounds."""
    found: dict[tuple[str | None, str], list[int]] = {}
    for record in history:
        for note in record.notes:
            found.setdefault((None, note), []).append(record.round)
        for name, p in record.participants.items():
            if p.status in _STATUS:
                why = f": {reason_of(p.reason)}" if p.reason else ""
                found.setdefault((name, f"{_STATUS[p.status]}{why}"), []).append(record.round)
            for note in p.notes:
                found.setdefault((name, note), []).append(record.round)
    if not found:
        return "<p>Nothing: everyone who was asked trained in every round, and no guard found anything.</p>"
    items = [
        f"<li>{f'{who(name)}, {ranges(rounds)}' if name is not None else ranges(rounds).capitalize()}: "
        f"{inline(said, 1000)}</li>"
        for (name, said), rounds in list(found.items())[:_MOST_NOTES]
    ]
    more = len(found) - _MOST_NOTES
    return f"<ul>{''.join(items)}</ul>" + (f"<p>{more:,} more stand in the history.</p>" if more > 0 else "")


def model_and_options(about: AboutData) -> str:
    """Which model, on what, with which options; nothing where nothing is known."""
    model, found = about.model, []
    if model is not None:
        share = f" ({100 * model.trained / model.parameters:.2g} %)" if model.parameters else ""
        found += [
            ("model", inline(model.name)),
            ("kind", {"causal": "causal: text goes on", "seq2seq": "from sequence to sequence"}.get(model.kind, "")),
            ("trained", inline(model.adapter) if model.adapter else "the model's own weights"),
            ("parameters trained", f"{model.trained:,} of {model.parameters:,}{share}"),
            ("base weights", f"<code>{inline(model.fingerprint[:16], 40)}</code>" if model.fingerprint else ""),
            ("the hub's device", inline(model.device, 80)),
        ]
    found += [("when", dates(about))]
    found += [("versions", ", ".join(f"{inline(n, 40)} {inline(v, 40)}" for n, v in about.versions.items()))]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in found if value)
    return (f'<dl class="about">{items}</dl>' if items else "") + _options(about.options)


def _options(options: Mapping[str, Any]) -> str:
    if not options:
        return ""
    usual = options_of(FederationConfig().model_dump(mode="json"))
    other = {name: value for name, value in options.items() if name not in usual or usual[name] != value}
    rest = {name: value for name, value in options.items() if name not in other}

    def rows(found: Mapping[str, Any]) -> str:
        cells = [[f"<code>{inline(name, 80)}</code>", inline(value, 400)] for name, value in found.items()]
        return table(["option", "value"], cells, what="options", words=(1,), kind="options")

    chosen = f"<h3>Options that were chosen</h3>{rows(other)}" if other else ""
    return chosen + (
        f"<details><summary>All other options, as by default</summary>{rows(rest)}</details>" if rest else ""
    )


def privacy(about: AboutData, samples: Sequence[Sample]) -> str:
    """What the page and the updates may give away, plainly."""
    people = list(dict.fromkeys(sample.participant for sample in samples))
    texts = f"{len(samples)} held-out texts of {listed(people)}, with answers" if samples else "no texts"
    lines = [
        "Updates can leak what they were trained on, and so can the trained model's answers. That examples stayed "
        "where they were does not guarantee that nothing about them can be inferred.",
        f"On this page stand names of participants, counts, losses, bytes, options, notes, and {texts}.",
    ]
    if about.simulated:
        lines.append(
            "All examples lay in one place while this ran: it shows what a federation would learn, not its privacy."
        )
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
