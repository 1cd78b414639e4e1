"""A real federation on this machine: the engine's hub and sites, one peer process per site, all over loopback TLS."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from sites import wait_for_hub, wait_for_sites
from torchrun_script import HELD_OUT, SHARES, TRAINING, tiny_chain

from llmchain_fed import FederatedAveraging, NVFlare
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.nvflare import engine, kits

SITES = ("a", "b")
# long enough to be killed in the middle: some 5 ms a step
LONG = TRAINING.replace(epochs=200)
STEPS = TRAINING.replace(epochs=None, max_steps=600)  # the same, but a peer keeps its place in the data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_examples(path: Path, pairs) -> Path:
    lines = (json.dumps({"text": text, "completion": completion}, ensure_ascii=False) for text, completion in pairs)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Federation:
    """Provisions and starts everything; `stop` leaves no process behind.

    Args:
        folder: Where, with a short path: sockets live in it.
        sites: Their names, of `SHARES`.
        kits_in: The name of the folder for the kits.
    """

    def __init__(self, folder: Path, sites=SITES, *, chain=None, host="localhost", kits_in="kits") -> None:
        self.folder, self.sites = folder, list(sites)
        folder.mkdir(parents=True, exist_ok=True)
        self.kits = kits.provision_here(folder / kits_in, sites=self.sites, port=free_port(), host=host)
        self.chain_folder = folder / "chain"
        (chain or tiny_chain("causal", lora=True)).save(self.chain_folder)
        self.engines: dict[str, subprocess.Popen] = {}
        self.peers: dict[str, subprocess.Popen] = {}
        self.started: list[psutil.Process] = []

    def start(self) -> Federation:
        self.start_hub()
        for name in self.sites:
            self.start_peer(name)
        wait_for_hub(self.kits["admin"])
        for name in self.sites:
            self.start_site(name)
        for name in self.sites:
            self.wait_for_peer(name)
        wait_for_sites(self.kits["admin"], self.sites)
        return self

    def start_hub(self) -> None:
        self.engines["hub"] = engine.start(self.kits["hub"])

    def start_site(self, name: str, prefix=()) -> None:
        if not prefix:
            self.engines[name] = engine.start(self.kits[name], socket=self.socket(name))
            return
        command, variables = engine.command_of(self.kits[name], self.socket(name))
        with (self.kits[name] / "engine.log").open("ab") as log:
            self.engines[name] = subprocess.Popen(
                [*prefix, *command], cwd=self.kits[name], env=os.environ | variables, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start_peer(self, name: str, *options: str, pairs=None) -> None:
        data = write_examples(self.folder / f"{name}.jsonl", SHARES[name] if pairs is None else pairs)
        command = [
            sys.executable, "-m", "llmchain_fed.cli", "peer", "--name", name, "--chain", str(self.chain_folder),
            "--data", str(data), "--socket", str(self.socket(name)), "--threads", "1", *options,
        ]  # fmt: skip
        if name in HELD_OUT:
            command += ["--held-out", str(write_examples(self.folder / f"{name}.held_out.jsonl", HELD_OUT[name]))]
        with (self.folder / f"{name}.peer.log").open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.peers[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def change_chain(self, chain) -> None:
        """Starts all peers anew with another chain; the engine and its job stay."""
        self.kill(*self.peers.values())
        shutil.rmtree(self.chain_folder)
        chain.save(self.chain_folder)
        for name in self.sites:
            self.start_peer(name)
        for name in self.sites:
            self.wait_for_peer(name)

    def wait_for_peer(self, name: str, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(Exception):
                frames.ask(self.socket(name), frames.pack({"do": "ping"}))
                return
            assert self.peers[name].poll() is None, (self.folder / f"{name}.peer.log").read_text()
            time.sleep(0.1)
        raise TimeoutError(name)

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def runtime(self, **options) -> NVFlare:
        options = {"patience": 8.0, "socket": self.folder / "hub.sock", "sites": self.sites} | options
        return NVFlare(self.kits["admin"], **options)

    def federate(self, runtime, *, chain=None, rounds=3, training=TRAINING, **options):
        fed = FederatedAveraging(
            chain or tiny_chain("causal", lora=True), runtime=runtime, training=training, progress=False, **options
        )
        fed.fit(rounds)
        return fed

    def freeze(self, name: str) -> None:
        """Stops all processes of an engine, as if its machine slept."""
        for member in self._tree(name):
            member.suspend()

    def wake(self, name: str) -> None:
        for member in self._tree(name):
            member.resume()

    def _tree(self, name: str) -> list[psutil.Process]:
        root = psutil.Process(self.engines[name].pid)
        return [root, *root.children(recursive=True)]

    def kill(self, *processes: subprocess.Popen) -> None:
        """SIGKILL to whole trees, at once."""
        trees = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                trees += [root, *root.children(recursive=True)]
        for member in trees:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(timeout=10)

    def stop(self) -> None:
        members = self.members()
        for process in self.peers.values():
            process.kill()
            process.wait(timeout=10)
        engine.stop(self.engines.values())
        alive = [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not alive, alive

    def members(self) -> list[psutil.Process]:
        """Every process of this federation that runs now."""
        found = []
        for process in (*self.engines.values(), *self.peers.values()):
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
        return found

    def audit(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.sock.audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def log(self, name: str) -> str:
        return "".join(p.read_text(errors="replace") for p in self.kits[name].glob("*.log*"))


def difference(a, b) -> float:
    return max(float((a[n] - torch.as_tensor(b[n])).abs().max()) for n in a)
