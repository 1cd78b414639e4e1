"""What `federate` and `save` leave on the disk is never less than what they left before, however they end.

Belongs here: whole commands over participants in this machine's memory, and writers that are killed or find no room.
Does not: real engines (test_federate_federation), what a checkpoint has (test_resuming), file modes (test_own_files).
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from supervisor import PROGRAM, UNITS, Unit
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, History, LLMChain, stopping
from llmchain_fed.cli import console, federating
from llmchain_fed.errors import (
    ChainFileError,
    CheckpointError,
    ConfigError,
    ContractError,
    DeadlineError,
    ParticipantError,
    PolicyError,
    QuorumError,
    TransportError,
)
from llmchain_fed.federated.checkpoint.contents import OtherExamplesError
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.runtimes.messaging import heads
from llmchain_fed.runtimes.site.policy import AuditError
from llmchain_fed.storage import own_files, whole_folders

FILE = """
chain: start
hub: {{admin: kit, sites: [a, b]}}
out: out
rounds: {rounds}
training: {{optimizer: sgd, learning_rate: 0.01, max_steps: 1}}
samples: 0
retries: 0
{more}
"""


class Nursery:
    """A process that has imported everything and forks a child per attempt."""

    def __init__(self, logs: Path) -> None:
        here = Path(__file__).parents[1] / "support"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
        self._process = subprocess.Popen(
            [sys.executable, str(here / "forked_federate.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=here,
        )  # fmt: skip
        self._logs, self._count, self._log = logs, 0, {}
        assert self._process.stdout.readline() == "ready\n"

    def start(self, *arguments, **options) -> int:
        """Begins an attempt; returns its process id."""
        self._count += 1
        log = self._logs / f"{self._count}.log"
        pid = int(self._tell({"log": str(log), "arguments": list(map(str, arguments)), **options}))
        self._log[pid] = log
        return pid

    def wait(self, pid: int) -> tuple[int, str]:
        """The attempt's exit status, negative for a signal, and all it said."""
        status = int(self._tell({"wait": pid}))
        return status, self._log[pid].read_text()

    def run(self, *arguments, **options) -> tuple[int, str]:
        return self.wait(self.start(*arguments, **options))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _tell(self, order) -> str:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


class Place:
    """A folder with a federation's file."""

    def __init__(self, folder: Path, start: Path, nursery: Nursery) -> None:
        self.folder, self.out, self._nursery = folder, folder / "out", nursery
        folder.mkdir(exist_ok=True)
        shutil.copytree(start, folder / "start")
        self.file = self.write()

    def write(self, rounds: int = 2, more: str = "") -> Path:
        file = self.folder / "federation.yaml"
        file.write_text(FILE.format(rounds=rounds, more=more))
        return file

    def start(self, **options) -> int:
        return self._nursery.start("federate", self.file, **options)

    def run(self, **options) -> tuple[int, str]:
        return self._nursery.run("federate", self.file, **options)

    def at(self, moment: str, kind: str = "hang", **options) -> int:
        """Starts it and waits until it has come to a moment, where it stays."""
        there = self.folder / f"there-{time.monotonic_ns()}"
        pid = self.start(do={moment: [kind, str(there)]}, **options)
        until = time.monotonic() + 60
        while not there.exists():
            assert time.monotonic() < until
            time.sleep(0.005)
        return pid


def digest(folder: Path) -> dict[str, str]:
    """Path within → SHA-256 of every file's content, but for locks and what says how the process stands."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and "status.json" not in p.name)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def chain_and_history(out: Path):
    """What a federation has come to: the chain's files, and records without what clock and way there say."""
    history = json.loads((out / "history.json").read_text())
    for name in ("began", "ended"):
        del history["about"][name]
    for record in history["rounds"]:
        for each in (record, *record["participants"].values()):
            each["weights_version"] = each.get("weights_version", "").rpartition("-")[2]  # before it: a count of loads
            for name in [n for n in each if n.endswith("seconds") or "bytes" in n]:  # a new process has to be sent all
                del each[name]
    return digest(out / "chain"), history


