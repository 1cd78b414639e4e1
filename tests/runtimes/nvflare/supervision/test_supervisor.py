"""What an operator is told by an engine: before it starts, while it runs, what it leaves behind. No NVFlare process.

Belongs here: the parts, against small servers and reports made up here. Does not: real hubs and sites
(test_supervisor_federation), certificates (test_certificates).
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
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from federation_processes import free_port

from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.nvflare import engine, engine_state, gathering, kits
from llmchain_fed.runtimes.nvflare.supervision import (
    child,
    job_processes,
    logs,
    news,
    reaching,
    standing,
    supervisor,
)
from llmchain_fed.runtimes.nvflare.supervision.guard import Guard, elsewhere
from llmchain_fed.runtimes.nvflare.supervision.standing import HubLink, SitesSeen
from llmchain_fed.runtimes.nvflare.supervision.supervisor import Supervisor

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


def test_a_kit_that_cannot_be_read_is_told_and_so_is_what_nobody_thought_of(kit, monkeypatch):
    monkeypatch.setattr(reaching, "_EXCHANGED", 0.01)
    (kit / "startup" / "client.key").unlink()
    with listening(lambda connection: connection.recv(1)) as port:
        point(kit, "127.0.0.1", port)
        found = reaching.hindrance(kit)
        assert found == reaching.Hindrance(f"the kit {kit} cannot be used (No such file or directory)", lasting=True)
        with pytest.raises(ConfigError, match="cannot be used"):
            Supervisor(kit, socket=kit / "s", say=print)._wait_for_hub()
    (kit / "startup" / "fed_client.json").unlink()
    began = time.monotonic()
    assert reaching.look(kit, is_stopped=lambda: False).lasting
    monkeypatch.setattr(reaching, "hindrance", lambda _: 1 / 0)
    assert reaching.look(kit, is_stopped=lambda: False) == reaching.Hindrance("division by zero")
    assert time.monotonic() - began < 5
    assert not reaching.look(kit, is_stopped=lambda: True).lasting


def test_whoever_can_mend_it_is_told_how(made, tmp_path):
    expired = SimpleNamespace(verify_code=10)
    at_hub, at_site = (reaching._unverified(expired, ("h", 1), "h:1", at_hub=at_hub) for at_hub in (True, False))
    assert at_hub.lasting
    assert "renew that of its kit" in at_hub.says
    assert not at_site.lasting
    assert "the hub's operator renews it" in at_site.says
    admin = shutil.copytree(made["admin"], tmp_path / "admin")
    startup = made["hub"] / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    context.load_verify_locations(startup / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    with listening(answer) as port:
        config = json.loads((admin / "startup" / "fed_admin.json").read_text())
        config["admin"] |= {"host": "127.0.0.1", "port": port}
        (admin / "startup" / "fed_admin.json").write_text(json.dumps(config))
        stranger = certificate(tmp_path)
        for name in ("client.crt", "client.key"):
            shutil.copy(stranger, admin / "startup" / name)
        found = reaching.hindrance(admin)
    assert found.lasting
    assert "does not accept the administrator's certificate" in found.says
    assert "site" not in found.says


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
        code, told = again.refusal("alpha", OTHER)
        assert code == news.OTHER_KEY
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


@pytest.mark.parametrize("how", ["cannot be looked at", "kit away"])
def test_a_list_that_is_away_for_a_moment_is_remembered(how, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    guard = Guard(tmp_path / "hub")
    assert guard.refusal("alpha", ONE) is None
    stat = Path.stat

    def denied(path, **options):
        if path.name == "known_sites.json":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    if how == "kit away":
        (tmp_path / "hub").rename(tmp_path / "away")
    else:
        monkeypatch.setattr(Path, "stat", denied)
        with pytest.raises(ConfigError, match="Permission denied"):
            Guard(tmp_path / "hub")
    assert guard.refusal("alpha", OTHER).code == news.OTHER_KEY
    assert guard.refusal("alpha", ONE) is None
    assert guard.refusal("beta", ONE) is None, "who is new meanwhile is remembered as well"
    assert guard.refusal("beta", OTHER).code == news.OTHER_KEY


@pytest.fixture
def authority(tmp_path):
    """An authority's folder, and a function that writes who was approved and who revoked into its registry."""
    from llmchain_fed.runtimes.nvflare.provisioning import registry

    folder = tmp_path / "authority"
    (folder / "ca").mkdir(parents=True)

    def write(*approved, revoked=()):
        common = {"role": "site", "organisation": "A", "approved": registry.now(), "by": "me", "until": registry.now()}
        found = [
            registry.Certificate(
                name=name,
                certificate=mark,
                public_key=mark,
                revoked=registry.now() if name in revoked else None,
                **common,
            )
            for name, mark in approved
        ]
        registry.write(folder, registry.CertificateRegistry(certificates=found))

    return folder, write


