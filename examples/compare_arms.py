"""The honest comparison: base, each publisher alone, federated, centralised; every arm sees equally many examples.

    python examples/compare_arms.py --seeds 2

Every arm takes the same number of optimizer steps one after the other and sees the same number of examples in all:
K publishers × batch size a step. The federation spreads them over its publishers (K models of one batch each, averaged
every round); the centralised arm draws them from the pooled examples; a publisher alone draws them from its own, in K
times as many passes. Learning rate, LoRA start and held-out texts are the same. Writes a Markdown table and JSON to
`out/arms/`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from catalogues import Split, split_publishers
from demo import PUBLISHERS, chrf, make_chain, options, translate
from transformers.utils import logging as transformers_logging

from llmchain_fed import FederatedAveraging, LLMChain, TrainingConfig, evaluate_locally, train_locally

Scores = dict[str, dict[str, float]]
"""publisher or "pooled" → loss (nats/token), chrF"""


def score(chain: LLMChain, splits: Mapping[str, Split]) -> Scores:
    """Held-out loss and chrF on every publisher's texts and on all of them together."""
    answers = {name: translate(chain, s.held_out) for name, s in splits.items()}
    found = {
        name: {
            "loss": evaluate_locally(chain.model, s.held_out, prompt=chain).loss,
            "chrf": chrf(answers[name], s.held_out),
        }
        for name, s in splits.items()
    }
    pooled = [pair for s in splits.values() for pair in s.held_out]
    found["pooled"] = {
        "loss": evaluate_locally(chain.model, pooled, prompt=chain).loss,
        "chrf": chrf([a for name in splits for a in answers[name]], pooled),
    }
    return found


def run_seed(chain: LLMChain, splits: Mapping[str, Split], config: TrainingConfig, rounds: int) -> dict[str, Scores]:
    """All arms of one seed, from the same start."""
    start = chain.model.trainable_state()
    steps = rounds * -(-len(next(iter(splits.values())).train) // config.batch_size)
    wide = config.replace(max_steps=steps, batch_size=config.batch_size * len(splits))
    arms: dict[str, Scores] = {"base": score(chain, splits)}

    def finish(arm: str, began: float) -> None:
        trained = time.perf_counter() - began
        arms[arm] = score(chain, splits)
        print(f"  {arm}: pooled {arms[arm]['pooled']}, {trained:.0f} s of training", flush=True)
        chain.model.load_state(start)

    began = time.perf_counter()
    participants = {name: s.train for name, s in splits.items()}
    FederatedAveraging(chain, participants=participants, training=config, progress=False).fit(rounds=rounds)
    finish("federated", began)

    pooled = [pair for s in splits.values() for pair in s.train]
    for arm, data in {"centralised": pooled, **{f"{name} alone": s.train for name, s in splits.items()}}.items():
        began = time.perf_counter()
        train_locally(chain.model, data, wide, prompt=chain, participant=arm)
        finish(arm, began)
    return arms


def table(results: Sequence[Mapping[str, Scores]], splits: Mapping[str, Split]) -> str:
    """Markdown: mean ± sd over the seeds; "own" is a publisher's own held-out texts."""
    lines = [
        "| arm | pooled loss | pooled chrF | " + " | ".join(f"{name} loss / chrF" for name in splits) + " |",
        "|---|" + "---|" * (2 + len(splits)),
    ]
    for arm in results[0]:
        cells = [_spread([r[arm]["pooled"]["loss"] for r in results], 3)]
        cells.append(_spread([r[arm]["pooled"]["chrf"] for r in results], 1))
        for name in splits:
            loss = _spread([r[arm][name]["loss"] for r in results], 2)
            cell = f"{loss} / {_spread([r[arm][name]['chrf'] for r in results], 1)}"
            cells.append(f"**{cell}**" if arm == f"{name} alone" else cell)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Runs the comparison."""
    parser = options("Base, alone, federated and centralised, at equal examples seen.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/arms"))
    args = parser.parse_args()
    if args.seeds < 1 or args.train % args.batch_size:
        parser.error("--seeds is at least 1, and --train a multiple of --batch-size so that all arms see equally much")
    transformers_logging.disable_progress_bar()
    chain = make_chain(args.language)
    start = chain.model.trainable_state()
    results = []
    for seed in range(args.seeds):
        print(f"seed {seed}", flush=True)
        chain.model.load_state(start)
        splits = split_publishers(PUBLISHERS, args.language, train=args.train, test=args.test, seed=seed)
        config = TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision, seed=seed)
        results.append(run_seed(chain, splits, config, args.rounds))
    text = table(results, splits)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "arms.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "arms.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\n{text}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
