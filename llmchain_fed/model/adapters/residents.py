"""Factors in PEFT's layers: resident adapters, the frozen remainder, another rank for a while.

Knows PEFT's LoRA layers and how to write into them. Knows nothing about locks, text or files: who calls locks the
module exclusively.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from llmchain_fed.errors import ConfigError, WeightsMismatchError
from llmchain_fed.model.adapters.switching import (
    GLOBAL,
    REMAINDER,
    check_unmerged,
    configs_of,
    count_change,
    has_remainder,
    keys_of,
    known_key,
    lora_layers,
    one,
    registry_of,
    settle,
)
from llmchain_fed.model.weights import adapter_names, all_finite

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer's stable name → (B (m, R), A (R, n))."""


def scalings(module: nn.Module, key: str) -> dict[str, float]:
    """Stable layer name → what the product of its factors is multiplied by."""
    return {name: float(layer.scaling[key]) for name, layer in lora_layers(module, key).items()}


def state(module: nn.Module, key: str) -> dict[str, Tensor]:
    """Copies of an adapter's factors on the CPU by stable name."""
    parts = {
        f"{name}.lora_{part}.weight": getattr(layer, f"lora_{part}")[key].weight
        for name, layer in lora_layers(module, key).items()
        for part in "AB"
    }
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parts.items()}


# --- residents ------------------------------------------------------------------------------------------------------


def add(
    module: nn.Module,
    primary: Sequence[str],
    name: str,
    given: Mapping[str, Tensor],
    scaling: Mapping[str, float] | float | None,
) -> None:
    """Makes or overwrites the adapter `name`; see `LocalModel.add_adapter`."""
    model_key = one(module, primary)
    if not isinstance(name, str) or not name or name == GLOBAL:
        msg = (
            f"an adapter cannot be called {name!r}: give it a name of its own ({GLOBAL!r} is the one that is trained)."
        )
        raise ConfigError(msg)
    found = registry_of(module)
    check_unmerged(found)
    layers = lora_layers(module, model_key)
    factors = _checked_factors(layers, model_key, _paired(given, layers))
    scales = _checked_scalings(layers, scaling, scalings(module, model_key))
    key = known_key(module, name)
    if key is not None and key == name and key not in primary:
        _drop(module, key)  # made by PEFT itself: it may be more than factors, or in other layers
    if key is None or key in primary:
        key = f"llmchain_fed_{found.made}"
        found.made += 1
        found.keys[name] = key
    dropouts = {n: getattr(layer.lora_dropout[model_key], "p", 0.0) for n, layer in layers.items()}
    _write(module, key, layers, factors, scales, dropouts, like=model_key)


def remove(module: nn.Module, primary: Sequence[str], name: str) -> None:
    """Takes the adapter `name` away; see `LocalModel.remove_adapter`."""
    (key,) = keys_of(module, primary, name) if name != GLOBAL else ("",)
    if not key or key in primary:
        msg = f"{name!r} is the adapter that is trained, so it is not removed. Use without_adapter() for the bare base."
        raise ConfigError(msg)
    if key in adapter_names(module):
        msg = f"PEFT's active adapter is {name!r}, so it is not removed. Call module.set_adapter for another one first."
        raise ConfigError(msg)
    _drop(module, key)
    registry_of(module).keys.pop(name, None)


