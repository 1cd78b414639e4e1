"""fed.compare: every arm is what a user would have trained by hand, and nothing of it stays.

Belongs here: arms, learning rates, what is kept in `out=`, the table. Does not: the interval's draws (test_bootstrap),
rows (test_rows), or how a federation goes back to its start for good (test_reset).
"""

import copy
import functools
import json
import random

import numpy as np
import pytest
import torch
from tiny import PAIRS

from llmchain_fed import (
    Arm,
    ConfigError,
    Ditto,
    FedAdam,
    FederatedAveraging,
    FederationError,
    Metric,
    NonFiniteLossError,
    Participant,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)
from llmchain_fed.federated.comparison import rows, trials
from llmchain_fed.federated.comparison.code_digest import code_digest
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.training.batch_sampler import length_buckets

TRAIN = {"a": PAIRS[:4], "b": PAIRS[6:9]}
HELD_OUT = {"a": PAIRS[4:6], "b": PAIRS[9:]}
HOW = TrainingConfig(learning_rate=5e-3, batch_size=2)
ONE = {"grid": [5e-3], "seeds": 1, "rounds": 1}


def federation(chain, participants=TRAIN, **options):
    options = {"training": HOW, "evaluation": HELD_OUT, "progress": False, "samples": 0} | options
    return FederatedAveraging(chain, participants=participants, **options)


@pytest.fixture
def measured(monkeypatch):
    """The weights under which values were taken, in order."""
    found = []

    def spy(clients, validation=None, evaluator=None):
        model = next(iter(clients.values())).model
        found.append(model.trainable_state())
        return values_of(clients, validation, evaluator)

    values_of = trials.values_of
    monkeypatch.setattr(trials, "values_of", spy)
    return found


@pytest.fixture
def run(monkeypatch):
    """The trials that were really run."""
    found, original = [], trials.Bench.run

    def spy(bench, trial):
        found.append(trial)
        return original(bench, trial)

    monkeypatch.setattr(trials.Bench, "run", spy)
    return found


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(got[n], wanted[n])] == []


def losses_of(comparison, arm, seed=0, model=""):
    return {name: values["loss"] for name, values in comparison.arms[arm].values[seed][model].items()}


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"aggregation": "fedit", "codec": "int8"}, {"aggregation": "fedex"}])
def test_the_federated_arm_is_a_plain_fit_with_that_seed_and_learning_rate(make_chain, measured, options):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    fed = federation(chain, **options)
    found = fed.compare(["federated"], seeds=[3], rounds=2, grid=[2e-3])
    plain = federation(twin, training=HOW.replace(learning_rate=2e-3), seed=3, **options)
    record = plain.fit(2)[-1]
    assert_equal(measured[0], twin.model.trainable_state())
    assert losses_of(found, "federated", 3) == {n: p.held_out_after for n, p in record.participants.items()}
    assert found.rows[0].pooled == pytest.approx(record.held_out_after, abs=1e-9)


def test_alone_is_a_federation_of_one(make_chain, measured):
    chain = make_chain(lora=True)
    found = federation(chain).compare(["alone"], seeds=1, rounds=2, grid=[5e-3])
    for number, name in enumerate(TRAIN):
        twin = make_chain(lora=True)
        federation(twin, {name: TRAIN[name]}, evaluation={name: HELD_OUT[name]}).fit(2)
        assert_equal(measured[number], twin.model.trainable_state())
        for other, texts in HELD_OUT.items():  # own texts, and those of all
            wanted = evaluate_locally(twin.model, texts, prompt=twin).loss
            assert losses_of(found, "alone", model=name)[other] == pytest.approx(wanted, abs=1e-9)


def test_centralised_is_plain_fine_tuning_on_everybodys_examples_at_both_batch_sizes(make_chain, measured):
    chain = make_chain(lora=True)
    found = federation(chain).compare(["centralised"], **ONE)
    assert list(found.arms) == ["centralised, batch 2", "centralised, batch 4"]
    for state, size in zip(measured, (2, 4), strict=True):
        twin = make_chain(lora=True)
        config = HOW.replace(batch_size=size, seed=0, micro_batch_size=2)
        train_locally(twin.model, TRAIN["a"] + TRAIN["b"], config, prompt=twin, participant="centralised")
        assert_equal(state, twin.model.trainable_state())


