"""The seam between the loop and where participants work, as somebody who writes a runtime of their own meets it.

Belongs here: what a `Runtime` says and what follows from it. Does not: the runtimes of the package (runtimes/).
"""

import gc
import queue
import threading
import weakref

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import ConfigError, DataError, FederatedAveraging, Participant, Runtime, TrainingConfig
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess, payload_for
from llmchain_fed.federated.target import Target

SHARES = {"a": PAIRS[:4], "b": PAIRS[4:8], "c": PAIRS[8:]}
ADAM = TrainingConfig(optimizer="adam", learning_rate=1e-2, batch_size=4)


class Threads(Runtime):
    """A runtime of one's own: every participant works in a thread, on a model that nobody else has."""

    def __init__(self, clients):
        self._tasks = {name: queue.Queue() for name in clients}
        self._answers = queue.Queue()
        for name, client in clients.items():
            threading.Thread(target=self._work, args=(name, client), daemon=True).start()

    def _work(self, name, client):
        while (task := self._tasks[name].get()) is not None:
            try:
                self._answers.put((name, client.handle(*task)))
            except Exception as error:
                self._answers.put((name, error))

    def nodes(self):
        return list(self._tasks)

    def call(self, op, nodes, payload, timeout=None):
        asked = list(nodes)
        for node in asked:
            self._tasks[node].put((op, payload_for(payload, node)))
        found = dict(self._answers.get(timeout=60) for _ in asked)
        yield from ((node, found[node]) for node in asked)

    def close(self):
        for tasks in self._tasks.values():
            tasks.put(None)


def federation(chain, participants=SHARES, **options):
    return FederatedAveraging(chain, participants=participants, **{"training": ADAM, "progress": False} | options)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(got[n], wanted[n])] == []


@pytest.mark.parametrize("options", [{}, {"codec": "int8", "broadcast_codec": "int8"}, {"aggregation": "flora"}])
def test_a_runtime_of_ones_own_says_two_things_and_learns_the_same(options, make_chain):
    """Who there is and how a call is carried; all else has a default, and the weights are equal to the bit."""
    clients = {n: Client(Target.of(make_chain(lora=True)), Participant(n, x), None) for n, x in SHARES.items()}
    here, there, runtime = make_chain(lora=True), make_chain(lora=True), Threads(clients)
    federation(here, **options).fit(3)
    fed = federation(there, None, runtime=runtime, **options)
    assert fed.fit(3)[-1].trained == ["a", "b", "c"]
    assert_equal(there.model.trainable_state(), here.model.trainable_state())
    runtime.close()


def test_who_runs_elsewhere_is_nobody_that_train_could_work_on(make_chain):
    runtime = Threads({"x": None})
    with pytest.raises(ConfigError, match="not both"):
        federation(make_chain(), runtime=runtime)
    with pytest.raises(ConfigError, match="use fit"):
        federation(make_chain(), None, runtime=runtime).train(PAIRS, "a")
    assert (runtime.local, runtime.leads, runtime.replicated, runtime.sequential) == ({}, True, False, False)
    runtime.close()


class Noting(InProcess):
    """This process, noting who is asked for what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def call(self, op, nodes, payload, timeout=None):
        nodes = list(nodes)
        self.calls += [(op, node) for node in nodes]
        return super().call(op, nodes, payload, timeout)


def test_train_goes_the_way_of_every_call(make_chain):
    """So whatever a runtime does to calls it does to those of `train`, the first of a newcomer included."""
    chain, twin, runtime = make_chain(), make_chain(), Noting()
    fed = federation(chain, None, runtime=runtime)
    for _ in range(2):
        for name, pairs in SHARES.items():
            fed.train(pairs, name)
        fed.step()
    assert runtime.calls == [("train", name) for name in SHARES] * 2
    federation(twin).fit(2)
    assert_equal(chain.model.trainable_state(), twin.model.trainable_state())


def test_a_newcomer_whose_training_fails_takes_no_part(make_chain):
    runtime = Noting()
    fed = federation(make_chain(), None, runtime=runtime)
    with pytest.raises(DataError):
        fed.train([], "a")
    assert runtime.calls == [("train", "a")]
    assert runtime.nodes() == []


def test_of_a_strangers_curve_nothing_stays(make_chain):
    """Who is there, what they are known to have and what they are sent next is as if none had been drawn."""
    fed = federation(make_chain(lora=True))
    fed.fit(1)
    broadcast = fed._server.broadcast
    fed._server.publish()
    known = dict(broadcast._known), dict(broadcast._ranks), broadcast.number, set(fed.attendance.standings)
    fed.adaptation_curve(Participant("new", PAIRS[:5], held_out=PAIRS[5:8], rank=2), steps=(0, 1))
    assert (dict(broadcast._known), dict(broadcast._ranks), broadcast.number, set(fed.attendance.standings)) == known
    assert fed._runtime.nodes() == list(SHARES)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_federation_that_is_let_go_leaves_no_copy_of_the_weights(by_hand, lora, make_chain, tmp_path):
    """At once, without the garbage collector, which may not come for as long as the next model is loaded."""
    fed = federation(make_chain(lora=lora), evaluation=PAIRS[:3], checkpoint_dir=tmp_path)
    fed.fit(1)
    if by_hand:
        fed.train(PAIRS[:4], "a")  # and its round is open
    broadcast = fed._server.broadcast
    kept = [fed, fed._server, broadcast, *broadcast._values.values(), *fed._peers.values()]
    references = [weakref.ref(thing) for thing in kept]
    gc.collect()
    gc.disable()
    try:
        del fed, broadcast, kept
        assert [reference() for reference in references if reference() is not None] == []
    finally:
        gc.enable()