def test_with_an_authority_its_registry_decides(authority, tmp_path):
    folder, write = authority
    write()
    guard = Guard(tmp_path, folder)
    assert "has no certificate for the name alpha" in guard.refusal("alpha", ONE).says
    write(("alpha", ONE))
    assert guard.refusal("alpha", ONE) is None
    assert "another one was presented" in guard.refusal("alpha", OTHER).says
    write(("alpha", ONE), revoked=["alpha"])
    assert guard.refusal("alpha", ONE).code == news.NOT_ALLOWED
    assert "was revoked at" in guard.refusal("alpha", ONE).says
    assert not (tmp_path / "known_sites.json").exists()
    with pytest.raises(ConfigError, match="is no authority's folder"):
        Guard(tmp_path, tmp_path / "nowhere")


def away(folder):
    folder.rename(folder.with_name("elsewhere"))


def unreadable(folder):
    (folder / "names.json").unlink()
    (folder / "names.json").mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        away,
        unreadable,
        lambda folder: (folder / "names.json").unlink(),
        lambda folder: (folder / "names.json").write_text("{"),
        lambda folder: (folder / "names.json").write_text('{"format": 1, "certificates": []}'),
    ],
    ids=["away", "unreadable", "gone", "garbage", "empty"],
)
def test_a_registry_that_cannot_be_read_for_a_moment_ends_nobody(spoil, authority, tmp_path, at_the_door):
    folder, write = authority
    write(("alpha", ONE), ("beta", OTHER), revoked=["beta"])
    guard = Guard(tmp_path, folder)
    door, come, told = at_the_door(guard)
    assert come("alpha", mark=ONE) == "in"
    former = (folder / "names.json").read_bytes()
    spoil(folder)
    for _ in range(2):
        door._look_at_registry(guard)
        door._put_out()
    (notice,) = told
    assert "registry cannot be read" in notice.says or "names.json" in notice.says
    assert come("alpha", mark=ONE) == "in", "known before"
    assert guard.refusal("beta", OTHER).code == news.NOT_ALLOWED, "taken back before"
    assert come("gamma", mark=ONE) == news.LATER
    assert "cannot be looked up" in told[-1].says
    if not folder.exists():
        folder.with_name("elsewhere").rename(folder)
    if (folder / "names.json").is_dir():
        (folder / "names.json").rmdir()
    (folder / "names.json").write_bytes(former)
    door._look_at_registry(guard)
    assert told[-1].says == "the authority's registry can be read again"
    assert come("gamma", mark=ONE) == news.NOT_ALLOWED


class Connection:
    """As NVFlare's, from a certificate of this name."""

    last_activity = 0.0

    def __init__(self, owner, mark, mode, scheme):
        self.sent, self.conn = {}, self
        self.connector = SimpleNamespace(mode=mode, params={"scheme": scheme, "secure": scheme == "wss"})
        self.websocket = SimpleNamespace(get_extra_info=lambda _: None)
        self.owner, self.mark = owner, mark

    def get_conn_properties(self):
        return {"peer_cn": self.owner, "peer_addr": "10.0.0.1:1"}

    def get_name(self):
        return "CN1"

    def send_dict(self, kind, stream, data):
        self.sent = data

    def close(self):
        pass


