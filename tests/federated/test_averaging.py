"""FederatedAveraging and FederatedLearning as a user drives them: options, records, failures, history.

Belongs here: the round loop's options and its records. Does not: the laws of averaging (test_invariants).
"""

import gc
import json
import math
import re
import weakref

import pandas as pd
import pytest
import torch
from langchain_core.runnables import RunnableLambda
from other_work import does
from tiny import PAIRS, TEMPLATE
from torch.utils.data import DataLoader

from llmchain_fed import (
    Ditto,
    FederatedAveraging,
    FederatedLearning,
    History,
    Participant,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.data.split import Split, position
from llmchain_fed.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DuplicateParticipantError,
    EmptyParticipantError,
    FederationError,
    NonFiniteLossError,
    NothingTrainedError,
    NotTrainableError,
    PromptVariablesError,
    QuorumError,
    TemplatedTwiceError,
    UnsupportedModelError,
    WeightsMismatchError,
)
from llmchain_fed.federated.client import operations
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
from llmchain_fed.federated.participant import hold_out
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.updates.collection import Collection, Combined

FAST = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=16)
SHARES = {"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}


def federation(chain, participants=SHARES, **options):
    return FederatedAveraging(chain, participants=participants, **({"training": FAST, "progress": False} | options))


def assert_close(got, wanted, atol=1e-6):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=1e-5, atol=atol, msg=name)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


def trained(make_chain, pairs, name, start=None, config=FAST, round_number=0):
    chain = make_chain()
    if start is not None:
        chain.model.load_state(start)
    train_locally(chain.model, pairs, config, prompt=chain, participant=name, round=round_number)
    return chain.model.trainable_state()


def mean_of(*pairs):
    total = sum(w for _, w in pairs)
    return {n: sum(s[n].double() * w for s, w in pairs) / total for n in pairs[0][0]}


class Broken:
    """Examples that fail when they are read."""

    def __iter__(self):
        raise OSError("the disk is gone")


# --- the snippets of the design ---------------------------------------------------------------------------------------


def test_the_first_snippet_as_printed(make_chain):
    chain = make_chain(prompt="Translate the following text to French: {text}\n", lora=True)
    pairs_a, pairs_b = PAIRS[:6], PAIRS[6:]
    before = chain.model.weights_version
    answer = chain.invoke({"text": "Page locked"})
    assert isinstance(answer, str)
    fed = FederatedAveraging(chain, participants={"django": pairs_a, "wagtail": pairs_b}, lr=5e-4, batch_size=16)
    history = fed.fit(rounds=3)
    assert fed.get_model() is chain
    assert chain.model.weights_version != before
    assert isinstance(chain.invoke({"text": "Page locked"}), str)
    assert [r.round for r in history] == [1, 2, 3]
    assert history is fed.history
    assert fed.round == 3


def test_the_founding_snippet_as_printed(battery):
    chain = battery()
    local_data = [[(TEMPLATE.format(text=t), c) for t, c in share] for share in SHARES.values()]
    start = chain.model.trainable_state()
    federated_averaging = FederatedAveraging(
        model=chain.model, optimizer=torch.optim.Adam(chain.model.parameters()), lr=0.001, batch_size=32
    )
    for epoch in range(2):
        for device_id in range(3):
            federated_averaging.train(local_data[device_id], device_id)
        federated_averaging.step()
        if epoch == 0:
            config = TrainingConfig(optimizer="adam", learning_rate=0.001, batch_size=32)
            parts = [
                (trained(battery, share, str(i), start, config), len(share)) for i, share in enumerate(SHARES.values())
            ]
            assert_close(chain.model.trainable_state(), mean_of(*parts), atol=1e-5)
    global_model = federated_averaging.get_model()
    assert global_model is chain.model
    assert federated_averaging.round == 2


def test_the_second_founding_snippet_as_printed(make_chain):
    chain, twin = make_chain(), make_chain()
    model, optimizer, num_epochs = chain.model, torch.optim.SGD(chain.model.parameters(), lr=0.05), 2

    def loader(chain, share):
        encoded = encode_examples(share, chain.model, chain)
        rows = [encoded[i] for i in range(len(encoded))]
        return DataLoader(rows, batch_size=16, collate_fn=lambda rows: collate(rows, chain.model))

    data_loader = [loader(chain, share) for share in SHARES.values()]
    fl = FederatedLearning(model, data_loader, optimizer, progress=False)
    for epoch in range(num_epochs):
        fl.train(epoch)
    global_model = fl.get_global_model()
    assert global_model is model
    assert len(fl.history) == 2
    federation(twin, dict(enumerate(SHARES.values()))).fit(rounds=2)  # the same examples as text
    assert_close(model.trainable_state(), twin.model.trainable_state())
    assert [r.examples for r in fl.history[0].participants.values()] == [5, 4, 3]


def test_a_single_dataloader_is_a_single_participant(make_chain):
    chain = make_chain()
    encoded = encode_examples(PAIRS, chain.model, chain)
    rows = [encoded[i] for i in range(len(encoded))]
    fl = FederatedLearning(
        chain, DataLoader(rows, batch_size=4, collate_fn=lambda rows: collate(rows, chain.model)), progress=False
    )
    assert fl.train(0).trained == ["0"]
    assert FederatedLearning(chain, {"x": PAIRS}, progress=False).train(0).trained == ["x"]


# --- what can be federated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda c: c,
        lambda c: c.with_config(tags=["x"]),
        lambda c: c.with_retry(),
        lambda c: c.with_fallbacks([RunnableLambda(lambda _: "sorry")]),
        lambda c: c | RunnableLambda(str.upper),
        lambda c: c.prompt | c.llm,
        lambda c: c.prompt | c.llm | c.output_parser,
    ],
)
def test_wrapped_chains_learn_like_the_chain_itself(wrap, make_chain):
    chain, plain = make_chain(), make_chain()
    wrapped = wrap(chain)
    fed = federation(wrapped)
    fed.fit(rounds=1)
    federation(plain).fit(rounds=1)
    assert fed.get_model() is wrapped
    assert_equal(chain.model.trainable_state(), plain.model.trainable_state())


def test_an_llm_learns_from_final_text(make_chain):
    chain, plain = make_chain(), make_chain()
    texts = {n: [(TEMPLATE.format(text=t), c) for t, c in share] for n, share in SHARES.items()}
    federation(chain.llm, texts).fit(rounds=1)
    federation(plain).fit(rounds=1)
    assert_equal(chain.model.trainable_state(), plain.model.trainable_state())


