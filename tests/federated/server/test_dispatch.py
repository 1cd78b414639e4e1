"""Deadline, quorum, retries and absence in the round loop: scripted answers in place of participants' trouble.

Belongs here: who is asked, how often, and what becomes of silence. Does not: processes (test_server, test_nvflare).
"""

import time

import pytest
from scripted import BROKEN, CUT, REFUSED, SHARES, TRAINING, federation, statuses

from llmchain_fed import (
    ConfigError,
    DeadlineError,
    FederatedAveraging,
    QuorumError,
)
from llmchain_fed.federated.client import joining, training
from llmchain_fed.federated.server import dispatch


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "_PAUSE", 0.01)


def test_a_site_that_refuses_by_its_policy_is_left_out_of_the_round_and_asked_again_in_the_next(make_chain):
    fed, transport = federation(make_chain, {"train": {"b": [REFUSED]}}, retries=2, quorum=2)
    fed.fit(2)
    assert [s["b"] for s in statuses(fed)] == ["failed", "trained"]
    assert "refused by site: policy.max_steps" in fed.history[0].participants["b"].reason
    assert fed.history[0].trained == ["a", "c"]
    assert transport.asked.count(("train", "b")) == 2, "once a round, whatever `retries` says"


def test_a_site_that_refuses_to_join_is_asked_once_a_round_and_a_quorum_without_it_is_told(make_chain):
    fed, transport = federation(make_chain, {"hello": {"b": [REFUSED] * 9}}, retries=2, quorum=3)
    with pytest.raises(QuorumError, match=r"b: refused by site: policy\.max_steps"):
        fed.fit(1)
    assert transport.asked.count(("hello", "b")) == 1
    fed, transport = federation(make_chain, {"hello": {"b": [REFUSED]}}, retries=2, quorum=2)
    fed.fit(2)
    assert [s["b"] for s in statuses(fed)] == ["absent", "trained"]
    assert fed.history[0].participants["b"].reason.startswith("PolicyError: refused by site: policy.max_steps")


def test_who_joins_again_with_other_counts_is_noted(make_chain, monkeypatch):
    fed, transport = federation(make_chain, {"train": {"b": [None, CUT]}}, retries=0)
    fed.fit(2)
    peer = transport.local["b"]
    introduction = joining.introduction

    def more(client, config):
        said = introduction(client, config)
        if client is not peer:
            return said
        report = said.report | {"used": 4000, "completion_tokens": 36_000}
        return said.model_copy(update={"num_examples": 4000, "num_tokens": 36_000, "report": report})

    monkeypatch.setattr(joining, "introduction", more)
    fed.fit(1)
    notes = fed.history[-1].participants["b"].notes
    assert "joined with 4 examples before, and with 4000 now" in notes, (notes, fed.history[-1].participants["b"])


def test_who_is_absent_at_the_start_joins_a_later_round(make_chain):
    fed, transport = federation(make_chain, {"hello": {"b": [CUT]}})
    fed.fit(2)
    assert statuses(fed) == [
        {"a": "trained", "c": "trained", "b": "absent"},
        {"a": "trained", "b": "trained", "c": "trained"},
    ]
    assert fed.history[0].participants["b"].reason == "TransportError: the cable is out"
    assert transport.asked.count(("hello", "a")) == 1


def test_without_retries_a_missing_update_is_missing(make_chain):
    fed, transport = federation(make_chain, {"train": {"b": [CUT], "c": [BROKEN]}})
    fed.fit(2)
    assert statuses(fed)[0] == {"a": "trained", "b": "absent", "c": "failed"}
    assert statuses(fed)[1] == {"a": "trained", "b": "trained", "c": "trained"}
    assert transport.asked.count(("hello", "b")) == 2, "one that was away is told anew how to train"


def test_retries_ask_again_those_who_were_missing_and_nobody_else(make_chain):
    fed, transport = federation(make_chain, {"train": {"b": [CUT, BROKEN], "c": [BROKEN]}}, retries=2)
    fed.fit(1)
    assert set(statuses(fed)[0].values()) == {"trained"}
    assert [n for op, n in transport.asked if op == "train"] == ["a", "b", "c", "b", "c", "b"]


