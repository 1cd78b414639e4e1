"""Fifty SIGKILLs at a federation that writes checkpoints: it ends as the one that was never killed, bit for bit.

Belongs here: processes that die and start again, whole runs of them. Does not: failures within a process
(test_files), what a checkpoint contains (test_resuming). Not part of the default run: `pytest -m kills`.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmchain_fed.federated.checkpoint import files

pytestmark = pytest.mark.kills

_KILLS = 50
_PER_RUN = 7
_SEED = int(os.environ.get("KILLS_SEED", "20"))
_OUTCOME = "outcome.json"  # killed_federation.OUTCOME; importing that here would load everything twice


class Nursery:
    """A process that has imported everything and forks a child per attempt."""

    def __init__(self) -> None:
        here = Path(__file__).parents[2] / "support"
        # the repository first: of a worktree, its own package is killed and not the one that is installed
        path = os.pathsep.join([str(here.parents[1]), str(here)])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(here / "killed_federation.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=here,
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"

    def start(self, directory: Path, dawdle: float = 0.0) -> int:
        """Begins an attempt; returns its process id."""
        self._process.stdin.write(json.dumps([str(directory), dawdle]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def status(self) -> int:
        """Waits for the attempt's end; its exit status, negative for a signal."""
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def straight(nursery, tmp_path_factory) -> tuple[dict, float]:
    """The outcome of the run that nobody kills, and its seconds."""
    directory = tmp_path_factory.mktemp("straight")
    started = time.monotonic()
    nursery.start(directory)
    assert nursery.status() == 0, (directory / "error.txt").read_text()
    return json.loads((directory / _OUTCOME).read_text()), time.monotonic() - started


def look(kept: Path, newest: int) -> int:
    """What a restart would find: whole checkpoints, none older than the newest known before, or nothing as yet."""
    there = files.rounds(kept)
    if not there:
        assert newest < 0, f"round {newest} was there before and is gone"
        return newest
    for number in there:
        assert files.read(kept, number).round == number
        for file in kept.glob(f"round-{number:06d}/*.safetensors"):
            assert load_file(file)
    assert there[-1] >= newest, f"round {newest} was there before; the newest now is {there[-1]}"
    return there[-1]


def writing(kept: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(p.name.startswith((".writing-", ".former-")) for p in kept.iterdir())
    return False


def gone(pid: int) -> bool:
    """Whether it has ended: then it is a zombie, or has been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill_while_writing(pid: int, kept: Path, rng: random.Random) -> None:
    """Waits until a checkpoint is being written, not always the first one, and a little longer."""
    for _ in range(rng.choice([1, 1, 2])):
        while not writing(kept) and not gone(pid):
            time.sleep(0.001)
        if rng.random() < 0.3:
            while writing(kept) and not gone(pid):
                time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.2))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_fifty_kills_change_nothing(nursery, straight, tmp_path):
    wanted, seconds = straight
    rng = random.Random(_SEED)
    print(f"KILLS_SEED={_SEED}; a run that nobody kills takes {seconds:.1f} s")
    delivered, aimed, mid_write, runs, resumed_at = 0, 0, 0, 0, []
    while delivered < _KILLS:
        runs += 1
        directory = tmp_path / f"run-{runs}"
        directory.mkdir()
        kept, newest, mine = directory / "kept", -1, 0
        while True:
            calm = mine >= _PER_RUN or delivered >= _KILLS
            aim = not calm and rng.random() < 0.6
            pid = nursery.start(directory, dawdle=0.02 if aim else 0.0)
            if aim:
                kill_while_writing(pid, kept, rng)
            elif not calm:
                time.sleep(rng.uniform(0.0, 0.8 * seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            status = nursery.status()
            assert status in (0, -signal.SIGKILL), (directory / "error.txt").read_text()
            newest = look(kept, newest)
            if status == 0:
                break
            delivered, mine, aimed = delivered + 1, mine + 1, aimed + aim
            mid_write += writing(kept)
            resumed_at.append(newest)
        assert json.loads((directory / _OUTCOME).read_text()) == wanted, f"run {runs}, KILLS_SEED={_SEED}"
        assert not writing(kept), "what the killed ones left is swept"
    print(f"{delivered} kills in {runs} runs, {aimed} aimed, {mid_write} left a checkpoint half written")
    print(f"resumed after rounds {resumed_at}")
    assert delivered == _KILLS
    assert mid_write >= 5, "too few kills hit the writing of a checkpoint for this test to say anything of it"
    assert len({at for at in resumed_at if at > 0}) >= 3, "resumed after several different rounds"


def test_a_kill_at_every_step_of_replacing_the_last_checkpoint(nursery, straight, tmp_path):
    """The personal adapter at the end writes the last round again: at no moment is that round gone."""
    wanted, _ = straight
    whole = tmp_path / "whole"
    whole.mkdir()
    nursery.start(whole)
    assert nursery.status() == 0
    for step in range(8):
        (whole / _OUTCOME).unlink(missing_ok=True)
        pid = nursery.start(whole, dawdle=0.03)
        while not writing(whole / "kept") and not gone(pid):
            time.sleep(0.001)
        time.sleep(0.05 * step)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        nursery.status()
        assert look(whole / "kept", 6) == 6
    nursery.start(whole)
    assert nursery.status() == 0
    assert json.loads((whole / _OUTCOME).read_text()) == wanted
