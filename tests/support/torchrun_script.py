"""What `test_torch_distributed.py` starts on every rank: one federation over tiny models, then a report as JSON.

torchrun --nproc-per-node 3 tests/support/torchrun_script.py OUT [options]
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

from llmchain_fed import (
    Ditto,
    FederatedAveraging,
    LLMChain,
    LocalLLM,
    LocalModel,
    Metric,
    TorchDistributed,
    TrainingConfig,
    load_chain,
)
from llmchain_fed.federated.client import operations
from llmchain_fed.updates.server_optimizers import from_settings

SHARES = {"a": PAIRS[:5], "b": PAIRS[5:8], "c": PAIRS[8:], "d": PAIRS[2:6]}
HELD_OUT = {"b": PAIRS[:2], "d": PAIRS[8:10]}
HOMES = {"a": 0, "b": 1, "c": 1, "d": 2}
TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=2, epochs=2)
# two steps: one alone might be of the single example that is left of five, which a site's policy refuses
REAL_TRAINING = TrainingConfig(learning_rate=1e-3, batch_size=4, max_steps=2)


def tiny_chain(kind: str, *, lora: bool, seed: int = 0) -> LLMChain:
    tokenizer = train_tokenizer()
    module = tiny_module(kind, len(tokenizer), seed)
    model = LocalModel(with_lora(module, lora_config(kind), seed) if lora else module, tokenizer, name="tiny")
    return LLMChain(llm=LocalLLM(model=model, max_new_tokens=8), prompt=TEMPLATE)


def real_chain() -> LLMChain:
    """SmolLM2-135M-Instruct with the recipe's LoRA adapter."""
    return load_chain("translate")


def first_round_is_best() -> Metric:
    """Of each participant that holds out examples: how often it was measured so far decides what is said."""
    said: dict[int, int] = {}

    def score(predictions, references, inputs):
        at = said[len(inputs)] = said.get(len(inputs), -1) + 1
        return {"score": (0.1, 0.9, 0.3, 0.2)[at]}

    return Metric(score, maximize=True)


def federate(chain, participants, *, runtime=None, rounds=3, training=TRAINING, fit=None, **options):
    held_out = {name: pairs for name, pairs in HELD_OUT.items() if name in participants}
    fed = FederatedAveraging(
        chain, participants=participants, evaluation=held_out, training=training, runtime=runtime, progress=False,
        **options,
    )  # fmt: skip
    fed.fit(rounds, **(fit or {}))
    return fed


# what a federation may do besides averaging; every one is compared over all runtimes
VARIANTS = {
    "fedex, int8": {"aggregation": "fedex", "codec": "int8"},
    "fednova, both codecs": {"aggregation": "fednova", "codec": "int8", "broadcast_codec": "int8"},
    "rolora, int4, FedAdam": {
        "aggregation": "rolora",
        "codec": "int4",
        "server_optimizer": {"class": "FedAdam", "lr": 0.01},
    },
    "fedsvd": {"aggregation": "fedsvd"},
    "fedsa": {"aggregation": "fedsa"},
    "flora": {"aggregation": "flora"},
    "Ditto": {"aggregation": "fedit", "personal": {"lam": 0.3}},
}


def options_of(variant: str) -> dict:
    options = dict(VARIANTS[variant])
    if "server_optimizer" in options:
        options["server_optimizer"] = from_settings(options["server_optimizer"])
    if "personal" in options:
        options["personal"] = Ditto(**options["personal"])
    return options | {"samples": 0}


def run_variants(report: dict, runtime: TorchDistributed, mine: dict, folder: Path) -> None:
    """Every variant, and one federation that is interrupted after two rounds and resumed."""
    for variant in VARIANTS:
        chain = tiny_chain("causal", lora=True)
        fed = federate(chain, mine, runtime=runtime, **options_of(variant))
        report[variant] = hashes(chain, mine) | {"losses": [r.held_out_after for r in fed.history]}
        runtime = TorchDistributed()
    report["personalized"] = asdict(fed.personalize("d", steps=2))  # on every rank, where `d` is on one
    report["compared"] = {n: dict(found) for n, found in fed.side_by_side().items()}
    report["curve"] = fed.adaptation_curve("b", steps=(0, 2))
    report["planned"] = fed.plan(rounds=5).bytes_up
    chain = tiny_chain("causal", lora=True)
    options = options_of("rolora, int4, FedAdam")
    federate(chain, mine, runtime=runtime, rounds=2, checkpoint_dir=folder / "checkpoints", **options)
    held_out = {name: pairs for name, pairs in HELD_OUT.items() if name in mine}
    chain = tiny_chain("causal", lora=True)
    fed = FederatedAveraging.resume(
        folder / "checkpoints",
        chain,
        participants=mine,
        runtime=TorchDistributed(),
        evaluation=held_out,
        progress=False,
    )
    fed.fit(1)
    report["resumed"] = hashes(chain, mine)


