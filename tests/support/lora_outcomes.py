"""What a module with adapters says by its own forward, before and after a little training."""

from __future__ import annotations

import torch
from tiny import PAIRS

from llmchain_fed import TrainingConfig, train_locally


def batch(kind="causal"):
    ids = torch.arange(2, 26)[None]
    labels = {"labels": ids.clone()} if kind == "causal" else {"labels": torch.arange(5, 14)[None]}
    return {"input_ids": ids} | labels


def outcome(module, kind="causal"):
    """Loss and logits by the module's own forward."""
    with torch.no_grad():
        found = module(**batch(kind))
    return found.loss, found.logits


def trained(chain):
    config = TrainingConfig(learning_rate=0.02, batch_size=4, max_steps=2)
    train_locally(chain, PAIRS[:8], config)
    return chain