@pytest.fixture(scope="module")
def start_chain(tmp_path_factory):
    from forked_federate import make_chain

    folder = tmp_path_factory.mktemp("start") / "start"
    make_chain().save(folder)
    return folder


@pytest.fixture
def place(tmp_path, start_chain, nursery):
    return Place(tmp_path / "f", start_chain, nursery)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start_chain, nursery):
    """A federation whose two rounds are done; to be copied."""
    made = Place(tmp_path_factory.mktemp("finished") / "f", start_chain, nursery)
    status, said = made.run()
    assert status == 0, said
    assert f"done: 2 rounds; chain and history in {made.out}" in said
    assert "beginning: 2 rounds" in said
    assert "a round counts with 1 of 2 sites (quorum, the default" in said
    return made


@pytest.fixture
def done(finished, tmp_path, nursery):
    shutil.copytree(finished.folder, tmp_path / "done")
    made = object.__new__(Place)
    made.folder, made.out, made._nursery = tmp_path / "done", tmp_path / "done" / "out", nursery
    made.file = made.folder / "federation.yaml"
    return made


# --- started again --------------------------------------------------------------------------------------------------


def federate_unit(place) -> Unit:
    return Unit("llmchain-fed-federate@.service", "f", {"FEDERATION": str(place.file)})


def test_a_finished_federation_that_its_supervisor_starts_again_stays_as_it_is(done, nursery):
    unit, before = federate_unit(done), digest(done.folder)
    for _ in range(3):
        status, said = nursery.run(*unit.arguments, engine=False)
        assert (status, len(said.splitlines())) == (0, 1), said
        assert f"done: all 2 rounds; chain and history in {done.out}" in said
        assert not unit.starts_again(status)
        assert digest(done.folder) == before
    done.write(rounds=1)  # fewer than there are
    assert done.run(engine=False)[0] == 0
    assert digest(done.out) == {k.removeprefix("out/"): v for k, v in before.items() if k.startswith("out/")}


@pytest.mark.parametrize(
    ("former", "now", "named"),
    [
        ("max_steps: 1", "max_steps: 2", "training: "),
        ("retries: 0", "aggregation: fedit", "aggregation: 'fedavg' there, 'fedit' here"),
        ("[a, b]", "[a, c]", "sites: a, b there, a, c here"),
        ("chain: start", "chain: other", "chain: "),
        ("chain: start", "chain: translation", "chain: translation is not the one that it began with"),
    ],
)
def test_the_rounds_of_another_federation_are_not_taken_for_this_ones(done, former, now, named):
    from forked_federate import make_chain

    make_chain(1).save(done.folder / "other")
    text = done.file.read_text()
    assert former in text
    done.file.write_text(text.replace(former, now))
    before = digest(done.out)
    status, said = done.run(engine=False)
    assert (status, len(said.splitlines())) == (2, 1), said
    assert "contains the rounds of another federation (" in said
    assert named in said
    assert "Choose another `out`" in said
    assert digest(done.out) == before
    assert not federate_unit(done).starts_again(status)


def test_what_may_change_of_a_finished_federation_does_not_make_it_another(done):
    """A quorum, a deadline; the start chain's folder moved away; sites, if that is said."""
    done.file.write_text(done.file.read_text().replace("retries: 0", "quorum: 2\ndeadline: 60"))
    assert done.run(engine=False)[0] == 0
    shutil.rmtree(done.folder / "start")
    assert done.run(engine=False)[0] == 0
    done.file.write_text(done.file.read_text().replace("[a, b]", "[a, b, c]"))
    assert done.run(engine=False)[0] == 2
    assert done._nursery.run("federate", done.file, "--members", "changed", engine=False)[0] == 0
    (done.out / "start.json").write_text("{")
    assert done._nursery.run("federate", done.file, "--members", "changed", engine=False)[0] == 0


def test_a_log_on_a_full_disk_costs_no_status(place):
    place.write(rounds=1)
    assert place._nursery.run("federate", place.file, streams="/dev/full")[0] == 0
    assert len(json.loads((place.out / "history.json").read_text())["rounds"]) == 1