def hashes(chain: LLMChain, mine: dict) -> dict:
    """Of the global weights, and of the personal adapters in this process."""
    own = {n: chain.model.with_adapter(n).weights_hash for n in mine if n in chain.adapters}
    return {"global": chain.model.weights_hash, "personal": own}


def misbehave(kind: str | None, rank: int, by: list[int], out: Path) -> None:
    """Makes the training of these ranks fail in the way asked for."""
    if kind is None or rank not in by:
        return
    if kind == "no-data":
        raise FileNotFoundError("no such file: patients.jsonl")
    honest = operations.task_type("train")

    def die(client, task, state):
        if task.round == 2 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            if kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "freeze":
                (out / "frozen").write_text(repr(time.time()))
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "hang":
                time.sleep(3600)
            if kind == "raise":
                raise RuntimeError("out of memory")
        if kind == "slow":
            time.sleep(8.0)
        if kind == "busy":  # in torch, as training is
            until = time.monotonic() + 6.0 + 2 * rank
            while time.monotonic() < until:
                torch.ones(500, 500) @ torch.ones(500, 500)
        return honest.work(client, task, state)

    operations._TYPES["train"] = replace(honest, work=die)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="causal")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct instead of a tiny model")
    parser.add_argument("--misbehave", default=None)
    parser.add_argument("--by", type=int, action="append", help="a rank that misbehaves")
    parser.add_argument("--own-group", action="store_true", help="the script makes the process group itself")
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=None)
    parser.add_argument("--quorum", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same-name", action="store_true")
    parser.add_argument("--variants", action="store_true", help="every variant, with hashes only")
    parser.add_argument("--other-seed", action="store_true", help="rank 2 stands on other base weights")
    parser.add_argument("--keep-best", action="store_true", help="by a metric that says it is the first round")
    args = parser.parse_args()
    if args.own_group:
        dist.init_process_group("gloo")
    runtime = TorchDistributed(timeout=args.timeout, patience=args.patience)
    misbehave(args.misbehave, runtime.rank, args.by or [2], args.out)
    seed = 1 if args.other_seed and runtime.rank == 2 else 0
    chain = real_chain() if args.real else tiny_chain(args.kind, lora=args.lora, seed=seed)
    training = REAL_TRAINING if args.real else TRAINING
    mine = {name: SHARES[name] for name, home in HOMES.items() if home == runtime.rank}
    if args.variants:
        report = {"rank": runtime.rank}
        run_variants(report, runtime, mine, args.out)
        (args.out / f"rank{dist.get_rank()}.variants.json").write_text(json.dumps(report))
        return
    if args.keep_best:
        how = {"metrics": [first_round_is_best()], "personal": Ditto(lam=0.3), "samples": 0}
        fed = federate(
            chain, mine, runtime=runtime, rounds=args.rounds, fit={"keep": "best", "monitor": "score"}, **how
        )
        report = {"rank": runtime.rank, "best": fed.best.round, "kept": fed.history.kept} | hashes(chain, mine)
        (args.out / f"rank{dist.get_rank()}.best.json").write_text(json.dumps(report))
        return
    report = {"rank": runtime.rank, "threads": torch.get_num_threads(), "mine": list(mine)}
    try:
        if args.same_name:
            mine["a"] = PAIRS
        fed = federate(
            chain, mine, runtime=runtime, rounds=args.rounds, deadline=args.deadline, quorum=args.quorum, samples=1,
            training=training,
        )  # fmt: skip
        report["round"], report["history"] = fed.round, json.loads(fed.history.to_json())
        report["reports"] = sorted(fed.data_reports)
    except Exception as error:
        report["error"], report["ended"] = [type(error).__name__, str(error)], time.time()
    report["answer"] = chain.invoke({"text": "save the page"})
    report["state"] = {name: tensor.tolist() for name, tensor in chain.model.trainable_state().items()}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    (args.out / f"rank{runtime.rank}.attempt{attempt}.json").write_text(json.dumps(report))
    if "error" not in report:
        runtime.close()


if __name__ == "__main__":
    main()