def test_personal_trains_on_from_the_federated_weights_in_the_last_round(make_chain, measured):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    federation(chain).compare(["personal"], seeds=1, rounds=2, grid=[5e-3])
    federation(twin).fit(1)
    federated = twin.model.trainable_state()
    for state, (name, pairs) in zip(measured, TRAIN.items(), strict=True):
        twin.model.load_state(federated)
        train_locally(twin.model, pairs, HOW.replace(seed=0), prompt=twin, participant=name, round=1)
        assert_equal(state, twin.model.trainable_state())


def test_under_a_rule_of_private_parts_each_participant_is_measured_with_its_own(make_chain):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    found = federation(chain, aggregation="fedsa").compare(["federated"], **ONE)
    record = federation(twin, aggregation="fedsa").fit(1)[-1]
    own = {name: losses_of(found, "federated", model=name)[name] for name in TRAIN}
    assert own == {n: p.held_out_after for n, p in record.participants.items()}


@pytest.mark.parametrize(
    "options", [{"aggregation": "flora"}, {"personal": Ditto()}, {"server_optimizer": FedAdam(lr=0.01)}]
)
def test_a_federation_with_options_of_its_own_is_compared_with_them(make_chain, options):
    """Own ranks, personal models, a server's memory: the federated arm is that federation, whatever it did before."""
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    ranks = options.get("aggregation") == "flora"
    people = [Participant(n, pairs, rank=2 if ranks and n == "b" else None) for n, pairs in TRAIN.items()]
    fed = federation(chain, people, **options)
    fed.fit(1)
    found = fed.compare(["alone", "federated", "personal"], seeds=1, rounds=2, grid=[5e-3])
    record = federation(twin, people, **options).fit(2)[-1]
    assert losses_of(found, "federated") == {n: p.held_out_after for n, p in record.participants.items()}


def test_over_labels_losses_are_per_example_and_the_model_may_be_seq2seq(make_chain):
    labels = ("oui", "non")
    pairs = [(text, labels[i % 2]) for i, (text, _) in enumerate(PAIRS)]
    how = HOW.replace(loss="labels", labels=labels, class_weight="balanced")
    held_out = {"a": pairs[4:6], "b": pairs[9:]}
    chain, twin = make_chain("seq2seq", lora=True), make_chain("seq2seq", lora=True)
    shares = {"a": pairs[:4], "b": pairs[6:9]}
    fed = federation(chain, shares, training=how, evaluation=held_out)
    found = fed.compare(["federated", "centralised", "alone"], **ONE)
    record = federation(twin, shares, training=how, evaluation=held_out).fit(1)[-1]
    assert losses_of(found, "federated") == {n: p.held_out_after for n, p in record.participants.items()}
    assert found.rows[0].pooled == pytest.approx(record.held_out_after, abs=1e-9)
    assert "nats per example" in repr(found)


def test_the_base_is_the_federations_start_however_many_rounds_it_has_run(make_chain):
    chain, twin = make_chain(), make_chain()
    fed = federation(chain)
    fed.fit(1)
    found = fed.compare(["base"], seeds=2)
    everything = HELD_OUT["a"] + HELD_OUT["b"]
    assert found.rows[0].pooled == pytest.approx(evaluate_locally(twin.model, everything, prompt=twin).loss, abs=1e-6)
    assert (found.rows[0].examples_seen, found.rows[0].pooled_sd, found.rows[0].learning_rate) == (0, None, {})


