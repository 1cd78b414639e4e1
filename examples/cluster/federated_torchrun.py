"""The demo's publishers as ranks of a torchrun job: every process reads only its own publishers' texts.

    torchrun --nproc-per-node 3 -m examples.cluster.federated_torchrun          # SmolLM2-135M-Instruct, LoRA
    torchrun --nproc-per-node 3 -m examples.cluster.federated_torchrun --tiny   # a tiny model, half a minute

Publishers are dealt to ranks in turn, so four publishers on three ranks leave rank 0 with two. Rank 0 averages; after
`fit` every rank's chain answers with the averaged weights, which the last lines show.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import LoraConfig
from transformers.utils import logging as transformers_logging

from examples.common.catalogues import PUBLISHERS, split_alone
from examples.common.tiny_model import tiny_model
from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, TorchDistributed, TrainingConfig


def make_chain(*, tiny: bool) -> LLMChain:
    """The same chain on every rank: the contract that the ranks compare."""
    if tiny:
        llm = LocalLLM(model=tiny_model(["Translate to French: the page is locked"]), max_new_tokens=8)
    else:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        llm = LocalLLM.from_pretrained("smollm2-135m-instruct", lora=lora, max_new_tokens=24)
    return LLMChain(llm=llm, prompt="Translate the following text to French: {text}\n")


def main() -> None:
    """Runs on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: shows the way, not the quality")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=96, help="training examples per publisher")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=None, help="where rank 0 saves chain and history")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()

    runtime = TorchDistributed()  # before the model: it divides the cores, and the GPUs, among the ranks
    chain = make_chain(tiny=args.tiny)
    mine = PUBLISHERS[runtime.rank :: runtime.world_size]
    splits = {name: split_alone(name, train=args.train, test=16) for name in mine}  # nobody reads another's texts
    fed = FederatedAveraging(
        chain,
        participants={name: split.train for name, split in splits.items()},
        evaluation={name: split.held_out for name, split in splits.items()},
        training=TrainingConfig(learning_rate=args.lr, batch_size=8),
        runtime=runtime,
        samples=0,
        progress=runtime.leads,
    )
    history = fed.fit(rounds=args.rounds)
    if runtime.leads:
        print(history)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            chain.save(args.out / "chain")
            history.save(args.out / "history.json")
    answer = chain.invoke({"text": "Save the page"})
    version = chain.model.weights_hash
    print(f"rank {runtime.rank} ({', '.join(mine) or 'no publisher'}), weights {version}: {answer!r}", flush=True)
    runtime.close()


if __name__ == "__main__":
    main()
