"""What an operator is told by an engine: before it starts, while it runs, what it leaves behind. No NVFlare process.

Belongs here: the parts, against small servers and reports made up here. Does not: real hubs and sites
(test_engine_federation), certificates (test_certificates).
"""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from federation_processes import free_port

from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.nvflare import engine, engine_state, kits
from llmchain_fed.runtimes.nvflare.keeping import job_folders, keeper, logs, news, reaching
from llmchain_fed.runtimes.nvflare.keeping.guard import Guard, elsewhere
from llmchain_fed.runtimes.nvflare.keeping.keeper import Keeper
from llmchain_fed.runtimes.nvflare.keeping.standing import HubLink, Sites

ONE, OTHER = "SHA256:" + ":".join(["AA"] * 32), "SHA256:" + ":".join(["BB"] * 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The kits of one federation, made once."""
    return kits.provision_here(tmp_path_factory.mktemp("kits"), sites=["a", "b"], port=free_port())


@pytest.fixture
def kit(made, tmp_path):
    """A site's, to be spoilt."""
    return shutil.copytree(made["a"], tmp_path / "a")


@pytest.fixture
def hub(made, tmp_path):
    return shutil.copytree(made["hub"], tmp_path / "hub")


def point(kit, host, port):
    """Lets a kit's hub be elsewhere."""
    path = kit / "startup" / "fed_client.json"
    found = json.loads(path.read_text())
    found["servers"][0]["service"]["target"] = f"{host}:{port}"
    path.write_text(json.dumps(found))


# --- the hub cannot be reached --------------------------------------------------------------------------------------


@contextmanager
def listening(answer):
    """A port at which `answer(connection)` says what it says."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def certificate(folder, *, issuer="CN=ACME Firewall", days=(-1, 1)):
    """A self-signed one with its key, in one file."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name.from_rfc4514_string(issuer)
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0])).not_valid_after(now + timedelta(days=days[1]))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    path = folder / "intercepting.pem"
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return path


def in_tls(pem):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    return answer


def test_a_name_that_dns_does_not_know_is_told_at_once_and_waited_for(kit):
    point(kit, "hub.klinik.invalid", 8002)
    found = reaching.hindrance(kit)
    assert found.says.startswith("hub.klinik.invalid does not resolve (DNS: ")
    assert not found.lasting


