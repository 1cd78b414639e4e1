"""What becomes in a call of each field of a module's own `generation_config`.

Knows transformers' `GenerationConfig`. Knows nothing about prompts, answers or files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import GenerationConfig

from llmchain_fed.errors import ConfigError
from llmchain_fed.model.generation.saved import METADATA, names

Treatment = Literal["model", "beams", "sampling", "option", "stop", "none"]


class Field(NamedTuple):
    """What a call does with one field that the model ships."""

    treatment: Treatment
    """model: applies as shipped; beams, sampling: applies in such a call; option: an option of this package decides;
    stop: ends answers like `stop=`; none: without effect"""
    same: tuple[Any, ...] = ()
    """values, besides None, that change nothing, so that nothing needs to be said about them"""
    option: str = ""
    """which option decides, for a field that one does"""


_MODEL, _OFF, _ONE = Field("model"), Field("none", (False,)), Field("none", (1,))
FIELDS: Mapping[str, Field] = {
    # length
    "max_length": Field("option", (), "max_new_tokens"),
    "max_new_tokens": Field("option", (), "max_new_tokens"),
    "min_length": _MODEL,
    "min_new_tokens": _MODEL,
    "early_stopping": Field("beams", (False,), "num_beams"),
    "max_time": Field("none"),  # an answer would depend on how fast the machine is
    "stop_strings": Field("stop", ([],)),
    # strategy
    "do_sample": Field("option", (False,), "temperature"),
    "num_beams": Field("option", (1,), "num_beams"),
    "use_mtp": _OFF,
    # cache: where keys and values lie while an answer is made. "hybrid" is what transformers itself passes over
    "use_cache": _MODEL,
    "cache_implementation": Field("none", ("dynamic", "hybrid")),
    "cache_config": Field("none", ({},)),
    "max_cache_len": Field("none"),
    # logits
    "temperature": Field("option", (0.0, 1.0), "temperature"),
    "top_k": Field("option", (0,), "top_k"),
    "top_p": Field("option", (1.0,), "top_p"),
    "min_p": Field("sampling", (0.0,), "temperature"),
    "top_h": Field("sampling", (), "temperature"),
    "typical_p": Field("sampling", (1.0,), "temperature"),
    "epsilon_cutoff": Field("sampling", (0.0,), "temperature"),
    "eta_cutoff": Field("sampling", (0.0,), "temperature"),
    "repetition_penalty": Field("option", (1.0,), "repetition_penalty"),
    "encoder_repetition_penalty": _MODEL,
    "length_penalty": Field("beams", (1.0,), "num_beams"),
    "no_repeat_ngram_size": Field("option", (0,), "no_repeat_ngram_size"),
    "bad_words_ids": _MODEL,
    "renormalize_logits": _MODEL,
    "forced_bos_token_id": _MODEL,
    "forced_eos_token_id": _MODEL,
    "remove_invalid_values": _MODEL,
    "exponential_decay_length_penalty": _MODEL,
    "suppress_tokens": _MODEL,
    "begin_suppress_tokens": _MODEL,
    "sequence_bias": _MODEL,
    "token_healing": _OFF,  # rewrites the prompt
    "guidance_scale": _ONE,  # wants a second prompt to guide away from
    "watermarking_config": _MODEL,
    # what `generate` returns besides the answer
    "num_return_sequences": _ONE,
    "output_attentions": _OFF,
    "output_hidden_states": _OFF,
    "output_scores": _OFF,
    "output_logits": _OFF,
    "return_dict_in_generate": _OFF,
    # tokens; the end and padding tokens come from `Tokens`, which reads these two and the tokenizer
    "pad_token_id": _MODEL,
    "bos_token_id": _MODEL,
    "eos_token_id": _MODEL,
    "decoder_start_token_id": _MODEL,
    "encoder_no_repeat_ngram_size": _MODEL,
    # assisted generation: a second model, or guesses, for speed
    "is_assistant": _OFF,
    "num_assistant_tokens": Field("none", (20,)),
    "num_assistant_tokens_schedule": Field("none", ("constant",)),
    "assistant_confidence_threshold": Field("none", (0.4,)),
    "prompt_lookup_num_tokens": Field("none"),
    "max_matching_ngram_size": Field("none"),
    "assistant_early_exit": Field("none"),
    "assistant_lookbehind": Field("none", (10,)),
    "target_lookbehind": Field("none", (10,)),
    "assistant_ensemble_weight": Field("none"),
    "speculation_type": Field("none"),
    # speed
    "compile_config": Field("none"),
    "disable_compile": _MODEL,
    "continuous_batching_config": Field("none"),
    "prefill_chunk_size": Field("none"),
    # strategies that transformers 5 only runs with code from the hub
    "low_memory": _OFF,
    "penalty_alpha": Field("none", (0.0,)),
    "dola_layers": Field("none"),
    "diversity_penalty": Field("none", (0.0,)),
    "num_beam_groups": _ONE,
    "constraints": Field("none", ([],)),
    "force_words_ids": Field("none", ([],)),
}
"""Every field of transformers 5.24; one that a later version adds is without effect until it stands here."""
_WITHOUT_EFFECT = Field("none")

_LOG = logging.getLogger("llmchain_fed")


def shipped(own: Any, *, sampling: bool, beams: bool) -> dict[str, Any]:
    """The fields that apply as the model ships them in such a call, with the entries that only this model knows."""
    if own is None:
        return {}
    applying = {"model", *(["sampling"] if sampling else []), *(["beams"] if beams else [])}
    known = set(names())
    values = {n: v for n, v in vars(own).items() if n not in METADATA and not n.startswith("_") and v is not None}
    values = {n: v for n, v in values.items() if n not in known or _field(n).treatment in applying}
    empty = {n for n, v in values.items() if isinstance(v, (list, tuple, dict, set)) and not v}
    return {n: v for n, v in values.items() if n not in known or n not in empty}


def stop_strings(own: Any) -> tuple[str, ...]:
    """The stop strings that the model ships."""
    stops = getattr(own, "stop_strings", None)
    return (stops,) if isinstance(stops, str) else tuple(stops or ())


def reads_padding(own: Any, *, seq2seq: bool, pad: int) -> bool:
    """True when a field looks at the prompt's padding or length, so that only prompts of one length go together."""
    if own is None:
        return False
    if (own.encoder_repetition_penalty or 1.0) != 1.0 or own.encoder_no_repeat_ngram_size:
        return True
    if seq2seq:
        return False  # these read the answer alone
    biased = [*_sequences(own.bad_words_ids), *_sequences(own.sequence_bias)]
    return bool(
        own.min_length  # counts the prompt
        or own.forced_bos_token_id is not None  # acts where the prompt is a single token
        or own.watermarking_config is not None
        or any(pad in ids and len(ids) > 1 for ids in biased)
    )