@pytest.fixture
def at_the_door(monkeypatch):
    """(the door, `come(owner, …)`: what becomes of a connection, what the parent is told)."""
    from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver
    from nvflare.fuel.f3.comm_error import CommError
    from nvflare.fuel.f3.drivers.connector_info import Mode

    monkeypatch.setattr(child, "_fingerprint", lambda connection: connection.mark)

    def open_it(guard, identity="server"):
        told = []
        door = child.Door(SimpleNamespace(tell=told.append), guard)
        resolver = CellIdentityResolver(identity, prefix_identity_map={"server": "hub.example"})
        manager = SimpleNamespace(sfm_endpoints={}, identity_resolver=resolver)
        door._managers.append(manager)

        def named(_, connection, data):
            endpoint = SimpleNamespace(endpoint=None, connections=[connection])
            manager.sfm_endpoints[data["endpoint_name"]] = endpoint

        door._named = named

        def come(owner, *, name=None, mark=ONE, mode=Mode.PASSIVE, scheme="wss", **data):
            connection = Connection(owner, mark, mode, scheme)
            manager.sfm_endpoints.clear()
            try:
                door.named(manager, connection, {"endpoint_name": name or owner, **data})
            except CommError:
                return connection.sent["llmchain_fed_refused"]
            return "in" if manager.sfm_endpoints else "told"

        return door, come, told

    return open_it


def test_a_site_believes_only_its_hub_that_it_is_turned_away(at_the_door):
    from nvflare.fuel.f3.drivers.connector_info import Mode

    _, come, told = at_the_door(None, "a")
    refused = {"llmchain_fed_refused": news.NOT_ALLOWED, "name": "server"}
    assert come("hub.example", mode=Mode.ACTIVE, **refused) == "told"
    assert told == [news.TurnedAway(code=news.NOT_ALLOWED)]
    for why, other in {
        "who dialled this engine": {"mode": Mode.PASSIVE},
        "a process of this machine": {"mode": Mode.PASSIVE, "scheme": "tcp"},
        "without TLS": {"mode": Mode.ACTIVE, "scheme": "tcp"},
    }.items():
        assert come("hub.example", **other, **refused) == "in", why
    assert come("b", mode=Mode.ACTIVE, **refused) == "in", "another site at the hub's address"
    assert len(told) == 1


def test_a_name_of_an_administrators_session_lets_nobody_past_the_list(tmp_path, at_the_door):
    session = "_admin_2f3d1a52-7d0c-4a6e-9a3b-0c1d2e3f4a5b"
    _, come, told = at_the_door(Guard(tmp_path))
    assert come("beta", mark=ONE) == "in"
    assert come("admin@hub.org", name=session, mark=OTHER) == "in"
    assert come("beta", mark=OTHER) == news.OTHER_KEY
    for mark in (ONE, OTHER):
        assert come("beta", name=session, mark=mark) == news.NOT_ALLOWED
    assert "came as an administrator" in told[-1].says


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


def peer(silent=0.0, address="10.0.0.1:5000", mark=ONE):
    return news.SeenPeer(address=address, fingerprint=mark, silent=silent)


def test_sites_that_come_go_and_are_silent_are_a_line_each():
    clock = Clock()
    sites = SitesSeen(clock)
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
    sites = SitesSeen(clock)
    sites.heard({"a": peer()})
    refused = news.RefusedSite(name="a", code=news.ELSEWHERE, address="10.0.0.2:1", says="is seen from two places: …")
    assert sites.refused(refused) == ["site a is seen from two places: …"]
    clock.time += 30
    assert sites.refused(refused) == []
    assert sites.heard({"a": peer()}) == []
    assert sites.seen["a"].trouble == "is seen from two places: …"
    assert sites.seen["a"].connected
    key = news.RefusedSite(name="z", code=news.OTHER_KEY, address="10.0.0.2:1", says="another key came …")
    assert sites.refused(key) == ["site z: another key came …"]
    assert not sites.seen["z"].connected
    clock.time += 200
    sites.heard({"a": peer()})
    assert {site.trouble for site in sites.seen.values()} == {None}
    assert sites.refused(refused) == ["site a is seen from two places: …"]


