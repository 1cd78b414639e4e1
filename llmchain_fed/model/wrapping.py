"""PEFT's wrapping with this package's errors, and which of transformers' classes reads a saved model.

Knows PEFT's and transformers' names. Knows nothing of what is done with the model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model import weights

_MAMBA = ("conv1d", "out_proj")  # their kernels read these weights past the layer, so PEFT refuses them


def loader_of(config: Any) -> Any:
    """The class whose `from_pretrained` reads a text model of this configuration.

    One of the two automatic classes, else the class that the configuration itself names among transformers' own: a
    model that also takes images or sound is in neither of their tables.
    """
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) in auto._model_mapping:
        return auto
    for name in config.architectures or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is type(config):  # type: ignore[attr-defined]
            return named
    return auto


@contextmanager
def every_tensor_saved(module: Any) -> Iterator[None]:
    """Inside, `save_pretrained` also writes what the class can make anew (Marian's positions): it may have learnt."""
    left_out = getattr(module, "_keys_to_ignore_on_save", None)
    if left_out is None:
        yield
        return
    module._keys_to_ignore_on_save = None
    try:
        yield
    finally:
        module._keys_to_ignore_on_save = left_out


def wrap(module: Any, config: PeftConfig, *, quiet: bool = False) -> PeftModel:
    """`get_peft_model`, with its random start drawn from a fixed seed.

    If `quiet`, PEFT's warnings were given before and are not repeated.

    Raises:
        UnsupportedModelError: This adapter does not fit this module; the message says why, and which modules it has.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an old name; nobody who uses this package can do anything about it
        # (no upstream report found; the code: https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # said of GPT-2's Conv1D, and mended by PEFT in the same breath
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # advice for a call that is made here (peft 0.21, mapping_func.py)
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage", UserWarning)
        if quiet:
            warnings.simplefilter("ignore")
        torch.manual_seed(0)
        offered, wanted = _targets(module), _shortened(repr(getattr(config, "target_modules", None)))
        try:
            wrapped = get_peft_model(module, config)
            weights.trainable_parameters(wrapped)
        except UnsupportedModelError as error:
            why = "it would put two factors of one name on a module that has several weights (a mixture of experts)"
            raise UnsupportedModelError(_refusal(module, config, wanted, why, offered)) from error
        except Exception as error:
            why = f"{type(error).__name__}: {_shortened(str(error))}"
            raise UnsupportedModelError(_refusal(module, config, wanted, why, offered)) from error
    return wrapped


def _targets(module: Any) -> list[str]:
    """The last names of linear layers that an adapter can stand on, the commonest first."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    plain = (nn.Linear, Conv1D)
    names = Counter(n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, plain) and m is not head)
    mamba = any(n.rpartition(".")[2] == "conv1d" for n, _ in module.named_modules())
    return [n for n, _ in names.most_common() if n and not n.isdigit() and not (mamba and n in _MAMBA)]


def _refusal(module: nn.Module, config: PeftConfig, wanted: str, why: str, offered: list[str]) -> str:
    shown = ", ".join(repr(n) for n in offered[:12]) + (", …" if len(offered) > 12 else "")
    return (
        f"PEFT cannot put {type(config).__name__}(target_modules={wanted}) on "
        f"{type(module).__name__}: {why}. Name target_modules among its linear layers: {shown or 'it has none'}."
    )


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}…"
