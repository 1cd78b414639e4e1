"""A site's process without an engine: frames, sockets, policy, audit file, and calls in slices over real UNIX sockets.

Belongs here: what a site answers, refuses and writes down, and what the hub makes of it. Does not: the engine
(test_nvflare), rounds (test_averaging).
"""

import json
import os
import stat
import threading
import time

import pytest
from sites import OPEN, TRAINING, Echo, SocketTransport, answering, audit, check_socket, task
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, Participant, TrainingConfig, untrusted
from llmchain_fed.errors import (
    ContractError,
    DeadlineError,
    FederationError,
    ParticipantError,
    PolicyError,
    TransportError,
)
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.tasks import PersonalStateTask, TrainTask
from llmchain_fed.federated.reporting import lines
from llmchain_fed.federated.target import Target, check_contract
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.messaging.chunked_calls import ChunkedCalls
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer


@pytest.fixture
def serve(tmp_path_factory):
    """`serve(name, peer, policy)` listens in a thread and returns the socket's path."""
    folder = tmp_path_factory.mktemp("s")

    def start(name, peer, policy=OPEN):
        path = folder / f"{name}.sock"
        site = SiteServer(peer, policy, Audit(folder / f"{name}.jsonl"))
        threading.Thread(target=site.serve, args=(path,), daemon=True).start()
        return answering(path)

    start.folder = folder
    return start


# --- calls in slices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2**18, 2**18 + 1, frames.SLICE, frames.SLICE + 1, 2 * frames.SLICE + 7])
def test_any_size_arrives_and_comes_back_bit_by_bit(size, serve):
    payload = os.urandom(size)
    peers = {name: Echo() for name in "ab"}
    transport = SocketTransport({name: serve(name, peer) for name, peer in peers.items()})
    assert dict(transport.call("train", ["a", "b"], payload)) == {"a": payload, "b": payload}
    assert peers["a"].calls == [("train", size)]


def test_errors_lateness_and_absence_are_told_apart(serve):
    peers = {name: Echo() for name in "ab"}
    paths = {name: serve(name, peer) for name, peer in peers.items()} | {"c": serve.folder / "nobody.sock"}
    transport = SocketTransport(paths)
    answers = dict(transport.call("train", ["a", "b", "c"], b"fail"))
    assert [type(answers[n]) for n in "abc"] == [ParticipantError, ParticipantError, TransportError]
    assert str(answers["a"]) == "ValueError: the example says: Page verrouillée"
    assert "nobody answers at" in str(answers["c"])
    started = time.monotonic()
    answers = dict(transport.call("train", ["a"], b"slow", timeout=0.3))
    assert isinstance(answers["a"], DeadlineError)
    assert time.monotonic() - started < 2
    assert peers["a"].given_up.wait(1), "the site must not go on with what nobody waits for"
    assert dict(transport.call("train", ["a", "b"], b"next")) == {"a": b"next", "b": b"next"}


def test_a_newer_call_replaces_the_one_that_is_running(serve):
    peer = Echo()
    path = serve("a", peer)
    first = SocketTransport({"a": path})
    found = {}
    waiting = threading.Thread(target=lambda: found.update(first.call("train", ["a"], b"slow")))
    waiting.start()
    time.sleep(0.2)
    assert dict(SocketTransport({"a": path}).call("evaluate", ["a"], b"x")) == {"a": b"x"}
    waiting.join(5)
    assert isinstance(found["a"], TransportError)
    assert "knows nothing of this call" in str(found["a"])


