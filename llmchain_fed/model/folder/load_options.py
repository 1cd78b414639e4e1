"""What `from_pretrained` is asked for beside a name, checked before minutes go into reading weights.

Knows torch's types and devices and transformers' quantisation settings. Knows nothing about files or adapters.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmchain_fed._config import unknown_option
from llmchain_fed.errors import ConfigError, MissingExtraError, UnsupportedModelError

EMBEDDED = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPTIONS = ("lora", "dtype", "device", "quantization_config", "revision")
"""what `from_pretrained` takes by name, on a LocalModel and on both faces"""
Dtype = torch.dtype | Literal["auto"] | str | None
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64,
}  # fmt: skip
_FOUR_BITS = "quantization_config=BitsAndBytesConfig(load_in_4bit=True), of transformers"
_YOURSELF = "nothing: load the model with transformers yourself, and pass LocalModel(module, tokenizer)"
_MEANT = {
    "load_in_4bit": _FOUR_BITS,
    "load_in_8bit": _FOUR_BITS.replace("4bit", "8bit"),
    "bnb_config": _FOUR_BITS,
    "torch_dtype": "dtype=, a torch dtype or 'auto'",
    "precision": "dtype=, a torch dtype or 'auto'",
    "device_map": "device=, one device for all of the model",
    "peft_config": "lora=LoraConfig(…)",
    "lora_config": "lora=LoraConfig(…)",
    "trust_remote_code": "nothing: code out of a model's folder is never run",
    "token": "the environment variable HF_TOKEN",
    "use_auth_token": "the environment variable HF_TOKEN",
    "cache_dir": "the environment variable HF_HOME",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "attn_implementation": _YOURSELF,
    "model_kwargs": _YOURSELF,
    "pipeline_kwargs": "nothing: max_new_tokens=, temperature= … are options of LocalLLM themselves",
}
_PACKAGES = {
    "bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto", "hqq": "hqq",
    "gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors", "aqlm": "aqlm",
}  # fmt: skip


def meant_in_loading(name: str) -> str | None:
    """Where an option is that transformers or langchain-huggingface have by this name.

    >>> meant_in_loading("torch_dtype")
    "here it is dtype=, a torch dtype or 'auto'"
    """
    return f"here it is {_MEANT[name]}" if name in _MEANT else None


def unknown_of_face(kind: str, name: str, known: Iterable[str], *, loads: bool) -> ConfigError:
    """The error of an option that a face over a model does not have, when it `loads` one and when it is given one."""
    if name in OPTIONS and not loads:
        return ConfigError(f"{kind}: `{name}` is how a model is loaded: {kind}.from_pretrained(…, {name}=…).")
    valid = {*known, *OPTIONS} - {"model"} if loads else {*known}
    return ConfigError(f"{kind}: {unknown_option(name, valid, meant_in_loading(name))}")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is read."""

    dtype: torch.dtype | Literal["auto"]
    device: torch.device | None
    quantization: Any = None
    revision: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        *,
        dtype: Dtype = None,
        device: str | torch.device | None = None,
        quantization_config: Any = None,
        revision: str | None = None,
    ) -> LoadOptions:
        """The options, if they make sense here.

        Raises:
            ConfigError: One does not.
            MissingExtraError: The quantisation needs a library that is not installed.
        """
        if revision is not None and (not isinstance(revision, str) or not revision):
            msg = f"revision is a branch, a tag or a commit on the hub, got {revision!r:.80}."
            raise ConfigError(msg)
        if revision is not None and (name == EMBEDDED or Path(name).exists()):
            msg = (
                f"revision={revision!r:.80} is one of the hub's, and {name!r:.200} is read from this machine. Leave it "
                f"out, or give the model's id on the hub{f', {HUB_ID}' if name == EMBEDDED else ''}."
            )
            raise ConfigError(msg)
        _check_quantization(quantization_config)
        return cls(_dtype(dtype), _device(device), quantization_config, revision)

    def kwargs(self, device: str | torch.device) -> dict[str, Any]:
        """Keywords for transformers' `from_pretrained`; what is quantised is put on its device there and then."""
        found: dict[str, Any] = {"dtype": self.dtype} | self.where
        if self.quantization is not None:
            found |= {"quantization_config": self.quantization, "device_map": {"": device}}
        return found

    @property
    def where(self) -> dict[str, Any]:
        """Which version, for whatever is read of the hub."""
        return {} if self.revision is None else {"revision": self.revision}


def checked_name(name: Any) -> str:
    """The name or path as text.

    Raises:
        ConfigError: It is neither.
        UnsupportedModelError: It is the embedded model's but for a letter or two.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str) or not name.strip():
        msg = (
            f"a model is loaded by its hub id, its folder or the name {EMBEDDED!r}, got {type(name).__name__} "
            f"{name!r:.80}. A module that is loaded already is wrapped: LocalModel(module, tokenizer)."
        )
        raise ConfigError(msg)
    if "/" in name or name == EMBEDDED or os.path.lexists(name):
        return name
    if difflib.get_close_matches(name.lower(), [EMBEDDED], cutoff=0.7):
        msg = f"there is no model {name!r:.100} here; did you mean {EMBEDDED!r}, the embedded one?"
        raise UnsupportedModelError(msg)
    return name


def _dtype(given: Dtype) -> torch.dtype | Literal["auto"]:
    if given is None:
        return torch.float32
    if given == "auto":
        return "auto"
    found = _DTYPES.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        msg = (
            f"dtype={given!r:.80} is no type that weights are computed in. Use torch.float32, torch.bfloat16, "
            "torch.float16 or 'auto'; for fewer bits there is quantization_config=."
        )
        raise ConfigError(msg)
    return found


def _device(given: str | torch.device | None) -> torch.device | None:
    if given is None:
        return None
    try:
        found = torch.device(given)
        torch.empty(0, device=found)
    except Exception as error:  # each kind of device has an error of its own
        why = str(error).partition("\n")[0].partition(". ")[0]
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        meant = " A graphics processor of NVIDIA's or AMD's is 'cuda'." if given == "gpu" else ""
        msg = (
            f"device={given!r:.80} cannot be used ({why:.200}).{meant} Here there is {', '.join(there)}; left out, the "
            "best one is taken."
        )
        raise ConfigError(msg) from None
    return found


def _check_quantization(given: Any) -> None:
    if given is None:
        return
    known = isinstance(given, QuantizationConfigMixin)
    if not known and not (isinstance(given, Mapping) and "quant_method" in given):
        msg = (
            f"quantization_config is one of transformers', such as BitsAndBytesConfig(load_in_4bit=True), got "
            f"{type(given).__name__} {given!r:.80}."
        )
        raise ConfigError(msg)
    method = getattr(given, "quant_method", None) if known else given["quant_method"]
    method = str(getattr(method, "value", method))
    package = _PACKAGES.get(method)
    if package is not None and not _is_there(package):
        msg = (
            f"quantisation by {method} needs the package {package.partition('.')[0]}, which is not installed: "
            f"pip install {package.replace('.', '-')}"
        )
        raise MissingExtraError(msg)


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
