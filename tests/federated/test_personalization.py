"""Personal models: what a participant learns for itself, and how it answers beside the global model.

Belongs here: Ditto, personalize, FedSA's private factor, adaptation curves, losses side by side. Does not: how adapters
share one base (test_adapters), or what rules do to the global model (test_lora_rules).
"""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from other_work import does
from tiny import PAIRS

from llmchain_fed import (
    ConfigError,
    DataError,
    DeadlineError,
    Ditto,
    FederatedAveraging,
    FederationError,
    Participant,
    Reptile,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)
from llmchain_fed.federated.runtime import InProcess

SHARES = {"a": PAIRS[:4], "b": PAIRS[4:9], "c": PAIRS[9:]}
NEWCOMER = Participant("new", PAIRS[:4], held_out=PAIRS[4:6])
SGD = TrainingConfig(optimizer="sgd", learning_rate=0.5, batch_size=2)
ADAM = TrainingConfig(optimizer="adam", learning_rate=5e-3, batch_size=2)


def federation(chain, shares=SHARES, **options):
    options = {"participants": shares, "training": ADAM, "progress": False} | options
    return FederatedAveraging(chain, **options)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(got[n], wanted[n])] == []


def assert_close(got, wanted, atol=1e-6):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=atol, msg=name)


def loss(model, pairs, chain):
    return evaluate_locally(model, pairs, prompt=chain).loss


# --- personalize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_personalize_is_fine_tuning_from_the_global_weights(kind, make_chain):
    chain, twin = make_chain(kind, lora=True), make_chain(kind, lora=True)
    fed = federation(chain)
    fed.fit(2)
    before = chain.model.trainable_state()
    found = fed.personalize("b", steps=3)
    assert_equal(chain.model.trainable_state(), before)
    twin.model.load_state(before)
    config = ADAM.replace(max_steps=3, epochs=None)
    train_locally(twin.model, SHARES["b"], config, prompt=twin, participant="b", round=2)
    assert_equal(chain.model.adapter_state("b"), twin.model.trainable_state())
    assert chain.with_adapter("b").invoke("sign in") == twin.invoke("sign in")
    assert (found.participant, found.steps, found.losses) == ("b", 3, {})
    assert chain.adapters == ["global", "b"]


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_a_personal_adapter_stands_alone_where_the_global_one_has_a_remainder(rule, make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, aggregation=rule)
    fed.fit(2)
    fed.personalize("a", steps=2)
    personal = loss(chain.model.with_adapter("a"), PAIRS, chain)
    twin = make_chain(lora=True)
    twin.model.load_remainder(chain.model.remainder())
    twin.model.load_state(chain.model.trainable_state())
    config = ADAM.replace(max_steps=2, epochs=None)
    train_locally(twin.model, SHARES["a"], config, prompt=twin, participant="a", round=2)
    assert personal == pytest.approx(loss(twin.model, PAIRS, twin), abs=1e-5)
    fed.fit(2)  # the remainder grows on; the personal adapter answers as before
    assert loss(chain.model.with_adapter("a"), PAIRS, chain) == pytest.approx(personal, abs=1e-6)


def test_personalizing_again_starts_from_the_global_weights_again(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain)
    fed.fit(1)
    fed.personalize("a", steps=2)
    once = chain.model.adapter_state("a")
    fed.personalize("a", steps=2)
    assert_equal(chain.model.adapter_state("a"), once)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda f: f.personalize("z", steps=1), ConfigError, "'z' is not there.*There: a, b, c"),
        (lambda f: f.personalize("a", steps=0), ConfigError, "steps is a count of at least 1, got 0"),
        (lambda f: f.personalize("a", steps=True), ConfigError, "steps"),
        (lambda f: f.personalize("a", steps=1, lr=-1.0), ConfigError, "lr is a positive number"),
        (lambda f: f.personalize("a", steps=1, lr=True), ConfigError, "lr is a positive number, got True"),
        (lambda f: f.personalize("a", steps=1, lr=10**400), ConfigError, "lr is a positive number"),
        (lambda f: f.side_by_side(["a"]), ConfigError, r"\['a'\] hold out no examples"),
        (lambda f: f.side_by_side("abc"), ConfigError, r"\['abc'\] hold out no examples"),
        (lambda f: f.side_by_side(3), ConfigError, "side_by_side takes the names of participants, got 3"),
        (lambda f: f.adaptation_curve("a"), ConfigError, "holds out no examples"),
        (lambda f: f.adaptation_curve("a", steps=[-1]), ConfigError, "counts of 0 or more"),
        (lambda f: f.adaptation_curve("a", steps=5), ConfigError, "counts of 0 or more.*got 5"),
        (lambda f: f.adaptation_curve("a", steps=[[1]]), ConfigError, r"counts of 0 or more.*got \[\[1\]\]"),
        (lambda f: f.adaptation_curve("a", steps=[]), ConfigError, "counts of 0 or more"),
        (lambda f: f.adaptation_curve("a", lr=float("nan")), ConfigError, "lr is a positive number, got nan"),
        (lambda f: f.adaptation_curve(NEWCOMER, lr=float("nan")), ConfigError, "lr is a positive number, got nan"),
        (lambda f: f.adaptation_curve(Participant("new", PAIRS)), ConfigError, "no held_out="),
    ],
)
def test_what_cannot_be_asked_changes_nothing(call, error, reason, make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain)
    fed.fit(1)
    before = chain.model.trainable_state()
    with pytest.raises(error, match=reason):
        call(fed)
    assert_equal(chain.model.trainable_state(), before)
    assert chain.adapters == ["global"]


