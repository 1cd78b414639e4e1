"""What the hub's operator and a site's are told by real engines: a second start, a copied kit, another key, revocation.

Belongs here: what takes NVFlare's processes over TLS. Does not: the parts (test_supervisor), rounds (test_nvflare).
"""

import json
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from federation_processes import free_port
from sites import wait_for_hub

from llmchain_fed import NVFlare
from llmchain_fed.runtimes.nvflare import engine, engine_state, kits
from llmchain_fed.runtimes.nvflare.provisioning import registry

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return kits.provision_here(tmp_path_factory.mktemp("k"), sites=["a", "b"], port=free_port())


@pytest.fixture
def start(made):
    """Starts an engine; each is stopped in the end."""
    started = []

    def run(kit, **options):
        (kit / "engine.log").unlink(missing_ok=True)
        socket = None if kits.is_hub(kit) else kit / "peer.sock"
        started.append(engine.start(kit, socket=socket, **options))
        return started[-1]

    yield run
    engine.stop(started)


def wait_for(kit, text, seconds=40.0):
    """The line of an engine's screen that says so, and when it did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for line in (kit / "engine.log").read_text().splitlines():
            if text in line:
                return line
        time.sleep(0.1)
    raise AssertionError((text, (kit / "engine.log").read_text()))


def with_another_key(kit, folder):
    """A kit of the same name with a key of its own, signed by the same authority: what a second `approve` made."""
    kit = shutil.copytree(kit, folder)
    root = json.loads((kit.parent / "cert.json").read_text())["root_pri_key"]
    authority = serialization.load_pem_private_key(root.encode(), None)
    former = x509.load_pem_x509_certificate((kit / "startup" / "client.crt").read_bytes())
    key, now = rsa.generate_private_key(public_exponent=65537, key_size=2048), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(former.subject).issuer_name(former.issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=90))
    )  # fmt: skip
    for extension in former.extensions:
        if extension.oid._name not in ("subjectKeyIdentifier", "authorityKeyIdentifier"):
            builder = builder.add_extension(extension.value, critical=extension.critical)
    signed = builder.sign(authority, hashes.SHA256())
    (kit / "startup" / "client.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    (kit / "startup" / "client.key").write_bytes(pem)
    return kit


def test_one_name_is_one_key_and_one_place(made, start, tmp_path):
    hub, a, b = made["hub"], made["a"], made["b"]
    port = kits.address(hub)[1]
    # a site that is earlier than its hub says what it waits for
    first = start(a)
    wait_for(a, f"nobody listens at localhost:{port} (connection refused); waiting", 10)
    began = time.monotonic()
    start(hub)
    wait_for(hub, "site a is connected, from 127.0.0.1:")
    wait_for(a, f"connected to the hub at localhost:{port}")
    print(f"\na hub that came: connected after {time.monotonic() - began:.1f} s")

    # the same kit a second time, as the operator types it
    command, _ = engine.command_of(a, a / "peer.sock")
    second = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert f"the kit a is in use by process {first.pid}" in second.stderr

    # a copy of the kit on another machine, and a kit of another owner of the name b
    start(b)
    wait_for(hub, "site b is connected")
    copied = shutil.copytree(a, tmp_path / "copied" / "a", ignore=shutil.ignore_patterns("*.sock", "*.log*"))
    shutil.copy(made["hub"].parents[1] / "state" / "cert.json", tmp_path)
    other = with_another_key(b, tmp_path / "b")
    start(copied)
    stranger = start(other)
    wait_for(hub, "site a is seen from two places: 127.0.0.1:")
    wait_for(copied, "this site's name is in use from another place: the kit a was copied")
    marks = [kits.fingerprint(kit / "startup" / "client.crt") for kit in (b, other)]
    line = wait_for(hub, "site b: another key came under its name")
    assert all(mark in line for mark in marks)
    assert marks[1] in wait_for(other, "the hub knows another key under the name b")
    assert stranger.wait(timeout=10) == 2
    state = engine_state.of_hub(port)
    assert {name: site.connected for name, site in state.sites.items()} == {"a": True, "b": True}
    assert state.sites["a"].trouble.startswith("is seen from two places")
    assert state.sites["b"].trouble.startswith("another key came under its name")
    assert state.sites["b"].fingerprint == marks[0]
    screen = (hub / "engine.log").read_text()
    assert "is out" not in screen, "neither the copy nor the stranger has put the first one out"

    # and a federation that begins meanwhile takes both in: no peer is there, which only their engines can tell
    said = []
    with NVFlare(
        made["admin"], sites=["a", "b"], socket=tmp_path / "hub.sock", startup=5.0, say=said.append
    ) as runtime:
        found = dict(runtime.call("hello", ["a", "b"], b"{}"))
    assert ["its engine answers, its peer does not" in str(found[name]) for name in ("a", "b")] == [True, True], found
    assert any(line.startswith("site a: is seen from two places") for line in said)

    # the first one ends: the copy, which waited, takes its place
    stopping = time.monotonic()
    first.terminate()
    assert first.wait(timeout=10) == 143
    assert time.monotonic() - stopping < 10
    assert (a / "engine.log").read_text().endswith("stopping; the same command starts it again\n")
    wait_for(hub, "site a is out: its connection was closed")
    wait_for(copied, "connected to the hub")
    assert "site a is back after" in wait_for(hub, "site a is back after")

    # what stands on the disk
    assert not list(hub.glob("log.*"))
    assert (hub / "nvflare.log").stat().st_size < 20_000
    assert (hub / "known_sites.json").stat().st_mode & 0o077 == 0


def test_a_revoked_site_is_put_out_and_cannot_come_back(made, start, tmp_path):
    hub, b = made["hub"], made["b"]
    authority = tmp_path / "authority"
    (authority / "ca").mkdir(parents=True)
    mark = kits.fingerprint(b / "startup" / "client.crt")
    entry = {
        "name": "b", "role": "site", "organisation": "B", "certificate": mark, "public_key": mark,
        "approved": registry.now(), "by": "me", "until": registry.now(),
    }  # fmt: skip
    registry.write(authority, registry.CertificateRegistry(certificates=[registry.Certificate(**entry)]))
    at_hub = start(hub, authority=authority)
    wait_for_hub(b)
    site = start(b)
    wait_for(hub, "site b is connected")

    # the authority's folder is away for a moment, as for a back-up: nobody is put out for it
    authority.rename(tmp_path / "off-line")
    wait_for(hub, "the authority's registry cannot be read", 30)
    (tmp_path / "off-line").rename(authority)
    wait_for(hub, "the authority's registry can be read again", 30)
    assert site.poll() is None
    assert "is out" not in (hub / "engine.log").read_text()

    revoked = registry.Certificate(**entry, revoked=registry.now(), why="laptop stolen")
    registry.write(authority, registry.CertificateRegistry(certificates=[revoked]))
    began = time.monotonic()
    wait_for(hub, "site b: the certificate of b was revoked at", 30)
    assert site.wait(timeout=30) == 2
    print(f"\nrevoked: put out after {time.monotonic() - began:.1f} s")
    assert "the hub does not let this certificate in: it was revoked" in (b / "engine.log").read_text()
    again = start(b)
    assert again.wait(timeout=30) == 2

    # it is given another certificate: it comes in, and what was said of the former one is over
    shutil.copy(made["hub"].parents[1] / "state" / "cert.json", tmp_path)
    other = with_another_key(b, tmp_path / "b")
    mark = kits.fingerprint(other / "startup" / "client.crt")
    renewed = registry.Certificate(**entry | {"certificate": mark, "public_key": mark})
    registry.write(authority, registry.CertificateRegistry(certificates=[revoked, renewed]))
    start(other)
    wait_for(hub, "site b is back after")
    until = time.monotonic() + 10
    while not (seen := engine_state.of_hub(kits.address(hub)[1]).sites["b"]).connected and time.monotonic() < until:
        time.sleep(0.1)
    assert (seen.connected, seen.trouble, seen.fingerprint) == (True, None, mark)

    # NVFlare's process alone is killed: its supervisor is to start the engine again
    (nvflare,) = psutil.Process(at_hub.pid).children()
    nvflare.kill()
    assert at_hub.wait(timeout=20) == 4
    assert "NVFlare's process ended by signal 9 (see " in (hub / "engine.log").read_text()
