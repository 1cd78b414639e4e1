"""The yardstick: what a careful person would write by hand for this one model, in as few lines as it takes.

Training with length-sorted batches and logits on completion tokens only, and one left-padded `generate`. It
has no options, no checks, no reports; the package may cost 5 % more than this.

    python tests/benchmarks/bare.py WORK.json SEED
"""

import sys
import time
from typing import Any

import common
import torch
import torch.nn.functional as F


def train(work: dict[str, Any], seed: int) -> None:
    module, tokenizer = common.load(work["model"], lora=True)
    rows = common.encode(tokenizer, work["train"])
    common.warm_up(module, rows, tokenizer.pad_token_id)
    causal = module.get_base_model()
    decoder, head = causal.model, causal.lm_head
    module.train()

    started = time.perf_counter()
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=common.LEARNING_RATE, weight_decay=0.0
    )
    for batch in common.length_sorted_batches(rows, seed):
        ids, mask, labels = common.collate(batch, tokenizer.pad_token_id)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
        wanted = labels[:, 1:] != common.IGNORE
        loss = F.cross_entropy(head(hidden[wanted]), labels[:, 1:][wanted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started

    held_out = common.encode(tokenizer, work["held_out"])
    common.answer(
        examples_per_s=len(rows) / seconds,
        held_out_loss=common.held_out_loss(module, held_out, tokenizer.pad_token_id),
        tokens=common.count_tokens(rows),
    )


def generate(module: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """One left-padded, greedy `generate` over all prompts, each answer exactly `new_tokens` long."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    with torch.inference_mode():
        output = module.generate(**batch, **length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new: list[str] = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return new


if __name__ == "__main__":
    train(common.read_work(sys.argv[1]), int(sys.argv[2]))
