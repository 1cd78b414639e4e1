"""Provisioning as an operator types it: what each command writes, and that a refused or failed one leaves no trace.

Belongs here: start, request, approve, package, renew, revoke, names; names; the dates and modes of certificates. Does
not: requests that another party forged (security/test_kits), engines that run (test_nvflare). The engine's own command
takes a second a call: what it made once (`world`) is copied, and stands in for it where our side is tested.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from sites import wait_for_hub

from llmchain_fed import ConfigError, NVFlare
from llmchain_fed.cli import __main__ as cli
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.runtimes.nvflare import certificates, engine, kits
from llmchain_fed.runtimes.nvflare.provisioning import authority, own_kit, registry, sent, tool
from llmchain_fed.runtimes.site import warnings
from llmchain_fed.storage import whole_folders

ODD_FOLDER = "Klinikum Süd – IT (β) " + "x" * 90
KIT = Path("ws", "fed", "prod_00", "alpha")


def digest(folder):
    """Names, kinds, modes and contents of all that is in a folder."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (stat.S_IMODE(path.lstat().st_mode), content)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """hub/ (an authority), site/ (a kit of alpha), and what they sent each other in mail/: by the real engine."""
    folder = tmp_path_factory.mktemp("world") / ODD_FOLDER
    (folder / "mail").mkdir(parents=True)
    authority.start(folder / "hub", host="hub.example.org", port=8002)
    made = own_kit.request("alpha", "site", folder / "site", organisation="St_Josef")
    shutil.copy(made, folder / "mail")
    shutil.copytree(folder / "hub", folder / "fresh_hub")
    shutil.copytree(folder / "site", folder / "fresh_site")
    signed = authority.approve(folder / "mail" / made.name, folder / "hub")
    own_kit.package(signed, folder / "site", trusted(folder))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Kits of hub, administrator and two sites, made in one place."""
    return kits.provision_here(tmp_path_factory.mktemp("here"), sites=["a", "b-1_x"], port=8002)


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the world, to be changed."""
    return shutil.copytree(world, tmp_path / ODD_FOLDER)


def trusted(folder):
    return kits.fingerprint(folder / "hub" / "ca" / "rootCA.pem")


@pytest.fixture
def run(monkeypatch, capsys):
    """A command in this process: (status, what it wrote). A new one imports for seconds."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmchain-fed", "provision", *map(str, arguments)])
        capsys.readouterr()
        return cli.run(), "".join(capsys.readouterr())

    return command


def refused(run, *arguments):
    """What a command says that ends with status 2, in one line after what it showed."""
    status, said = run(*arguments)
    assert status == 2, said
    assert "Traceback" not in said
    assert "--force" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ConfigError: ")
    return last


# --- one whole way ----------------------------------------------------------------------------------------------------


def test_keys_stay_with_their_site_in_a_folder_of_any_name(world):
    key = (world / "site" / "request" / "alpha.key").read_bytes()
    for sent_file in (world / "mail").iterdir():
        assert key not in sent_file.read_bytes()
    kit = world / "site" / KIT
    assert (kit / "startup" / "client.key").read_bytes() == key
    assert (kits.site_name(kit), kits.address(kit)) == ("alpha", ("hub.example.org", 8002))
    closed = [world / "hub", world / "site", world / "hub" / "names.json", world / "hub" / "profile.yaml", kit]
    for path in [*closed, *world.rglob("*.key")]:
        assert not path.stat().st_mode & 0o077, path
    certificates.check(kit)
    assert not [p for p in world.rglob("*") if p.name.startswith(".")]  # no scratch is left
    everywhere = [p for p in world.rglob("*.*") if p.is_file() and b".unfinished" in p.read_bytes()]
    assert everywhere == []  # nor a path of one


def test_certificates_begin_an_hour_before_they_are_signed(world, here):
    """So that a site whose clock is a little behind can use what it just got."""
    signed = [world / "hub" / "ca" / "rootCA.pem", world / "site" / KIT / "startup" / "client.crt"]
    signed += [here[name] / "startup" / f"{of}.crt" for name, of in (("hub", "server"), ("admin", "client"))]
    signed += [here["a"] / "startup" / "client.crt", here["a"] / "startup" / "rootCA.pem"]
    for path in signed:
        made = x509.load_pem_x509_certificate(path.read_bytes())
        age = datetime.now(UTC) - made.not_valid_before_utc
        assert timedelta(hours=1) <= age < timedelta(hours=1, minutes=30), path
        assert made.not_valid_after_utc > datetime.now(UTC) + timedelta(days=359)
    for kit in here.values():
        certificates.check(kit)
        assert 359 < certificates.days_left(kit) <= 360
        assert not [p for p in kit.rglob("*") if p.is_file() and b".unfinished" in p.read_bytes()]


def test_the_registry_says_who_was_given_what(world, run):
    (known,) = registry.read(world / "hub").certificates
    assert (known.name, known.role, known.organisation, known.revoked) == ("alpha", "site", "St_Josef", None)
    assert "@" in known.by
    assert registry.moment(known.approved) <= datetime.now(UTC)
    assert known.certificate == kits.fingerprint(world / "site" / KIT / "startup" / "client.crt")
    status, said = run("names", world / "hub")
    assert status == 0
    for part in ("alpha  site  St_Josef  1095 days left", known.approved, known.by, known.until, known.certificate):
        assert part in said
    assert sent.by_telephone(known.public_key) in said


