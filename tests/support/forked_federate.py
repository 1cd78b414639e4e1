"""`llmchain-fed federate` in a process of its own, over participants that need no engine; for test_federate.

Belongs here: what runs in the processes. Does not: what must be true of them (test_federate).

As in killed_federation a nursery imports everything once and forks a child per attempt. It reads a line of JSON per
attempt (see `child`) and answers the child's process id; {"wait": id} is answered with its exit status, negative for a
signal.
"""

import contextlib
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, Participant, TrainingConfig, stopping
from llmchain_fed.cli import __main__ as cli
from llmchain_fed.errors import ContractError, ParticipantError, PolicyError, TransportError
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.storage import whole_folders

SHARES = {"a": PAIRS[:6], "b": PAIRS[6:]}
_ERRORS = {kind.__name__: kind for kind in (ContractError, ParticipantError, PolicyError, TransportError)}
_TOKENIZER = train_tokenizer()
_CHAINS: list[LLMChain] = []
_PEERS: dict = {}


def make_chain(seed: int = 0) -> LLMChain:
    module = with_lora(tiny_module("causal", len(_TOKENIZER), seed), lora_config("causal", r=4), seed)
    return LLMChain(llm=LocalLLM(model=LocalModel(module, _TOKENIZER, name="tiny")), prompt=TEMPLATE)


class Sites(InProcess):
    """Participants on models of their own, in the engine's place.

    Args:
        do: Name of a moment ("check", "hello", "train 3": the third training, in round 2) → what happens there.
        out: Site → class of the error with which it answers everything.
        sites: Who there is.
    """

    def __init__(self, do, out, sites) -> None:
        super().__init__({name: _PEERS[name] for name in sites})
        self.sequential = not {"c", "d"} & set(
            sites
        )  # as of participants elsewhere, whose held-out examples are theirs
        self._do, self._out, self._trainings = do, out, 0

    def call(self, op, nodes, payload, timeout=None):
        nodes = list(nodes)
        self._trainings += op == "train"
        act(self._do.get(f"train {self._trainings}" if op == "train" else op))
        yield from ((n, _ERRORS[self._out[n]](f"{n} is out")) for n in nodes if n in self._out)
        yield from super().call(op, [n for n in nodes if n not in self._out], payload, timeout)

    def check(self):
        act(self._do.get("check"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        act(self._do.get("close"))


def act(what) -> None:
    if what is None:
        return
    kind, path = what
    Path(path).touch()
    if kind == "deaf":  # in a library that does not return to Python
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
    time.sleep(60 if kind == "hang" else 0)


def no_engine(*_, **__):
    raise AssertionError("the hub was asked")


def child(
    *,
    log,
    arguments=(),
    do=None,
    out=None,
    sites="ab",
    engine=True,
    seconds=None,
    save=None,
    exchange=True,
    streams=None,
):
    """One attempt, in a process of its own; does not return.

    Args:
        log: File for what it says.
        arguments: Of the command.
        do, out, sites: See `Sites`.
        engine: Whether there is one; else asking for it fails.
        seconds: In the place of `stopping.SECONDS`.
        save: Instead of all that, saves two chains in turn to this folder for ever; a byte in this file for each.
        exchange: Whether the system can exchange two folders.
        streams: Where it writes to, if not to the log.
    """
    status = 70
    Path(log).touch()
    descriptor = os.open(streams or log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        do = do or {}
        if seconds is not None:
            stopping.SECONDS = seconds
        if not exchange:
            whole_folders._exchanged = lambda *_: False
        if save is not None:
            place, count = save
            with open(count, "ab", buffering=0) as file:
                while True:
                    for made in _CHAINS:
                        made.save(place)
                        file.write(b".")
        from llmchain_fed.cli import federating
        from llmchain_fed.runtimes.nvflare import runtime

        load = federating.load
        federating.load = lambda name: (act(do.get("load")), load(name))[1]
        runtime.NVFlare = (lambda *_, **__: Sites(do, out or {}, sites)) if engine else no_engine
        sys.argv = ["llmchain-fed", *arguments]
        status = cli.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def warm(folder: Path) -> None:
    """All that a process does for the first time, which takes a second, so that no child has to."""
    for made in reversed(_CHAINS):
        made.save(folder / "start")
    chain = LLMChain.load(folder / "start")
    FederatedAveraging(chain, participants=SHARES, checkpoint_dir=folder / "kept", progress=False).fit(1)
    _PEERS.update(FederatedAveraging(make_chain(), participants=SHARES)._peers)
    # held out is something else than what is trained on: after the first round every further one makes it worse
    held_out = [("x", "zz qq"), ("sign", "kk ww")]
    measured = [Participant(name, SHARES[of], held_out=held_out) for name, of in (("c", "a"), ("d", "b"))]
    worse = TrainingConfig(optimizer="sgd", learning_rate=10.0, max_steps=1)
    _PEERS.update(FederatedAveraging(make_chain(), participants=measured, training=worse)._peers)
    for name in ("runtimes.federation_file", "runtimes.results", "runtimes.nvflare.runtime"):
        importlib.import_module(f"llmchain_fed.{name}")


def main() -> None:
    """Forks a child per line of standard input, or waits for one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Python warns of forks beside threads; torch has started none that matters here
    _CHAINS.extend([make_chain(0), make_chain(1)])
    with tempfile.TemporaryDirectory() as folder:
        warm(Path(folder))
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(**order)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
