"""A federation that diverges says so, and stops where that was asked for.

Belongs here: when a loss counts as running away, what is said of it and what `fit` does then. Does not: `patience`
while a loss merely stands still (test_averaging, test_resuming).
"""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_work import does
from resumed_runs import Elsewhere, Interrupt, assert_same
from tiny import PAIRS
from tqdm import tqdm

from llmchain_fed import ConsoleTable, FederatedAveraging, TrainingConfig
from llmchain_fed.errors import ConfigError, QuorumError
from llmchain_fed.federated.callbacks import notes_of
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.server import evaluation
from llmchain_fed.federated.server.divergence import Divergence
from llmchain_fed.federated.server.evaluation import Measurement
from llmchain_fed.training.evaluation import evaluate_as

SHARES = {"a": PAIRS[:5], "b": PAIRS[5:9]}
HELD_OUT = {"a": PAIRS[9:11], "b": PAIRS[10:]}
GENTLE = TrainingConfig(optimizer="sgd", learning_rate=0.01, batch_size=4)
WILD = GENTLE.replace(learning_rate=20.0, max_grad_norm=1.0)


def federation(chain, participants=SHARES, **options):
    given_ = {"training": WILD, "evaluation": HELD_OUT, "samples": 0, "progress": False}
    return FederatedAveraging(chain, participants=participants, **(given_ | options))


def said(record) -> list[str]:
    return [note for note in record.notes if note.startswith("diverged")]


def naively(first: float, after: list[float]) -> list[int]:
    """The rounds, from 1, that end two in a row above 1.5 times the least loss before them."""
    far = [loss > 1.5 * min([first, *after[:k]]) for k, loss in enumerate(after)]
    return [k + 1 for k in range(1, len(after)) if far[k] and far[k - 1]]


# --- what counts ------------------------------------------------------------------------------------------------------

losses_ = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.4, 1.5, 1.6, 2.0, 2.4, 3.0, 1e300]), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(first=st.sampled_from([0.9, 1.0, 2.0]), after=losses_, cut=st.integers(0, 9))
def test_two_rounds_above_one_and_a_half_times_the_best(first, after, cut):
    """Also where another watch goes on from the history as JSON, and for a participant's own loss as for all."""
    watch, history, found = Divergence(), History(), []
    before = first
    for number, loss in enumerate(after, 1):
        if number == cut:
            watch, history = Divergence(), History.from_dict(json.loads(history.to_json()))
        own = ParticipantRecord("trained", held_out_before=before, held_out_after=loss)
        record = RoundRecord(number, {"a": own}, held_out_before=before, held_out_after=loss)
        why = watch.look(history, record, Measurement(own={"a": {"loss": loss, "tokens": 3}}))
        assert bool(why) == bool(own.notes)
        found += [number] if why else []
        history.append(record)
        before = loss
    assert found == naively(first, after)


def look(rounds):
    """What is said of rounds given as {participant: (before, after)}, the pooled loss being their mean."""
    watch, history, found = Divergence(), History(), []
    for number, losses in enumerate(rounds, 1):
        records = {n: ParticipantRecord("trained", held_out_before=b, held_out_after=a) for n, (b, a) in losses.items()}
        before, after = (sum(pair[side] for pair in losses.values()) / len(losses) for side in (0, 1))
        record = RoundRecord(number, records, held_out_before=before, held_out_after=after)
        own = {n: {"loss": a, "tokens": 1} for n, (_, a) in losses.items()}
        found.append(watch.look(history, record, Measurement(own=own)))
        history.append(record)
    return found, history


def test_who_comes_back_with_harder_examples_is_no_divergence():
    """`b` is away for a round: the loss of `a` alone is not what both are measured by."""
    both, alone = {"a": (1.0, 1.0), "b": (4.0, 4.0)}, {"a": (1.0, 1.0)}
    assert look([both, alone, both, both, both])[0] == [None] * 5