def test_that_a_name_was_seen_from_two_places_is_over_soon_and_not_said_again_at_each_attempt():
    clock = Clock()
    sites = SitesSeen(clock)
    sites.heard({"a": peer()})
    refused = news.RefusedSite(name="a", code=news.ELSEWHERE, address="10.0.0.2:1", says="is seen from two places: …")
    sites.refused(refused)
    clock.time += 39
    sites.heard({"a": peer()})
    assert sites.seen["a"].trouble is not None
    clock.time += 2
    sites.heard({"a": peer()})
    assert sites.seen["a"].trouble is None
    assert sites.seen["a"].connected
    assert sites.refused(refused) == []
    assert sites.seen["a"].trouble is not None


@pytest.mark.parametrize("looked_between", [True, False])
@pytest.mark.parametrize("code", [news.NOT_ALLOWED, news.OTHER_KEY, news.LATER])
def test_who_comes_in_with_a_key_that_is_allowed_clears_what_was_said_of_the_former(code, looked_between):
    """`renew`, `approve --replace`: the engine is restarted, and the hub's is not."""
    sites = SitesSeen(Clock())
    sites.heard({"b": peer(mark=ONE)})
    refused = news.RefusedSite(name="b", code=code, address="10.0.0.2:1", says="the certificate of b was revoked")
    assert sites.refused(refused)
    assert sites.seen["b"].trouble == refused.says
    if looked_between:
        assert sites.heard({}) == ["site b is out: its connection was closed"]
    assert sites.seen["b"].trouble == refused.says
    (line,) = sites.heard({"b": peer(mark=OTHER)})
    assert line == ("site b is back after 0 s" if looked_between else "site b came again, with another certificate")
    assert sites.seen["b"] == engine_state.SeenSite(connected=True, since=1000.0, fingerprint=OTHER)
    assert sites.refused(refused), "the former one, again, is told again"


def test_a_site_that_left_or_was_revoked_is_not_told_of_for_ever():
    clock = Clock()
    sites = SitesSeen(clock)
    sites.heard({"left": peer(), "revoked": peer(), "stays": peer()})
    sites.refused(news.RefusedSite(name="revoked", code=news.NOT_ALLOWED, address="10.0.0.2:1", says="was revoked"))
    sites.refused(news.RefusedSite(name="never", code=news.LATER, address="10.0.0.2:1", says="was not known"))
    sites.heard({"stays": peer()})
    assert set(sites.seen) == {"left", "revoked", "stays", "never"}
    clock.time += 200
    sites.heard({"stays": peer()})
    assert set(sites.seen) == {"left", "stays"}
    clock.time += 86_400
    sites.heard({"stays": peer()})
    assert set(sites.seen) == {"stays"}


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
    logs.remove_ended_jobs(tmp_path, [f"python runner -r {ours[0].name}"], kept=2)
    assert [path.exists() for path in ours] == [True, False, False, False, True, True]
    assert all(path.exists() for path in kept)
    assert [path.exists() for path in done] == [False, False, False, True, True]
    assert (tmp_path / "startup").is_dir()


def test_a_folder_whose_job_may_not_have_begun_stays(tmp_path):
    ours = [job(tmp_path, number) for number in range(1, 4)]
    os.utime(ours[0])
    logs.remove_ended_jobs(tmp_path, kept=0)
    assert [path.exists() for path in ours] == [True, False, False]


def test_folders_of_ended_jobs_are_looked_for_every_ten_minutes(kit, monkeypatch):
    swept, now = [], [1000.0]
    found = Supervisor(kit, socket=Path("/nowhere"), say=print)
    found._next |= {"write": 1e9, "warn": 1e9}
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logs, "remove_ended_jobs", lambda *_: swept.append(now[0]))
    for _ in range(40):
        found._regularly()
        now[0] += 60.0
    assert swept == [1000.0, 1600.0, 2200.0, 2800.0]


# --- the processes of jobs ------------------------------------------------------------------------------------------