@pytest.mark.parametrize("training", [{}, {"epochs": 2}, {"max_steps": 2}])
def test_all_arms_see_equally_many_examples(make_chain, monkeypatch, training):
    seen = {}
    monkeypatch.setattr(trials.Bench, "seconds_of_training", lambda _: None)  # the plan's timed steps are no arm's

    def counting(examples, config, place):
        for batch in length_buckets(examples, config, place):
            seen[place.participant] = seen.get(place.participant, 0) + len(batch)
            yield batch

    shares = {"a": PAIRS[:4], "b": PAIRS[5:9]}
    how = HOW.replace(**training)
    fed = federation(make_chain(lora=True), shares, batch_sampler=counting, training=how)
    wanted = {"a": 8 * (how.epochs or 1), "b": 8 * (how.epochs or 1)}
    for arm in ("alone", "federated", "personal", "centralised"):
        seen.clear()
        found = fed.compare([arm], seeds=1, rounds=2, grid=[5e-3])
        told = [row.examples_seen for row in found.rows]
        if arm == "centralised":
            assert (seen["centralised"], told) == (2 * sum(wanted.values()), 2 * [sum(wanted.values())])
        else:
            assert seen == wanted
            assert told == [sum(wanted.values())]


# --- learning rates --------------------------------------------------------------------------------------------------


def test_each_arm_has_the_rate_that_is_best_on_the_validation_part(make_chain):
    chain = make_chain(lora=True)
    found = federation(chain).compare(["federated", "alone"], seeds=1, rounds=1, grid=[1e-4, 3e-2], validation=0.3)
    sides = {}
    for name, client in federation(make_chain(lora=True))._peers.items():
        sides[name] = rows.divided(client.data.train(), 0.3)

    def loss(names, rate, over):
        twin = make_chain(lora=True)
        people = {name: sides[name][0] for name in names}
        federation(twin, people, evaluation=None, training=HOW.replace(learning_rate=rate)).fit(1)
        whole = rows.pooled([sides[name][1] for name in over])
        return evaluate_locally(twin.model, whole, prompt=twin).loss

    best = min([1e-4, 3e-2], key=lambda rate: loss("ab", rate, "ab"))
    assert found.arms["federated"].learning_rate == {"": best}
    own = {name: min([1e-4, 3e-2], key=lambda rate, n=name: loss(n, rate, n)) for name in "ab"}
    assert found.arms["alone"].learning_rate == own


def test_the_validation_part_is_no_held_out_text_and_held_out_texts_choose_nothing(make_chain, monkeypatch):
    asked = []

    def spy(clients, validation=None, evaluator=None):
        asked.append(validation)
        return {n: {"loss": 1.0} for n in clients} if validation is None else values_of(clients, validation)

    values_of = trials.values_of
    monkeypatch.setattr(trials, "values_of", spy)
    chain = make_chain(lora=True)
    fed = federation(chain)
    fed.compare(["federated"], seeds=2, rounds=1, grid=[1e-3, 1e-2])
    held_out = {tuple(d[i][0]) for d in (c.data.held_out() for c in fed._peers.values()) for i in range(len(d))}
    assert [part is None for part in asked] == [False, False, True, True]
    assert not {tuple(d[i][0]) for part in asked[:2] for d in part.values() for i in range(len(d))} & held_out


def test_a_rate_that_diverges_is_not_chosen_and_one_that_always_does_is_said(make_chain):
    sgd = TrainingConfig(optimizer="sgd", learning_rate=0.1, batch_size=2)
    fed = federation(make_chain(), training=sgd)
    found = fed.compare(["federated"], seeds=1, rounds=2, grid=[0.1, 1e30])
    assert found.arms["federated"].learning_rate == {"": 0.1}
    assert any("smallest" in note for note in found.notes)
    before = fed.get_model().model.trainable_state()
    with pytest.raises(NonFiniteLossError, match="diverged"):
        fed.compare(["federated"], seeds=1, rounds=2, grid=[1e30])
    assert_equal(fed.get_model().model.trainable_state(), before)


# --- nothing stays ---------------------------------------------------------------------------------------------------