def test_the_engines_home_is_not_the_users(tmp_path, monkeypatch):
    """It keeps notes there, with paths of scratch folders; and an account may have no home that can be written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    own_kit.request("alpha", "site", tmp_path / "site")
    assert list((tmp_path / "home").iterdir()) == []


# --- what is refused changes nothing ----------------------------------------------------------------------------------


def other_name(folder):
    shutil.copy(folder / "mail" / "alpha.request.zip", folder / "mail" / "beta.request.zip")


def lost_authority_key(folder):
    (folder / "hub" / "ca" / "rootCA.key").unlink()


def half_an_authority(folder):
    shutil.rmtree(folder / "hub" / "ca")


def half_a_start(folder):
    shutil.rmtree(folder / "hub" / "ca")
    (folder / "hub" / "profile.yaml").unlink()


def lost_registry(folder):
    (folder / "hub" / "names.json").unlink()


def a_file(folder):
    (folder / "file").write_text("mine")


def broken_registry(folder):
    (folder / "hub" / "names.json").write_text('{"format": 1, "certificates": [{}]}')


def lost_key(folder):
    (folder / "fresh_site" / "request" / "alpha.key").unlink()


def another_key(folder):
    for path in (folder / "fresh_site" / "request").iterdir():
        if path.suffix == ".key":
            path.write_bytes((folder / "hub" / "ca" / "rootCA.key").read_bytes())


def moved_kit(folder):
    (folder / "site" / "ws").rename(folder / "elsewhere")


def waiting_renewal(folder):
    (folder / "site" / "renewal").mkdir()


def unsigned(folder):
    (folder / "mail" / "alpha.signed.zip").unlink()


def other_answer(folder):
    root = (folder / "hub" / "ca" / "rootCA.pem").read_bytes()
    with zipfile.ZipFile(folder / "mail" / "alpha.signed.zip", "w") as parts:
        for name in ("alpha.crt", "rootCA.pem"):
            parts.writestr(name, root)


def cut_answer(folder):
    path = folder / "mail" / "alpha.signed.zip"
    path.write_bytes(path.read_bytes()[:-200])


WRONG = "SHA256:" + ":".join(["AA"] * 32)
START = ("start", "hub", "--host")
APPROVE, PACKAGE = ("approve", "mail/alpha.request.zip"), ("package", "mail/alpha.signed.zip")
REFUSALS = [
    (None, (*START, "other.example.org"), "hub.example.org:8002 is in .*hub already. Nothing was changed"),
    (None, (*START, "hub.example.org", "--port", "8003"), "for a hub at hub.example.org:8003 choose a fresh folder"),
    (None, (*START, "hub.example.org"), "nothing to do. Its fingerprint, for the sites by telephone: SHA256:"),
    (half_an_authority, (*START, "hub.example.org"), r"not all of profile\.yaml, names\.json and ca/"),
    (half_a_start, (*START, "hub.example.org"), "or choose a fresh folder"),
    (lost_registry, (*START, "hub.example.org"), r"not all of profile\.yaml, names\.json and ca/"),
    (lost_registry, (*APPROVE, "hub", "--yes"), r"names\.json is missing: .*Put it back from a back-up"),
    (lost_registry, (*APPROVE, "hub", "--yes", "--replace"), r"names\.json is missing"),
    (lost_registry, ("revoke", "alpha", "hub"), r"names\.json is missing"),
    (lost_registry, ("names", "hub"), r"names\.json is missing"),
    (a_file, ("start", "file", "--host", "h"), "cannot be written or read .Not a directory"),
    (a_file, ("start", "file/in/it", "--host", "h"), "Not a directory"),
    (None, ("request", "alpha", "site"), "has the kit of alpha already.*For a new key: llmchain-fed provision renew"),
    (None, ("request", "beta", "site"), "For another name choose another folder"),
    (None, ("request", "alpha", "fresh_site"), r"send .*alpha\.request\.zip to the hub"),
    (a_file, ("request", "alpha", "file"), "cannot be written or read"),
    (None, ("request", "beta", "x", "--role", "boss"), "--role is site, hub or admin"),
    (None, ("request", "beta", "x", "--org", "St. Josef"), "is no organisation .* For example: St_Josef"),
    (None, (*APPROVE, "hub", "--yes"), r"was approved already, at 20.*; the answer is in .*alpha\.signed\.zip: send"),
    (unsigned, (*APPROVE, "hub", "--yes"), "no longer beside the request: say --replace"),
    (None, (*APPROVE, "fresh_hub", "--yes"), "is there already: nothing is overwritten. It answers this request"),
    (None, (*APPROVE, "hub", "--yes", "--replace"), "for the key of this very request .*`provision renew` wrote"),
    (other_answer, (*APPROVE, "fresh_hub", "--yes"), "That answer is for the key .*, this request is for .* telephone"),
    (unsigned, (*APPROVE, "fresh_hub"), "standard input is no terminal. Say --yes once it was compared"),
    (None, (*APPROVE, "nowhere", "--yes"), "is no authority's folder"),
    (None, (*APPROVE, "mail", "--yes"), "is no authority's folder: it has no ca/"),
    (None, (*APPROVE, "hub", "--yes", "--role", "admin"), "asks for a certificate as site alpha; it would be signed"),
    (other_name, ("approve", "mail/beta.request.zip", "hub", "--yes"), "the request|asks for a certificate"),
    (None, ("approve", "mail/nothing.request.zip", "hub", "--yes"), "No such file"),
    (lost_authority_key, (*APPROVE, "hub", "--yes", "--replace"), "is there already|key .* is missing"),
    (broken_registry, (*APPROVE, "hub", "--yes"), r"names\.json of the authority.*Put it back from a back-up"),
    (None, (*PACKAGE, "site", "--fingerprint", "TRUSTED"), "the kit is there already"),
    (None, (*PACKAGE, "fresh_site", "--fingerprint", WRONG), "another authority than you were told of"),
    (None, (*PACKAGE, "fresh_site", "--fingerprint", "SHA256:AA"), "is no fingerprint"),
    (None, (*PACKAGE, "mail", "--fingerprint", "TRUSTED"), "has no request: give the folder of `provision request`"),
    (lost_key, (*PACKAGE, "fresh_site", "--fingerprint", "TRUSTED"), r"alpha\.key.*No such file|No such file"),
    (another_key, (*PACKAGE, "fresh_site", "--fingerprint", "TRUSTED"), "the answer is for another key"),
    (cut_answer, (*PACKAGE, "fresh_site", "--fingerprint", "TRUSTED"), "the hub's answer .* cannot be read"),
    (None, ("renew", "fresh_site"), "has no kit to renew"),
    (moved_kit, ("renew", "site"), "has no kit to renew .*Request anew, in a fresh folder"),
    (waiting_renewal, ("renew", "site"), "a new key of alpha waits for its certificate already"),
    (None, ("renew", "mail"), "has no request"),
    (None, ("revoke", "beta", "hub"), "no certificate was approved for the name beta; .*provision names"),
    (None, ("revoke", "alpha", "fresh_hub"), "no certificate was approved for the name alpha"),
    (None, ("revoke", "alpha", "mail"), "is no authority's folder"),
    (broken_registry, ("names", "hub"), "Put it back from a back-up"),
]


@pytest.mark.parametrize(
    ("prepare", "arguments", "why"), REFUSALS, ids=lambda v: " ".join(v) if type(v) is tuple else ""
)
def test_a_refused_command_leaves_all_files_as_they_were(prepare, arguments, why, folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tool, "run", lambda *_, **__: pytest.fail("the engine was asked"))
    if prepare is not None:
        prepare(folder)
    before = digest(folder)
    said = refused(run, *[trusted(folder) if part == "TRUSTED" else part for part in arguments])
    assert re.search(why, said), said
    assert digest(folder) == before


def standing_in(world):
    """What the engine's command would make, copied from the world: its process is not what is tested."""

    def made(*arguments, within):
        said = dict(pairwise(arguments))
        match arguments[:2]:
            case ("cert", "init"):
                shutil.copytree(world / "hub" / "ca", said["-o"])
            case ("cert", "request"):
                shutil.copytree(world / "fresh_site" / "request", said["--out"])
            case ("cert", "approve"):
                shutil.copy(world / "mail" / "alpha.signed.zip", said["--out"])
            case _:
                shutil.copytree(world / "site" / "ws", said["-w"])
                shutil.copytree(world / "site" / "request", said["--request-dir"], dirs_exist_ok=True)
        assert Path(within).is_dir()

    return made


