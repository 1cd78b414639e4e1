"""Which rule? Six ways to federate LoRA and two codecs, beside base, alone and centralised, at equal examples seen.

    python -m examples.translation.compare_rules --seeds 3
    python -m examples.translation.compare_rules --scan   # which learning rate suits which rule, on a split of its own

Every arm takes the same number of optimizer steps one after the other and sees the same number of examples in all:
K publishers × batch size a step. A federation spreads them over its publishers (K models of one batch each, combined
every round); the centralised arm draws them from the pooled examples; a publisher alone draws them from its own, in K
times as many passes. LoRA start and held-out texts are the same. The learning rate is each arm's own, found by --scan.
Whether federating helps at all is `compare_arms`, by `fed.compare`; this script varies what that call keeps fixed: the
rule, the codec, and with the seed the texts. Writes Markdown and JSON to `out/rules/` after every arm; started again,
it goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from examples.common.catalogues import Split, split_publishers
from examples.common.translation import PUBLISHERS, chrf, make_chain, options, translate
from llmchain_fed import FederatedAveraging, LLMChain, TrainingConfig, evaluate_locally, train_locally
from llmchain_fed.storage.own_files import write_whole

RULES = ("fedit", "ffa", "rolora", "fedsvd", "fedex", "flora")
CODED: dict[str, dict[str, Any]] = {
    "fedit, int8": {"aggregation": "fedit", "codec": "int8", "broadcast_codec": "int8"},
    "fedit, int4": {"aggregation": "fedit", "codec": "int4", "broadcast_codec": "int4"},
}
# times --lr, the best of `--scan`: who trains one factor, or starts anew every round, needs larger steps; who repeats
# few examples, smaller ones
LEARNING_RATES = {"ffa": 4.0, "rolora": 2.0, "fedsvd": 2.0, "flora": 4.0, "alone": 0.5}
_SCAN_SEED = 1000  # of a split that no arm is compared on

Arm = dict[str, Any]
"""publisher or "pooled" → {"loss" (nats/token), "chrf"}; and "bytes", "seconds", "gap" """


def score(chain: LLMChain, splits: Mapping[str, Split]) -> Arm:
    """Held-out loss and chrF on every publisher's texts and on all of them together."""
    answers = {name: translate(chain, s.held_out) for name, s in splits.items()}
    found: Arm = {
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


def federate(
    chain: LLMChain, splits: Mapping[str, Split], config: TrainingConfig, rounds: int, **choice: Any
) -> dict[str, Any]:
    """Trains the chain by one rule; what it cost."""
    fed = FederatedAveraging(
        chain,
        participants={name: s.train for name, s in splits.items()},
        training=config,
        progress=False,
        **choice,
    )
    history = fed.fit(rounds=rounds)
    gaps = [r.aggregation_gap for r in history if r.aggregation_gap is not None]
    return {"bytes": sum(r.bytes_up + r.bytes_down for r in history), "gap": statistics.fmean(gaps) if gaps else None}


def scale_of(arm: str) -> float:
    """Times --lr: the arm's learning rate."""
    return LEARNING_RATES.get("alone" if arm.endswith(" alone") else arm, 1.0)


def run_arm(
    chain: LLMChain, arm: str, splits: Mapping[str, Split], config: TrainingConfig, rounds: int, scale: float
) -> tuple[dict[str, Any], float]:
    """Trains the chain the arm's way, from the start it has; what it cost, and the seconds.

    Args:
        chain: What learns.
        arm: One of `arms_of`.
        splits: Publisher → its examples.
        config: With the learning rate that the arms' own are multiples of.
        rounds: Of federated arms; the others take as many steps.
        scale: Times the learning rate.
    """
    assert config.learning_rate is not None
    config = config.replace(learning_rate=config.learning_rate * scale)
    steps = rounds * -(-len(next(iter(splits.values())).train) // config.batch_size)
    wide = config.replace(max_steps=steps, batch_size=config.batch_size * len(splits))
    began, cost = time.perf_counter(), {}
    if arm in RULES or arm in CODED:
        cost = federate(chain, splits, config, rounds, **CODED.get(arm, {"aggregation": arm}))
    elif arm != "base":
        names = list(splits) if arm == "centralised" else [arm.removesuffix(" alone")]
        pairs = [pair for name in names for pair in splits[name].train]
        train_locally(chain.model, pairs, wide, prompt=chain, participant=arm)
    return cost, time.perf_counter() - began


def arms_of(publishers: Iterable[str]) -> list[str]:
    """Every arm's name."""
    return ["base", *RULES, *CODED, "centralised", *(f"{name} alone" for name in publishers)]


def table(results: Sequence[Mapping[str, Arm]], publishers: Sequence[str]) -> str:
    """Markdown: mean ± sd over the seeds. "own" is the mean over publishers, each on its own held-out texts."""
    lines = [
        "| arm | pooled loss | pooled chrF | own loss | own chrF | MB up + down | seconds | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = [f"{name} alone" for name in publishers]
    for arm in ["base", "alone (mean of all)", *RULES, *CODED, "centralised"]:
        members = alone if arm.startswith("alone") else [arm]
        whole = [r for r in results if all(m in r for m in members)]
        if not whole:
            continue

        def own(r: Mapping[str, Arm], what: str, members: list[str] = members) -> float:
            pairs = zip(publishers, members if len(members) > 1 else members * len(publishers), strict=True)
            return statistics.fmean(float(r[m][name][what]) for name, m in pairs)

        def pooled(r: Mapping[str, Arm], what: str, members: list[str] = members) -> float:
            return statistics.fmean(float(r[m]["pooled"][what]) for m in members)

        cells = [_spread([pooled(r, "loss") for r in whole], 3), _spread([pooled(r, "chrf") for r in whole], 1)]
        cells += [_spread([own(r, "loss") for r in whole], 3), _spread([own(r, "chrf") for r in whole], 1)]
        costs = [r[members[0]] for r in whole]
        moved, gaps = [c["bytes"] for c in costs if c.get("bytes")], [c.get("gap") for c in costs]
        cells.append(f"{statistics.fmean(moved) / 1e6:.1f}" if moved else "–")
        cells.append(f"{statistics.fmean(c['seconds'] for c in costs):.0f}" if arm != "base" else "–")
        known = [g for g in gaps if g is not None]
        cells.append(f"{statistics.fmean(known):.1%}" if known else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def scan(chain: LLMChain, args: Any) -> str:
    """Markdown: pooled held-out loss of arms at several learning rates, on a split of its own."""
    start = chain.model.trainable_state()
    splits = split_publishers(PUBLISHERS, args.language, train=args.train, test=args.test, seed=_SCAN_SEED)
    config = TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision)
    pooled = [pair for s in splits.values() for pair in s.held_out]
    rates = args.scales
    lines = ["| arm | " + " | ".join(f"{args.lr * s:g}" for s in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm in args.arms or [*RULES, "centralised", *(f"{name} alone" for name in splits)]:
        cells = []
        for scale in rates:
            reset(chain, start)
            run_arm(chain, arm, splits, config, args.rounds, scale)
            cells.append(f"{evaluate_locally(chain.model, pooled, prompt=chain).loss:.3f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def reset(chain: LLMChain, start: Mapping[str, Any]) -> None:
    """The untrained adapter again, and no remainder."""
    chain.model.load_remainder({})
    chain.model.load_state(start)


def main() -> None:
    """Runs the comparison."""
    parser = options("Base, alone, centralised and every rule of federated LoRA, at equal examples seen.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scan", action="store_true", help="compare learning rates instead, on a split of its own")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="times --lr, for --scan")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=Path("out/rules"))
    args = parser.parse_args()
    if args.seeds < 1 or args.train % args.batch_size:
        parser.error("--seeds is at least 1, and --train a multiple of --batch-size so that all arms see equally much")
    transformers_logging.disable_progress_bar()
    chain = make_chain(args.language)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.scan:
        write_whole(args.out / "scan.md", scan(chain, args) + "\n")
        return
    start = chain.model.trainable_state()
    file = args.out / "arms.json"
    setting = {k: getattr(args, k) for k in ("language", "rounds", "train", "test", "lr", "batch_size", "precision")}
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    results: list[dict[str, Arm]] = known["results"] if known.get("setting") == setting else []
    for seed in range(args.seeds):
        splits = split_publishers(PUBLISHERS, args.language, train=args.train, test=args.test, seed=seed)
        config = TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision, seed=seed)
        results += [{}] if len(results) <= seed else []
        for arm in args.arms or arms_of(splits):
            if results[seed].get(arm, {}).get("scale") == scale_of(arm):
                continue
            reset(chain, start)
            cost, seconds = run_arm(chain, arm, splits, config, args.rounds, scale_of(arm))
            results[seed][arm] = score(chain, splits) | cost | {"seconds": seconds, "scale": scale_of(arm)}
            print(f"seed {seed}, {arm}: pooled {results[seed][arm]['pooled']}, {seconds:.0f} s of training", flush=True)
            write_whole(file, json.dumps({"setting": setting, "results": results}, indent=1))
            write_whole(args.out / "arms.md", table(results, PUBLISHERS) + "\n")
    print(f"\n{table(results, PUBLISHERS)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