@pytest.mark.parametrize("model", ["gpt-4", None, 3, RunnableLambda(len), {}])
def test_what_cannot_learn_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="cannot train"):
        FederatedAveraging(model)


def test_a_chain_over_a_hosted_model_is_refused():
    from langchain_core.language_models import FakeListLLM

    from llmchain_fed import LLMChain

    with pytest.raises(UnsupportedModelError, match="FakeListLLM"):
        FederatedAveraging(LLMChain(llm=FakeListLLM(responses=["x"]), prompt=TEMPLATE))


def test_a_frozen_model_is_refused(make_chain):
    chain = make_chain()
    chain.model.module.requires_grad_(requires_grad=False)
    with pytest.raises(NotTrainableError, match="LoraConfig"):
        federation(chain)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "weights"), [("examples", (3, 1)), ("tokens", None), ("equal", (1, 1))])
def test_weighting(weighting, weights, make_chain):
    shares = {"a": PAIRS[1:4], "b": [("x", "a very long answer, which one example alone has, of many many tokens")]}
    chain = make_chain()
    if weights is None:
        weights = [encode_examples(s, chain.model, chain).report.completion_tokens for s in shares.values()]
        assert weights[1] > weights[0] / 2
    federation(chain, shares, weighting=weighting).fit(rounds=1)
    wanted = mean_of(*((trained(make_chain, s, n), w) for (n, s), w in zip(shares.items(), weights, strict=True)))
    assert_close(chain.model.trainable_state(), wanted)


@pytest.mark.parametrize(("wanted", "count"), [(2, 2), (0.5, 3), (0.01, 1), (1.0, 6), (6, 6), (None, 6), (1, 1)])
def test_sampling_draws_that_many_by_seed(wanted, count, make_chain):
    shares = {name: PAIRS[i : i + 1] for i, name in enumerate("uvwxyz")}

    def draw(seed):
        fed = federation(make_chain(), shares, participants_per_round=wanted, seed=seed)
        return [r.trained for r in fed.fit(rounds=6)], fed.history

    drawn, history = draw(0)
    assert {len(names) for names in drawn} == {count}
    assert drawn == draw(0)[0]
    if count < 6:
        assert len({tuple(names) for names in drawn}) > 1
        assert drawn != draw(1)[0]
        idle = [n for n, r in history[0].participants.items() if r.status == "idle"]
        assert sorted(idle + drawn[0]) == list(shares)
        assert all(history[0].participants[n].bytes_down == 0 for n in idle)


def test_only_the_sampled_are_averaged(make_chain):
    chain = make_chain()
    fed = federation(chain, participants_per_round=2)
    chosen = fed.fit(rounds=1)[0].trained
    wanted = mean_of(*((trained(make_chain, SHARES[n], n), len(SHARES[n])) for n in chosen))
    assert_close(chain.model.trainable_state(), wanted)


def test_participants_may_train_in_their_own_way(make_chain):
    """A slow device takes fewer steps and smaller batches; the others are not affected."""
    chain = make_chain()
    slow = {"max_steps": 1, "batch_size": 2, "learning_rate": 0.01}
    people = [Participant("fast", PAIRS[:6]), Participant("slow", PAIRS[6:], training=slow)]
    config = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=3)
    record = federation(chain, people, training=config).fit(rounds=1)[0]
    assert (record.participants["fast"].steps, record.participants["slow"].steps) == (2, 1)
    wanted = mean_of(
        (trained(make_chain, PAIRS[:6], "fast", config=config), 6),
        (trained(make_chain, PAIRS[6:], "slow", config=config.replace(**slow)), 6),
    )
    assert_close(chain.model.trainable_state(), wanted)
    many = Participant("many", PAIRS[:6], training={"max_steps": 30})
    record = federation(make_chain(), [many], training=config.replace(epochs=None, max_steps=2)).fit(rounds=1)[0]
    assert record.participants["many"].steps == 30
    with pytest.raises(ConfigError, match="did you mean `max_steps`"):
        federation(chain, [Participant("x", PAIRS, training={"max_step": 1})])


def test_short_options_and_training_say_the_same(make_chain):
    short, long = make_chain(lora=True), make_chain(lora=True)
    federation(short, training=None, optimizer="adam", lr=1e-3, batch_size=2, seed=4).fit(rounds=1)
    config = TrainingConfig(optimizer="adam", learning_rate=1e-3, batch_size=2, seed=4)
    federation(long, training=config, seed=4).fit(rounds=1)
    assert_equal(short.model.trainable_state(), long.model.trainable_state())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learning_rte": 1}, "unknown option `learning_rte`"),
        ({"batchsize": 1}, "did you mean `batch_size`"),
        ({"lr": 0.1, "training": TrainingConfig(learning_rate=0.2)}, "contradicts training.learning_rate"),
        ({"optimizer": "adam", "training": TrainingConfig(optimizer="sgd")}, "contradicts"),
        ({"lr": -1}, "learning_rate"),
        ({"lr": "fast"}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"optimizer": "adamax"}, "optimizer"),
        ({"training": {"lr": 1}}, "TrainingConfig"),
        ({"aggregation": "median"}, "Valid: fedavg, fedex, fedit"),
        ({"aggregation": "fedit"}, "LoRA factors"),
        ({"server_optimizer": "adam"}, "server_optimizer"),
        ({"weighting": "size"}, "'examples', 'tokens' or 'equal'"),
        ({"weighting": ["examples"]}, "'examples', 'tokens' or 'equal'"),
        ({"participants_per_round": 0}, "participants_per_round"),
        ({"participants_per_round": 4}, "up to 3"),
        ({"participants_per_round": 1.5}, r"share in \(0, 1\]"),
        ({"participants_per_round": True}, "participants_per_round"),
        ({"participants_per_round": "half"}, "participants_per_round"),
        ({"quorum": 0}, "`quorum`: .* greater than or equal to 1"),
        ({"quorum": 4}, "never be met by 3"),
        ({"quorum": True}, "quorum"),
        ({"quorum": 2, "participants_per_round": 1}, "never be met by 1"),
        ({"evaluation": 1.5}, "between 0 and 1"),
        ({"evaluation": True}, "between 0 and 1"),
        ({"evaluation": {"z": PAIRS}}, r"\['z'\], who take no part"),
        ({"samples": -1}, "samples"),
        ({"samples": True}, r"`samples`: .* valid integer \(got True\)"),
        ({"seed": None}, r"`seed`: .* valid integer \(got None\)"),
        ({"seed": True}, r"`seed`: .* valid integer \(got True\)"),
        ({"participants": ["a", "b"]}, "list of Participant, got str"),
        ({"participants": PAIRS}, "list of Participant, got tuple"),
        ({"participants": pd.DataFrame(PAIRS)}, 'got DataFrame. Give examples a name: participants={"a": examples}'),
        ({"participants": [pd.DataFrame(PAIRS)]}, 'got DataFrame. Give examples a name: participants={"a": examples}'),
        ({"participants": "a.csv"}, "list of Participant, got str"),
        ({"participants": {None: PAIRS}}, "None is no participant's name"),
        ({"participants": {"a\nb": PAIRS}}, "is no participant's name"),
        ({"participants": 5}, "got int"),
        ({"participants": {"": PAIRS}}, "needs a name"),
        ({"runtime": object()}, "Runtime of your own, got <object"),
        ({"runtime": InProcess({})}, "not both"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason, make_chain):
    chain = make_chain()
    start = chain.model.trainable_state()
    options = {"participants": SHARES, "progress": False} | options
    with pytest.raises(ConfigError, match=reason):
        FederatedAveraging(chain, **options)
    assert_equal(chain.model.trainable_state(), start)