def renewing(folder):
    """As after `renew`: another key than the kit's waits, and is answered by what is in mail/."""
    site = folder / "site"
    key, startup = rsa.generate_private_key(public_exponent=65537, key_size=2048), site / KIT / "startup"
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    pem = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    for path in (startup / "client.key", site / "request" / "alpha.key"):
        path.write_bytes(pem)
    dated(folder, site / KIT, timedelta(hours=-1), timedelta(days=20), key=key.public_key())
    shutil.copytree(folder / "fresh_site" / "request", site / "renewal" / "request")


def nobody_was_approved(folder):
    (folder / "mail" / "alpha.signed.zip").unlink()
    shutil.rmtree(folder / "hub")
    (folder / "fresh_hub").rename(folder / "hub")


COMMANDS = {
    "start": (None, ("start", "new/hub", "--host", "hub.example.org")),
    "request": (None, ("request", "alpha", "new/site", "--org", "St_Josef")),
    "approve": (nobody_was_approved, ("approve", "mail/alpha.request.zip", "hub", "--yes")),
    "replace": (unsigned, ("approve", "mail/alpha.request.zip", "hub", "--yes", "--replace")),
    "package": (None, ("package", "mail/alpha.signed.zip", "fresh_site", "--fingerprint", "TRUSTED")),
    "renew": (None, ("renew", "site")),
    "package a renewal": (renewing, ("package", "mail/alpha.signed.zip", "site", "--fingerprint", "TRUSTED")),
}


