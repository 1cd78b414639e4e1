"""Metrics across organisations: names travel, numbers come back, a site's own functions and its policy decide.

Belongs here: metrics at a site. Does not: the functions (training/test_metrics), rounds in one process
(federated/measures), what any message may not be (security).
"""

import json
import threading

import pytest
from sites import SocketTransport, answering
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, Metric, Participant, Policy, Site, TrainingConfig
from llmchain_fed.federated.client.evaluation import ABSENT
from llmchain_fed.runtimes.site.policy import explain

LABELS = ["page", "erreur"]
DATA = [(x, LABELS[at % 2]) for at, (x, _) in enumerate(PAIRS)]
TRAINING = TrainingConfig(learning_rate=2e-2, batch_size=3)
PARTS = {"a": Participant("a", DATA[:4], held_out=DATA[8:]), "b": Participant("b", DATA[4:8], held_out=DATA[8:10])}


def sens(predictions, references, inputs):
    ill = [p for p, r in zip(predictions, references, strict=True) if r == "page"]
    return {"sens": ill.count("page") / len(ill)}


@pytest.fixture
def far(make_chain, tmp_path):
    def made(a=None, b=None, **options):
        paths = {}
        for name, more in (("a", a), ("b", b)):
            site = Site(make_chain(lora=True), PARTS[name], **(more or {}))
            path = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}.sock"
            threading.Thread(target=site.serve, args=(path,), daemon=True).start()
            paths[name] = answering(path)
        chain = make_chain(lora=True)
        options = {"training": TRAINING, "progress": False} | options
        return chain, FederatedAveraging(chain, runtime=SocketTransport(paths), **options)

    return made


def test_numbers_of_sites_are_those_of_participants_here(far, make_chain):
    own = {"metrics": {"sens": sens}, "policy": Policy(metrics=["accuracy", "sens"])}
    chain, fed = far(own, own, metrics=["accuracy", Metric("sens", maximize=True)], labels=LABELS)
    here = FederatedAveraging(
        make_chain(lora=True), participants=list(PARTS.values()), training=TRAINING, progress=False, labels=LABELS,
        metrics=["accuracy", Metric(sens, maximize=True)],
    )  # fmt: skip
    for found, wanted in zip(fed.fit(2, monitor="sens", keep="best"), here.fit(2, monitor="sens"), strict=True):
        assert found.metrics.keys() == {"accuracy", "sens"}
        assert {n: p.metrics for n, p in found.participants.items()} == {
            n: p.metrics for n, p in wanted.participants.items()
        }
        assert found.metrics == pytest.approx(wanted.metrics)
    assert fed.best.round == here.history.best
    right = [chain.classify(x, LABELS).label == y for x, y in DATA[8:]]
    assert fed.best.participants["a"].metrics["accuracy"] == sum(right) / len(right)
    assert fed.config.metrics == ["accuracy", {"name": "sens", "maximize": True}]


def test_a_name_that_a_site_lacks_is_absent_there_and_the_policy_says_what_leaves(far):
    a = {"metrics": {"sens": sens}, "policy": Policy(metrics=["sens"])}
    b = {"metrics": {"other": sens}}
    _, fed = far(a, b, metrics=["accuracy", "sens"], labels=LABELS)
    record = fed.fit(1)[-1]
    assert record.participants["a"].metrics.keys() == {"sens"}
    assert record.participants["b"].metrics.keys() == {"accuracy"}
    assert "no accuracy: the site's policy does not let it leave" in record.participants["a"].notes
    assert "no sens: the site's policy does not let it leave" in record.participants["b"].notes
    assert record.metrics == record.participants["a"].metrics | record.participants["b"].metrics


def test_a_name_that_is_allowed_and_unknown_is_absent(far):
    _, fed = far({"policy": Policy(metrics=["sens"])}, {"policy": Policy(metrics=["sens"])}, metrics=["sens"])
    record = fed.fit(1)[-1]
    assert record.metrics == {}
    assert all(f"no sens: {ABSENT}" in p.notes for p in record.participants.values())
    with pytest.raises(ConfigError, match=f"(?s)no participant computes it.*sens: {ABSENT}"):
        fed.fit(1, monitor="sens")
    assert fed.round == 1


