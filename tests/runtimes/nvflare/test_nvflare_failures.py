"""NVFlare when things die: real processes are killed and started again while a federation runs. Minutes.

Belongs here: what a federation survives. Does not: what it does when all is well (test_nvflare).
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from federation_processes import LONG, SITES, STEPS, Federation, difference
from sites import wait_for_hub, wait_for_sites
from torchrun_script import SHARES, tiny_chain

from llmchain_fed import FederatedAveraging, QuorumError
from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes.nvflare.session import EngineSession

pytestmark = pytest.mark.federation


@pytest.fixture
def federation(tmp_path_factory):
    found = Federation(tmp_path_factory.mktemp("f"))
    try:
        yield found.start()
    finally:
        found.stop()


@pytest.fixture
def runtime(federation):
    with federation.runtime() as found:
        yield found


class Running:
    """`fit` in a thread, so that the test can kill meanwhile."""

    def __init__(self, federation, runtime, rounds, **options):
        self.chain = tiny_chain("causal", lora=True)
        self.fed, self.error = None, None
        self.rounds, self.options = rounds, {"training": LONG, "samples": 0} | options
        self.federation, self.runtime = federation, runtime
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            self.fed = FederatedAveraging(self.chain, runtime=self.runtime, progress=False, **self.options)
            self.fed.fit(self.rounds)
        except Exception as error:
            self.error = error

    def wait_for_round(self, number, seconds=120.0):
        """Until round `number` (from 1) is under way: both sites have been asked to train in it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.thread.is_alive():
            if self.fed is not None and self.fed.round >= number - 1 and self.fed._server.client_manager.joined:
                time.sleep(1.0)
                return
            time.sleep(0.02)
        raise AssertionError(f"round {number} never began: {self.error}")

    def result(self, seconds=240.0):
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.fed


def alone(chain, training=LONG):
    """The same federation in this process."""
    options = {"participants": {n: SHARES[n] for n in SITES}, "training": training, "samples": 0, "progress": False}
    return FederatedAveraging(chain, **options)


def without(inner, name):
    """A transport's call in which `name` cannot be reached."""

    def call(op, nodes, payload, timeout=None):
        for node in nodes:
            if node == name:
                yield node, TransportError("cut off")
            else:
                yield from inner(op, [node], payload, timeout)

    call.inner = inner
    return call


def statuses(fed):
    return [{n: p.status for n, p in record.participants.items()} for record in fed.history]


def test_a_peer_killed_in_a_round_is_absent_from_it_and_in_the_next(federation, runtime):
    running = Running(federation, runtime, 2)
    running.wait_for_round(2)
    federation.kill(federation.peers["b"])
    federation.start_peer("b")
    fed = running.result()
    federation.wait_for_peer("b")
    fed.fit(1)
    found = statuses(fed)
    assert [s["a"] for s in found] == ["trained"] * 3
    assert [s["b"] for s in found] == ["trained", "absent", "trained"]
    assert "TransportError" in fed.history[1].participants["b"].reason
    assert runtime.jobs == 1
    # b goes on from the global weights, which after the round without it are a's alone
    whole = tiny_chain("causal", lora=True)
    reference = alone(whole)
    reference.fit(1)
    reference._runtime.call = without(reference._runtime.call, "b")
    reference.fit(1)
    reference._runtime.call = reference._runtime.call.inner
    reference.fit(1)
    assert difference(running.chain.model.trainable_state(), whole.model.trainable_state()) < 1e-5


def test_a_site_killed_and_started_again_is_back_by_itself(federation, runtime):
    running = Running(federation, runtime, 4)
    running.wait_for_round(2)
    federation.kill(federation.engines["b"], federation.peers["b"])
    time.sleep(3)
    federation.start_peer("b")
    federation.start_site("b")
    federation.wait_for_peer("b")
    fed = running.result()
    found = statuses(fed)
    assert [s["a"] for s in found] == ["trained"] * 4
    assert found[1]["b"] == "absent"
    if found[3]["b"] != "trained":  # the rounds may be over before it is back
        fed.fit(3)
        found = statuses(fed)
    assert found[-1]["b"] == "trained"
    assert runtime.jobs == 2


def test_the_engines_server_killed_goes_on_with_a_new_job_within_two_minutes(federation, runtime):
    running = Running(federation, runtime, 3)
    running.wait_for_round(2)
    federation.kill(federation.engines["hub"])
    killed = time.monotonic()
    time.sleep(2)
    federation.start_hub()
    fed = running.result()
    assert statuses(fed) == [{"a": "trained", "b": "trained"}] * 3
    assert runtime.jobs == 2
    print(f"\nserver killed in round 2, three rounds done {time.monotonic() - killed:.0f} s later")
    assert fed.history[1].seconds < 120
    # nothing was lost or done twice: the same weights as without a kill
    whole = tiny_chain("causal", lora=True)
    alone(whole).fit(3)
    assert difference(running.chain.model.trainable_state(), whole.model.trainable_state()) < 1e-5


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from federation_processes import Federation, SITES
from federation_processes import STEPS
from torchrun_script import tiny_chain
from llmchain_fed import FederatedAveraging, NVFlare
chain = tiny_chain("causal", lora=True)
runtime = NVFlare(sys.argv[2], sites=SITES, socket=sys.argv[3], patience=8.0)
fed = FederatedAveraging(chain, runtime=runtime, training=STEPS, samples=0, progress=False)
for number in range(2):
    fed.fit(1)
    print("round", fed.round, fed.history[-1].trained, flush=True)