def _overridden(own: Any, options: Any, explicit: Collection[str]) -> dict[str, Any]:
    """What the model ships and defaults of this package, not what the caller chose, override: field → value."""
    sampling, beams = options.temperature > 0, options.num_beams > 1
    found = {}
    for name, value in _set(own):
        field = _field(name)
        if field.treatment == "sampling":
            counts = not sampling
        elif field.treatment == "beams":  # without beams of its own the model makes nothing of these either
            counts = not beams and (own.num_beams or 1) > 1
        else:
            counts = field.treatment == "option" and value != getattr(options, name, None)
        deciding = {field.option} if sampling or name not in ("top_k", "top_p") else {field.option, "temperature"}
        if counts and not deciding & set(explicit):
            found[name] = value
    if not sampling and found.get("top_k") == 50:  # transformers' own default, in old files
        del found["top_k"]
    return found


def say(model: str, own: Any, options: Any, explicit: Collection[str], *, said: set[str]) -> None:
    """Logs what a model ships and a call does not follow, each field once; `said` grows by them."""
    others = {n: v for n, v in _overridden(own, options, explicit).items() if n not in said}
    idle = {n: v for n, v in _set(own) if _field(n).treatment == "none" and n not in said}
    said |= {*others, *idle}
    if others:
        options = ", ".join(dict.fromkeys(f"{_field(name).option}=" for name in others))
        _LOG.warning(
            "%s: its generation_config has %s, overridden by this package's defaults (greedy, one beam, 256 tokens, no "
            "penalty). Give %s to choose.", model, _listed(others), options,
        )  # fmt: skip
    if idle:
        _LOG.warning("%s: its generation_config has %s, without effect here.", model, _listed(idle))


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.60}" for name, value in fields.items())


def _set(own: Any) -> list[tuple[str, Any]]:
    """The fields that the model ships with another value than the one that changes nothing."""
    values = [(name, getattr(own, name, None)) for name in names()]
    return [(n, v) for n, v in values if v is not None and not any(v == same for same in _field(n).same)]


def _field(name: str) -> Field:
    return FIELDS.get(name, _WITHOUT_EFFECT)


def _sequences(biases: Any) -> list[tuple[int, ...]]:
    """The token sequences of `bad_words_ids` or `sequence_bias`, in either of the forms that transformers takes."""
    items = biases.keys() if isinstance(biases, Mapping) else biases or []
    return [tuple(s[0]) if s and isinstance(s[0], (list, tuple)) else tuple(s) for s in items]


class CompleteConfig(GenerationConfig):  # type: ignore[misc]
    """A configuration that `generate` takes as it is: nothing is filled in from the module's own.

    transformers fills each field that is None from the module's, and None is the only way to switch some of them off.

    Raises:
        ConfigError: transformers refuses the values, which are the model's.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except (ValueError, TypeError) as error:
            raise ConfigError(_refused(str(error).strip())) from None

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> Any:  # noqa: FBT001, FBT002 (transformers')
        """As transformers', without the module's own values and without lengths that nobody gave."""
        if allow_custom_entries:  # only the module's own come like this
            return {}
        if defaults_only:  # its own length of 20, which it would warn of beside max_new_tokens
            values = {n: v for n, v in values.items() if n not in ("max_length", "min_length")}
        return super().update(defaults_only=defaults_only, **values)


def check_ids(values: Mapping[str, Any], rows: int | None) -> None:
    """Makes sure that tokens which the model ships have a row in it.

    Raises:
        ConfigError: A token id is beyond them.
    """
    for name in ("bad_words_ids", "sequence_bias"):
        _check_ids(name, [i for ids in _sequences(values.get(name)) for i in ids], rows)
    for name in ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"):
        given = values.get(name)
        _check_ids(name, given if isinstance(given, (list, tuple)) else [] if given is None else [given], rows)


def _check_ids(name: str, ids: Sequence[int], rows: int | None) -> None:
    if strange := [i for i in ids if not isinstance(i, int) or i < 0 or (rows is not None and i >= rows)]:
        raise ConfigError(_refused(f"{name} has {strange[:3]}, and the model has {rows} tokens"))


def _refused(why: str) -> str:
    return f"the model's own generation_config cannot be used: {why}. Change that field of module.generation_config."