@pytest.fixture(params=COMMANDS)
def command(request, folder, run, monkeypatch):
    """A command that would work: runs it, and says what the folder was before and after."""
    monkeypatch.chdir(folder)
    prepare, arguments = COMMANDS[request.param]
    if prepare is not None:
        prepare(folder)
    full = [trusted(folder) if part == "TRUSTED" else part for part in arguments]
    before = digest(folder)
    return lambda: (run(*full), before, digest(folder))


ENGINES = {
    "fails": ("print('No space left. — disk'); print('Hint: Use --force to overwrite'); sys.exit(1)", "No space left"),
    "dies": ("os.kill(os.getpid(), 9)", "failed with signal 9"),
    "hangs": ("time.sleep(60)", "was not done within 0.3 s"),
    "makes nothing": ("pass", "cannot be written or read|is no kit|cannot be read|No such file"),
}


@pytest.mark.parametrize("fault", ENGINES)
def test_an_engine_that_fails_half_way_leaves_no_trace(fault, command, monkeypatch):
    code, why = ENGINES[fault]
    # it has begun to write, in all its ways, before it fails
    begin = "import os, sys, time; from pathlib import Path; os.makedirs('half/ca'); Path('half/x').write_text('x'); "
    begin += "[os.makedirs(p, exist_ok=True) for f, p in zip(sys.argv, sys.argv[1:]) if f in ('-o', '-w')]; "
    monkeypatch.setattr(tool, "program", lambda: [sys.executable, "-S", "-c", begin + code])
    monkeypatch.setattr(tool, "_PATIENCE", 0.3 if fault == "hangs" else 30)
    (status, said), before, after = command()
    assert status == 2
    assert re.search(why, said), said
    assert "--force" not in said
    assert "Traceback" not in said
    assert after == before


def test_a_disk_that_refuses_any_one_step_leaves_no_trace(command, world, monkeypatch):
    """Each rename of each command in turn; at last none fails, and the command has worked."""
    monkeypatch.setattr(tool, "run", standing_in(world))
    rename, replace = Path.rename, Path.replace
    failing, count = 0, 0

    def counted(way):
        def move(self, target):
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(28, "No space left on device", str(self))
            return way(self, target)

        return move

    monkeypatch.setattr(Path, "rename", counted(rename))
    monkeypatch.setattr(Path, "replace", counted(replace))
    for failing in range(1, 30):  # noqa: B007 (read by `move`)
        count = 0
        (status, said), before, after = command()
        if status == 0:
            break
        assert status == 2
        assert "No space left on device). Nothing was changed" in said
        assert after == before
    assert failing > 1
    assert after != before


