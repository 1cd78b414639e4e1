"""What rounds are judged by: the best is kept, patience goes by it, and callbacks may stop.

Belongs here: monitor, keep, patience over metrics, Stop. Does not: what is measured (test_metrics_in_rounds).
"""

import json
import math
import shutil
import threading

import pytest
import torch
from resumed_runs import SGD, SHARES, weights_of
from sites import SocketTransport, answering
from tiny import PAIRS

from llmchain_fed import (
    Callback,
    ConfigError,
    Ditto,
    FedAdam,
    FederatedAveraging,
    History,
    Metric,
    Participant,
    Policy,
    Site,
    Stop,
    TrainingConfig,
)
from llmchain_fed.errors import CheckpointError, FederationError
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
from llmchain_fed.federated.measures.monitor import Monitored, Patience

SCORES = [0.1, 0.5, 0.9, 0.4, 0.2, 0.3, 0.3, 0.3]


class Scripted:
    """Makes federations whose pooled metric `score` is given: at the start, then after each round."""

    def __init__(self, make_chain, scores=SCORES, **options):
        self.calls = 0
        self.scores = scores

        def score(predictions, references, inputs):
            return {"score": self.now()}

        parts = [Participant("a", PAIRS[:4], held_out=PAIRS[8:9]), Participant("b", PAIRS[4:8], held_out=PAIRS[9:10])]
        self.options = {"training": SGD, "progress": False, "samples": 0, "answer_tokens": 1, **options}
        self.chain, self.parts = make_chain(lora=True), parts
        self.metric = Metric(score, maximize=True)
        self.fed = None

    def now(self):
        at = self.fed.round + self.after
        return self.scores[at if self.after else self.fed.history.kept or at]  # of a round's weights, whenever

    after = 0

    def made(self, **options):
        self.fed = FederatedAveraging(
            self.chain, participants=self.parts, metrics=[self.metric], **(self.options | options)
        )
        return self._watched(self.fed)

    def resumed(self, folder, **options):
        self.fed = FederatedAveraging.resume(
            folder, self.chain, participants=self.parts, metrics=[self.metric], progress=False, **options
        )
        return self._watched(self.fed)

    def _watched(self, fed):
        """`now` is asked before a round counts: the measurement after it belongs to the next number."""
        server = fed._server
        measure = server.measure

        def measuring(completed):
            self.after = completed - server.round
            try:
                return measure(completed)
            finally:
                self.after = 0

        server.measure = measuring
        return fed


@pytest.fixture
def make(make_chain):
    return lambda scores=SCORES, **options: Scripted(make_chain, scores, **options)


def test_the_best_rounds_weights_are_kept_bit_for_bit_as_going_back_to_it(make, tmp_path):
    kept, other = make(), make()
    fed = kept.made()
    history = fed.fit(rounds=5, monitor="score", keep="best")
    assert [record.metrics["score"] for record in history] == pytest.approx(SCORES[1:6])
    assert (fed.best, fed.best.round, history.kept, fed.round) == (history[1], 2, 2, 5)
    back = other.made(checkpoint_dir=tmp_path, keep_checkpoints=None)
    back.fit(rounds=5)
    back.roll_back(2)
    ours, theirs = weights_of(fed), weights_of(back)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert kept.chain.batch([x for x, _ in PAIRS]) == other.chain.batch([x for x, _ in PAIRS])
    assert "the chain has the weights of round 2, the best by score" in repr(history)
    assert "the best by score" in history._repr_html_()


def test_the_last_is_kept_by_default_and_the_best_known_all_the_same(make):
    fed, other = make().made(), make().made()
    fed.fit(rounds=4, monitor="score")
    other.fit(rounds=4)
    assert fed.best is fed.history[1]
    assert fed.history.kept is None
    ours, theirs = weights_of(fed), weights_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other.best.held_out_after == min(record.held_out_after for record in other.history)


