"""A module's own `generation_config` as data for a file, and back, field by field.

Knows transformers' `GenerationConfig`. Knows nothing about what a field does in a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import (
    BaseWatermarkingConfig,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

METADATA = frozenset({"_from_model_config", "transformers_version"})
"""Keys of `GenerationConfig().to_dict()` that say where a configuration comes from, not what it does."""


def names() -> list[str]:
    """Every field that the installed transformers knows, in its order."""
    return [name for name in GenerationConfig().to_dict() if name not in METADATA]


def to_data(config: GenerationConfig) -> dict[str, Any]:
    """Every field that is set, as plain data for JSON or YAML: raw values, nothing validated.

    Tuples become lists, a `sequence_bias` the list of pairs that transformers takes as well, a watermark its settings.
    Left out is what is no data (`compile_config` and other objects) and has no effect on an answer here.

    >>> to_data(GenerationConfig(eos_token_id=[1, 2], exponential_decay_length_penalty=(8, 1.5)))
    {'exponential_decay_length_penalty': [8, 1.5], 'eos_token_id': [1, 2]}
    """
    default = GenerationConfig()
    data = {}
    for name in names():
        value = getattr(config, name, None)
        if value is None or value == getattr(default, name):
            continue
        try:
            data[name] = _plain(value)
        except TypeError:
            continue
    return data


def from_data(data: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that `to_data` read, every field as it was, also what transformers calls invalid.

    Raises:
        ValueError: transformers does not know a field, or a value is no data.
    """
    if strange := sorted(map(str, data.keys() - set(names()))):
        msg = f"transformers' GenerationConfig has no field {strange[:3]}"
        raise ValueError(msg)
    config = GenerationConfig()
    for name, value in data.items():
        try:
            plain = _plain(value)
        except TypeError:
            msg = f"generation_config: {name}={value!r:.80} is more than data"
            raise ValueError(msg) from None
        setattr(config, name, _watermark(plain) if name == "watermarking_config" and plain is not None else plain)
    return config


def _plain(value: Any) -> Any:
    """The same in None, bool, int, float, text, list and dict."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, BaseWatermarkingConfig):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return [[_plain(list(key)), _plain(item)] for key, item in value.items()]  # sequence_bias: keys are tuples
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor, an array, a NumPy number
        return _plain(value.tolist())
    raise TypeError(type(value))


def _watermark(data: Any) -> Any:
    sizes = ("sampling_table_size", "context_history_size", "context_width", "ngram_len")
    if isinstance(data, dict) and any(not 0 <= size <= 2**24 for name in sizes if type(size := data.get(name)) is int):
        msg = f"generation_config: watermarking_config={data!r:.120} has a size beyond 2²⁴"
        raise ValueError(msg)
    try:
        kind = SynthIDTextWatermarkingConfig if "ngram_len" in data else WatermarkingConfig
        return kind(**data)
    except TypeError:  # other keys, or no mapping
        msg = f"generation_config: watermarking_config={data!r:.120} is not what transformers writes"
        raise ValueError(msg) from None


class _AsItIs(GenerationConfig):  # type: ignore[misc]
    """A configuration that is written as it is: transformers refuses to write what it only warns of when it reads."""

    def validate(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@contextmanager
def save_without_generation_config(module: nn.Module) -> Iterator[None]:
    """Inside, `module.save_pretrained` works whatever `module.generation_config` is.

    A `temperature` without `do_sample`, as published models ship it, is refused by transformers only when it saves.
    Inside, a stand-in is written, which has the same fields where transformers can read them again, else none; use
    `to_data` to keep them all. The module's own object is back afterwards, untouched.
    """
    own = getattr(module, "generation_config", None)
    if not isinstance(own, GenerationConfig):
        yield
        return
    module.generation_config = _readable(own)
    try:
        yield
    finally:
        module.generation_config = own


def _readable(own: GenerationConfig) -> GenerationConfig:
    stand_in = _AsItIs()
    stand_in.__dict__.update(vars(from_data(to_data(own))))
    if not isinstance(stand_in.watermarking_config, WatermarkingConfig):
        stand_in.watermarking_config = None  # the one of SynthID is written, and read as if it were the other
    try:
        GenerationConfig.validate(stand_in, user_set_attributes=set())  # raises where reading would, warns of nothing
        stand_in.to_json_string()
    except (ValueError, TypeError, AttributeError):
        return _AsItIs()
    return stand_in
