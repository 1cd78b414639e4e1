"""NVFlare with real processes: the engine's hub and two sites over TLS, a peer process at each. One federation for all.

Belongs here: what the engine carries and refuses when all is well. Does not: kills (test_nvflare_failures), what a site
answers (test_server).
"""

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from federation_processes import SITES, Federation, difference, free_port, write_examples
from torchrun_script import SHARES, TRAINING, federate, tiny_chain

from llmchain_fed import ConfigError, FederatedAveraging, NVFlare, QuorumError
from llmchain_fed.cli import __main__ as cli
from llmchain_fed.errors import FederationError, PolicyError, TransportError
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.nvflare import engine, job, kits


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    found = Federation(tmp_path_factory.mktemp("f"))
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture(scope="module")
def runtime(federation):
    with federation.runtime() as found:
        yield found


# --- what it is for -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(federation, runtime):
    """Three rounds over the engine."""
    return federation.federate(runtime, samples=1)  # which the sites' policy refuses


def test_sites_learn_what_participants_in_this_process_learn(run):
    chain = tiny_chain("causal", lora=True)
    reference = federate(chain, {name: SHARES[name] for name in SITES})
    assert difference(run.get_model().model.trainable_state(), chain.model.trainable_state()) < 1e-5
    for ours, theirs in zip(run.history, reference.history, strict=True):
        assert ours.trained == list(SITES)
        assert ours.held_out_after == pytest.approx(theirs.held_out_after, rel=1e-5)
    assert run.get_model().invoke({"text": "save the page"}) == chain.invoke({"text": "save the page"})
    assert run.data_reports == reference.data_reports


def test_each_site_wrote_down_what_was_asked_of_it(run, federation):
    for name in SITES:
        lines = federation.audit(name)
        assert {e["status"] for e in lines} == {"began", "answered"}
        done = [e for e in lines if e["status"] == "answered"]
        assert [e["op"] for e in done][:2] == ["hello", "evaluate" if name == "b" else "train"]
        assert [e["round"] for e in done if e["op"] == "train"][:3] == [1, 2, 3]
        record = run.history[0].participants[name]
        first = next(e for e in done if e["op"] == "train")
        assert (first["bytes_in"], first["bytes_out"]) == (record.bytes_down, record.bytes_up)


def test_only_numbers_leave_under_the_default_policy(run):
    assert not any(text in run.history.to_json() for pairs in SHARES.values() for pair in pairs for text in pair)
    assert run.history[0].participants["b"].notes == ["no samples: the site's policy lets no samples leave"]


def test_payloads_of_several_slices_arrive(run, federation, runtime):
    payload = b"\x00" * (2 * frames.SLICE + 12345)
    answers = dict(runtime.call("hello", SITES, payload))
    assert all("ParticipantError" in type(a).__name__ for a in answers.values())
    assert federation.audit("a")[-1]["bytes_in"] == len(payload)
    assert "the hello message has 33,566,777 bytes where at most" in federation.audit("a")[-1]["error"]
    assert str(answers["a"]) == "FederationError: the site keeps the message to itself; its audit file has it"


def test_several_federations_one_after_the_other_on_one_runtime(run, federation, runtime):
    again = federation.federate(runtime, training=TRAINING.replace(learning_rate=1e-3), rounds=1, samples=0)
    chain = tiny_chain("causal", lora=True)
    options = {"participants": {n: SHARES[n] for n in SITES}, "training": TRAINING.replace(learning_rate=1e-3)}
    FederatedAveraging(chain, progress=False, **options).fit(1)
    assert difference(again.get_model().model.trainable_state(), chain.model.trainable_state()) < 1e-5
    assert runtime.jobs == 1


def test_a_hub_on_another_contract_is_refused_by_the_peers_by_name(run, federation, runtime):
    other = tiny_chain("causal", lora=True, seed=1)
    before = other.model.weights_hash
    with pytest.raises(QuorumError, match=r"a: ContractError: another contract \(base weights: \w+… at a, "):
        federation.federate(runtime, chain=other, rounds=1)
    assert other.model.weights_hash == before


