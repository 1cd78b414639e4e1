"""Which LoraConfigs work here: for every field of PEFT's class, whether its value is right or refused, and why.

Knows PEFT's LoraConfig field by field, and which modules carry adapters. Knows nothing of weights, files or training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from llmchain_fed.errors import ConfigError, UnsupportedModelError
from llmchain_fed.model.weights import is_adapter

Check = Callable[[Any, LoraConfig], str | None]
"""(a field's value, the whole configuration) → why it is refused and what to do, or None where it is right"""


def _right(_value: Any, _config: LoraConfig) -> None:
    return None


def _only(*allowed: Any, why: str) -> Check:
    def check(value: Any, _config: LoraConfig) -> str | None:
        plain = value.value if hasattr(value, "value") else value
        return None if any(plain == a and type(plain) is type(a) for a in allowed) else why

    return check


def _unset(why: str) -> Check:
    return lambda value, _config: why if value else None


def _whole(value: Any, _config: LoraConfig) -> str | None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if fits else "a rank is a whole number of at least 1. Give one"


def _alpha(value: Any, _config: LoraConfig) -> str | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value != 0
    return None if fits else "what the factors count by is a finite number other than 0. Give one"


def _dropout(value: Any, _config: LoraConfig) -> str | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    return None if fits else "a share of inputs to drop is at least 0 and below 1. Give one"


def _patterns(check: Check) -> Check:
    def each(value: Any, config: LoraConfig) -> str | None:
        if value is not None and not isinstance(value, Mapping):
            return "it maps names or patterns of layers to numbers. Give such a mapping"
        return next((why for v in (value or {}).values() if (why := check(v, config))), None)

    return each


def _init(value: Any, _config: LoraConfig) -> str | None:
    """Every start of PEFT 0.21 that leaves the base weights alone, and that an ordinary adapter can take up."""
    if isinstance(value, bool) or value in ("gaussian", "orthogonal", "eva"):
        return None
    if value == "mica":
        return (
            "it freezes B at its start, which a saved adapter cannot say: loaded, it would train B as well. "
            "Use init_lora_weights=True"
        )
    name = value if isinstance(value, str) else repr(value)
    if name.startswith("pissa") or name in ("olora", "corda", "loftq", "lora_ga"):
        return (
            "this start rewrites the base weights: the bare base would not be the base, and a saved adapter would "
            "meet another one. Use init_lora_weights=True, 'gaussian' or 'orthogonal'"
        )
    return "PEFT knows no such start. Use init_lora_weights=True, 'gaussian' or 'orthogonal'"


def _tying(value: Any, config: LoraConfig) -> str | None:
    if not value or config.modules_to_save or config.trainable_token_indices is not None:
        return None
    return (
        "it ties the LoRA factors of the embedding to those of the head as two parameters over one memory, which come "
        "apart when the model moves to another device. Leave it out, or train the embedding with modules_to_save or "
        "trainable_token_indices"
    )


_VARIANT = "is no pair of factors that a server can average and a saved adapter can store. Leave it out"
_IGNORED_UNLESS_ASKED = _right  # settings of an option that is refused where it is on; PEFT ignores them otherwise

TREATMENT: dict[str, Check] = {
    # what an adapter is called and where it comes from
    "peft_type": _only("LORA", why="only LoRA adapters work here. Use LoraConfig"),
    "task_type": _only(
        "CAUSAL_LM", "SEQ_2_SEQ_LM", None, why="models here write text: use 'CAUSAL_LM' or 'SEQ_2_SEQ_LM', or none"
    ),
    "auto_mapping": _right,
    "peft_version": _right,
    "base_model_name_or_path": _right,
    "revision": _right,
    "inference_mode": _right,  # nothing is trainable then, which training says
    # ranks and scalings
    "r": _whole,
    "lora_alpha": _alpha,
    "rank_pattern": _patterns(_whole),
    "alpha_pattern": _patterns(_alpha),
    "use_rslora": _right,
    "lora_dropout": _dropout,
    # which layers; a saved adapter names each of them
    "target_modules": _right,
    "target_parameters": _right,
    "exclude_modules": _right,
    "layers_to_transform": _right,
    "layers_pattern": _right,
    "fan_in_fan_out": _right,
    "layer_replication": _unset(
        "it puts layers into the base that the base on record does not have. Build the larger base first, and pass "
        "it as a module"
    ),
    # what else is trained
    "modules_to_save": _right,
    "trainable_token_indices": _right,
    "ensure_weight_tying": _tying,
    "lora_bias": _right,
    "use_dora": _right,
    "bias": _only(
        "none",
        why="the biases are the base's own: trained, without_adapter() would no longer be the base. Use bias='none', "
        "or lora_bias=True for biases that belong to the adapter",
    ),
    # how the factors begin
    "init_lora_weights": _init,
    "loftq_config": _IGNORED_UNLESS_ASKED,
    "eva_config": _IGNORED_UNLESS_ASKED,
    "corda_config": _IGNORED_UNLESS_ASKED,
    "lora_ga_config": _IGNORED_UNLESS_ASKED,
    # other ways of computing
    "megatron_config": _unset("Megatron's layers are not supported. Leave it out"),
    "megatron_core": _only("megatron.core", None, why="PEFT would import the module of that name. Leave it out"),
    "use_qalora": _unset("QALoRA pools its inputs, which no other adapter does. Leave it out"),
    "qalora_group_size": _IGNORED_UNLESS_ASKED,
    "alora_invocation_tokens": _unset(
        "the adapter would answer only behind those tokens, which training and generating here do not look for. "
        "Leave it out"
    ),
    "runtime_config": lambda value, _: (
        "ephemeral offloading moves weights while they are trained. Leave it out"
        if getattr(value, "ephemeral_gpu_offload", False)
        else None
    ),
    "arrow_config": _unset(f"Arrow routes between adapters, which {_VARIANT}"),
    "use_bdlora": _unset(f"a block-diagonal LoRA {_VARIANT}"),
    "velora_config": _unset("VeLoRA computes its gradients from compressed inputs. Leave it out"),
    "kasa_config": _unset("KaSA truncates the base weights, so the bare base would not be the base. Leave it out"),
    "monteclora_config": _unset(f"MonteCLoRA samples its factors, which {_VARIANT}"),
}


def refusal(config: PeftConfig) -> str | None:
    """Why this configuration cannot be trained and saved here, naming the field and the remedy; None where it can."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        return f"{type(config).__name__} makes an adapter of the kind {kind}, and only LoRA works here. Use LoraConfig."
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check = TREATMENT.get(field.name)
        if check is None:  # a later PEFT's: right as long as it is left alone
            default = field.default if field.default is not dataclasses.MISSING else None
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            alone = not value or value == default
            why = None if alone else "this version of llmchain_fed does not know it. Leave it out"
        else:
            why = check(value, config)
        if why is not None:
            return f"LoraConfig({field.name}={value!r:.80}): {why}."
    if getattr(config, "_custom_modules", None):
        return "the LoraConfig has custom layers registered, which no saved adapter can make again. Leave them out."
    return None


def check_config(config: Any) -> None:
    """Makes sure that an adapter of this configuration works, before any weights are read.

    Raises:
        ConfigError: The configuration is no LoraConfig, or has a value that does not work here.
    """
    if not isinstance(config, PeftConfig):
        msg = f"lora takes a peft.LoraConfig, got {type(config).__name__} {config!r:.60}. Pass LoraConfig(r=8, …)."
        raise ConfigError(msg)
    if why := refusal(config):
        raise ConfigError(why)


def check_module(module: nn.Module) -> None:
    """Makes sure that adapters in a module are ones that can be switched, trained and saved.

    Raises:
        UnsupportedModelError: LoRA layers have no PeftModel around them, or a configuration does not work.
    """
    outer = unwrapped(module)
    if not isinstance(outer, PeftModel):
        found = next(
            (n for n, m in outer.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))), None
        )
        if found is not None:
            msg = (
                f"{type(outer).__name__} carries adapter layers ({found}) without being a PeftModel, so nobody could "
                "say which adapter answers or save it. Pass the PeftModel itself, or merge_and_unload() it."
            )
            raise UnsupportedModelError(msg)
        return
    for name, config in outer.peft_config.items():
        if name.startswith("llmchain_fed_"):  # made here, of factors alone
            continue
        if why := refusal(config):
            raise UnsupportedModelError(f"the adapter {name!r} does not work here: {why}")  # noqa: EM102
    task = next((c.task_type for c in outer.peft_config.values() if c.task_type), None)
    seq2seq = getattr(getattr(outer, "config", None), "is_encoder_decoder", None)
    wrong = {True: "CAUSAL_LM", False: "SEQ_2_SEQ_LM"}.get(seq2seq)  # type: ignore[arg-type]
    if task is not None and getattr(task, "value", task) == wrong:
        msg = (
            f"the adapter has the task type {wrong}, and {type(outer.get_base_model()).__name__} is "
            f"{'an encoder-decoder' if seq2seq else 'no encoder-decoder'}, so PEFT would call it wrongly. Leave "
            "task_type out."
        )
        raise UnsupportedModelError(msg)
    _check_shared(outer)


def _check_shared(module: PeftModel) -> None:
    """Two factors over one memory, which PEFT makes where it ties the embedding's factors to the head's."""
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        if ".lora_" not in name or not parameter.numel() or parameter.device.type == "meta":
            continue
        other = seen.setdefault(parameter.data_ptr(), name)
        if other != name:
            msg = (
                f"the factors {other} and {name} are two parameters over one memory, which come apart when the model "
                "moves to another device. Make the adapter without ensure_weight_tying, or train the embedding with "
                "modules_to_save or trainable_token_indices."
            )
            raise UnsupportedModelError(msg)


def check_in_use(module: nn.Module) -> None:
    """Makes sure that a module answers as its base with its adapter, before that is trained or saved.

    Raises:
        UnsupportedModelError: An adapter is merged into the base or switched off, or part of the base is trained too.
    """
    outer = unwrapped(module)
    if not isinstance(outer, PeftModel):
        return
    for name, layer in outer.named_modules():
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if getattr(layer, "merged_adapters", None):
            msg = (
                f"an adapter is merged into the base weights ({name}), so it would count twice once it is saved, and "
                "cannot be trained. Call module.unmerge_adapter() first."
            )
            raise UnsupportedModelError(msg)
        if layer.disable_adapters:
            msg = (
                f"the adapter is switched off ({name}), so it would be on again once it is saved, and cannot be "
                "trained. Leave `with module.disable_adapter()`, or call module.base_model.enable_adapter_layers()."
            )
            raise UnsupportedModelError(msg)
    beside = [n for n, p in outer.named_parameters() if p.requires_grad and not is_adapter(n)]
    if beside:
        msg = (
            f"{beside[0]} of the base is trained beside the adapter ({len(beside)} such tensors), so the bare base "
            "would no longer be the base. Freeze it, or name its module in LoraConfig(modules_to_save=[…])."
        )
        raise UnsupportedModelError(msg)


def unwrapped(module: nn.Module) -> nn.Module:
    """Without torch.compile's wrapping."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