@pytest.mark.parametrize("lost", ["chain", "history.json", "shorter"])
def test_results_that_are_gone_or_behind_are_written_from_the_checkpoint(done, lost):
    before = digest(done.out)
    if lost == "shorter":
        history = json.loads((done.out / "history.json").read_text())
        history["rounds"].pop()
        (done.out / "history.json").write_text(json.dumps(history))
    else:
        shutil.rmtree(done.out / lost) if (done.out / lost).is_dir() else (done.out / lost).unlink()
    status, said = done.run(engine=False)
    assert status == 0, said
    assert digest(done.out) == before


def test_more_rounds_go_on_from_those_that_are_there(done, place):
    done.write(rounds=3)
    status, said = done.run()
    assert status == 0, said
    assert "going on after round 2 of 3" in said
    place.write(rounds=3)
    assert place.run()[0] == 0
    assert chain_and_history(done.out) == chain_and_history(place.out)


def read_history(place) -> History:
    return History.from_dict(json.loads((place.out / "history.json").read_text()))


def measured(place, rounds, more="") -> None:
    """Over sites that hold out examples, and grow worse at them with every round."""
    place.file.write_text(place.write(rounds, more).read_text().replace("[a, b]", "[c, d]"))


def test_it_ends_with_the_best_rounds_weights_where_the_file_says_so(place, tmp_path, start_chain, nursery):
    """At once, or once it is asked to, of a federation that is finished; and the best is a round's of that number."""
    measured(place, 3, "keep: best")
    status, said = place.run(sites="cd")
    assert status == 0, said
    history = read_history(place)
    losses = [record.held_out_after for record in history]
    assert (history.best, history.kept) == (losses.index(min(losses)) + 1,) * 2, losses
    assert history.best < 3, losses
    assert f"the chain has the weights of round {history.best}" in said
    shorter, later = (Place(tmp_path / name, start_chain, nursery) for name in ("shorter", "later"))
    measured(shorter, history.best)
    measured(later, 3)
    assert (shorter.run(sites="cd")[0], later.run(sites="cd")[0]) == (0, 0)
    wanted = digest(shorter.out / "chain")
    assert digest(place.out / "chain") == wanted != digest(later.out / "chain")
    measured(later, 3, "keep: best")  # as if it had been killed before it ended with it
    for _ in range(2):
        status, said = later.run(sites="cd", engine=False)
        assert status == 0, said
        assert f"done: all 3 rounds, the chain has the weights of round {history.best}" in said
        assert digest(later.out / "chain") == wanted


def test_it_ends_early_and_stays_ended_until_the_file_asks_for_more(place):
    measured(place, 5, "patience: 1")
    status, said = place.run(sites="cd")
    assert status == 0, said
    history = read_history(place)
    assert len(history) < 5
    assert "did not improve" in history.stopped_early
    before = digest(place.out)
    status, said = place.run(sites="cd", engine=False)
    assert status == 0, said
    assert f"done: {len(history)} of 5 rounds, stopped early: held-out loss did not improve" in said
    assert "out of the file" in said
    assert digest(place.out) == before
    measured(place, 4)
    status, said = place.run(sites="cd")
    assert status == 0, said
    assert len(read_history(place)) == 4


@pytest.mark.parametrize("left", ["both", "chain", "history.json", "an older checkpoint"])
def test_results_without_their_checkpoints_are_not_replaced_by_less(done, left):
    done.write(rounds=4)
    kept = done.out / "checkpoints"
    if left == "an older checkpoint":
        shutil.rmtree(kept / "round-000002")
    else:
        shutil.rmtree(kept)
    if left == "chain":
        (done.out / "history.json").unlink()
    if left == "history.json":
        shutil.rmtree(done.out / "chain")
    before = digest(done.folder)
    status, said = done.run(engine=False)
    assert (status, len(said.splitlines())) == (2, 1), said
    assert "would be replaced by less. Bring the checkpoints back" in said
    assert digest(done.folder) == before
    assert not federate_unit(done).starts_again(status)