def test_after_a_comparison_the_federation_goes_on_as_if_none_had_been(make_chain):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    how = HOW.replace(keep_optimizer=True)
    fed, other = (federation(c, training=how, aggregation="fedex") for c in (chain, twin))
    fed.fit(1), other.fit(1)
    fed.personalize("a", steps=1), other.personalize("a", steps=1)
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    history = fed.history.to_json()

    def noisy(train, held_out, seed):
        torch.manual_seed(9), random.seed(9), np.random.seed(9)
        return {name: {"accuracy": 0.5} for name in held_out}

    fed.compare(["federated", "personal", Arm("noisy", noisy)], **ONE)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == rng[1:]
    assert (fed.history.to_json(), fed.round, chain.adapters) == (history, 1, ["global", "a"])
    assert chain.model.weights_hash == twin.model.weights_hash
    fed.fit(1), other.fit(1)
    assert_equal(chain.model.trainable_state(), twin.model.trainable_state())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_comparison_leaves_all_as_it_was(make_chain, error):
    steps = []

    def failing(examples, config, place):
        for batch in length_buckets(examples, config, place):
            steps.append(place)
            if len(steps) > 9:
                raise error
            yield batch

    chain = make_chain(lora=True)
    fed = federation(chain, batch_sampler=failing)
    before = chain.model.trainable_state()
    with pytest.raises((error, FederationError)):
        fed.compare(["federated", "alone"], seeds=3, rounds=1, grid=[5e-3])
    assert_equal(chain.model.trainable_state(), before)
    assert (fed.round, len(fed.history)) == (0, 0)


def test_what_was_killed_goes_on_and_gives_the_same_table(make_chain, tmp_path, run):
    calls = []

    def baseline(train, held_out, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {name: {"loss": 6.0 + seed} for name in held_out}

    arms = ["base", "federated", Arm("cheap", baseline)]
    fed = federation(make_chain(lora=True))
    with pytest.raises(KeyboardInterrupt):
        fed.compare(arms, seeds=2, rounds=1, grid=[2e-3, 5e-3], out=tmp_path / "out")
    first = list(run)
    found = fed.compare(arms, seeds=2, rounds=1, grid=[2e-3, 5e-3], out=tmp_path / "out")
    assert not set(run[len(first) :]) & set(first)
    assert calls == [0, 1, 1]
    whole = federation(make_chain(lora=True)).compare(arms, seeds=2, rounds=1, grid=[2e-3, 5e-3])
    assert {n: a.values for n, a in found.arms.items()} == {n: a.values for n, a in whole.arms.items()}
    assert [(r.arm, r.own, r.pooled_sd) for r in found.rows] == [(r.arm, r.own, r.pooled_sd) for r in whole.rows]
    done = len(run)
    more = fed.compare(arms, seeds=3, rounds=1, grid=[2e-3, 5e-3], out=tmp_path / "out")  # a seed more, and that alone
    assert {t.seed for t in run[done:]} == {2}
    assert more.seeds == (0, 1, 2)


def test_a_folder_of_another_comparison_is_refused(make_chain, tmp_path):
    fed = federation(make_chain(lora=True))
    fed.compare(["base"], out=tmp_path, rounds=1)
    with pytest.raises(ConfigError, match=r"another comparison \(another rounds\).*another folder"):
        fed.compare(["base"], out=tmp_path, rounds=2)
    others = federation(make_chain(lora=True), {"a": TRAIN["a"], "b": PAIRS[5:9]})
    with pytest.raises(ConfigError, match="another participants"):
        others.compare(["base"], out=tmp_path, rounds=1)
    (file,) = tmp_path.glob("base-*.json")
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ConfigError, match="Remove it to measure it again"):
        fed.compare(["base"], out=tmp_path, rounds=1)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"no JSON.*Remove it to measure it again"):
        fed.compare(["base"], out=tmp_path, rounds=1)


def test_what_has_changed_since_is_not_served_from_the_folder(make_chain, tmp_path):
    """An arm's function, a metric's, how long answers may be: each by what it was when the results were kept."""

    def made(times=1.0, tokens=4):
        def length(predictions, references, inputs):
            return {"length": times * sum(map(len, predictions)) / len(predictions)}

        options = {"metrics": [Metric(length, maximize=True)]}
        return federation(make_chain(lora=True, max_new_tokens=tokens), **options)

    def constant(value):
        return Arm("mine", lambda train, held_out, seed: {name: {"length": value} for name in held_out})

    def found(fed, arm, folder=tmp_path):
        rows = fed.compare(["base", arm], seeds=1, rounds=1, out=folder).rows
        return {row.arm: row.own for row in rows if row.metric == "length"}

    first = found(made(), constant(1.0))
    assert found(made(), constant(1.0)) == first
    assert found(made(), constant(99.0)) == first | {"mine": 99.0}
    with pytest.raises(ConfigError, match=r"another comparison \(another metrics\)"):
        found(made(times=1000.0), constant(1.0))
    with pytest.raises(ConfigError, match=r"another comparison \(another chain"):
        found(made(tokens=16), constant(1.0))


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, train, held_out, seed):
        return {name: {"length": self.by} for name in held_out}

    def method(self, train, held_out, seed):
        return self(train, held_out, seed)