def test_repeated_and_disordered_slices(serve):
    path = serve("a", Echo())

    def ask(body=b"", **head):
        head, rest = frames.read(frames.ask(path, frames.pack(head, body)))
        return head, bytes(rest)

    put = {"do": "put", "call": "1", "op": "train", "total": 6}
    assert ask(b"abc", **put, offset=0)[0] == {"state": "receiving"}
    assert ask(b"abc", **put, offset=0)[0] == {"state": "receiving"}  # said before: a hub that lost its connection
    assert ask(b"f", **put, offset=5)[0]["error"]["message"] == "a slice of 1 bytes at 5 does not follow 3 of 6."
    assert ask(b"defg", **put, offset=3)[0]["error"]["type"] == "TransportError"
    ask(b"def", **put, offset=3)
    assert ask(do="poll", call="1", wait=5)[1] == b"abcdef"
    assert ask(do="poll", call="1", wait=5)[1] == b"abcdef"
    assert ask(do="get", call="1", offset=2)[1] == b"cdef"
    assert ask(do="get", call="2", offset=0)[0] == {"state": "unknown"}
    assert ask(do="drop", call="1")[0] == {"state": "unknown"}
    assert ask(do="poll", call="1", wait=0)[0] == {"state": "unknown"}
    for head in ({"do": "exec"}, {"do": "put"}, {"do": "put", "call": 1, "op": "train", "offset": 0, "total": 1}, {}):
        assert ask(**head)[0]["error"]["type"] == "TransportError"
    for negative in ({"offset": 0, "total": -1}, {"offset": -1, "total": 5}):
        assert "error" in ask(**(put | {"call": "9"} | negative))[0]


@pytest.mark.parametrize(
    "frame", [b"", b"\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x05{}", b"\x00\x00\x00\x03{,}"]
)
def test_what_is_no_frame_is_answered_and_the_site_stays_up(frame, serve):
    path = serve("a", Echo())
    with frames.dial(path) as connection:
        connection.send_bytes(frame)
        head, _ = frames.read(connection.recv_bytes(frames.MAX_FRAME))
    assert head["error"]["type"] == "TransportError"
    check_socket(path)


def test_an_oversized_frame_is_not_read_and_the_site_stays_up(serve):
    path = serve("a", Echo())

    def send():
        with frames.dial(path) as connection:
            connection.send_bytes(bytes(frames.MAX_OUTER + 1))
            connection.recv_bytes(frames.MAX_FRAME)

    with pytest.raises((OSError, EOFError)):
        send()
    check_socket(path)


def test_a_site_that_claims_a_huge_answer_is_not_believed():
    def lying(nodes, frame, seconds):
        head, _ = frames.read(frame)
        state = {"state": "done", "total": 10**15} if head["do"] == "poll" else {"state": "working"}
        return [(n, frames.pack(state)) for n in nodes]

    (answer,) = dict(ChunkedCalls(lying, 1.0).call("train", ["a"], b"x", None)).values()
    assert isinstance(answer, ParticipantError)
    assert "1,000,000,000,000,000 bytes where at most" in str(answer)


def test_nonsense_from_a_site_is_absence():
    def nonsense(nodes, frame, seconds):
        return [(n, b'\x00\x00\x00\x09{"state":') for n in nodes]

    answers = dict(ChunkedCalls(nonsense, 1.0).call("train", ["a", "b"], b"x", None))
    assert all(isinstance(a, TransportError) for a in answers.values())


# --- policy and audit -----------------------------------------------------------------------------------------------


def test_the_default_policy_refuses_and_everything_is_written_down(serve):
    peer = Echo()
    transport = SocketTransport({"a": serve("a", peer, Policy(max_rounds=2, max_payload_bytes=1000))})

    def ask(op, payload=b"x"):
        return dict(transport.call(op, ["a"], payload))["a"]

    unanswered = "refused by site: policy.operations: this site does not answer '{}', allowed are hello, train"
    refused = ask("personal_state")
    assert isinstance(refused, PolicyError)
    assert str(refused).startswith(unanswered.format("personal_state"))
    assert str(ask("delete")).startswith(unanswered.format("delete"))
    assert str(ask("hello", bytes(1001))) == (
        "refused by site: policy.max_payload_bytes: 1,001 bytes are sent, at most 1,000 are allowed."
    )
    assert [ask("train"), ask("train")] == [b"x", b"x"]
    assert str(ask("train")).startswith("refused by site: policy.max_rounds: this site has trained 2 times, at most 2")
    assert str(
        ask("evaluate", b"fail")
    ) == "ParticipantError: ValueError: the site keeps the message to itself; its audit file has it" or str(
        ask("evaluate", b"fail")
    ).startswith("ValueError: the site keeps the message")
    assert peer.calls[:2] == [("train", 1), ("train", 1)]
    lines = [e for e in audit(serve.folder, "a") if e["status"] != "began"]
    assert [(e["op"], e["status"]) for e in lines][:6] == [
        ("personal_state", "refused"), ("delete", "refused"), ("hello", "refused"),
        ("train", "answered"), ("train", "answered"), ("train", "refused"),
    ]  # fmt: skip
    assert lines[6]["error"] == "ValueError: the example says: Page verrouillée"
    assert {"time", "op", "bytes_in", "bytes_out", "seconds", "status"} <= lines[3].keys()
    assert stat.S_IMODE((serve.folder / "a.jsonl").stat().st_mode) == 0o600