print("jobs", runtime.jobs, flush=True)
runtime.close()
torch.save(chain.model.trainable_state(), sys.argv[4])
"""


def test_the_hubs_driver_killed_and_started_again_finds_its_job(federation):
    here, admin = Path(__file__).parents[2] / "support", federation.kits["admin"]
    out = federation.folder / "weights.pt"
    command = [sys.executable, "-c", DRIVER, str(here), str(admin), str(federation.folder / "hub.sock"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline().startswith("round 1")
        time.sleep(1.0)  # in round 2
        first.kill()
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == ["round 1 ['a', 'b']", "round 2 ['a', 'b']", "jobs 0"]
    # started from the beginning: an earlier federation of the same peers leaves no trace in the weights
    whole = tiny_chain("causal", lora=True)
    alone(whole, STEPS).fit(2)
    assert difference(whole.model.trainable_state(), torch.load(out, weights_only=True)) < 1e-5


def wake_after(federation, sleeper, other, seconds=5.0):
    """Lets a stopped site go on some seconds after the hub has heard of another."""
    session = EngineSession(federation.kits["admin"])
    until = time.monotonic() + 80
    while time.monotonic() < until:
        with suppress(TransportError):
            if other in session.connected():
                break
        time.sleep(0.5)
    time.sleep(seconds)
    federation.wake(sleeper)
    session.close()


def test_a_server_that_stays_away_is_one_clear_error_and_the_weights_are_kept(federation):
    with federation.runtime(recovery=6.0) as runtime:
        running = Running(federation, runtime, 3)
        running.wait_for_round(2)
        federation.kill(federation.engines["hub"])
        with pytest.raises(QuorumError, match="The engine was not back within 6 s"):
            running.result()
        assert running.fed.round == len(running.fed.history) == 1
        federation.freeze("a")  # it finds the hub again seconds after b
        federation.start_hub()
        waking = threading.Thread(target=wake_after, args=[federation, "a", "b"])
        waking.start()
        fed = running.fed
        until = time.monotonic() + 90
        while True:  # by hand now: the same object goes on
            try:
                fed.fit(1)
                break
            except QuorumError:
                assert time.monotonic() < until
                time.sleep(2)
        waking.join()
        assert fed.history[1].trained == ["a", "b"]


def test_a_site_that_refuses_the_job_is_absent_and_the_others_learn(tmp_path_factory):
    federation = Federation(tmp_path_factory.mktemp("f"))
    local = federation.kits["b"] / "local" / "resources.json"
    local.write_text(local.read_text().replace("llmchain_fed.runtimes.nvflare.bridge.SiteBridge", "something.Else"))
    try:
        with federation.start().runtime() as runtime:
            running = Running(federation, runtime, 2)
            fed = running.result()
            assert statuses(fed) == [{"a": "trained", "b": "absent"}] * 2
            assert "the engine ended the job before it ran" in fed.history[0].participants["b"].reason
            assert "A site whose local/resources.json does not list" in fed.history[0].participants["b"].reason
    finally:
        federation.stop()


# --- two hosts ------------------------------------------------------------------------------------------------------

HUB, SITE_B = "10.77.1.1", "10.77.1.2"


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_hosts(tmp_path_factory):
    """Site b in a network of its own, joined to the hub's by a cable (veth) that can be pulled."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"lf{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not available here: {error.stderr.decode()}")
    try:
        ip("link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{HUB}/24", "dev", f"{name}h")
        ip("link", "set", f"{name}h", "up")
        ip("-n", name, "addr", "add", f"{SITE_B}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, f"{name}h"
    finally:
        ip("netns", "del", name)  # the cable goes with it


def test_a_host_cut_off_for_longer_than_a_heartbeat_is_absent_and_comes_back(two_hosts, tmp_path_factory):
    namespace, cable = two_hosts
    federation = Federation(tmp_path_factory.mktemp("f"), host=HUB)
    try:
        federation.start_hub()
        for name in SITES:
            federation.start_peer(name)
        wait_for_hub(federation.kits["admin"])
        federation.start_site("a")
        federation.start_site("b", prefix=["ip", "netns", "exec", namespace])
        for name in SITES:
            federation.wait_for_peer(name)
        wait_for_sites(federation.kits["admin"], SITES)
        with federation.runtime() as runtime:
            running = Running(federation, runtime, 3)
            running.wait_for_round(2)
            ip("link", "set", cable, "down")
            cut = time.monotonic()
            fed = running.result()
            found = statuses(fed)
            assert [s["a"] for s in found] == ["trained"] * 3
            assert found[0]["b"] == "trained"
            assert "absent" in (found[1]["b"], found[2]["b"])
            assert found[2]["b"] == "absent"
            time.sleep(max(0.0, 35.0 - (time.monotonic() - cut)))  # the hub gives a site up after 30 s without one
            ip("link", "set", cable, "up")
            until = time.monotonic() + 90
            while fed.history[-1].participants["b"].status != "trained":
                assert time.monotonic() < until, fed.history
                fed.fit(1)
            print(f"\nback {time.monotonic() - until + 90:.0f} s after the cable was plugged in, {runtime.jobs} jobs")
            assert fed.history[-1].trained == ["a", "b"]
    finally:
        federation.stop()
