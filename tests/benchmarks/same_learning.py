"""Whether two commits learn the same, bit for bit: small federations are trained on both, and their digests compared.

    python tests/benchmarks/same_learning.py BEFORE          # a commit; the other side is the working tree
    python tests/benchmarks/same_learning.py --digests       # those of the package that is imported, as JSON

Knows the public names alone, which both commits have. A refactoring that should not change what is learnt shows here
that it does not: weights after every federation, every record's losses, norms and cosines, and personal adapters.
The order within a process and on `torchrun` ranks is covered; NVFlare's sites are compared with this process's by
`tests/runtimes/test_runtimes_agree.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RANKS = 3
# of a record: times differ from run to run, and what is said in words or counted in bytes may differ between commits
_LEARNT = (
    "train_loss",
    "held_out_before",
    "held_out_after",
    "update_norm",
    "cosine_to_mean",
    "examples",
    "tokens",
    "steps",
    "gap",
)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _weights(state: Mapping[str, Any]) -> str:
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.float().numpy().tobytes())
    return whole.hexdigest()[:16]


def _learnt(found: Any) -> Any:
    """What a record says of learning, at every depth; a field that one side lacks is a difference."""
    if isinstance(found, dict):
        kept = {k: _learnt(v) for k, v in found.items() if k in _LEARNT or isinstance(v, dict | list)}
        return {k: v for k, v in kept.items() if v not in ({}, [])}
    return [_learnt(v) for v in found if isinstance(v, dict | list)] if isinstance(found, list) else found


def _federations() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    """A name, and what trains it in a folder: rules, codecs, server optimizers, personal models, resuming, by hand."""
    import torch
    from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

    from llmchain_fed import (
        Ditto,
        FedAdam,
        FederatedAveraging,
        LLMChain,
        LocalLLM,
        LocalModel,
        Participant,
        TrainingConfig,
    )

    shares = {"a": PAIRS[:5], "b": PAIRS[5:8], "c": PAIRS[8:]}
    training = TrainingConfig(learning_rate=5e-3, batch_size=2, epochs=2)

    def chain(kind: str = "causal", *, lora: bool = True) -> LLMChain:
        tokenizer = train_tokenizer()
        module = tiny_module(kind, len(tokenizer), 0)
        model = LocalModel(with_lora(module, lora_config(kind), 0) if lora else module, tokenizer, name="tiny")
        return LLMChain(llm=LocalLLM(model=model, max_new_tokens=8), prompt=TEMPLATE)

    def result(fed: FederatedAveraging, trained: LLMChain) -> dict[str, Any]:
        history = [_learnt(record) for record in fed.history.to_dict()["rounds"]]
        own = {n: trained.model.with_adapter(n).weights_hash for n in shares if n in trained.adapters}
        return {"weights": _weights(trained.model.trainable_state()), "records": _digest(history), "personal": own}

    def fit(
        _folder: Path, *, kind: str = "causal", lora: bool = True, rounds: int = 3, **options: Any
    ) -> dict[str, Any]:
        trained = chain(kind, lora=lora)
        given = {"participants": shares, "evaluation": {"b": PAIRS[:2]}, "training": training} | options
        fed = FederatedAveraging(trained, progress=False, **given)
        fed.fit(rounds)
        return result(fed, trained)

    def resumed(folder: Path) -> dict[str, Any]:
        fit(folder, rounds=2, checkpoint_dir=folder / "checkpoints", codec="topk:0.2")
        trained = chain()
        fed = FederatedAveraging.resume(
            folder / "checkpoints", trained, participants=shares, evaluation={"b": PAIRS[:2]}, progress=False
        )
        fed.fit(1)
        return result(fed, trained)

    def by_hand(_folder: Path) -> dict[str, Any]:
        trained = chain(lora=False)
        optimizer = torch.optim.Adam(trained.model.parameters())
        fed = FederatedAveraging(model=trained.model, optimizer=optimizer, lr=0.001, batch_size=4)
        prompts = [[(TEMPLATE.format(text=x), y) for x, y in pairs] for pairs in shares.values()]
        for _ in range(2):
            for device, pairs in enumerate(prompts):
                fed.train(pairs, device)
            fed.step()
        return {"weights": _weights(fed.get_model().trainable_state())}

    def unequal(folder: Path) -> dict[str, Any]:
        people = [
            Participant("a", shares["a"], training={"max_steps": 1}),
            Participant("b", shares["b"], training={"learning_rate": 1e-3}),
            Participant("c", shares["c"]),
        ]
        return fit(folder, participants=people, aggregation="fednova", seed=3)

    def variant(**options: Any) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: fit(folder, **options)

    yield "fedavg, full weights", variant(lora=False)
    yield "fedavg, seq2seq, LoRA", variant(kind="seq2seq")
    yield "rolora, int4, FedAdam", variant(aggregation="rolora", codec="int4", server_optimizer=FedAdam(lr=0.01))
    yield "fedex, int8", variant(aggregation="fedex", codec="int8")
    yield "fednova, int8 both ways", variant(aggregation="fednova", codec="int8", broadcast_codec="int8")
    yield "fednova, unequal participants", unequal
    yield "fedsvd", variant(aggregation="fedsvd")
    yield "fedsa", variant(aggregation="fedsa")
    yield "flora", variant(aggregation="flora")
    yield "flexlora, bf16", variant(aggregation="flexlora", codec="bf16")
    yield "Ditto over fedit", variant(aggregation="fedit", personal=Ditto(lam=0.3))
    yield "a cohort of two, weights bounded", variant(participants_per_round=2, max_weight_share=0.6)
    yield "topk, resumed after two rounds", resumed
    yield "train and step by hand", by_hand


def digests() -> dict[str, Any]:
    """Trains all of them here."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for name, train in _federations():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = train(Path(folder))
        print(name, found[name], file=sys.stderr)
    return found


def _side(tree: Path) -> dict[str, Any]:
    """The digests of another tree's package, by this script, and of its own script on `torchrun` ranks."""
    helpers = tree / "tests" / "support" if (tree / "tests" / "support").is_dir() else tree / "tests"
    paths = os.pathsep.join(map(str, (tree, helpers)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--digests"]
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as out:
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        script = [str(helpers / "torchrun_script.py"), out, "--variants"]
        subprocess.run([*ranks, *script], env=environment, cwd=tree, stdout=subprocess.DEVNULL, check=True)
        for rank in range(RANKS):
            report = json.loads((Path(out) / f"rank{rank}.variants.json").read_text())
            report["personalized"].pop("seconds")
            found |= {f"rank {rank}: {name}": value for name, value in report.items() if name != "rank"}
    return found


def main() -> int:
    """Compares, and says where the two sides part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", help="the commit to compare the working tree with")
    parser.add_argument("--digests", action="store_true", help="only print those of the package that is imported")
    options = parser.parse_args()
    if options.digests:
        print(json.dumps(digests()))
        return 0
    if options.before is None:
        parser.error("which commit is before?")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", options.before], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        before, after = _side(Path(folder)), _side(ROOT)
    for name in sorted({*before, *after}):
        same = before.get(name) == after.get(name)
        print(
            f"{'same' if same else 'DIFFERS'}  {name}"
            + ("" if same else f"\n  {before.get(name)}\n  {after.get(name)}")
        )
    return int(before != after)


if __name__ == "__main__":
    raise SystemExit(main())