def test_what_cannot_be_written_down_is_not_answered(serve):
    peer = Echo()
    transport = SocketTransport({"a": serve("a", peer)})
    (serve.folder / "a.jsonl").unlink()
    (serve.folder / "a.jsonl").mkdir()
    answer = dict(transport.call("train", ["a"], b"x"))["a"]
    assert "the audit file cannot be written" in str(answer)


def test_a_policy_file_is_read_once(tmp_path, monkeypatch):
    """What is checked is what is said of it, whatever else is written there meanwhile."""
    path, whole = tmp_path / "policy.yaml", untrusted.read_file

    def changing(*args, **options):
        found = whole(*args, **options)
        path.write_text("samples: 1\n")
        return found

    monkeypatch.setattr(untrusted, "read_file", changing)
    monkeypatch.setattr("llmchain_fed._config.read_file", changing)
    path.write_text("# a\nmax_rounds: -1\n")
    with pytest.raises(ConfigError, match="line 2: `max_rounds`"):
        Policy.from_file(path)


def test_policy_files(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("max_rounds: 20\nsamples: 2\noperations: [hello, train]\n")
    assert Policy.from_file(path) == Policy(max_rounds=20, samples=2, operations=("hello", "train"))
    for text, wanted in {
        "max_round: 3": "unknown option `max_round`; did you mean `max_rounds`",
        "max_rounds: -1": "`max_rounds`",
        "operations: [shell]": "`operations.0`",
        "- a": "is no mapping",
        "a: [": "is no plain YAML",
        "codecs: none": r"line 1: `codecs`: a list is wanted, such as \[none\] \(got 'none'\)",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=wanted):
            Policy.from_file(path)
    path.write_text("max_learning_rate: 1e-2\nmax_seconds: 1e3\n")
    assert Policy.from_file(path) == Policy(max_learning_rate=0.01, max_seconds=1000.0)
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.from_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"audit file .* cannot be written"):
        Audit(tmp_path / "no" / "audit.jsonl")


@pytest.mark.parametrize("metadata", ['"[1]"', '"{}"', "3", '"null"', '"{\\"round\\": []}"'])
def test_a_crafted_payload_is_answered_and_written_down(metadata, serve):
    text = b'{"__metadata__": {"llmchain_fed": ' + metadata.encode() + b"}}"
    transport = SocketTransport({"a": serve("a", Echo())})
    payload = len(text).to_bytes(8, "little") + text
    assert dict(transport.call("train", ["a"], payload, timeout=5)) == {"a": payload}
    assert [e["status"] for e in audit(serve.folder, "a")] == ["began", "answered"]


def test_a_request_is_written_down_before_it_is_worked_on(serve):
    peer, seen = Echo(), []
    inner = peer.handle
    path = serve("a", peer)
    peer.handle = lambda op, payload: seen.append(audit(serve.folder, "a")[-1]) or inner(op, payload)
    dict(SocketTransport({"a": path}).call("train", ["a"], task(round=5)))
    assert (seen[0]["op"], seen[0]["round"], seen[0]["status"]) == ("train", 5, "began")


def test_what_cannot_be_read_is_written_down_too(serve):
    path = serve("a", Echo())
    frames.ask(path, b"\x00\x00\x00\x02[]")
    frames.ask(path, frames.pack({"do": "exec"}))
    lines = audit(serve.folder, "a")
    assert [e["status"] for e in lines] == ["malformed", "malformed"]
    assert "unknown request 'exec'" in lines[1]["error"]