def test_a_dns_server_that_is_silent_is_given_up(kit, monkeypatch):
    monkeypatch.setattr(reaching, "SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: threading.Event().wait(5))
    assert "no DNS server answered" in reaching.hindrance(kit).says


def test_a_port_at_which_nobody_listens(kit):
    port = free_port()
    point(kit, "127.0.0.1", port)
    assert reaching.hindrance(kit).says == f"nobody listens at 127.0.0.1:{port} (connection refused)"
    engine.check(kit)  # the hub may come later: no error


def test_a_firewall_that_drops_packets(kit, monkeypatch):
    monkeypatch.setattr(reaching, "SECONDS", 0.3)
    monkeypatch.setattr(socket.socket, "connect", _no_answer)
    point(kit, "127.0.0.1", 8002)
    assert reaching.hindrance(kit).says == "no answer from 127.0.0.1:8002 within 0.3 s (a firewall?)"


def _no_answer(self, address):
    raise TimeoutError


def test_tls_interception_is_called_by_its_name_and_lasts(kit, tmp_path):
    with listening(in_tls(certificate(tmp_path))) as port:
        point(kit, "127.0.0.1", port)
        found = reaching.hindrance(kit)
        assert found.lasting
        for part in ("is not this federation's hub", "another authority (CN=ACME Firewall)", "TLS interception"):
            assert part in found.says
        with pytest.raises(ConfigError, match="TLS interception by a firewall looks like that"):
            engine.check(kit)


def test_a_port_that_speaks_no_tls_one_that_is_silent_and_one_that_hangs_up(kit):
    def web_page(connection):
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with listening(web_page) as port:
        point(kit, "127.0.0.1", port)
        assert "does not speak TLS: another program, or a proxy's page" in reaching.hindrance(kit).says
    with listening(lambda connection: connection.recv(1000) and time.sleep(3)) as port:
        point(kit, "127.0.0.1", port)
        began = time.monotonic()
        assert "does not answer in TLS" in reaching.hindrance(kit).says
        assert time.monotonic() - began < 8
    with listening(lambda connection: connection.recv(1)) as port:
        point(kit, "127.0.0.1", port)
        found = reaching.hindrance(kit)
        assert "broke off the TLS handshake" in found.says
        assert not found.lasting


def test_the_hub_itself_is_no_hindrance_and_a_kit_of_another_authority_is(made, kit, tmp_path):
    startup = made["hub"] / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    context.load_verify_locations(startup / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    with listening(answer) as port:
        point(kit, "127.0.0.1", port)
        assert reaching.hindrance(kit) is None
        stranger = certificate(tmp_path)
        for name in ("client.crt", "client.key"):
            shutil.copy(stranger, kit / "startup" / name)
        found = reaching.hindrance(kit)
        assert "does not accept this site's certificate" in found.says
        assert found.lasting


def test_a_proxy_that_is_set_is_named_as_not_used(kit):
    assert reaching.proxy_ignored(kit, {}) is None
    told = reaching.proxy_ignored(kit, {"HTTPS_PROXY": "http://user:secret@proxy:3128"})
    assert told.startswith("HTTPS_PROXY is set and not used: the engine connects directly to localhost:")
    assert "secret" not in told


# --- the kit itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["local", "startup/rootCA.pem", "local/resources.json", "startup/client.key"])
def test_an_incomplete_kit_names_what_is_missing(kit, part):
    shutil.rmtree(kit / part) if part == "local" else (kit / part).unlink()
    with pytest.raises(ConfigError, match=r"is incomplete: .*cannot be found. Copy the whole folder") as told:
        engine.check(kit)
    assert (part if part != "local" else "local/resources.json, local/authorization.json") in str(told.value)


def test_a_kit_that_cannot_be_written_is_told_in_the_systems_words(kit):
    for path in (kit, *kit.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    as_root = os.geteuid() == 0
    for parent in kit.parents if as_root else ():
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    if as_root:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(ConfigError, match=r"the kit cannot be written: .*: Permission denied\. Its engine keeps"):
            engine.check_folder(kit)
    finally:
        if as_root:
            os.seteuid(0)
        for path in (kit, *kit.rglob("*")):
            path.chmod(0o755)


# --- who may come ---------------------------------------------------------------------------------------------------


def test_the_first_key_of_a_name_is_remembered_and_another_refused_also_by_the_next_process(tmp_path):
    guard = Guard(tmp_path, now=lambda: 86_400.0)
    assert guard.refusal("alpha", ONE) is None
    assert guard.refusal("alpha", ONE) is None
    assert guard.refusal("beta", OTHER) is None
    for again in (guard, Guard(tmp_path)):
        told = again.refusal("alpha", OTHER)
        assert told.startswith("another key came under its name: known since 1970-01-02 is " + ONE)
        assert OTHER in told
        assert f"take alpha out of {tmp_path / 'known_sites.json'}" in told
    found = json.loads((tmp_path / "known_sites.json").read_text())
    assert (tmp_path / "known_sites.json").stat().st_mode & 0o777 == 0o600
    del found["sites"]["alpha"]
    (tmp_path / "known_sites.json").write_text(json.dumps(found))
    assert guard.refusal("alpha", OTHER) is None, "what the operator took out is new, without a restart"
    assert guard.refusal("alpha", ONE) is not None


def test_a_list_that_is_none_of_ours_stops_the_start_and_not_a_running_hub(tmp_path):
    guard = Guard(tmp_path)
    assert guard.refusal("alpha", ONE) is None
    (tmp_path / "known_sites.json").write_text('{"sites": {"alpha": 3}}')
    assert guard.refusal("alpha", OTHER) is not None
    with pytest.raises(ConfigError, match=r"known_sites\.json of the hub's kit makes no sense"):
        Guard(tmp_path)


def test_with_an_authority_its_registry_decides(tmp_path):
    from llmchain_fed.runtimes.nvflare import registry

    authority = tmp_path / "authority"
    (authority / "ca").mkdir(parents=True)
    registry.write(authority, registry.Registry())
    guard = Guard(tmp_path, authority)
    assert "has no certificate for the name alpha" in guard.refusal("alpha", ONE)
    entry = {
        "name": "alpha", "role": "site", "organisation": "A", "certificate": ONE, "public_key": ONE,
        "approved": registry.now(), "by": "me", "until": registry.now(),
    }  # fmt: skip
    registry.write(authority, registry.Registry(certificates=[registry.Certificate(**entry)]))
    assert guard.refusal("alpha", ONE) is None
    assert "another one was presented" in guard.refusal("alpha", OTHER)
    gone = registry.Certificate(**entry, revoked=registry.now())
    registry.write(authority, registry.Registry(certificates=[gone]))
    assert "was revoked at" in guard.refusal("alpha", ONE)
    (authority / "names.json").write_text("{")
    assert "registry cannot be read" in guard.refusal("alpha", ONE)
    assert not (tmp_path / "known_sites.json").exists()
    with pytest.raises(ConfigError, match="is no authority's folder"):
        Guard(tmp_path, tmp_path / "nowhere")


def test_who_has_a_name_keeps_it_as_long_as_it_is_heard():
    assert elsewhere("one", "two", 3.0), "another process while the first lives"
    assert elsewhere("one", None, 3.0)
    assert not elsewhere("one", "one", 3.0), "the same process over a new connection"
    assert not elsewhere("one", "two", 11.0), "the first is silent: its machine is gone"


# --- what is said while it runs -------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def peer(silent=0.0, address="10.0.0.1:5000"):
    return news.Peer(address=address, fingerprint=ONE, silent=silent)


def test_sites_that_come_go_and_are_silent_are_a_line_each():
    clock = Clock()
    sites = Sites(clock)
    assert sites.heard({"a": peer(), "b": peer()}) == [
        "site a is connected, from 10.0.0.1:5000",
        "site b is connected, from 10.0.0.1:5000",
    ]
    assert sites.heard({"a": peer(3.0), "b": peer(14.0)}) == []
    clock.time += 20
    assert sites.heard({"b": peer(16.0)}) == [
        "site a is out: its connection was closed",
        "site b is out: nothing was heard of it for 15 s",
    ]
    assert (sites.seen["a"].connected, sites.seen["a"].since) == (False, 1020.0)
    clock.time += 32
    assert sites.heard({"a": peer(), "b": peer(40.0)}) == ["site a is back after 32 s"]


def test_a_refused_site_is_one_line_and_its_trouble_stands_until_it_is_over():
    clock = Clock()
    sites = Sites(clock)
    sites.heard({"a": peer()})
    refused = news.Refused(name="a", code=news.ELSEWHERE, address="10.0.0.2:1", says="is seen from two places: …")
    assert sites.refused(refused) == ["site a is seen from two places: …"]
    clock.time += 30
    assert sites.refused(refused) == []
    assert sites.heard({"a": peer()}) == []
    assert sites.seen["a"].trouble == "is seen from two places: …"
    assert sites.seen["a"].connected
    key = news.Refused(name="z", code=news.OTHER_KEY, address="10.0.0.2:1", says="another key came …")
    assert sites.refused(key) == ["site z: another key came …"]
    assert not sites.seen["z"].connected
    clock.time += 200
    sites.heard({"a": peer()})
    assert {site.trouble for site in sites.seen.values()} == {None}
    assert sites.refused(refused) == ["site a is seen from two places: …"]


def test_a_lost_connection_and_its_return_are_told_with_their_times():
    clock = Clock()
    link = HubLink("hub:8002", clock)
    assert link.heard({}) is None
    assert link.heard({news.HUB: peer()}) == "connected to the hub at hub:8002"
    assert (
        link.heard({news.HUB: peer(16.0)})
        == "the connection to the hub at hub:8002 is lost (nothing was heard for 15 s)"
    )
    clock.time += 61
    assert link.heard({news.HUB: peer()}) == "connected to the hub at hub:8002 again, after 61 s"
    assert link.heard({}).endswith("is lost (it was closed)")


# --- what it leaves behind ------------------------------------------------------------------------------------------


def job(folder, number, status=None):
    path = folder / f"{number:08x}-0000-0000-0000-000000000000"
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"x" * 100)
    if status is not None:
        (path / "meta").write_text(json.dumps({"status": status}))
    os.utime(path, (number, number))
    return path


def test_folders_of_ended_jobs_go_but_the_newest_and_the_running_stay(tmp_path):
    ours = [job(tmp_path, number) for number in range(1, 7)]
    store = tmp_path / "storage" / "jobs"
    kept = [job(store, 1, "RUNNING"), job(store, 2, "SUBMITTED")]
    done = [job(store, number, "FINISHED:COMPLETED") for number in range(3, 8)]
    (tmp_path / "startup").mkdir()
    (tmp_path / "00000009-0000-0000-0000-000000000000").symlink_to(tmp_path / "startup")
    job_folders.remove_ended(tmp_path, [f"python runner -r {ours[0].name}"], kept=2)
    assert [path.exists() for path in ours] == [True, False, False, False, True, True]
    assert all(path.exists() for path in kept)
    assert [path.exists() for path in done] == [False, False, False, True, True]
    assert (tmp_path / "startup").is_dir()


def test_the_log_has_a_bound_while_processes_write_to_it(tmp_path):
    output = logs.open_file(tmp_path)
    for number in range(5):
        os.write(output, f"part {number} ".encode() * 200 + b"\n")
        logs.bound(tmp_path, most=1000)
    os.write(output, b"2026-01-01 ERROR conn_manager it \x1b[31mfailed\n2026-01-01 INFO x went on\n")
    os.close(output)
    files = sorted(tmp_path.glob("nvflare.log*"))
    assert [f.name for f in files] == ["nvflare.log", "nvflare.log.1", "nvflare.log.2"]
    assert "part 4" in files[1].read_text()
    assert files[0].stat().st_size < 1000
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert "it" in logs.last_error(tmp_path)
    assert "\x1b" not in logs.last_error(tmp_path)


def test_the_log_configuration_is_nvflares_and_writes_into_no_file_of_its_own(kit):
    logs.configure(kit)
    before = (kit / "local" / "log_config.json").stat().st_mtime_ns
    logs.configure(kit)
    assert (kit / "local" / "log_config.json").stat().st_mtime_ns == before
    assert "filename" not in (kit / "local" / "log_config.json").read_text()
    code = (
        "import logging; from nvflare.apis.workspace import Workspace; from nvflare.fuel.utils import log_utils;"
        f"log_utils.configure_logging(Workspace({str(kit)!r}, 'a'));"
        "logging.getLogger('nvflare.fuel.f3.sfm').info('a poll'); logging.getLogger('nvflare.private.x').info('a job')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=kit, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("INFO x a job\n")


def test_the_hubs_state_is_found_from_its_port(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert engine_state.of_hub(8002) is None
    state = engine_state.EngineState(
        name="server", pid=1, started=1.0, written=2.0, state="running", says="", hub="h:1"
    )
    engine_state.write(hub, state)
    engine_state.pointer(8002).write_text(str(hub))
    assert engine_state.of_hub(8002) == state
    engine_state.pointer(8002).parent.chmod(0o777)
    assert engine_state.of_hub(8002) is None, "anybody could have written it"


# --- the parent, with a process in NVFlare's place -------------------------------------------------------------------

CHILD = """
import json, socket, sys, threading, time
wire = socket.socket(fileno=int(sys.argv[1]))
for line in json.loads(sys.argv[2]):
    if isinstance(line, dict):
        wire.sendall(json.dumps(line).encode() + b"\\n")
    elif isinstance(line, str):
        print(line, flush=True)
    else:
        sys.exit(line)
    time.sleep(0.4)
threading.Thread(target=lambda: time.sleep(60), daemon=True).start()
wire.recv(1)
"""


@pytest.fixture
def keep(monkeypatch):
    """A keeper's lines and status, where NVFlare's process does what it is told."""

    def run(kit, script, *, stop_after=None):
        def nvflare(kit, socket, wire, authority=None):
            return [sys.executable, "-c", CHILD, str(wire), json.dumps(script)], {}

        monkeypatch.setattr(engine, "nvflare_command", nvflare)
        monkeypatch.setattr(reaching, "hindrance", lambda kit: None)
        monkeypatch.setattr(keeper, "_OUT", 0.1)
        lines = []

        def say(text):
            lines.append(text)
            if stop_after is not None and stop_after in text:
                found._signal = 15

        found = Keeper(kit, socket=Path("/nowhere"), say=say)
        return found.run(), lines, engine_state.read(kit)

    return run


def test_a_site_without_its_socket_is_told_before_anything_is_waited_for(kit):
    with pytest.raises(ConfigError, match="needs the socket at which its peer listens"):
        Keeper(kit, say=print).run()
    assert engine_state.read(kit) is None
    with pytest.raises(ConfigError, match="leave --authority out at a site"):
        Keeper(kit, socket=kit / "s", authority=kit, say=print).run()


def test_a_site_that_the_hub_turns_away_for_its_key_ends_with_its_fingerprint(kit, keep):
    status, lines, state = keep(kit, [{"kind": "turned away", "code": news.OTHER_KEY}])
    assert status == 2
    assert "the hub knows another key under the name a" in lines[-1]
    assert kits.fingerprint(kit / "startup" / "client.crt") in lines[-1]
    assert state.state == "ended"


def test_a_name_in_use_elsewhere_is_told_once_and_tried_again(kit, keep):
    script = [{"kind": "turned away", "code": news.ELSEWHERE}]
    tries = []
    original = Keeper._start

    def start(self):
        tries.append(1)
        if len(tries) > 2:
            self._signal = 15
        original(self)

    Keeper._start = start
    try:
        status, lines, _ = keep(kit, script)
    finally:
        Keeper._start = original
    assert status == 143
    assert [line for line in lines if "in use from another place" in line] == [lines[1]]
    assert lines[-1].startswith("stopping")


def test_what_nvflare_died_of_is_one_line_and_its_status_says_whether_to_start_again(kit, keep):
    status, lines, _ = keep(kit, ["Traceback:", "2026 ERROR MPM Execute exception: no disk", "2026 INFO x bye", 101])
    assert status == 4
    assert "ended with status 101: 2026 ERROR MPM Execute exception: no disk (see" in lines[-1]
    assert keep(kit, [103])[0] == 2


def test_it_is_told_to_stop_and_leaves_no_process_and_a_second_start_is_refused(kit, keep):
    script = [{"kind": "peers", "peers": {"server": peer().model_dump()}}, "garbage", {"kind": "none"}]
    status, lines, state = keep(kit, script, stop_after="connected to the hub")
    assert (status, state.state) == (143, "ended")
    assert lines[-1] == "stopping; the same command starts it again"
    from llmchain_fed import locks

    with locks.hold(kit / engine.LOCK, "the kit a"), pytest.raises(ConfigError, match="the kit a is in use by process"):
        keep(kit, [])


def test_a_parent_that_is_killed_takes_nvflares_process_with_it(kit):
    code = (
        "import socket, subprocess, sys, os\n"
        "ours, theirs = socket.socketpair()\n"
        "runs = 'import threading, time; from llmchain_fed.runtimes.nvflare.keeping.child import Wire;'\n"
        "runs += f'threading.Thread(target=Wire({theirs.fileno()}).end_with_parent).start(); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', runs], pass_fds=[theirs.fileno()])\n"
        "theirs.close(); print(child.pid, flush=True); child.wait()\n"
    )
    import psutil

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone
