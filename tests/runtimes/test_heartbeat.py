"""Heartbeats of ranks over a store in this process: who is seen to live, for how long not, and what is left as a word.

Belongs here: the store, the times. Does not: messages, real ranks (test_torch_distributed).
"""

import threading
import time

import pytest
import torch.distributed as dist

from llmchain_fed.runtimes import heartbeat
from llmchain_fed.runtimes.aside import Aside
from llmchain_fed.runtimes.heartbeat import Heartbeat


@pytest.fixture
def beating(monkeypatch):
    """`beating(store, rank, watched)`, a hundred times as fast."""
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    monkeypatch.setattr(heartbeat, "_TICK", 0.01)
    made = []

    def make(*args, **options):
        made.append(Heartbeat(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_a_rank_is_silent_from_its_last_beat_on_and_one_that_is_not_watched_never(beating):
    store = dist.HashStore()
    leader, follower = beating(store, 0, [1]), beating(store, 1, [0])
    time.sleep(0.5)
    assert leader.silent(1) < 0.4
    assert follower.silent(0) < 0.4
    follower.close()
    assert until(lambda: leader.silent(1) > 0.4)
    assert leader.silent(2) == 0
    assert leader.unanswered < 0.4


def test_a_store_that_fails_is_said_once_and_not_at_a_jobs_end(beating):
    store, said, gone = dist.HashStore(), [], [False]
    failing = []

    class Failing:
        def __getattr__(self, name):
            if failing:
                raise dist.DistNetworkError("reset")
            return getattr(store, name)

    leader = beating(Failing(), 0, [1], failed=said.append)
    other = beating(Failing(), 1, [0], gone=lambda: gone[0], failed=said.append)
    gone[0] = True
    failing.append(True)
    assert until(lambda: leader._closed.is_set() and other._closed.is_set())
    assert list(map(str, said)) == ["reset"]
    assert leader.silent(1) == 0, "nobody is watched from now on"


def test_the_store_does_not_grow_with_time(beating):
    store = dist.HashStore()
    beating(store, 0, [1])
    beating(store, 1, [0])
    time.sleep(0.2)
    keys = store.num_keys()
    assert until(lambda: store.add("beat/0", 0) > 15)
    assert store.num_keys() == keys


class Stuck:
    """A store whose host is frozen: it takes a request, and never answers."""

    def __init__(self):
        self.frozen, self.inner = threading.Event(), dist.HashStore()

    def __getattr__(self, name):
        if self.frozen.is_set():
            time.sleep(30)
        return getattr(self.inner, name)


def test_a_store_that_does_not_answer_is_seen_and_nobody_waits_for_it(beating, monkeypatch):
    monkeypatch.setattr(heartbeat, "_ASKING", 0.1)
    store = Stuck()
    watch = beating(store, 0, [1])
    assert until(lambda: watch.unanswered < 0.2)
    store.frozen.set()
    assert until(lambda: watch.unanswered > 0.3)
    began = time.monotonic()
    watch.stop("over")
    assert watch.word_of(1) is None
    assert time.monotonic() - began < 5


def test_a_process_that_was_stopped_itself_calls_nobody_silent_for_that(beating, monkeypatch):
    """An hour later by the clock, one tick by its own waking time."""

    class Clock:
        def __init__(self):
            self.ahead = 0.0

        def monotonic(self):
            return time.monotonic() + self.ahead

    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    watch = beating(dist.HashStore(), 0, [1])
    time.sleep(0.2)
    clock.ahead = 3600.0
    time.sleep(0.3)
    assert 0.2 < watch.silent(1) < 10


def test_why_it_is_over_and_why_somebody_left_can_be_read(beating):
    store = dist.HashStore()
    leader, follower = beating(store, 0, [1]), beating(store, 1, [0])
    assert follower.stopped is None
    assert leader.word_of(1) is None
    follower.leave_word("DataError: no\nsuch \x1b file")
    assert leader.word_of(1) == "DataError: no\\nsuch \\x1b file"
    leader.stop("x" * 5000)
    assert until(lambda: follower.stopped is not None)
    why, ago = follower.stopped
    assert (len(why), ago < 5) == (2000, True)


def test_where_the_host_has_gone_nothing_is_asked_any_more(beating):
    gone, store = threading.Event(), Stuck()
    watch = beating(store, 0, [1], gone=gone.is_set)
    time.sleep(0.1)
    gone.set()
    time.sleep(0.2)
    store.frozen.set()
    began = time.monotonic()
    assert watch.word_of(1) is None
    assert (watch.silent(1), watch.unanswered) == (0, 0)
    assert time.monotonic() - began < 1


def test_a_call_aside_gives_back_what_it_returns_or_raises_and_is_known_while_it_runs():
    may = threading.Event()
    slow = Aside(lambda: may.wait(30))
    assert not slow.over(0.05)
    before = len(Aside.left_behind())
    may.set()
    assert slow.over(10)
    assert slow.result() is True
    assert len(Aside.left_behind()) == before - 1
    failed = Aside(lambda: {}["x"])
    assert failed.over(10)
    with pytest.raises(KeyError):
        failed.result()