def test_a_folder_that_contains_something_else_is_refused_before_anything_is_loaded(place):
    for path in (place.out / "chain" / "notes.txt", place.out / "history.json" / "notes.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        status, said = place.run(engine=False)
        assert (status, "contains something else" in said) == (2, True), said
        assert path.read_text() == "precious"
        shutil.rmtree(place.out)
    place.out.write_text("a file")
    status, said = place.run(engine=False)
    assert (status, len(said.splitlines())) == (2, 1), said
    assert f"'{place.out}' cannot be written: File exists" in said
    place.out.unlink()
    place.write(more=f"checkpoint_dir: {place.file}/kept")
    status, said = place.run(engine=False)
    assert (status, len(said.splitlines())) == (2, 1), said
    assert f"'{place.file}/kept' cannot be written: Not a directory" in said


def test_before_the_first_round_is_done_no_chain_is_written(place):
    pid = place.at("train 1")
    assert not (place.out / "chain").exists()
    assert not (place.out / "history.json").exists()
    os.kill(pid, signal.SIGKILL)
    place._nursery.wait(pid)


def test_a_second_process_is_refused_before_it_writes(place, finished, nursery):
    """Also one with another `out` and the same checkpoint_dir; a killed one has nothing."""
    pid = place.at("train 3")
    before = digest(place.folder)
    status, said = place.run(engine=False)
    assert (status, f"is in use by process {pid}" in said) == (2, True), said
    other = place.folder / "other.yaml"
    other.write_text(place.file.read_text().replace("out: out", f"out: out2\ncheckpoint_dir: {place.out}/checkpoints"))
    status, said = nursery.run("federate", other, engine=False)
    assert (status, f"is in use by process {pid}" in said) == (2, True), said
    other.unlink()
    (place.folder / "out2" / ".lock").unlink()
    assert digest(place.folder) == before
    unit = federate_unit(place)
    os.kill(pid, signal.SIGKILL)
    status, _ = nursery.wait(pid)
    assert unit.starts_again(status)
    status, said = nursery.run(*unit.arguments)
    assert status == 0, said
    assert "going on after round 1 of 2" in said
    assert chain_and_history(place.out) == chain_and_history(finished.out)


def test_other_members_are_told_the_option_that_takes_them(done):
    done.write(rounds=3)
    done.file.write_text(done.file.read_text().replace("[a, b]", "[a]"))
    before = digest(done.out)
    status, said = done.run(sites=["a"])
    assert status == 2
    assert "llmchain-fed federate with --members changed, goes on" in said
    assert digest(done.out) == before
    status, said = done._nursery.run("federate", done.file, "--members", "changed", sites=["a"])
    assert status == 0, said
    assert "left: b" in (done.out / "history.json").read_text()


# --- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("train 3", signal.SIGTERM),
        ("train 3", signal.SIGINT),
        ("hello", signal.SIGTERM),
        ("load", signal.SIGINT),
        ("check", signal.SIGTERM),
        ("close", signal.SIGINT),
    ],
)
def test_a_signal_stops_with_a_line_and_the_same_command_goes_on(place, finished, nursery, moment, number):
    pid = place.at(moment)
    before, began = digest(place.folder), time.monotonic()
    os.kill(pid, number)
    if moment in ("load", "train 3"):
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)  # Ctrl-C twice
    status, said = nursery.wait(pid)
    assert time.monotonic() - began < 10
    assert status == 128 + number, said
    line = f"stopping; go on with `llmchain-fed federate {place.file}`"
    assert said.count(line) == said.count("stopping") == 1, said
    assert "Traceback" not in said
    assert "Abort" not in said
    assert digest(place.folder) == before
    unit = federate_unit(place)
    assert not unit.starts_again(status), "it was told to stop"
    if moment == "train 3":
        assert nursery.run(*unit.arguments)[0] == 0
        assert chain_and_history(place.out) == chain_and_history(finished.out)


