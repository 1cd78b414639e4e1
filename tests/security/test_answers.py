"""Answers of strangers: held-out losses, samples, personal models, curves, timings; and text from elsewhere.

Belongs here: what a participant says after it has joined, beside its update. Does not: hellos (test_hellos).
"""

import json
import math
import warnings

import pytest
from bounded import bounded, within
from corpus import answers
from corpus.updates import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liars import Elsewhere, federation

from llmchain_fed import ConsoleTable, History, untrusted
from llmchain_fed.errors import ConfigError, ParticipantError
from llmchain_fed.federated.callbacks import metrics_of, notes_of, samples_of
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord, Sample
from llmchain_fed.federated.measures import reading
from llmchain_fed.federated.measures.pooling import capped, pooled
from llmchain_fed.federated.protocol.answers import CurveAnswer, PersonalizeAnswer, SideBySideAnswer
from llmchain_fed.federated.protocol.messages import read_answer
from llmchain_fed.federated.server import personalization
from llmchain_fed.updates.codecs import make_codec

SAMPLE = {"prompt": "x", "reference": "y", "answer": "z"}
METRIC = {"name": "f1", "values": {"f1": 0.5}, "error": "not all"}
EVALUATION = {
    "loss": 2.5, "tokens": 30, "examples": 3, "metrics": [METRIC], "measured": 3, "samples": [SAMPLE],
    "samples_error": "none",
}  # fmt: skip
CURVE = {"curve": [{"steps": 0, "loss": 2.5}, {"steps": 2, "loss": "nan"}]}
LOSSES = {"base": 4.0, "global": 2.0, "personal": "inf"}
TUNED = {"train_loss": 1.5, "steps": 3, "seconds": 0.5, "losses": LOSSES}
EVIL = "\x1b]0;owned\x07\x1b[2J\ud800\u202egnp\u2028$\\bad$ <b>"


def can_be_shown(found):
    """All text in plain data."""
    if isinstance(found, dict):
        return all(can_be_shown(k) and can_be_shown(v) for k, v in found.items())
    if isinstance(found, list):
        return all(map(can_be_shown, found))
    return not isinstance(found, str) or (untrusted.printable(found, 10**5) == found and len(found) < 61_000)


def evaluated(data, declared=None):
    with within(2):
        found = reading.read_evaluation(data, 2, declared, ["f1", "mine"])
    assert can_be_shown(found)
    if found.keys() != {"error"}:
        assert found["loss"] is None or 0 <= found["loss"] <= 1e4
        assert 1 <= found["tokens"] <= (declared or 10**9)
        assert len(found["samples"]) <= 2
        assert found["metrics"].keys() <= found["owners"].keys()
        assert found["missing"].keys() <= {"f1", "mine"}
        assert all(isinstance(n, float) and abs(n) <= 1e15 and "/" not in k for k, n in found["metrics"].items())
        assert found["measured"] >= 1
    return found


def asked(read, data):
    with within(2):
        try:
            return read(data)
        except ParticipantError as error:
            refused = str(error)
    assert len(refused) < 1000
    assert untrusted.printable(refused) == refused
    return None


def curve_of(data, steps):
    return personalization._curve(read_answer(CurveAnswer, data, "it"), steps, "p")


READERS = {
    "losses": (LOSSES, lambda data: read_answer(SideBySideAnswer, data, "it").by_kind()),
    "tuned": (TUNED, lambda data: read_answer(PersonalizeAnswer, data, "it")),
    "curve": (CURVE, lambda data: curve_of(data, [0, 2])),
    "point": (CURVE["curve"][0], lambda data: curve_of(b'{"curve":[' + data + b"]}", [0])),
}


def test_honest_answers_are_read():
    assert evaluated(json.dumps(EVALUATION).encode())["loss"] == 2.5
    assert evaluated(json.dumps(EVALUATION).encode(), 20)["tokens"] == 20, "no more than it declared when it joined"
    found = reading.read_evaluation(json.dumps(EVALUATION).encode(), 0, 30, ["f1", "mine"], 2)
    assert (found["metrics"], found["measured"]) == ({"f1": 0.5}, 2), "nor of examples"
    assert found["missing"] == {"f1": "not all", "mine": "it was not answered"}
    assert reading.read_evaluation(json.dumps(EVALUATION).encode(), 0).keys() == {
        "loss", "tokens", "samples", "samples_error",
    }, "what was not asked for is not read"  # fmt: skip
    assert READERS["losses"][1](json.dumps(LOSSES).encode()) == {
        "base": 4.0, "global": 2.0, "personal": math.inf,
    }  # fmt: skip
    assert asked(READERS["tuned"][1], json.dumps(TUNED).encode()).losses.by_kind()["personal"] == math.inf
    assert math.isnan(asked(READERS["curve"][1], json.dumps(CURVE).encode())[2])


