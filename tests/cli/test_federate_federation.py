"""`federate` as its unit file starts it, over real engines and peers: stopped and killed in a round, and started again.

Belongs here: what needs the engine's own processes. Does not: everything else about results (test_federate).
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federation_processes import Federation
from supervisor import Unit

from llmchain_fed.federated.checkpoint import files as checkpoint

pytestmark = pytest.mark.federation

FILE = """
chain: {chain}
hub: {{admin: {admin}, sites: [a, b], socket: {socket}, patience: 20}}
out: {out}
rounds: 2
training: {{optimizer: sgd, learning_rate: 0.05, batch_size: 4, max_steps: 2}}
quorum: 2
"""


class Supervised:
    """A federation's process under a supervisor."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.out, self.log = federation.folder / name, federation.folder / f"{name}.log"
        file = federation.folder / f"{name}.yaml"
        admin, path = federation.kits["admin"], federation.folder / "hub.sock"
        file.write_text(FILE.format(chain=federation.chain_folder, admin=admin, socket=path, out=self.out))
        self.unit = Unit("llmchain-fed-federate@.service", name, {"FEDERATION": str(file)})
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "llmchain_fed.cli", *self.unit.arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait(self, seconds: float = 90.0) -> int:
        return self.process.wait(timeout=seconds)

    def round_done(self, number: int) -> None:
        """Waits until a round is on the disk."""
        until = time.monotonic() + 90
        while not (self.out / "history.json").exists() or number not in checkpoint.rounds(self.out / "checkpoints"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def results(self) -> dict[str, str]:
        files = [p for p in sorted((self.out / "chain").rglob("*")) if p.is_file()] + [self.out / "history.json"]
        return {p.relative_to(self.out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def federation(tmp_path_factory):
    made = Federation(Path(tmp_path_factory.mktemp("r")))
    supervised = []
    made.supervised = lambda name: supervised.append(Supervised(made, name)) or supervised[-1]
    try:
        yield made.start()
    finally:
        for each in supervised:
            if each.process is not None and each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        for peer in made.peers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer.pid, signal.SIGCONT)
        made.stop()


def test_stopped_and_killed_in_a_round_it_ends_as_one_that_never_was(federation):
    straight = federation.supervised("straight")
    straight.start()
    assert straight.wait() == 0, straight.log.read_text()

    other, peer = federation.supervised("other"), federation.peers["b"]
    other.start()
    other.round_done(1)
    os.kill(peer.pid, signal.SIGSTOP)  # round 2 will not end
    time.sleep(1.0)
    before, began = other.results(), time.monotonic()
    other.process.send_signal(signal.SIGTERM)
    assert other.wait(20) == 143, other.log.read_text()
    seconds = time.monotonic() - began
    print(f"stopped after {seconds:.1f} s")
    assert seconds < 10
    assert other.log.read_text().count("stopping; go on with `llmchain-fed federate") == 1
    assert "Traceback" not in other.log.read_text()
    assert other.results() == before
    os.kill(peer.pid, signal.SIGCONT)

    other.start()
    until = time.monotonic() + 60
    while "going on after round 1 of 2" not in other.log.read_text():
        assert time.monotonic() < until, other.log.read_text()
        time.sleep(0.05)
    other.process.kill()
    status = other.wait()
    assert other.unit.starts_again(status)
    assert other.results() == before
    other.start()
    assert other.wait() == 0, other.log.read_text()
    assert "going on after round 1 of 2" in other.log.read_text()

    ended = other.results()
    chain = {name: digest for name, digest in ended.items() if name.startswith("chain/")}
    assert chain == {name: digest for name, digest in straight.results().items() if name.startswith("chain/")}
    federation.kill(federation.engines["hub"])  # nothing is asked of it any more
    began = time.monotonic()
    other.start()
    status = other.wait()
    assert not other.unit.starts_again(status)
    assert (status, "done: all 2 rounds" in other.log.read_text()) == (0, True)
    print(f"a finished one ends after {time.monotonic() - began:.1f} s")
    assert other.results() == ended