def test_the_untrained_start_is_no_candidate_and_of_equals_the_first_is_best(make):
    fed = make([0.9, 0.2, 0.5, 0.5, 0.1]).made()
    fed.fit(rounds=4, monitor="score", keep="best")
    assert fed.best.round == 2


def test_the_best_by_loss_is_the_lowest(make):
    fed = make().made()
    history = fed.fit(rounds=3, keep="best")
    assert fed.best is min(history, key=lambda record: record.held_out_after)


@pytest.mark.parametrize("options", [
    {"personal": Ditto(lam=0.5)}, {"aggregation": "fedsa"}, {"server_optimizer": FedAdam(lr=0.05)}, {"codec": "int8"},
    {"aggregation": "fedex"}, {"broadcast_codec": "int8"},
], ids=lambda options: "-".join(map(str, options.values()))[:20])  # fmt: skip
def test_what_belongs_to_a_round_goes_back_with_it(make, tmp_path, options):
    """Personal models, private factors, remainders and the server optimizer's memory, as going back has them."""
    fed, back = make(**options).made(), make(**options).made(checkpoint_dir=tmp_path)
    fed.fit(rounds=4, monitor="score", keep="best")
    back.fit(rounds=2)
    back.roll_back(2)
    ours, theirs = weights_of(fed), weights_of(back)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(fed._server.model.adapters) == sorted(back._server.model.adapters)
    for name, client in fed._server.runtime.local.items():
        own, wanted = (c.progress.before(5)[1] for c in (client, back._server.runtime.local[name]))
        for kind, tensors in own.kept().items():
            assert all(torch.equal(tensors[n], t) for n, t in wanted.kept()[kind].items()), kind
    if "server_optimizer" in options:
        memory, wanted = (f._server.settings.server_optimizer.state_dict()[0] for f in (fed, back))
        assert memory
        assert all(torch.equal(memory[n], t) for n, t in wanted.items())
    fed.fit(rounds=1)  # and it goes on from there
    assert fed.history[-1].participants["a"].status == "trained"
    assert "begins at the weights of round 2, the best by score (0.9)" in fed.history[-1].notes


def test_a_fit_after_it_goes_on_from_the_best_and_compares_with_it(make):
    fed = make([0.1, 0.5, 0.9, 0.4, 0.2, 0.3, 0.95, 0.1]).made()
    fed.fit(rounds=3, monitor="score", keep="best")
    at_best = weights_of(fed)
    fed.fit(rounds=2, monitor="score", keep="best")
    assert fed.best.round == 2
    assert all(torch.equal(value, weights_of(fed)[name]) for name, value in at_best.items())
    fed.fit(rounds=2, monitor="score", keep="best")
    assert (fed.best.round, fed.history.kept) == (6, 6)


def test_a_round_whose_weights_are_gone_is_no_candidate(make):
    fed = make().made()
    fed.fit(rounds=3, monitor="score")  # keeps the last: round 2 is gone
    fed.fit(rounds=2, monitor="score", keep="best")
    assert (fed.best.round, fed.history.kept) == (3, 3)


def test_an_interrupted_run_keeps_the_best_of_before_and_ends_with_it(make, tmp_path):
    whole = make()
    fed = whole.made()
    fed.fit(rounds=6, monitor="score", keep="best")

    class Dies(Callback):
        def on_round_begin(self, number, asked):
            if number == 6:
                raise KeyboardInterrupt

    first = make().made(checkpoint_dir=tmp_path, keep_checkpoints=2, callbacks=[Dies()])
    with pytest.raises(KeyboardInterrupt):
        first.fit(rounds=6, monitor="score", keep="best")
    assert sorted(int(p.name[-6:]) for p in tmp_path.glob("round-*")) == [2, 4, 5]  # the best stays
    later = make()
    went_on = later.resumed(tmp_path)
    assert went_on.best.round == 2
    history = went_on.fit(rounds=1, monitor="score", keep="best")
    assert (went_on.best.round, history.kept, went_on.round) == (2, 2, 6)
    ours, theirs = weights_of(went_on), weights_of(fed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = make().resumed(tmp_path)  # the newest checkpoint has what the chain was left with
    assert (again.history.kept, again.best.round) == (2, 2)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(again).items())


