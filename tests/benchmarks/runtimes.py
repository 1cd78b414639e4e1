"""What a round costs outside training in each runtime: seconds, memory, and bytes on the wire against the ledger.

    python tests/benchmarks/runtimes.py                       # 5 and 50 MB: some six minutes
    python tests/benchmarks/runtimes.py --sizes 540           # full weights of the size of SmolLM2-135M

Two participants, one optimizer step each on two examples, updates of full weights; real processes, TLS on loopback.
`outside` is a round's seconds less the longest training that ran at the same time: broadcast, return, checks,
aggregation and loading. Medians over the rounds but the first. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
from federation_processes import SITES, Federation
from tiny import PAIRS, TEMPLATE, train_tokenizer
from torchrun_script import SHARES
from transformers import LlamaConfig, LlamaForCausalLM

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, TrainingConfig
from llmchain_fed.runtimes.nvflare import kits

# three a step: with two, what is left of 3 or 5 examples would be an update of one, which a site refuses
TRAINING = TrainingConfig(optimizer="sgd", learning_rate=1e-3, batch_size=3, max_steps=1)
SHARES_USED = {name: SHARES[name] for name in SITES}
LAYERS = {5: (176, 3), 50: (512, 4), 540: (1024, 11)}  # MB → hidden size, layers


def sized_chain(megabytes: int) -> LLMChain:
    """A random Llama of about so many MB in float32, all of them trained."""
    hidden, layers = LAYERS[megabytes]
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LLMChain(llm=LocalLLM(model=LocalModel(LlamaForCausalLM(config).eval(), tokenizer)), prompt=TEMPLATE)


def outside(record, *, parallel: bool) -> float:
    """Seconds of a round in which nobody trained and nothing was evaluated."""
    seconds = [p.seconds for p in record.participants.values()]
    return record.seconds - record.evaluation_seconds - (max(seconds) if parallel else sum(seconds))


def median_outside(history, *, parallel: bool = True) -> float:
    return statistics.median(outside(record, parallel=parallel) for record in list(history)[1:])


def federate(chain: LLMChain, rounds: int, **options):
    fed = FederatedAveraging(chain, training=TRAINING, progress=False, **options)
    fed.fit(rounds)
    return fed


# --- the three runtimes ----------------------------------------------------------------------------------------------


def in_process(megabytes: int, rounds: int) -> dict:
    fed = federate(sized_chain(megabytes), rounds, participants=SHARES_USED)
    return {"outside": median_outside(fed.history, parallel=False), "update": fed.history[-1].bytes_up // 2}


def torch_ranks(megabytes: int, rounds: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--rank", "--sizes", str(megabytes), "--rounds", str(rounds)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def one_rank(megabytes: int, rounds: int) -> None:
    from llmchain_fed import TorchDistributed

    runtime = TorchDistributed()
    mine = SITES[runtime.rank]
    fed = federate(sized_chain(megabytes), rounds, participants={mine: SHARES[mine]}, runtime=runtime)
    if runtime.leads:
        print(json.dumps({"outside": median_outside(fed.history), "rss": psutil.Process().memory_info().rss}))
    runtime.close()


def nvflare(megabytes: int, rounds: int, long: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="lf-") as folder:
        chain = sized_chain(megabytes)
        federation = Federation(Path(folder), chain=chain)
        try:
            federation.start()
            with federation.runtime(patience=60.0) as runtime:
                federate(chain, 1, runtime=runtime)  # the job comes up
                before = wire_bytes(federation)
                fed = federate(chain, rounds, runtime=runtime)
                wire = wire_bytes(federation) - before
                ledger = sum(
                    p.bytes_up + p.bytes_down + p.evaluation_bytes for r in fed.history for p in r.participants.values()
                )
                found = {
                    "outside": median_outside(fed.history),
                    "wire / ledger": wire / ledger,
                    "peaks": peaks(federation),
                }
                if long:
                    found["flat"] = flat(federation, runtime, long)
                return found
        finally:
            federation.stop()


# --- what they cost --------------------------------------------------------------------------------------------------


def wire_bytes(federation: Federation) -> int:
    """TCP payload that the sites' processes have sent to and received from the hub's port, TLS included."""
    port = kits.address(federation.kits["admin"])[1]
    pids = {p.pid for name in SITES for p in tree(federation.engines[name].pid)}
    listed = subprocess.run(["ss", "-tinpH", f"dport = :{port}"], capture_output=True, text=True, check=True).stdout
    total = 0
    for entry in re.split(r"\n(?=\S)", listed):
        owner = re.search(r"pid=(\d+)", entry)
        if owner and int(owner[1]) in pids:
            total += sum(int(n) for n in re.findall(r"bytes_(?:acked|received):(\d+)", entry))
    return total


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def memory(process: psutil.Process, field: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most so far."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def processes(federation: Federation) -> dict[str, list[psutil.Process]]:
    return {
        "hub's driver": [psutil.Process()],
        "hub's engine": tree(federation.engines["hub"].pid),
        "a site's engine": tree(federation.engines["a"].pid),
        "a site's peer": tree(federation.peers["a"].pid),
    }


def peaks(federation: Federation) -> dict[str, int]:
    return {name: sum(memory(p, "VmHWM") for p in found) for name, found in processes(federation).items()}


def flat(federation: Federation, runtime, rounds: int) -> dict[str, float]:
    """Resident memory after all rounds over that after half of them: allocators need some 150 rounds to settle."""
    chain = sized_chain(5)
    fed = FederatedAveraging(chain, runtime=runtime, training=TRAINING, progress=False)
    fed.fit(rounds // 2)
    early = {name: sum(memory(p, "VmRSS") for p in found) for name, found in processes(federation).items()}
    fed.fit(rounds - rounds // 2)
    late = {name: sum(memory(p, "VmRSS") for p in found) for name, found in processes(federation).items()}
    return {name: late[name] / early[name] for name in early}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 50], choices=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--long", type=int, default=300, help="rounds of 5 MB over which memory is watched; 0: none")
    parser.add_argument("--runtimes", nargs="+", default=["in_process", "torch", "nvflare"])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank:
        one_rank(args.sizes[0], args.rounds)
        return
    assert len(PAIRS) >= 2
    for megabytes in args.sizes:
        for name in args.runtimes:
            started = time.perf_counter()
            if name == "in_process":
                found = in_process(megabytes, args.rounds)
            elif name == "torch":
                found = torch_ranks(megabytes, args.rounds)
            else:
                found = nvflare(megabytes, args.rounds, args.long if megabytes == 5 else 0)
            shown = {k: v for k, v in found.items() if not isinstance(v, dict)}
            print(f"{megabytes} MB, {name}: {json.dumps(shown)} ({time.perf_counter() - started:.0f} s)", flush=True)
            for title in ("peaks", "flat"):
                for part, value in found.get(title, {}).items():
                    text = f"{value / 1e6:,.0f} MB at most" if title == "peaks" else f"× {value:.3f} over the long run"
                    print(f"    {part}: {text}", flush=True)


if __name__ == "__main__":
    main()