@bounded(seconds=60, megabytes=400)
def test_any_answer_is_one_or_a_refusal():
    for data in answers.varied(EVALUATION).values():
        evaluated(data)
    for field in SAMPLE:
        for value in HOSTILE:
            evaluated(answers.said(EVALUATION, samples=[SAMPLE | {field: value}]))
    for field in METRIC:
        for value in HOSTILE:
            evaluated(answers.said(EVALUATION, metrics=[METRIC | {field: value}]))
            evaluated(answers.said(EVALUATION, metrics=[METRIC | {"values": {"f1": value}}, METRIC]))
    for key in (EVIL.replace("\ud800", ""), "a/b", "x" * 100, "../f1"):
        found = evaluated(answers.said(EVALUATION, metrics=[METRIC | {"values": {key: 1.0}}]))
        assert len(found["metrics"]) == 1
    for plain, read in READERS.values():
        for data in answers.varied(plain).values():
            asked(read, data)

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(["evaluation", *READERS]))
        plain, read = READERS.get(name, (EVALUATION, None))
        changes = data.draw(st.dictionaries(st.sampled_from([*plain, "more"]), st.sampled_from(HOSTILE), max_size=3))
        found = answers.said(plain, **changes)
        cut = data.draw(st.integers(0, len(found)))
        found = found[:cut] if data.draw(st.integers(0, 3)) == 0 else found
        asked(read, found) if read else evaluated(found)

    check()


# --- held-out losses that lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [-1.7e308, 1.7e308, -1.0, 1e999, 1e5])
def test_no_loss_out_of_range_reaches_the_pool_or_the_checkpoint(loss, make_chain, tmp_path):
    lies = {"evaluate": lambda honest: answers.said(json.loads(honest), loss=loss, tokens=10**9)}
    fed = federation(make_chain(lora=True), lies, held_out=True, runtime=Elsewhere, checkpoint_dir=tmp_path)
    alone = federation(make_chain(lora=True), without=("liar",), held_out=True, runtime=Elsewhere)
    history = fed.fit(2, patience=2)
    assert len(history) == 2
    alone.fit(1)
    assert history[0].held_out_before == alone.history[0].held_out_before
    assert history[0].participants["liar"].held_out_after is None
    assert any("liar" in note for note in notes_of(history[0]))


@pytest.mark.parametrize("says", [0.0, 1e4])
def test_no_liar_decides_when_to_stop(says, make_chain, tmp_path):
    """It declares 10⁹ held-out tokens, first says that all is well, and then that it gets worse and worse."""
    told = iter([0.0, *[says] * 20])

    def hello(honest):
        many = {"used": 10**9, "completion_tokens": 10**9}  # a lie that contradicts itself is no answer
        return answers.said(json.loads(honest), held_out_examples=10**9, held_out_tokens=10**9, held_out_report=many)

    lies = {
        "hello": hello,
        "evaluate": lambda honest: answers.said(json.loads(honest), loss=next(told), tokens=10**9),
    }
    fed = federation(make_chain(lora=True), lies, held_out=True, runtime=Elsewhere, checkpoint_dir=tmp_path)
    history = fed.fit(4, patience=1, on_divergence="stop")
    assert len(history) == 4, "the others' losses fall in every round"
    assert history.stopped_early is None
    assert not any("diverged" in note for record in history for note in record.notes)
    for record in history:
        honest = record.participants["a"].held_out_after
        assert record.held_out_after == pytest.approx((honest + says) / 2, rel=0.05), "it weighs one half at most"
    said = [any("counts one half" in note for note in record.participants["liar"].notes) for record in history]
    assert said == [True, False, False, False], "once, when it begins"


def test_no_liar_makes_a_federation_diverge_by_a_loss_that_is_not_finite(make_chain):
    lies = {"evaluate": lambda honest: answers.said(json.loads(honest), loss=None, not_finite="nan")}
    history = federation(make_chain(lora=True), lies, held_out=True, runtime=Elsewhere).fit(2, on_divergence="stop")
    assert len(history) == 2
    assert not any("diverged" in note for record in history for note in record.notes)
    assert any("not finite (nan)" in note for note in history[0].participants["liar"].notes)


@settings(max_examples=200, deadline=None, database=None)
@given(st.dictionaries(st.text(min_size=1, max_size=2), st.integers(1, 10**9), min_size=1, max_size=8))
def test_what_a_participant_weighs_in_the_pool(tokens):
    weights, cut = capped(tokens)
    total = sum(weights.values())
    for name, weight in weights.items():
        if len(tokens) >= 3:
            assert 2 * weight <= total, "at most one half"
        assert (name in cut) == (weight != tokens[name])
        assert weight <= tokens[name]
    if 2 * max(tokens.values()) <= sum(tokens.values()) or len(tokens) < 3:
        assert weights == tokens
    both = {name: {"loss": 2.0, "tokens": count} for name, count in tokens.items()}
    assert pooled(both, both) == (2.0, 2.0, cut)