def test_an_audit_file_that_was_rotated_or_open_to_others_is_for_this_account_alone(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.touch(0o666)
    log = Audit(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(tmp_path / "audit.1")
    log.write(op="train")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["op"] == "train"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError):
        Audit(tmp_path / "link")


def test_a_wait_that_is_no_number_is_no_frame(serve):
    path = serve("a", Echo())
    text = b'{"do": "poll", "call": "1", "wait": NaN}'
    head, _ = frames.read(frames.ask(path, len(text).to_bytes(4, "big") + text))
    assert "NaN is no JSON" in head["error"]["message"]


def test_slices_of_a_call_that_was_replaced_or_dropped_change_nothing(serve):
    peer = Echo()
    path = serve("a", peer)

    def ask(body=b"", **head):
        return frames.read(frames.ask(path, frames.pack(head, body)))

    old = {"do": "put", "call": "old", "op": "train", "offset": 0, "total": 3}
    ask(b"abc", **old)
    assert bytes(ask(do="poll", call="old", wait=5)[1]) == b"abc"
    ask(b"xyz", **(old | {"call": "new"}))
    assert ask(b"abc", **old)[0] == {"state": "unknown"}  # the engine delivered it late
    assert bytes(ask(do="poll", call="new", wait=5)[1]) == b"xyz"
    assert (
        "knows nothing of" in ask(b"abc", **(old | {"call": "third", "offset": 3, "total": 6}))[0]["error"]["message"]
    )
    assert bytes(ask(do="poll", call="new", wait=5)[1]) == b"xyz"
    assert [op for op, _ in peer.calls] == ["train", "train"]


def test_work_that_is_given_up_before_its_first_step_does_not_run_to_its_end(make_chain):
    peer = Client(Target.of(make_chain(lora=True)), Participant("a", PAIRS), TRAINING)
    chain = make_chain(lora=True)
    payload = messages.write(TrainTask(round=1, base=chain.model.fingerprint()), chain.model.trainable_state())
    peer.give_up()
    with pytest.raises(DeadlineError):
        peer.handle("train", payload)
    peer.take_up()
    assert peer.handle("train", payload)


def test_no_more_samples_leave_than_the_policy_says(serve, make_chain):
    fed = federation(serve, make_chain, {"b": Policy(samples=1)}, samples=10**9)
    assert len(fed.fit(1)[0].samples) == 1


# --- sockets --------------------------------------------------------------------------------------------------------


def test_a_socket_and_its_key_are_for_this_account_alone(serve):
    path = serve("a", Echo())
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(frames.key_path(path).stat().st_mode) == 0o600
    key = frames.key_path(path).read_bytes()
    frames.key_path(path).write_bytes(bytes(32))
    with pytest.raises(TransportError, match=r"nobody answers at .* \(who listens there has another key\)"):
        frames.dial(path)
    frames.key_path(path).write_bytes(key)
    check_socket(path)


def test_sockets_in_use_left_over_and_impossible(serve, tmp_path):
    path = serve("a", Echo())
    with pytest.raises(ConfigError, match=r"somebody listens at .* already"):
        frames.listen(path)
    left = serve.folder / "left.sock"
    frames.listen(left)._socket.close()  # as after a SIGKILL: the file stays
    frames.listen(left).close()
    file = serve.folder / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is there and is no socket"):
        frames.listen(file)
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match="at most 100 bytes"):
        frames.listen(tmp_path / ("x" * 120))
    with pytest.raises(ConfigError, match="cannot listen at"):
        frames.listen(serve.folder / "none" / "a.sock")
    with pytest.raises(TransportError, match="nobody answers at"):
        check_socket(serve.folder / "none.sock")


# --- with a real peer -----------------------------------------------------------------------------------------------