def test_a_participants_own_loss_may_diverge_while_all_together_improve():
    found, history = look([{"a": (4.0, 3.0), "b": (1.0, 2.0)}, {"a": (3.0, 2.0), "b": (2.0, 2.5)}])
    assert found == [None, None]
    note = "its held-out loss 2.5, for 2 rounds in a row above 1.5 × the best (1 before round 1)"
    assert [r.notes for r in history[1].participants.values()] == [[], [note]]
    assert history[0].participants["b"].notes == []


def test_other_members_are_measured_anew():
    """With other members, or data, the loss is over other examples: no loss of before says anything about it."""
    watch, history = Divergence(), History()
    for number, (before, after) in enumerate([(1.0, 1.0), (5.0, 4.9), (4.9, 4.8)], 1):
        own = ParticipantRecord("trained", held_out_before=before, held_out_after=after)
        record = RoundRecord(number, {"a": own}, held_out_before=before, held_out_after=after)
        record.members_changed = number == 2
        assert watch.look(history, record, Measurement(own={"a": {"loss": after, "tokens": 1}})) is None
        assert own.notes == []
        history.append(record)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("marked", [True, False])
def test_a_loss_that_is_not_finite(bad, marked):
    value = {"not_finite": True, "error": "…"} if marked else {"loss": bad, "tokens": 2}
    good = {"loss": 1.0, "tokens": 2}

    def why(after):
        return Divergence().look(History(), RoundRecord(1, {}), after)

    assert why(Measurement(shared=value)).startswith("diverged: the held-out loss is not finite.")
    assert why(Measurement(own={"a": value, "b": value})).startswith("diverged: the held-out loss of a, b is not")
    assert why(Measurement(own={"a": good, "b": value})).startswith("diverged: the held-out loss of b is not")
    assert "loss of 0, 1, 2 and 5 more is not" in why(Measurement(own={str(k): value for k in range(8)}))
    assert why(Measurement(own={"a": value}, shared=good)) is None, "what all are measured by is finite"
    assert why(Measurement(own={"a": good, "b": good})) is None
    assert why(Measurement(own={"a": {"error": "gone"}})) is None


# --- what fit does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated", [HELD_OUT, PAIRS[9:]], ids=["each", "shared"])
def test_a_rate_that_is_far_too_high_is_said_at_once_and_goes_on(evaluated, make_chain, monkeypatch):
    lines, out = [], io.StringIO()
    monkeypatch.setattr(tqdm, "write", lambda said, **_: lines.append(said))
    fed = federation(make_chain(), evaluation=evaluated, progress=True, callbacks=[ConsoleTable(out)])
    history = fed.fit(rounds=4)
    assert len(history) == 4
    assert history.stopped_early is None
    after = [record.held_out_after for record in history]
    expected = naively(history[0].held_out_before, after)
    assert expected, f"the rate was meant to be too high: {after}"
    assert [record.round for record in history if said(record)] == expected
    for record in history:
        for text in (str(record), next(line for line in lines if f" round {record.round} of 4 · " in line)):
            assert ("diverged: held-out loss" in text) == (record.round in expected)
    for text in (repr(history), history._repr_html_(), out.getvalue()):
        assert f"{after[expected[0] - 1]:.4g}" in text
        assert "rounds in a row above 1.5 × the best" in text
    note = said(history[expected[0] - 1])[0]
    assert note in notes_of(history[expected[0] - 1])
    again = History.from_dict(json.loads(history.to_json()))
    assert [record.notes for record in again] == [record.notes for record in history]
    table = history.to_pandas()
    assert [note in notes for notes in table[table["round"] == expected[0]]["round_notes"]] == [True, True]


def test_each_participants_own_losses_are_followed(make_chain):
    fed = federation(make_chain())
    fed.fit(rounds=4)
    for name in SHARES:
        records = [record.participants[name] for record in fed.history]
        noted = [k for k, r in enumerate(records, 1) if any(n.startswith("its held-out loss") for n in r.notes)]
        assert noted == naively(records[0].held_out_before, [r.held_out_after for r in records])


