"""Frames from every side: whatever a site, a bridge or a rank says is a value of the documented type or one error.

Belongs here: heads and bodies between hub, bridge, peer and ranks, and who pays for a slow or lying one. Does not:
sockets and keys (test_sockets), the engine (test_who_calls).
"""

import contextlib
import functools
import itertools
import json
import os
import threading
import time

import pytest
import torch
from bounded import bounded, within
from corpus import frames as corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import untrusted
from llmchain_fed.errors import DeadlineError, FederationError, LLMChainFedError, ParticipantError, PolicyError
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.runtimes import rank_messages
from llmchain_fed.runtimes.messaging import chunked_calls, frames, heads
from llmchain_fed.runtimes.messaging.chunked_calls import AnswerSizes
from llmchain_fed.runtimes.nvflare.link import Link
from llmchain_fed.runtimes.process_group import Group
from llmchain_fed.runtimes.rank_messages import RankMessages
from llmchain_fed.runtimes.site.log import NOBODY, SiteLog
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer
from llmchain_fed.runtimes.torch_distributed import TorchDistributed

MB = 2**20
FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
values = st.sampled_from(corpus.NONSENSE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
KEYS = [
    "do",
    "call",
    "op",
    "offset",
    "total",
    "wait",
    "caller",
    "bytes",
    "count",
    "state",
    "error",
    "node",
    "done",
    "x",
]
any_head = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
bytes_of_any_kind = st.one_of(
    st.binary(max_size=200),
    st.tuples(any_head, st.binary(max_size=20)).map(lambda p: corpus.framed(json.dumps(p[0]), p[1])),
    st.tuples(any_head, st.sampled_from(["ping", "put", "poll", "get", "drop", "carry", "refused"])).map(
        lambda p: corpus.framed(json.dumps(p[0] | {"do": p[1]}))
    ),
)


def told(error):
    """An error's message is short, can be shown and written, and quotes no control characters."""
    text = str(error)
    assert len(text) < 2500
    assert untrusted.printable(text, 4000) == text
    text.encode("utf-8")
    return text


class Echo:
    def handle(self, op, payload):
        return payload

    def give_up(self):
        pass

    def take_up(self):
        pass

    def obey(self, limits):
        pass


def site(policy=None):
    return SiteServer(Echo(), policy or Policy(error_messages=True), Audit(None))


@functools.cache
def honest_site(process):
    """One for all calls of a process: each has a thread that stays."""
    return site()


count = itertools.count()


def still_works(of):
    """A call in two slices goes through."""
    call = f"honest{next(count)}"
    put = {"do": "put", "call": call, "op": "train", "total": 4}
    carry = {"do": "carry", "caller": "server"}
    of.answer(frames.pack(carry, frames.pack(put | {"offset": 0}, b"ab")))
    of.answer(frames.pack(carry, frames.pack(put | {"offset": 2}, b"cd")))
    reply, body = heads.read_reply(of.answer(frames.pack({"do": "poll", "call": call, "wait": 5.0})))
    assert (reply.state, bytes(body)) == ("done", b"abcd")


# --- a site ---------------------------------------------------------------------------------------------------------


def answered(of, frame):
    with within(3):
        reply, _ = heads.read_reply(of.answer(frame))
    if isinstance(reply, heads.Failed):
        told(reply.error.message)
    return reply


@bounded(seconds=60, megabytes=300)
def test_a_site_answers_whatever_it_is_sent_with_one_frame_and_goes_on():
    of = site()
    for frame in corpus.no_frames():
        reply = answered(of, frame)
        assert isinstance(reply, heads.Failed), frame[:80]
        assert reply.error.type == "TransportError"
    for number, frame in enumerate(corpus.requests()):
        answered(of, frame)
        if number % 20 == 0:
            still_works(of)
    still_works(of)


@bounded(seconds=60, megabytes=300)
def test_heads_of_any_kind_get_one_answer_from_a_site():
    of = site()

    @FUZZ
    @given(bytes_of_any_kind)
    def check(frame):
        answered(of, frame)

    check()
    still_works(of)


def test_a_head_with_a_field_that_is_none_of_its_own_is_refused():
    put = {"do": "put", "call": "c", "op": "train", "offset": 0, "total": 1}
    for change in ({"extra": 1}, {"caller": "server"}, {"offset": True}, {"total": 1.0}, {"call": "x" * 65}):
        reply = answered(site(), frames.pack(put | change))
        assert reply.error.type == "TransportError", change
        assert next(iter(change)) in reply.error.message


def test_a_note_of_the_bridge_and_a_callers_name_are_printable_in_the_audit_file(tmp_path):
    of = SiteServer(Echo(), Policy(), Audit(tmp_path / "audit.jsonl"))
    reply = answered(of, frames.pack({"do": "refused", "caller": "\x1b[2J\u202eb", "bytes": 7, "count": 3}))
    assert reply.state == "noted"
    (line,) = [json.loads(text) for text in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (line["status"], line["caller"], line["bytes_in"]) == ("refused", "\\x1b[2J\\u202eb", 7)


def test_a_hub_cannot_ask_how_a_site_stands(tmp_path):
    """Its name, paths, refusals and counts are its operator's: what comes through the bridge never reaches them."""
    about = NOBODY | {"name": "St-Josef", "audit": "/srv/secret", "contract": {"base": "1e1c"}}
    of = SiteServer(Echo(), Policy(), Audit(tmp_path / "audit.jsonl"), SiteLog(lambda _: None, about))
    asked = frames.pack({"do": "status"})
    assert heads.read_status(of.answer(asked)).name == "St-Josef"
    for count, caller in enumerate(("server", "b", "St-Josef"), 1):
        carry = {"do": "carry", "caller": caller}
        for frame in (frames.pack(carry, asked), frames.pack(carry, frames.pack(carry, asked))):
            answer = of.answer(frame)
            head, body = frames.read(answer)
            assert (list(head), head["error"]["type"], bytes(body)) == (["error"], "TransportError", b"")
            assert not any(text in answer for text in (b"Josef", b"secret", b"1e1c"))
        lines = [json.loads(text) for text in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [line["status"] for line in lines] == ["malformed"] * (2 * count)


# --- the hub --------------------------------------------------------------------------------------------------------


class Nodes:
    """An exchange over sites in this process; `liars` answer what a function says."""

    def __init__(self, honest=("b",), **liars):
        self.sites, self.liars, self.asked = {n: honest_site(os.getpid()) for n in honest}, liars, []

    def __call__(self, nodes, frame, seconds):
        found = []
        for node in nodes:
            self.asked.append((node, frames.read(frame)[0]["do"]))
            lie = self.liars.get(node)
            found.append((node, lie(frames.read(frame)[0]) if lie else self.sites[node].answer(frame)))
        return found


def call(nodes, payload=b"payload", timeout=None, patience=1.0, expected=None, names=("a", "b")):
    calls = chunked_calls.ChunkedCalls(nodes, patience)
    if expected is not None:
        calls.expect(expected)
    with within(20):
        return dict(calls.call("train", list(names), payload, timeout))


def lied(answer):
    """What a lying site comes to: bytes, or one error of ours that stays a participant's own."""
    if isinstance(answer, bytes):
        return
    assert type(answer).__name__ in ("TransportError", "ParticipantError", "DeadlineError", "PolicyError"), answer
    told(answer)


@bounded(seconds=90, megabytes=400)
def test_a_site_that_answers_nonsense_is_its_own_error_and_the_others_are_heard():
    chunked_calls._POLL = 0.05
    for reply in corpus.replies():
        for lie in (lambda head, r=reply: r, lambda head, r=reply: r if head["do"] != "put" else frames.pack(WAITING)):
            found = call(Nodes(a=lie), timeout=1.0)
            lied(found["a"])
            assert found["b"] == b"payload"


WAITING = {"state": "waiting"}


@bounded(seconds=90, megabytes=400)
def test_replies_of_any_kind_are_a_value_or_one_error_at_the_hub():
    chunked_calls._POLL = 0.02

    @FUZZ
    @given(bytes_of_any_kind, bytes_of_any_kind)
    def check(first, second):
        lie = {"put": frames.pack(WAITING), "poll": first, "get": second, "drop": second}
        found = call(Nodes(a=lambda head: lie[head["do"]]), timeout=1.0)
        lied(found["a"])
        assert found["b"] == b"payload"

    check()


@pytest.mark.parametrize(("total", "expected"), [(20 * MB, 1000), (60 * MB, 17 * MB), (10**15, None), (2**62, 2**20)])
def test_an_answer_larger_than_what_was_asked_for_is_refused_before_it_is_fetched(total, expected):
    nodes = Nodes(a=lambda head: frames.pack({"state": "done", "total": total} if head["do"] == "poll" else WAITING))
    found = call(nodes, expected=expected)
    assert isinstance(found["a"], ParticipantError)
    assert f"wants to answer with {total:,} bytes where at most" in str(found["a"])
    assert ("a", "get") not in nodes.asked
    assert ("a", "drop") in nodes.asked, "it need not keep it"
    assert found["b"] == b"payload"


def test_an_answer_as_large_as_it_may_be_is_fetched():
    answer = bytes(frames.SLICE + 5)

    def giant(head):
        if head["do"] == "get":
            return frames.pack({"state": "done"}, answer[head["offset"] : head["offset"] + frames.SLICE])
        return frames.pack({"state": "done", "total": len(answer)} if head["do"] == "poll" else WAITING)

    assert call(Nodes(a=giant), expected=len(answer))["a"] == answer


def test_a_site_that_is_for_ever_at_work_ends_at_the_deadline_and_makes_nobody_else_late():
    """Large answers too: they are fetched only once everybody is done or late."""
    nodes = Nodes(a=lambda head: frames.pack(WAITING if head["do"] == "put" else {"state": "working"}))
    payload = bytes(frames.INLINE + 1)
    began = time.monotonic()
    found = call(nodes, payload, timeout=0.5)
    assert isinstance(found["a"], DeadlineError)
    assert found["b"] == payload
    assert time.monotonic() - began < 3
    polls = [who for who, do in nodes.asked if do == "poll"]
    assert len(polls) < 10, "one that says at once that it is still at work is not asked again at once"


def test_without_a_deadline_nobody_is_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(chunked_calls, "_LONGEST", 0.5)
    nodes = Nodes(a=lambda head: frames.pack(WAITING if head["do"] == "put" else {"state": "working"}))
    found = call(nodes)
    assert "'a' was at work for 0.5 s" in str(found["a"])
    assert found["b"] == b"payload"


def test_a_site_that_hands_over_its_answer_slowly_uses_up_its_own_share_of_the_time():
    def slow(head):
        if head["do"] == "get":
            time.sleep(0.3)
            return frames.pack({"state": "done"}, bytes(frames.SLICE))
        return frames.pack({"state": "done", "total": 40 * frames.SLICE} if head["do"] == "poll" else WAITING)

    payload = bytes(frames.INLINE + 1)
    found = call(Nodes(a=slow), payload, timeout=0.4, expected=100 * frames.SLICE)
    assert isinstance(found["a"], DeadlineError)
    assert found["b"] == payload


@pytest.mark.parametrize("state", ["receiving", "unknown"])
def test_a_state_that_makes_no_sense_ends_the_call_for_that_site(state):
    nodes = Nodes(a=lambda head: frames.pack({"state": state}))
    began = time.monotonic()
    found = call(nodes)
    assert "its peer has restarted" in str(found["a"])
    assert time.monotonic() - began < 2
    assert sum(who == "a" for who, _ in nodes.asked) == 1


# --- errors that travel -----------------------------------------------------------------------------------------------


@FUZZ
@given(values | st.dictionaries(st.sampled_from(["type", "message", "x"]), values))
def test_an_error_of_elsewhere_is_one_of_ours_in_a_line(plain):
    for read in (heads.from_site, heads.from_same_script):
        error = read(plain)
        assert isinstance(error, LLMChainFedError)
        told(error)
        assert "\n" not in str(error)
    told(heads.said(plain))


def test_a_refusal_of_a_sites_policy_says_so_in_its_first_words():
    error = heads.from_site({"type": "PolicyError", "message": "policy.max_steps: 10**12 are more than 1,000"})
    assert isinstance(error, PolicyError)
    assert str(error).startswith("refused by site: policy.max_steps: ")


# --- driver and bridge ----------------------------------------------------------------------------------------------


@pytest.fixture
def link(tmp_path_factory):
    path = tmp_path_factory.mktemp("l") / "hub.sock"
    found = Link(path)
    found.path = path
    yield found
    found.close()


def bridge(link, *told):
    """A bridge of the job that sends these frames for the first order it gets, then says that it is done."""
    channel = frames.dial(link.path)
    channel.send_bytes(frames.pack({"run": "r", "sites": ["a"]}))

    def serve():
        with channel:
            try:
                channel.recv_bytes(frames.MAX_OUTER, 5)
                for frame in told:
                    channel.send_bytes(frame, 5)
                channel.recv_bytes(frames.MAX_OUTER, 5)
            except (OSError, EOFError):
                return

    threading.Thread(target=serve, daemon=True).start()
    assert link.wait(5.0) == ["a"]


def test_what_a_bridge_tells_is_believed_of_nodes_that_were_asked_and_of_no_other_form(link):
    done = frames.pack({"do": "done"})
    for message in corpus.bridge_messages():
        bridge(link, message)
        with within(5):
            ((_, answer),) = link.exchange(["a"], b"x", 5.0)
        assert "the job's bridge went away" in told(answer)
    bridge(link, frames.pack({"node": "a"}, b"1"), frames.pack({"node": "a"}, b"2"), done)
    ((_, answer),) = link.exchange(["a"], b"x", 5.0)
    assert "who was not asked or has answered" in told(answer)
    bridge(link, frames.pack({"node": "a"}, b"answer"), done)
    assert link.exchange(["a"], b"x", 5.0) == [("a", b"answer")]


def test_greetings_of_any_kind_leave_the_bridge_that_is_there(link):
    bridge(link, frames.pack({"node": "a"}, b"answer"), frames.pack({"do": "done"}))
    odd = [corpus.head(run=value, sites=value) for value in corpus.NONSENSE if value != []]
    for greeting in [*corpus.no_frames(), *odd, corpus.head(run="r", sites=["a"], extra=1)]:
        with contextlib.suppress(OSError), frames.dial(link.path) as stranger:  # it may be cut off
            stranger.send_bytes(greeting)
    assert link.exchange(["a"], b"x", 5.0) == [("a", b"answer")]


# --- ranks ------------------------------------------------------------------------------------------------------------


def rank_0(sent, leads=True):
    """A TorchDistributed to which a rank sends these tensors, without a process group."""
    found = object.__new__(TorchDistributed)
    found.rank, found.world_size = (0, 2) if leads else (1, 2)

    found._homes, found._hosted, found._joined, found._sizes = {"x": 1}, InProcess(), False, AnswerSizes()
    found._messages = RankMessages(Group(None, None, "rank 0"), found.rank, 2, 60, 60, found._homes)
    tensors = iter(sent)

    def fill(tensor, rank):
        given = next(tensors)
        assert given.numel() == tensor.numel(), "memory is taken for what comes"
        return given

    found._messages._fill, found._messages.send = fill, lambda *_: None
    return found


def message(text, body=b""):
    parts = [torch.frombuffer(bytearray(p), dtype=torch.uint8) if p else torch.empty(0) for p in (text, body)]
    return [torch.tensor([len(text), len(body)]), *parts]


@bounded(seconds=60, megabytes=400)
def test_a_rank_that_announces_or_says_nonsense_is_named_and_the_group_unusable():
    sizes = [(2**60, 0), (0, 2**60), (-1, 0), (0, -1), (2**25, 0), (20, 2**31), (2**63 - 1, 2**63 - 1)]
    cases = [[torch.tensor(pair)] for pair in sizes] + [message(text) for text in corpus.rank_heads()]
    for sent in cases:
        found = rank_0(sent)
        with within(5), pytest.raises(FederationError, match=r"rank 1 \('x'\) sent what makes no sense: ") as error:
            dict(found.call("train", ["x"], b"payload"))
        told(error.value)
        with pytest.raises(FederationError, match="makes no sense"):
            dict(found.call("train", ["x"], b"payload"))
    assert dict(rank_0(message(b'{"error": null}', b"answer")).call("train", ["x"], b"p")) == {"x": b"answer"}


@bounded(seconds=20, megabytes=400)
def test_many_wrong_fields_or_entries_cost_no_more_than_one():
    many = corpus.framed("{" + ",".join(f'"{n}": 1' for n in range(9_000)) + "}")
    names = json.dumps({"names": [1] * 1_000_000}).encode()
    with within(1), pytest.raises(LLMChainFedError):
        heads.read_reply(many)
    with within(3), pytest.raises(FederationError):
        rank_messages.read_head(names, (rank_messages.Joining,), "its head")
    with within(1), pytest.raises(LLMChainFedError):
        heads.one_of(corpus.head(run="r", sites=[1] * 100_000), heads.Greeting, what="a greeting")


@bounded(seconds=60, megabytes=400)
def test_what_a_rank_has_and_what_the_leader_asks_is_read_as_strictly():
    for text in [b'{"error": null}', *corpus.rank_heads()]:
        with pytest.raises(FederationError, match=r"rank 1 .*sent what makes no sense"):
            rank_0(message(text)).host({})
    task = {"op": "train", "nodes": ["x"], "timeout": None, "which": [0], "sizes": [1]}
    for field, value in itertools.product(task, corpus.NONSENSE):
        if (field, value) in (("op", "a"), ("timeout", None)) or (field == "op" and isinstance(value, str)):
            continue
        follower = rank_0(message(json.dumps(task | {field: value}).encode(), b"p"), leads=False)
        with within(5), pytest.raises(FederationError, match=r"rank 0 .*sent what makes no sense"):
            follower.follow(lambda outcome: None)


def test_pieces_of_a_body_are_given_to_whom_they_are_for():
    parts, which = rank_messages.distinct({"a": b"1", "b": b"23"}, ["a", "b"])
    sizes = [len(p) for p in parts]
    task = rank_messages.RankTask(op="train", nodes=["a", "b"], timeout=None, which=which, sizes=sizes)
    assert rank_messages.by_node(b"".join(parts), task, {"a": 1, "b": 1}) == {"a": b"1", "b": b"23"}
    for body, hosted in ((b"12", {"a": 1, "b": 1}), (b"123", {"a": 1})):
        with pytest.raises(FederationError, match="a task that makes no sense"):
            rank_messages.by_node(body, task, hosted)
