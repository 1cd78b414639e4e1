"""Ill sites with real engines and peers: what is named, within which time, and that the others are not delayed.

Belongs here: stopped processes (SIGSTOP, as a machine that sleeps or is out of time), the start with one ill site, and
stopping. Does not: kills (test_nvflare_failures), what is decided without an engine (test_runtime).
"""

import shutil
import signal
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from federation_processes import Federation, free_port, kits
from torchrun_script import TRAINING, tiny_chain

from llmchain_fed import FederatedAveraging, NVFlare
from llmchain_fed.errors import ConfigError, TransportError

pytestmark = pytest.mark.federation

SITES = ("a", "b", "c", "d")
PATIENCE = 8.0
LONG = TRAINING.replace(epochs=2000)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    found = Federation(tmp_path_factory.mktemp("f"), SITES, kits_in="Daten Köln #1's")  # all that follows, from there
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture(scope="module")
def runtime(federation):
    with federation.runtime(patience=PATIENCE) as found:
        yield found


def start(runtime, training=TRAINING):
    return FederatedAveraging(
        tiny_chain("causal", lora=True), runtime=runtime, training=training, samples=0, progress=False
    )


@contextmanager
def stopped(process):
    """While a process and all its children are stopped."""
    root = psutil.Process(process.pid)
    members = [root, *root.children(recursive=True)]
    for member in members:
        member.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for member in members:
            member.send_signal(signal.SIGCONT)


def test_round_one_begins_within_half_a_minute_with_one_ill_site_among_four(federation):
    said = []
    with stopped(federation.peers["d"]):
        began = time.monotonic()
        runtime = NVFlare(
            federation.kits["admin"], sites=SITES, socket=federation.folder / "other.sock", say=said.append
        )
        with runtime:
            fed = start(runtime)
            fed.fit(1)
            assert time.monotonic() - began < 30
            assert fed.history[0].trained == ["a", "b", "c"]
            assert "its peer has been silent for" in fed.history[0].participants["d"].reason
            fed.fit(1)
            assert fed.history[1].seconds < PATIENCE, "it costs the others nothing again"
            federation.peers["d"].send_signal(signal.SIGCONT)
            fed.fit(1)
            assert fed.history[2].trained == list(SITES)
    assert said[-1].startswith("a job runs, with a, b, c; not d: its peer has been silent for")


@pytest.mark.parametrize("what", ["peer", "engine"])
def test_what_freezes_in_a_round_is_named_by_what_it_is_within_patience_and_five_seconds(what, federation, runtime):
    fed = start(runtime)
    fed.fit(1)
    assert fed.history[0].trained == list(SITES)
    process = federation.peers["d"] if what == "peer" else federation.engines["d"]
    with stopped(process):
        fed.fit(1)
        assert fed.history[1].trained == ["a", "b", "c"]
        assert f"its {what} has been silent for" in fed.history[1].participants["d"].reason
        assert fed.history[1].seconds < PATIENCE + 5
        fed.fit(1)
        assert fed.history[2].seconds < PATIENCE
        assert f"its {what} has been silent for" in fed.history[2].participants["d"].reason, "the first reason is kept"
    until = time.monotonic() + 60
    while fed.history[-1].trained != list(SITES):
        assert time.monotonic() < until, fed.history
        time.sleep(1.0)
        fed.fit(1)


def test_a_process_of_a_job_that_dies_is_a_line_at_its_site(federation, runtime):
    fed = start(runtime)
    fed.fit(1)
    root = psutil.Process(federation.engines["c"].pid)
    jobs = [p for p in root.children(recursive=True) if any("worker_process" in word for word in p.cmdline())]
    assert jobs
    for process in jobs:
        process.kill()
    log, until = federation.kits["c"] / "engine.log", time.monotonic() + 10
    while "died: this site is out of that job; see " not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    assert not any(" died: " in (federation.kits[name] / "engine.log").read_text() for name in "ab")
    until = time.monotonic() + 60
    while fed.history[-1].trained != list(SITES) or len(fed.history) == 1:
        assert time.monotonic() < until, fed.history
        fed.fit(1)


def test_stopping_gives_the_sites_work_up(federation, runtime):
    fed = start(runtime, LONG)

    def interrupt(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 6.0)
        with pytest.raises(KeyboardInterrupt):
            fed.fit(1)
        began = time.monotonic()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    until = time.monotonic() + 5
    while time.monotonic() < until and any(federation.audit(name)[-1]["status"] == "began" for name in SITES):
        time.sleep(0.1)
    for name in SITES:
        last = federation.audit(name)[-1]
        assert (last["op"], last["status"]) == ("train", "failed"), last
    assert time.monotonic() - began < 8
    again = start(runtime)
    again.fit(1)
    assert again.history[0].trained == list(SITES)


def expire(kit):
    """Puts a certificate into a kit that ended yesterday."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    former = x509.load_pem_x509_certificate((kit / "startup" / "client.crt").read_bytes())
    made = (
        x509.CertificateBuilder().subject_name(former.subject).issuer_name(former.issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    form, plain = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    (kit / "startup" / "client.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (kit / "startup" / "client.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return kit


def test_an_expired_certificate_is_told_before_the_hub_is_asked_and_without_a_traceback(federation, tmp_path, capfd):
    expired = expire(Path(shutil.copytree(federation.kits["admin"], tmp_path / "admin")))
    began = time.monotonic()
    with NVFlare(expired, sites=SITES, socket=federation.folder / "old.sock", startup=1.0) as runtime:
        with pytest.raises(ConfigError, match=r"the certificate of admin ended at 20.* UTC, .* ago"):
            runtime.check()
        assert time.monotonic() - began < 10
        answers = dict(runtime.call("hello", SITES, b"{}"))  # who does not ask is told in other words
    assert all(isinstance(answer, TransportError) for answer in answers.values())
    assert time.monotonic() - began < 40
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_away_is_told_at_once_and_nothing_of_the_engines_own_is_shown(federation, tmp_path, capfd):
    away = kits.provision_here(tmp_path, sites=["a"], port=free_port())["admin"]
    began = time.monotonic()
    with NVFlare(away, sites=["a"], socket=federation.folder / "away.sock", startup=1.0) as runtime:
        with pytest.raises(TransportError, match=r"the hub's engine is out of reach: nobody listens at localhost:\d+ "):
            runtime.check()
        ((_, answer),) = runtime.call("hello", ["a"], b"{}")
    assert "the hub's engine is out of reach" in str(answer)
    assert time.monotonic() - began < 20
    with stopped(federation.engines["hub"]):
        began, before = time.monotonic(), threading.active_count()
        with federation.runtime(socket=federation.folder / "frozen.sock") as frozen:
            with pytest.raises(TransportError, match="takes connections but does not answer in TLS"):
                frozen.check()
            assert time.monotonic() - began < 10
    assert threading.active_count() <= before + 2
    assert capfd.readouterr() == ("", "")