def federation(serve, make_chain, policies=None, hub=None, **options):
    shares = {"a": PAIRS[:6], "b": PAIRS[6:]}
    paths = {}
    for name, pairs in shares.items():
        participant = Participant(name, pairs, held_out=PAIRS[:2] if name == "b" else None)
        policy = (policies or {}).get(name, OPEN)
        peer = Client(Target.of(make_chain(lora=True)), participant, None)
        paths[name] = serve(name, peer, policy)
    chain = hub or make_chain(lora=True)
    options = {"training": TRAINING, "progress": False} | options
    return FederatedAveraging(chain, runtime=SocketTransport(paths), **options)


def test_peers_behind_sockets_learn_what_peers_in_this_process_learn(serve, make_chain):
    fed = federation(serve, make_chain, samples=1)
    history = fed.fit(3)
    alone = make_chain(lora=True)
    reference = FederatedAveraging(
        alone, participants={"a": PAIRS[:6], "b": PAIRS[6:]}, evaluation={"b": PAIRS[:2]}, training=TRAINING,
        progress=False,
    )  # fmt: skip
    reference.fit(3)
    ours, theirs = fed.get_model().model.trainable_state(), alone.model.trainable_state()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-6
    assert history[-1].held_out_after == pytest.approx(reference.history[-1].held_out_after, rel=1e-5)
    assert fed.data_reports == reference.data_reports
    assert [s.prompt for s in history[0].samples] == [s.prompt for s in reference.history[0].samples]
    record = history[0].participants["b"]
    assert record.evaluation_bytes > 2 * record.bytes_down


def test_a_policy_without_samples_lets_numbers_leave_and_no_text(serve, make_chain):
    fed = federation(serve, make_chain, {"b": Policy()}, samples=1)
    record = fed.fit(1)[0]
    assert record.held_out_after is not None
    assert record.samples == []
    assert record.participants["b"].notes == ["no samples: the site's policy lets no samples leave"]
    assert not any(text in fed.history.to_json() for pair in PAIRS for text in pair)


@pytest.mark.parametrize(
    ("option", "limits", "options"),
    [
        ("max_steps", {"max_steps": 1}, {}),
        ("optimizers", {"optimizers": ("sgd",)}, {}),
        ("codecs", {"codecs": ("none",)}, {"codec": "int8"}),
        ("aggregations", {"aggregations": ("fedit", "fedsa")}, {"aggregation": "ffa"}),
    ],
)
def test_a_hub_goes_on_without_a_site_whose_policy_refuses_and_knows_which_line(
    option, limits, options, serve, make_chain
):
    record = federation(serve, make_chain, {"a": Policy(**limits), "b": Policy()}, **options).fit(1)[0]
    assert record.trained == ["b"]
    assert f"policy.{option}: " in record.participants["a"].reason


@pytest.mark.parametrize("aggregation", ["fedavg", "rolora", "fedsa", "flora"])
def test_a_policy_that_names_the_rule_takes_part_in_it(aggregation, serve, make_chain):
    policies = dict.fromkeys("ab", Policy(aggregations=(aggregation,), max_states=1))
    history = federation(serve, make_chain, policies, aggregation=aggregation).fit(2)
    assert [record.trained for record in history] == [["a", "b"]] * 2


def test_a_peer_with_another_contract_is_absent_by_name_and_the_others_learn(serve, make_chain):
    fed = federation(serve, make_chain)
    other = Target.of(make_chain(lora=True, prompt="Say: {text}"))
    fed._runtime.exchange.paths["c"] = serve("c", Client(other, Participant("c", PAIRS), None))
    record = fed.fit(1)[0]
    assert record.trained == ["a", "b"]
    assert record.participants["c"].status == "absent"
    at_c, at_hub = (target.contract()["prompt"][:12] for target in (other, Target.of(make_chain(lora=True))))
    said = f"another contract (prompt: {at_c}… at c, {at_hub}… at the hub)"
    assert f"ContractError: {said}. " in record.participants["c"].reason
    reasons = {"c": record.participants["c"].reason}
    assert f"out: c (refused: {said}" in lines.beginning_of(["a", "b"], reasons), "a list has room for what differs"
    # a peer that does not compare is found out by the hub
    with pytest.raises(ContractError, match=rf"^another contract \(prompt: {at_c}… at d, {at_hub}… at the hub\)"):
        check_contract("d", site=other.contract(), server=Target.of(make_chain(lora=True)).contract())


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"use_rslora": True}, {"lora_dropout": 0.1}])
def test_another_setting_of_the_same_adapter_is_another_contract(change, make_chain):
    from tiny import lora_config

    ours, theirs = (Target.of(make_chain(lora=lora_config(**c))) for c in ({}, change))
    with pytest.raises(ContractError, match=r"another contract \(adapter: "):
        check_contract("x", site=theirs.contract(), server=ours.contract())


