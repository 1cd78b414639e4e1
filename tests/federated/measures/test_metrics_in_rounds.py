"""Metrics in a federation: what each participant measures, what is pooled, and what a record says of what is missing.

Belongs here: metrics of rounds in one process. Does not: the functions (training/test_metrics), what goes by them
(test_keeping_the_best), sites (runtimes/site/test_site_metrics).
"""

import json

import pytest
import sacrebleu
from langchain_core.runnables import RunnableLambda
from sklearn.metrics import roc_auc_score
from tiny import PAIRS

from llmchain_fed import (
    Callback,
    ConfigError,
    Example,
    FederatedAveraging,
    History,
    Metric,
    Participant,
    TrainingConfig,
)
from llmchain_fed.errors import DeadlineError, PolicyError
from llmchain_fed.federated.callbacks import metrics_of
from llmchain_fed.federated.client.evaluation import Answers, values_of
from llmchain_fed.federated.measures.pooling import pooled_metrics
from llmchain_fed.federated.target import Target
from llmchain_fed.training.metrics import BUILT_IN

LABELS = ["page", "erreur", "page vide"]
DATA = [(x, LABELS[at % 3]) for at, (x, _) in enumerate(PAIRS)]
HELD = {"a": DATA[:3], "b": DATA[3:10]}


def federation(chain, held_out=None, data=PAIRS, **options):
    held_out = held_out or {"a": PAIRS[:3], "b": PAIRS[3:10]}
    parts = [Participant(name, data[at::2], held_out=rows) for at, (name, rows) in enumerate(held_out.items())]
    how = {"lr": 2e-2, "batch_size": 3, "progress": False, "samples": 0} | options
    return FederatedAveraging(chain, participants=parts, **how)


def test_accuracy_of_two_participants_is_what_classify_says_by_hand(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, HELD, DATA, metrics=["accuracy"], labels=LABELS)
    before = {n: [chain.classify(x, LABELS).label == y for x, y in rows] for n, rows in HELD.items()}
    record = fed.fit(rounds=2)[-1]
    right = {n: [chain.classify(x, LABELS).label == y for x, y in rows] for n, rows in HELD.items()}
    assert {n: p.metrics for n, p in record.participants.items()} == {
        n: {"accuracy": sum(found) / len(found)} for n, found in right.items()
    }
    together = [each for found in right.values() for each in found]
    assert record.metrics["accuracy"] == pytest.approx(sum(together) / len(together), abs=1e-12)
    first = [each for found in before.values() for each in found]
    assert fed.history[0].metrics_before["accuracy"] == pytest.approx(sum(first) / len(first), abs=1e-12)


def test_probabilities_are_those_of_classify(make_chain):
    chain = make_chain(lora=True)
    seen = []

    def chances(predictions, references, inputs, probabilities):
        seen[:] = zip(inputs, references, predictions, probabilities, strict=True)
        return {"first": probabilities[0][LABELS[0]]}

    fed = federation(chain, {"a": DATA[:6]}, DATA, metrics=["auc", chances], labels=LABELS)
    record = fed.fit(rounds=1)[-1]
    wanted = chain.classify_batch([x for x, _ in DATA[:6]], LABELS)
    assert [(x, y, found.label) for (x, y), found in zip(DATA[:6], wanted, strict=True)] == [
        (inputs if isinstance(inputs, str) else inputs["text"], y, said) for inputs, y, said, _ in seen
    ]
    for (*_, found), each in zip(seen, wanted, strict=True):
        assert found == pytest.approx(each.probabilities, abs=1e-6)
    order = sorted(LABELS)
    rows = [[each.probabilities[label] for label in order] for each in wanted]
    assert record.metrics["auc"] == pytest.approx(
        roc_auc_score([y for _, y in DATA[:6]], rows, multi_class="ovr", labels=order), abs=1e-6
    )


def test_answers_are_the_chains_own_greedy_ones(make_chain):
    """A chain that samples is measured without chance, and as long as it answers."""
    chain = make_chain(lora=True, temperature=0.7, max_new_tokens=7)
    said = {}

    def own(predictions, references, inputs):
        said[len(inputs)] = (predictions, references)
        return {"own": 1.0}

    record = federation(chain, metrics=["chrf", own]).fit(rounds=1)[-1]
    for rows in (PAIRS[:3], PAIRS[3:10]):
        answers = chain.batch([{"text": x} for x, _ in rows], temperature=0.0)
        assert said[len(rows)] == (answers, [y for _, y in rows])
    small, large = (sacrebleu.corpus_chrf(p, [r]).score for p, r in (said[3], said[7]))
    assert record.metrics["chrf"] == pytest.approx((3 * small + 7 * large) / 10)
    assert record.participants["b"].metrics == {"chrf": large, "own": 1.0}