# --- what is asked between rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b'{"curve": [{"steps": [1], "loss": 1}]}', b'{"base": -1}', b"\xff", b'{"a":' * 99999]
)
def test_what_is_asked_between_rounds_ends_in_one_error(answer, make_chain):
    fed = federation(
        make_chain(lora=True), {op: lambda _: answer for op in ("personalize", "curve", "side_by_side")}, held_out=True
    )
    before = fed.get_model().model.weights_hash
    for ask in (
        lambda: fed.adaptation_curve("liar", steps=(0, 1)),
        lambda: fed.personalize("liar", steps=1),
        lambda: fed.side_by_side(["liar"]),
    ):
        with within(20), pytest.raises(ParticipantError) as error:
            ask()
        assert len(str(error.value)) < 600
    assert fed.get_model().model.weights_hash == before


@pytest.mark.parametrize("said", [{"seconds": "x"}, {"steps": [1]}, {"seconds": -1.0}, {"steps": 10**30}, {"x": 1}])
def test_a_plan_passes_over_times_that_make_no_sense(said, make_chain):
    fed = federation(make_chain(lora=True), {"time_step": lambda honest: answers.said(json.loads(honest), **said)})
    fed._runtime._clients = {"liar": fed._runtime.local["liar"]}  # the one that is timed in this process
    assert fed.plan(2).seconds is None
    fed = federation(make_chain(lora=True), {"time_step": lambda _: b'{"seconds": 1e999, "steps": 1}'})
    fed._runtime._clients = {"liar": fed._runtime.local["liar"]}
    assert "inf" not in str(fed.plan(2))


# --- text from elsewhere ----------------------------------------------------------------------------------------------


def test_text_from_elsewhere_is_harmless_wherever_it_is_shown_or_saved(make_chain, tmp_path, capsys):
    def lie(honest):
        samples = [{"prompt": EVIL, "reference": EVIL * 2000, "answer": EVIL}]
        return answers.said(json.loads(honest), samples=samples, samples_error=EVIL * 1000)

    options = {"held_out": True, "samples": 1, "progress": True, "callbacks": [ConsoleTable()]}
    fed = federation(make_chain(lora=True), {"evaluate": lie}, checkpoint_dir=tmp_path / "kept", **options)
    history = fed.fit(2)
    history.save(tmp_path / "history.json")
    everything = capsys.readouterr()
    saved = (tmp_path / "history.json").read_text(encoding="utf-8")
    for text in (repr(history), history._repr_html_(), saved, everything.out):
        assert not set("\x1b\x07\u202e\u2028") & set(text)
        text.encode()
    assert can_be_shown(history.to_dict())
    assert History.from_dict(json.loads(saved)).to_dict() == json.loads(json.dumps(history.to_dict()))


def test_a_history_that_contains_such_text_already_can_be_shown_and_saved(tmp_path, capsys):
    record = ParticipantRecord("refused", EVIL, notes=[EVIL], train_loss=1.0, held_out_before=2.0, held_out_after=1.5)
    sample = Sample(EVIL, EVIL, EVIL, EVIL, EVIL)
    history = History([RoundRecord(1, {EVIL: record, "b": record}, samples=[sample], notes=[EVIL], held_out_after=1.0)])
    history.stopped_early = EVIL
    table = ConsoleTable()
    table.on_round_end(history[0], history)
    table.on_fit_end(history)
    history.save(tmp_path / "history.json")
    saved = (tmp_path / "history.json").read_text(encoding="utf-8")
    shown = [repr(history), history._repr_html_(), saved, str(history[0]), capsys.readouterr().out]
    shown += [*notes_of(history[0]), *samples_of(history[0]), *samples_of(history[0]).values(), *metrics_of(history[0])]
    for text in shown:
        assert not set("\x1b\x07\u202e\u2028\ud800") & set(text)
    assert json.loads(saved) == history.to_dict(), "nothing of it is lost"
    assert len(history.to_pandas()) == 2
    figure = history.plot()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some of these letters
        figure.savefig(tmp_path / "plot.png")


@pytest.mark.parametrize(
    "choice", ["int8:" + "9" * 10_000, "x" * 10_000, "topk:\x1b[2J", "int8:" + "9" * 30, "topk:inf"]
)
def test_a_codec_that_is_none_is_not_quoted_at_length(choice):
    with pytest.raises(ConfigError) as error:
        make_codec(choice)
    assert len(str(error.value)) < 500
    assert "\x1b" not in str(error.value)