def test_full_weights_have_no_personal_adapters(make_chain):
    fed = federation(make_chain())
    with pytest.raises(ConfigError, match="LoRA adapters beside one base"):
        fed.personalize("a", steps=1)
    with pytest.raises(ConfigError, match="LoRA adapter"):
        federation(make_chain(), personal=Ditto())


def test_a_participant_elsewhere_that_fails_is_an_error_by_name(make_chain):
    class Broken(InProcess):
        def call(self, op, nodes, payload, timeout=None):
            for node, answer in super().call(op, nodes, payload, timeout):
                yield node, RuntimeError("out of memory") if op == "personalize" else answer

    chain = make_chain(lora=True)
    fed = federation(chain)
    fed._server.runtime = Broken(fed._peers)
    with pytest.raises(FederationError, match="'a': RuntimeError: out of memory"):
        fed.personalize("a", steps=1)


# --- side by side -----------------------------------------------------------------------------------------------------


def test_losses_side_by_side_are_those_of_the_three_models(make_chain):
    chain, plain = make_chain(lora=True), make_chain()
    held_out = {"a": PAIRS[:3], "b": PAIRS[3:6]}
    fed = federation(chain, evaluation=held_out)
    fed.fit(2)
    fed.personalize("a", steps=4)
    found = fed.side_by_side()
    assert list(found) == ["a", "b"]
    for name, pairs in held_out.items():
        assert found[name]["base"] == pytest.approx(loss(plain.model, pairs, plain), abs=1e-6)
        assert found[name]["global"] == pytest.approx(loss(chain.model, pairs, chain), abs=1e-6)
    assert found["a"]["personal"] == pytest.approx(loss(chain.model.with_adapter("a"), PAIRS[:3], chain), abs=1e-6)
    assert "personal" not in found["b"]
    assert len({round(v, 6) for v in found["a"].values()}) == 3
    assert repr(found).splitlines()[0].split() == ["participant", "base", "global", "personal"]
    assert "<td>b</td>" in found._repr_html_()
    assert list(fed.side_by_side(["b"])) == list(fed.side_by_side("b")) == ["b"]


# --- Ditto ------------------------------------------------------------------------------------------------------------


def test_ditto_leaves_the_global_model_as_it_is_without(make_chain):
    one, two = make_chain(lora=True), make_chain(lora=True)
    federation(one).fit(3)
    federation(two, personal=Ditto(lam=0.3)).fit(3)
    assert_equal(two.model.trainable_state(), one.model.trainable_state())
    assert two.adapters == ["global", "a", "b", "c"]


def test_ditto_without_a_pull_is_local_training(make_chain):
    chain, alone = make_chain(lora=True), make_chain(lora=True)
    federation(chain, personal=Ditto(lam=0.0)).fit(3)
    for number in range(3):
        train_locally(alone.model, SHARES["b"], ADAM, prompt=alone, participant="b", round=number)
    assert_equal(chain.model.adapter_state("b"), alone.model.trainable_state())


