"""What reading many examples takes: seconds, memory beside the token ids, and a second start out of the cache.

python tests/benchmarks/reading.py [ROWS] [csv|jsonl|json|parquet|csv.gz] [SHARE]

A child process each, so that nothing is warm but the disk: SmolLM2's tokenizer, a chain with one variable, a file of
made-up sentences. Memory is the peak of what is resident (Linux) above what it was before, after a first reading of
1,000 other rows. With SHARE, such as 0.2, the file is divided first, and both sides are read.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEMPLATE = "Translate the following text to French: {text}\n"


def write(path: Path, rows: int) -> None:
    """Sentences of 6 to 14 words out of a vocabulary of 5,000, and the same words in another order."""
    import pandas as pd

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [rng.choices(words, k=rng.randint(6, 14)) for _ in range(rows)]
    english, french = ([" ".join(text[::step]) for text in texts] for step in (1, -1))
    frame = pd.DataFrame({"id": range(rows), "english": english, "french": french})
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind.startswith("json"):
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    else:
        frame.to_csv(path, index=False)


def resident(name: str) -> int:
    """bytes: VmRSS is now, VmHWM the peak since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measure(path: str, share: float | None) -> None:
    """In a child: reads a file once, and prints what it took."""
    import pandas as pd
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llmchain_fed import LLMChain, LocalLLM, LocalModel, Split
    from llmchain_fed.data import encode_examples
    from llmchain_fed.data.sides import divide
    from llmchain_fed.data.sources.columns import Mapped
    from llmchain_fed.model.loading import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    chain = LLMChain(llm=LocalLLM(model=LocalModel(LlamaForCausalLM(config), tokenizer)), prompt=TEMPLATE)
    columns = {"text": "english", "completion": "french"}
    few = pd.DataFrame({"english": [f"row {at}" for at in range(1000)], "french": ["x"] * 1000})
    encode_examples(few, chain.model, chain, columns=columns)
    Path("/proc/self/clear_refs").write_text("5")
    before, started, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    source = Mapped.of(path, columns)
    parts = [source] if share is None else divide(source, chain, Split(share), 0, "a")
    divided = time.process_time() - worked
    found = [encode_examples(part, chain.model, chain, progress="reading") for part in parts]
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    held = sum(each.nbytes for some in found for each in (some.tokens, some.bounds, some.starts))
    peak = resident("VmHWM") - before
    ids = sum(some.tokens.nbytes for some in found)
    if share is not None:
        print(f"{divided:.2f} s of one core to divide, then", end=" ")
    print(
        f"{sum(map(len, found)):,} examples, {ids / 1e6:.1f} MB of token ids: {seconds:.2f} s "
        f"({worked:.2f} s of one core), peak {peak / 1e6:.1f} MB ({peak / ids:.2f} × the ids; {held / 1e6:.1f} MB stay)"
    )


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    kind = sys.argv[2] if len(sys.argv) > 2 else "csv"
    share = sys.argv[3:4]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{kind}"
        write(path, rows)
        print(json.dumps({"rows": rows, "file": path.name, "MB": round(path.stat().st_size / 1e6, 1)}))
        cache = {**os.environ, "LLMCHAIN_FED_CACHE_EXAMPLES": "on"}
        for what in ("first start ", "second start"):
            print(what, end=": ", flush=True)
            subprocess.run([sys.executable, __file__, "--measure", str(path), *share], check=True, env=cache)


if __name__ == "__main__":
    measure(sys.argv[2], float(sys.argv[3]) if sys.argv[3:] else None) if sys.argv[1:2] == ["--measure"] else main()