def test_an_operation_that_does_not_exist_and_a_site_nobody_knows(run, runtime):
    (answer,) = dict(runtime.call("shell", ["a"], b"id")).values()
    assert isinstance(answer, PolicyError)
    assert str(answer).startswith("refused by site: policy.operations: this site does not answer 'shell'")
    with pytest.raises(FederationError, match=r"there is no site 'x'\. Known: a, b"):
        list(runtime.call("hello", ["x"], b"{}"))


def test_no_process_of_the_engine_has_torch(run, federation):
    engines = []
    for name in ("hub", *SITES):
        root = psutil.Process(federation.engines[name].pid)
        engines += [root, *root.children(recursive=True)]
    assert len(engines) >= 6  # a process for the job beside each engine
    for process in engines:
        maps = {m.path for m in process.memory_maps()}
        assert not any("libtorch" in path for path in maps), process.cmdline()


# --- what travels ---------------------------------------------------------------------------------------------------


def test_the_job_carries_no_code(tmp_path):
    folder = job.write_job(tmp_path, name="llmchain_fed", sites=["a"], socket="/tmp/x.sock", run="r")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}
    assert "byoc" not in (folder / "meta.json").read_text()
    paths = set()

    def walk(value):
        if isinstance(value, dict):
            paths.update(v for k, v in value.items() if k == "path")
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for name in files:
        walk(json.loads((folder / name).read_text()))
    assert paths == {job.HUB, job.SITE, job.CONTROLLER, job.EXECUTOR}


def test_every_kit_is_closed_down(federation):
    for name, listed in (("hub", {job.HUB, job.CONTROLLER}), ("a", {job.SITE, job.EXECUTOR})):
        local = federation.kits[name] / "local"
        resources = json.loads((local / "resources.json").read_text())
        assert set(resources["class_allow_list"]) == listed
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert not {c["id"] for c in resources["components"]} & {"site_log_streamer", "log_receiver"}
        rules = json.loads((local / "authorization.json").read_text())["permissions"]
        assert {role["byoc"] for role in rules.values()} == {"none"}
        assert stat_mode(federation.kits[name] / "startup" / ("server.key" if name == "hub" else "client.key")) == 0o600
    for kit in federation.kits.values():
        assert stat_mode(kit) == 0o700
    assert stat_mode(federation.kits["a"] / "engine.log") == 0o600
    storage = json.loads((federation.kits["hub"] / "local" / "resources.json").read_text())
    assert "/tmp/nvflare" not in json.dumps(storage)


def test_a_kit_in_a_relative_folder_names_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = kits.provision_here(Path("kits"), sites=["a"], port=free_port())
    with pytest.raises(ConfigError, match="contains kits already"):
        kits.provision_here(Path("kits"), sites=["a"], port=free_port())
    resources = json.loads((made["hub"] / "local" / "resources.json").read_text())
    assert resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"].startswith(str(tmp_path))


def stat_mode(path):
    return path.stat().st_mode & 0o777


def submitted(federation, folder):
    """The job's final status."""
    from llmchain_fed.runtimes.nvflare.session import EngineSession

    session = EngineSession(federation.kits["admin"])
    try:
        name = session.submit(folder)
        for _ in range(300):
            status, detail = session.status(name)
            if status.startswith("FINISHED"):
                return status, detail
            threading.Event().wait(0.2)
        raise TimeoutError(status)
    finally:
        session.close()


def test_a_job_with_code_is_refused(run, federation, tmp_path):
    folder = job.write_job(tmp_path, name="with_code", sites=SITES, socket="/tmp/x.sock", run="r")
    (folder / "app" / "custom").mkdir()
    (folder / "app" / "custom" / "evil.py").write_text("raise SystemExit\n")
    status, detail = submitted(federation, folder)
    assert status == "FINISHED:FAILED_TO_RUN"
    assert "BYOC not permitted" in detail