def test_a_job_starts_from_a_folder_of_any_name(monkeypatch, tmp_path):
    """The command line of both launchers, as NVFlare's own code takes it apart."""
    import shlex

    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.job_launcher_spec import JobProcessArgs
    from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
    from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
    from nvflare.private.fed.client.client_executor import JobExecutor

    for patched, name in (
        (ClientProcessJobLauncher, "get_command"),
        (ServerProcessJobLauncher, "get_command"),
        (JobExecutor, "_wait_child_process_finish"),
    ):
        monkeypatch.setattr(patched, name, getattr(patched, name))
    folder = tmp_path / 'Daten Köln #1\'s \\ "x"'
    prepared = {
        JobProcessArgs.EXE_MODULE: ("-m", "worker_process"),
        JobProcessArgs.WORKSPACE: ("-m", str(folder)),
        JobProcessArgs.APP_ROOT: ("-r", str(folder / "app")),
        JobProcessArgs.PARENT_CONN_SEC: None,
        JobProcessArgs.OPTIONS: ("--set", " secure_train=true uid=a print_conf=True"),
    }
    context = SimpleNamespace(get_prop={FLContextKey.JOB_PROCESS_ARGS: prepared}.get)

    def words(launcher):
        return shlex.split(launcher().get_command({}, context), True)

    plain = prepared | {JobProcessArgs.WORKSPACE: ("-m", "/k"), JobProcessArgs.APP_ROOT: ("-r", "/k/app")}
    plain_context = SimpleNamespace(get_prop={FLContextKey.JOB_PROCESS_ARGS: plain}.get)
    launchers = (ClientProcessJobLauncher, ServerProcessJobLauncher)
    theirs = [shlex.split(launcher().get_command({}, plain_context), True) for launcher in launchers]
    job_processes.install(print)
    ours = [shlex.split(launcher().get_command({}, plain_context), True) for launcher in launchers]
    assert ours == theirs, "where nothing is to be quoted, it is NVFlare's own"
    options = ["--set", "secure_train=true", "uid=a", "print_conf=True"]
    site = [sys.executable, "-m", "worker_process", "-m", str(folder), *options]
    assert words(ClientProcessJobLauncher) == site
    assert words(ServerProcessJobLauncher) == [*site[:5], "-r", str(folder / "app"), *options]
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert words(ClientProcessJobLauncher)[0] == str(folder / "python")


def test_a_process_of_a_job_that_dies_is_told_and_one_that_ends_is_not():
    from nvflare.apis.fl_constant import RunProcessKey
    from nvflare.private.fed.client.client_executor import JobExecutor
    from nvflare.private.fed.client.client_status import ClientStatus

    def job(code, status=ClientStatus.STARTED, **more):
        handle = SimpleNamespace(wait=lambda: None, poll=lambda: code)
        return {RunProcessKey.JOB_HANDLE: handle, RunProcessKey.STATUS: status} | more

    told = "the process of job 01234567 died: this site is out of that job"
    assert job_processes.how_it_ended(job(1), "0123456789") == told
    assert job_processes.how_it_ended(job(1, ClientStatus.STARTING), "0123456789") == told
    for ended in ({}, job(0), job(9), job(1, ClientStatus.STOPPED), job(1, _abort_requested=True)):
        assert job_processes.how_it_ended(ended, "0123456789") is None
    assert "_abort_requested" in JobExecutor.abort_app.__globals__["_ABORT_REQUESTED_KEY"]


def test_the_log_has_its_bound_on_a_full_disk_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for part in range(2):
        (tmp_path / "nvflare.log").write_text(f"part {part} " * 200)
        assert logs.bound(tmp_path, most=1000)
        assert logs.size(tmp_path) == 0
    assert not logs.bound(tmp_path, most=1000)


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


