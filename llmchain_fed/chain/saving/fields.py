"""The fields of a saved chain's files about its model: each with its type and its range.

Knows PEFT's LoraConfig and what `save` writes of it. Knows nothing of LangChain, nor what is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig, TaskType
from pydantic import AfterValidator, Field

from llmchain_fed.errors import ChainFileError
from llmchain_fed.model.adapters.resolved import NAME, Layer, scaling_of
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.recipes.schema import HUB_ID
from llmchain_fed.untrusted import Strict, checked, read_file, read_json, shown

SETTINGS = "adapter_config.json"
DType = Literal["float32", "bfloat16", "float16", "float64"]
_MOST = 16 * 2**20  # bytes of the settings; 700 layers and 100,000 trained tokens take 2 MB


def _counts(alpha: float) -> float:
    if not 1e-6 <= abs(alpha) <= 1e9:
        msg = "what the factors count by is at least 1e-6 and at most 1e9"
        raise ValueError(msg)
    return alpha


Name = Annotated[str, Field(pattern=NAME, max_length=512)]
Names = Annotated[list[Name], Field(max_length=2**16, fail_fast=True)]
Rank = Annotated[int, Field(ge=1, le=2**20)]
Alpha = Annotated[int | float, Field(allow_inf_nan=False), AfterValidator(_counts)]
# a pattern for each of the layers at most, which `read_settings` makes sure of
Ranks = Annotated[dict[Name, Rank], Field(max_length=2**16)]
Alphas = Annotated[dict[Name, Alpha], Field(max_length=2**16)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**22, fail_fast=True)]
_MOST_FIELDS = 10_000  # of a configuration of transformers, which has some hundred


class AdapterSettings(Strict):
    """`adapter_config.json`: all of PEFT's settings that are read from it."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None
    inference_mode: bool
    r: Rank
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Names
    target_parameters: Names | None
    rank_pattern: Ranks
    alpha_pattern: Alphas
    modules_to_save: Names | None
    trainable_token_indices: Annotated[dict[Name, Tokens], Field(max_length=64)] | None
    ensure_weight_tying: bool
    bias: Literal["none"]
    lora_bias: bool
    use_dora: bool
    use_rslora: bool
    fan_in_fan_out: bool
    init_lora_weights: Literal[True]

    def layers(self) -> dict[str, Layer]:
        """Name → rank and scaling, as the settings have them."""
        found = {}
        for name in [*self.target_modules, *(self.target_parameters or [])]:
            rank = self.rank_pattern.get(name, self.r)
            alpha = self.alpha_pattern.get(name, self.lora_alpha)
            found[name] = Layer(rank, scaling_of(alpha, rank, rslora=self.use_rslora))
        return found

    def to_peft(self) -> LoraConfig:
        """PEFT's configuration, ready to be trained."""
        values = self.model_dump() | {"inference_mode": False, "task_type": TaskType(self.task_type)}
        # the fingerprint has checked the base; with a name PEFT would look for it, and warn
        values["base_model_name_or_path"] = None
        layers = self.layers()
        for kind in ("rank_pattern", "alpha_pattern"):
            values[kind] = _grouped({n: v for n, v in values[kind].items() if n in layers})
        del values["peft_type"]
        return LoraConfig(**values)


def _grouped(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """One pattern per value: PEFT tries each on each layer, as a regular expression that it compiles anew."""
    names: dict[Any, list[str]] = {}
    for name, value in patterns.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(group): value for value, group in names.items()}


class Trained(Strict):
    """Of an adapter that was saved with a frozen remainder: which of its columns are trained, and how they count."""

    r: Rank
    """the first so many columns of every layer are the trained factors"""
    lora_alpha: Alpha
    rank_pattern: Ranks
    """layers with another number of trained columns"""
    alpha_pattern: Alphas


class ModelData(Strict):
    """Which base the chain stands on, whether its weights lie in the directory, and what else decides its answers."""

    name: Annotated[str, Field(max_length=1000)]
    reference: Annotated[str, Field(pattern=HUB_ID, max_length=200)] | None
    """embedded name or hub id to load the base from; None: it lies in `base/` or must be passed"""
    fingerprint: Annotated[str, Field(max_length=100)]
    digest: Annotated[str, Field(max_length=100)] | None
    """over every value of the base as it answered; None where only its owner knows how it is loaded"""
    dtype: DType
    kind: Literal["causal", "seq2seq"]
    dequantised_from: Annotated[str, Field(max_length=1000)] | None = None
    """the base's weights are those of this quantised file, not the ones on the hub"""
    vocabulary: int | None = Field(default=None, ge=1, lt=2**31)
    """rows of the embeddings, where they were resized since the base was loaded"""
    config: dict[str, Any] = Field(default_factory=dict, max_length=_MOST_FIELDS)
    """fields of the module's configuration with another value than the base's own"""
    generation: Annotated[dict[str, Any], Field(max_length=_MOST_FIELDS)] | None = None
    """every field of the module's generation_config that is set; None without one"""
    trained: Trained | None = None
    """which of the adapter's columns are trained; None: all of them"""


def read_settings(folder: Path) -> AdapterSettings:
    """`adapter_config.json`, read as data: PEFT's own reader would take any of its settings.

    Raises:
        ChainFileError: It contains anything but what `save` writes.
    """
    path = folder / SETTINGS
    found = read_json(
        read_file(path, most=_MOST, what="the file", error=ChainFileError),
        most=_MOST,
        what=shown(str(path), 300),
        error=ChainFileError,
    )
    own = checked(AdapterSettings, found, what=shown(str(path), 300), error=ChainFileError, remedy=SAVE_AGAIN)
    layers = own.layers().keys()
    if strange := sorted({*own.rank_pattern, *own.alpha_pattern} - layers):
        msg = f"{str(path)!r} sets {strange[0]!r}, which is no layer of the adapter. {SAVE_AGAIN}"
        raise ChainFileError(msg)
    return own
