"""`llmchain-fed status` and the file it reads: while a federation runs, from outside, also when its process is gone.

Belongs here: what the file has and the command says and ends with. Does not: what is told at once (test_attendance).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import typer
from scripted import CUT, SHARES, TRAINING, federation
from typer.testing import CliRunner

from llmchain_fed import ConfigError, FederatedAveraging
from llmchain_fed.cli.__main__ import app
from llmchain_fed.runtimes import overview
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.nvflare import engine_state
from llmchain_fed.tracking import status_file
from llmchain_fed.tracking.status_file import StatusFile

FINE, INCOMPLETE, FAILED = 0, 3, 2


def command(*arguments):
    """The command's exit status and what it says."""
    done = CliRunner().invoke(app, ["status", *map(str, arguments)])
    if isinstance(done.exception, ConfigError):
        return FAILED, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came to that")


# --- while it runs --------------------------------------------------------------------------------------------------


def test_from_elsewhere_one_sees_who_is_out_which_round_it_is_and_what_is_waited_for(make_chain, tmp_path):
    """The federation stands still in round 2 while another process asks."""
    going_on, there = threading.Event(), threading.Event()
    status = StatusFile(tmp_path / "status.json", rounds=3, about={"jobs": lambda: 1})
    fed, transport = federation(make_chain, {"hello": {"b": [CUT] * 9}}, callbacks=[status])
    inner = transport.local["c"].handle

    def handle(op, payload):
        if op == "train" and fed.round == 1:
            there.set()
            assert going_on.wait(60)
        return inner(op, payload)

    transport.local["c"].handle = handle
    running = threading.Thread(target=lambda: [fed.fit(1, of=3) for _ in range(2)])
    running.start()
    try:
        assert there.wait(60)
        until(lambda: status_file.read(status.path).participants["c"].asked == "train")
        done = subprocess.run(
            [sys.executable, "-m", "llmchain_fed.cli", "status", str(tmp_path)], capture_output=True, text=True
        )
        code, text = command(tmp_path, "--json")
    finally:
        going_on.set()
        running.join(60)
    assert (done.returncode, code) == (INCOMPLETE, INCOMPLETE)
    lines = done.stdout.splitlines()
    assert lines[1].startswith("  training, round 2 of 3; since ")
    assert f"process {os.getpid()}" in lines[1]
    assert any(line.startswith("  in      c, since ") and line.endswith("asked: training") for line in lines)
    assert any(line.startswith("  out     b, since ") and "never heard, the cable is out" in line for line in lines)
    assert "  waits for the answers of: c (train)" in lines
    assert any(line.startswith("  last: round 1 of 3 · 2 of 3 trained · ") for line in lines)
    assert any(" GB free at " in line for line in lines)
    assert lines[-1] == "  ! b is out: the cable is out"
    (found,) = json.loads(text)["found"]
    assert (found["state"], found["round"], found["rounds"], found["gone"]) == ("training", 2, 3, False)
    assert found["participants"]["b"]["reason"] == "TransportError: the cable is out"
    assert found["about"] == {"jobs": 1}
    assert status_file.read(status.path).state == "between"
    status.__exit__(None, None, None)
    assert os.stat(status.path).st_mode & 0o777 == 0o600


def test_the_command_takes_no_torch_and_little_time(tmp_path):
    certificate(tmp_path / "admin", "client.crt", 100.5)
    file = tmp_path / "federation.yaml"
    file.write_text("out: .\nhub: {admin: admin, sites: [a]}\n")
    code = (
        "import sys; from llmchain_fed.cli.__main__ import app\n"
        f"try: app(['status', {str(tmp_path)!r}, {str(file)!r}])\n"
        "except SystemExit as e: print(e.code, [m for m in ('torch', 'transformers', 'nvflare') if m in sys.modules])"
    )
    with socket.create_server(("127.0.0.1", 0)) as server, StatusFile(tmp_path / "status.json"):
        hub_at(tmp_path / "admin", server.getsockname()[1])
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.5, f"{used} s of processor time"


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_a_federation_that_is_done_is_fine(make_chain, tmp_path):
    status = StatusFile(tmp_path / "status.json", rounds=2)
    fed, _ = federation(make_chain, {}, callbacks=[status])
    with status:
        assert status_file.read(status.path).state == "starting"
        status.note("waiting for the hub's engine")
        until(lambda: "it waits: waiting for the hub's engine" in command(tmp_path)[1])
        fed.fit(1)
        assert status_file.read(status.path).state == "between"
        fed.fit(1)
    code, text = command(tmp_path)
    assert code == FINE
    assert "ended after round 2 of 2" in text
    assert not [t for t in threading.enumerate() if t.name == "status file"]