def test_a_late_update_is_dropped_recorded_and_not_asked_for_again(make_chain):
    fed, transport = federation(make_chain, {"train": {"b": [DeadlineError("too slow")]}}, retries=2, deadline=60)
    before = fed.get_model().model.trainable_state()
    fed.fit(1)
    assert statuses(fed)[0]["b"] == "late"
    assert transport.asked.count(("train", "b")) == 1
    alone = make_chain(lora=True)
    alone.model.load_state(before)
    two = {n: SHARES[n] for n in "ac"}
    FederatedAveraging(alone, participants=two, training=TRAINING, progress=False).fit(1)
    ours, theirs = fed.get_model().model.trainable_state(), alone.model.trainable_state()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-6


def test_a_participant_gives_up_by_itself_when_the_deadline_is_over(make_chain, monkeypatch):
    inner = training.train_locally

    def slow(*args, before_step, **options):
        def step():
            if options["participant"] == "b":
                time.sleep(2.0)
            before_step()

        return inner(*args, before_step=step, **options)

    monkeypatch.setattr(training, "train_locally", slow)
    chain = make_chain(lora=True)
    fed = FederatedAveraging(chain, participants=SHARES, training=TRAINING, deadline=1.5, progress=False)
    fed.fit(1)
    assert statuses(fed)[0] == {"a": "trained", "b": "late", "c": "trained"}
    assert "'b' was not done in time" in fed.history[0].participants["b"].reason
    assert "b: late" in repr(fed.history)


def test_a_quorum_that_joins_late_is_waited_for_as_often_as_retries_say(make_chain):
    fed, _ = federation(make_chain, {"hello": {"b": [CUT, CUT], "c": [CUT, CUT]}}, quorum=3, retries=2)
    fed.fit(1)
    assert set(statuses(fed)[0].values()) == {"trained"}
    fed, _ = federation(make_chain, {"hello": {"b": [CUT, CUT], "c": [CUT, CUT]}}, quorum=3, retries=1)
    before = fed.get_model().model.weights_hash
    with pytest.raises(QuorumError, match=r"round 1 has 1 participants, the quorum is 3 \(b: the cable is out; c: the"):
        fed.fit(1)
    assert fed.get_model().model.weights_hash == before
    assert len(fed.history) == fed.round == 0
    fed.fit(1)  # the same object goes on when they are back
    assert fed.history[0].trained == ["a", "b", "c"]


def test_a_round_below_its_quorum_changes_nothing_and_keeps_earlier_rounds(make_chain):
    fed, _ = federation(make_chain, {"train": {"b": [None, CUT], "c": [None, BROKEN]}}, quorum=2)
    with pytest.raises(QuorumError, match=r"round 2 has 1 usable updates, the quorum is 2 \(b: TransportError: the"):
        fed.fit(3)
    kept = fed.get_model().model.weights_hash
    assert len(fed.history) == 1
    assert fed.history[0].weights_version.endswith(kept)


def test_sampling_chooses_among_those_who_are_there(make_chain):
    fed, transport = federation(make_chain, {"hello": {"a": [CUT] * 9}}, participants_per_round=2)
    fed.fit(3)
    for record in statuses(fed):
        assert record == {"b": "trained", "c": "trained", "a": "absent"}
    assert ("train", "a") not in transport.asked


def test_a_count_larger_than_who_is_there_asks_them_all(make_chain):
    """It was valid when the federation began; the quorum says whether those are enough."""
    fed, _ = federation(make_chain, {"hello": {"a": [CUT] * 9, "b": [CUT] * 9}}, participants_per_round=2)
    fed.fit(2)
    for record in statuses(fed):
        assert record == {"c": "trained", "a": "absent", "b": "absent"}
    assert fed.plan(3).participants == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"deadline": 0}, "`deadline`: Input should be greater than 0"),
        ({"deadline": float("nan")}, "`deadline`: Input should be a finite number"),
        ({"deadline": True}, "`deadline`: Input should be a valid number"),
        ({"deadline": "60"}, "`deadline`: Input should be a valid number"),
        ({"retries": -1}, "`retries`: Input should be greater than or equal to 0"),
        ({"retries": 1.5}, "`retries`: Input should be a valid integer"),
        ({"retry": 1}, "unknown option `retry`; did you mean `retries`"),
    ],
)
def test_options_that_make_no_sense(options, wanted, make_chain):
    with pytest.raises(ConfigError, match=wanted):
        FederatedAveraging(make_chain(), participants=SHARES, **options)
