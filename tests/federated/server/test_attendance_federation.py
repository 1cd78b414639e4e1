"""A site with another model, over real processes: told before round 1, seen by `status`, back in the next round.

Belongs here: attendance with engines and peers, as an operator meets it. Does not: each kind of trouble
(test_attendance), what the command shows (test_status).
"""

import json
import re
import subprocess
import sys
import threading
import time

import pytest
from federation_processes import Federation
from torchrun_script import TRAINING, tiny_chain

from llmchain_fed import FederatedAveraging
from llmchain_fed.tracking.status_file import StatusFile

pytestmark = pytest.mark.federation

SOME_SECONDS = TRAINING.replace(epochs=40)  # a round that one can look at from outside


class Unequal(Federation):
    """Sites may have chains of their own."""

    def __init__(self, folder):
        super().__init__(folder)
        self.chains = {}

    def start_peer(self, name, *options, **more):
        common = self.chain_folder
        self.chain_folder = self.chains.get(name, common)
        super().start_peer(name, *options, **more)
        self.chain_folder = common


def until(check, seconds, running):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert running.is_alive()
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came to that")


def test_another_model_is_told_before_round_1_seen_from_outside_and_mended_for_the_next_round(
    tmp_path_factory, tmp_path, capfd
):
    federation = Unequal(tmp_path_factory.mktemp("f"))
    try:
        run(federation, tmp_path)
    finally:
        federation.stop()
    said = [line for line in capfd.readouterr().err.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    text = [line[20:] for line in said]
    out, back = (next(n for n, line in enumerate(text) if line.startswith(what)) for what in ("b is out", "b is back"))
    first = next(n for n, line in enumerate(text) if line.startswith("round 1 of 30 · 1 of 2 trained · train loss "))
    assert out < first < back
    assert re.match(r"b is out: refused: .*another contract \(base weights: \w+… at b, \w+… at the hub\)", text[out])
    assert re.fullmatch(r"b is back after \d+ s", text[back])
    assert any(line.startswith("in: a; out: b (refused: ") for line in text[out:first])
    assert sum(line.startswith("b is") for line in text) == 2, text
    then = next(line for line in text[back:] if line.startswith("round "))
    assert " 2 of 2 trained " in then, text


def run(federation, out):
    """The federation, and what its operator does meanwhile."""
    right = federation.chain_folder
    tiny_chain("causal", lora=True, seed=1).save(federation.folder / "other")
    federation.chains["b"] = federation.folder / "other"
    federation.start()
    status, done = StatusFile(out / "status.json", rounds=30), threading.Event()
    with federation.runtime() as runtime, status:
        fed = FederatedAveraging(
            tiny_chain("causal", lora=True), runtime=runtime, training=SOME_SECONDS, samples=0, callbacks=[status]
        )

        def rounds():
            while not done.is_set():
                fed.fit(1, of=30)

        running = threading.Thread(target=rounds)
        running.start()
        try:
            until(lambda: fed.round >= 1, 90, running)
            began = time.monotonic()
            seen = subprocess.run(
                [sys.executable, "-m", "llmchain_fed.cli", "status", str(out), "--json"], capture_output=True, text=True
            )
            took = time.monotonic() - began
            (found,) = json.loads(seen.stdout)["found"]
            assert seen.returncode == 3
            assert took < 15, "it waits for nothing that the federation does"
            assert (found["rounds"], found["gone"]) == (30, False)
            assert found["participants"]["a"]["state"] == "in"
            assert found["participants"]["b"]["state"] == "out"
            assert "another contract" in found["participants"]["b"]["reason"]
            federation.kill(federation.peers["b"])
            federation.chains["b"] = right
            federation.start_peer("b")
            federation.wait_for_peer("b")
            under_way = fed.round + 1
            until(lambda: fed.history.rounds and "b" in fed.history[-1].trained, 60, running)
            first = next(record.round for record in fed.history if "b" in record.trained)
            assert first <= under_way + 1, "the next round that begins"
            assert "another contract" in fed.history[0].participants["b"].reason
        finally:
            done.set()
            running.join(120)
    assert not running.is_alive()