def test_stop_ends_after_the_round_that_diverges_with_its_weights(make_chain):
    straight, fed = federation(make_chain()), federation(make_chain())
    straight.fit(rounds=4)
    first = next(record.round for record in straight.history if said(record))
    assert first < 4
    history = fed.fit(rounds=4, on_divergence="stop")
    assert len(history) == first
    assert history.stopped_early == said(history[-1])[0] == said(straight.history[first - 1])[0]
    assert f"stopped early: {history.stopped_early}" in repr(history)
    whole = federation(make_chain())
    whole.fit(rounds=first, on_divergence="stop")
    assert whole.history.stopped_early is None, "no round was left"
    assert said(whole.history[-1])
    for twin in (fed, whole):
        other = federation(make_chain())
        other.fit(rounds=first)
        for name, tensor in other._server.model.trainable_state().items():
            assert torch.equal(tensor, twin._server.model.trainable_state()[name])


def test_nothing_is_said_of_one_that_learns(make_chain):
    fed = federation(make_chain(), training=GENTLE)
    history = fed.fit(rounds=4, on_divergence="stop")
    assert len(history) == 4
    assert all(record.notes == [] for record in history)


@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(at, make_chain, tmp_path):
    straight = federation(make_chain())
    straight.fit(rounds=6, on_divergence="stop")
    assert at < straight.round < 6
    fed = federation(make_chain(), checkpoint_dir=tmp_path, callbacks=[Interrupt(at)])
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=6, on_divergence="stop")
    again = FederatedAveraging.resume(tmp_path, make_chain(), participants=SHARES, evaluation=HELD_OUT, progress=False)
    again.fit(rounds=6 - at, on_divergence="stop")
    assert_same(again, straight)
    assert again.history.stopped_early == straight.history.stopped_early


def test_rolled_back_what_followed_is_forgotten(make_chain, tmp_path):
    fed = federation(make_chain(), checkpoint_dir=tmp_path, keep_checkpoints=None)
    fed.fit(rounds=4, on_divergence="stop")
    then, stopped = fed.round, fed.history.stopped_early
    fed.roll_back(to=1)
    assert not said(fed.history[-1])
    fed.fit(rounds=4, on_divergence="stop")
    assert (fed.round, fed.history.stopped_early) == (then, stopped)


def test_the_hub_decides_for_participants_elsewhere(make_chain):
    straight = federation(make_chain())
    straight.fit(rounds=4, on_divergence="stop")
    sites = federation(make_chain())._peers
    fed = federation(make_chain(), None, runtime=Elsewhere(sites), evaluation=None)
    fed.fit(rounds=4, on_divergence="stop")
    assert fed.history.stopped_early == straight.history.stopped_early
    assert [r.notes for r in fed.history] == [r.notes for r in straight.history]


def test_step_notes_it_too(make_chain):
    fed, straight = federation(make_chain()), federation(make_chain())
    straight.fit(rounds=4)
    for _ in range(4):
        for name, pairs in SHARES.items():
            fed.train(pairs, name)
        fed.step()
    assert [r.notes for r in fed.history] == [r.notes for r in straight.history]
    assert any(said(r) for r in fed.history)


# --- not finite -------------------------------------------------------------------------------------------------------


def not_finite_from(fed, names: str, number: int, monkeypatch) -> None:
    """Participants' held-out losses are none from the end of a round on."""
    inner = fed._server.evaluator.measure

    def measure(transport, broadcast, joined, completed, timeout=None):
        found = inner(transport, broadcast, joined, completed, timeout)
        own = {n: {"not_finite": "nan", "tokens": 2} if n in names and completed >= number else v
               for n, v in found.own.items()}  # fmt: skip
        return replace(found, own=own)

    monkeypatch.setattr(fed._server.evaluator, "measure", measure)


