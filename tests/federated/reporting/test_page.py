"""`history.report(path)`: what the page says, read back with html.parser, never by the code that wrote it.

Belongs here: content, escaping, digits, that nothing is loaded from elsewhere. Does not: colours (test_page_style),
what a federation notes of itself (test_about).
"""

import base64
import hashlib
import re
import time
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from llmchain_fed import History
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.data import Overlap
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord, Sample
from llmchain_fed.federated.reporting.page_rounds import held_out_picture

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "path", "rect", "circle"}
EVIL = '</title><script>alert(1)</script><img src=x onerror="a()">\u202e\x1b[2J\n7  3 of 3'


class Page(HTMLParser):
    """Tags, attributes and text of a page, and its tables as lists of rows."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.open, self.texts, self.tables, self.classes = [], [], [], [], [], []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, tag
            assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "style" in inside or "title" in inside[-1:]:
            return
        if {"td", "th"} & set(inside):
            self.tables[-1][-1][-1] += data
        self.texts.append((data, [kind for _, kind in self.open]))

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(data for data, _ in self.texts))

    def table(self, heading):
        """Column → cells of the first table that has a column of that heading."""
        found = next(rows for rows in self.tables if heading in rows[0])
        return {name: [row[n] for row in found[1:]] for n, name in enumerate(found[0])}

    def within(self, kind):
        """Texts within elements of a class."""
        return [data.strip() for data, kinds in self.texts if kind in " ".join(kinds).split() and data.strip()]


class Measured(ParticipantRecord):
    """One that has metrics."""


def people(losses, number, **changes):
    """Participants of a round; `losses`: name → held-out loss before the first round, and after each."""
    return {
        name: ParticipantRecord(
            "trained", None, each[number] + 0.25, each[number - 1], each[number], 160, 2000, 20, 60.0,
            bytes_up=19_538_112, bytes_down=19_500_000, evaluation_bytes=1_000, **changes,
        )
        for name, each in losses.items()
    }  # fmt: skip


def made(losses, **changes):
    rounds = len(next(iter(losses.values()))) - 1
    history = History()
    for number in range(1, rounds + 1):
        mean = [sum(each[n] for each in losses.values()) / len(losses) for n in (number - 1, number)]
        history.append(RoundRecord(number, people(losses, number, **changes), *mean, seconds=212.3 + number))
    return history


THREE = {"django": [4.0, 2.5, 2.0], "wagtail": [3.0, 2.999, 2.995], "plone": [2.0, 1.9, 2.4]}


@pytest.fixture
def shown(tmp_path):
    def read(history, **options):
        path = history.report(tmp_path / "new" / "report.html", **options)
        assert path == tmp_path / "new" / "report.html"
        page = Page(path)
        assert page.open == [], "every element is closed"
        return page

    return read


# --- did it help ------------------------------------------------------------------------------------------------------


def test_each_participant_reads_whether_it_helped_and_by_how_much(shown):
    page = shown(made(THREE))
    assert (
        "Of 3 participants, after against before on their own held-out texts: 1 better, 1 about the same, 1 worse."
        in (page.text)
    )
    assert "Better by 2.000 nats per token (50\u00a0%) on its own held-out texts, over rounds 1 to 2." in (
        "".join(data for data, _ in page.texts)
    )
    assert "Worse by 0.400 nats per token" in page.text
    assert "It was lowest after round 1, 1.900, and has risen since." in page.text
    assert "No clear change over rounds 1 to 2: 0.005 nats per token" in page.text
    assert page.within("verdict") == ["▼ better", "▼ better", "about the same", "▲ worse"], "all together comes first"
    assert "fed.compare()" in page.text, "what alone would have given is not known, and the page says so"


def test_the_figures_before_and_after_are_those_of_the_first_and_the_last_round(shown):
    numbers = [text for text in shown(made(THREE)).within("numbers") if text != "→"]
    assert numbers == ["3.000", "2.465", "4.000", "2.000", "3.000", "2.995", "2.000", "2.400"]


def test_where_the_best_round_was_kept_that_is_what_after_means(shown):
    history = made(THREE)
    history.kept, history.monitor = 1, "held_out_loss"
    page = shown(history)
    assert [t for t in page.within("numbers") if t != "→"][-2:] == ["2.000", "1.900"]
    assert "left with the weights of round 1, the best of 2 by held_out_loss:" in page.text
    assert page.table("took part")["round"] == ["1 kept", "2 lowest"]


def test_a_comparison_says_what_training_alone_would_have_given(shown):
    rows = [
        SimpleNamespace(arm=arm, metric=metric, own=2.0, own_sd=0.01, participants=values, participants_sd={})
        for arm, metric, values in [
            ("alone", "loss", {"django": 2.5, "wagtail": 2.0}),
            ("federated", "loss", {"django": 2.1, "wagtail": 2.9}),
            ("alone", "chrf", {"django": 99.0, "wagtail": 99.0}),
        ]
    ]
    page = shown(made(THREE), comparison=SimpleNamespace(rows=rows, seeds=(0, 1)))
    assert "Better than training alone by 0.400 (2.100 against 2.500 in the comparison)." in page.text
    assert "Training alone was better by 0.900 (2.900 against 2.000 in the comparison)." in page.text
    assert "fed.compare()" not in page.text
    assert page.table("arm")["django"] == ["2.500", "2.100"]
    assert page.table("arm")["all, mean"] == ["2.000 ± 0.010"] * 2


@pytest.mark.parametrize("comparison", [1, SimpleNamespace(rows=[{"arm": "alone"}]), SimpleNamespace(rows=3)])
def test_what_is_no_comparison_is_refused_and_nothing_is_written(comparison, tmp_path):
    with pytest.raises(ConfigError, match=r"fed\.compare"):
        made(THREE).report(tmp_path / "a.html", comparison=comparison)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_of_others_is_refused_and_one_of_other_rounds_says_so(shown, tmp_path):
    def arms(names, rounds):
        rows = [
            SimpleNamespace(arm=arm, metric="loss", own=2.0, participants=dict.fromkeys(names, 2.0))
            for arm in ("alone", "federated")
        ]
        return SimpleNamespace(rows=rows, seeds=(0,), rounds=rounds)

    history = made(THREE)
    with pytest.raises(ConfigError, match="of other participants than the history: it has x"):
        history.report(tmp_path / "a.html", comparison=arms(["x"], 1))
    assert list(tmp_path.iterdir()) == []
    page = shown(history, comparison=arms(THREE, 1))
    assert f"The comparison is of 1 round, this history of {len(history)}" in page.text
    assert "The comparison is of" not in shown(history, comparison=arms(THREE, len(history))).text


def test_where_held_out_texts_are_trained_on_the_sentence_about_them_says_so(shown):
    history = made(THREE)
    assert "it flatters" not in shown(history).text
    history[0].participants["django"].notes += Overlap(3, 0, 40).notes()
    assert "Here some of these texts are trained on all the same" in shown(history).text


def test_without_anything_held_out_it_says_that_nothing_is_known(shown):
    history = made(THREE)
    for record in history:
        record.held_out_before = record.held_out_after = None
        for each in record.participants.values():
            each.held_out_before = each.held_out_after = None
    page = shown(history)
    assert "Nothing was held out" in page.text
    assert "verdict" not in [kind for _, kinds in page.texts for kind in kinds]
    assert "held-out loss" not in page.tables[0][0]


def test_a_loss_on_one_set_for_all_is_nobodys_own(shown):
    history = made(THREE)
    for record in history:
        for each in record.participants.values():
            each.held_out_before = each.held_out_after = None
    page = shown(history)
    assert "measured on one set that is common to all" in page.text
    assert page.within("verdict") == ["▼ better"]


def test_few_held_out_examples_are_called_few(shown):
    history = made(THREE)
    history.about = {"data": {"django": {"held_out": 3}, "wagtail": {"held_out": 200}}}
    page = shown(history)
    assert page.text.count("it may be luck") == 1
    assert "Measured on 3 examples only" in page.text


def test_after_a_change_of_members_only_later_losses_are_compared(shown):
    history = made({"a": [4.0, 3.0, 2.0, 1.5]})
    history[1].members_changed = True
    page = shown(history)
    assert [t for t in page.within("numbers") if t != "→"][-2:] == ["3.000", "1.500"]
    assert "over rounds 2 to 3" in page.text
    assert "Members changed at the dashed line" in page.text


def test_losses_over_labels_are_nats_per_example(shown):
    history = made(THREE)
    for record in history:
        record.loss = "labels"
    assert "nats per example" in shown(history).text


def test_losses_that_are_not_finite_are_no_figures(shown):
    page = shown(made({"a": [2.0, float("nan")], "b": [2.0, 1e300], "c": [2.0, 1.0]}))
    assert page.within("verdict")[-3:] == ["not measured", "not measured", "▼ better"]
    assert "nan" not in page.text


def test_losses_that_differ_widely_are_drawn_by_their_logarithm(shown):
    page = shown(made({"a": [5.96, 140_087.0, 243_139.0]}))
    ticks = {text for text in page.within("tick") if text[0].isdigit()}
    assert {"10", "100", "1,000", "10,000", "100,000"} <= ticks


# --- every round ------------------------------------------------------------------------------------------------------


def test_every_round_is_a_line_with_digits_alike_in_each_column(shown):
    history = made({"a": [4, 3.5, 2.25], "b": [31, 26.2, 1.76]})
    history[1].participants["b"].status = "late"
    table = shown(history).table("took part")
    assert list(table) == ["round", "took part", "training loss", "held-out loss", "upMB", "downMB", "times"]
    assert table["took part"] == ["2 of 2", "1 of 2"]
    assert table["held-out loss"] == ["14.850", "2.005"]
    for name in ("training loss", "held-out loss", "upMB", "downMB", "times"):
        assert len({len(cell.partition(".")[2]) for cell in table[name]}) == 1, name


def test_losses_by_participant_stand_in_a_table_by_round(shown):
    table = shown(made(THREE)).table("plone")
    assert table["round"] == ["1", "2"]
    assert table["plone"] == ["1.900", "2.400"]


def test_metrics_stand_before_and_after_with_their_change(shown):
    history = made(THREE)
    for number, record in enumerate(history):
        record.participants = {name: Measured(**asdict(each)) for name, each in record.participants.items()}
        for each in (record, *record.participants.values()):
            each.metrics, each.metrics_before = {"chrf": 20.25 + number}, {"chrf": 11.0}
    page = shown(history)
    assert page.table("change") == {
        "participant": ["All together", *THREE],
        "before": ["11.0"] * 4,
        "after": ["21.2"] * 4,
        "change": ["+10.2"] * 4,
    }
    assert page.table("took part")["chrf"] == ["20.2", "21.2"]


# --- what left, data, notes, model ------------------------------------------------------------------------------------

ABOUT = {
    "began": "2026-11-28T08:06:40+00:00",
    "ended": "2026-11-28T09:27:02+00:00",
    "versions": {"python": "3.11.2", "llmchain-fed": "0.1.0"},
    "model": {
        "name": "tiny", "kind": "causal", "parameters": 2000, "trained": 100, "tensors": 8,
        "adapter": "LoRA, rank 4, alpha 8", "fingerprint": "abcdef0123456789abcdef", "device": "cuda:0",
    },
    "options": {"codec": "int8", "seed": 0, "training.batch_size": 4},
    "shares": "B",
    "simulated": False,
    "data": {"django": {"used": 150, "completion_tokens": 1234, "held_out": 20, "too_long": 7, "empty": 3, "raw": 2}},
}  # fmt: skip


def test_bytes_are_summed_by_participant_and_kinds_are_named(shown):
    history = made(THREE)
    history.about = ABOUT
    page = shown(history)
    table = page.table("its updates, upMB")
    assert table["participant"] == ["django", "wagtail", "plone", "All"]
    assert table["its updates, upMB"] == ["39.1", "39.1", "39.1", "117.2"]  # 2 · 19,538,112 bytes, and three times that
    assert table["evaluation, both wayskB"] == ["2.00", "2.00", "2.00", "6.00"]
    assert "8 tensors with 100 values in all" in page.text
    assert "their factors B leave, the factors A stay, as int8" in page.text
    assert "none: no sample was asked for" in page.text
    assert "nothing left a machine" not in page.text
    history.about = ABOUT | {"simulated": True}
    assert "nothing left a machine" in shown(history).text


def test_counts_of_examples_say_what_was_left_out_and_why(shown):
    history = made(THREE)
    history.about = ABOUT
    table = shown(history).table("left out")
    assert table["trained on"] == ["150", "160", "160"], "where nothing was declared, what was trained on"
    assert table["held out"] == ["20", "–", "–"]
    assert table["tokens learnt"][0] == "1,234"
    assert table["left out"][0] == "10 more left out (3 empty, 7 too long)"
    assert table["used, but"][0] == "2 of them raw text"


def test_model_versions_dates_and_options_stand_on_the_page(shown):
    history = made(THREE)
    history.about = ABOUT
    page = shown(history)
    for text in ("LoRA, rank 4, alpha 8", "100 of 2,000 (5 %)", "abcdef0123456789", "cuda:0", "python 3.11.2"):
        assert text in page.text, text
    assert "28 November 2026, 08:06 to 09:27 UTC" in page.text
    chosen = page.table("option")
    assert dict(zip(chosen["option"], chosen["value"], strict=True)) == {"codec": "int8", "training.batch_size": "4"}


def test_absences_refusals_and_notes_are_said_in_words_each_once_with_its_rounds(shown):
    history = made({"a": [3, 2, 2, 2, 2, 2.0], "b": [3, 2, 2, 2, 2, 2.0]})
    for number in (1, 2, 4):
        late = history[number].participants["b"]
        late.status, late.reason = "late", "DeadlineError: no answer within 600 s"
    refused = history[0].participants["a"]
    refused.status, refused.reason = "refused", "UpdateRefusedError: not finite"
    history[3].notes = ["the federation diverges"]
    history.stopped_early = "held-out loss did not improve for 2 rounds"
    text = shown(history).text
    assert text.count("was not done by the deadline") == 1
    assert "b, rounds 2–3, 5: was not done by the deadline: no answer within 600 s" in text
    assert "a, round 1: sent an update that was refused: its update was refused: not finite" in text
    assert "Round 4: the federation diverges" in text
    assert "It ended early: held-out loss did not improve for 2 rounds." in text


# --- held-out texts ---------------------------------------------------------------------------------------------------


def with_samples():
    history = made(THREE)
    for record, after in zip(history, ("one\n\ntwo", "page verrouillée"), strict=True):
        record.samples = [Sample("django", "page locked", "page verrouillée", f"before {record.round}", after)]
    return history


def test_samples_are_marked_as_held_out_texts_from_before_the_first_to_after_the_last_round(shown):
    page = shown(with_samples())
    assert "This page quotes 1 held-out text of django" in page.text
    assert "held-out text · the answer is the reference" in page.text
    assert "before 1" in page.text
    assert "before 2" not in page.text
    assert page.within("now") == ["page verrouillée"]


def test_line_breaks_of_an_answer_are_shown(shown):
    history = with_samples()
    history.rounds.pop()
    assert re.search(r"one↵\s+↵\s+two", "".join(data for data, _ in shown(history).texts))


def test_samples_can_be_left_off(shown):
    page = shown(with_samples(), samples=False)
    assert "verrouillée" not in page.source
    assert "page locked" not in page.source
    assert "and no texts" in page.text


def test_of_many_and_long_samples_the_page_has_some_and_says_how_many_more(shown):
    history = made(THREE)
    history[1].samples = [Sample("django", f"prompt {n}", "x", "y", "z" * 5000) for n in range(100)]
    page = shown(history)
    assert "40 more of this round stand in the history" in page.text
    assert "… and 2,000 more characters" in page.text
    assert len(page.source) < 300_000


# --- whoever wrote it -------------------------------------------------------------------------------------------------


def test_text_from_elsewhere_is_text_wherever_it_stands(shown):
    history = made({EVIL: [3.0, 2.0], "\u0627\u0644\u0639": [3.0, 2.0]})
    history[0].samples = [Sample(EVIL, EVIL, EVIL, EVIL, EVIL)]
    history[0].notes, history.stopped_early = [EVIL], EVIL
    history[0].participants[EVIL].notes = [EVIL]
    history[0].participants[EVIL].status, history[0].participants[EVIL].reason = "failed", EVIL
    model = ABOUT["model"] | dict.fromkeys(("name", "adapter", "fingerprint", "device"), EVIL)
    history.about = ABOUT | {"began": EVIL, "model": model, "versions": {EVIL: EVIL}, "options": {EVIL: EVIL}}
    page = shown(history, title=EVIL)
    assert not {"script", "img", "iframe", "link", "object", "form", "base"} & set(page.tags)
    assert page.tags.count("title") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("style", "srcset")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
    assert "\\u202e\\x1b[2J" in page.text
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "<bdi" in page.source[: page.source.index("\u0627\u0644\u0639</bdi>")][-60:], (
        "it turns nothing beside it around"
    )


def test_nothing_is_loaded_from_elsewhere_and_the_policy_allows_nothing(shown):
    page = shown(with_samples())
    assert not [value for _, name, value in page.attributes if name in ("src", "href", "data", "action", "xlink:href")]
    assert not re.search(r"url\(|@import|https?://|//[a-z]", page.source)
    (policy,) = (v for t, n, v in page.attributes if t == "meta" and n == "content" and "default-src" in (v or ""))
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "<style" not in page.source.replace("<style>", "", 1), "another would not be applied"


def test_charts_are_there_for_a_desk_and_for_a_phone_and_one_is_shown(shown):
    page = shown(made(THREE))
    kinds = [value for tag, name, value in page.attributes if tag == "svg" and name == "class"]
    assert kinds.count("wide") == kinds.count("narrow") == 2
    boxes = dict(re.findall(r'<svg class="(wide|narrow)" viewBox="0 0 (\d+) ', page.source))
    assert boxes == {"wide": "1024", "narrow": "360"}, "a unit is about a pixel on either, so letters have their size"
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    before, _, phone = style.partition("@media screen and (max-width:760px){")
    assert ".narrow{display:none!important}" in before
    assert ".wide{display:none!important}.narrow{display:block!important}" in phone
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page.source
    names = [
        text.split()[0] for data, _ in page.texts if (text := data.strip()).split()[:1] and text.split()[0] in THREE
    ]
    assert names.count("django") >= 4, "lines have their names beside them, in each chart"


def test_each_line_goes_through_its_values(shown):
    """Places in the chart are in proportion to the losses: read back from the path."""
    page = shown(made({"a": [4.0, 3.0, 1.0]}))
    path = next(v for t, n, v in page.attributes if t == "path" and n == "d" and v.count("L") == 2)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path[1:].split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15)
    assert (y2 - y1) / (y1 - y0) == pytest.approx(2.0, abs=0.01)


def test_the_same_history_gives_the_same_bytes_and_one_that_was_read_back_too(tmp_path):
    history = with_samples()
    history.about = ABOUT
    first = history.report(tmp_path / "a.html").read_bytes()
    time.sleep(0.01)
    assert history.report(tmp_path / "b.html").read_bytes() == first
    assert History.from_dict(history.to_dict()).report(tmp_path / "c.html").read_bytes() == first


def test_without_a_round_there_is_nothing_to_report_and_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no completed round.*Call fit"):
        History().report(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_what_is_known_beside_the_rounds_has_its_types_or_is_refused(tmp_path):
    history = made(THREE)
    history.about = {"model": {"name": 3}}
    with pytest.raises(ConfigError, match="model"):
        history.report(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_fifty_participants_and_two_hundred_rounds_stay_small_and_quick(tmp_path):
    losses = {f"hospital {n:02d}": [4.0 * 0.99**r + 0.01 * n for r in range(201)] for n in range(50)}
    history = made(losses)
    began = time.process_time()
    path = history.report(tmp_path / "a.html")
    assert time.process_time() - began < 2
    assert path.stat().st_size < 2_000_000
    page = Page(path)
    assert page.tags.count("title") == 1 + 4 * 50, "a thin line says its name where it is pointed at"
    assert page.within("verdict") == ["▼ better"] * 51


def test_a_chart_can_be_a_file_of_its_own(tmp_path):
    drawn = held_out_picture(made(THREE), 'two & <b> "one"')
    assert drawn == held_out_picture(made(THREE), 'two & <b> "one"')
    found = ElementTree.fromstring(drawn)  # well-formed, with its namespace
    texts = ["".join(each.itertext()) for each in found.iter("{http://www.w3.org/2000/svg}text")]
    assert 'two & <b> "one"' in texts
    assert {"django 2.000", "wagtail 2.995", "plone 2.400", "start"} <= set(texts)
    assert "--ink:" in drawn, "its colours come along"
    assert len(drawn) < 20_000
