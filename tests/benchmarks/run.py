"""Runs every measure, each side alone in a process of its own and in turn, and writes the table of ratios.

    .venv/bin/python tests/benchmarks/run.py [--only NAME ...] [--quick]

Absolute figures belong to the machine and the hour; the ratios, taken within one run, are what counts. A
ratio is the median over the repetitions, each of which runs all its sides. Writes out/bench.md and
out/bench.json after every measure. Knows the standard library alone, so that it weighs nothing beside what it
measures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "out"
Result = dict[str, Any]


@dataclass
class Row:
    """One line of the table; `target` bounds `ratio` from below ("≥") or above ("≤"); None: reported only."""

    measure: str
    ours: str
    peer: str
    ratio: float
    bound: str = "≥"
    target: float | None = None
    note: str = ""
    samples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> str:
        if self.target is None:
            return "–"
        return "yes" if (self.ratio >= self.target if self.bound == "≥" else self.ratio <= self.target) else "**no**"


@dataclass(frozen=True)
class Size:
    """How much work is done."""

    repetitions: int
    pairs: int  # per publisher, of four; a multiple of 4 makes whole batches
    held_out: int  # per publisher
    texts: int
    new_tokens: int
    times: int  # alternations within one process
    updates: int
    many: int  # participants


FULL = Size(repetitions=3, pairs=80, held_out=24, texts=32, new_tokens=24, times=3, updates=100, many=1000)
QUICK = Size(repetitions=1, pairs=8, held_out=4, texts=4, new_tokens=4, times=1, updates=8, many=20)


@dataclass(frozen=True)
class Bench:
    """Starts the sides, one at a time."""

    size: Size
    peers: str
    threads: int

    @property
    def work(self) -> str:
        return str(OUT / "bench-work.json")

    def ours(self, script: str, *arguments: object) -> Result:
        return self._run(sys.executable, script, arguments)

    def peer(self, script: str, *arguments: object) -> Result:
        if not Path(self.peers).exists():
            raise FileNotFoundError(f"no peers' environment at {self.peers}: run `make bench`, or pass --peers")
        return self._run(self.peers, script, arguments)

    def _run(self, python: str, script: str, arguments: Sequence[object]) -> Result:
        command = [python, str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment(), cwd=ROOT, check=False)
        answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not answers:
            raise RuntimeError(f"{script} {arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        print(f"    {script} {' '.join(map(str, arguments))}: {answers[-1][7:150]}", flush=True)
        result: Result = json.loads(answers[-1].removeprefix("RESULT "))
        return result

    def environment(self) -> dict[str, str]:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return os.environ | threads | offline | {"TOKENIZERS_PARALLELISM": "false"}


def training(bench: Bench) -> list[Row]:
    """Rows 1 to 3, out of the same runs; each repetition has its own order of the data."""
    runs: dict[str, list[Result]] = {name: [] for name in ("ours", "trl", "bare", "grouped", "bf16")}
    for seed in range(bench.size.repetitions):
        runs["ours"].append(bench.ours("ours.py", "train", bench.work, seed, "fp32"))
        runs["trl"].append(bench.peer("peer_trl.py", bench.work, seed, "random"))
        runs["bare"].append(bench.ours("bare.py", bench.work, seed))
        runs["grouped"].append(bench.peer("peer_trl.py", bench.work, seed, "group_by_length"))
        runs["bf16"].append(bench.ours("ours.py", "train", bench.work, seed, "bf16"))
    speeds = {name: [r["examples_per_s"] for r in results] for name, results in runs.items()}
    losses = {name: median(r["held_out_loss"] for r in results) for name, results in runs.items()}
    samples = {
        "examples_per_s": speeds,
        "held_out_loss": {n: [r["held_out_loss"] for r in rs] for n, rs in runs.items()},
    }
    if len({r["tokens"] for results in runs.values() for r in results}) > 1:
        raise RuntimeError(f"the sides trained on different numbers of tokens: {runs}")

    def row(measure: str, ours: str, peer: str, target: float | None) -> Row:
        apart = losses[ours] / losses[peer] - 1
        shown = [f"{median(speeds[name]):.2f} examples/s" for name in (ours, peer)]
        note = f"held-out loss {losses[ours]:.3f} / {losses[peer]:.3f} ({apart:+.1%})"
        return Row(measure, *shown, _ratio(speeds[ours], speeds[peer]), target=target, note=note, samples=samples)

    bf16 = row("training bf16 / TRL fp32", "bf16", "trl", 2.7 if _has_bf16() else None)
    if abs(losses["bf16"] / losses["trl"] - 1) > 0.02:
        bf16.note += ": NOT within ±2 %, the ratio does not count"
    elif not _has_bf16():
        bf16.note += "; this CPU lacks avx512_bf16"
    return [
        row("training fp32 / TRL SFTTrainer, its own (random) order", "ours", "trl", 2.0),
        row("training fp32 / TRL SFTTrainer, `group_by_length`", "ours", "grouped", None),
        row("training fp32 / bare loop", "ours", "bare", 0.95),
        bf16,
        row("training bf16 / TRL fp32, `group_by_length`", "bf16", "grouped", None),
    ]


def batch(bench: Bench) -> list[Row]:
    """Row 4. Our process also runs the one `generate`; the peer is measured in both of its forms."""
    size = bench.size
    runs: dict[str, list[Result]] = {name: [] for name in ("fp32", "bf16", "as_pipeline", "from_model_id")}
    for _ in range(size.repetitions):
        runs["fp32"].append(bench.ours("ours.py", "batch", bench.work, "fp32", size.times))
        runs["as_pipeline"].append(bench.peer("peer_pipeline.py", bench.work, "as_pipeline"))
        runs["bf16"].append(bench.ours("ours.py", "batch", bench.work, "bf16", size.times))
        runs["from_model_id"].append(bench.peer("peer_pipeline.py", bench.work, "from_model_id"))
    seconds = {
        f"{dtype} {side}": [median(r[side]) for r in runs[dtype]]
        for dtype in ("fp32", "bf16")
        for side in ("ours", "peer")
    }
    seconds |= {how: [r["seconds"] for r in runs[how]] for how in ("as_pipeline", "from_model_id")}
    answers = runs["fp32"][0]["answers"]
    alike = {
        how: sum(a.strip() == b.strip() for a, b in zip(answers, runs[how][0]["answers"], strict=True))
        for how in ("as_pipeline", "from_model_id")
    }

    def row(measure: str, ours: str, peer: str, target: float | None, note: str = "") -> Row:
        shown = [f"{size.texts / median(seconds[name]):.2f} prompts/s" for name in (ours, peer)]
        return Row(measure, *shown, _ratio(seconds[peer], seconds[ours]), target=target, note=note, samples=seconds)

    what = f"`chain.batch` of {size.texts}"
    same = f"{{}} of {size.texts} answers equal".format
    equal = "answers equal" if all(r["same_as_generate"] for r in runs["fp32"]) else "answers differ"
    return [
        row(
            f"{what} fp32 / `HuggingFacePipeline(pipeline=…, batch_size={size.texts})`",
            "fp32 ours",
            "as_pipeline",
            9.0,
            same(alike["as_pipeline"]),
        ),
        row(
            f"{what} fp32 / `HuggingFacePipeline.from_model_id(batch_size={size.texts})`",
            "fp32 ours",
            "from_model_id",
            None,
            same(alike["from_model_id"]),
        ),
        row(f"{what} fp32 / one left-padded `generate`", "fp32 ours", "fp32 peer", 0.95, equal),
        row(f"{what} bf16 / `HuggingFacePipeline(pipeline=…)` fp32", "bf16 ours", "as_pipeline", None),
        row(f"{what} bf16 / one left-padded `generate` bf16", "bf16 ours", "bf16 peer", None),
    ]


def chat_batch(bench: Bench) -> list[Row]:
    """A batch of conversations against a batch of the same texts on the string face, in one process."""
    runs = [bench.ours("ours.py", "chat_batch", bench.work, bench.size.times) for _ in range(bench.size.repetitions)]
    seconds = {side: [s for r in runs for s in r[side]] for side in ("ours", "peer")}
    shown = [f"{bench.size.texts / median(seconds[side]):.2f} prompts/s" for side in ("ours", "peer")]
    note = "answers equal" if all(r["same_as_llm"] for r in runs) else "answers differ"
    measure = f"`LocalChatModel.batch` of {bench.size.texts} / `LocalLLM.batch` of the same texts"
    return [Row(measure, *shown, _ratio(seconds["peer"], seconds["ours"]), target=0.9, note=note, samples=seconds)]


def invoke(bench: Bench) -> list[Row]:
    """Row 5, with the adapter beside the weights and merged into them."""
    rows, times = [], 3 * bench.size.times
    for how, words in (("lora", "LoRA beside the weights"), ("merged", "LoRA merged")):
        runs = [bench.ours("ours.py", "invoke", bench.work, how, times) for _ in range(bench.size.repetitions)]
        seconds = {side: [s for r in runs for s in r[side]] for side in ("ours", "peer")}
        shown = [f"{median(seconds[side]):.3f} s" for side in ("ours", "peer")]
        note = "answers equal" if all(r["same_as_generate"] for r in runs) else "answers differ"
        ratio = _ratio(seconds["ours"], seconds["peer"])
        rows.append(Row(f"`chain.invoke` / `module.generate`, {words}", *shown, ratio, "≤", 1.1, note, seconds))
    return rows


def aggregation(bench: Bench) -> list[Row]:
    """Row 6: in memory, and from bytes with all checks."""
    runs = [bench.ours("ours.py", "aggregate", bench.size.updates) for _ in range(bench.size.repetitions)]
    speeds = {side: [median(r[side]) for r in runs] for side in ("ours", "from_bytes", "copy")}
    what = f"FedAvg of {bench.size.updates} LoRA updates of {runs[0]['values'] / 1e6:.1f} M values"

    def row(measure: str, side: str, target: float | None) -> Row:
        shown = [f"{median(speeds[name]):.2f} GB/s" for name in (side, "copy")]
        return Row(measure, *shown, _ratio(speeds[side], speeds["copy"]), target=target, samples=speeds)

    return [
        row(f"{what} / `copy_`", "ours", 0.5),
        row("the same from bytes, every update checked / `copy_`", "from_bytes", None),
    ]


def one_round(bench: Bench) -> list[Row]:
    """Row 7, strictly: by the clock around the first `fit`, with what is done once (reading the examples)."""
    runs = [bench.ours("ours.py", "one_round", bench.work) for _ in range(bench.size.repetitions)]
    outside = [r["total"] - r["training"] - r["evaluation"] for r in runs]
    totals = [r["total"] for r in runs]
    shown = [f"{median(outside):.2f} s outside", f"{median(totals):.1f} s in all"]
    measure = "one round of 4 participants: outside training and evaluation / all of it"
    before = median(r["total"] - r["round"] for r in runs)
    note = f"{before:.2f} s of it before the round, once a federation"
    return [Row(measure, *shown, _ratio(outside, totals), "≤", 0.02, note, samples={"runs": runs})]


def memory(bench: Bench) -> list[Row]:
    """Row 8."""
    peaks: dict[int, list[float]] = {bench.size.many: [], 10: []}
    for _ in range(bench.size.repetitions):
        for count, found in peaks.items():
            found.append(bench.ours("many_participants.py", count)["peak_bytes"] / 1e6)
    many, few = peaks.values()
    shown = [f"{median(many):.0f} MB", f"{median(few):.0f} MB"]
    measure = f"resident memory: {bench.size.many:,} participants / 10"
    return [Row(measure, *shown, _ratio(many, few), "≤", 1.05, samples={str(k): v for k, v in peaks.items()})]


def imports(bench: Bench) -> list[Row]:
    """Row 9: the whole process `python -c "import llmchain_fed"`, the interpreter's own start included."""
    banned = ("torch", "transformers", "langchain_core")
    code = f"import sys, llmchain_fed; print([m for m in {banned} if m in sys.modules])"

    def start(code: str) -> tuple[float, str]:
        started = time.perf_counter()
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=bench.environment())
        return time.perf_counter() - started, done.stdout.strip()

    start(code)  # compiles
    took = [start(code) for _ in range(5)]
    bare = min(start("pass")[0] for _ in range(5))
    best = min(seconds for seconds, _ in took)
    shown = [f"{best:.3f} s", f"{bare:.3f} s without"]
    loaded = took[0][1]
    row = Row("`import llmchain_fed`, seconds", *shown, best, "≤", 0.2, f"loads of {', '.join(banned)}: {loaded}")
    if loaded != "[]":
        row.ratio = float("inf")
    return [row]


MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    f.__name__: f for f in (training, batch, chat_batch, invoke, aggregation, one_round, memory, imports)
}


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))


def _has_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512_bf16" in cpu.read_text()


def table(rows: Sequence[Row]) -> str:
    lines = ["| measure | ours | peer | ratio | target | met | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        target = f"{row.bound} {row.target:g}" if row.target is not None else "–"
        cells = (row.measure, row.ours, row.peer, f"{row.ratio:.3g}", target, row.met, row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Ratios of this package's speed and memory to its peers'.")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=MEASURES,
        default=list(MEASURES),
        metavar="NAME",
        help=f"of {', '.join(MEASURES)}",
    )
    parser.add_argument("--quick", action="store_true", help="so little work that only failures mean anything")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-bench" / "bin" / "python"),
        help="python of the peers' environment",
    )
    parser.add_argument("--repetitions", type=int, default=FULL.repetitions, help="of every comparison of processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for every side alike")
    arguments = parser.parse_args()

    size = QUICK if arguments.quick else replace(FULL, repetitions=arguments.repetitions)
    bench = Bench(size, arguments.peers, arguments.threads)
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not quiet (load {load:.2f}): the ratios will be worth less", flush=True)
    if set(arguments.only) - {"aggregation", "memory", "imports"}:
        bench.ours("ours.py", "prepare", bench.work, size.pairs, size.held_out, size.texts, size.new_tokens)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in arguments.only:
        print(name, flush=True)
        try:
            rows += MEASURES[name](bench)
        except Exception as error:  # the others are still worth having
            failed[name] = str(error)
            print(f"    failed: {error}", flush=True)
        about = {
            "quick": arguments.quick,
            "threads": arguments.threads,
            "load_before": load,
            "size": asdict(size),
        }
        result = {**about, "rows": [asdict(row) | {"met": row.met} for row in rows], "failed": failed}
        (OUT / "bench.json").write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
        (OUT / "bench.md").write_text(table(rows), encoding="utf-8")
    print("\n" + table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
