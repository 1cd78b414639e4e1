"""What the checks of an update cost: honest ones now against an earlier commit, and the dearest refusals against both.

    python tests/benchmarks/doors.py                  # some two quiet minutes
    python tests/benchmarks/doors.py --repeats 3      # a look
    python tests/benchmarks/doors.py --before 80e81e8

An update of a LoRA (r=16, all linear layers) over SmolLM2-135M: 420 tensors, 19.5 MB in float32, 5 MB as int8. Both
versions decode the same bytes, in processes of their own, taking turns; each process says its median, and the ratio is
the median over the turns. A refusal's memory is the peak of resident pages beyond what there was before it.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "80e81e8"
CODECS = [None, "int8"]
TARGET_NOW, TARGET_REFUSAL = 1.05, 2.0
LINEAR = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def trained() -> dict[str, Tensor]:
    """Factors of SmolLM2's 30 layers, in the order in which a participant sends them."""
    generator, found = torch.Generator().manual_seed(0), {}
    for layer in range(30):
        for name, (m, n) in LINEAR.items():
            whole = f"model.layers.{layer}.{name}"
            found[f"{whole}.lora_A.weight"] = torch.randn(16, n, generator=generator)
            found[f"{whole}.lora_B.weight"] = torch.randn(m, 16, generator=generator)
    return found


def decoder(codec: str | None) -> tuple[bytes, Callable[[bytes], Any]]:
    """An honest update and what decodes it, by whatever llmchain_fed is imported."""
    from llmchain_fed.updates import serialization
    from llmchain_fed.updates.codecs import make_codec
    from llmchain_fed.updates.update import Expected, Update

    state, made = trained(), make_codec(codec)
    start, layout = {n: torch.zeros_like(t) for n, t in state.items()}, serialization.describe(state)
    metrics = {"train_loss": 2.5, "steps": 4, "seconds": 1.0}
    parts, name = (state, None) if made is None else (made.encode(state), made.name)
    data = Update("p", 3, "b" * 64, parts, 96, 960, metrics, name).to_bytes()
    return data, lambda sent: Update.from_bytes(sent, Expected("p", 3, "b" * 64, layout, 96, 960, made, start))


