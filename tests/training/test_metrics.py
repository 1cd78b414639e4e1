"""Metrics: each name against its library or a published example, functions of one's own, and what is refused.

Belongs here: what is computed of texts. Does not: whose texts, and where (federated/measures).
"""

import math

import numpy as np
import pytest
import sacrebleu
import torch
from sklearn import metrics as sk

from llmchain_fed import ConfigError, Metric, MissingExtraError
from llmchain_fed.training import metrics
from llmchain_fed.training.metrics import BUILT_IN, checked_metrics, computed, rouge_l_f1

WANTED = ["yes", "no", "no", "yes", "no", "maybe"]
SAID = ["yes", "yes", "no", "no", "no", "yes"]
TEXTS = ["la page est vide", "ouvrir le fichier", "nom d’utilisateur"]
ANSWERS = ["la page est pleine", "ouvrir le fichier", ""]


def by_name(name, predictions, references, probabilities=None):
    values, wrong = computed(BUILT_IN[name], name, predictions, references, [{}] * len(references), probabilities)
    assert wrong is None
    assert values.keys() == {name}
    return values[name]


def test_names_are_what_scikit_learn_says_of_the_same_answers():
    assert by_name("accuracy", SAID, WANTED) == sk.accuracy_score(WANTED, SAID) == 0.5
    assert by_name("f1", SAID, WANTED) == sk.f1_score(WANTED, SAID, average="macro")
    # by hand: yes 2·1/(2·1+2+1) = 2/5, no 2·2/(2·2+1+1) = 2/3, maybe 0
    assert by_name("f1", SAID, WANTED) == pytest.approx((2 / 5 + 2 / 3 + 0) / 3)


def test_auc_is_scikit_learns_for_two_labels_and_for_more():
    chances = [0.9, 0.4, 0.1, 0.35]
    two = [{"no": 1 - p, "yes": p} for p in chances]
    wanted = ["yes", "no", "no", "yes"]
    assert by_name("auc", wanted, wanted, two) == sk.roc_auc_score([1, 0, 0, 1], chances) == 0.75
    swapped = [{"yes": p, "no": 1 - p} for p in chances]
    assert by_name("auc", wanted, wanted, swapped) == 0.75  # the order of labels is nothing to it
    rng = np.random.default_rng(0)
    table = rng.dirichlet([1, 1, 1], size=6)
    three = [dict(zip(["yes", "no", "maybe"], row.tolist(), strict=True)) for row in table]
    order = ["maybe", "no", "yes"]
    rows = [[p[label] for label in order] for p in three]
    assert by_name("auc", SAID, WANTED, three) == sk.roc_auc_score(WANTED, rows, multi_class="ovr", labels=order)


def test_auc_of_one_label_alone_is_said_to_be_none():
    with pytest.raises(ConfigError, match="no held-out example has the label 'no'"):
        by_name("auc", ["yes"], ["yes"], [{"yes": 0.9, "no": 0.1}])
    with pytest.raises(ConfigError, match="none of the labels"):
        by_name("auc", ["yes"] * 3, ["yes", "no", "perhaps"], [{"yes": 0.9, "no": 0.1}] * 3)


def test_chrf_is_sacrebleus():
    assert by_name("chrf", ANSWERS, TEXTS) == sacrebleu.corpus_chrf(ANSWERS, [TEXTS]).score
    assert by_name("chrf", TEXTS, TEXTS) == 100.0


def test_exact_match_looks_away_from_white_space_around_the_text_alone():
    assert by_name("exact_match", [" yes\n", "No", "a b"], ["yes", "no", "a  b"]) == 1 / 3


@pytest.mark.parametrize(
    ("answer", "score"),
    [  # Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", §3.1, with β = 1
        ("police kill the gunman", 3 / 4),
        ("the gunman kill police", 2 / 4),
        ("the gunman police killed", 2 / 4),
    ],
)
def test_rouge_l_gives_the_published_scores(answer, score):
    assert rouge_l_f1(answer, "police killed the gunman") == score