@pytest.mark.parametrize(("error", "state"), [(OSError("no disk"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_what_it_ended_with_is_said(error, state, make_chain, tmp_path, monkeypatch):
    status = StatusFile(tmp_path / "status.json", rounds=3)
    fed, _ = federation(make_chain, {}, callbacks=[status])
    fed.fit(1)

    def train(*_):
        raise error

    monkeypatch.setattr(fed._server.dispatcher, "train", train)
    with pytest.raises(type(error)), status:
        fed.fit(1)
    code, text = command(tmp_path)
    assert code == INCOMPLETE
    assert f"{state} after round 1 of 3" in text
    assert f"! it {state} with {type(error).__name__}" in text


def test_a_command_that_ends_with_a_status_of_its_own_has_ended(make_chain, tmp_path):
    status = StatusFile(tmp_path / "status.json", rounds=1)
    fed, _ = federation(make_chain, {"hello": {"b": [CUT]}}, callbacks=[status])
    with suppress(typer.Exit), status:
        fed.fit(1)
        raise typer.Exit(3)
    code, text = command(tmp_path)
    assert code == INCOMPLETE
    assert text.splitlines()[1].startswith("  ended after round 1 of 1; ")
    assert text.splitlines()[-1] == "  ! b is out: the cable is out"


def test_an_error_outside_a_fit_is_said_too(tmp_path):
    with pytest.raises(OSError, match="no disk"), StatusFile(tmp_path / "status.json"):
        raise OSError("no disk")
    assert "! it failed with OSError: no disk" in command(tmp_path)[1]


def test_a_process_that_was_killed_is_told_from_one_that_works(tmp_path):
    code = (
        "import sys, time; from llmchain_fed.tracking.status_file import StatusFile\n"
        f"with StatusFile({str(tmp_path / 'status.json')!r}): print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        assert command(tmp_path)[0] == FINE
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    code, text = command(tmp_path)
    assert code == INCOMPLETE
    assert f"! the process that wrote it (pid {process.pid}) is gone" in text


def test_one_that_hangs_is_told(tmp_path):
    with StatusFile(tmp_path / "status.json") as status:
        found = json.loads(status.path.read_text())
    found |= {"state": "training", "written": time.time() - 300}
    status.path.write_text(json.dumps(found))
    code, text = command(tmp_path)
    assert code == INCOMPLETE
    assert f"! its process (pid {os.getpid()}) has written nothing for 5 min" in text


def test_a_disk_that_is_full_is_said_once_and_the_federation_goes_on(make_chain, tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_file, "write_whole", full)
    fed, _ = federation(make_chain, {}, callbacks=[StatusFile(tmp_path / "status.json")])
    assert len(fed.fit(2)) == 2
    assert capfd.readouterr().err.count("No space left on device") == 1


# --- what is no status ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1, 2]",
        "not json",
        '{"pid": -5}',
        '{"pid": "1"}',
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_by_name(text, tmp_path):
    (tmp_path / "status.json").write_text(text)
    code, said = command(tmp_path)
    assert code == FAILED
    assert "status.json" in said


def test_each_field_has_its_type(tmp_path):
    with StatusFile(tmp_path / "status.json") as status:
        good = json.loads(status.path.read_text())
    strange = {"participants": {"a": {"state": "x"}}}
    for change in ({"pid": True}, {"state": "odd"}, {"round": -1}, {"more": 1}, strange):
        status.path.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match="makes no sense"):
            status_file.read(status.path)


def test_text_in_it_writes_no_further_lines(tmp_path):
    with StatusFile(tmp_path / "status.json") as status:
        good = json.loads(status.path.read_text())
    seen = {"state": "out", "since": 1.0, "reason": "gone\n  in      all\x1b[2J"}
    status.path.write_text(json.dumps(good | {"participants": {"a\nb": seen}, "last_round": "x\ny"}))
    _, text = command(tmp_path)
    assert "\x1b" not in text
    assert not any(line.startswith("  in ") or line in ("y", "b") for line in text.splitlines())


def test_what_is_nothing_we_know_ends_with_2(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        code, said = command(place)
        assert code == FAILED
        assert "Give a federation's file, the folder it writes to (`out`), a kit's folder, or a peer's socket." in said
    (tmp_path / "x.yaml").write_text("a: 1\n")
    assert command(tmp_path / "x.yaml")[0] == FAILED
    assert command("")[0] in (FAILED, FINE)


# --- a federation's file --------------------------------------------------------------------------------------------


def certificate(kit, name, days):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(who, who, key.public_key(), 1, now - timedelta(days=400), now + timedelta(days=days))
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "fed_admin.json").write_text("{}")
    signed = made.sign(key, hashes.SHA256())
    (kit / "startup" / name).write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def test_a_federations_file_leads_to_its_results_and_to_the_certificate(make_chain, tmp_path):
    certificate(tmp_path / "admin", "client.crt", 100.5)
    file = tmp_path / "federation.yaml"
    file.write_text("chain: translate\nout: results\nrounds: 1\nhub: {admin: admin, sites: [a, b, c]}\n")
    code, text = command(file)
    assert code == INCOMPLETE
    assert f"! no federation has written to {tmp_path / 'results'} yet" in text
    (tmp_path / "results").mkdir()
    status = StatusFile(tmp_path / "results" / "status.json", rounds=1)
    fed, _ = federation(make_chain, {}, callbacks=[status])
    fed.fit(1)
    code, text = command(file)
    assert code == FINE, text
    assert "certificate of admin: 100 days left" in text
    assert command(tmp_path)[1].splitlines()[0] == text.splitlines()[0], "the folder will do"
    certificate(tmp_path / "old", "client.crt", -3.5)
    file.write_text("out: results\nhub: {admin: old}\n")
    code, text = command(file)
    assert code == INCOMPLETE
    assert "! the certificate of old ended 4 days ago: renew it" in text


def hub_at(admin, port):
    (admin / "startup" / "fed_admin.json").write_text(json.dumps({"admin": {"host": "127.0.0.1", "port": port}}))


def test_a_federations_file_leads_to_the_hubs_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    certificate(tmp_path / "admin", "client.crt", 100.5)
    file = tmp_path / "federation.yaml"
    file.write_text("out: results\nhub: {admin: admin, sites: [a]}\n")
    (tmp_path / "results").mkdir()
    now, kit = time.time(), tmp_path / "hub"
    kit.mkdir()
    state = engine_state.EngineState(
        name="server", pid=os.getpid(), started=now, written=now, state="running", says="", hub="h:1"
    )
    with socket.create_server(("127.0.0.1", 0)) as server, StatusFile(tmp_path / "results" / "status.json"):
        port = server.getsockname()[1]
        hub_at(tmp_path / "admin", port)
        began = time.monotonic()
        assert command(file)[0] == FINE, "another account's engine, which only its port tells of"
        engine_state.point(port, kit)
        engine_state.write(kit, state)
        assert command(file)[0] == FINE
        for change, why in (
            ({"state": "ended", "says": "it was told to stop"}, "it has ended: it was told to stop"),
            ({"pid": 2**22 + 1}, "its process (pid 4194305) is gone"),
            (
                {"written": now - 600},
                f"its process (pid {os.getpid()}) has written nothing for 10 min: it hangs, perhaps",
            ),
        ):
            engine_state.write(kit, state.model_copy(update=change))
            code, text = command(file)
            assert code == INCOMPLETE
            assert f"! the hub's engine does not run: {why}" in text
        engine_state.pointer(port).unlink()
        server.close()
        code, text = command(file)
        assert code == INCOMPLETE
        assert f"! the hub's engine does not run: nobody answers at 127.0.0.1:{port} (Connection refused)" in text
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(3))
        assert "the hub's engine does not run: nobody answers at" in command(file)[1]
        assert time.monotonic() - began < 5
    code, text = command(file)
    assert code == FINE, "a federation that is done needs none"


def test_a_disk_that_is_nearly_full_is_a_problem_wherever_it_is_written_to(tmp_path, peers, monkeypatch):
    kit = tmp_path / "kit"
    certificate(kit, "client.crt", 100.5)
    with StatusFile(tmp_path / "status.json"):
        peers(tmp_path / "a.sock", PEER)
        assert command(tmp_path, kit, tmp_path / "a.sock")[0] == FINE
        usage = overview.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(overview.shutil, "disk_usage", lambda _: usage._replace(free=199_000_000))
        code, text = command(tmp_path, kit, tmp_path / "a.sock")
    assert code == INCOMPLETE
    for folder in (tmp_path, kit, "/tmp"):
        assert f"! the disk of {folder} is full, or nearly: 199 MB are free" in text


# --- an engine ------------------------------------------------------------------------------------------------------


def test_an_engine_says_who_is_connected(tmp_path):
    kit = tmp_path / "hub"
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "fed_server.json").write_text("{}")
    assert "! no engine runs from this kit" in command(kit)[1]
    now = time.time()
    site = engine_state.SeenSite
    state = engine_state.EngineState(
        name="hub", pid=os.getpid(), started=now, written=now, state="running", says="sites may come", hub="hub:8002",
        certificate_ends=now + 20.5 * 86_400, sites={"a": site(connected=True, since=now - 60)},
    )  # fmt: skip
    engine_state.write(kit, state)
    code, text = command(kit)
    assert code == INCOMPLETE
    assert "in      a, since " in text
    assert "! the certificate of hub ends in 20 days: renew it" in text
    engine_state.write(kit, state.model_copy(update={"certificate_ends": now + 900 * 86_400}))
    assert command(kit)[0] == FINE
    trouble = site(connected=False, since=now, trouble="another key tried to come under its name")
    engine_state.write(kit, state.model_copy(update={"pid": 2**22 + 1, "sites": {"a": trouble}}))
    code, text = command(kit)
    assert code == INCOMPLETE
    assert "! a: another key tried to come under its name" in text
    assert (
        "the engine of this kit does not run: its process (pid 4194305) is gone. To go on, start `llmchain-fed engine"
        in text
    )


@pytest.fixture
def site_kit(tmp_path):
    """A site's kit, and a function that lets its engine have written something."""
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text("{}")
    now = time.time()
    state = engine_state.EngineState(
        name="a", pid=os.getpid(), started=now, written=now, state="running", says="connected", hub="hub:8002",
        connected=True, since=now - 60, certificate_ends=now + 900 * 86_400, socket=str(tmp_path / "a.sock"),
    )  # fmt: skip
    return kit, lambda **change: engine_state.write(kit, state.model_copy(update=change))


def test_a_sites_kit_tells_of_its_peer_as_well(site_kit, tmp_path, peers):
    kit, wrote = site_kit
    wrote()
    code, text = command(kit)
    assert code == INCOMPLETE
    assert "! its peer does not answer: " in text
    peers(tmp_path / "a.sock", PEER)
    code, text = command(kit)
    assert code == FINE, text
    assert "connected to the hub at hub:8002, since" in text
    assert "its peer alpha: up since " in text
    (found,) = json.loads(command(kit, "--json")[1])["found"]
    assert found["peer"]["name"] == "alpha"


def test_a_peer_that_refused_the_hub_is_a_problem_at_its_socket_and_its_kit(site_kit, tmp_path, peers):
    kit, wrote = site_kit
    wrote()
    peers(tmp_path / "a.sock", PEER | {"trouble": "hello failed: ContractError: another contract"})
    for place in (kit, tmp_path / "a.sock"):
        code, text = command(place)
        assert code == INCOMPLETE
        assert "it does not take part; the hub was refused, or refused: hello failed: ContractError" in text


def test_an_engine_that_ended_is_not_connected_and_the_advice_follows_from_why(site_kit, tmp_path, peers):
    kit, wrote = site_kit
    peers(tmp_path / "a.sock", PEER)
    start = f"start `llmchain-fed engine {kit} --socket {tmp_path / 'a.sock'}`"
    wrote(state="ended", says="it was told to stop")
    code, text = command(kit)
    assert code == INCOMPLETE
    assert "connected to the hub" not in text
    assert f"! the engine of this kit does not run: it has ended: it was told to stop. To go on, {start}" in text
    wrote(state="ended", says="the hub does not let this certificate in: it was revoked.", lasting=True)
    text = command(kit)[1]
    assert "it has ended: the hub does not let this certificate in: it was revoked. To go on, mend that first" in text
    wrote(pid=2**22 + 1)
    text = command(kit)[1]
    assert "connected to the hub" not in text
    assert f"its process (pid 4194305) is gone. To go on, {start}" in text
    wrote(written=time.time() - 600)
    assert "has written nothing for 10 min: it hangs, perhaps" in command(kit)[1]


# --- a peer ---------------------------------------------------------------------------------------------------------

PEER = {
    "name": "alpha", "started": 1.0, "examples": 1200, "held_out": True, "trainings": 3, "max_rounds": 10,
    "op": "train", "round": 4, "since": 2.0, "heard": 3.0, "last_refusal": "PolicyError: policy.max_steps: too many",
    "trouble": None, "audit": "/tmp/a", "contract": {"base": "1e1c"},
}  # fmt: skip


class FakePeer:
    """A socket that answers each frame as it is told."""

    def __init__(self, path, answer):
        self.listener, self.asked, self.answer = frames.listen(path), [], answer
        threading.Thread(target=self.listener.serve, args=(self.handle,), daemon=True).start()

    def handle(self, connection):
        with connection:
            self.asked.append(frames.read(connection.recv_bytes(frames.MAX_FRAME, 5.0))[0])
            connection.send_bytes(frames.pack(self.answer), 5.0)


def test_a_peer_says_what_it_works_on(tmp_path, peers):
    fake = peers(tmp_path / "a.sock", PEER)
    code, text = command(tmp_path / "a.sock")
    assert code == FINE, text
    assert fake.asked == [{"do": "status"}]
    assert "alpha: up since " in text
    assert "3 trainings of 10" in text
    assert "at work: train, round 4, since " in text
    assert "last asked by a hub " in text
    assert "1,200 examples, with held-out ones" in text
    assert "last refusal: policy.max_steps: too many" in text
    (found,) = json.loads(command(tmp_path / "a.sock", "--json")[1])["found"]
    assert found["kind"] == "peer"
    assert found["contract"] == {"base": "1e1c"}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ({"error": {"type": "TransportError", "message": "unknown\nrequest"}}, r"unknown\nrequest"),
        ({"name": "alpha"}, "what a site says of itself makes no sense: `started`"),
        (PEER | {"trainings": "many"}, "what a site says of itself makes no sense: `trainings`"),
    ],
)
def test_a_peer_that_answers_something_else(answer, wanted, tmp_path, peers):
    peers(tmp_path / "a.sock", answer)
    code, text = command(tmp_path / "a.sock")
    assert code == INCOMPLETE
    assert f"! its peer does not answer: {wanted}" in text