def test_names_are_unique(make_chain):
    for people in ([Participant("a", PAIRS), Participant("a", PAIRS)], {0: PAIRS, "0": PAIRS}):
        with pytest.raises(DuplicateParticipantError, match="two participants are called"):
            federation(make_chain(), people)


def test_names_may_be_numbers(make_chain):
    fed = federation(make_chain(), {0: PAIRS[:3], 1: PAIRS[3:6]}, evaluation={0: PAIRS[6:8]})
    assert "0, 1" in repr(fed)
    record = fed.fit(rounds=1)[0]
    assert record.trained == ["0", "1"]
    assert record.participants["0"].held_out_after is not None
    people = federation(make_chain(), [Participant(7, PAIRS[:3])])
    assert "(7)" in repr(people)
    assert people.fit(rounds=1)[0].trained == ["7"]


# --- bad input leaves everything as it was ---------------------------------------------------------------------------

BAD_DATA = {
    "empty": ([], EmptyParticipantError),
    "only empty completions": ([("x", "")], EmptyParticipantError),
    "foreign variables": ([({"tone": "x"}, "y")], PromptVariablesError),
    "completion is no text": ([("x", 5)], DataError),
    "already templated": ([(TEMPLATE.format(text="x"), "y")], TemplatedTwiceError),
    "longer than the context": ([("page " * 300, "y")], EmptyParticipantError),
    "no such file": ("nowhere.jsonl", DataError),
    "a number": (5, DataError),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_examples_stop_a_federation_before_it_begins(case, make_chain):
    bad, error = BAD_DATA[case]
    chain = make_chain()
    start, version = chain.model.trainable_state(), chain.model.weights_version
    fed = federation(chain, {"a": PAIRS[:3], "bad": bad})
    with pytest.raises(error) as caught:
        fed.fit(rounds=1)
    assert "participant 'bad'" in str(caught.value)
    alone = federation(chain, None)
    with pytest.raises(error):
        alone.train(bad, "bad")
    for each in (fed, alone):
        assert (each.round, len(each.history)) == (0, 0)
    with pytest.raises(NothingTrainedError):  # the failed call opened no round
        alone.step()
    assert_equal(chain.model.trainable_state(), start)
    assert chain.model.weights_hash == version.split("-")[1]


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True, "3", None])
def test_rounds_are_a_positive_count(rounds, make_chain):
    chain = make_chain()
    fed = federation(chain)
    with pytest.raises(ConfigError, match="at least one round"):
        fed.fit(rounds=rounds)
    assert len(fed.history) == 0
    with pytest.raises(ConfigError, match="plan takes at least one round"):
        fed.plan(rounds=rounds)


@pytest.mark.parametrize("min_delta", ["0.1", math.nan, math.inf, -0.1, True, None, 10**400])
def test_an_improvement_is_a_finite_number(min_delta, make_chain, tmp_path):
    fed = federation(make_chain(), evaluation=PAIRS[:3], checkpoint_dir=tmp_path)
    for patience in (1, None):
        with pytest.raises(ConfigError, match="min_delta is a finite number"):
            fed.fit(rounds=1, patience=patience, min_delta=min_delta)
    assert fed.round == 0
    assert list(tmp_path.iterdir()) == []


def test_nobody_to_learn_from(make_chain):
    for nobody in (None, {}, []):
        with pytest.raises(ConfigError, match="nobody to learn from"):
            federation(make_chain(), nobody).fit(rounds=1)


def test_a_step_needs_somebody_trained(make_chain):
    fed = federation(make_chain(), None)
    with pytest.raises(NothingTrainedError, match="Call train"):
        fed.step()
    fed.train(PAIRS[:2], 0)
    fed.step()
    with pytest.raises(NothingTrainedError):
        fed.step()
    assert len(fed.history) == 1


def test_nobody_trains_twice_in_a_round(make_chain):
    fed = federation(make_chain(), None)
    fed.train(PAIRS[:2], 0)
    for same in (0, "0"):
        with pytest.raises(DuplicateParticipantError, match="'0' has already trained"):
            fed.train(PAIRS[:2], same)
    fed.step()
    fed.train(PAIRS[:2], 0)


def spoil(monkeypatch, peer, answer=b"garbage"):
    """Lets a participant train and then answer something else."""
    inner = peer.handle

    def handle(op, payload):
        found = inner(op, payload)
        return answer if op == "train" else found

    monkeypatch.setattr(peer, "handle", handle)


def test_who_was_refused_may_train_again_in_the_same_round(make_chain, monkeypatch):
    chain = make_chain()
    fed = federation(chain)
    fed.train(SHARES["b"], "b")
    spoil(monkeypatch, fed._peers["a"])
    first = fed.train(SHARES["a"], "a")
    assert (first.status, first.bytes_up) == ("refused", len(b"garbage"))
    with pytest.raises(FederationError, match=r"\['b'\] have trained"):
        fed.fit(rounds=1)
    monkeypatch.undo()
    second = fed.train(SHARES["a"], "a")
    assert (second.status, second.reason) == ("trained", None)
    assert second.bytes_down > first.bytes_down > 0, "the ledger counts both ways there"
    with pytest.raises(DuplicateParticipantError, match="'a' has already trained"):
        fed.train(SHARES["a"], "a")
    record = fed.step()
    assert record.participants["a"] is second
    assert record.trained == ["b", "a"]
    wanted = mean_of(*((trained(make_chain, SHARES[n], n), len(SHARES[n])) for n in "ab"))
    assert_close(chain.model.trainable_state(), wanted)