def killed_at(step, command):
    """Whether a command, run in a child, came to this rename, before which the child kills itself."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0

    def counted(way):
        def move(*arguments):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return way(*arguments)

        return move

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    whole_folders._exchanged = counted(whole_folders._exchanged)
    try:
        command()
    finally:
        os._exit(0)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanges", "only renames"])
def test_a_renewal_that_is_killed_at_any_step_is_finished_by_the_same_command(
    exchanges, world, folder, tmp_path, run, monkeypatch
):
    """The engine can start at every moment where the system exchanges folders; no key is ever lost on any."""
    monkeypatch.setattr(tool, "run", standing_in(world))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time, and no matter to a process that is killed
    if not exchanges:
        monkeypatch.setattr(whole_folders, "_exchanged", lambda *_: False)
    renewing(folder)
    site, untouched = folder / "site", tmp_path / "untouched"
    shutil.copytree(site, untouched)
    former = digest(site / KIT / "startup"), digest(site / "request")
    package = ("package", folder / "mail" / "alpha.signed.zip", site, "--fingerprint", trusted(folder))
    kits_seen = set()
    for step in range(1, 30):
        shutil.rmtree(site)
        shutil.copytree(untouched, site)
        if not killed_at(step, lambda: run(*package)):
            break
        if exchanges:
            certificates.check(site / KIT)
            kits_seen.add((site / KIT / "startup" / "client.key").read_bytes())
        assert run(*package)[0] == 0
        certificates.check(site / KIT)
        assert digest(site / "request") == digest(folder / "fresh_site" / "request")
        assert (site / KIT / "startup" / "client.key").read_bytes() == (site / "request" / "alpha.key").read_bytes()
        (kept,) = site.glob("former-*")
        assert (digest(kept / "startup"), digest(kept / "request")) == former
        assert sorted(p.name for p in site.iterdir()) == [kept.name, "request", "ws"]  # no scratch, with a key in it
        assert sorted(p.name for p in (site / KIT).iterdir()) == sorted(p.name for p in (untouched / KIT).iterdir())
    assert step > (5 if exchanges else 9)
    assert len(kits_seen) == (2 if exchanges else 0)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "package a renewal"])
def test_a_command_that_is_killed_at_any_step_can_be_given_again_or_says_what_to_do(
    name, world, folder, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(tool, "run", standing_in(world))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.chdir(tmp_path)
    prepare, arguments = COMMANDS[name]
    if prepare is not None:
        prepare(folder)
    full, untouched = [trusted(folder) if part == "TRUSTED" else part for part in arguments], tmp_path / "untouched"
    folder.rename(untouched)
    for step in range(1, 30):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(untouched, folder)
        os.chdir(folder)
        if not killed_at(step, lambda: run(*full)):
            break
        status, said = run(*full)
        assert status == 0 or re.search("say --replace|choose a fresh folder", said), said
        if status == 0:
            assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
        elif name in ("approve", "replace"):
            assert run(*full[:4], "--replace")[0] == 0
    assert step > 1


def test_what_a_killed_command_left_is_removed_by_the_next_and_what_another_is_at_is_not(folder, run, monkeypatch):
    site = folder / "fresh_site"
    package = ("package", folder / "mail" / "alpha.signed.zip", site, "--fingerprint", trusted(folder))

    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    engine_run, tool.run = tool.run, dies
    try:
        assert killed_at(0, lambda: run(*package))
    finally:
        tool.run = engine_run
    (left,) = site.glob(".unfinished-*")
    assert (left / "request" / "alpha.key").is_file()
    with tool.scratch(site) as other:
        assert not left.exists()
        refused(run, *package[:-1], WRONG)
        assert other.is_dir()
    assert sorted(p.name for p in site.iterdir()) == ["request"]


def test_a_folder_that_cannot_be_written_and_a_disk_that_is_full(tmp_path, run, monkeypatch):
    """By the real engine: no file may grow beyond 700 bytes, which its key does not fit into."""
    before = digest(tmp_path)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, former[1]))
    try:
        with pytest.raises(ConfigError, match="File too large"):
            authority.start(tmp_path / "hub", host="h", port=8002)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert digest(tmp_path) == before

    def mkdtemp(*_, dir, **__):  # noqa: A002 (tempfile's)
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tool.tempfile, "mkdtemp", mkdtemp)
    said = refused(run, "request", "beta", tmp_path / "site")
    assert f"{tmp_path / 'site'} cannot be written or read (Permission denied). Nothing was changed" in said
    assert digest(tmp_path) == before


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_clears_away_what_it_had_begun(number, ended, tmp_path):
    before = digest(tmp_path)
    code = (
        "import sys; from llmchain_fed.runtimes.nvflare.provisioning import tool; "
        "from llmchain_fed.cli import __main__ as cli; "
        "tool.program = lambda: [sys.executable, '-S', '-c', 'import time; print(1); time.sleep(60)']; cli.main()"
    )
    arguments = ["provision", "start", str(tmp_path / "hub"), "--host", "h"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "hub").glob(".unfinished-*/profile.yaml")):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == ended
    assert "stopping; what was begun is cleared away" in said
    assert "Traceback" not in said
    assert digest(tmp_path) == before


# --- one name, one key ------------------------------------------------------------------------------------------------


def test_two_organisations_that_ask_for_one_name(world, folder, run, monkeypatch):
    """The second is refused, whatever the case of its letters, with who has the name; --replace ends the first."""
    before = digest(folder / "hub")
    (first,) = registry.read(folder / "hub").certificates
    for name in ("alpha", "Alpha", "ALPHA"):
        made = own_kit.request(name, "site", folder / name.swapcase() / name, organisation="Charite")
        said = refused(run, "approve", made, folder / "hub", "--yes")
        for part in ("alpha has a certificate already: St_Josef", first.approved, first.by, "--replace", "Charite"):
            assert part in said
        for key in (first.public_key, sent.read_request(made, "site").public_key):
            assert sent.by_telephone(key) in said
        if name != "alpha":  # each real call of the engine takes a second
            monkeypatch.setattr(own_kit, "_make_key", _copied(world))
    assert digest(folder / "hub") == before
    made = folder / "ALPHA" / "alpha" / "request" / "alpha.request.zip"
    status, said = run("approve", made, folder / "hub", "--yes", "--replace")
    assert status == 0, said
    assert "in place of alpha, organisation St_Josef" in said
    former, now = registry.read(folder / "hub").certificates
    assert former.revoked is not None
    assert (now.organisation, now.revoked) == ("Charite", None)


def _copied(world):
    """A key and a request for another spelling of alpha, without the engine."""

    def make(name, role, organisation, folder):
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        oid = x509.oid.NameOID
        subject = x509.Name(
            [x509.NameAttribute(oid.COMMON_NAME, name), x509.NameAttribute(oid.ORGANIZATION_NAME, organisation)]
        )
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        (folder / "request").mkdir()
        with zipfile.ZipFile(folder / "request" / f"{name}.request.zip", "w") as file:
            file.writestr("request.json", json.dumps({"name": name, "kind": "site", "org": organisation}))
            file.writestr(f"{name}.csr", csr.public_bytes(serialization.Encoding.PEM))

    return make


def test_what_is_signed_is_shown_and_asked_for_first(folder, run, monkeypatch, world):
    monkeypatch.setattr(tool, "run", standing_in(world))
    nobody_was_approved(folder)
    before = digest(folder)
    request = folder / "mail" / "alpha.request.zip"
    read_out = sent.by_telephone(sent.read_request(request, "site").public_key)
    assert len(read_out.split()) == 8

    def answering(text):
        terminal = io.StringIO(text)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        return run("approve", request, folder / "hub")

    for answer in ("n\n", "\n", ""):  # no, just Enter, Ctrl-D
        status, said = answering(answer)
        assert status == 2
        assert f"site alpha, organisation St_Josef, key\n{read_out}" in said
        assert "was not signed. Nothing was changed" in said
        assert digest(folder) == before
    status, said = answering("y\n")
    assert status == 0, said
    assert (folder / "mail" / "alpha.signed.zip").is_file()


def test_the_site_is_told_the_fingerprint_that_the_hub_is_shown(tmp_path, run):
    status, said = run("request", "beta", tmp_path / "site")
    assert status == 0
    asked = sent.read_request(tmp_path / "site" / "request" / "beta.request.zip", "site")
    assert sent.by_telephone(asked.public_key) in said
    assert asked.organisation == "beta"
    assert "provision approve beta.request.zip AUTHORITY" in said


def test_a_revoked_certificate_is_let_in_no_more(folder, run):
    (known,) = registry.read(folder / "hub").certificates
    mark = known.certificate
    found = registry.read(folder / "hub")
    assert found.allowed("alpha", mark) is None
    assert found.allowed("alpha", mark.removeprefix("SHA256:").replace(":", "").lower()) is None
    assert "has no certificate for the name beta" in found.allowed("beta", mark)
    assert f"belongs to the certificate {mark}" in found.allowed("alpha", WRONG)
    assert "another one was presented" in found.allowed("Alpha", mark)
    status, said = run("revoke", "ALPHA", folder / "hub", "--why", "left\nthe federation\x1b[2J")
    assert status == 0
    assert "revoked: site alpha (St_Josef)" in said
    assert "--authority" in said
    why = registry.read(folder / "hub").allowed("alpha", mark)
    assert why.startswith("the certificate of alpha was revoked at 20")
    assert why.endswith(r": left\nthe federation\x1b[2J")
    assert "was revoked already" in refused(run, "revoke", "alpha", folder / "hub")
    assert r"revoked 20" in run("names", folder / "hub")[1]
    assert stat.S_IMODE((folder / "hub" / "names.json").stat().st_mode) == 0o600
    (folder / "mail" / "alpha.signed.zip").unlink()
    (folder / "hub" / "ca" / "rootCA.key").chmod(0o640)
    status, said = run("approve", folder / "mail" / "alpha.request.zip", folder / "hub", "--yes")
    assert status == 0  # nobody has the name
    assert "warning: other accounts of this machine may open" in said
    assert "rootCA.key, the key that signs for all: chmod 600" in said


def test_two_approvals_at_a_time(folder, run):
    before = digest(folder)
    with registry.alone(folder / "hub"):
        said = refused(run, "approve", folder / "mail" / "alpha.request.zip", folder / "hub", "--yes", "--replace")
        assert f"the authority in {folder / 'hub'} is in use by another process. Nothing was changed" in said
        assert "is in use by another process" in refused(run, "revoke", "alpha", folder / "hub")
    assert digest(folder) == before


def test_a_renewed_kit_keeps_its_place_and_its_settings(folder, run):
    """Until the answer is packaged the former key works; then only startup/ is another, and the former is kept."""
    site, kit = folder / "site", folder / "site" / KIT
    (kit / "local" / "mine.json").write_text("{}")
    before = digest(kit)
    status, said = run("renew", kit)  # the kit's folder does as well
    assert status == 0, said
    assert "provision approve alpha.request.zip AUTHORITY --replace" in said
    assert digest(kit) == before
    certificates.check(kit)
    request = site / "renewal" / "request" / "alpha.request.zip"
    assert run("approve", request, folder / "hub", "--yes", "--replace")[0] == 0
    status, said = run("package", request.with_name("alpha.signed.zip"), site, "--fingerprint", trusted(folder))
    assert status == 0, said
    assert "its place and its local/ are as before" in said
    certificates.check(kit)
    after = digest(kit)
    assert {name for name in after if after[name] != before[name]} == {"startup/client.crt", "startup/client.key"}
    assert (kit / "local" / "mine.json").is_file()
    (former,) = site.glob("former-*")
    assert (former / "startup" / "client.key").read_bytes() == before["startup/client.key"][1]
    assert sorted(p.name for p in site.iterdir()) == [former.name, "request", "ws"]
    known = registry.read(folder / "hub")
    assert known.allowed("alpha", kits.fingerprint(kit / "startup" / "client.crt")) is None
    assert "revoked" in known.allowed("alpha", kits.fingerprint(former / "startup" / "client.crt"))
    assert "the kit is there already" in refused(
        run, "package", site / "request" / "alpha.signed.zip", site, "--fingerprint", trusted(folder)
    )


# --- names ------------------------------------------------------------------------------------------------------------

NO_NAMES = [
    "St. Josef", "münchen", "klinik.nord", "o'brien", "a/b", "", " ", "   ", "a b", "a" * 65, "server", "Server", "hub",
    "ADMIN", "a\n", "\x1b[2J", ".a", "../a", "_a", "a@b.de", "ä",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_cannot_be_had_is_refused_where_it_is_asked_for(name, tmp_path, run):
    said = refused(run, "request", name, tmp_path / "site")
    assert "is no name for a site: 1 to 64 of A-Z a-z 0-9 _ -, with a letter or digit in front" in said
    for attempt in (
        lambda: kits.provision_here(tmp_path / "y", sites=["ok", name], port=1),
        lambda: NVFlare(tmp_path, sites=[name]),
    ):
        with pytest.raises(ConfigError, match="is no name for a site"):
            attempt()
    assert not any(tmp_path.iterdir())


def test_the_same_rule_applies_in_a_federations_file_and_to_a_peer(tmp_path):
    for name in ["-a", *NO_NAMES]:
        (warning,) = warnings.of_name(name)
        assert "is no name for a site" in warning
        file = tmp_path / "federation.yaml"
        file.write_text(
            json.dumps({"chain": "translate", "out": "out", "hub": {"admin": "admin", "sites": ["a", name]}})
        )
        with pytest.raises(ConfigError, match="is no name for a site" if name else "sites"):
            FederationFile.read(file)
    assert warnings.of_name("klinik-1_a") == []


def test_the_rule_needs_neither_torch_nor_the_engine():
    code = "import sys, llmchain_fed.runtimes.names; print([m for m in ('torch', 'nvflare') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_that_is_near_is_proposed():
    for name, near in {"St. Josef": "St-Josef", "münchen": "muenchen", "o'brien": "o-brien", "_a": "a"}.items():
        with pytest.raises(ConfigError, match=f"For example: {near}$"):
            names.check_name(name)
    with pytest.raises(ConfigError) as error:
        names.check_name("…")
    assert "For example" not in str(error.value)


def test_the_hubs_host_is_no_name_for_a_site(tmp_path):
    for name in ("hub1", "HUB1"):
        with pytest.raises(ConfigError, match="is what sites reach the hub by"):
            kits.provision_here(tmp_path, sites=[name], port=8002, host="hub1")
    with pytest.raises(ConfigError, match="two sites of one name"):
        kits.provision_here(tmp_path, sites=["a", "A"], port=8002)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--host", ""), "it is empty"),
        (("--host", "  "), "it is empty"),
        (("--host", "hub example"), "letters, digits, - and dots"),
        (("--host", "https://hub.example.org"), "without http://"),
        (("--host", "hub.example.org:8002"), "without a port"),
        (("--host", "::1"), "no IPv6 address"),
        (("--host", "[2001:db8::1]"), "no IPv6 address"),
        (("--host", "hüb.example.org"), "letters, digits"),
        (("--host", "hub_1.example.org"), "letters, digits"),
        (("--host", "x." * 40 + "org"), "at most 64 characters"),
        (("--host", "h", "--port", "0"), "0 is no port: 1 to 65535"),
        (("--host", "h", "--port", "65536"), "65536 is no port"),
        (("--host", "h", "--port", "-1"), "-1 is no port"),
    ],
)
def test_a_hub_that_nobody_could_reach(options, why, tmp_path, run):
    assert why in refused(run, "start", tmp_path / "hub", *options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "role", "why"),
    [
        ("admin", "admin", "is no name for an administrator: it has the form of a mail address"),
        ("a b@hub.org", "admin", "mail address"),
        ("a@" + "b" * 64 + ".org", "admin", "at most 64"),
        ("https://hub", "hub", "is no host name for the hub"),
        ("", "hub", "it is empty"),
    ],
)
def test_names_of_hub_and_administrator(name, role, why, tmp_path, run):
    assert why in refused(run, "request", name, tmp_path / "x", "--role", role)
    assert not any(tmp_path.iterdir())


# --- dates and modes --------------------------------------------------------------------------------------------------


def dated(world, kit, begin, end, *, of="client", key=None):
    """Puts a certificate with these dates, counted from now, in a kit; of="rootCA" changes the authority's own."""
    path = kit / "startup" / ("rootCA.pem" if of == "rootCA" else f"{of}.crt")
    former = x509.load_pem_x509_certificate(path.read_bytes())
    signing = serialization.load_pem_private_key((world / "hub" / "ca" / "rootCA.key").read_bytes(), None)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(former.subject).issuer_name(former.issuer).public_key(key or former.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now + begin).not_valid_after(now + end)
    )  # fmt: skip
    for extension in former.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(signing, hashes.SHA256())
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