def test_answers_have_an_end_where_one_is_asked_for_and_samples_are_whole(make_chain):
    lengths = []

    def length(predictions, references, inputs):
        lengths.append([len(p) for p in predictions])
        return {"length": max(lengths[-1])}

    chain = make_chain(lora=True, max_new_tokens=40)
    samples = federation(chain, metrics=[length], samples=1).fit(rounds=1)[-1].samples
    whole = {each.participant: each.after for each in samples}
    assert whole["a"] == chain.invoke(PAIRS[0][0]) == "\n" * 40  # a model that never ends
    short = make_chain(lora=True, max_new_tokens=40)
    record = federation(short, metrics=[length], answer_tokens=2, samples=1).fit(rounds=1)[-1]
    assert max(lengths[-1]) == len(record.samples[0].after) == 2


def test_a_composed_chain_is_measured_by_what_the_whole_of_it_answers(make_chain):
    inner = make_chain(lora=True)
    chain = RunnableLambda(lambda text: {"text": text.upper()}) | inner | RunnableLambda(lambda text: text + "!")
    said = []

    def own(predictions, references, inputs):
        said[:] = [predictions, references, inputs]
        return {"own": 0.5}

    rows = [(x, y) for x, y in PAIRS[:2]]
    record = federation(chain, {"a": rows}, metrics=[own]).fit(rounds=1)[-1]
    assert said == [[chain.invoke(x) for x, _ in rows], [y for _, y in rows], [x for x, _ in rows]]
    assert record.metrics == {"own": 0.5}
    labelled = federation(chain, {"a": DATA[:3]}, DATA, metrics=["accuracy"], labels=LABELS).fit(rounds=1)[-1]
    right = [inner.classify(x.upper(), LABELS).label == y for x, y in DATA[:3]]
    assert labelled.metrics["accuracy"] == pytest.approx(sum(right) / 3)


def test_a_chain_that_fails_for_an_example_has_answered_nothing_there(make_chain):
    def picky(text):
        if text not in dict(PAIRS).values():  # it has run over what is to be learnt before
            raise ValueError("no such answer")
        return text

    said = []

    def own(predictions, references, inputs):
        said[:] = predictions
        return {"own": 1}

    inner = make_chain(lora=True)
    fed = federation(RunnableLambda(str) | inner | RunnableLambda(picky), {"a": PAIRS[:4]}, metrics=[own])
    fed.fit(rounds=1)
    assert said == [""] * 4


def test_a_metric_that_raises_or_is_no_number_at_one_participant_is_noted_there_and_the_others_go_on(make_chain):
    def picky(predictions, references, inputs):
        if len(inputs) == 3:
            raise ValueError("too few")
        return {"picky": 0.25}

    def half(predictions, references, inputs):
        return {"whole": 1.0, "half": float("nan") if len(inputs) == 3 else 0.5}

    history = federation(make_chain(), metrics=[picky, half]).fit(rounds=1)
    record = history[-1]
    assert record.metrics == {"picky": 0.25, "whole": 1.0, "half": 0.5}
    assert record.participants["a"].metrics == {"whole": 1.0}
    notes = record.participants["a"].notes
    assert "no picky: ValueError: too few" in notes
    assert "half: 'half' is no finite number (nan)" in notes
    assert not [note for note in record.participants["b"].notes if note.startswith("no ")]
    assert [p.status for p in record.participants.values()] == ["trained", "trained"]
    assert "too few" in repr(history)


def test_a_metric_that_changes_its_inputs_changes_no_later_measurement(make_chain):
    seen = []

    def changing(predictions, references, inputs):
        seen.append([dict(each) for each in inputs])
        for each in inputs:
            each["text"] += "!"
        inputs.clear()
        return {"changing": 1.0}

    rows = [{"text": x, "completion": y} for x, y in PAIRS]
    parts = [Participant("a", rows[:6], held_out=rows[6:])]
    fed = FederatedAveraging(make_chain(), participants=parts, lr=1e-2, metrics=[changing], progress=False)
    fed.fit(2)
    assert len(seen) == 3
    assert all(each == [{"text": x} for x, _ in PAIRS[6:]] for each in seen)


