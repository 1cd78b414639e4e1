"""The federation that test_kills kills: six short rounds, resumed wherever there is a checkpoint.

Belongs here: what runs in the processes. Does not: when they are killed and what must be true then (test_kills).

A nursery has imported everything once and forks a child per attempt, so that a start costs milliseconds and not the
seconds that torch takes to load; what is killed is a process all the same. It reads a line per attempt, a directory and
seconds to dawdle within the writing of checkpoints, and answers the child's process id; then the child's exit status.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, TrainingConfig
from llmchain_fed.federated.checkpoint import files
from llmchain_fed.federated.options import Ditto
from llmchain_fed.updates.server_optimizers import FedAdam

ROUNDS = 6
OUTCOME = "outcome.json"
_SHARES = {"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}
_TOKENIZER = train_tokenizer()
_OPTIONS = {
    "codec": "int8",
    "broadcast_codec": "int8",
    "keep_checkpoints": 2,
    "training": TrainingConfig(
        optimizer="adamw", learning_rate=0.005, batch_size=4, max_steps=2, epochs=None, keep_optimizer=True
    ),
}


def run(directory: Path) -> None:
    """Goes on from what is in `directory/kept`, and leaves the outcome beside it once all rounds are done."""
    module = with_lora(tiny_module("causal", len(_TOKENIZER)), lora_config("causal", r=4))
    chain = LLMChain(llm=LocalLLM(model=LocalModel(module, _TOKENIZER, name="tiny")), prompt=TEMPLATE)
    kept = directory / "kept"
    if files.rounds(kept):
        fed = FederatedAveraging.resume(kept, chain, participants=_SHARES, progress=False)
    else:
        more = {"server_optimizer": FedAdam(lr=0.01), "personal": Ditto(lam=0.3), "checkpoint_dir": kept}
        fed = FederatedAveraging(chain, participants=_SHARES, progress=False, **more, **_OPTIONS)
    if fed.round < ROUNDS:
        fed.fit(rounds=ROUNDS - fed.round)
    fed.personalize("b", steps=1)  # writes the last round again
    (directory / OUTCOME).write_text(json.dumps(outcome(fed, kept)))


def outcome(fed: FederatedAveraging, kept: Path) -> dict[str, object]:
    """Hashes of the weights, of the server's memory and of every participant's own state, and the losses."""
    found = files.read(kept)
    losses = [[r.round, {n: p.train_loss for n, p in r.participants.items()}] for r in fed.history]
    hashes = {name: hash_of(tensors) for name, tensors in found.tensors.items()}
    people = {name: hashlib.sha256(blob).hexdigest() for name, blob in sorted(found.participants.items())}
    now = hash_of(fed.get_model().model.trainable_state())
    return {"weights": now, "files": hashes, "participants": people, "losses": losses}


def hash_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def dawdle(seconds: float) -> None:
    """Makes every step of writing a checkpoint take so long, so that a kill can be aimed at one."""
    for owner, name in ((os, "fsync"), (Path, "rename"), (files, "_sweep")):
        real = getattr(owner, name)

        def slow(*args, real=real, **options):
            time.sleep(seconds)
            found = real(*args, **options)
            time.sleep(seconds)
            return found

        setattr(owner, name, slow)


def child(directory: str, seconds: float) -> None:
    """One attempt, in a process of its own; does not return."""
    status = 1
    try:
        if seconds:
            dawdle(seconds)
        run(Path(directory))
        status = 0
    except BaseException:
        import traceback

        with contextlib.suppress(OSError):
            Path(directory, "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    """Forks a child per line of standard input."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Python warns of forks beside threads; torch has started none that matters here
    print("ready", flush=True)
    for line in sys.stdin:
        directory, seconds = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(directory, seconds)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
