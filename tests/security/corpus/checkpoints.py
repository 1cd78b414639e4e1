"""Checkpoints as an attacker writes them: a real one, changed anywhere, with digests that are right again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, TorchServerOptimizer, TrainingConfig
from llmchain_fed.federated.options import Ditto
from llmchain_fed.updates.server_optimizers import FedAdam

SHARES = {"a": PAIRS[:6], "b": PAIRS[6:]}
KEPT = TrainingConfig(
    optimizer="adamw", learning_rate=0.005, batch_size=4, max_steps=1, epochs=None, keep_optimizer=True
)
FEDERATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "everything": lambda: {
        "codec": "int8",
        "broadcast_codec": "int8",
        "personal": Ditto(),
        "server_optimizer": FedAdam(lr=0.01),
        "evaluation": 0.2,
    },
    "remainder": lambda: {"aggregation": "fedex"},
    "torch": lambda: {"server_optimizer": TorchServerOptimizer(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.95))},
}
_TOKENIZER = train_tokenizer()


def fresh_chain() -> LLMChain:
    module = with_lora(tiny_module("causal", len(_TOKENIZER)), lora_config("causal"))
    return LLMChain(llm=LocalLLM(model=LocalModel(module, _TOKENIZER, name="tiny")), prompt=TEMPLATE)


def build(directory: Path, kind: str) -> Path:
    """The checkpoints of two rounds."""
    FederatedAveraging(
        fresh_chain(),
        participants=SHARES,
        training=KEPT,
        checkpoint_dir=directory,
        progress=False,
        **FEDERATIONS[kind](),
    ).fit(rounds=2)
    return directory


def manifest(directory: Path, number: int = 2) -> dict[str, Any]:
    text = (directory / f"round-{number:06d}" / "manifest.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.split("\n", 1)[1])
    return found


def sign(directory: Path, content: Any, number: int = 2) -> None:
    """Writes a manifest, or the text of one, with the digest that belongs to it."""
    text = content if isinstance(content, str) else json.dumps(content)
    data = text.encode("utf-8", "surrogatepass")
    path = directory / f"round-{number:06d}" / "manifest.json"
    path.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def put(directory: Path, name: str, data: bytes, number: int = 2) -> None:
    """Another content of a file, and its digest in the manifest."""
    content = manifest(directory, number)
    (directory / f"round-{number:06d}" / name).write_bytes(data)
    content["files"][name] = hashlib.sha256(data).hexdigest()
    sign(directory, content, number)


def retouch(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any], number: int = 2) -> None:
    """Other tensors of a file; a participant's keeps its header."""
    data = (directory / f"round-{number:06d}" / name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = {n: t.clone() for n, t in load(data).items()}
    change(tensors)
    put(directory, name, save(tensors, json.loads(data[8 : 8 + size]).get("__metadata__")), number)


def rehead(directory: Path, name: str, change: Callable[[dict[str, Any]], Any], number: int = 2) -> None:
    """Another header of a participant's state, with the same tensors."""
    data = (directory / f"round-{number:06d}" / name).read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["llmchain_fed"])
    header = change(header) or header
    put(directory, name, save(load(data), {"llmchain_fed": json.dumps(header)}), number)


@contextlib.contextmanager
def copied(directory: Path, to: Path) -> Iterator[Path]:
    shutil.copytree(directory, to)
    try:
        yield to
    finally:
        shutil.rmtree(to)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- values of every kind ---------------------------------------------------------------------------------------------

DEEP: Any = 0
for _ in range(40):
    DEEP = [DEEP]

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    2**63,
    10**400,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\x1b]0;title\x07\x1b[2J",
    "../../etc/passwd",
    "y" * 200_000,
    [],
    ["x"],
    [[1], {"a": [None]}],
    {},
    {"class": "os.system", "options": ["true"]},
    DEEP,
]
REMOVED = object()


def places(found: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path in a manifest but those of files' digests; of lists the last entry's."""
    if here[:1] == ("files",) and len(here) > 1:
        return
    if here:
        yield here
    entries = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in entries:
        if isinstance(found, list) and key != len(found) - 1:
            continue
        yield from places(value, (*here, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a manifest with another value there, or without it."""
    made = json.loads(json.dumps(content))
    inside = made
    for key in place[:-1]:
        inside = inside[key]
    if value is REMOVED:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return made
