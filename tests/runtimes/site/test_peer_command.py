"""`llmchain-fed peer` as an operator runs it for months: what it checks first, says on its screen, and how it ends.

Belongs here: the command, its screen, its status. Does not: what a site answers (test_server), the engine
(test_nvflare).
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from federation_processes import write_examples
from sites import OPEN, TRAINING, Echo, SocketTransport, answering, audit, task
from tiny import PAIRS
from torchrun_script import tiny_chain
from typer.testing import CliRunner

from llmchain_fed import ConfigError, FederatedAveraging, Participant, Site
from llmchain_fed.cli import __main__ as cli
from llmchain_fed.cli import site as commands
from llmchain_fed.data.examples import read_examples
from llmchain_fed.errors import DataError, ParticipantError, QuorumError, RecipeError, TransportError
from llmchain_fed.federated.client.data import Overlap
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.overview import ask_status
from llmchain_fed.runtimes.site import warnings
from llmchain_fed.runtimes.site.log import SiteLog
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer

SLOW = TRAINING.replace(epochs=None, max_steps=9_000)
ABOUT = {"name": "a", "examples": 3, "held_out": True, "audit": "/var/a.jsonl", "contract": {"base": "1e1c"}}


# --- before the model is loaded -------------------------------------------------------------------------------------


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts the command, whose model must not be loaded, and returns what it raises."""

    def load(_):
        raise AssertionError("the model was loaded before all was checked")

    def start(*, expect=None, **changes):
        monkeypatch.setattr(commands, "load", load if expect is None else expect)
        data = write_examples(tmp_path / "pairs.jsonl", PAIRS[:4])
        options = {"chain": "translate", "data": data, "socket": tmp_path / "a.sock"} | changes
        words = [str(w) for key, value in options.items() for w in (f"--{key.replace('_', '-')}", value)]
        return CliRunner().invoke(cli.app, ["peer", *words]).exception

    return start


def test_what_is_wrong_is_said_before_the_model_is_loaded_the_first_thing_first(begin, tmp_path):
    missing, folder = tmp_path / "Größe 1" / "x", tmp_path / "Größe 1"
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_round: 3\n")
    wrong = {
        "hold_out_share": (2, "--hold-out-share lies between 0 and 1"),
        "data": (missing.with_name("y"), "the training examples .* cannot be read: No such file or directory"),
        "chain": (
            "c",
            r"'c' is neither a folder .*\(there is no folder /.*/c\) nor one of the recipes classify",
        ),
        "socket": (missing.with_name("z"), "cannot listen at .*: No such file or directory"),
        "rank": (0, "rank is a count of at least 1"),
        "policy": (policy, "did you mean `max_rounds`"),
        "audit": (missing, rf"No such file or directory \(2\)\. Make its folder first: mkdir -p '{folder}'"),
    }
    given = {key: value for key, (value, _) in wrong.items()}
    given["audit"] = missing
    for key in list(given):
        with pytest.raises((ConfigError, DataError, RecipeError), match=wrong[key][1]):
            raise begin(**given)
        if key == "audit":
            given["audit"] = tmp_path / "audit.jsonl"
        else:
            del given[key]
    with pytest.raises(DataError, match=r"the held-out examples .* cannot be read: Is a directory"):
        raise begin(held_out=tmp_path)
    with pytest.raises(ConfigError, match=r"the policy file .* cannot be read \(Is a directory\)"):
        raise begin(policy=tmp_path)


