"""Loads a model by name: module and tokenizer, with a LoRA adapter where one is wanted, on the best device.

Knows transformers' and PEFT's loaders and the embedded default. Knows nothing of what is done with the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from llmchain_fed import embedded, wrapping
from llmchain_fed.errors import UnsupportedModelError


def load(
    name_or_path: str, *, lora: LoraConfig | None, dtype: torch.dtype | None, device: str | torch.device | None
) -> tuple[nn.Module, Any]:
    """The module in evaluation mode, and its tokenizer; see `LocalModel.from_pretrained`."""
    path = embedded.resolve(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path)
        seq2seq = bool(config.is_encoder_decoder)
        module = wrapping.loader_of(config).from_pretrained(path, dtype=dtype or torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        msg = f"{name_or_path!r} cannot be loaded as a model with safetensors weights and a tokenizer: {error}"
        raise UnsupportedModelError(msg) from error
    if lora is not None:
        lora = copy.deepcopy(lora)
        lora.task_type = lora.task_type or (TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM)
        module = add_adapter(module, lora)
    return module.to(device or _best_device()).eval(), tokenizer


def add_adapter(module: Any, config: PeftConfig) -> PeftModel:
    """PEFT's own wrapping, its random start drawn from a fixed seed; see `wrapping.wrap`."""
    return wrapping.wrap(module, config)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
