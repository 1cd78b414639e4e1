"""What every side of a benchmark shares: the work, the LoRA, plain torch batches, a naive held-out loss.

Knows torch, transformers and PEFT alone, because it runs in the peers' environment too. Knows nothing of
llmchain_fed.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "Translate the following text to French: {text}\n"
IGNORE = -100
BATCH_SIZE = 16
LEARNING_RATE = 5e-4
MAX_LENGTH = 512  # tokens: no pair comes near it, so nobody cuts or drops any

Row = tuple[list[int], list[int]]  # prompt ids, completion ids with the end token


def lora_config() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def read_work(path: str) -> dict[str, Any]:
    """What `ours.py prepare` wrote: model folder, train and held_out pairs, texts to generate from."""
    work: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return work


def answer(**result: Any) -> None:
    """The one line that the runner reads."""
    print("RESULT " + json.dumps(result), flush=True)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def load(folder: str, *, lora: bool) -> tuple[Any, Any]:
    """The float32 module, with the same adapter at the same random start on every side, and its tokenizer."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        torch.manual_seed(0)
        module = get_peft_model(module, lora_config())
    return module.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, pairs: list[dict[str, str]]) -> list[Row]:
    prompts = tokenizer([p["prompt"] for p in pairs])["input_ids"]
    completions = tokenizer([p["completion"] for p in pairs], add_special_tokens=False)["input_ids"]
    return [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def count_tokens(rows: list[Row]) -> int:
    return sum(len(p) + len(c) for p, c in rows)


def collate(rows: list[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) ids, attention mask and labels, padded on the right."""
    width = max(len(p) + len(c) for p, c in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORE)
    mask = torch.zeros_like(ids)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
        mask[i, : len(p) + len(c)] = 1
    return ids, mask, labels


def length_sorted_batches(rows: list[Row], seed: int) -> Iterator[list[Row]]:
    """Neighbours in length share a batch; the batches come in random order."""
    order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    batches = [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    random.Random(seed).shuffle(batches)
    yield from batches


def warm_up(module: nn.Module, rows: list[Row], pad: int) -> None:
    """Two forward and backward passes and no step: kernels are chosen, memory is mapped, the weights stay."""
    for _ in range(2):
        ids, mask, labels = collate(rows[:BATCH_SIZE], pad)
        module(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        module.zero_grad()


@torch.no_grad()
def held_out_loss(module: nn.Module, rows: list[Row], pad: int) -> float:
    """nats per completion token in float32, by the module's own forward: the same judge for every side."""
    module.eval()
    total, tokens = 0.0, 0
    order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for i in range(0, len(order), BATCH_SIZE):
        ids, mask, labels = collate(order[i : i + BATCH_SIZE], pad)
        logits = module(input_ids=ids, attention_mask=mask).logits.float()[:, :-1]
        summed = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
        total, tokens = total + float(summed), tokens + int((labels != IGNORE).sum())
    return total / tokens