def test_patience_goes_by_what_is_monitored(make):
    fed = make([0.1, 0.5, 0.9, 0.4, 0.2, 0.3]).made()
    history = fed.fit(rounds=5, monitor="score", patience=2, keep="best")
    assert len(history) == 4
    assert history.stopped_early == "score did not improve for 2 rounds"
    assert history.kept == 2


def test_patience_that_ends_with_the_last_round_stops_nothing_early(make):
    fed = make([0.5, 0.4, 0.3]).made()
    assert fed.fit(rounds=2, monitor="score", patience=2).stopped_early is None


def test_patience_counts_towards_the_better_side():
    def record(number, before, after):
        people = {"a": ParticipantRecord("trained", metrics={"m": after}, metrics_before={"m": before})}
        return RoundRecord(number, people, metrics={"m": after}, metrics_before={"m": before})

    up, down = Monitored("m", maximize=True), Monitored("m")
    rising = [record(n, n, n + 1.0) for n in range(1, 4)]
    assert not any(waiting.over(each) for waiting in [Patience(1, 0.0, monitored=up)] for each in rising)
    waiting = Patience(2, 0.0, monitored=down)
    assert [waiting.over(each) for each in rising] == [False, True, True]
    assert Patience(1, 2.0, monitored=up).over(rising[0])  # by less than min_delta
    unknown = RoundRecord(4, {}, metrics={})
    assert not Patience(1, 0.0, monitored=up).over(unknown)


def lossy(number, before, after, pool=None):
    """A round after which each participant has this held-out loss; the pool is their mean."""
    people = {n: ParticipantRecord("trained") for n in before.keys() | after.keys()}
    for name, person in people.items():
        person.held_out_before, person.held_out_after = before.get(name), after.get(name)
    means = [sum(side.values()) / len(side) for side in (before, after)]
    return RoundRecord(number, people, held_out_before=means[0], held_out_after=means[1] if pool is None else pool)


def test_a_round_that_is_worse_than_the_best_counts_though_it_is_better_than_the_one_before():
    losses = [6.0, 5.797, 6.110, 5.362, 5.931, 5.766, 5.371]
    rounds = [lossy(n, {"a": losses[n - 1]}, {"a": losses[n]}) for n in range(1, 7)]
    waiting = Patience(2, 0.0)
    assert [waiting.over(record) for record in rounds] == [False, False, False, False, True, True]
    assert str(waiting) == "held-out loss did not improve for 3 rounds"
    again = Patience(2, 0.0, state=(1, 3), history=rounds)  # interrupted after round 4, of which the third was best
    assert again.state() == [1, 3]
    assert again.over(rounds[4])


def test_values_are_compared_over_the_same_participants():
    """Who is away, or could not measure, makes a round neither better nor worse."""
    first = lossy(1, {"easy": 2.0, "hard": 9.0}, {"easy": 1.0, "hard": 8.0})
    alone = lossy(2, {"easy": 1.0, "hard": 8.0}, {"easy": 1.1})  # better than 4.5, by who is missing
    third = lossy(3, {"easy": 1.1}, {"easy": 0.9, "hard": 7.0})
    other = lossy(4, {"new": 1.0}, {"new": 0.1})
    monitored = Monitored()
    assert monitored.best(History([first, alone])) is first
    assert monitored.best(History([first, alone, third])) is third
    assert monitored.best(History([first, other])) is first
    waiting = Patience(1, 0.0)
    assert [waiting.over(record) for record in (first, alone)] == [False, True]
    waiting = Patience(2, 0.0)
    assert [waiting.over(record) for record in (first, alone, third, other)] == [False] * 4
    assert waiting.state() == [0, 3]
    assert Monitored(shared=True).best(History([first, alone])) is alone  # all on one set


def test_the_best_is_sought_where_values_are_over_the_same_members():
    rounds = [RoundRecord(n, {}, held_out_after=value) for n, value in enumerate((1.0, 2.0, 1.5, math.nan), 1)]
    rounds[1].members_changed = True
    assert Monitored().best(History(rounds)).round == 3
    assert Monitored().best(History(rounds[:1])).round == 1
    assert Monitored("m").best(History(rounds)) is None


@pytest.mark.parametrize(
    ("metrics", "monitor", "said"),
    [
        ([], "accuracy", "no participant computes it: unknown value 'accuracy'; Known: held_out_loss"),
        (["exact_match"], "exact_mach", "did you mean 'exact_match'"),
        ([lambda p, r, i: {"mine": 1.0}], "yours", "Known: held_out_loss, mine"),
        ([lambda p, r, i: {"mine": 1.0}], "mine", "which way is better"),
        ([lambda p, r, i: 1 / 0], "lambda", "ZeroDivisionError"),
        (["exact_match"], 3, "held_out_loss"),
    ],
)
def test_a_monitor_that_nobody_computes_is_one_error_and_nothing_has_changed(make_chain, metrics, monitor, said):
    chain = make_chain(lora=True)
    before = chain.model.weights_hash
    parts = [Participant(n, rows, held_out=PAIRS[:2]) for n, rows in SHARES.items()]
    fed = FederatedAveraging(chain, participants=parts, training=SGD, metrics=metrics, progress=False, samples=0)
    with pytest.raises(ConfigError, match=said):
        fed.fit(rounds=2, monitor=monitor, keep="best")
    assert (chain.model.weights_hash, len(fed.history), fed.best) == (before, 0, None)


@pytest.mark.parametrize("options", [{"keep": "best"}, {"monitor": "held_out_loss", "keep": "worst"}])
def test_keep_needs_something_to_go_by(make_chain, options):
    fed = FederatedAveraging(make_chain(), participants=SHARES, training=SGD, progress=False)
    with pytest.raises(ConfigError, match="keep"):
        fed.fit(rounds=1, **options)


def test_what_the_first_measurement_cost_stands_in_the_first_round(make):
    fed = make().made()
    record = fed.fit(rounds=1, monitor="score")[0]
    plain = make().made().fit(rounds=1)[0]
    assert record.participants["a"].evaluation_bytes == plain.participants["a"].evaluation_bytes


def test_what_was_best_and_kept_is_in_the_json(make):
    fed = make().made()
    history = fed.fit(rounds=4, monitor="score", keep="best")
    again = History.from_dict(json.loads(history.to_json()))
    assert (again.monitor, again.best, again.kept) == ("score", 2, 2)


# --- callbacks ------------------------------------------------------------------------------------------------------


class StopsAt(Callback):
    def __init__(self, number, said):
        self.number, self.said, self.ended = number, said, []

    def on_round_end(self, record, history):
        return self.said if record.round == self.number else None

    def on_fit_end(self, history):
        self.ended.append(history.stopped_early)


def test_a_callback_stops_training_with_a_reason(make_chain):
    one, two = StopsAt(2, Stop("the budget is spent")), StopsAt(9, None)
    fed = FederatedAveraging(make_chain(), participants=SHARES, training=SGD, progress=False, callbacks=[two, one])
    history = fed.fit(rounds=5)
    assert len(history) == 2
    assert history.stopped_early == "the budget is spent"
    assert one.ended == two.ended == ["the budget is spent"]
    assert fed.fit(rounds=1).stopped_early is None  # and it may go on


