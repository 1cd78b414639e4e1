"""What a command writes is its account's alone, whatever the umask; a chain is for whom the user lets read it.

Belongs here: modes of files that commands leave. Does not: what is in them.
"""

import contextlib
import json
import os
import stat
from pathlib import Path

import pytest
from tiny import PAIRS
from typer.testing import CliRunner

from llmchain_fed import FederatedAveraging, History
from llmchain_fed.cli.__main__ import app
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.storage.own_files import as_the_user_says, for_this_account_alone

FEDERATION = """
chain: start
hub: {admin: kit, sites: [a, b]}
out: out
rounds: 2
checkpoint_dir: kept
training: {optimizer: sgd, learning_rate: 0.01, max_steps: 1}
samples: 1
"""


@pytest.fixture(params=[0o022, 0o000], ids=["022", "000"])
def umask(request):
    former = os.umask(request.param)
    yield request.param
    assert os.umask(former) == request.param, "the command gave it back"


def modes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in [folder, *folder.rglob("*")]}


def now() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


class Sites(InProcess):
    """Participants on models of their own, in the engine's place."""

    def check(self):
        """There is no engine that could be away."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def federate(make_chain, tmp_path, monkeypatch):
    """Runs `llmchain-fed federate` over a tiny chain, with sites that need no engine."""
    with contextlib.chdir(tmp_path):
        make_chain(lora=True).save("start")
    (tmp_path / "federation.yaml").write_text(FEDERATION)
    sites = FederatedAveraging(make_chain(lora=True), participants={"a": PAIRS[:6], "b": PAIRS[6:]})._peers
    monkeypatch.setattr("llmchain_fed.runtimes.nvflare.runtime.NVFlare", lambda *_, **__: Sites(sites))

    def run():
        done = CliRunner().invoke(app, ["federate", str(tmp_path / "federation.yaml")], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    return run


def test_a_federations_files(umask, federate, tmp_path):
    federate()
    out, kept = modes(tmp_path / "out"), modes(tmp_path / "kept")
    assert {out.pop(name) for name in ("history.json", "status.json", "start.json", ".lock")} == {0o600}
    assert out["chain/chain.yaml"]
    assert {name: oct(mode) for name, mode in out.items() if mode & 0o044 != 0o044} == {}, "for who may read it"
    assert out["."] == 0o777 & ~umask
    assert "round-000002/manifest.json" in kept
    assert {name: oct(mode) for name, mode in kept.items() if mode & 0o077} == {}


def test_a_history_of_an_earlier_run_is_closed(umask, federate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "history.json").write_text("{}")
    (tmp_path / "out" / "history.json").chmod(0o644)
    federate()
    assert modes(tmp_path / "out")["history.json"] == 0o600
    assert len(History.from_dict(json.loads((tmp_path / "out" / "history.json").read_text()))) == 2


def test_an_engine_and_an_authority_are_started_under_it(umask, tmp_path, monkeypatch):
    """Their logs, sockets and stores are made by processes and modules that ask nobody."""
    found = []

    class Supervisor:
        def __init__(self, kit, **options):
            assert (kit, options["socket"], options["authority"]) == (tmp_path, None, None)

        def run(self):
            found.append(now())
            return 0

    monkeypatch.setattr("llmchain_fed.runtimes.nvflare.supervision.supervisor.Supervisor", Supervisor)
    monkeypatch.setattr(
        "llmchain_fed.runtimes.nvflare.provisioning.authority.start", lambda *_, **__: found.append(now())
    )
    assert CliRunner().invoke(app, ["engine", str(tmp_path)], catch_exceptions=False).exit_code == 0
    arguments = ["provision", "start", str(tmp_path), "--host", "localhost"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert found == [0o077, 0o077]


def test_a_checkpoint_from_python_is_its_accounts_alone(umask, make_chain, tmp_path):
    shares = {"a": PAIRS[:6], "b": PAIRS[6:]}
    FederatedAveraging(make_chain(), participants=shares, checkpoint_dir=tmp_path / "kept", progress=False).fit(1)
    found = modes(tmp_path / "kept" / "round-000001")
    assert len(found) > 4
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}


def test_one_within_another_gives_the_users_back(umask):
    with for_this_account_alone(), for_this_account_alone():
        assert now() == 0o077
        with as_the_user_says():
            assert now() == umask
        assert now() == 0o077
    assert now() == umask
    with as_the_user_says():  # no command runs
        assert now() == umask