def test_why_a_call_failed_is_told_as_the_hubs_engine_knows_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    session, silent = SimpleNamespace(port=8002), TransportError("its engine has been silent for 32 s.")

    def said(written=0.0, **sites):
        now = time.time()
        engine_state.write(
            tmp_path,
            engine_state.EngineState(
                name="server",
                pid=1,
                started=1.0,
                written=now - written,
                state="running",
                says="",
                hub="h:1",
                sites=sites,
            ),
        )
        return str(gathering.in_the_hubs_words(session, "a", silent))

    assert gathering.in_the_hubs_words(session, "a", silent) is silent, "there is no engine of this account"
    engine_state.point(8002, tmp_path)
    out = engine_state.SeenSite(since=1000.0, trouble="the certificate of a was revoked: test.")
    assert said(a=out) == "the certificate of a was revoked: test (its engine has been silent for 32 s)."
    at = time.strftime("%H:%M:%S", time.localtime(1000.0))
    lost = engine_state.SeenSite(since=1000.0)
    assert said(a=lost) == f"it is not connected to the hub since {at} (its engine has been silent for 32 s)."
    there = engine_state.SeenSite(connected=True, since=1000.0, trouble="another key came under its name")
    for other in (said(a=there), said(b=out), said(), said(written=60.0, a=out)):
        assert other == str(silent)
    (tmp_path / engine_state.FILE).write_text("{")
    assert gathering.in_the_hubs_words(session, "a", silent) is silent


# --- the parent, with a process in NVFlare's place -------------------------------------------------------------------

CHILD = """
import json, os, socket, sys, threading, time
wire = socket.socket(fileno=int(sys.argv[1]))
for line in json.loads(sys.argv[2]):
    if isinstance(line, dict):
        wire.sendall(json.dumps(line).encode() + b"\\n")
    elif isinstance(line, str):
        print(line, flush=True)
    elif line < 0:
        os.kill(os.getpid(), -line)
    else:
        sys.exit(line)
    time.sleep(0.4)
threading.Thread(target=lambda: time.sleep(60), daemon=True).start()
wire.recv(1)
"""


@pytest.fixture
def keep(monkeypatch):
    """A keeper's lines and status, where NVFlare's process does what it is told."""

    def run(kit, script, *, stop_after=None, way=()):
        way = iter(way)

        def nvflare(kit, socket, wire, authority=None):
            return [sys.executable, "-c", CHILD, str(wire), json.dumps(script)], {}

        monkeypatch.setattr(engine, "nvflare_command", nvflare)
        monkeypatch.setattr(reaching, "hindrance", lambda kit: next(way, None))
        monkeypatch.setattr(supervisor, "_OUT", 0.1)
        lines = []

        def say(text):
            lines.append(text)
            if stop_after is not None and stop_after in text:
                found._signal = 15

        found = Supervisor(kit, socket=None if kits.is_hub(kit) else Path("/nowhere"), say=say)
        return found.run(), lines, engine_state.read(kit)

    return run


def test_a_site_without_its_socket_is_told_before_anything_is_waited_for(kit):
    with pytest.raises(ConfigError, match="needs the socket at which its peer listens"):
        Supervisor(kit, say=print).run()
    assert engine_state.read(kit) is None
    with pytest.raises(ConfigError, match="leave --authority out at a site"):
        Supervisor(kit, socket=kit / "s", authority=kit, say=print).run()


def test_a_site_that_the_hub_turns_away_for_its_key_ends_with_its_fingerprint(kit, keep):
    status, lines, state = keep(kit, [{"kind": "turned away", "code": news.OTHER_KEY}])
    assert status == 2
    assert "the hub knows another key under the name a" in lines[-1]
    assert kits.fingerprint(kit / "startup" / "client.crt") in lines[-1]
    assert state.state == "ended"


def test_a_name_in_use_elsewhere_is_told_once_and_tried_again(kit, keep):
    script = [{"kind": "turned away", "code": news.ELSEWHERE}]
    tries = []
    original = Supervisor._start

    def start(self):
        tries.append(1)
        if len(tries) > 2:
            self._signal = 15
        original(self)

    Supervisor._start = start
    try:
        status, lines, _ = keep(kit, script)
    finally:
        Supervisor._start = original
    assert status == 143
    assert [line for line in lines if "in use from another place" in line] == [lines[1]]
    assert lines[-1].startswith("stopping")