def test_a_stop_at_the_last_round_stops_nothing_early(make_chain):
    callback = StopsAt(2, Stop("enough"))
    fed = FederatedAveraging(make_chain(), participants=SHARES, training=SGD, progress=False, callbacks=[callback])
    assert fed.fit(rounds=2).stopped_early is None


@pytest.mark.parametrize("said", [True, "enough", Stop])
def test_what_looks_like_a_stop_and_is_none_is_said(make_chain, said):
    callback = StopsAt(1, said)
    fed = FederatedAveraging(make_chain(), participants=SHARES, training=SGD, progress=False, callbacks=[callback])
    with pytest.raises(ConfigError, match=r"return Stop\(reason\)"):
        fed.fit(rounds=2)
    assert fed.round == 1  # the round itself is kept


def test_a_stop_ends_with_the_best_too(make):
    scripted = make()
    fed = scripted.made(callbacks=[StopsAt(4, Stop("enough"))])
    history = fed.fit(rounds=6, monitor="score", keep="best")
    assert (len(history), history.kept, history.stopped_early) == (4, 2, "enough")


def test_a_checkpoint_that_has_the_bests_weights_is_not_taken_for_its_own_rounds(make, tmp_path):
    """The last round of a fit that kept the best was as good by another value, and its weights are gone."""
    made = make()
    fed = made.made(checkpoint_dir=tmp_path, keep_checkpoints=None)
    history = fed.fit(3, monitor="score", keep="best")
    assert history.kept == 2
    best, losses = weights_of(fed), [record.held_out_after for record in history]
    assert losses[2] < losses[1], "what makes the test one"
    fed.fit(1, keep="best")
    assert history.best == 4
    with pytest.raises(CheckpointError, match="the weights of round 2"):
        fed.promote(3)
    fed.roll_back(3)
    assert (same(best, weights_of(fed)), fed.history.kept) == (True, 2)
    fed.fit(1)
    fed.history.best = 3  # as a value would have it by which round 3 was the best
    now = weights_of(fed)
    with pytest.raises(FederationError, match="the weights of round 3"):
        fed.load_best()
    assert same(now, weights_of(fed))


@pytest.mark.parametrize("told", [True, False])
def test_participants_elsewhere_go_back_with_the_best_round_or_the_record_says_who_did_not(make_chain, tmp_path, told):
    """A kept optimizer and the place in the data belong to a round as its weights do."""
    parts = [Participant("a", PAIRS[:7], held_out=PAIRS[8:]), Participant("b", PAIRS[1:8], held_out=PAIRS[8:10])]
    how = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=1, keep_optimizer=True)
    now = [0]

    def score(predictions, references, inputs):
        return {"score": [0.0, 0.9, 0.1, 0.1, 0.1][now[0]]}

    def watched(fed):
        measure = fed._server.measure
        fed._server.measure = lambda completed: (now.__setitem__(0, completed), measure(completed))[1]
        return fed

    paths = {}
    operations = [*Policy().operations, *(["personal_state"] if told else [])]
    policy = Policy(metrics=["score"], operations=operations, min_examples_per_update=1, min_batch_size=1)
    for part in parts:
        site = Site(make_chain(lora=True), part, metrics={"score": score}, policy=policy)
        threading.Thread(target=site.serve, args=(tmp_path / part.name,), daemon=True).start()
        paths[part.name] = answering(tmp_path / part.name)
    options = {"training": how, "progress": False, "samples": 0, "answer_tokens": 1}
    metric = Metric(score, maximize=True)
    here = watched(FederatedAveraging(make_chain(lora=True), participants=parts, metrics=[metric], **options))
    named = Metric("score", maximize=True)
    there = watched(
        FederatedAveraging(make_chain(lora=True), runtime=SocketTransport(paths), metrics=[named], **options)
    )
    for fed in (here, there):
        fed.fit(3, monitor="score", keep="best")
        assert fed.history.kept == 1
    said = "a, b did not say where they stood in round 1, and go on from the last"
    assert (said in there._server.round_notes) == (not told)
    here.fit(1)
    there.fit(1)
    ours, theirs = weights_of(here), weights_of(there)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert (apart <= 1e-5) == told