def test_wanted_texts_that_are_no_labels_are_counted(make_chain):
    held = {"a": [*DATA[:3], ("x", "Page")], "b": DATA[3:10]}
    record = federation(make_chain(), held, DATA, metrics=["accuracy"], labels=LABELS).fit(1)[-1]
    note = "accuracy: 1 of 4 held-out completions are none of the labels"
    assert (note in record.participants["a"].notes, note in record.participants["b"].notes) == (True, False)
    assert "accuracy" in record.participants["a"].metrics


def test_metrics_without_anything_to_measure_on_are_refused(make_chain):
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, metrics=["exact_match"], progress=False)
    with pytest.raises(ConfigError, match=r"evaluation=0\.2"):
        fed.fit(1)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([Metric("exact_match", name="em")], "keeps its name"),
        (["exact_match", "exact_match"], "List it once"),
    ],
)
def test_a_built_in_metric_has_one_name(make_chain, metrics, said):
    with pytest.raises(ConfigError, match=said):
        federation(make_chain(), metrics=metrics)


@pytest.mark.parametrize("name", ["held_out_loss", "collapsed"])
def test_what_is_measured_anyway_is_no_metrics_name(name):
    with pytest.raises(ConfigError, match="measured anyway"):
        Metric(len, name=name)


def test_two_metrics_with_one_value_of_a_name_are_said(make_chain):
    def one(predictions, references, inputs):
        return {"same": 1}

    def two(predictions, references, inputs):
        return {"same": 2}

    record = federation(make_chain(), {"a": PAIRS[:2]}, metrics=[one, two]).fit(rounds=1)[-1]
    assert record.metrics == {"same": 1.0}
    assert "no two: 'same' is another metric's, too" in record.participants["a"].notes


def test_metrics_of_one_set_for_all_are_those_of_that_set(make_chain):
    chain = make_chain(lora=True)
    options = {"lr": 2e-2, "progress": False, "metrics": ["accuracy"], "labels": LABELS}
    shared = (row for row in DATA[:4])  # a generator: it is read once
    fed = FederatedAveraging(chain, participants={"a": DATA[4:8], "b": DATA[8:]}, evaluation=shared, **options)
    record = fed.fit(rounds=1)[-1]
    right = [chain.classify(x, LABELS).label == y for x, y in DATA[:4]]
    assert record.metrics == {"accuracy": sum(right) / 4}
    assert all(p.metrics == {} for p in record.participants.values())


def test_labels_are_those_of_training_where_none_are_given(make_chain):
    how = TrainingConfig(loss="labels", labels=LABELS, learning_rate=1e-2, batch_size=3)
    chain = make_chain(lora=True)
    fed = federation(chain, HELD, DATA, metrics=["accuracy"], training=how, lr=None, batch_size=None)
    record = fed.fit(rounds=1)[-1]
    right = [chain.classify(x, LABELS).label == y for rows in HELD.values() for x, y in rows]
    assert record.metrics["accuracy"] == pytest.approx(sum(right) / 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": ["auc"]}, "Pass labels="),
        ({"metrics": [lambda p, r, i, probabilities: 1]}, "Pass labels="),
        ({"labels": ["one"]}, "label"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"metrics": "accuracy"}, "a list"),
    ],
)
def test_what_is_asked_wrongly_is_one_error_before_anything_is_made(make_chain, options, said):
    chain = make_chain()
    before = chain.model.weights_hash
    with pytest.raises(Exception, match=said) as caught:
        federation(chain, **options)
    assert isinstance(caught.value, (ConfigError, ValueError)) or "Label" in type(caught.value).__name__
    assert chain.model.weights_hash == before


def test_pooled_values_are_weighted_by_examples_and_elsewhere_nobody_weighs_more_than_half():
    found = {
        "a": {"metrics": {"m": 1.0}, "measured": 1},
        "b": {"metrics": {"m": 0.0}, "measured": 3},
        "c": {"metrics": {"m": 1.0, "n": 5.0}, "measured": 96},
        "d": {"error": "away"},
    }
    assert pooled_metrics(found, trusted=True) == {"m": 0.97, "n": 5.0}
    assert pooled_metrics(found, trusted=False) == {"m": 5 / 8, "n": 5.0}


def test_metrics_are_in_table_json_frame_plot_and_what_trackers_get(make_chain):
    history = federation(make_chain(lora=True), HELD, DATA, metrics=["accuracy"], labels=LABELS).fit(rounds=2)
    record = history[-1]
    value = record.metrics["accuracy"]
    assert f"accuracy {value:.3f}" in repr(history)
    assert f"<td>accuracy {value:.3f}</td>" in history._repr_html_()
    assert f"metrics accuracy {value:.3f}" in record.line()
    again = History.from_dict(json.loads(history.to_json()))
    assert again[-1].metrics == record.metrics
    assert again[-1].participants["b"].metrics_before == record.participants["b"].metrics_before != {}
    frame = history.to_pandas()
    row = frame[(frame["round"] == 2) & (frame["participant"] == "b")].iloc[0]
    assert row["metric_accuracy"] == record.participants["b"].metrics["accuracy"]
    assert row["metric_accuracy_before"] == record.participants["b"].metrics_before["accuracy"]
    flat = metrics_of(record)
    assert flat["metrics/accuracy"] == value
    assert flat["participant/b/metric_accuracy"] == row["metric_accuracy"]
    axes = history.plot().axes[2]
    assert axes.get_title() == "accuracy"
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["pooled"] == [history[0].metrics_before["accuracy"], *(r.metrics["accuracy"] for r in history)]
    assert set(lines) == {"a", "b", "pooled"}


def test_without_metrics_a_table_has_no_column_of_them(make_chain):
    history = federation(make_chain()).fit(rounds=1)
    assert "metrics" not in repr(history)
    assert len(history.plot().axes) == 2


def test_held_out_tensors_have_no_texts_to_measure(make_chain):
    from torch.utils.data import DataLoader

    from llmchain_fed.data.encoding import collate, encode_examples

    chain = make_chain()
    rows = encode_examples(PAIRS[:4], chain.model, chain)
    loader = DataLoader([rows[i] for i in range(4)], batch_size=2, collate_fn=lambda some: collate(some, chain.model))
    record = federation(chain, {"a": loader}, metrics=["chrf"]).fit(rounds=1)[-1]
    assert record.held_out_after is not None
    assert record.metrics == {}
    assert any("DataLoader" in note for note in record.participants["a"].notes)


def test_metrics_and_their_options_go_on_from_a_checkpoint(make_chain, tmp_path):
    def own(predictions, references, inputs):
        return {"own": 1.0}

    options = {"metrics": ["exact_match", Metric(own, maximize=True)], "answer_tokens": 5}
    fed = federation(make_chain(), **options, checkpoint_dir=tmp_path)
    fed.fit(rounds=1)
    assert fed.config.metrics == ["exact_match", "code: own (give it again on resume)"]
    parts = [Participant("a", PAIRS[::2], held_out=PAIRS[:3]), Participant("b", PAIRS[1::2], held_out=PAIRS[3:10])]
    with pytest.raises(Exception, match=r"metrics were code: own\. Pass metrics= again"):
        FederatedAveraging.resume(tmp_path, make_chain(), participants=parts, progress=False)
    went_on = FederatedAveraging.resume(
        tmp_path, make_chain(), participants=parts, progress=False, metrics=options["metrics"]
    )
    assert went_on.config.answer_tokens == 5
    assert went_on.fit(rounds=1)[-1].metrics.keys() == {"exact_match", "own"}


@pytest.mark.parametrize("how", ["answers", "labels"])
def test_what_takes_too_long_is_no_value_and_what_nobody_waits_for_ends(make_chain, how):
    chain = make_chain()
    examples = [Example(*pair) for pair in DATA[:3]]
    labels = LABELS if how == "labels" else None

    def measured(error):
        def check():
            raise error

        answers = Answers(Target.of(chain), None, check)
        return values_of({"f1": BUILT_IN["f1"], "far": "not here"}, answers, examples, chain, labels, repr)

    found = {each.name: each.error for each in measured(PolicyError("max_seconds"))}
    assert found == {"f1": "PolicyError('max_seconds')", "far": "not here"}
    with pytest.raises(DeadlineError):
        measured(DeadlineError("nobody waits"))


def test_a_callback_may_add_to_a_records_metrics_and_json_has_it(make_chain):
    class Adds(Callback):
        def on_round_end(self, record, history):
            record.metrics |= {"mine": 0.5, "nothing": float("nan")}

    history = federation(make_chain(), callbacks=[Adds()]).fit(rounds=1)
    again = History.from_dict(json.loads(history.to_json()))
    assert again[-1].metrics == {"mine": 0.5}  # NaN was not measured
    assert "mine 0.500" in repr(again)
    assert repr(history[-1]).startswith("RoundRecord(round 1 · 2 of 2 trained · train loss ")