def median(work: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    work()
    found = []
    for _ in range(repeats):
        gc.collect()
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def peak(work: Callable[[], Any]) -> int:
    """bytes of resident memory beyond what there is before; in a fork, where the peak begins anew."""
    gc.collect()
    receiving, sending = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        os.write(sending, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    found = int(os.read(receiving, 20))
    os.close(receiving)
    os.close(sending)
    return 1024 * found


def refused(decode: Callable[[bytes], Any], data: bytes) -> str:
    """Why it is; an update that is not refused would not belong here."""
    try:
        decode(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    msg = "this was to be refused"
    raise SystemExit(msg)


def dearest(data: bytes, codec: str | None) -> dict[str, bytes]:
    """Name → an update that costs as much as its sender can make it, found by trying many."""
    size = struct.unpack("<Q", data[:8])[0]
    layout, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    own = layout["__metadata__"]["llmchain_fed"]

    def raw(text: bytes, values: bytes = body) -> bytes:
        return struct.pack("<Q", len(text)) + text + values

    def filled(piece: str, opening: str = "[", closing: str = "0]") -> bytes:
        """JSON of one kind that is as long as an honest header."""
        return (opening + piece * ((size - len(opening) - len(closing)) // len(piece)) + closing).encode()

    names = [n for n in layout if n != "__metadata__"]
    tensors = {n: layout[n] for n in names}
    last = max(tensors, key=lambda n: tensors[n]["data_offsets"][1])
    wrong = dict(layout) | {last: layout[last] | {"shape": [*layout[last]["shape"], 1]}}
    spoilt = bytearray(body)
    spoilt[-4:] = struct.pack("<f", float("nan"))
    entry = {"dtype": "F32", "shape": [1] * 8, "data_offsets": [0, 4]}
    many = {f"t{i}": entry for i in range(size // len(json.dumps(entry)))}
    texts = {
        "empty lists": filled("[],"),
        "empty objects": filled("{},"),
        "ones": filled("1,"),
        "long integers": filled("9" * 4000 + ","),
        "small objects": filled('{"a":0},'),
        "another shape in the last tensor": json.dumps(wrong, separators=(",", ":")).encode(),
        "many tensors of eight dimensions": json.dumps(many, separators=(",", ":")).encode(),
        "our header full of lists": json.dumps(
            {"__metadata__": {"llmchain_fed": "[" + "[]," * ((size - 60) // 3) + "0]"}}, separators=(",", ":")
        ).encode(),
    }
    found = {name: raw(text) for name, text in texts.items() if len(text) <= size + 64}
    found["NaN in the last value"] = raw(data[8 : 8 + size], bytes(spoilt))
    found["another round"] = data.replace(
        own.replace('"', '\\"').encode(), own.replace(" 3,", " 4,").replace('"', '\\"').encode()
    )
    found["cut off by a byte"] = data[:-1]
    found["twice as long"] = data + body
    if codec == "int8":  # the scales lie in front: they are wider
        found["a code beyond its range in the last value"] = data[:-1] + b"\x80"
        del found["NaN in the last value"]
    return found


def measure(repeats: int, *, refusals: bool) -> None:
    """The child's part: prints one line of JSON."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for codec in CODECS:
        data, decode = decoder(codec)
        kind = codec or "float32"
        found[kind] = {"seconds": median(lambda d=data, f=decode: f(d), repeats)}
        if refusals:
            found[kind]["bytes"] = peak(lambda d=data, f=decode: f(d))
            found[kind]["refusals"] = {
                name: {
                    "why": refused(decode, bad)[:100],
                    "seconds": median(lambda b=bad, f=decode: refused(f, b), max(3, repeats // 4)),
                    "bytes": peak(lambda b=bad, f=decode: refused(f, b)),
                }
                for name, bad in dearest(data, codec).items()
            }
    print("RESULT " + json.dumps(found))


def child(package: Path, repeats: int, *, refusals: bool = False) -> dict[str, Any]:
    """What a process says that imports llmchain_fed from there."""
    command = [sys.executable, __file__, "--measure", "--repeats", str(repeats)] + ["--refusals"] * refusals
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="a commit to compare with")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--refusals", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.repeats, refusals=options.refusals)
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.before, "llmchain_fed"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        turns = [(child(Path(folder), options.repeats), child(ROOT, options.repeats)) for _ in range(options.turns)]
    print(f"honest updates: decoding now over decoding at {options.before} (target ≤ {TARGET_NOW})")
    for kind in turns[0][0]:
        ratios = [now[kind]["seconds"] / before[kind]["seconds"] for before, now in turns]
        milliseconds = [1000 * statistics.median(turn[side][kind]["seconds"] for turn in turns) for side in (0, 1)]
        shown = f"{milliseconds[0]:.2f} → {milliseconds[1]:.2f} ms"
        print(f"  {kind:8} {statistics.median(ratios):.3f}  ({min(ratios):.3f}–{max(ratios):.3f}, {shown})")
    print(f"refusals over an honest decode (target ≤ {TARGET_REFUSAL:g} in time and in peak memory)")
    for kind, found in child(ROOT, options.repeats, refusals=True).items():
        rows = [
            (r["seconds"] / found["seconds"], r["bytes"] / max(found["bytes"], 1), name, r["why"])
            for name, r in found["refusals"].items()
        ]
        for slower, larger, name, why in sorted(rows, reverse=True):
            print(f"  {kind:8} {slower:5.2f} × time {larger:5.2f} × memory  {name} ({why:.60})")


if __name__ == "__main__":
    main()
