"""What the order of the batches costs: held-out loss and padding of batches of similar length against a random order.

    python tests/benchmarks/batch_order.py --steps 20 --seeds 3              # fp32; --precision bf16
    python tests/benchmarks/batch_order.py --padding                         # padded tokens alone, in seconds

SmolLM2-135M with LoRA (r=16, all linear layers) on English-French messages of four publishers' catalogues. Every order
starts from the same adapter; a seed draws another order, and the yardstick of a seed is its own random order. One
thread, so that a busy machine changes the time and not the numbers. Markdown on stdout, each run as a line of JSON in
--out, from which a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.common.catalogues import split_publishers
from examples.common.translation import PUBLISHERS, make_chain
from llmchain_fed import LocalModel, TrainingConfig, evaluate_locally, train_locally
from llmchain_fed.data.encoding import Batch, EncodedExamples, encode_examples
from llmchain_fed.training.batch_sampler import Place, length_buckets, seed_of
from llmchain_fed.training.gradient_step import GradientStep, StepResult
from llmchain_fed.training.loop import mean_loss_gradient

Order = list[list[int]]


def random_order(lengths: Sequence[int], size: int, rng: random.Random) -> Order:
    """The yardstick: a shuffle."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    return [order[at : at + size] for at in range(0, len(order), size)]


def sorted_batches(lengths: Sequence[int], size: int, rng: random.Random, jitter: float = 0.05) -> Order:
    """Batches of neighbours in length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i] * rng.uniform(1 - jitter, 1 + jitter), i))
    return [order[at : at + size] for at in range(0, len(order), size)]


def shuffled_buckets(lengths: Sequence[int], size: int, rng: random.Random) -> Order:
    """Before November 2026: neighbours in length, jittered by 5 %, in random order."""
    batches = sorted_batches(lengths, size, rng)
    rng.shuffle(batches)
    return batches


def windows(lengths: Sequence[int], size: int, rng: random.Random, wide: int = 16) -> Order:
    """Transformers' `group_by_length`: sorted within shuffled windows of 16 batches; here the batches are shuffled."""
    order, batches = [i for batch in random_order(lengths, size, rng) for i in batch], []
    for at in range(0, len(order), wide * size):
        window = sorted(order[at : at + wide * size], key=lambda i: lengths[i])
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(batches)
    return batches


def spread(lengths: Sequence[int], size: int, rng: random.Random, strata: int = 8) -> Order:
    """Neighbours in length, in an order in which any eight steps see all lengths."""
    batches, found = sorted_batches(lengths, size, rng), []
    parts = [batches[len(batches) * k // strata : len(batches) * (k + 1) // strata] for k in range(strata)]
    for part in parts:
        rng.shuffle(part)
    while any(parts):
        there = [part for part in parts if part]
        rng.shuffle(there)
        found += [part.pop() for part in there]
    return found


def by_tokens(mean: float) -> GradientStep:
    """Steps that count by their completion tokens, of which batches of short texts have few: no token counts more."""

    def step(model: LocalModel, batch: Batch, config: TrainingConfig, /) -> StepResult:
        result = mean_loss_gradient(model, batch, config)
        for parameter in model.trainable_parameters().values():
            if parameter.grad is not None:
                parameter.grad *= result.tokens / mean
        return result

    return step


ORDERS: dict[str, Callable[[Sequence[int], int, random.Random], Order]] = {
    "random": random_order, "shuffled buckets": shuffled_buckets, "windows of 16": windows, "spread": spread,
    "buckets by tokens": shuffled_buckets,
}  # fmt: skip


def sampler(order: str) -> Callable[..., Iterator[Sequence[int]]]:
    """A batch sampler of that order; "ours" is the package's own."""
    if order == "ours":
        return length_buckets

    def draw(examples: EncodedExamples, config: TrainingConfig, place: Place) -> Iterator[Sequence[int]]:
        lengths, done = examples.lengths(), 0
        while done < (config.max_steps or 0):
            rng = random.Random(seed_of(config.seed, place.participant, "pass", done))
            for batch in ORDERS[order](lengths, config.batch_size, rng)[: (config.max_steps or 0) - done]:
                done += 1
                yield batch

    return draw


def padded(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Tokens that forward passes over these batches compute, padding included."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", nargs="+", default=["random", "shuffled buckets", "ours"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train", type=int, default=160, help="examples per publisher")
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--padding", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/batch_order.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits = split_publishers(PUBLISHERS, "fr", train=args.train, test=args.test, seed=0).values()
    train, test = [p for s in splits for p in s.train], [p for s in splits for p in s.held_out]
    chain = make_chain("fr")
    start, encoded = chain.model.trainable_state(), encode_examples(train, chain.model, chain)
    lengths = encoded.lengths()
    config = TrainingConfig(learning_rate=args.lr, batch_size=args.batch_size, precision=args.precision)
    tokens, mean = {}, encoded.report.completion_tokens * args.batch_size / len(encoded)
    for order in {"shuffled buckets", *args.orders}:
        per_pass = -(-len(lengths) // args.batch_size)
        draws = [[*sampler(order)(encoded, config.replace(max_steps=per_pass, seed=s), Place())] for s in range(20)]
        tokens[order] = statistics.mean(padded(lengths, batches) for batches in draws)
    told = {order: f"{tokens['shuffled buckets'] / tokens[order]:.3f}" for order in args.orders}
    if args.padding:
        print(
            "\n".join(f"{order}: {ratio} of shuffled buckets' speed by padded tokens" for order, ratio in told.items())
        )
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {tuple(found["key"]): found["loss"] for found in map(json.loads, lines)}
    about = (args.precision, args.batch_size, args.train, args.test, args.lr)
    for seed in range(args.seeds):
        for steps in args.steps:
            for order in args.orders:
                key = (*about, order, steps, seed)
                if key in done:
                    continue
                chain.model.load_state(start)
                own = config.replace(max_steps=steps, seed=seed)
                step = by_tokens(mean) if order.endswith("by tokens") else None
                train_locally(chain.model, encoded, own, batch_sampler=sampler(order), gradient_step=step)
                done[key] = evaluate_locally(chain, test).loss
                with args.out.open("a") as out:
                    out.write(json.dumps({"key": key, "loss": done[key]}) + "\n")
                print(f"{order}, {steps} steps, seed {seed}: {done[key]:.4f}", file=sys.stderr, flush=True)
    print(f"| order, {args.precision}, batches of {args.batch_size} | speed by padded tokens |", end="")
    print("".join(f" loss after {n} steps | against random |" for n in args.steps))
    print("|---|---|" + "---|---|" * len(args.steps))
    for order in args.orders:
        cells = [order, told[order]]
        for steps in args.steps:
            losses = [done[(*about, order, steps, seed)] for seed in range(args.seeds)]
            apart = [loss / done[(*about, "random", steps, seed)] - 1 for seed, loss in enumerate(losses)]
            spread_of = f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.1%}" if len(apart) > 1 else ""
            cells += [f"{statistics.mean(losses):.3f}", f"{statistics.mean(apart):+.1%}{spread_of}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