def test_that_a_name_is_in_use_is_told_again_after_a_minute_and_after_a_connection(kit, monkeypatch):
    lines, now = [], [1000.0]
    found = Supervisor(kit, socket=Path("/nowhere"), say=lines.append)
    monkeypatch.setattr(standing.time, "monotonic", lambda: now[0])
    for _ in range(21):
        assert found._turned_away(news.ELSEWHERE) == supervisor._NOT_NOW
        now[0] += 35.0
    assert len(lines) == 11, "every second refusal is a minute later"
    assert found._turned
    found._take(news.Peers(peers={news.HUB: peer()}))
    assert not found._turned, "its next start is told again"
    found._turned_away(news.ELSEWHERE)
    assert ["in use" in line for line in lines[-3:]] == [True, False, True]


def test_a_site_that_gets_no_further_says_why_again_and_begins_anew(kit, keep, monkeypatch):
    for module, name, value in (
        (supervisor, "_LOOK", 0.3),
        (supervisor, "_HALF_MADE", 2.5),
        (standing, "_SAY_AGAIN", 1.0),
    ):
        monkeypatch.setattr(module, name, value)
    refused, silent = reaching.Hindrance("nobody listens"), reaching.Hindrance("no answer")
    way = [None, refused, silent, silent]
    _, lines, _ = keep(kit, [], stop_after="its engine is up", way=way[:1])
    starts = []

    def anew(self, original=Supervisor._start):
        starts.append(1)
        original(self)
        self._signal = 15 if len(starts) > 1 else 0

    monkeypatch.setattr(Supervisor, "_start", anew)
    status, lines, _ = keep(kit, [], way=way)
    assert status == 143
    told = [
        line.split(": ", 1)[1].partition(";")[0] for line in lines if line.startswith("not connected to the hub at")
    ]
    assert told[:2] == ["nobody listens", "no answer"]
    assert told[2].startswith("its port answers in TLS, and the engine gets no further")
    assert len(starts) == 2


@pytest.mark.parametrize("where", ["hub", "site"])
def test_an_engine_whose_nvflare_is_killed_says_so_and_is_to_be_started_again(
    where, hub, kit, keep, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = hub if where == "hub" else kit
    (folder / "nvflare.log").write_text("2026-01-01 ERROR x of last week\n")
    status, lines, state = keep(folder, [-9])
    assert status == 4
    assert lines[-1] == f"NVFlare's process ended by signal 9 (see {folder / 'nvflare.log'})"
    assert state.state == "ended"


def test_a_job_whose_process_dies_is_a_line(kit, keep):
    _, lines, _ = keep(kit, [{"kind": "notice", "says": "the process of job 1234 died"}], stop_after="job 1234")
    assert f"the process of job 1234 died; see {kit / 'nvflare.log'}" in lines


def test_what_is_written_down_of_an_engine_that_ended_says_why_and_claims_no_connection(kit, keep):
    here = {"kind": "peers", "peers": {"server": peer().model_dump()}}
    _, _, state = keep(kit, [here, {"kind": "turned away", "code": news.NOT_ALLOWED}])
    assert (state.state, state.lasting, state.connected, state.since) == ("ended", True, False, None)
    assert "get another with `llmchain-fed provision renew`" in state.says
    _, _, state = keep(kit, [here, -9])
    assert (state.state, state.lasting, state.connected) == ("ended", False, False)
    _, _, state = keep(kit, [here], stop_after="connected to the hub")
    assert (state.says, state.lasting, state.socket) == ("it was told to stop", False, "/nowhere")


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
    from llmchain_fed.storage import own_files

    busy = pytest.raises(ConfigError, match="the kit a is in use by process")
    with own_files.lock(kit / engine.LOCK, "the kit a"), busy:
        keep(kit, [])


def test_a_parent_that_is_killed_takes_nvflares_process_with_it(kit):
    code = (
        "import socket, subprocess, sys, os\n"
        "ours, theirs = socket.socketpair()\n"
        "runs = 'import threading, time; from llmchain_fed.runtimes.nvflare.supervision.child import Wire;'\n"
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