def test_a_class_that_is_not_listed_does_not_run(run, federation, tmp_path):
    folder = job.write_job(tmp_path, name="unlisted", sites=SITES, socket="/tmp/x.sock", run="r")
    config = folder / "app" / "config" / "config_fed_client.json"
    config.write_text(config.read_text().replace(job.SITE, "llmchain_fed.runtimes.site.server.Site"))
    status, _ = submitted(federation, folder)
    assert status.startswith("FINISHED:")
    assert status != "FINISHED:COMPLETED"
    assert "is not in allow_list" in federation.log("a")


def test_plain_tcp_and_a_client_without_certificate_get_nowhere(run, federation):
    host, port = kits.address(federation.kits["admin"])
    with socket.create_connection((host, port), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        plain.settimeout(5)
        assert not plain.recv(64).startswith(b"HTTP/1.1 200")
    context = ssl.create_default_context(cafile=str(federation.kits["a"] / "startup" / "rootCA.pem"))
    context.check_hostname, context.verify_flags = False, context.verify_flags & ~ssl.VERIFY_X509_STRICT

    def shake_hands():
        with socket.create_connection((host, port), timeout=5) as plain, context.wrap_socket(plain) as secure:
            secure.settimeout(5)
            if secure.recv(1) == b"":
                raise ConnectionError("closed")

    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake_hands()


# --- what is wrong before it starts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, federation):
    """A kit of the same name and hub, of another authority."""
    port = kits.address(federation.kits["admin"])[1]
    return kits.provision_here(tmp_path_factory.mktemp("other"), sites=["a"], port=port)["a"]


def test_a_site_of_another_authority_is_told_at_once(federation, stranger):
    with pytest.raises(ConfigError, match="its certificate was signed by another authority"):
        engine.start(stranger, socket=federation.socket("a"))


def test_a_certificate_of_another_authority_in_our_kit(federation, stranger, tmp_path):
    mixed = shutil.copytree(federation.kits["a"], tmp_path / "a")
    for name in ("client.crt", "client.key"):
        shutil.copy(stranger / "startup" / name, mixed / "startup" / name)
    with pytest.raises(ConfigError, match="was not signed by this federation's authority"):
        engine.check(mixed)
    shutil.copy(federation.kits["b"] / "startup" / "client.crt", mixed / "startup" / "client.crt")
    with pytest.raises(ConfigError, match=r"certificate or key of .* cannot be used"):
        engine.check(mixed)
    shutil.copy(federation.kits["b"] / "startup" / "client.key", mixed / "startup" / "client.key")
    with pytest.raises(ConfigError, match="the certificate belongs to b, the kit to a: they were mixed up"):
        engine.check(mixed)


def test_an_expired_certificate_is_told_with_its_dates(federation, tmp_path):
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    expired = shutil.copytree(federation.kits["a"], tmp_path / "a")
    former = x509.load_pem_x509_certificate((expired / "startup" / "client.crt").read_bytes())
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    then = datetime.now(UTC) - timedelta(days=400)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(former.subject).issuer_name(former.issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(then).not_valid_after(then + timedelta(days=360))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (expired / "startup" / "client.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (expired / "startup" / "client.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    with pytest.raises(ConfigError, match=r"the certificate of a ended at 20\d\d-.* UTC, 40 days ago: here it is"):
        engine.check(expired)


def test_a_port_in_use_and_a_folder_that_is_no_kit(federation, tmp_path):
    with pytest.raises(ConfigError, match=r"the kit localhost is in use by process \d+"):
        engine.start(federation.kits["hub"])
    shutil.copytree(federation.kits["hub"], tmp_path / "hub")
    with pytest.raises(ConfigError, match=r"port \d+ cannot be had \(Address already in use\)"):
        engine.start(tmp_path / "hub")
    with pytest.raises(ConfigError, match="is no kit of a hub or site"):
        engine.check(tmp_path / "none")
    above = federation.kits["a"].parent
    with pytest.raises(ConfigError, match=rf"is no kit .*Within it are: .*{above}/a, {above}/b, .*{above}/localhost"):
        engine.check(above.parents[2])
    with pytest.raises(ConfigError, match=r"a site's engine needs the socket .*: add --socket SOCKET, the path that"):
        engine.start(federation.kits["a"])
    with pytest.raises(ConfigError, match="is no administrator's kit"):
        NVFlare(tmp_path, sites=["a"])


def test_options_that_make_no_sense(federation):
    for options in ({"sites": []}, {"sites": "a"}, {"sites": ["a", "a"]}, {"sites": ["a"], "patience": 0}):
        with pytest.raises(ConfigError):
            NVFlare(federation.kits["admin"], **options)
    with pytest.raises(ConfigError, match="a quorum of 3 can never be met by 2 participants"):
        FederatedAveraging(tiny_chain("causal", lora=True), runtime=federation.runtime(), quorum=3)
    with pytest.raises(ConfigError, match=r"give participants .* or a runtime"):
        FederatedAveraging(
            tiny_chain("causal", lora=True), participants=SHARES, runtime=federation.runtime(), progress=False
        )


def test_a_hub_that_is_not_there_is_one_clear_error(federation, tmp_path):
    elsewhere = kits.provision_here(tmp_path, sites=["a", "b"], port=free_port())["admin"]
    options = {"sites": SITES, "startup": 2.0, "socket": federation.folder / "no.sock"}
    with NVFlare(elsewhere, **options) as runtime:
        fed = FederatedAveraging(tiny_chain("causal", lora=True), runtime=runtime, progress=False)
        with pytest.raises(QuorumError, match=r"site 'a' cannot be asked: the hub's engine is out of reach: localhost"):
            fed.fit(1)


def test_a_second_driver_is_refused_and_the_first_goes_on(run, federation, runtime):
    second = federation.runtime()
    with pytest.raises(ConfigError, match=r"somebody listens at .* already"):
        list(second.call("hello", SITES, b"{}"))
    assert len(dict(runtime.call("hello", SITES, b"{}"))) == 2


# --- the commands ---------------------------------------------------------------------------------------------------


def command(*arguments, seconds=120):
    full = [sys.executable, "-m", "llmchain_fed.cli", *map(str, arguments)]
    return subprocess.run(full, capture_output=True, text=True, timeout=seconds)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A command in this process: (status, what it wrote to stderr). A new one imports for seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmchain-fed", *map(str, arguments)])
        return cli.run(), capsys.readouterr().err

    return run


@pytest.mark.parametrize("fault", ["no data", "empty data", "wrong variable", "policy", "chain", "socket"])
def test_a_peer_that_cannot_work_says_so_in_one_line(fault, federation, tmp_path, run_here):
    data = write_examples(tmp_path / "pairs.jsonl", SHARES["a"])
    options = {
        "--name": "x",
        "--chain": federation.chain_folder,
        "--data": data,
        "--socket": federation.folder / "x.sock",
    }
    match fault:
        case "no data":
            options["--data"], wanted = tmp_path / "none.jsonl", "none.jsonl"
        case "empty data":
            data.write_text("")
            wanted = "EmptyParticipantError: participant 'x': the participant has no usable example"
        case "wrong variable":
            data.write_text('{"txt": "a", "completion": "b"}\n')
            wanted = "PromptVariablesError: participant 'x'"
        case "policy":
            options["--policy"] = tmp_path / "policy.yaml"
            options["--policy"].write_text("max_round: 3\n")
            wanted = "unknown option `max_round`; did you mean `max_rounds`"
        case "chain":
            options["--chain"], wanted = "translat", "RecipeError"
        case "socket":
            options["--socket"], wanted = federation.socket("a"), "somebody listens at"
    status, said = run_here("peer", *(part for pair in options.items() for part in pair))
    assert status == 2
    assert wanted in said
    assert len(said.strip().splitlines()) == 1


def test_federate_reads_a_file_runs_the_rounds_and_saves_the_chain(run, runtime, federation, tmp_path):
    from llmchain_fed import History, LLMChain

    runtime.close()  # one driver at a time
    chain = tiny_chain("causal", lora=True)
    chain.save(tmp_path / "chain")
    file = tmp_path / "federation.yaml"
    text = (
        f"chain: chain\nhub: {{admin: {federation.kits['admin']}, sites: [a, b], patience: 8}}\nout: out\nrounds: 2\n"
        "training: {learning_rate: 5e-3, batch_size: 2, epochs: 2}\nquorum: 2\n"
    )
    file.write_text(text)
    done = command("federate", file, seconds=120)
    assert done.returncode == 0, done.stderr
    federate_here = tiny_chain("causal", lora=True)
    federate(federate_here, {n: SHARES[n] for n in SITES}, rounds=2)
    trained = LLMChain.load(tmp_path / "out" / "chain")
    assert difference(trained.model.trainable_state(), federate_here.model.trainable_state()) < 1e-5
    history = History.from_dict(json.loads((tmp_path / "out" / "history.json").read_text()))
    assert [r.trained for r in history] == [["a", "b"], ["a", "b"]]


def test_a_federation_file_with_a_mistake_names_it(tmp_path, run_here):
    text = "chain: translate\nhub: {admin: kits/admin, sites: [a, b]}\nout: out\nquorum: 2\n"
    file = tmp_path / "federation.yaml"
    file.write_text(text)
    found = FederationFile.read(file)
    assert (found.hub.admin, found.out, found.chain) == (tmp_path / "kits/admin", tmp_path / "out", "translate")
    for change, wanted in {
        "qorum: 2": "unknown option `qorum`; did you mean `quorum`",
        "rounds: 0": "`rounds`",
        "quorum: 9": "quorum of 9 can never be met by 2 participants",
        "hub: {admin: x, sites: [a], port: 3}": "unknown option `port`",
        "hub: {admin: x, sites: []}": "`sites`",
        "training: {lerning_rate: 1}": "did you mean `learning_rate`",
        "out: 3": "`out`",
        "training: {on: 1}": "an unquoted yes, no, on or off is a boolean",
    }.items():
        kept = [line for line in text.splitlines() if not line.startswith(change.split(":")[0] + ":")]
        file.write_text("\n".join([*kept, change]))
        with pytest.raises(ConfigError, match=wanted):
            FederationFile.read(file)
    status, said = run_here("federate", file)
    assert (status, len(said.strip().splitlines())) == (2, 1)
    assert "is no administrator's kit" in run_here("federate", _write(file, text))[1]


def _write(path, text):
    path.write_text(text)
    return path


def test_the_extra_is_named_where_it_is_missing(tmp_path):
    blocked = "import sys; sys.modules['nvflare'] = None; sys.modules['nvflare.fuel.hci.client'] = None; "
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text("{}")
    code = blocked + f"from llmchain_fed import NVFlare; NVFlare({str(tmp_path)!r}, sites=['a'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError: the NVFlare runtime needs its engine: pip install nvflare" in done.stderr
    code = "import sys; sys.modules['typer'] = None; import llmchain_fed.cli.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install -e '.[nvflare]'" in done.stderr
    assert done.returncode == 1


def test_a_closed_transport_says_so(federation):
    runtime = federation.runtime()
    runtime.close()
    assert all("this runtime is closed" in str(a) for _, a in runtime.call("hello", SITES, b"{}"))
    with pytest.raises(TransportError, match="closed"):
        runtime._jobs.find(SITES)