def stop_while(writes, folder):
    """How a process ends that is told to stop while it writes for so many seconds, and what it left."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmchain_fed import stopping\n"
        "stopping.SECONDS, stopping.LONGEST = 0.5, 2.0\n"
        "try:\n"
        " with stopping.stopping(lambda: None):\n"
        "  with stopping.whole():\n"
        "   print(1, flush=True)\n"
        f"   for _ in range({int(writes * 20)}): time.sleep(0.05)\n"
        "   Path(sys.argv[1]).touch()\n"
        "  time.sleep(60)\n"
        "except stopping.Stopped: sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder / "written"], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    with process:
        return process.wait(20), (folder / "written").exists()


def test_a_ctrl_c_that_was_ignored_before_stays_ignored_and_a_sigterm_still_ends_it():
    """As nohup and a script's `&` have it."""
    code = (
        "import os, signal\nfrom llmchain_fed import stopping\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "try:\n"
        " with stopping.stopping(lambda: print('stopping', flush=True)):\n"
        "  os.kill(os.getpid(), signal.SIGINT)\n"
        "  print('goes on', flush=True)\n"
        "  os.kill(os.getpid(), signal.SIGTERM)\n"
        "  signal.pause()\n"
        "except stopping.Stopped as error: print(error.status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("goes on", "143")
    assert lines.count("stopping") <= 1  # by SIGTERM alone, and only if the end did not come first


def test_what_is_being_written_is_written_to_its_end_within_the_supervisors_patience(tmp_path):
    assert (
        stopping.SECONDS
        < stopping.LONGEST
        < float(Unit("llmchain-fed-peer@.service", "x", {}).options["TimeoutStopSec"])
    )
    assert stop_while(1.2, tmp_path) == (7, True), "longer than what is otherwise cut off"
    (tmp_path / "written").unlink()
    assert stop_while(30.0, tmp_path) == (143, False)


def test_a_library_that_does_not_come_back_is_cut_off(place, nursery):
    pid = place.at("load", "deaf", seconds=0.5)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    status, said = nursery.wait(pid)
    assert (status, said.count("stopping; go on with")) == (143, 1), said
    assert time.monotonic() - began < 10


# --- what a supervisor goes by --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "quorum", "status", "says"),
    [
        ("ContractError", 1, 3, "b has not taken part: ContractError: b is out"),
        ("TransportError", 1, 3, "b has not taken part: TransportError: b is out"),
        ("TransportError", 2, 4, "error: QuorumError"),
        ("ContractError", 2, 3, "not done: 0 of 1 rounds"),
    ],
)
def test_the_status_says_whether_the_same_command_may_succeed_later(place, kind, quorum, status, says):
    place.write(rounds=1, more=f"quorum: {quorum}")
    found, said = place.run(out={"b": kind})
    assert found == status, said
    assert says in said
    assert f"a round counts with {quorum} of 2 sites (quorum)" in said
    assert "Traceback" not in said
    assert federate_unit(place).starts_again(status) is (status == 4)
    if says.startswith("b has"):  # whoever looks at it later is told the same
        found, said = place.run(engine=False)
        assert (found, says in said, "done: all 1 rounds" in said) == (3, True, True), said


def federation(records, **out):
    """What `federate` looks at of a federation: who trained, and who is out and why."""
    attendance = Attendance()
    for name in ("a", "b"):
        attendance.out(name, out[name]) if name in out else attendance.came(name)
    rounds = [RoundRecord(n + 1, {name: ParticipantRecord(*r) for name, r in each.items()}) for n, each in records]
    return SimpleNamespace(attendance=attendance, history=History(rounds))


OTHER = OtherExamplesError("participant 'b' is not as it was (examples: 5 then, 6 now): …")
FULL = heads.from_site(heads.to_plain(AuditError("the audit file cannot be written: No space left (28)")))


@pytest.mark.parametrize(
    ("out", "lasts"),
    [
        ({"b": ContractError("x")}, True),
        ({"a": PolicyError("x"), "b": OTHER}, True),
        ({"a": PolicyError("x"), "b": TransportError("x")}, False),
        ({"b": ParticipantError("out of memory")}, False),
        ({"b": ParticipantError("a site's words: it is not as it was")}, False),
        ({"a": PolicyError("x"), "b": FULL}, False),
        ({}, False),
    ],
)
def test_too_few_by_lasting_causes_alone_is_not_tried_again(out, lasts, capsys):
    fed = federation([], **out)
    fed.round = 1
    with pytest.raises(typer.Exit if lasts else QuorumError), federating._lasting_causes(fed, 100, "chain in x"):
        raise QuorumError
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" not done: ")[2] for line in said[-1:]] == (
        ["1 of 100 rounds; chain in x"] if lasts else []
    )