def test_dittos_steps_are_those_of_its_formula(make_chain):
    """v ← v − lr · (∇L(v) + λ(v − w)), written out with plain autograd on one batch a round."""
    config = TrainingConfig(optimizer="sgd", learning_rate=0.2, batch_size=8)
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    broadcasts = [chain.model.trainable_state()]
    fed = federation(chain, training=config, personal=Ditto(lam=0.7))
    for _ in range(3):
        fed.fit(1)
        broadcasts.append(chain.model.trainable_state())
    personal = dict(broadcasts[0])
    for number in range(3):
        twin.model.load_state(personal)
        before = twin.model.trainable_state()
        train_locally(twin.model, SHARES["a"], config, prompt=twin, participant="a", round=number)
        step = {n: (before[n] - t) / 0.2 for n, t in twin.model.trainable_state().items()}  # ∇L, from one plain step
        personal = {n: v - 0.2 * (step[n] + 0.7 * (v - broadcasts[number][n])) for n, v in personal.items()}
    assert_close(chain.model.adapter_state("a"), personal, atol=1e-5)


def test_ditto_with_a_strong_pull_stays_at_the_global_model(make_chain):
    """With λ = 1/lr one SGD step lands at w − lr·∇L, whatever v was."""
    config = TrainingConfig(optimizer="sgd", learning_rate=0.01, batch_size=8)
    chain = make_chain(lora=True)
    fed = federation(chain, training=config, personal=Ditto(lam=100.0))
    fed.fit(3)
    broadcast = chain.model.trainable_state()
    fed.fit(1)
    own = chain.model.adapter_state("a")
    farthest = max(float((own[n] - broadcast[n]).abs().max()) for n in own)
    assert 0 < farthest < 1e-2


def test_ditto_may_take_steps_of_its_own(make_chain):
    chain = make_chain(lora=True)
    federation(chain, personal=Ditto(lam=0.0, max_steps=1)).fit(1)
    alone = make_chain(lora=True)
    train_locally(alone.model, SHARES["b"], ADAM.replace(max_steps=1), prompt=alone, participant="b", round=0)
    assert_equal(chain.model.adapter_state("b"), alone.model.trainable_state())


@pytest.mark.parametrize("options", [{"lam": -0.1}, {"lam": float("inf")}, {"lam": float("nan")}, {"max_steps": 0}])
def test_ditto_options_out_of_range(options):
    with pytest.raises(ConfigError, match="Ditto"):
        Ditto(**options)


def test_an_interrupted_round_leaves_personal_models_as_they_were(make_chain, monkeypatch):
    smooth, chain = make_chain(lora=True), make_chain(lora=True)
    federation(smooth, personal=Ditto()).fit(3)
    fed = federation(chain, personal=Ditto())
    fed.fit(2)
    kept = chain.model.adapter_state("a")

    def interrupt(*_):
        raise KeyboardInterrupt

    does(monkeypatch, fed._peers["c"], interrupt)
    with pytest.raises(KeyboardInterrupt):
        fed.fit(1)
    assert_equal(chain.model.adapter_state("a"), kept)
    monkeypatch.undo()
    fed.fit(1)
    for name in SHARES:
        assert_equal(chain.model.adapter_state(name), smooth.model.adapter_state(name))


# --- FedSA-LoRA -------------------------------------------------------------------------------------------------------


def test_fedsa_shares_a_and_keeps_b(make_chain):
    chain = make_chain(lora=True)
    start = chain.model.trainable_state()
    fed = federation(chain, aggregation="fedsa")
    seen = []
    for name, peer in fed._peers.items():
        inner = peer.handle

        def handle(op, payload, inner=inner, name=name):
            answer = inner(op, payload)
            if op == "train":
                size = int.from_bytes(answer[:8], "little")
                seen.append((name, {k for k in json.loads(answer[8 : 8 + size]) if k != "__metadata__"}))
            return answer

        peer.handle = handle
    fed.fit(2)
    assert len(seen) == 6
    assert all(names == {n for n in start if "lora_A" in n} for _, names in seen)
    own = {name: chain.model.adapter_state(name) for name in SHARES}
    now = chain.model.trainable_state()
    for name, tensor in now.items():
        if "lora_B" in name:
            assert torch.equal(tensor, start[name])
            assert not torch.equal(own["a"][name], own["b"][name])
        else:
            assert all(torch.equal(o[name], tensor) for o in own.values())
    with pytest.raises(ConfigError, match="B is personal already"):
        fed.personalize("a", steps=1)


# --- Reptile and adaptation -------------------------------------------------------------------------------------------


def test_reptile_goes_part_of_the_way_to_the_mean(make_chain):
    chain, whole = make_chain(lora=True), make_chain(lora=True)
    start = chain.model.trainable_state()
    federation(whole, weighting="equal").fit(1)
    federation(chain, weighting="equal", server_optimizer=Reptile(step_size=0.25)).fit(1)
    mean = whole.model.trainable_state()
    assert_close(chain.model.trainable_state(), {n: start[n] + 0.25 * (mean[n] - start[n]) for n in start})