def test_another_tokenizer_is_another_contract_and_the_same_one_loaded_again_is_not(make_chain, tmp_path):
    import copy

    from llmchain_fed import LLMChain

    chain = make_chain(lora=True)
    chain.model.tokenizer = copy.deepcopy(chain.model.tokenizer)  # the fixture's is everybody's
    ours = Target.of(chain).contract()
    chain.save(tmp_path / "c")
    check_contract("it", site=ours, server=Target.of(LLMChain.load(tmp_path / "c")).contract())
    other = make_chain(lora=True)
    other.model.tokenizer = copy.deepcopy(other.model.tokenizer)
    other.model.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ContractError, match=r"another contract \(tokenizer"):
        check_contract("it", site=ours, server=Target.of(other).contract())
    # what is kept of a tokenizer is not kept when tokens are added to the same object
    chain.model.tokenizer.add_tokens(["<new>"])
    check_contract("it", site=Target.of(other).contract(), server=Target.of(chain).contract())


def test_what_a_participant_adds_to_its_evaluation_is_not_believed():
    from llmchain_fed.federated.measures.reading import read_evaluation

    sample = {"prompt": "p" * 20_000, "reference": "r", "answer": "a"}
    answer = {"loss": 1, "tokens": 3, "samples_error": "none \x1b[2J", "samples": [sample] * 5}
    found = read_evaluation(json.dumps(answer).encode(), 2)
    assert found.keys() == {"loss", "tokens", "samples", "samples_error"}
    assert [s["prompt"] for s in found["samples"]] == ["p" * 10_000 + "…"] * 2
    assert found["samples_error"] == "none \\x1b[2J"
    for strange in ({"error": {}}, {"more": "x"}, {"samples_error": [1]}, {"samples": [sample | {"more": "x"}]}):
        assert read_evaluation(json.dumps(answer | strange).encode(), 2).keys() == {"error"}


def test_slices_shorter_than_asked_for_and_a_fetch_beyond_the_deadline():
    def site(reply, wait=0.0):
        def exchange(nodes, frame, seconds):
            head, _ = frames.read(frame)
            if head["do"] == "poll":
                return [(n, frames.pack({"state": "done", "total": 3 * frames.SLICE})) for n in nodes]
            if head["do"] == "get":
                time.sleep(wait)
                return [(n, frames.pack({"state": "done"}, reply)) for n in nodes]
            return [(n, frames.pack({"state": "working"})) for n in nodes]

        calls = ChunkedCalls(exchange, 1.0)
        calls.expect(4 * frames.SLICE)
        return calls

    drip = dict(site(b"x").call("train", ["a"], b"", None))["a"]
    assert isinstance(drip, TransportError)
    slow = dict(site(bytes(frames.SLICE), 0.6).call("train", ["a"], b"", 0.2))["a"]
    assert isinstance(slow, DeadlineError)
    assert "its answer was not here by the deadline" in str(slow)


def test_a_peer_under_another_name_or_with_impossible_counts_is_absent(serve, make_chain):
    fed = federation(serve, make_chain)
    paths = fed._runtime.exchange.paths
    paths["c"] = paths["a"]
    record = fed.fit(1)[0]
    assert record.participants["c"].status == "absent"
    assert "the peer at 'c' calls itself 'a'" in record.participants["c"].reason


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"{", b"null", b'{"participant": "x"}', b'{"participant": "x", "contract": 3}',
        b'{"participant": "x", "contract": {}, "num_examples": NaN}', b'{"participant": "x", "report": {"used": "x"}}',
    ],
)  # fmt: skip
def test_a_hello_that_makes_no_sense_is_absence(answer, serve, make_chain):
    fed = federation(serve, make_chain)
    peer = Echo()
    peer.handle = lambda op, payload: answer
    fed._runtime.exchange.paths["x"] = serve("x", peer)
    record = fed.fit(1)[0]
    assert record.trained == ["a", "b"]
    assert record.participants["x"].status == "absent"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"{}", b'{"loss": "low", "tokens": 3}', b'{"loss": 1.0, "tokens": 0}', b'{"loss": 1e999, "tokens": 3}',
        b'{"loss": 1.0, "tokens": 3, "samples": [{"prompt": 1}]}', b'{"loss": true, "tokens": 3}',
        b'{"loss": 1.0, "tokens": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