def test_who_is_missing_throughout_has_its_first_reason():
    trained, idle = ("trained",), ("idle",)
    failed, absent = ("failed", "out of memory"), ("absent", "TransportError: late")
    missing = lambda fed: federating._missing(fed.history, ["a", "b"], fed.attendance.never)  # noqa: E731
    assert missing(federation([(0, {"a": trained, "b": failed}), (1, {"a": trained, "b": absent})])) == {
        "b": "out of memory"
    }
    assert missing(federation([(0, {"a": trained, "b": failed}), (1, {"a": absent, "b": trained})])) == {}
    assert missing(federation([(0, {"a": trained, "b": idle})])) == {}, "it was never drawn"
    gone = federation([(0, {"a": trained, "b": trained}), (1, {"a": trained, "b": absent})], b=ContractError("other"))
    assert missing(gone) == {"b": "ContractError: other"}, "since this process began"


def test_statuses_of_errors():
    found = {kind: console.status_of(kind("x")) for kind in (QuorumError, TransportError, DeadlineError)}
    assert set(found.values()) == {4}
    assert console.status_of(CheckpointError("x")) == console.status_of(ConfigError("x")) == 2


def test_systemd_reads_the_unit_files(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    units = []
    for path in UNITS.glob("*@.service"):
        units.append(tmp_path / path.name.replace("@.", "@x."))
        units[-1].write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    assert len(units) == 3
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["engine", "peer", "federate"])
def test_a_units_command_is_one_of_ours(name):
    """Every option in ExecStart exists, and misconfiguration is not started again."""
    from typer.main import get_command

    from llmchain_fed.cli.__main__ import app

    unit = Unit(
        f"llmchain-fed-{name}@.service", "x", {"OPTIONS": "--socket s", "FEDERATE_OPTIONS": "--members changed"}
    )
    command, *options = unit.arguments
    known = {o for parameter in get_command(app).commands[command].params for o in parameter.opts}
    assert command == name
    assert {o for o in options if o.startswith("--")} <= known
    assert not unit.starts_again(2)
    assert not unit.starts_again(143)
    assert unit.starts_again(-signal.SIGKILL)
    assert int(unit.options["TimeoutStopSec"]) > 10


# --- full disks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this account may not mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a child may not be gone yet