def remainder(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen addition's factors on the CPU, not copied where they lie there; empty without one."""
    if not has_remainder(module):
        return {}
    found = lora_layers(module, REMAINDER)
    pairs = {n: (layer.lora_B[REMAINDER].weight, layer.lora_A[REMAINDER].weight) for n, layer in found.items()}
    return {n: (b.detach().to("cpu"), a.detach().to("cpu")) for n, (b, a) in pairs.items()}


def load_remainder(module: nn.Module, primary: Sequence[str], factors: Factors) -> None:
    """Makes `factors` the frozen addition; see `LocalModel.load_remainder`."""
    if _has(module, factors):
        return
    model_key = one(module, primary)
    found = registry_of(module)
    check_unmerged(found)
    layers = lora_layers(module, model_key)
    unknown = sorted(factors.keys() - layers.keys())
    if unknown:
        msg = (
            f"the remainder has factors for {len(unknown)} layers that the adapter is not in ({unknown[:3]}): it was "
            "made for another model or LoraConfig. Use the same ones."
        )
        raise WeightsMismatchError(msg)
    wanted = {n: (b, a) for n, (b, a) in factors.items() if b.numel() or a.numel()}  # rank 0 adds nothing
    wanted = _checked_factors(layers, model_key, wanted)
    if _has(module, wanted):
        return
    if has_remainder(module) and not lora_layers(module, REMAINDER).keys() <= wanted.keys():
        _drop(module, REMAINDER)
    if wanted:
        chosen = {n: layers[n] for n in wanted}
        _write(module, REMAINDER, chosen, wanted, dict.fromkeys(wanted, 1.0), {}, like=model_key)
    settle(module, found)


def _has(module: nn.Module, factors: Factors) -> bool:
    """Whether the remainder is this one already."""
    present = lora_layers(module, REMAINDER) if has_remainder(module) else {}
    return present.keys() == factors.keys() and all(
        _equal(layer.lora_B[REMAINDER].weight, factors[n][0]) and _equal(layer.lora_A[REMAINDER].weight, factors[n][1])
        for n, layer in present.items()
    )


def _equal(weight: Tensor, given: Any) -> bool:
    alike = isinstance(given, Tensor) and (given.dtype, given.device) == (weight.dtype, weight.device)
    return alike and (weight.is_set_to(given) or torch.equal(weight, given))


def _paired(given: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    wanted = {f"{n}.lora_{part}.weight" for n in layers for part in "AB"}
    missing, extra = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
    if missing or extra:
        msg = (
            f"the adapter lacks {len(missing)} factors {missing[:3]} and adds {len(extra)} {extra[:3]}: it was made "
            "for another model or LoraConfig. Use the same ones."
        )
        raise WeightsMismatchError(msg)
    return {n: (given[f"{n}.lora_B.weight"], given[f"{n}.lora_A.weight"]) for n in layers}


def _checked_factors(layers: Mapping[str, Any], like: str, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) in float32 on each layer's device, once all of them fit."""
    checked = {}
    for name, (b, a) in factors.items():
        layer = layers[name]
        weight = layer.lora_A[like].weight
        n, m = layer.lora_A[like].in_features, layer.lora_B[like].out_features
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (b, a)]
        fits = all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 2 for t in (b, a))
        if not fits or not a.shape[0] or b.shape != (m, a.shape[0]) or a.shape[1] != n:
            msg = (
                f"{name} has the factors B {shapes[0]} and A {shapes[1]}; the layer takes floating-point ({m}, r) and "
                f"(r, {n}) with r ≥ 1: they were made for another model. Use the same base model."
            )
            raise WeightsMismatchError(msg)
        pair = [t.detach().to(weight.device, torch.float32, copy=True).contiguous() for t in (b, a)]
        if not all(map(all_finite, pair)):
            msg = f"{name} has factors with NaN or infinite values, which would spoil every answer. Train it again."
            raise WeightsMismatchError(msg)
        checked[name] = (pair[0], pair[1])
    return checked


def _checked_scalings(
    layers: Mapping[str, Any], scaling: Mapping[str, float] | float | None, default: Mapping[str, float]
) -> dict[str, float]:
    if scaling is None:
        return dict(default)
    values = dict(scaling) if isinstance(scaling, Mapping) else dict.fromkeys(layers, scaling)
    if values.keys() != layers.keys():
        different = sorted(values.keys() ^ layers.keys())
        msg = f"the scalings name {len(different)} other layers than the adapter's ({different[:3]}). Give one a layer."
        raise WeightsMismatchError(msg)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            msg = f"{name} has the scaling {value!r}, which is no finite number. Give one, such as alpha / rank."
            raise WeightsMismatchError(msg)
    return {name: float(value) for name, value in values.items()}


# --- writing into PEFT's layers -------------------------------------------------------------------------------------