@pytest.mark.parametrize(
    ("make", "some", "other"),
    [
        (Scaled, 1.0, 99.0),
        (lambda by: Scaled(by).method, 1.0, 99.0),
        (lambda words: lambda: words, {"a", "b"}, {"a", "c"}),
        (lambda words: lambda: words, ["a"], ["b"]),
        (lambda values: lambda: values, torch.ones(2), torch.zeros(2)),
        (lambda values: lambda: values, np.ones(2), np.zeros(2)),
        (lambda by: functools.partial(Scaled.method, Scaled(by)), 1.0, 2.0),
        (lambda by: lambda x=by: x, 1, 2),
    ],
)
def test_functions_with_other_values_have_other_digests(make, some, other):
    assert code_digest(make(some)) == code_digest(make(copy.deepcopy(some))) != code_digest(make(other))


@pytest.mark.parametrize("maximize", [None, True, False])
def test_a_metric_says_which_way_is_better_for_all_that_it_returns(make_chain, tmp_path, maximize):
    def errors(predictions, references, inputs):
        return {"wrong": float(len(predictions)), "share": 1.0}

    fed = federation(make_chain(lora=True), metrics=[Metric(errors, maximize=maximize)])
    arms = ["base", "federated"]
    for _ in range(2):  # measured, and served from the folder
        shown = fed.compare(arms, out=tmp_path, **ONE)
        word = {None: "nobody said which way is better", True: "more is better", False: "less is better"}[maximize]
        assert f"wrong ({word})" in f"{shown}"
        assert f"share ({word})" in f"{shown}"
        if maximize is None:
            assert {gain.metric for gain in shown.gains()} == {"loss"}
            with pytest.raises(ConfigError, match=r"Metric\(…, maximize=True\)"):
                shown.gain("federated", "base", metric="wrong")
        else:
            assert shown.gain("federated", "base", metric="wrong").mean == 0.0


def test_what_an_arms_function_raises_says_whose_it_is(make_chain):
    def broken(train, held_out, seed):
        raise KeyError("text")

    with pytest.raises(KeyError) as caught:
        federation(make_chain()).compare([Arm("nearest", broken)], seeds=1, rounds=1)
    assert "the arm 'nearest'" in caught.value.__notes__[0]


# --- arms of one's own -----------------------------------------------------------------------------------------------


def test_an_arm_of_ones_own_is_given_examples_and_stands_in_the_table(make_chain):
    given = []

    def majority(train, held_out, seed):
        given.append((train, held_out, seed))
        return {"a": {"accuracy": np.float32(0.5), "cost": 2}, "b": {"accuracy": 1.0, "cost": 1}}

    found = federation(make_chain()).compare(["base", Arm("majority", majority, minimize=["cost"])], seeds=2, rounds=1)
    assert [seed for _, _, seed in given] == [0, 1]
    assert [(e.inputs, e.completion) for e in given[0][0]["a"]] == [tuple(pair) for pair in TRAIN["a"]]
    assert [e.completion for e in given[0][1]["b"]] == [text for _, text in HELD_OUT["b"]]
    row = next(row for row in found.rows if row.arm == "majority" and row.metric == "accuracy")
    assert (row.own, row.pooled) == pytest.approx((0.75, (0.5 * 2 + 1.0 * 3) / 5))  # pooled by held-out examples
    assert found.metrics == ("loss", "accuracy", "cost")
    assert found.minimize == ("loss", "cost")
    with pytest.raises(ConfigError, match="'base' was not measured by 'accuracy'"):
        found.gain("majority", over="base", metric="accuracy")


