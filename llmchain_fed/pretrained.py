"""Loads a model by name: module and tokenizer, with a LoRA adapter where one is wanted, on the best device.

Knows transformers' and PEFT's loaders and the embedded default. Knows nothing of what is done with the model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from llmchain_fed import embedded, pristine, wrapping
from llmchain_fed.adapters.lora_config import check_config
from llmchain_fed.errors import UnsupportedModelError


def load(
    name_or_path: str, *, lora: LoraConfig | None, dtype: torch.dtype | None, device: str | torch.device | None
) -> tuple[nn.Module, Any]:
    """The module in evaluation mode, and its tokenizer; see `LocalModel.from_pretrained`."""
    if lora is not None:
        check_config(lora)
    module: Any = load_base(name_or_path, dtype=dtype or torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(embedded.resolve(name_or_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    if lora is not None:
        lora = copy.deepcopy(lora)
        seq2seq = bool(module.config.is_encoder_decoder)
        lora.task_type = lora.task_type or (TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM)
        module = add_adapter(module, lora)
    return module.to(device or best_device()).eval(), tokenizer


def load_base(name_or_path: str, *, dtype: torch.dtype) -> nn.Module:
    """The bare module on the CPU, in evaluation mode; one with a name remembers what it was when it was loaded.

    Raises:
        UnsupportedModelError: There is no such model, or none with safetensors weights.
    """
    path = embedded.resolve(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        loader = wrapping.loader_of(config)
        module = loader.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    if not Path(name_or_path).exists() and not getattr(module, "is_quantized", False):  # what is packed has no rows
        pristine.record(module)
    base: nn.Module = module.eval()
    return base


def _unloadable(name: str, error: Exception) -> UnsupportedModelError:
    msg = f"{name!r} cannot be loaded as a model with safetensors weights and a tokenizer: {error}"
    return UnsupportedModelError(msg)


def add_adapter(module: Any, config: PeftConfig, *, quiet: bool = False) -> PeftModel:
    """PEFT's own wrapping, its random start drawn from a fixed seed; see `wrapping.wrap`."""
    return wrapping.wrap(module, config, quiet=quiet)


def best_device() -> str:
    """CUDA or MPS when there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