def test_columns_of_any_name_and_a_split_by_groups_are_options(tmp_path, monkeypatch, make_chain):
    """As `Participant(columns=…)` and `Split(share, by=…)`: no group is on both sides."""
    served = []
    monkeypatch.setattr(commands, "load", lambda _: make_chain())
    monkeypatch.setattr(Site, "serve", lambda site, _: served.append(site))
    table = tmp_path / "visits.csv"
    lines = [f"{x};{y};p{at % 6}" for at, (x, y) in enumerate(PAIRS)]
    table.write_text("\n".join(["english;french;patient", *lines]))

    def start(*words):
        given = ["--chain", "translate", "--data", str(table), "--socket", str(tmp_path / "a.sock"), *words]
        return CliRunner().invoke(cli.app, ["peer", *given]).exception

    names = ["--column", "text=english", "--column", "completion=french"]
    assert start(*names, "--hold-out-share", "0.4", "--hold-out-by", "patient") is None
    (site,) = served
    trained, held_out = (
        {
            PAIRS.index((each.inputs["text"], each.completion)) % 6
            for each in read_examples(side, site.client.target.prompt)
        }
        for side in (site.client.participant.examples, site.client.participant.held_out)
    )
    assert trained
    assert held_out
    assert trained | held_out == set(range(6))
    assert not trained & held_out
    for words, said in (
        (["--column", "text"], r"NAME=COLUMN.*got 'text'"),
        (["--column", "=french"], "NAME=COLUMN"),
        (["--hold-out-by", "patient"], "give it, too"),
        ([*names, "--hold-out-share", "0.4", "--hold-out-by", "ward"], "no column 'ward'"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            raise start(*words)
    assert len(served) == 1


def test_nothing_is_written_to_a_file_that_is_read(begin, tmp_path):
    for option in ("audit", "socket"):
        with pytest.raises(ConfigError, match=f"--{option} and --data both name "):
            raise begin(**{option: tmp_path / "pairs.jsonl"})
    with pytest.raises(ConfigError, match="--socket and --audit both name "):
        raise begin(audit=tmp_path / "a.sock")
    assert (tmp_path / "pairs.jsonl").read_text().count("\n") == 3


def test_sockets_of_any_name_and_none_that_cannot_be(begin, tmp_path):
    reached = []

    def load(chain):
        reached.append(chain)
        raise ConfigError("as far as the model")

    short = tmp_path / "é"
    short.mkdir(mode=0o700)
    for socket in (short / "Müller 1.sock", tmp_path / "b.sock"):
        with pytest.raises(ConfigError, match="as far as the model"):
            raise begin(socket=socket, expect=load)
        assert not socket.exists()
        assert (tmp_path / socket.parent / f"{socket.name}.audit.jsonl").exists()
    with pytest.raises(ConfigError, match=r"a socket's path has at most 100 bytes, .* Use /run or /tmp"):
        raise begin(socket=tmp_path / ("ü" * (99 - len(str(tmp_path)))), audit=tmp_path / "audit")
    with frames.listen(tmp_path / "b.sock"), pytest.raises(ConfigError, match=r"somebody listens at .* already"):
        raise begin(socket=tmp_path / "b.sock")
    frames.listen(tmp_path / "b.sock")._socket.close()  # as after a SIGKILL
    with pytest.raises(ConfigError, match="as far as the model"):
        raise begin(socket=tmp_path / "b.sock", expect=load)
    assert len(reached) == 3


def test_files_that_others_can_read_text_that_may_leave_and_examples_on_both_sides_are_warned_of(tmp_path):
    data, held_out, policy = (tmp_path / name for name in ("Daten 1.jsonl", "held-out.jsonl", "policy.yaml"))
    for path in (data, held_out, policy):
        path.write_text("x")
        path.chmod(0o600)
    open_all = tmp_path
    while open_all.parent != open_all:  # pytest's own folders are this account's alone
        if os.access(open_all, os.W_OK) and not open_all.stat().st_mode & 0o001:
            assert warnings.of_files(data, held_out, policy) == []
            open_all.chmod(open_all.stat().st_mode | 0o011)
        open_all = open_all.parent
    assert warnings.of_files(data, held_out, policy) == []
    data.chmod(0o604)
    held_out.chmod(0o602)
    policy.chmod(0o606)
    assert warnings.of_files(data, held_out, policy) == [
        f"other accounts can read the training examples: chmod 600 '{data}'",
        f"other accounts can change the held-out examples: chmod 600 {held_out}",
        f"other accounts can change the policy: chmod go-w {policy}",
    ]
    tmp_path.chmod(0o700)
    assert warnings.of_files(data, held_out, policy) == []
    assert warnings.of_name("klinik-1_a") == []
    (found,) = warnings.of_name("Klinik 1")
    assert found.startswith("'Klinik 1' is no name for a site: 1 to 64 of A-Z a-z 0-9 _ -")
    assert found.endswith(
        "For example: Klinik-1. The hub knows this site by its certificate's name: say --name, as in its kit"
    )
    assert warnings.of_policy(Policy()) == []
    assert [w.split()[-1] for w in warnings.of_policy(Policy(samples=2, error_messages=True))] == [
        "(samples)", "(error_messages)",
    ]  # fmt: skip
    assert warnings.of_examples(data, data, None) == [
        "the held-out file is the training file: held-out loss says nothing of examples that are new"
    ]
    (found,) = warnings.of_examples(data, held_out, Overlap(12, 0, 40))
    assert found == "12 of 40 held-out examples are also trained on: held-out loss flatters"


# --- its screen -----------------------------------------------------------------------------------------------------


class Screen(list):
    def __call__(self, line):
        self.append(line)


@pytest.fixture
def site(tmp_path):
    """`site(peer, policy)` listens in a thread: a transport, the screen, the socket."""

    def start(peer, policy=OPEN):
        screen, path = Screen(), tmp_path / "a.sock"
        served = SiteServer(peer, policy, Audit(tmp_path / "a.jsonl", screen), SiteLog(screen, ABOUT))
        threading.Thread(target=served.serve, args=(path,), daemon=True).start()
        answering(path)
        return SocketTransport({"a": path}), screen, served

    return start


def ask(transport, op, payload=b"x", **options):
    return dict(transport.call(op, ["a"], payload, **options))["a"]


def test_a_round_is_two_lines_and_what_a_hub_measures_none(site):
    transport, screen, _ = site(Echo())
    for number in (1, 2, 3):
        ask(transport, "train", task(round=number))
        ask(transport, "evaluate", task(round=number))
    assert [line.split(",")[0] for line in screen] == [
        f"training {what}: round {number}" for number in (1, 2, 3) for what in ("begins", "ends")
    ]
    assert screen[-1].endswith(" s")


def test_refusals_and_failures_are_said_once_counted_and_quote_nothing(site):
    peer = Echo()
    transport, screen, _ = site(peer, Policy(max_rounds=1))
    ask(transport, "train", b"fail")
    assert screen[1].startswith("training failed after 0.")
    assert screen[1].endswith("s: ValueError; the audit file has its message")
    for _ in range(12):
        ask(transport, "train")
        ask(transport, "evaluate", b"fail")
    said = "refused: policy.max_rounds: this site has trained 1 times, at most 1 are allowed until its peer is started"
    failed = "evaluate failed: ValueError; the audit file has its message"
    assert [line.split(" again")[0] for line in screen[2:]] == [said, failed, said, f"{failed} (10 times so far)"]
    assert screen[4].endswith("(10 times so far)")
    assert not any("verrouill" in line for line in screen)


def test_work_that_nobody_waits_for_is_said_to_be_given_up(site):
    transport, screen, _ = site(Echo())
    ask(transport, "train", b"slow", timeout=0.3)
    until = time.monotonic() + 5
    while len(screen) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert screen[1].startswith("training given up after ")
    assert screen[1].endswith("nobody waits for it any more")


def test_a_full_disk_is_said_once_answers_nothing_spoils_no_line_and_is_over_when_there_is_room(site, tmp_path):
    """The limit on this process's files is as real as a full disk: what still fits of a line is written, then errno."""
    peer = Echo()
    transport, screen, _ = site(peer)
    assert ask(transport, "train") == b"x"
    before, limits = (tmp_path / "a.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        answers = [ask(transport, "train"), ask(transport, "evaluate")]
        assert (tmp_path / "a.jsonl").read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    full = "the audit file cannot be written: File too large (27)"
    for answer in answers:
        assert isinstance(answer, ParticipantError), "it passes: no decision of the site's"
        assert str(answer) == f"AuditError: {full}, and without it nothing is answered."
    assert peer.calls == [("train", 1)]
    assert ask(transport, "evaluate") == b"x"
    assert screen[2:] == [f"{full}: nothing is answered until it can", "the audit file can be written again"]
    assert [line["status"] for line in audit(tmp_path, "a")] == ["began", "answered"] * 2


def test_who_greets_by_which_rule_is_said_once_for_each_federation(site, make_chain):
    from llmchain_fed.federated.client.client import Client
    from llmchain_fed.federated.target import Target

    peer = Client(Target.of(make_chain(lora=True)), Participant("a", PAIRS), None)
    transport, screen, _ = site(peer)
    fed = FederatedAveraging(make_chain(lora=True), runtime=transport, training=TRAINING, progress=False)
    fed.fit(1)
    fed.fit(1)
    greetings = [line for line in screen if line.startswith("hub greets: federation ")]
    assert len(greetings) == 1
    assert greetings[0].endswith(", rule fedavg")
    assert len(screen) == 1 + 2 * 2
    other = FederatedAveraging(
        make_chain(lora=True, prompt="Say: {text}"), runtime=SocketTransport(transport.exchange.paths), progress=False
    )
    with pytest.raises(Exception, match="another contract"):
        other.fit(1)
    assert screen[5].startswith("hello failed: ContractError: another contract (prompt: ")


# --- status ---------------------------------------------------------------------------------------------------------


def test_a_process_of_this_account_is_told_how_the_site_stands_and_a_hub_is_not(site):
    peer = Echo()
    transport, _, served = site(peer, Policy(max_rounds=7))
    path = transport.exchange.paths["a"]
    began = time.time()
    found = ask_status(path)
    assert found.model_dump() == {
        **ABOUT, "started": found.started, "trainings": 0, "max_rounds": 7, "op": None, "round": None, "since": None,
        "heard": None, "last_refusal": None, "trouble": None,
    }  # fmt: skip
    assert abs(found.started - began) < 60

    def carried(frame):
        return served.answer(frames.pack({"do": "carry", "caller": "server"}, frame))

    answer, _ = frames.read(carried(frames.pack({"do": "status"})))
    assert answer["error"]["message"].startswith("unknown request 'status'; a site answers ping, put, poll")
    assert "name" not in answer
    assert ask_status(path).heard is None, "a request that is none was no request"
    ask(transport, "personal_state")
    huge = {"do": "put", "call": "1", "op": "train", "offset": 0, "total": len(task(round=2**70))}
    carried(frames.pack(huge, task(round=2**70)))
    carried(frames.pack({"do": "poll", "call": "1", "wait": 10}))
    slow = {"do": "put", "call": "2", "op": "train", "offset": 0, "total": 4}
    carried(frames.pack(slow, b"slow"))
    until = time.monotonic() + 5
    while (found := ask_status(path)).op is None and time.monotonic() < until:
        time.sleep(0.01)
    assert (found.op, found.round, found.trainings) == ("train", None, 2)
    assert found.heard >= began
    assert found.since >= began
    assert found.last_refusal.startswith("policy.operations: this site does not answer 'personal_state'")
    peer.give_up()


def test_what_failed_last_of_a_hello_and_of_a_training_is_a_trouble_until_it_succeeds(site):
    peer = Echo()
    transport, _, _ = site(peer, Policy(max_rounds=3, operations=("hello", "train", "evaluate")))
    path = transport.exchange.paths["a"]

    def trouble():
        return ask_status(path).trouble

    ask(transport, "hello", b"fail")
    assert trouble() == "hello failed: ValueError; the audit file has its message"
    ask(transport, "evaluate", b"fail")
    ask(transport, "evaluate")
    assert trouble().startswith("hello failed"), "to measure is not to take part"
    ask(transport, "train", b"fail")
    assert trouble().startswith("training failed")
    ask(transport, "train")
    assert trouble().startswith("hello failed")
    ask(transport, "hello")
    assert trouble() is None
    ask(transport, "train")
    ask(transport, "train")
    assert trouble().startswith("training refused: policy.max_rounds: ")


def test_what_is_no_status_is_no_status():
    for head in ({}, {"state": "here"}, ABOUT, {"error": {"type": "A", "message": "no\n\x1b"}}, {"name": 1}):
        with pytest.raises(TransportError) as error:
            heads.read_status(frames.pack(head))
        assert "\x1b" not in str(error.value)
        assert "\n" not in str(error.value)


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A folder with umlaut and space, and the words that start a peer there."""
    folder = tmp_path_factory.mktemp("p") / "Größe 1"
    folder.mkdir(mode=0o700)
    tiny_chain("causal", lora=True).save(folder / "chain")
    data = write_examples(folder / "Daten a.jsonl", PAIRS)
    words = [sys.executable, "-m", "llmchain_fed.cli", "peer", "--name", "a", "--threads", "1", "--socket"]
    words += [str(folder / "a.sock"), "--chain", str(folder / "chain"), "--data", str(data), "--held-out", str(data)]
    return folder, words


def started(folder, words, log):
    with (folder / log).open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, (folder / log).read_text()
        try:
            ask_status(folder / "a.sock")
            return process
        except TransportError:
            time.sleep(0.05)
    raise TimeoutError


def quorum_error_of(fed):
    with pytest.raises(QuorumError) as error:
        fed.fit(1)
    return error.value


@pytest.mark.federation
def test_a_peer_that_is_told_to_stop_in_a_training_says_so_writes_it_down_and_goes_on_when_started_again(command):
    folder, words = command
    process = started(folder, words, "first.log")
    try:
        chain = tiny_chain("causal", lora=True)
        fed = FederatedAveraging(
            chain, runtime=SocketTransport({"a": folder / "a.sock"}, patience=2.0), training=SLOW, progress=False
        )
        failed = []
        round_1 = threading.Thread(target=lambda: failed.append(quorum_error_of(fed)))
        round_1.start()
        until = time.monotonic() + 30
        while ask_status(folder / "a.sock").op != "train" and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert time.monotonic() - began < 10
        round_1.join(60)
        assert "'a'" in str(failed[0])
    finally:
        process.kill()
    said = (folder / "first.log").read_text().splitlines()
    assert all(line.startswith("20") for line in said), "each with its time"
    warned = next(line for line in said if "warning: " in line)
    greets, begins, *ends = said[next(n for n, line in enumerate(said) if "hub greets" in line) :]
    given_up, stopping = sorted(ends, key=lambda line: "stopping" in line)
    assert "warning: the held-out file is the training file" in warned
    assert "hub greets: federation " in greets
    assert begins.endswith("training begins: round 1")
    assert stopping.endswith(" stopping; start it again with the same command")
    assert " training given up: round 1 after " in given_up
    assert len(said) == 5 + 5, "its five lines at the start stay"
    lines = [json.loads(line) for line in (folder / "a.sock.audit.jsonl").read_text().splitlines()]
    assert (lines[-1]["op"], lines[-1]["status"], lines[-1]["round"]) == ("train", "failed", 1)
    assert not (folder / "a.sock").exists()
    again = started(folder, words, "second.log")
    try:
        fed = FederatedAveraging(
            chain, runtime=SocketTransport({"a": folder / "a.sock"}), training=TRAINING, progress=False
        )
        assert fed.fit(1)[-1].trained == ["a"]
        again.send_signal(signal.SIGINT)
        assert again.wait(20) == 130
    finally:
        again.kill()
