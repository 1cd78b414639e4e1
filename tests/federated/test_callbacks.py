"""Callbacks in the loop: who is told what and when, and what an error in one of them does.

Belongs here: FederatedAveraging's side. Does not: what trackers write (test_trackers).
"""

import io

import pytest
import torch
from other_work import does
from tiny import PAIRS

from llmchain_fed import Callback, ConfigError, ConsoleTable, FederatedAveraging, TensorBoard, TrainingConfig
from llmchain_fed.federated.checkpoint import files

SHARES = {"a": PAIRS[:5], "b": PAIRS[5:]}
SGD = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=8)


class Watch(Callback):
    def __init__(self, name="watch", log=None, fails=None):
        self.name, self.log, self.fails = name, log if log is not None else [], fails

    def _note(self, what, *details):
        self.log.append((self.name, what, *details))
        if self.fails == what:
            raise OSError(f"{self.name} lost its disk")

    def on_fit_begin(self, run):
        self.run = run
        self._note("begin", run.start_round, run.rounds, run.participants)

    def on_round_end(self, record, history):
        assert history[-1] is record
        self._note("round", record.round)

    def on_fit_end(self, history):
        self._note("end", len(history))

    def on_error(self, error):
        self._note("error", type(error).__name__)


def federation(chain, **options):
    options = {"participants": SHARES, "training": SGD, "progress": False} | options
    return FederatedAveraging(chain, **options)


def test_a_fit_is_told_from_beginning_to_end(make_chain):
    watch = Watch()
    fed = federation(make_chain(lora=True), callbacks=[watch], aggregation="ffa", codec="int8")
    fed.fit(2)
    fed.fit(1)
    assert [entry[1:] for entry in watch.log] == [
        ("begin", 0, 2, ("a", "b")), ("round", 1), ("round", 2), ("end", 2),
        ("begin", 2, 1, ("a", "b")), ("round", 3), ("end", 3),
    ]  # fmt: skip
    options = watch.run.options
    assert (options["aggregation"], options["codec"], options["training.learning_rate"]) == ("ffa", "int8", 0.05)
    assert options["fingerprint"] == fed._server.model.fingerprint()


def test_several_are_told_in_their_order_and_one_alone_needs_no_list(make_chain):
    log = []
    federation(make_chain(), callbacks=[Watch("x", log), Watch("y", log)]).fit(1)
    assert [entry[0] for entry in log] == ["x", "y"] * 3
    federation(make_chain(), callbacks=Watch("z", log)).fit(1)
    assert log[-1][0] == "z"


def test_a_round_is_on_disk_before_anybody_hears_of_it(make_chain, tmp_path):
    class Reads(Callback):
        def on_round_end(self, record, history):
            assert files.rounds(tmp_path / "run")[-1] == record.round
            seen.append(record.round)

    seen = []
    federation(make_chain(lora=True), callbacks=[Reads()], checkpoint_dir=tmp_path / "run").fit(2)
    assert seen == [1, 2]


def test_an_error_of_the_loop_is_told_and_raised(make_chain, monkeypatch):
    watch = Watch()
    fed = federation(make_chain(), callbacks=[watch])
    fed.fit(1)

    def interrupt(*_):
        raise KeyboardInterrupt

    does(monkeypatch, fed._peers["b"], interrupt)
    with pytest.raises(KeyboardInterrupt):
        fed.fit(1)
    assert watch.log[-1][1:] == ("error", "KeyboardInterrupt")
    assert fed.round == 1


@pytest.mark.parametrize("where", ["begin", "round", "end"])
def test_a_callback_that_fails_costs_no_round(where, make_chain):
    log = []
    chain, twin = make_chain(), make_chain()
    fed = federation(chain, callbacks=[Watch("good", log), Watch("bad", log, fails=where)])
    with pytest.raises(OSError, match="bad lost its disk"):
        fed.fit(1)
    completed = 0 if where == "begin" else 1
    assert fed.round == len(fed.history) == completed
    if completed:
        federation(twin).fit(1)
    assert all(torch.equal(t, twin.model.trainable_state()[n]) for n, t in chain.model.trainable_state().items())
    ends = [entry for entry in log if entry[1] in ("end", "error")]
    assert sorted(name for name, *_ in ends) == ["bad", "good"]


def test_a_callback_that_fails_twice_does_not_hide_the_first_error(make_chain, monkeypatch):
    class Worse(Callback):
        def on_error(self, error):
            raise ValueError("and I as well")

    fed = federation(make_chain(), callbacks=[Worse()])
    monkeypatch.setattr("llmchain_fed.federated.fit.run_round", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        fed.fit(1)
    assert "and I as well" in caught.value.__notes__[0]


@pytest.mark.parametrize("given", [print, [print], "tensorboard", [Callback]])
def test_what_is_no_callback_is_refused(given, make_chain):
    with pytest.raises(ConfigError, match="callbacks are objects of Callback"):
        federation(make_chain(), callbacks=given)


def test_a_table_and_a_real_tracker_in_one_run(make_chain, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = io.StringIO()
    callbacks = [ConsoleTable(text), TensorBoard(tmp_path / "runs")]
    fed = federation(make_chain(lora=True), callbacks=callbacks, evaluation=0.3, aggregation="fedit")
    history = fed.fit(2)
    assert "held-out" in text.getvalue()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    gaps = [event.value for event in events.Scalars("aggregation_gap")]
    assert gaps == pytest.approx([r.aggregation_gap for r in history], rel=1e-5)
    assert [event.step for event in events.Scalars("held_out/after")] == [1, 2]