def test_the_adaptation_curve_is_the_loss_after_so_many_steps(make_chain):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    fed = federation(chain)
    fed.fit(1)
    before = chain.model.trainable_state()
    newcomer = Participant("new", PAIRS[:5], held_out=PAIRS[5:8])
    curve = fed.adaptation_curve(newcomer, steps=(0, 1, 3))
    assert list(curve) == [0, 1, 3]
    for steps, found in curve.items():
        twin.model.load_state(before)
        if steps:
            config = ADAM.replace(max_steps=steps, epochs=None)
            train_locally(twin.model, PAIRS[:5], config, prompt=twin, participant="new", round=1)
        assert found == pytest.approx(loss(twin.model, PAIRS[5:8], twin), abs=1e-6)
    assert_equal(chain.model.trainable_state(), before)
    assert "new" not in fed._runtime.nodes()


def test_a_participants_own_curve_and_learning_rate(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, evaluation={"a": PAIRS[:3]})
    fed.fit(1)
    slow, fast = (fed.adaptation_curve("a", steps=range(4), lr=lr) for lr in (1e-6, 2e-2))
    assert slow[0] == fast[0]
    assert abs(slow[3] - slow[0]) < 1e-3
    assert fast[3] < fast[0] - 1e-3


def test_federated_weights_adapt_faster_than_the_start(make_chain):
    """What meta-learning is for: after rounds with others, a newcomer is better after the same few steps."""
    chain = make_chain(lora=True)
    newcomer = Participant("new", PAIRS[9:], held_out=PAIRS[9:])
    shares = dict(islice(SHARES.items(), 2))
    fed = federation(chain, shares, training=ADAM.replace(learning_rate=2e-2), weighting="equal",
                     server_optimizer=Reptile(step_size=0.8))  # fmt: skip
    untrained = fed.adaptation_curve(newcomer, steps=(0, 2))
    fed.fit(6)
    after = fed.adaptation_curve(newcomer, steps=(0, 2))
    assert after[0] < untrained[0]
    assert after[2] < untrained[2]


# --- names, other states, and what was taken back ---------------------------------------------------------------------


def test_a_participant_called_global_cannot_have_a_model_of_its_own(make_chain):
    shares = {"global": PAIRS[:5], "b": PAIRS[5:]}
    for options in ({"personal": Ditto()}, {"aggregation": "fedsa"}):
        with pytest.raises(ConfigError, match="federation's own adapter"):
            federation(make_chain(lora=True), shares, **options)
        by_hand = federation(make_chain(lora=True), None, **options)
        with pytest.raises(ConfigError, match="federation's own adapter"):
            by_hand.train(PAIRS[:5], "global")
        assert by_hand._runtime.nodes() == []
    fed = federation(make_chain(lora=True), shares)
    fed.fit(1)
    with pytest.raises(ConfigError, match="federation's own"):
        fed.personalize("global", steps=1)


def test_a_view_is_not_federated(make_chain):
    chain = make_chain(lora=True)
    chain.model.add_adapter("x", chain.model.trainable_state())
    with pytest.raises(ConfigError, match="answers with the adapter 'x'"):
        federation(chain.with_adapter("x"))


@pytest.mark.parametrize("options", [{"personal": Ditto(lam=0.0)}, {"aggregation": "fedsa"}])
def test_personal_models_over_a_remainder_of_an_earlier_federation_carry_it(options, make_chain):
    chain = make_chain(lora=True)
    federation(chain, aggregation="fedex").fit(2)
    still = ADAM.replace(learning_rate=1e-12)
    fed = federation(chain, training=still, evaluation={"a": PAIRS[:4]}, **options)
    fed.fit(1)
    found = fed.side_by_side()["a"]
    assert found["personal"] == pytest.approx(found["global"], abs=1e-5)
    assert abs(found["base"] - found["global"]) > 1e-3


def test_personalizing_after_an_interrupted_round(make_chain, monkeypatch):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    fed, smooth = federation(chain), federation(twin)
    for one in (fed, smooth):
        one.fit(1)
    does(monkeypatch, fed._peers["c"], lambda *_: 1 / 0)
    fed._server.settings.config.__dict__["quorum"] = 3
    with pytest.raises(FederationError, match="quorum"):
        fed.fit(1)
    monkeypatch.undo()
    fed.personalize("a", steps=2)
    smooth.personalize("a", steps=2)
    assert_equal(chain.model.adapter_state("a"), twin.model.adapter_state("a"))


