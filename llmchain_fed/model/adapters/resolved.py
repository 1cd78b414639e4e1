"""What a LoRA adapter is, read off the module: every layer's rank and scaling, and what is trained beside the factors.

Two configurations that mean the same (a pattern, a list, `all-linear`) are the same here. Knows PEFT's layers and how
PEFT matches names. Knows nothing about weights' values, files or training.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from llmchain_fed.errors import ChainFileError, UnsupportedModelError
from llmchain_fed.model.adapters.lora_config import unwrapped

NAME = r"^[A-Za-z0-9_.]+$"
"""what the full name of a module consists of"""


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its rank, and what the product of its factors counts by."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class Resolved:
    """An adapter without patterns; names are the modules' full ones within the base."""

    modules: Mapping[str, Layer] = field(default_factory=dict)
    parameters: Mapping[str, Layer] = field(default_factory=dict)
    """adapted parameters of modules that are no linear layers: `<module>.<parameter>`"""
    modules_to_save: tuple[str, ...] = ()
    """trained whole, as copies beside the base's own"""
    tied: tuple[str, ...] = ()
    """of which the copy is the embedding's"""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """embedding → its rows that are trained as copies"""
    tied_tokens: tuple[str, ...] = ()
    """modules that answer with the rows of the embedding"""
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False

    @property
    def layers(self) -> dict[str, Layer]:
        """All that have factors."""
        return {**self.modules, **self.parameters}

    def differences(self, other: Resolved) -> list[str]:
        """What differs, in words with both values; this one first."""
        found = []
        switches = ("dropout", "use_rslora", "use_dora", "lora_bias")
        for name in (*switches, "modules_to_save", "tied", "tied_tokens", "tokens"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                found.append(f"{name} {_short(here)} against {_short(there)}")
        here, there = self.layers, other.layers
        if here.keys() != there.keys():
            found.append(f"{len(here)} adapted layers against {len(there)}: {sorted(here.keys() ^ there.keys())[:2]}")
        for name in sorted(here.keys() & there.keys()):
            one, two = here[name], there[name]
            if one.rank != two.rank or abs(one.scaling - two.scaling) > 1e-6 * abs(one.scaling):
                found.append(
                    f"{name} rank {one.rank} and scaling {one.scaling:g} against {two.rank} and {two.scaling:g}"
                )
                break
        return found


def _short(value: object) -> str:
    return f"{value!r:.80}"


def resolve(module: nn.Module, key: str) -> Resolved:
    """The adapter that PEFT calls `key`, as the module has it now.

    Raises:
        UnsupportedModelError: The module is no PeftModel.
    """
    outer = unwrapped(module)
    if not isinstance(outer, PeftModel):
        msg = f"{type(outer).__name__} has no adapter to describe. Pass a PeftModel."
        raise UnsupportedModelError(msg)
    config: Any = outer.peft_config[key]
    modules: dict[str, Layer] = {}
    parameters: dict[str, Layer] = {}
    whole: dict[str, Any] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    tied_tokens: list[str] = []
    rslora = False
    for raw, part in outer.get_base_model().named_modules():
        name = re.sub(r"(\._orig_mod|\.base_layer)+(?=\.|$)", "", raw).removeprefix("_orig_mod.")
        if isinstance(part, LoraLayer) and key in part.r:
            layer = Layer(int(part.r[key]), float(part.scaling[key]))
            rslora = rslora or bool(part.use_rslora.get(key))
            if parameter := getattr(part, "parameter_name", None):
                parameters[f"{name}.{parameter}"] = layer
            else:
                modules[name] = layer
        elif isinstance(part, ModulesToSaveWrapper) and key in part.modules_to_save:
            whole[name] = part.modules_to_save[key]
        elif isinstance(part, TrainableTokensWrapper) and key in part.token_adapter.trainable_tokens_delta:
            if part.token_adapter.tied_adapter is not None:
                tied_tokens.append(name)
            else:
                tokens[name] = tuple(int(i) for i in part.token_adapter.token_indices[key])
    tied = _tied(whole)
    return Resolved(
        modules=modules,
        parameters=parameters,
        modules_to_save=tuple(sorted(whole.keys() - tied)),
        tied=tuple(sorted(tied)),
        tokens=tokens,
        tied_tokens=tuple(sorted(tied_tokens)),
        dropout=float(config.lora_dropout),
        use_rslora=rslora,
        use_dora=bool(config.use_dora),
        lora_bias=bool(config.lora_bias),
    )


def _tied(whole: Mapping[str, nn.Module]) -> set[str]:
    """The copies whose weight is an earlier one's."""
    first: dict[int, str] = {}
    found = set()
    for name, part in whole.items():
        weight = getattr(part, "weight", None)
        if weight is not None and first.setdefault(id(weight), name) != name:
            found.add(name)
    return found


# --- as PEFT's settings ---------------------------------------------------------------------------------------------


def settings(resolved: Resolved) -> dict[str, Any]:
    """The values of PEFT's LoraConfig that make this adapter again: full names alone, no pattern."""
    layers = resolved.layers
    ranks = {n: layer.rank for n, layer in layers.items()}
    alphas = {n: _alpha(layer, rslora=resolved.use_rslora) for n, layer in layers.items()}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] if v else 8 for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": resolved.dropout,
        "target_modules": sorted(resolved.modules),
        "target_parameters": sorted(resolved.parameters) or None,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "modules_to_save": list(resolved.modules_to_save) or None,
        "trainable_token_indices": {n: list(i) for n, i in resolved.tokens.items()} or None,
        "ensure_weight_tying": bool(resolved.tied),
        "bias": "none",
        "lora_bias": resolved.lora_bias,
        "use_dora": resolved.use_dora,
        "use_rslora": resolved.use_rslora,
        "init_lora_weights": True,
    }