@pytest.mark.parametrize(
    "answer", [None, {}, {"a": {"x": 1.0}}, {"a": {}, "b": {}}, {"a": {"x": "1"}, "b": {"x": 1}}, {"a": 1, "b": 2}]
)
def test_an_arm_of_ones_own_that_gives_no_numbers_is_named(make_chain, answer):
    with pytest.raises(ConfigError, match="the arm 'mine' gave"):
        federation(make_chain()).compare([Arm("mine", lambda *_: answer)], rounds=1, seeds=1)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"arms": []}, "compare needs arms"),
        ({"arms": ["personalised"]}, "no arm 'personalised'"),
        ({"arms": ["base", "base"]}, "named twice"),
        ({"seeds": 0}, "seeds is a count"),
        ({"seeds": [1, 1]}, "seeds is a count"),
        ({"seeds": 1.5}, "seeds is a count"),
        ({"rounds": 0}, "at least one round"),
        ({"grid": []}, "grid is a list"),
        ({"grid": [0.0]}, "grid is a list"),
        ({"grid": [float("nan")]}, "grid is a list"),
        ({"validation": 1}, "validation is a share"),
        ({"validation": 0.0}, "validation is a share"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(make_chain, run, call, reason):
    with pytest.raises(ConfigError, match=reason):
        federation(make_chain()).compare(**{"arms": ["federated"]} | call)
    assert run == []


@pytest.mark.parametrize("name", ["", "federated", "centralised, batch 9", 3])
def test_an_arm_of_ones_own_has_a_name_of_its_own(name):
    with pytest.raises(ConfigError, match="needs a name"):
        Arm(name, len)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"evaluation": None}, "hold out no examples"),
        ({"evaluation": PAIRS[4:6]}, "one set for all"),
        ({"participants_per_round": 1}, "participants_per_round"),
        ({"participants": [Participant("a", PAIRS[:4], training={"learning_rate": 1.0}, held_out=PAIRS[4:5])],
          "evaluation": None}, "its own learning_rate"),
        ({"participants": None, "evaluation": None}, "nobody to learn from"),
    ],
)  # fmt: skip
def test_a_federation_that_cannot_be_compared_says_why(make_chain, options, reason):
    with pytest.raises(ConfigError, match=reason):
        federation(make_chain(), **options).compare(rounds=1)


def test_participants_elsewhere_are_measured_where_they_are(make_chain):
    class Elsewhere(InProcess):
        sequential = False

    fed = FederatedAveraging(make_chain(), runtime=Elsewhere(), progress=False)
    with pytest.raises(ConfigError, match="alone and personal are measured at each site"):
        fed.compare()
    with pytest.raises(ConfigError, match="elsewhere"):
        fed.reset()


def test_an_open_round_is_closed_first(make_chain):
    fed = federation(make_chain())
    fed.train(PAIRS[:2], "a")
    for call in (fed.compare, fed.reset):
        with pytest.raises(FederationError, match="still open"):
            call()


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    """A comparison of known numbers: two participants, two seeds."""
    from llmchain_fed.federated.comparison.results import ArmResult, Comparison

    def texts(a, b):
        return {"a": {"loss": a}, "b": {"loss": b}}

    alone = {
        0: {"a": texts(2.0, 4.0), "b": texts(3.0, 1.0)},
        1: {"a": texts(2.2, 4.0), "b": texts(3.0, 1.2)},
    }
    return Comparison(
        [
            ArmResult("base", {s: {"": texts(5.0, 6.0)} for s in (0, 1)}, examples_seen=0),
            ArmResult("alone", alone, {"a": 1e-3, "b": 5e-4}, 12_000, 3.25),
            ArmResult("federated", {0: {"": texts(1.9, 1.3)}, 1: {"": texts(2.0, 1.2)}}, {"": 1e-3}, 12_000, 10.0),
            ArmResult("centralised, batch 2", {s: {"": texts(1.0, 1.0)} for s in (0, 1)}, {"": 1e-3}, 12_000, 9.0),
        ],
        seeds=(0, 1),
        weights={"a": {"loss": 30, "examples": 3}, "b": {"loss": 10, "examples": 3}},
        rounds=3,
        unit="nats per token",
        centralised="centralised, batch 2",
        notes=["a <note>"],
    )


