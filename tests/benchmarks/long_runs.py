"""What exact aggregation, checkpoints and resident adapters cost on the real model: shares of a round, and memory.

    python tests/benchmarks/long_runs.py              # some five minutes on a quiet machine

A round here is 16 participants × 6 optimizer steps of 8 examples (48 examples each), SmolLM2-135M, LoRA r=16 on all
linear layers, in one process; its training time is that of one participant, measured, times 16. Updates are what such a
participant trains, each from its own seed. Memory is the peak of a process of its own, from before the first update is
added to the end of `combine`, without the model and what the libraries take at their first call. Its bound: the
participants' factors, the new global ones, and one layer's matrix.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, TrainingConfig, train_locally
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.updates.aggregation import make_aggregation
from llmchain_fed.updates.aggregation.gap import AggregationGap
from llmchain_fed.updates.collection import Contribution, Round
from llmchain_fed.updates.lora_layout import LoraLayout

PAIRS = [(f"Save the page number {i}", f"Enregistrer la page numéro {i}") for i in range(48)]


def peak_of(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes of resident memory at most beyond the present."""
    process, stop, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    del kept
    return seconds, peak[0]


def updates_of(chain: LLMChain, count: int, config: TrainingConfig) -> tuple[list[Contribution], float]:
    """What participants would send, and the median seconds one takes; a few are trained, the others vary them."""
    start, seconds, trained = chain.model.trainable_state(), [], []
    for seed in range(3):
        result = train_locally(chain.model, PAIRS, config.replace(seed=seed), prompt=chain)
        seconds.append(result.seconds)
        trained.append(chain.model.trainable_state())
        chain.model.load_state(start)
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(count):
        base = trained[k % 3]
        spread = {n: (base[n] - start[n]).std() * 0.5 for n in start}
        tensors = {n: base[n] + spread[n] * torch.randn(base[n].shape, generator=generator) for n in start}
        found.append(Contribution(tensors, 48.0, 6))
    return found, statistics.median(seconds)


def combine(rule: str, folder: Path, count: int) -> None:
    """One rule over the updates in a folder, read one by one as they would arrive; prints seconds and peak memory."""
    layout = LoraLayout(json.loads((folder / "scaling.json").read_text()), 16, 32.0)
    state = load_file(folder / "start")
    seconds = [0.0]
    many = torch.randn(256, 1536)  # training has called the libraries long before
    torch.linalg.svd(torch.linalg.qr(many.T)[1] @ many @ many.T)

    def work() -> object:
        collector = make_aggregation(rule).begin(Round(state, layout, expected=count))
        for k in range(count):
            collector.add(Contribution(load_file(folder / str(k)), 48.0, 6))
        began = time.perf_counter()
        outcome = collector.finish()
        seconds[0] = time.perf_counter() - began
        return outcome

    _, peak = peak_of(work)
    print(json.dumps({"seconds": seconds[0], "bytes": peak}))


def main() -> None:
    """Prints one JSON object and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--participants", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--combine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.combine:
        combine(args.combine, args.folder, args.participants)
        return
    transformers_logging.disable_progress_bar()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    llm = LocalLLM.from_pretrained("smollm2-135m-instruct", lora=lora)
    chain = LLMChain(llm=llm, prompt="Translate the following text to French: {text}\n")
    model, config = chain.model, TrainingConfig(learning_rate=1e-3, batch_size=8, precision=args.precision)
    given, each = updates_of(chain, args.participants, config)
    round_seconds = each * args.participants
    layout = LoraLayout.of(model)
    assert layout is not None
    state = model.trainable_state()
    adapter = sum(t.numel() * 4 for t in state.values())
    pairs = [layout.factors(state, name) for name in layout.layers]
    layer = max(4 * pair.b.shape[0] * pair.a.shape[1] for pair in pairs)
    found: dict[str, object] = {"round seconds": round(round_seconds, 1), "adapter MB": round(adapter / 1e6, 1)}
    rows = [f"| a round: {args.participants} participants × {each:.1f} s of training | {round_seconds:.0f} s | | |"]
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, f"{folder}/start")
        for k, item in enumerate(given):
            save_file(dict(item.tensors), f"{folder}/{k}")
        Path(folder, "scaling.json").write_text(json.dumps(dict(layout.scaling)))
        for name in ("fedit", "fedex", "flora", "flexlora"):
            command = [sys.executable, __file__, "--combine", name, "--folder", folder]
            command += ["--participants", str(args.participants)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cost = json.loads(done.stdout)
            found[name] = cost | {"share": cost["seconds"] / round_seconds}
            bound = ((args.participants + 1) * adapter + layer) / 1e6
            share = f"{cost['seconds'] / round_seconds:.2%}"
            rows.append(
                f"| {name} | {cost['seconds']:.2f} s | {share} | {cost['bytes'] / 1e6:.0f} MB; bound {bound:.0f} |"
            )
    gap = AggregationGap(layout)
    for item in given:
        gap.add(item)
    seconds, _ = peak_of(gap.value)
    found["gap"] = {"seconds": seconds, "share": seconds / round_seconds, "value": gap.value()}
    rows.append(f"| aggregation gap | {seconds:.2f} s | {seconds / round_seconds:.2%} | |")
    del given, gap

    with tempfile.TemporaryDirectory() as folder:
        shares = {f"p{k}": PAIRS[3 * k : 3 * k + 3] for k in range(args.participants)}
        fed = FederatedAveraging(
            chain, participants=shares, training=config, codec="int8", checkpoint_dir=Path(folder) / "c", progress=False
        )
        fed.fit(1)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            fed._checkpoints.save()
            times.append(time.perf_counter() - began)
        options = {"participants": shares, "training": config, "progress": False}
        plain = FederatedAveraging(chain, checkpoint_dir=Path(folder) / "d", **options)
        plain._server.join()
        lean = []
        for _ in range(5):
            began = time.perf_counter()
            plain._checkpoints.save()
            lean.append(time.perf_counter() - began)
    for what, values in (("checkpoint", lean), ("checkpoint with 16 residuals of int8", times)):
        seconds = statistics.median(values)
        found[what] = {"seconds": seconds, "share": seconds / round_seconds}
        rows.append(f"| {what} | {seconds:.2f} s | {seconds / round_seconds:.2%} | |")

    before = psutil.Process().memory_info().rss
    for k in range(10):
        model.add_adapter(f"resident {k}", {n: t + 0.001 * k for n, t in state.items()})
    grown = psutil.Process().memory_info().rss - before
    views, times = [model.with_adapter(f"resident {k}") for k in range(10)], []
    for k in range(100):
        began = time.perf_counter()
        with views[k % 10]._lock, views[k % 10]._activated():
            times.append(time.perf_counter() - began)
    milliseconds = 1000 * statistics.median(times)
    found["adapters"] = {"switch ms": milliseconds, "bytes": grown, "of": 10 * adapter}
    rows.append(f"| switching among ten resident adapters | {milliseconds:.2f} ms | | {grown / 1e6:.0f} MB |")
    GlobalState(state).load(model)
    print(json.dumps(found, indent=1))
    print("\n| what | time | of a round | memory |\n|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