def test_rouge_l_is_the_harmonic_mean_of_precision_and_recall_over_examples():
    # one of two words right, of one of four wanted: P = 1/2, R = 1/4, F = 1/3
    assert by_name("rouge_l", ["un deux", "été Où"], ["un a b c", "ÉTÉ où"]) == pytest.approx((1 / 3 + 1) / 2)
    assert by_name("rouge_l", ["", ""], ["", "a"]) == 0.5


def test_what_a_function_is_given_and_what_becomes_of_what_it_returns():
    seen = []

    def own(predictions, references, inputs):
        seen.append((predictions, references, inputs))
        return {"half": 0.5, "numpy": np.float32(0.25), "torch": torch.tensor(2), "whole": 3}

    found = computed(own, "own", ("a",), ("b",), ({"text": "x"},))
    assert found == ({"half": 0.5, "numpy": 0.25, "torch": 2.0, "whole": 3.0}, None)
    assert seen == [(["a"], ["b"], [{"text": "x"}])]
    assert computed(lambda p, r, i: len(p), "count", ["a", "b"], ["a", "b"], [1, 2]) == ({"count": 2.0}, None)


@pytest.mark.parametrize("kind", ["by name", "by place", "keyword only", "not wanted"])
def test_probabilities_are_a_fourth_argument_of_those_who_take_one(kind):
    rows = [{"yes": 0.9, "no": 0.1}]
    functions = {
        "by name": lambda predictions, references, inputs, probabilities=None: probabilities[0]["yes"],
        "by place": lambda p, r, i, chances: chances[0]["yes"],
        "keyword only": lambda p, r, i, *, probabilities: probabilities[0]["yes"],
        "not wanted": lambda p, r, i, digits=1: digits,
    }
    values, _ = computed(functions[kind], "m", ["yes"], ["yes"], [{}], rows)
    assert values == {"m": 1.0 if kind == "not wanted" else 0.9}
    assert Metric(functions[kind]).wants_probabilities == (kind in ("by place", "keyword only"))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True, 1e16, 10**400, [0.5]])
def test_what_is_no_finite_number_is_said_and_the_others_stay(value):
    values, wrong = computed(lambda p, r, i: {"good": 1, "bad": value}, "m", ["a"], ["a"], [1])
    assert values == {"good": 1.0}
    assert wrong.startswith("'bad' is no finite number")


@pytest.mark.parametrize("found", [{}, {str(i): 1 for i in range(17)}, {"a/b": 1}, {"": 1}, {3: 1}, {"a\nb": 1}])
def test_names_of_values_are_few_and_can_be_shown(found):
    with pytest.raises(ConfigError):
        computed(lambda p, r, i: found, "m", ["a"], ["a"], [1])


def own(predictions, references, inputs):
    return {"own": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["acuracy"], "unknown metric 'acuracy'; did you mean 'accuracy'?"),
        ("accuracy", "metrics is a list"),
        ([own, own], "two metrics are called 'own'"),
        ([3], "a function or a name"),
        (["a/b"], "no slash"),
        ([{"name": "f1", "more": 1}], "in a file"),
        (5, "metrics is a list"),
    ],
)
def test_metrics_that_are_none_are_one_error(given, said):
    with pytest.raises(ConfigError, match=said):
        checked_metrics(given)


def test_metrics_have_names_and_directions():
    found = checked_metrics(["f1", own, Metric(own, maximize=False, name="cost"), Metric("chrf")])
    assert [(m.name, m.maximize) for m in found] == [("f1", True), ("own", None), ("cost", False), ("chrf", True)]
    (far,) = checked_metrics([{"name": "sens", "maximize": True}], elsewhere=True)
    assert (far.name, far.maximize, far.code) == ("sens", True, False)
    with pytest.raises(ConfigError, match="maximize"):
        Metric(own, maximize="yes")


def test_a_name_whose_library_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"\.\[metrics\]"):
        checked_metrics(["accuracy"])
    assert checked_metrics(["exact_match", "rouge_l"])
