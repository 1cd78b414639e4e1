"""Our side of every comparison, one sub-command each.

python tests/benchmarks/ours.py prepare WORK.json PAIRS HELD_OUT TEXTS NEW_TOKENS
python tests/benchmarks/ours.py train WORK.json SEED fp32|bf16
python tests/benchmarks/ours.py batch WORK.json fp32|bf16 TIMES
python tests/benchmarks/ours.py chat_batch WORK.json TIMES
python tests/benchmarks/ours.py invoke WORK.json lora|merged TIMES
python tests/benchmarks/ours.py aggregate UPDATES
python tests/benchmarks/ours.py one_round WORK.json
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare
import common
import torch

from llmchain_fed import (
    FederatedAveraging,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    TrainingConfig,
    train_locally,
)

PUBLISHERS = ("django", "wagtail", "plone", "pretix")


def prepare(path: str, pairs: str, held_out: str, texts: str, new_tokens: str) -> None:
    """Writes the work that all sides do: PAIRS and HELD_OUT per publisher, TEXTS to generate from."""
    from llmchain_fed.model import loading

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from examples.common.catalogues import split_publishers

    splits = split_publishers(PUBLISHERS, "fr", train=int(pairs), test=int(held_out))

    def final(source: str, target: str) -> dict[str, str]:
        return {"prompt": common.PROMPT.format(text=source), "completion": target}

    # publishers take turns, so that any first n pairs are a mixture
    held_out = list(itertools.chain.from_iterable(zip(*(s.held_out for s in splits.values()), strict=True)))
    work = {
        "model": loading.resolve(loading.EMBEDDED),
        "train": [final(*pair) for turn in zip(*(s.train for s in splits.values()), strict=True) for pair in turn],
        "held_out": [final(*pair) for pair in held_out],
        "participants": {name: s.train for name, s in splits.items()},
        "texts": [source for source, _ in held_out[: int(texts)]],
        "new_tokens": int(new_tokens),
    }
    Path(path).write_text(json.dumps(work, ensure_ascii=False, indent=1), encoding="utf-8")
    common.answer(train=len(work["train"]), held_out=len(held_out), texts=len(work["texts"]))


def train(path: str, seed: str, precision: str) -> None:
    """`train_locally` over one pass; tokenising is outside the clock, as it is for the peers."""
    from llmchain_fed.data.encoding import encode_examples

    work = common.read_work(path)
    model = LocalModel.from_pretrained(work["model"], lora=common.lora_config(), device="cpu")
    config = TrainingConfig(
        learning_rate=common.LEARNING_RATE,
        batch_size=common.BATCH_SIZE,
        epochs=1,
        weight_decay=0.0,
        precision=precision,
        max_length=common.MAX_LENGTH,
        seed=int(seed),
    )
    data = encode_examples(work["train"], model, max_length=common.MAX_LENGTH)
    rows = common.encode(model.tokenizer, work["train"])
    common.warm_up(model.module, rows, model.pad_id)
    seconds = common.seconds(lambda: train_locally(model, data, config))
    held_out = common.encode(model.tokenizer, work["held_out"])
    common.answer(
        examples_per_s=len(data) / seconds,
        held_out_loss=common.held_out_loss(model.module, held_out, model.pad_id),
        tokens=sum(data.lengths()),
    )


def _chain(model: LocalModel, new_tokens: int) -> LLMChain:
    return LLMChain(
        llm=LocalLLM(model=model, max_new_tokens=new_tokens, min_new_tokens=new_tokens), prompt=common.PROMPT
    )


def _alternate(ours: Callable[[], Any], peer: Callable[[], Any], times: int) -> dict[str, list[float]]:
    """Seconds of both, in turn; who begins changes, so that neither always finds the other's caches."""
    measured: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(times):
        sides = [("ours", ours), ("peer", peer)]
        for name, side in sides if turn % 2 == 0 else sides[::-1]:
            measured[name].append(common.seconds(side))
    return measured


def batch(path: str, precision: str, times: str) -> None:
    """`chain.batch` over all texts against one left-padded `generate` over them by the very same module."""
    work = common.read_work(path)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = LocalModel.from_pretrained(work["model"], dtype=dtype, device="cpu")
    chain = _chain(model, work["new_tokens"])
    inputs = [{"text": text} for text in work["texts"]]
    prompts = [common.PROMPT.format(text=text) for text in work["texts"]]

    def ours() -> list[str]:
        answers: list[str] = chain.batch(inputs)
        return answers

    def yardstick() -> list[str]:
        return bare.generate(model.module, model.tokenizer, prompts, work["new_tokens"])

    answers, theirs = ours(), yardstick()  # warms both up as well
    common.answer(**_alternate(ours, yardstick, int(times)), answers=answers, same_as_generate=answers == theirs)


def chat_batch(path: str, times: str) -> None:
    """`LocalChatModel.batch` over all texts against `LocalLLM.batch` over the very texts that it renders."""
    work = common.read_work(path)
    model = LocalModel.from_pretrained(work["model"], device="cpu")
    length = {"max_new_tokens": work["new_tokens"], "min_new_tokens": work["new_tokens"]}
    chat, llm = LocalChatModel(model=model, **length), LocalLLM(model=model, **length)
    rendered = [chat.render(text) for text in work["texts"]]

    def ours() -> list[str]:
        return [str(message.content) for message in chat.batch(work["texts"])]

    def yardstick() -> list[str]:
        return llm.batch(rendered)

    same = ours() == yardstick()  # warms both up as well
    common.answer(**_alternate(ours, yardstick, int(times)), same_as_llm=same)