def test_an_evaluation_that_makes_no_sense_is_noted_and_counts_for_nothing(answer, serve, make_chain):
    fed = federation(serve, make_chain)
    inner = fed._runtime.call

    def call(op, nodes, payload, timeout=None):
        for name, found in inner(op, nodes, payload, timeout):
            yield name, answer if op == "evaluate" else found

    fed._runtime.call = call
    record = fed.fit(1)[0]
    assert record.trained == ["a", "b"]
    assert record.held_out_after is None
    assert record.participants["b"].notes[0].startswith("its evaluation failed: ")


def test_a_restarted_peer_is_told_anew_and_retries_bring_it_back_in_the_same_round(serve, make_chain):
    fed = federation(serve, make_chain, retries=1)
    fed.fit(1)
    participant = Participant("a", PAIRS[:6])
    fresh = Client(Target.of(make_chain(lora=True)), participant, None)
    fed._runtime.exchange.paths["a"] = serve("a2", fresh)
    record = fed.fit(1)[-1]
    assert record.trained == ["b", "a"]
    again = federation(serve_again(serve), make_chain)
    again.fit(2)
    ours, theirs = fed.get_model().model.trainable_state(), again.get_model().model.trainable_state()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-6


def serve_again(serve):
    def start(name, peer, policy=OPEN):
        return serve(f"{name}-again", peer, policy)

    return start


def test_training_options_that_cannot_travel_are_refused_at_the_hub(serve, make_chain):
    import torch

    with pytest.raises(ConfigError, match=r"NAdam.* cannot be told to participants elsewhere.*Name it: 'adamw'"):
        federation(serve, make_chain, training=TrainingConfig(optimizer=torch.optim.NAdam))


def test_personal_state_goes_out_and_comes_back_bit_by_bit(make_chain):
    from llmchain_fed.updates import serialization

    config = TRAINING.replace(epochs=None, max_steps=2, keep_optimizer=True)

    def peer():
        return Client(Target.of(make_chain(lora=True)), Participant("a", PAIRS), config)

    def task(chain, number):
        state = chain.model.trainable_state()
        return messages.write(TrainTask(round=number, base=chain.model.fingerprint()), state)

    chain = make_chain(lora=True)
    first, second = peer(), peer()
    first.handle("train", task(chain, 1))
    ask = messages.write(PersonalStateTask())
    kept = first.handle("personal_state", ask)
    assert second.handle("personal_state", ask) != kept
    assert second.handle("personal_state", kept) == kept

    def values(update):
        return serialization.values(update, serialization.inspect(update, max_bytes=len(update))[1])

    ours, theirs = values(first.handle("train", task(chain, 2))), values(second.handle("train", task(chain, 2)))
    assert all((ours[n] == theirs[n]).all() for n in ours)
    fresh = values(peer().handle("train", task(chain, 2)))
    assert any((ours[n] != fresh[n]).any() for n in ours)
    assert first.handle("stop", b"{}") == b"{}"
    assert first.handle("personal_state", ask) == peer().handle("personal_state", ask)
    broken = serialization.pack(
        {"0/1/exp_avg": next(iter(ours.values()))}, {"progress": {"0": {"next_step": 1, "optimizer": None}}}
    )
    with pytest.raises(ParticipantError, match="personal state cannot be read"):
        first.handle("personal_state", broken)
    with pytest.raises(FederationError, match="unknown operation 'dance'; a client answers hello, train"):
        first.handle("dance", b"")