def _alpha(layer: Layer, *, rslora: bool) -> int | float:
    alpha = layer.scaling * (layer.rank**0.5 if rslora else layer.rank)
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-9 * abs(alpha) else alpha


def scaling_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """As PEFT has it: α / r, or α / √r with rsLoRA."""
    return float(alpha) / (rank**0.5 if rslora else rank)


def check_names(module: nn.Module, resolved: Resolved) -> None:
    """Makes sure that PEFT finds by these full names what they name, and nothing else.

    PEFT also takes a name for the end of a longer one, and the keys of its patterns for regular expressions.

    Raises:
        ChainFileError: PEFT would find more, or a saved adapter may not have such a name.
    """
    base = cast(Any, unwrapped(module)).get_base_model()
    everything = {re.sub(r"(\.base_layer)+(?=\.|$)", "", n) for n, _ in base.named_modules() if n}
    everything = {n for n in everything if not re.search(r"\.(lora_|modules_to_save|token_adapter|original_module)", n)}
    named = [*resolved.modules, *resolved.parameters, *resolved.modules_to_save, *resolved.tokens]
    if strange := [n for n in named if not re.match(NAME, n)]:
        msg = f"the adapter is in {strange[0]!r}, a name that a saved adapter cannot have. Rename the module."
        raise ChainFileError(msg)
    for name in resolved.modules:
        _unique(name, [n for n in everything - resolved.modules.keys() if n.endswith(f".{name}")])
    others = everything - set(resolved.tied) - set(resolved.tied_tokens)
    for name in resolved.modules_to_save:
        _unique(name, [n for n in others if n != name and n.endswith(name) and n not in resolved.modules_to_save])
    for name in resolved.tokens:
        _unique(name, [n for n in others if n != name and n.endswith(name)])
    values = settings(resolved)
    for key in {*values["rank_pattern"], *values["alpha_pattern"]}:
        _unique(key, [n for n in resolved.layers if n != key and re.match(rf"(.*\.)?({key})$", n)])


def _unique(name: str, more: list[str]) -> None:
    if more:
        msg = (
            f"PEFT would take {name!r} for {more[0]!r} as well, so the adapter could not be made again. Leave one of "
            "them out, or rename the module."
        )
        raise ChainFileError(msg)