def test_values_over_other_held_out_examples_than_before_begin_anew(make_chain, tmp_path):
    """The weights that a resumed run begins with were measured before: another value of them is another measure."""
    how = TrainingConfig(learning_rate=2e-2, batch_size=4)

    def resumed(evaluation, folder):
        shutil.copytree(tmp_path / "run", folder)
        return FederatedAveraging.resume(
            folder, make_chain(lora=True), participants=SHARES, evaluation=evaluation, progress=False
        )

    first = FederatedAveraging(
        make_chain(lora=True), participants=SHARES, evaluation=PAIRS[:4], training=how, progress=False,
        checkpoint_dir=tmp_path / "run",
    )  # fmt: skip
    history = first.fit(3, keep="best", patience=5)
    assert history.best == 3
    again = resumed(PAIRS[:4], tmp_path / "same")
    again.fit(1, keep="best", patience=5)
    assert not [note for record in again.history for note in record.notes if "begin anew" in note]
    other = resumed([(x, "zz qq " + y) for x, y in PAIRS[8:]], tmp_path / "other")
    found = other.fit(2, keep="best", patience=2)
    assert [any("begin anew" in note for note in record.notes) for record in found] == [False] * 3 + [True, False]
    losses = {record.round: record.held_out_after for record in found.rounds[3:]}
    assert found.best == min(losses, key=losses.get)
    assert found.stopped_early is None


def same(some, other):
    return some.keys() == other.keys() and all(torch.equal(some[name], other[name]) for name in some)


def test_the_best_rounds_weights_are_loaded_when_they_are_asked_for(make, tmp_path):
    """After a fit that kept the last, from a checkpoint; where they are gone it says so, and nothing has changed."""
    made = make()
    fed = made.made(checkpoint_dir=tmp_path / "run", keep_checkpoints=None)
    with pytest.raises(FederationError, match="no round has been measured"):
        fed.load_best()
    fed.fit(2, monitor="score")
    best = weights_of(fed)
    fed.fit(1, monitor="score")
    assert (fed.best.round, fed.history.kept) == (2, None)
    assert not same(best, weights_of(fed))
    assert fed.load_best() is fed.history[1]
    assert (fed.history.kept, fed.round, len(fed.history)) == (2, 3, 3)
    assert same(best, weights_of(fed))
    assert fed.load_best().round == 2
    resumed = make().resumed(tmp_path / "run")
    assert same(best, weights_of(resumed))
    assert resumed.history.kept == 2
    gone = make().made()
    gone.fit(3, monitor="score")
    before = weights_of(gone)
    with pytest.raises(FederationError, match="keep='best'"):
        gone.load_best()
    assert same(before, weights_of(gone))
    assert gone.history.kept is None


def test_rounds_by_hand_count_for_the_best_and_a_callbacks_word_stands_in_the_history(make_chain):
    """`step()` judges a round as `fit` does; to end the loop is the caller's."""

    class After(Callback):
        def on_round_end(self, record, history):
            return Stop("two are enough") if record.round == 2 else None

    fed = FederatedAveraging(make_chain(), evaluation=PAIRS[8:], training=SGD, progress=False, callbacks=After())
    for number in (1, 2):
        fed.train(PAIRS[:4], "a")
        record = fed.step()
        assert fed.history.stopped_early == ("two are enough" if number == 2 else None)
        losses = [each.held_out_after for each in fed.history]
        assert fed.best.held_out_after == min(losses)
        assert record.round == number
    assert fed.history.monitor == "held_out_loss"
    plain = FederatedAveraging(make_chain(), training=SGD, progress=False)
    plain.train(PAIRS[:4], "a")
    plain.step()
    assert (plain.best, plain.history.monitor) == (None, None)