@pytest.mark.parametrize("after", ["train", "fit"])
@pytest.mark.parametrize("evaluation", [None, PAIRS[:2]])
def test_a_round_without_a_usable_update_is_closed_by_step(after, evaluation, make_chain, monkeypatch):
    chain = make_chain()
    start = chain.model.trainable_state()
    fed = federation(chain, {"a": SHARES["a"]}, evaluation=evaluation)
    spoil(monkeypatch, fed._peers["a"])
    assert fed.train(SHARES["a"], "a").status == "refused"
    with pytest.raises(FederationError, match=r"has no usable update \(from a\)"):
        fed.fit(rounds=1)
    with pytest.raises(QuorumError, match=r"0 usable updates, the quorum is 1 \(a: UpdateRefusedError"):
        fed.step()
    monkeypatch.undo()
    assert_equal(chain.model.trainable_state(), start)
    assert (fed.round, len(fed.history)) == (0, 0)
    with pytest.raises(NothingTrainedError):
        fed.step()
    if after == "fit":
        fed.fit(rounds=1)
    else:
        fed.train(SHARES["a"], "a")
        fed.step()
    assert_equal(chain.model.trainable_state(), trained(make_chain, SHARES["a"], "a"))
    assert fed.round == len(fed.history) == 1


@pytest.mark.parametrize("loses", ["what it found", "what it was sent"])
def test_train_sends_everything_to_one_that_lost_what_it_had(loses, make_chain, monkeypatch):
    """One that no round has asked found the first weights in the chain, which has moved on since."""
    chain = make_chain()
    fed = federation(chain, participants_per_round=1 if loses == "what it found" else None)
    asked = fed.fit(rounds=1)[0].trained
    name = next(n for n in SHARES if (n in asked) == (loses == "what it was sent"))
    if loses == "what it was sent":
        fed._peers[name].global_states.forget()
    start, payloads, inner = chain.model.trainable_state(), [], fed._peers[name].handle

    def handle(op, payload):
        payloads.append(len(payload))
        return inner(op, payload)

    monkeypatch.setattr(fed._peers[name], "handle", handle)
    record = fed.train(SHARES[name], name)
    assert (record.status, record.reason) == ("trained", None)
    assert record.bytes_down == sum(payloads)
    assert payloads[-1] > sum(t.numel() * t.element_size() for t in start.values())
    fed.step()
    assert_equal(chain.model.trainable_state(), trained(make_chain, SHARES[name], name, start, round_number=1))


@pytest.mark.parametrize("rule", ["fedavg", "fedex", "flora", "flexlora"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, "NaN"])
def test_a_step_that_fails_once_the_updates_are_used_up_closes_the_round(rule, failure, make_chain, monkeypatch):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    fed = federation(chain, participants=None, aggregation=rule)
    for name, share in SHARES.items():
        fed.train(share, name)
    before = chain.model.trainable_state()

    def apply(optimizer, state, aggregate):
        if failure == "NaN":
            return {n: t * float("nan") for n, t in state.items()}
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr("llmchain_fed.updates.server_optimizers.apply", apply)
        with pytest.raises((KeyboardInterrupt, WeightsMismatchError)) as caught:
            fed.step()
    assert "participants must train anew" in caught.value.__notes__[0]
    assert_equal(chain.model.trainable_state(), before)
    assert chain.model.remainder() == {}
    assert fed.round == len(fed.history) == 0
    with pytest.raises(NothingTrainedError):
        fed.step()
    other = federation(twin, participants=None, aggregation=rule)
    for each in (fed, other):
        for name, share in SHARES.items():
            each.train(share, name)
        each.step()
    assert_equal(chain.model.trainable_state(), twin.model.trainable_state())


def test_train_sends_what_changed_to_one_that_has_the_rest(make_chain):
    """As many bytes as `fit` sends it: under ffa only B has changed since."""
    whole, by_hand = (federation(make_chain(lora=True), aggregation="ffa") for _ in range(2))
    sent = whole.fit(rounds=2)[1].participants["a"].bytes_down
    by_hand.fit(rounds=1)
    # nobody has planned how many rounds come: some digits less
    assert by_hand.train(SHARES["a"], "a").bytes_down == pytest.approx(sent, abs=16)
    state = whole.get_model().model.trainable_state()
    assert sent < sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("rounds_before", [0, 1])
@pytest.mark.parametrize("bad", [[], 5, [{"x": 1}], Broken()])
def test_a_failed_train_leaves_a_participant_its_examples(bad, rounds_before, make_chain):
    """Those of before were a generator, which cannot be read a second time."""
    chain, smooth = make_chain(), make_chain()
    fed = federation(chain, {"a": (p for p in SHARES["a"]), "b": SHARES["b"]})
    if rounds_before:
        fed.fit(rounds=1)
    with pytest.raises((DataError, OSError)):
        fed.train(bad, "a")
    fed.fit(rounds=1)
    assert fed.history[-1].participants["a"].examples == len(SHARES["a"])
    federation(smooth, {"a": SHARES["a"], "b": SHARES["b"]}).fit(rounds=rounds_before + 1)
    assert_equal(chain.model.trainable_state(), smooth.model.trainable_state())


def test_fit_does_not_begin_in_an_open_round(make_chain):
    chain = make_chain()
    fed = federation(chain)
    fed.train(PAIRS[:2], "a")
    with pytest.raises(FederationError, match=r"\['a'\] have trained in a round that is still open"):
        fed.fit(rounds=1)
    fed.step()
    fed.fit(rounds=1)
    assert fed.round == 2


def test_a_participant_with_new_examples_goes_on(make_chain):
    """fit, then train() on other data for a known participant, then fit again: its new count is the one that counts."""
    chain = make_chain()
    fed = federation(chain, evaluation={"a": PAIRS[8:]})
    fed.fit(rounds=1)
    fed.train(PAIRS[:8], "a")
    fed.step()
    history = fed.fit(rounds=1)
    assert history[2].trained == ["a", "b", "c"]
    assert [r.participants["a"].examples for r in history] == [5, 8, 8]
    assert history[2].participants["a"].held_out_after is not None