def invoke(path: str, how: str, times: str) -> None:
    """`chain.invoke` against the module's own `generate` on the same prompt; `how` is lora or merged."""
    work = common.read_work(path)
    model = LocalModel.from_pretrained(work["model"], lora=common.lora_config(), device="cpu")
    if how == "merged":
        model = LocalModel(model.module.merge_and_unload(), model.tokenizer)
    chain = _chain(model, work["new_tokens"])
    text = sorted(work["texts"], key=len)[len(work["texts"]) // 2]
    prompts = [common.PROMPT.format(text=text)]

    def ours() -> str:
        said: str = chain.invoke({"text": text})
        return said

    def yardstick() -> list[str]:
        return bare.generate(model.module, model.tokenizer, prompts, work["new_tokens"])

    same = [ours()] == yardstick()
    common.answer(**_alternate(ours, yardstick, int(times)), same_as_generate=same)


def aggregate(updates: str) -> None:
    """FedAvg over LoRA updates of 5 M float32 values as they arrive, against `copy_` of as many bytes.

    The updates are as `Update.from_bytes` hands them to the server. Four distinct ones take turns
    (80 MB: more than most caches can store), for the average and for the copy.
    Bytes are those of the updates, counted once, on both sides. `from_bytes` is the server's whole path:
    check the header, read and check the values, add.
    """
    from llmchain_fed.updates import serialization
    from llmchain_fed.updates.aggregation import RunningMean
    from llmchain_fed.updates.collection import Contribution
    from llmchain_fed.updates.update import Expected, Update

    count = int(updates)
    sources = [_lora_values(seed) for seed in range(4)]
    flat = [torch.cat([t.flatten() for t in source.values()]) for source in sources]
    size = 4 * flat[0].numel()
    wanted = Expected(participant="p", round=1, base="b", layout=serialization.describe(sources[0]))
    packed = [
        Update(participant="p", round=1, base="b", tensors=s, num_examples=96, num_tokens=960).to_bytes()
        for s in sources
    ]
    arrived = [Update.from_bytes(data, wanted).tensors for data in packed]
    room = torch.empty_like(flat[0])

    def copy() -> None:
        for i in range(count):
            room.copy_(flat[i % 4])

    def stream() -> None:
        accumulator = RunningMean()
        for i in range(count):
            accumulator.add(Contribution(arrived[i % 4], 96.0))
        accumulator.finish()

    def stream_bytes() -> None:
        accumulator = RunningMean()
        for i in range(count):
            update = Update.from_bytes(packed[i % 4], wanted)
            accumulator.add(Contribution(update.tensors, float(update.num_examples)))
        accumulator.finish()

    copy(), stream(), stream_bytes()
    measured: dict[str, list[float]] = {"copy": [], "ours": [], "from_bytes": []}
    for _ in range(5):
        for name, side in (("copy", copy), ("ours", stream), ("from_bytes", stream_bytes)):
            measured[name].append(count * size / common.seconds(side) / 1e9)
    common.answer(values=flat[0].numel(), **measured)


def _lora_values(seed: int) -> dict[str, torch.Tensor]:
    """420 tensors, 4.9 M values: the shapes of LoRA r=16 on all linear layers of SmolLM2-135M."""
    hidden, narrow, wide = 576, 192, 1536
    shapes = {"q": (hidden, hidden), "k": (hidden, narrow), "v": (hidden, narrow), "o": (hidden, hidden)}
    shapes |= {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for layer, (name, (inputs, outputs)) in itertools.product(range(30), shapes.items()):
        values[f"layers.{layer}.{name}_proj.lora_A"] = torch.randn(16, inputs, generator=generator)
        values[f"layers.{layer}.{name}_proj.lora_B"] = torch.randn(outputs, 16, generator=generator)
    return values


def one_round(path: str) -> None:
    """The clock around `fit`, and the seconds of local training and evaluation that the history tells."""
    work = common.read_work(path)
    model = LocalModel.from_pretrained(work["model"], lora=common.lora_config(), device="cpu")
    participants = {name: [tuple(pair) for pair in pairs] for name, pairs in work["participants"].items()}
    federation = FederatedAveraging(
        _chain(model, work["new_tokens"]),
        participants=participants,
        lr=common.LEARNING_RATE,
        batch_size=common.BATCH_SIZE,
        seed=0,
        evaluation=None,
        progress=False,
    )
    total = common.seconds(lambda: federation.fit(rounds=1))
    history = federation.history
    (record,) = history
    local = sum(participant.seconds for participant in record.participants.values())
    if len(record.trained) < len(participants):
        sys.exit(f"only {record.trained} trained: {history}")
    common.answer(total=total, round=record.seconds, training=local, evaluation=record.evaluation_seconds)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands = (prepare, train, batch, chat_batch, invoke, aggregate, one_round)
    {f.__name__: f for f in commands}[command](*arguments)