def test_rolling_back_takes_personal_models_back(make_chain, tmp_path):
    chain = make_chain(lora=True)
    fed = federation(chain, personal=Ditto(), checkpoint_dir=tmp_path)
    fed.fit(1)
    first = chain.model.adapter_state("a")
    fed.fit(1)
    fed.roll_back(1)
    assert_equal(chain.model.adapter_state("a"), first)
    again = make_chain(lora=True)
    FederatedAveraging.resume(tmp_path, again, participants=SHARES, progress=False)
    assert_equal(again.model.adapter_state("a"), first)  # at once, to be served
    with pytest.raises(ConfigError, match="'a' is a participant"):
        fed.promote(1, "a")


def test_train_and_step_follow_the_same_orders_as_fit(make_chain):
    one, two = make_chain(lora=True), make_chain(lora=True)
    options = {"personal": Ditto(lam=0.2), "codec": "int8"}
    federation(one, **options).fit(2)
    fed = federation(two, None, **options)
    for _ in range(2):
        for name, pairs in SHARES.items():
            fed.train(pairs, name)
        fed.step()
    assert_equal(two.model.trainable_state(), one.model.trainable_state())
    for name in SHARES:
        assert_equal(two.model.adapter_state(name), one.model.adapter_state(name))
    with pytest.raises(DeadlineError):
        federation(two, None, deadline=1e-9).train(PAIRS, "x")


def test_more_steps_than_a_site_gives_are_refused(make_chain):
    fed = federation(make_chain(lora=True), evaluation={"a": PAIRS[:2]})
    with pytest.raises(ConfigError, match="more than a personal model is given"):
        fed.adaptation_curve("a", steps=(0, 10**9))
    with pytest.raises(ConfigError, match="more than a personal model is given"):
        fed.personalize("a", steps=10**9)


def test_a_newcomer_may_have_a_rank_of_its_own(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, aggregation="flora")
    fed.fit(1)
    found = fed.adaptation_curve(Participant("new", PAIRS[:4], held_out=PAIRS[4:6], rank=2), steps=(0, 1))
    assert found[0] == pytest.approx(loss(chain.model, PAIRS[4:6], chain), abs=1e-5)
    with pytest.raises(ConfigError, match="takes part already"):
        fed.adaptation_curve(Participant("a", PAIRS, held_out=PAIRS))


@pytest.mark.parametrize("fails", [False, True])
def test_a_newcomers_rank_is_forgotten_with_it(fails, make_chain):
    """One that trains under its name later does so at the chain's rank, as if no curve had been drawn."""
    chain, smooth = make_chain(lora=True), make_chain(lora=True)
    fed, twin = federation(chain, aggregation="flora"), federation(smooth, aggregation="flora")
    newcomer = Participant("new", 5 if fails else PAIRS[:4], held_out=PAIRS[4:6], rank=2)
    if fails:
        with pytest.raises(DataError):
            fed.adaptation_curve(newcomer, steps=(0, 1))
    else:
        fed.adaptation_curve(newcomer, steps=(0, 1))
    for one in (fed, twin):
        assert one.train(PAIRS[:4], "new").status == "trained"
        one.step()
    assert_equal(chain.model.trainable_state(), smooth.model.trainable_state())
    for layer, factors in smooth.model.remainder().items():
        assert all(map(torch.equal, chain.model.remainder()[layer], factors))


def test_train_says_anew_what_rank_a_participant_has(make_chain):
    """Whatever one of that name was told before, such as by a curve that this process did not end."""
    fed = federation(make_chain(lora=True), None, aggregation="flora")
    fed._server.broadcast.joined("new", None, 2, None)
    assert fed.train(PAIRS[:4], "new").status == "trained"


def test_numbers_of_numpy_are_numbers_between_rounds_too(make_chain, tmp_path):
    fed, plain = (federation(make_chain(lora=True), evaluation=SHARES, checkpoint_dir=tmp_path / n) for n in "ab")
    for each in (fed, plain):
        each.fit(2)
    learning_rate = np.float64(1e-3)
    assert fed.adaptation_curve("a", steps=np.arange(2), lr=learning_rate) == plain.adaptation_curve(
        "a", steps=[0, 1], lr=1e-3
    )
    assert fed.personalize("a", steps=np.int64(2), lr=learning_rate).losses == pytest.approx(
        plain.personalize("a", steps=2, lr=1e-3).losses
    )
    fed.promote(np.int64(1))
    fed.roll_back(np.int64(1))
    assert fed.round == 1