@pytest.mark.parametrize(("names", "of"), [("ab", "of a, b"), ("b", "of b")])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_loss_that_is_no_longer_finite_stops(names, of, elsewhere, make_chain, monkeypatch):
    fed = federation(make_chain(), training=GENTLE)
    if elsewhere:
        fed = federation(make_chain(), None, training=GENTLE, evaluation=None, runtime=Elsewhere(fed._peers))
    not_finite_from(fed, names, 2, monkeypatch)
    history = fed.fit(rounds=5, on_divergence="stop")
    assert len(history) == 2
    assert history[0].notes == []
    assert history.stopped_early == f"diverged: the held-out loss {of} is not finite. Lower the learning rate"
    assert history[1].notes == [history.stopped_early]
    fed.fit(rounds=2)
    assert len(history) == 4
    assert [record.notes for record in history][1:] == [history[1].notes] * 3


def test_a_shared_loss_that_is_not_finite(make_chain, monkeypatch):
    fed = federation(make_chain(), training=GENTLE, evaluation=PAIRS[9:])
    fed.fit(rounds=1)
    inner = evaluate_as

    def broken(*given_, **options):
        found = inner(*given_, **options)
        return type(found)(math.inf, found.tokens, found.examples)

    monkeypatch.setattr(evaluation, "evaluate_as", broken)
    history = fed.fit(rounds=3, on_divergence="stop")
    assert len(history) == 2
    assert history.stopped_early == history[-1].notes[0]
    assert "not finite" in history.stopped_early
    json.loads(history.to_json())


def test_training_that_is_finite_for_nobody_fails_the_round_or_stops(make_chain):
    """There is no update then, so no round to record: by default the error stays what it was."""
    chain = make_chain()
    fed = federation(chain, training=GENTLE.replace(learning_rate=1e30, max_steps=3, epochs=None))
    before = chain.model.trainable_state()
    for choice in ({}, {"on_divergence": "warn"}):
        with pytest.raises(QuorumError):
            fed.fit(rounds=3, **choice)
    history = fed.fit(rounds=3, on_divergence="stop")
    assert len(history) == 0
    assert history.stopped_early.startswith("diverged: nobody's training stayed finite")
    for name, tensor in chain.model.trainable_state().items():
        assert torch.equal(tensor, before[name])


def test_another_failure_is_still_an_error(make_chain, monkeypatch):
    fed = federation(make_chain(), training=GENTLE)
    for peer in fed._peers.values():
        does(monkeypatch, peer, lambda *_: 1 / 0)
    with pytest.raises(QuorumError, match="ZeroDivisionError"):
        fed.fit(rounds=2, on_divergence="stop")
    assert fed.history.stopped_early is None


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["Stop", "", None, True, 1, ["stop"]])
def test_what_is_none_of_both_is_refused(choice, make_chain):
    fed = federation(make_chain())
    with pytest.raises(ConfigError, match=r"on_divergence is 'warn' .* or 'stop'"):
        fed.fit(rounds=1, on_divergence=choice)
    assert fed.round == 0


def test_stop_needs_something_that_is_measured(make_chain):
    with pytest.raises(ConfigError, match="on_divergence='stop' needs evaluation="):
        federation(make_chain(), evaluation=None).fit(rounds=1, on_divergence="stop")
    federation(make_chain(), evaluation=None, training=GENTLE).fit(rounds=1, on_divergence="warn")


@pytest.mark.parametrize(
    ("patience", "delta", "wanted"),
    [
        (1, 1.0, "held-out loss did not improve by 1.0 for 1 round"),
        (2, 1.0, "held-out loss did not improve by 1.0 for 2 rounds"),
    ],
)
def test_patience_says_so_only_where_rounds_were_left(patience, delta, wanted, make_chain):
    fed = federation(make_chain(), training=GENTLE)
    fed.fit(rounds=patience + 1, patience=patience, min_delta=delta)
    assert (fed.round, fed.history.stopped_early) == (patience, wanted)
    whole = federation(make_chain(), training=GENTLE)
    whole.fit(rounds=patience, patience=patience, min_delta=delta)
    assert (whole.round, whole.history.stopped_early) == (patience, None)


def test_without_a_least_improvement_none_is_named(make_chain):
    fed = federation(make_chain())
    fed.fit(rounds=6, patience=1)
    assert fed.round < 6
    assert fed.history.stopped_early == "held-out loss did not improve for 1 round"
