"""Tiny models that know their phrase book: varied answers, with end tokens and multi-byte characters.

A random model repeats one token, which would hide most mistakes in cutting and streaming text. Taught with a plain
torch loop, not with the library's own.
"""

from __future__ import annotations

import copy
import functools

import torch
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from llmchain_fed import LocalModel

PROMPTS = [TEMPLATE.format(text=english) for english, _ in PAIRS]  # of different lengths in tokens
ANSWERS = [french for _, french in PAIRS]
STEPS = {"causal": 130, "seq2seq": 180}


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@functools.cache
def _module(kind: str) -> torch.nn.Module:
    tokenizer = _tokenizer()
    module = tiny_module(kind, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=8e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS[kind])
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    answers = [tokenizer(a)["input_ids"] + [1] for a in ANSWERS]
    if kind == "causal":
        ids = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
        labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    else:
        ids, labels = [torch.tensor(p) for p in prompts], [torch.tensor(a) for a in answers]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    for _ in range(STEPS[kind]):
        optimizer.zero_grad()
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def taught_model(kind: str = "causal", *, lora: bool = False) -> LocalModel:
    """A fresh LocalModel that translates `PROMPTS` to `ANSWERS`; with LoRA a random adapter disturbs it a little."""
    module = copy.deepcopy(_module(kind))
    if lora:
        module = with_lora(module, lora_config(kind), seed=3)
    return LocalModel(module, copy.deepcopy(_tokenizer()), name="taught")