def test_a_clock_that_is_behind_is_told_with_both_times_in_utc(world, folder):
    kit = folder / "site" / KIT
    dated(world, kit, timedelta(minutes=3), timedelta(days=100))
    with pytest.raises(ConfigError) as error:
        certificates.check(kit)
    assert "this machine's clock is at least 3 min behind, or the certificate of alpha was made on a machine" in str(
        error.value
    )
    assert len(set(_times(error.value))) == 2
    dated(world, kit, timedelta(days=3), timedelta(days=100))
    with pytest.raises(ConfigError, match="at least 3 days behind"):
        certificates.check(kit)


def _times(error):
    return re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", str(error))


def test_an_expired_certificate_says_since_when_and_how_to_renew(world, folder):
    kit = folder / "site" / KIT
    dated(world, kit, timedelta(days=-100), timedelta(minutes=-61))
    for check in (certificates.check, engine.check):
        with pytest.raises(ConfigError, match=r"the certificate of alpha ended at .*, 61 min ago") as error:
            check(kit)
        assert len(_times(error.value)) == 2
        assert f"llmchain-fed provision renew '{folder / 'site'}'" in str(error.value)
    assert certificates.days_left(kit) < 0


def test_an_authority_that_has_ended(world, folder):
    kit = folder / "site" / KIT
    dated(world, kit, timedelta(days=-100), timedelta(days=-1), of="rootCA")
    with pytest.raises(ConfigError, match=r"root certificate of this federation's authority ended at .*new authority"):
        certificates.check(kit)
    shutil.copy(kit / "startup" / "rootCA.pem", folder / "fresh_hub" / "ca" / "rootCA.pem")
    (folder / "mail" / "alpha.signed.zip").unlink()
    before = digest(folder)
    with pytest.raises(ConfigError, match=r"own certificate ended at .* it can sign nothing any more"):
        authority.approve(folder / "mail" / "alpha.request.zip", folder / "fresh_hub")
    assert digest(folder) == before