def test_a_nan_loss_is_that_participants_failure_alone(make_chain):
    chain = make_chain()
    start = chain.model.trainable_state()
    wild = Participant("wild", PAIRS[:4], training={"learning_rate": 1e30, "epochs": 4})
    record = federation(chain, [wild, Participant("calm", PAIRS[4:])]).fit(rounds=1)[0]
    assert record.participants["wild"].status == "failed"
    assert record.participants["wild"].reason.startswith("NonFiniteLossError: the loss of 'wild' became")
    assert record.trained == ["calm"]
    assert_equal(chain.model.trainable_state(), trained(make_chain, PAIRS[4:], "calm", start))


def test_a_nan_loss_in_train_is_the_callers_to_see(make_chain):
    chain = make_chain()
    start = chain.model.trainable_state()
    fed = federation(chain, None, training=FAST.replace(learning_rate=1e30, epochs=4))
    with pytest.raises(NonFiniteLossError):
        fed.train(PAIRS[:4], 0)
    assert_equal(chain.model.trainable_state(), start)
    with pytest.raises(NothingTrainedError):
        fed.step()


def test_a_participant_whose_training_raises_is_recorded_and_the_round_goes_on(make_chain, monkeypatch):
    chain = make_chain()
    fed = federation(chain)

    def fail(*_args):
        raise RuntimeError("out of memory")

    does(monkeypatch, fed._peers["b"], fail)
    history = fed.fit(rounds=1)
    record = history[0].participants["b"]
    assert (record.status, record.reason, record.bytes_up) == ("failed", "RuntimeError: out of memory", 0)
    assert record.bytes_down > 0
    assert "b: failed" in repr(history)
    wanted = mean_of(*((trained(make_chain, SHARES[n], n), len(SHARES[n])) for n in "ac"))
    assert_close(chain.model.trainable_state(), wanted)


def test_examples_that_cannot_be_read_stop_a_federation_before_it_begins(make_chain):
    fed = federation(make_chain(), {"a": PAIRS, "b": Broken()})
    with pytest.raises(FederationError, match="'b' cannot join: OSError: the disk is gone"):
        fed.fit(rounds=1)


@pytest.mark.parametrize("where", ["training", "evaluation", "first round"])
def test_ctrl_c_leaves_the_last_completed_round(where, battery, monkeypatch):
    chain, two = battery(), battery()
    fed = federation(chain, evaluation={"a": PAIRS[:2]}, samples=0)
    start = chain.model.trainable_state()
    calls = []
    peer = fed._peers["b" if where != "evaluation" else "a"]
    op = "evaluate" if where == "evaluation" else "train"
    inner = operations.task_type(op).work

    def interrupt(*arguments):
        calls.append(1)
        # evaluated before round 1 and after each: the 4th time comes after the weights of round 3 were loaded
        if len(calls) == {"training": 3, "evaluation": 4, "first round": 1}[where]:
            raise KeyboardInterrupt
        return inner(*arguments)

    does(monkeypatch, peer, interrupt, op)
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=5)
    completed = 0 if where == "first round" else 2
    assert fed.round == len(fed.history) == completed
    if completed:
        federation(two, evaluation={"a": PAIRS[:2]}, samples=0).fit(rounds=completed)
        start = two.model.trainable_state()
        assert fed.history[-1].weights_version.split("-")[1] == chain.model.weights_hash
    assert_equal(chain.model.trainable_state(), start)
    assert not chain.model.module.training
    monkeypatch.undo()
    fed.fit(rounds=1)  # and goes on as if nothing had happened
    federation(two, evaluation={"a": PAIRS[:2]}, samples=0).fit(rounds=1) if not completed else None
    assert fed.round == completed + 1