def test_of_an_error_at_a_site_its_type_leaves_and_no_text(far):
    def tells(predictions, references, inputs):
        raise ValueError(f"the patient is {inputs[0]}")

    own = {"metrics": {"tells": tells}, "policy": Policy(metrics=["tells"], error_messages=False)}
    _, fed = far(own, own, metrics=["tells"])
    record = fed.fit(1)[-1]
    assert all("no tells: ValueError" in p.notes for p in record.participants.values())
    assert "patient is" not in fed.history.to_json()


def test_no_text_leaves_as_what_is_no_number_or_as_what_a_value_is_called(far):
    """Values of names that the policy does not list stay, and what is returned instead of a number is not quoted."""

    def worst(predictions, references, inputs):
        return {"worst": references[0], "share": 0.5} | {f"recall of {text}": 1.0 for text in inputs}

    def named(predictions, references, inputs):
        return {f"{inputs[0]}/\n": 1.0}

    texts = [text for example in PARTS["a"].held_out for text in example]
    policy = Policy(metrics=["worst", "share", "named"])
    own = {"metrics": {"worst": worst, "named": named}, "policy": policy}
    _, fed = far(own, own, metrics=["worst", "named"])
    record = fed.fit(1)[-1]
    found = record.participants["a"]
    assert found.metrics == {"share": 0.5}
    said = "worst: a value is no finite number; values that the site's policy does not list stay here"
    assert said in found.notes
    assert any("no named: ConfigError" in note for note in found.notes)
    said = json.dumps(json.loads(fed.history.to_json()), ensure_ascii=False)
    assert not [text for text in texts if text in said and text not in LABELS]
    assert not [label for label in LABELS if label in said]


def test_a_hub_does_not_learn_by_labels_which_texts_are_held_out(far):
    """Labels are of its choice: how many wanted texts are none of them would say which ones there are."""
    none = {"policy": Policy(metrics=[])}
    notes = []
    for labels in (["page", "guess"], ["another", "guess"]):
        _, fed = far(none, none, metrics=["accuracy"], labels=labels)
        notes.append([p.notes for p in fed.fit(1)[-1].participants.values()])
    assert notes[0] == notes[1]
    assert "none of the labels" not in f"{notes}"


@pytest.mark.parametrize("told", [True, False])
def test_which_label_all_are_taken_for_leaves_where_the_policy_lists_it(far, told):
    policy = {"policy": Policy(metrics=["collapsed"] if told else [])}
    how = TrainingConfig(loss="labels", labels=["page", "no"], learning_rate=1e-2, epochs=10)
    skewed = {
        name: Participant(name, [(x, "page") for x, _ in PAIRS], held_out=[("a", "page"), ("b", "no")]) for name in "ab"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARTS, "a", skewed["a"])
        patch.setitem(PARTS, "b", skewed["b"])
        _, fed = far(policy, policy, training=how)
        record = fed.fit(1)[-1]
    assert any("taken for the label" in note for p in record.participants.values() for note in p.notes) == told


def test_no_code_travels_and_a_direction_must_be_said(far, make_chain):
    with pytest.raises(ConfigError, match="no code travels"):
        far(metrics=[sens])
    own = {"metrics": {"sens": sens}, "policy": Policy(metrics=["sens"])}
    _, fed = far(own, own, metrics=["sens"], labels=LABELS)
    with pytest.raises(ConfigError, match=r"which way is better.*Metric"):
        fed.fit(1, monitor="sens", keep="best")


@pytest.mark.parametrize("metrics", [{"a/b": sens}, {"": sens}, {"sens": 3}])
def test_what_a_site_registers_is_functions_with_names(make_chain, metrics):
    with pytest.raises(ConfigError, match="metric"):
        Site(make_chain(), PARTS["a"], metrics=metrics)


def test_a_policy_says_which_metrics_leave(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("metrics: [accuracy, sens]\n")
    policy = Policy.from_file(file)
    assert policy.metrics == ("accuracy", "sens")
    (line,) = [line for line in explain(policy) if line.startswith("metrics:")]
    assert line == "metrics: of its held-out examples the values of accuracy and sens may leave, as numbers over all."
    assert Policy().metrics == ("accuracy", "f1", "auc", "exact_match", "chrf", "rouge_l", "collapsed")
    assert "collapsed is which label all are taken for" in "".join(explain(Policy()))
    (none,) = [line for line in explain(Policy(metrics=[])) if line.startswith("metrics:")]
    assert "no metric" in none