def test_what_is_to_be_mended_soon_is_warned_of(world, folder):
    kit = folder / "site" / KIT
    assert certificates.warnings(kit) == []
    (kit / "startup" / "client.key").chmod(0o644)
    (key,) = certificates.warnings(kit)
    assert f"chmod 600 '{kit / 'startup' / 'client.key'}'" in key
    kit.chmod(0o750)
    assert [w.split(": ")[-1].split()[:2] for w in certificates.warnings(kit)] == [["chmod", "700"], ["chmod", "600"]]
    kit.chmod(0o700)
    (kit / "startup" / "client.key").chmod(0o600)
    dated(world, kit, timedelta(days=-1), timedelta(days=29, hours=12))
    (soon,) = certificates.warnings(kit)
    assert soon.startswith("the certificate of alpha ends at ")
    assert ", in 29 days; before that: llmchain-fed provision renew" in soon
    dated(world, kit, timedelta(days=-1), timedelta(hours=1))
    assert ", in 59 min; " in certificates.warnings(kit)[0]
    dated(world, kit, timedelta(days=-1), timedelta(days=31))
    assert certificates.warnings(kit) == []
    dated(world, kit, timedelta(days=-1), timedelta(days=20), of="rootCA")
    (root,) = certificates.warnings(kit)
    assert "root certificate" in root
    assert "begins a new authority" in root
    certificates.check(kit)  # a warning, no refusal