def test_going_on_after_an_interruption_is_as_if_there_had_been_none(make_chain, monkeypatch):
    """Optimizer state and the place in the data are those of the last completed round."""
    config = TrainingConfig(optimizer="adam", learning_rate=1e-3, batch_size=2, max_steps=2, keep_optimizer=True)
    chain, smooth = make_chain(lora=True), make_chain(lora=True)
    federation(smooth, training=config).fit(rounds=3)
    fed = federation(chain, training=config)
    fed.fit(rounds=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    does(monkeypatch, fed._peers["c"], interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fed.fit(rounds=1)
    monkeypatch.undo()
    fed.fit(rounds=2)
    assert_equal(chain.model.trainable_state(), smooth.model.trainable_state())


def test_a_server_optimizer_that_fails_or_errs_leaves_everything(make_chain):
    class Wrong:
        def __init__(self, make):
            self.step = lambda state, _gradient: make(state)

    for make, error in (
        (lambda s: {n: t * math.nan for n, t in s.items()}, "NaN"),
        (lambda s: dict(list(s.items())[1:]), "lacks 1"),
        (lambda _s: 1 / 0, "division"),
    ):
        chain = make_chain()
        start = chain.model.trainable_state()
        fed = federation(chain, server_optimizer=Wrong(make))
        with pytest.raises(Exception, match=error):
            fed.fit(rounds=1)
        assert_equal(chain.model.trainable_state(), start)
        assert (fed.round, len(fed.history)) == (0, 0)


def test_the_quorum_counts_usable_updates(make_chain, monkeypatch):
    chain = make_chain()
    start = chain.model.trainable_state()
    fed = federation(chain, quorum=3)
    does(monkeypatch, fed._peers["b"], lambda *_: 1 / 0)
    with pytest.raises(QuorumError, match=r"2 usable updates, the quorum is 3 \(b: ZeroDivisionError"):
        fed.fit(rounds=1)
    assert_equal(chain.model.trainable_state(), start)
    assert len(fed.history) == 0
    by_hand = federation(chain, None, quorum=2)
    by_hand.train(PAIRS[:4], 0)
    with pytest.raises(QuorumError, match="1 usable updates"):
        by_hand.step()
    by_hand.train(PAIRS[4:], 1)  # the round is still open
    assert by_hand.step().trained == ["0", "1"]


class Processes(InProcess):
    """A cluster whose other processes hear what the leading one, this one, publishes."""

    replicated = True

    def __init__(self):
        super().__init__({})
        self.heard = []

    def host(self, handlers):
        self._clients = dict(handlers)

    def follow(self, adopt):
        raise AssertionError("this process leads")

    def publish(self, outcome, error=None):
        self.heard.append(error)


def test_every_process_hears_that_a_directory_is_taken(make_chain, tmp_path):
    """Only the leading one looks; the others wait for it, and would for ever if it raised unheard."""
    federation(make_chain(), checkpoint_dir=tmp_path).fit(rounds=1)
    processes = Processes()
    fed = federation(make_chain(), runtime=processes, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="of an earlier run") as caught:
        fed.fit(rounds=1)
    assert processes.heard == [caught.value]
    assert fed.round == 0


# --- the server's side ------------------------------------------------------------------------------------------------


class Sgd:
    def __init__(self, lr):
        self.lr = lr

    def step(self, state, pseudo_gradient):
        return {n: state[n] + self.lr * pseudo_gradient[n] for n in state}


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_a_server_optimizer_of_ones_own(lr, battery):
    """SGD with rate 1 is FedAvg; with rate ½ the weights end halfway."""
    chain, plain = battery(), battery()
    start = chain.model.trainable_state()
    federation(chain, server_optimizer=Sgd(lr)).fit(rounds=1)
    federation(plain).fit(rounds=1)
    mean = plain.model.trainable_state()
    assert_close(chain.model.trainable_state(), {n: start[n] + lr * (mean[n] - start[n]) for n in start})


def test_an_aggregation_of_ones_own(make_chain):
    """The seam: the last update wins; the weights are exactly that participant's."""

    class Last(Collection):
        name = "last"

        def zero(self, about):
            self.kept = {}

        def add(self, given):
            self.kept = {n: t.clone() for n, t in given.tensors.items()}

        def finish(self):
            return Combined(self.kept)

    chain = make_chain()
    federation(chain, aggregation=Last()).fit(rounds=1)
    assert_equal(chain.model.trainable_state(), trained(make_chain, SHARES["c"], "c"))


def test_fedit_by_name_is_fedavg_on_lora(make_chain):
    one, two = make_chain(lora=True), make_chain(lora=True)
    federation(one, aggregation="fedit").fit(rounds=1)
    federation(two).fit(rounds=1)
    assert_equal(one.model.trainable_state(), two.model.trainable_state())


# --- evaluation -------------------------------------------------------------------------------------------------------


def loss_of(make_chain, pairs, state=None):
    chain = make_chain()
    if state is not None:
        chain.model.load_state(state)
    return evaluate_locally(chain.model, pairs, prompt=chain)


def test_evaluation_on_each_ones_own(battery):
    """Before and after, per participant; pooled over tokens."""
    chain = battery()
    held_out = {"a": PAIRS[8:9], "b": PAIRS[9:]}
    fed = federation(chain, {"a": PAIRS[:4], "b": PAIRS[4:8]}, evaluation=held_out)
    history = fed.fit(rounds=2)
    start, end = battery().model.trainable_state(), chain.model.trainable_state()
    for name, pairs in held_out.items():
        assert history[0].participants[name].held_out_before == pytest.approx(loss_of(battery, pairs, start).loss)
        assert history[1].participants[name].held_out_after == pytest.approx(loss_of(battery, pairs, end).loss)
        assert history[0].participants[name].held_out_after == history[1].participants[name].held_out_before
    pooled = loss_of(battery, [p for pairs in held_out.values() for p in pairs], end)
    assert history[1].held_out_after == pytest.approx(pooled.loss, rel=1e-5)
    assert history[0].held_out_before != history[0].held_out_after == history[1].held_out_before
    result = fed.evaluate(PAIRS[8:])
    assert (result.loss, result.tokens) == (pytest.approx(pooled.loss, rel=1e-5), pooled.tokens)


@pytest.mark.parametrize("drive", ["fit", "train and step"])
def test_evaluation_on_one_set_for_all(drive, make_chain):
    chain = make_chain()
    fed = federation(chain, SHARES if drive == "fit" else None, evaluation=PAIRS[:3])
    if drive == "fit":
        fed.fit(rounds=1)
    else:
        fed.train(PAIRS, 0)
        fed.step()
    record = fed.history[0]
    assert record.held_out_before == pytest.approx(loss_of(make_chain, PAIRS[:3]).loss, rel=1e-6)
    after = loss_of(make_chain, PAIRS[:3], chain.model.trainable_state()).loss
    assert record.held_out_after == pytest.approx(after, rel=1e-6)
    assert record.evaluation_seconds > 0


def test_evaluation_on_each_ones_own_with_train_and_step(make_chain):
    chain = make_chain()
    fed = federation(chain, evaluation={"a": PAIRS[:3]})
    fed.train(SHARES["b"], "b")
    record = fed.step()
    assert record.held_out_before == pytest.approx(loss_of(make_chain, PAIRS[:3]).loss, rel=1e-6)
    after = loss_of(make_chain, PAIRS[:3], chain.model.trainable_state()).loss
    assert record.held_out_after == pytest.approx(after, rel=1e-6)


def test_one_set_for_all_may_be_a_generator(make_chain):
    """It is measured twice a round, and yields once."""
    record = federation(make_chain(), evaluation=(p for p in PAIRS[:3])).fit(rounds=1)[0]
    assert record.held_out_before != record.held_out_after


def test_a_share_held_out_is_never_trained_on(make_chain):
    chain = make_chain()
    pairs = [*PAIRS, *PAIRS[:3]]  # duplicates must not stand on both sides
    fed = federation(chain, {"a": pairs}, evaluation=0.25)
    participant = fed._peers["a"].participant
    train, held_out = ({e.inputs for e in side} for side in (participant.examples, participant.held_out))
    assert not train & held_out
    assert train | held_out == {text for text, _ in PAIRS}
    assert held_out == {text for text, _ in PAIRS if position(TEMPLATE.format(text=text), 0) < 0.25}
    record = fed.fit(rounds=1)[0]
    assert record.participants["a"].examples == len(participant.examples)
    assert record.held_out_after is not None
    twin = federation(make_chain(), {"a": pairs}, evaluation=0.25)
    assert {e.inputs for e in twin._peers["a"].participant.held_out} == held_out
    other = {
        frozenset(e.inputs for e in hold_out(Participant("a", pairs), Split(0.25), chain, s).held_out) for s in range(5)
    }
    assert len(other) > 1


def test_a_share_needs_examples_enough(make_chain):
    with pytest.raises(EmptyParticipantError, match="too few to hold out"):
        federation(make_chain(), {"a": PAIRS[:1]}, evaluation=0.5)
    with pytest.raises(ConfigError, match="DataLoader"):
        federation(make_chain(), {"a": DataLoader([1])}, evaluation=0.5)


def test_held_out_examples_that_cannot_be_used_stop_a_federation_before_it_begins(make_chain):
    chain = make_chain()
    for evaluation in ({"a": [("x", 5)]}, [("x", 5)], {"a": []}, []):
        fed = federation(chain, evaluation=evaluation)
        with pytest.raises(DataError):
            fed.fit(rounds=1)
        assert len(fed.history) == 0


def test_samples_are_what_the_chain_answers(battery):
    chain = battery()
    before = battery().batch([{"text": text} for text, _ in PAIRS[:2]])
    fed = federation(chain, {"a": PAIRS[2:], "b": PAIRS[2:4]}, evaluation={"a": PAIRS[:4]}, samples=2)
    record = fed.fit(rounds=1)[0]
    after = chain.batch([{"text": text} for text, _ in PAIRS[:2]])
    assert [(s.participant, s.prompt, s.reference, s.before, s.after) for s in record.samples] == [
        ("a", chain.render({"text": text}), completion, old, new)
        for (text, completion), old, new in zip(PAIRS[:2], before, after, strict=True)
    ]
    quiet = federation(battery(), {"a": PAIRS[2:]}, evaluation={"a": PAIRS[:4]}, samples=0).fit(rounds=1)[0]
    assert quiet.samples == []


def test_fit_stops_when_the_loss_no_longer_falls(make_chain):
    """A learning rate that changes next to nothing, and an improvement that is never reached."""
    config = FAST.replace(learning_rate=1e-9)
    fed = federation(make_chain(), training=config, evaluation=PAIRS[:3])
    history = fed.fit(rounds=9, patience=2, min_delta=0.1)
    assert len(history) == 2
    assert history.stopped_early == "held-out loss did not improve by 0.1 for 2 rounds"
    assert "stopped early" in repr(history)
    assert "stopped early" in history._repr_html_()
    improving = federation(make_chain(), evaluation=PAIRS)
    assert len(improving.fit(rounds=4, patience=1)) == 4
    losses = [improving.history[0].held_out_before, *(r.held_out_after for r in improving.history)]
    assert losses == sorted(losses, reverse=True)
    assert improving.history.stopped_early is None
    for options in ({"patience": 0}, {"patience": 2}):
        with pytest.raises(ConfigError, match="patience"):
            federation(make_chain()).fit(rounds=2, **options)


# --- learning guards --------------------------------------------------------------------------------------------------


def test_a_zero_update_says_so(make_chain):
    """A rate so small that float32 does not notice."""
    people = [Participant("still", PAIRS[:4], training={"learning_rate": 1e-30}), Participant("b", PAIRS[4:])]
    record = federation(make_chain(), people).fit(rounds=1)[0]
    assert record.participants["still"].update_norm == 0
    assert record.participants["still"].notes == ["its update is zero: nothing was learnt"]
    assert record.participants["still"].cosine_to_mean is None
    assert record.participants["b"].notes == []


def test_equal_updates_say_so(make_chain):
    record = federation(make_chain(), {"a": PAIRS[:4], "b": PAIRS[4:], "copy": PAIRS[:4]}).fit(rounds=1)[0]
    assert record.participants["copy"].notes == ["its update equals 'a''s: the same data or a copied answer"]
    assert record.participants["a"].notes == record.participants["b"].notes == []


def test_untouched_adapter_tensors_say_so(make_chain):
    """With B = 0 everywhere, as PEFT starts, A has no gradient in the first step."""
    chain = make_chain(lora=True)
    state = chain.model.trainable_state()
    chain.model.load_state({n: t * 0 if "lora_B" in n else t for n, t in state.items()})
    history = federation(chain, {"a": PAIRS[:4]}).fit(rounds=2)
    count = sum("lora_A" in n for n in state)
    first = min(n for n in state if "lora_A" in n)
    assert history[0].participants["a"].notes == [f"{count} tensors never changed, such as {first}"]
    assert history[1].participants["a"].notes == []
    assert f"a: {count} tensors never changed" in repr(history)


# --- history ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def history(make_chain):
    return federation(make_chain(), evaluation={"a": PAIRS[:2], "b": PAIRS[2:4]}, participants_per_round=2).fit(
        rounds=3
    )


def test_every_round_shows(history):
    lines = repr(history).splitlines()
    assert lines[0].split()[:2] == ["round", "trained"]
    assert [line.split()[:4] for line in lines[1:]] == [[str(i), "2", "of", "2"] for i in (1, 2, 3)]
    assert f"{history[2].held_out_before:.3f} → {history[2].held_out_after:.3f}" in lines[3]
    assert f"{history[0].train_loss:.3f}" in lines[1]
    table = history._repr_html_()
    assert table.count("<tr>") == 4
    assert table.count("<td>") == 3 * table.count("<th>")
    assert len(history) == 3
    assert [r.round for r in history] == [1, 2, 3]
    assert repr(History()).startswith("round")


def test_html_shows_names_as_text(make_chain):
    people = {"<script>": PAIRS[:4], "b": PAIRS[:4]}
    chain = make_chain()
    fed = federation(chain, people, training=FAST)
    assert "<script>" not in fed.fit(rounds=1)._repr_html_()


def test_a_table_for_pandas(history):
    frame = history.to_pandas()
    assert len(frame) == 9
    assert list(frame["round"]) == [1] * 3 + [2] * 3 + [3] * 3
    row = frame[(frame["round"] == 2) & (frame["participant"] == history[1].trained[0])].iloc[0]
    record = history[1].participants[history[1].trained[0]]
    assert row["train_loss"] == record.train_loss
    assert row["status"] == "trained"


def test_plots(history):
    figure = history.plot()
    left, right = figure.axes
    points = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    for name in "abc":
        wanted = [[r.round, r.participants[name].train_loss] for r in history if name in r.trained]
        assert points.get(name, []) == wanted
    held_out = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert set(held_out) == {"a", "b"}
    assert held_out["a"][0] == [0, history[0].participants["a"].held_out_before]
    assert held_out["a"][-1] == [3, history[2].participants["a"].held_out_after]
    assert left.get_ylabel() == right.get_ylabel() == "nats per token"
    History().plot()


def test_json_there_and_back(history, tmp_path):
    data = json.loads(history.to_json())
    again = History.from_dict(data)
    assert repr(again) == repr(history)
    assert again.to_dict() == history.to_dict() == data
    assert again[0].samples[0].reference == history[0].samples[0].reference
    assert data["rounds"][1]["participants"]["a"]["status"] in ("trained", "idle")
    history.save(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text(encoding="utf-8")) == data


def test_what_json_cannot_say_is_null():
    record = RoundRecord(1, {"a": ParticipantRecord(held_out_after=math.nan)}, update_norm=math.inf, seconds=1.5)
    data = json.loads(History([record]).to_json())["rounds"][0]
    assert data["participants"]["a"]["held_out_after"] is None
    assert data["update_norm"] is None
    assert data["seconds"] == 1.5


def test_records_count_what_happened(battery, monkeypatch):
    """Bytes are those that travelled; norms and losses are computed again from outside."""
    chain = battery()
    fed = federation(chain, training=FAST.replace(epochs=2))
    travelled = {}
    for name, peer in fed._peers.items():
        inner = peer.handle

        def handle(op, payload, name=name, inner=inner):
            answer = inner(op, payload)
            if op == "train":
                travelled[name] = len(payload), len(answer)
            return answer

        monkeypatch.setattr(peer, "handle", handle)
    start = chain.model.trainable_state()
    record = fed.fit(rounds=1)[0]
    for name, pairs in SHARES.items():
        found = record.participants[name]
        assert (found.bytes_down, found.bytes_up) == travelled[name]
        alone = battery()
        result = train_locally(alone.model, pairs, FAST.replace(epochs=2), prompt=alone, participant=name, round=0)
        after = alone.model.trainable_state()
        norm = math.sqrt(sum(float(((after[n] - start[n]).double() ** 2).sum()) for n in start))
        assert found.update_norm == pytest.approx(norm, rel=1e-4)
        assert (found.train_loss, found.steps) == (result.loss, 2)
        assert (found.examples, found.tokens) == (len(pairs), result.tokens)
        assert 0 < found.seconds <= record.seconds
    assert record.bytes_up == sum(up for _, up in travelled.values())
    assert record.bytes_down == sum(down for down, _ in travelled.values())
    size = sum(t.numel() * t.element_size() for t in start.values())
    assert size < travelled["a"][1] < size + 20_000
    end = chain.model.trainable_state()
    norm = math.sqrt(sum(float(((end[n] - start[n]).double() ** 2).sum()) for n in start))
    assert record.update_norm == pytest.approx(norm, rel=1e-4)
    assert record.training_seconds == pytest.approx(sum(r.seconds for r in record.participants.values()))
    assert record.weights_version == chain.model.weights_version
    assert record.train_loss == pytest.approx(sum(r.train_loss for r in record.participants.values()) / 3)


class Line(torch.nn.Module):
    """Three numbers, so that every coordinate counts in the cosine."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.b = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, labels):
        return type("Output", (), {"loss": ((x @ self.w + self.b - labels) ** 2).mean()})


def test_the_cosine_to_the_mean_is_exact_on_a_small_model():
    """cos(w_k − w, Σ n_k/n · w_k − w), by hand; also a bare module, which learns from ready tensors."""
    generator = torch.Generator().manual_seed(3)
    data = {
        n: [
            {"x": torch.randn(2, generator=generator), "labels": torch.randn((), generator=generator)} for _ in range(k)
        ]
        for n, k in (("a", 2), ("b", 5), ("c", 3))
    }
    module = Line()
    w0 = torch.cat([module.w.detach(), module.b.detach()]).double()
    loaders = {n: DataLoader(rows, batch_size=16) for n, rows in data.items()}
    fed = FederatedAveraging(module, participants=loaders, optimizer="sgd", lr=0.1, progress=False)
    record = fed.fit(rounds=1)[0]
    deltas = {}
    for name, rows in data.items():
        x = torch.stack([torch.cat([r["x"], torch.ones(1)]) for r in rows]).double()
        y = torch.stack([r["labels"] for r in rows]).double()
        deltas[name] = -0.1 * 2 * x.T @ (x @ w0 - y) / len(rows)
    mean = sum(len(data[n]) / 10 * deltas[n] for n in data)
    for name, delta in deltas.items():
        cosine = float(delta @ mean / (delta.norm() * mean.norm()))
        assert record.participants[name].cosine_to_mean == pytest.approx(cosine, abs=1e-4)
        assert record.participants[name].update_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert record.update_norm == pytest.approx(float(mean.norm()), rel=1e-4)
    torch.testing.assert_close(
        torch.cat([module.w.detach(), module.b.detach()]).double(), w0 + mean, rtol=1e-5, atol=1e-6
    )


def test_progress_is_shown_and_can_be_switched_off(make_chain, capfd):
    federation(make_chain(), progress=False).fit(rounds=1)
    assert capfd.readouterr() == ("", "")
    federation(make_chain(), progress=True).fit(rounds=2)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d in: a, b, c\n", shown.err)
    assert re.search(r" round 2 of 2 · 3 of 3 trained · train loss \d\.\d+ · up / down .* seconds\n", shown.err)
    assert "federating" not in shown.err, "a log file gets lines, and no bar that is drawn over itself"


def test_a_federation_shows_what_it_is(make_chain):
    fed = federation(make_chain(), {f"p{i}": PAIRS for i in range(6)})
    assert repr(fed).endswith("6 participants (p0, p1, p2, p3, …), 0 rounds completed)")
    with pytest.raises(ConfigError, match="unknown option `rounds`"):
        FederatedLearning(make_chain(), [PAIRS], rounds=3)


def test_what_became_of_the_examples_can_be_read(make_chain):
    fed = federation(make_chain(), {"a": [*PAIRS, ("x", ""), PAIRS[0]], "b": PAIRS[:2]})
    fed.fit(rounds=1)
    assert (fed.data_reports["a"].used, fed.data_reports["a"].empty, fed.data_reports["a"].duplicate) == (13, 1, 1)
    assert fed.data_reports["b"].used == 2


def test_the_first_generator_of_examples_is_read_once(make_chain):
    """Participants may hand over a generator; it serves all rounds."""
    history = federation(make_chain(), {"a": (p for p in PAIRS[:4]), "b": PAIRS[4:]}).fit(rounds=2)
    assert [r.participants["a"].examples for r in history] == [4, 4]


@pytest.mark.parametrize("options", [{}, {"personal": Ditto(), "codec": "int8", "broadcast_codec": "int8"}])
def test_a_federation_that_is_let_go_takes_its_copies_of_the_weights_along(options, make_chain, tmp_path):
    """At once, not when a collector of cycles comes by: a copy is as large as the model."""
    chain = make_chain(lora=True)
    fed = federation(chain, checkpoint_dir=tmp_path, **options)
    gc.collect()
    gc.disable()
    try:
        fed.fit(1)
        kept = [weakref.ref(fed._server.broadcast), weakref.ref(fed._server), weakref.ref(fed)]
        del fed
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()
