"""What the string face and the chat face of a LocalModel share: fields, call-time options, identity.

Knows pydantic and LocalModel. Knows nothing of LangChain: `llm` and `chat` add that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmchain_fed._config import explain, unknown_option
from llmchain_fed.errors import ConfigError
from llmchain_fed.generation import GenerationOptions, checked_stops
from llmchain_fed.model import LocalModel

OPTIONS = frozenset(GenerationOptions.model_fields)
"""Generation options that a face takes as a field and every call takes as a keyword."""

ALIASES = {"max_tokens": "max_new_tokens"}  # LangChain's standard name → transformers'


class LocalFace(BaseModel):
    """The fields of `LocalLLM` and `LocalChatModel`. Constructors are cheap; only `from_pretrained` reads weights."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: LocalModel = Field(exclude=True, repr=False)
    """what answers; shared, never copied"""
    max_new_tokens: int = 256
    min_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    """strings before which every answer ends, unless a call gives its own"""
    batch_size: int = Field(default=32, ge=1)
    """prompts computed together"""

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _known_options(cls, values: Any) -> Any:
        return cls.check_options(values) if isinstance(values, Mapping) else values

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor options under their own names.

        Raises:
            ConfigError: An unknown option, or a generation option out of range.
        """
        values = {ALIASES.get(k, k): v for k, v in values.items()}
        known = set(cls.model_fields) | {f.alias for f in cls.model_fields.values() if f.alias}
        for name in values.keys() - known - cls._tolerated():
            raise ConfigError(f"{cls.__name__}: {unknown_option(name, known)}")  # noqa: EM102
        GenerationOptions(**{k: v for k, v in values.items() if k in OPTIONS})  # a bad value fails here, not at a call
        return values

    @classmethod
    def _tolerated(cls) -> frozenset[str]:
        """Names that are accepted and mean nothing here."""
        return frozenset()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        lora: LoraConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Self:
        """The short way: `LocalModel.from_pretrained` and this face over it.

        Raises:
            ConfigError: An unknown option.
            MissingExtraError: The embedded model needs the extra `gguf`.
        """
        cls.check_options(options)  # before minutes go into loading
        return cls(model=LocalModel.from_pretrained(name_or_path, lora=lora, dtype=dtype, device=device), **options)

    def options(self, stop: Sequence[str] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for `LocalModel.complete` and `stream`: what was chosen here under a call's own.

        An option that nobody has chosen is left out: its default is the model's to know, and to say what it overrides.

        Raises:
            ConfigError: A keyword that is no generation option.
        """
        given = {ALIASES.get(k, k): v for k, v in overrides.items() if v is not None}
        for name in given.keys() - OPTIONS:
            raise ConfigError(unknown_option(name, {*OPTIONS, "stop"}))
        own = {name: getattr(self, name) for name in OPTIONS & self.model_fields_set}
        return own | given | {"stop": self.stop if stop is None else stop}

    def identity(self) -> dict[str, Any]:
        """What decides an answer: base, weights as they are now, and options. The key of any answer cache."""
        return {
            "model_name": self.model.name,
            "base": self.model.fingerprint(),
            "adapter": self.model.adapter,
            "weights_version": self.model.weights_version,
            "batch_size": self.batch_size,
            "stop": self.stop,
        } | {name: getattr(self, name) for name in sorted(OPTIONS)}

    def standard_params(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """LangSmith's standard parameters."""
        given = self.options(None, {k: v for k, v in kwargs.items() if k in OPTIONS | ALIASES.keys()})
        name = kwargs.get("model")
        return {
            "ls_provider": "llmchain_fed",
            "ls_model_name": name if isinstance(name, str) else self.model.name,
            "ls_temperature": given.get("temperature", self.temperature),
            "ls_max_tokens": given.get("max_new_tokens", self.max_new_tokens),
        }


SAVED = LocalFace.model_fields.keys() - {"model"}
"""The fields that a saved chain holds."""


def check_saved(options: Mapping[str, Any], llm_kwargs: Mapping[str, Any]) -> None:
    """Makes sure that a saved chain's fields and call-time keywords are what they were when they were saved.

    Raises:
        ConfigError: An unknown option, or one out of range.
    """
    for name in options.keys() - SAVED:
        raise ConfigError(unknown_option(name, SAVED))
    kwargs = {ALIASES.get(k, k): v for k, v in llm_kwargs.items() if v is not None}
    checked_stops(kwargs.pop("stop", None))
    GenerationOptions(**kwargs)
    GenerationOptions(**{k: v for k, v in options.items() if k in OPTIONS})