def test_a_peer_that_is_gone_and_one_that_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "_ANSWER", 0.3)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "b.sock"))
        os.chmod(tmp_path / "b.sock", 0o600)
        key = tmp_path / "b.sock.key"
        key.write_bytes(b"k" * 32)
        key.chmod(0o600)
        code, text = command(tmp_path / "b.sock")
        assert code == INCOMPLETE
        assert "nobody answers at" in text
        listening.listen(8)
        started = time.monotonic()
        code, text = command(tmp_path / "b.sock")
        assert code == INCOMPLETE
        assert "it has been silent for 0.3 s: it is stopped" in text
        assert time.monotonic() - started < 4


def test_several_at_once(tmp_path, peers, make_chain):
    peers(tmp_path / "a.sock", PEER)
    out = tmp_path / "out"
    out.mkdir()
    fed = FederatedAveraging(
        make_chain(), participants=SHARES, training=TRAINING, progress=False, callbacks=StatusFile(out / "status.json")
    )
    fed.fit(1)
    code, text = command(out, tmp_path / "a.sock")
    assert code == FINE
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")] == ["federation", "peer"]


@pytest.fixture
def peers():
    made = []

    def make(path, answer):
        made.append(FakePeer(path, answer))
        return made[-1]

    yield make
    for fake in made:
        fake.listener.close()