@pytest.mark.parametrize("full", ["out", "checkpoints"])
def test_a_full_disk_is_a_line_and_costs_nothing(place, finished, small_disk, full):
    elsewhere = place.folder / "elsewhere"
    out, kept = (small_disk, elsewhere) if full == "out" else (elsewhere, small_disk)
    place.out = out
    more = f"checkpoint_dir: {kept}"
    place.write(rounds=1, more=more)
    place.file.write_text(place.file.read_text().replace("out: out", f"out: {out}"))
    assert place.run()[0] == 0
    place.file.write_text(place.file.read_text().replace("rounds: 1", "rounds: 2"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 3 * 4096)  # room for a test file, none for a chain
    before = digest(out), digest(kept)
    status, said = place.run()
    assert status == 2, said
    assert said.splitlines()[-1].count("No space left on device") == 1
    assert "Traceback" not in said
    if full == "out":
        assert digest(out) == before[0]
        assert max(kept.glob("round-*")).name == "round-000002", "that of the round that was trained"
    else:
        assert (digest(out), digest(kept)) == before
    LLMChain.load(out / "chain")
    filler.unlink()
    status, said = place.run()
    assert status == 0, said
    assert chain_and_history(out) == chain_and_history(finished.out)


def test_no_room_for_a_chain_a_history_a_checkpoint(make_chain, tmp_path, monkeypatch):
    """As on a full disk, at whatever step it shows: the error is ours, and what was there is as it was."""
    chain, shares = make_chain(lora=True), {"a": PAIRS[:6], "b": PAIRS[6:]}
    fed = FederatedAveraging(chain, participants=shares, checkpoint_dir=tmp_path / "kept", progress=False)
    fed.fit(1)
    chain.save(tmp_path / "chain")
    fed.history.save(tmp_path / "history.json")
    before, real = digest(tmp_path), os.fsync

    def full(descriptor):
        if next(left) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    for step in (0, 2, 4):
        left = iter(range(step, -1000, -1))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ChainFileError, match=r"cannot be written to .*: No space left on device\. What was there"):
            chain.save(tmp_path / "chain")
        assert digest(tmp_path) == before
    left = iter([0])
    with pytest.raises(OSError, match="No space left"):
        fed.history.save(tmp_path / "history.json")
    left = iter([3, 2, 1, 0, 0])
    with pytest.raises(CheckpointError, match=r"No space left on device.*Former ones stay"):
        fed.fit(1)
    assert digest(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


# --- killed while writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_save_that_is_killed_leaves_the_former_chain_or_the_new_one(nursery, tmp_path, exchange):
    from forked_federate import make_chain

    place, hashes, seen, absent = tmp_path / "chain", set(), set(), 0
    for seed in (0, 1):
        make_chain(seed).save(place)
        hashes.add(json.dumps(digest(place)))
    rng = random.Random(7)
    (tmp_path / "count").mkdir()
    for attempt in range(10):
        count = tmp_path / "count" / str(attempt)
        pid = nursery.start(save=[str(place), str(count)], exchange=exchange)
        while not count.exists() or count.stat().st_size <= attempt % 2:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait(pid)[0] == -signal.SIGKILL
        absent += not place.exists()
        if not exchange:
            whole_folders.put_right(place)
        found = json.dumps(digest(place))
        assert found in hashes
        seen.add(found)
    assert seen == hashes, "both were there"
    assert exchange is False or absent == 0, "at no moment is there none"
    make_chain(0).save(place)
    shutil.rmtree(tmp_path / "count")
    assert [p.name for p in tmp_path.iterdir()] == ["chain"], "what the killed ones left is swept"


def test_what_a_kill_between_two_renames_left_is_put_right(make_chain, tmp_path):
    chain = make_chain(lora=True)
    chain.save(tmp_path / "chain")
    before = digest(tmp_path / "chain")
    old = tmp_path / ".chain-old-0123456789abcdef"
    old.mkdir()
    (tmp_path / "chain").rename(old / "chain")
    (tmp_path / ".chain-new-0123456789abcdef").mkdir()
    (tmp_path / ".chain-mine").mkdir()
    whole_folders.put_right(tmp_path / "chain")
    assert digest(tmp_path / "chain") == before
    assert {p.name for p in tmp_path.iterdir()} == {"chain", ".chain-mine"}


def test_what_another_process_is_writing_is_not_swept(tmp_path):
    with whole_folders.replaced(tmp_path / "chain") as one:
        (one / "file").write_text("1")
        with whole_folders.replaced(tmp_path / "chain") as other:
            (other / "file").write_text("2")
        assert (tmp_path / "chain" / "file").read_text() == "2"
    assert (tmp_path / "chain" / "file").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["chain"]


def test_links_and_rights_that_a_user_gave_stay(make_chain, tmp_path):
    """The chain on a large disk, for a group to read; whatever rounds come after."""
    chain, disk, out = make_chain(lora=True), tmp_path / "disk", tmp_path / "out"
    (disk / "chains").mkdir(parents=True)
    out.mkdir()
    (out / "chain").symlink_to("../disk/chains/mine")
    (out / "history.json").symlink_to("../disk/history.json")
    chain.save(out / "chain")
    history(1).save(out / "history.json")
    made = disk / "chains" / "mine"
    made.chmod(0o2750)
    (made / "chain.yaml").chmod(0o640)
    (disk / "history.json").chmod(0o640)
    chain.save(out / "chain")
    history(2).save(out / "history.json")
    assert (os.readlink(out / "chain"), os.readlink(out / "history.json")) == (
        "../disk/chains/mine", "../disk/history.json",
    )  # fmt: skip
    modes = [p.stat().st_mode & 0o7777 for p in (made, made / "chain.yaml", disk / "history.json")]
    assert list(map(oct, modes)) == ["0o2750", "0o640", "0o640"]
    assert len(json.loads((disk / "history.json").read_text())["rounds"]) == 2
    assert {p.name for p in (disk / "chains").iterdir()} == {"mine"}
    assert {p.name for p in out.iterdir()} == {"chain", "history.json"}
    LLMChain.load(out / "chain")


def test_another_accounts_link_is_not_followed(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make another's link")
    (tmp_path / "precious").write_text("x")
    (tmp_path / "history.json").symlink_to("precious")
    os.lchown(tmp_path / "history.json", 12345, 12345)
    own_files.write_whole(tmp_path / "history.json", "mine")
    assert (tmp_path / "precious").read_text() == "x"
    assert (tmp_path / "history.json").read_text() == "mine"


# --- histories and locks --------------------------------------------------------------------------------------------


def history(rounds: int) -> History:
    return History([RoundRecord(n + 1, {"a": ParticipantRecord("trained", train_loss=1.0)}) for n in range(rounds)])


def test_a_history_is_not_replaced_by_a_shorter_one(tmp_path):
    path = tmp_path / "history.json"
    history(3).save(path)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"a history of 3 rounds, this one has 2: .* move that one away"):
        history(2).save(path)
    assert len(json.loads(path.read_text())["rounds"]) == 3
    history(4).save(path)
    assert path.stat().st_mode & 0o777 == 0o600, "as it was"
    path.write_text('{"rounds": [{"rou')  # half of one, of a process that was killed
    history(1).save(path)
    assert len(json.loads(path.read_text())["rounds"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["history.json"]


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path):
    code = "import sys, time; from llmchain_fed.storage.own_files import lock\n"
    code += "with lock(sys.argv[1], 'x'): print(1, flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE)
    assert owner.stdout.readline()
    with (
        pytest.raises(ConfigError, match=rf"^the folder is in use by process {owner.pid}\. Two at once"),
        own_files.lock(tmp_path / "lock", "the folder"),
    ):
        raise AssertionError
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with own_files.lock(tmp_path / "lock", "the folder"):
        pass
    with (
        pytest.raises(ConfigError, match=r"cannot be locked: .*No such file"),
        own_files.lock(tmp_path / "no" / "lock", "x"),
    ):
        raise AssertionError


def test_a_checkpoint_dir_is_there_by_default(place):
    assert FederationFile.read(place.file).checkpoint_dir == place.out / "checkpoints"
    place.write(more="checkpoint_dir: kept")
    assert FederationFile.read(place.file).checkpoint_dir == place.folder / "kept"


def test_writers_of_the_package_and_the_examples_write_whole_files():
    """What is opened for writing elsewhere lies in a folder that is made whole, or was read through and is listed."""
    root = Path(__file__).parents[2]
    known = {
        *(f"llmchain_fed/chain/saving/{name}.py" for name in ("directory", "model", "adapter")),  # in a whole folder
        "llmchain_fed/storage/own_files.py", "llmchain_fed/model/folder/settings.py",
        "llmchain_fed/federated/checkpoint/files.py", "llmchain_fed/runtimes/messaging/frames.py",
        "llmchain_fed/runtimes/nvflare/job.py", "llmchain_fed/runtimes/nvflare/kits.py", "examples/federation/run.py",
        "examples/translation/demo.py", "examples/translation/compare_arms.py",
    }  # fmt: skip
    pattern = re.compile(r"\.write_text\(|\.write_bytes\(|open\([^)]*[\"'][wx]b?[\"']|\.savefig\((?!buffer)")
    files = [*(root / "llmchain_fed").rglob("*.py"), *(root / "examples").rglob("*.py")]
    found = {p.relative_to(root).as_posix() for p in files if pattern.search(p.read_text())}
    assert found <= known
