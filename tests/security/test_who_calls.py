"""Who may call a site, with the real engine: the hub, and no other participant of the job.

Belongs here: one site's orders to another, over the engine's own connections and with its own certificate. Does not:
what a site answers to the hub (tests/runtimes/site/test_server.py).
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from federation_processes import SITES, Federation, difference
from torchrun_script import SHARES, federate, tiny_chain

from llmchain_fed.runtimes.nvflare import engine

ATTACK = Path(__file__).parent / "corpus" / "attacking_site.py"


class Attacked(Federation):
    """Site b's machine runs another bridge, with b's own certificate."""

    @property
    def answers(self):
        return self.folder / "answers.json"

    def start_site(self, name, prefix=()):
        if name != "b":
            super().start_site(name)
            return
        folder = self.folder / "attack"
        folder.mkdir()
        shutil.copy(ATTACK, folder / "sitecustomize.py")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "ATTACK_LOG": str(self.answers)}
        self.engines[name] = engine.start(self.kits[name], socket=self.socket(name), environment=environment)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """(the federation after two rounds, the hub's side of them)"""
    federation = Attacked(tmp_path_factory.mktemp("f"))
    try:
        federation.start()
        # a machine that also runs other tests brings b's engine up later than the grace period of a federation
        with federation.runtime(patience=30.0, startup=60.0) as runtime:
            yield federation, federation.federate(runtime, rounds=2)
    finally:
        federation.stop()


def notes(federation, least=13):
    """The victim's lines of what it refused; they are written by a thread of the bridge."""
    until = time.monotonic() + 10
    while True:
        lines = [line for line in federation.audit("a") if line["status"] == "refused"]
        if len(lines) >= least or time.monotonic() > until:
            return lines
        time.sleep(0.1)


def test_a_site_that_gives_orders_to_another_is_refused_every_time(attacked):
    federation, _ = attacked
    answers = json.loads(federation.answers.read_text())
    assert len(answers) == 14
    for what, victim, answer in answers:
        assert victim == "a"
        head = json.loads(answer[4:])
        assert head["error"]["type"] == "PolicyError", (what, answer)
        assert head["error"]["message"].startswith("only the hub may call a site")
        assert str(federation.folder) not in answer


def test_each_of_its_orders_stands_in_the_victims_audit_file_with_its_name(attacked):
    federation, _ = attacked
    lines = notes(federation, 14)
    assert [line["caller"] for line in lines] == ["b"] * 14
    assert "14 calls of b were refused so far" in lines[-1]["error"]
    done = [line for line in federation.audit("a") if line["status"] != "refused"]
    assert {line["caller"] for line in done} == {"server"}
    assert {line["op"] for line in done} == {"hello", "train"}
    assert sum(line["op"] == "train" and line["status"] == "answered" for line in done) == 2


def test_the_rounds_of_the_honest_end_as_without_it(attacked):
    _, fed = attacked
    chain = tiny_chain("causal", lora=True)
    reference = federate(chain, {name: SHARES[name] for name in SITES}, rounds=2)
    assert [record.trained for record in fed.history] == [["a", "b"]] * 2
    assert difference(fed.get_model().model.trainable_state(), chain.model.trainable_state()) < 1e-5
    for ours, theirs in zip(fed.history, reference.history, strict=True):
        assert ours.held_out_after == pytest.approx(theirs.held_out_after, rel=1e-5)
