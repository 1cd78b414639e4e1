"""A federation across organisations, on one machine: a hub, three sites, real processes, TLS on loopback.

    python -m examples.federation.run                # SmolLM2-135M-Instruct, English → French: some minutes
    python -m examples.federation.run --rounds 1 --train 32 --test 8

Each step is a command that an operator would type; it is printed before it runs. Only the certificates are made in one
place here: across organisations each site makes its own key (`llmchain-fed provision`, see README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging as transformers_logging

from examples.common.catalogues import split_publishers
from examples.common.translation import make_chain, print_results, sample, summary_row, translate
from llmchain_fed import History, LLMChain, TransportError
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.nvflare import engine, kits

SITES = ("django", "wagtail", "pretix")
HERE = Path(__file__).parent


def main() -> None:
    """Provisions, starts, federates, shows, stops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=96, help="training examples per site")
    parser.add_argument("--test", type=int, default=24, help="held-out examples per site")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("out/federation"))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)

    step("the chain that all parties have agreed on, and each site's examples, which stay in its folder")
    chain = make_chain("fr")
    chain.save(args.out / "agreed_chain")
    splits = split_publishers(SITES, train=args.train, test=args.test)
    for name, split in splits.items():
        write_examples(args.out / name / "train.jsonl", split.train)
        write_examples(args.out / name / "held_out.jsonl", split.held_out)
    before = {name: translate(chain, split.held_out) for name, split in splits.items()}
    del chain

    step("certificates and closed-down kits")
    made = kits.provision_here(args.out / "kits", sites=SITES, port=free_port())
    print("\n".join(f"  {name}: {kit}" for name, kit in made.items()))
    write_federation_file(args.out / "federation.yaml", made["admin"], args.rounds, args.lr)
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="lf-") as sockets:  # a UNIX socket's path must be short
        try:
            step("at each site: the peer, which has the model and the examples")
            processes += [start_peer(name, args.out, Path(sockets) / name) for name in SITES]
            step("at the hub, then at each site: the engine, which has neither")
            for name in ("hub", *SITES):
                socket_option = ["--socket", str(Path(sockets) / name)] if name != "hub" else []
                processes.append(start(["engine", str(made[name]), *socket_option], made[name] / "engine.log"))
                if name == "hub":
                    wait_for_hub(made["admin"])
            for name, process in zip(SITES, processes, strict=False):
                wait_for_peer(name, Path(sockets) / name, process, args.out)
            step("at the hub: the rounds")
            done = subprocess.run(command(["federate", str(args.out / "federation.yaml")]), check=False)
        finally:
            engine.stop(processes)
    if done.returncode != 0:
        sys.exit(f"the federation failed; the logs are in {args.out}")

    step("the trained chain, and what an operator can read of what was asked")
    trained = LLMChain.load(args.out / "result" / "chain")
    history = History.from_dict(json.loads((args.out / "result" / "history.json").read_text(encoding="utf-8")))
    after = {name: translate(trained, split.held_out) for name, split in splits.items()}
    rows = [summary_row(name, split, before, after, history) for name, split in splits.items()]
    # held-out texts never left their sites: this script is all parties at once and reads them in their folders
    print_results(rows, [sample(name, 0, splits, before, after) for name in SITES])
    audit = (args.out / SITES[0] / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    print(f"\n{SITES[0]}'s audit file, first 4 of {len(audit)} lines:\n" + "\n".join(f"  {line}" for line in audit[:4]))
    outside = [r.seconds - max(p.seconds or 0 for p in r.participants.values()) - r.evaluation_seconds for r in history]
    print(f"\na round outside training and evaluation: {', '.join(f'{s:.1f} s' for s in outside)}")
    print(f"{time.perf_counter() - started:.0f} s in all; everything is in {args.out}, no process is left.")


def step(what: str) -> None:
    """A headline."""
    print(f"\n== {what}", flush=True)


def command(arguments: Sequence[str]) -> list[str]:
    """An llmchain-fed command of this interpreter; printed as an operator would type it."""
    print("  $ llmchain-fed " + " ".join(arguments), flush=True)
    return [sys.executable, "-m", "llmchain_fed.cli", *arguments]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in the background."""
    with log.open("ab") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command(arguments), stdout=output, stderr=output, env=environment)


def start_peer(name: str, out: Path, path: Path) -> subprocess.Popen[bytes]:
    """A site's peer."""
    folder = out / name
    arguments = ["peer", "--name", name, "--chain", str(out / "agreed_chain"), "--socket", str(path)]
    arguments += ["--data", str(folder / "train.jsonl"), "--held-out", str(folder / "held_out.jsonl")]
    arguments += ["--policy", str(HERE / "policy.yaml"), "--audit", str(folder / "audit.jsonl"), "--threads", "1"]
    return start(arguments, folder / "peer.log")


def wait_for_peer(name: str, path: Path, process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the peer has loaded its model."""
    while process.poll() is None:
        try:
            frames.ask(path, frames.pack({"do": "ping"}))
            break
        except TransportError:
            time.sleep(0.2)
    else:
        sys.exit((out / name / "peer.log").read_text(encoding="utf-8"))
    print("  " + (out / name / "peer.log").read_text(encoding="utf-8").splitlines()[-5])


def wait_for_hub(kit: Path) -> None:
    """Until the hub's port answers, for a minute at most."""
    until = time.monotonic() + 60
    while True:
        with suppress(OSError), socket.create_connection(kits.address(kit), timeout=1):
            return
        if time.monotonic() > until:
            sys.exit("no hub answers: see nvflare.log in its kit")
        time.sleep(0.2)


def write_federation_file(path: Path, admin: Path, rounds: int, learning_rate: float) -> None:
    """What the hub reads."""
    lines = [
        "chain: agreed_chain",
        f"hub: {{admin: {admin.absolute()}, sites: [{', '.join(SITES)}]}}",
        "out: result",
        f"rounds: {rounds}",
        f"training: {{learning_rate: {learning_rate}, batch_size: 8}}",
        "quorum: 2",
        "retries: 1",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_examples(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """(source, target) pairs as the chain's examples, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": source, "completion": target}, ensure_ascii=False) for source, target in pairs)
    path.write_text("\n".join(lines), encoding="utf-8")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