def test_rows_are_means_and_deviations_over_seeds(comparison):
    base, alone, federated, _ = comparison.rows
    assert (alone.own, alone.own_sd) == pytest.approx((1.6, np.std([1.5, 1.7], ddof=1)))
    first = ((2.0 * 30 + 4.0 * 10) / 40 + (3.0 * 30 + 1.0 * 10) / 40) / 2  # of each one's model on everybody's texts
    second = ((2.2 * 30 + 4.0 * 10) / 40 + (3.0 * 30 + 1.2 * 10) / 40) / 2
    assert (alone.pooled, alone.pooled_sd) == pytest.approx(((first + second) / 2, np.std([first, second], ddof=1)))
    assert alone.participants == pytest.approx({"a": 2.1, "b": 1.1})
    assert federated.pooled == pytest.approx(((1.9 * 3 + 1.3) / 4 + (2.0 * 3 + 1.2) / 4) / 2)
    assert (base.own, base.own_sd, base.pooled) == (5.5, None, 5.25)


def test_a_gain_is_above_zero_where_the_first_arm_is_better(comparison):
    gain = comparison.gain("federated", over="alone")
    assert gain.mean == pytest.approx(np.mean([[0.1, -0.3], [0.2, 0.0]]))
    assert gain.low <= gain.mean <= gain.high
    assert comparison.gain("alone", over="federated").mean == pytest.approx(-gain.mean)
    pooled = comparison.gain("federated", over="alone", on="pooled")
    rows = {row.arm: row for row in comparison.rows}
    assert pooled.mean == pytest.approx(rows["alone"].pooled - rows["federated"].pooled)
    assert comparison.gain("federated", over="centralised").over == "centralised, batch 2"
    for bad in ({"over": "nobody"}, {"over": "alone", "on": "test"}, {"over": "alone", "metric": "f1"}):
        with pytest.raises(ConfigError):
            comparison.gain("federated", **bad)


def test_the_table_has_its_digits_below_each_other(comparison):
    lines = repr(comparison).splitlines()
    assert lines[0] == "loss, nats per token (less is better), mean ± sd over 2 seeds, 3 rounds"
    points = [[i for i, c in enumerate(line[:44]) if c == "."] for line in lines[2:6]]
    assert points[1] == points[2] == points[3]
    assert [points[0][0], points[0][1]] == [points[1][0], points[1][2]]
    assert "0.0005 … 0.001" in lines[3]
    assert "12,000" in lines[3]
    assert any(line.startswith("federated over alone, loss") for line in lines)


def test_a_notebook_shows_it_escaped_with_tabular_figures(comparison):
    text = comparison._repr_html_()
    assert "a &lt;note&gt;" in text
    assert "tabular-nums" in text
    assert text.count("<tr>") == 1 + 4 + 1 + 3


def test_frame_and_json_have_everything(comparison):
    frame = comparison.to_pandas()
    assert list(frame.columns) == ["arm", "seed", "participant", "metric", "own", "pooled"]
    one = frame[(frame.arm == "alone") & (frame.seed == 1) & (frame.participant == "b")].iloc[0]
    assert (one.own, one.pooled) == pytest.approx((1.2, (3.0 * 30 + 1.2 * 10) / 40))
    found = json.loads(comparison.to_json())
    assert found["arms"][2]["values"]["1"][""]["a"]["loss"] == 2.0
    assert [row["arm"] for row in found["rows"]] == ["base", "alone", "federated", "centralised, batch 2"]


def test_what_will_be_run_is_said_first(make_chain, capsys, tmp_path):
    fed = federation(make_chain(), progress=True)
    found = fed.compare(["base", "federated"], seeds=2, rounds=1, grid=[1e-3], out=tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert "compare: base; federated: 1 trained × 2 seeds" in lines[0]
    assert "1 arms × 2 trainings ×" in lines[1]
    assert sum("learning rate 0.001" in line for line in lines) == 2
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][0]["own"] == found.rows[0].own