def _write(
    module: nn.Module,
    key: str,
    layers: Mapping[str, Any],
    factors: Factors,
    scales: Mapping[str, float],
    dropouts: Mapping[str, float],
    *,
    like: str,
) -> None:
    """Puts checked factors into the layers directly: PEFT's `add_adapter` walks the model and draws random weights."""
    for name, layer in layers.items():
        b, a = factors[name]
        rank = a.shape[0]
        # The same parameters, where there are any: who has them goes on with them. Not so the remainder, whose
        # factors others may have been given, of which a copy each round would be too many.
        if key != REMAINDER and key in layer.lora_A and layer.r[key] == rank:
            with torch.no_grad():
                layer.lora_A[key].weight.copy_(a)
                layer.lora_B[key].weight.copy_(b)
        else:
            _put(layer.lora_A, key, _linear(a))
            _put(layer.lora_B, key, _linear(b))
        dropout = nn.Dropout(dropouts[name]) if dropouts.get(name) else nn.Identity()
        _put(layer.lora_dropout, key, dropout.train(layer.training))
        layer.r[key], layer.lora_alpha[key], layer.scaling[key] = rank, scales[name] * rank, scales[name]
        layer.use_rslora[key] = layer.use_dora[key] = layer.lora_bias[key] = False
    configs = configs_of(module)
    configs[key] = _config(configs[like], factors, scales, dropout=max(dropouts.values(), default=0.0))
    count_change(module, key)


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")  # meta: nothing is drawn
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear.eval()


def _put(parts: nn.ModuleDict, key: str, part: nn.Module) -> None:
    # another dict, not an entry more: weights_hash walks the module without a lock
    parts._modules = {**parts._modules, key: part}


def _drop(module: nn.Module, key: str) -> None:
    found = registry_of(module)
    for layer in found.layers.values():
        layer.lora_variant.pop(key, None)
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            part = getattr(layer, attribute)
            if isinstance(part, nn.ModuleDict):
                part._modules = {k: v for k, v in part._modules.items() if k != key}
            elif isinstance(part, (dict, nn.ParameterDict)) and key in part:
                del part[key]
    for part in found.others:
        if key in part._get_available_adapters():
            others = {"new_active_adapters": part.active_adapters} if isinstance(part, AuxiliaryTrainingWrapper) else {}
            part.delete_adapter(key, **others)
    configs_of(module).pop(key, None)
    count_change(module, key)


def _config(like: LoraConfig, factors: Factors, scales: Mapping[str, float], *, dropout: float) -> LoraConfig:
    """What PEFT needs to make this adapter's layers again: ranks, alphas and which layers."""
    ranks = {n: a.shape[0] for n, (_, a) in factors.items()}
    alphas = {n: scales[n] * r for n, r in ranks.items()}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(factors),
        task_type=like.task_type,
        fan_in_fan_out=like.fan_in_fan_out,
        base_model_name_or_path=like.base_model_name_or_path,
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        inference_mode=True,
    )
    config.target_modules = set(config.target_modules)
    return config


# --- another rank ---------------------------------------------------------------------------------------------------


@contextmanager
def resized(module: nn.Module, key: str, rank: int, scaling: Mapping[str, float]) -> Iterator[None]:
    """Inside, this adapter's factors are zeros of another rank; see `LocalModel.resized`."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        msg = f"rank must be a whole number of at least 1, got {rank!r}."
        raise ConfigError(msg)
    found = registry_of(module)
    check_unmerged(found)
    layers = lora_layers(module, key)
    scales = _checked_scalings(layers, scaling, {})
    former = {
        n: (layer.lora_A[key].weight, layer.lora_B[key].weight, layer.r[key], layer.lora_alpha[key], layer.scaling[key])
        for n, layer in layers.items()
    }

    def put(name: str, a: nn.Parameter, b: nn.Parameter, r: int, alpha: float, scale: float) -> None:
        layer = layers[name]
        layer.lora_A[key].weight, layer.lora_A[key].out_features = a, r
        layer.lora_B[key].weight, layer.lora_B[key].in_features = b, r
        layer.r[key], layer.lora_alpha[key], layer.scaling[key] = r, alpha, scale

    try:
        for name, (a, b, *_) in former.items():
            fresh = (nn.Parameter(a.new_zeros(rank, a.shape[1])), nn.Parameter(b.new_zeros(b.shape[0], rank)))
            put(name, *fresh, rank, scales[name] * rank, scales[name])
        count_change(module, key)
        yield
    finally:
        for name, values in former.items():
            put(name, *values)
        count_change(module, key)