@pytest.mark.parametrize("file", ["client.crt", "client.key", "rootCA.pem"])
def test_a_file_of_a_kit_that_is_missing_or_cut_is_named(file, folder):
    path = folder / "site" / KIT / "startup" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=file):
        certificates.check(folder / "site" / KIT)
    path.unlink()
    with pytest.raises(ConfigError, match=file):
        certificates.check(folder / "site" / KIT)


def test_an_administrators_kit_is_checked_as_well(here, tmp_path):
    kit = shutil.copytree(here["admin"], tmp_path / "admin")
    certificates.check(kit)
    assert certificates.warnings(kit) == []
    shutil.copy(here["a"] / "startup" / "client.crt", kit / "startup" / "client.crt")
    with pytest.raises(ConfigError, match=r"client\.crt and client\.key do not go together"):
        certificates.check(kit)
    shutil.copy(here["a"] / "startup" / "client.key", kit / "startup" / "client.key")
    with pytest.raises(ConfigError, match=f"the certificate belongs to a, the kit to {kits.ADMIN}: they were mixed up"):
        certificates.check(kit)
    assert not os.path.lexists(kit / "startup" / "server.crt")


# --- by real engines --------------------------------------------------------------------------------------------------


@pytest.mark.federation
def test_kits_whose_keys_stayed_with_their_sites_connect_also_after_a_renewal(tmp_path):
    """Hub, administrator and site each with a key of its own; then the site's is another, in the same place."""
    from federation_processes import free_port

    from llmchain_fed.runtimes.nvflare.session import EngineSession

    port = free_port()
    hub = tmp_path / "authority"
    told = authority.start(hub, host="localhost", port=port)

    def kit_of(name, role):
        own = tmp_path / f"own {role}"
        return own_kit.package(authority.approve(own_kit.request(name, role, own), hub, role), own, told)

    hubs, admins, site = kit_of("localhost", "hub"), kit_of("admin@hub.org", "admin"), kit_of("alpha", "site")
    for kit in (hubs, admins, site):
        certificates.check(kit)
    assert str(hubs / "storage") in (hubs / "local" / "resources.json").read_text()
    running = {"hub": engine.start(hubs, authority=hub)}  # which is told of the new key
    try:
        wait_for_hub(admins)
        session = EngineSession(admins)

        def connects():
            started = time.time()
            running["site"] = engine.start(site, socket=tmp_path / "alpha.sock")
            until = time.monotonic() + 60
            while session.connected().get("alpha", 0.0) < started:
                assert time.monotonic() < until, (site / "engine.log").read_text()
                time.sleep(0.3)

        connects()
        request, _ = own_kit.renew(site)
        signed = authority.approve(request, hub, replace=True)
        engine.stop([running["site"]])
        assert own_kit.package(signed, site, told) == site
        connects()
        session.close()
    finally:
        engine.stop(running.values())
