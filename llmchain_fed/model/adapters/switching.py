"""Which LoRA adapters answer: their names, their layers, and switching between them.

Knows PEFT's LoRA layers. Knows nothing about locks, text or files: who calls locks the module exclusively.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from llmchain_fed.errors import ConfigError, UnsupportedModelError
from llmchain_fed.model.weights import stable_name

GLOBAL = "global"
"""The name of the adapter that is trained by default, a federation's own."""
REMAINDER = "llmchain_fed_remainder"
"""PEFT's name for the frozen addition to the base."""
_ATTRIBUTE = "_llmchain_fed_adapters"


@dataclass
class AdapterRegistry:
    """What a module's adapters are called here, and its layers; lies on the module, so that copies have their own."""

    layers: dict[str, Any] = field(default_factory=dict)
    """stable name → LoRA layer"""
    others: list[Any] = field(default_factory=list)
    """what adapters have beside LoRA: modules trained whole, single tokens; each knows only the adapters it is in"""
    configs: dict[str, Any] = field(default_factory=dict)
    """the adapters when `layers` was listed"""
    keys: dict[str, str] = field(default_factory=dict)
    """name → PEFT's name for the adapters made here: PEFT takes no dots"""
    made: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    """PEFT's name → a number that no earlier state of that adapter had"""
    active: list[bool] = field(default_factory=list)
    """activations within each other: which are the ordinary model's"""
    resting: bool = False
    """whether all adapters were off before the first of them"""


def _registry(module: nn.Module) -> AdapterRegistry | None:
    """The module's, with its layers as they are now; None without LoRA."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    known: AdapterRegistry = _kept(module) or AdapterRegistry()
    configs = dict(configs)  # another thread may add one: weights_hash asks without a lock
    if known.configs.keys() != configs.keys() or any(known.configs[k] is not c for k, c in configs.items()):
        parts = list(module.named_modules())
        known.layers = {_layer_name(name): part for name, part in parts if isinstance(part, LoraLayer)}
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        known.others = [p for _, p in parts if isinstance(p, kinds) and not isinstance(p, LoraLayer)]
        known.configs = configs
        getattr(module, "_orig_mod", module).__dict__[_ATTRIBUTE] = known
    return known if known.layers else None


def _layer_name(name: str) -> str:
    """The stable name; of a layer within another (two parameters of one module) as its own factors have it."""
    return stable_name(name) + (".base_layer" * name.count(".base_layer") if name.endswith(".base_layer") else "")


def _kept(module: nn.Module) -> AdapterRegistry | None:
    kept: AdapterRegistry | None = getattr(module, "_orig_mod", module).__dict__.get(_ATTRIBUTE)  # compiled or not: one
    return kept


def registry_of(module: nn.Module, *, listed: bool = True) -> AdapterRegistry:
    """The module's registry; with `listed=False` as it is, though adapters have come or gone since.

    Raises:
        UnsupportedModelError: The module has no LoRA adapter.
    """
    found = _registry(module) if listed else _kept(module)
    if found is None:
        msg = (
            f"{type(module).__name__} has no LoRA adapter, so there is none to choose, add or leave out. Pass "
            "lora=LoraConfig(...) to from_pretrained."
        )
        raise UnsupportedModelError(msg)
    return found


def configs_of(module: nn.Module) -> dict[str, Any]:
    """PEFT's name → its configuration, for every adapter of the module; PEFT's own mapping."""
    configs: dict[str, Any] = module.peft_config  # type: ignore[assignment]
    return configs


# --- names ----------------------------------------------------------------------------------------------------------


def names(module: nn.Module, primary: Sequence[str]) -> list[str]:
    """`"global"` and the other adapters that can be chosen, in the order in which they came; empty without LoRA."""
    found = _registry(module)
    if found is None:
        return []
    own = {key: name for name, key in list(found.keys.items())}
    others = [own.get(key, key) for key in found.configs if key not in primary and key != REMAINDER]
    return [GLOBAL, *others]


def keys_of(module: nn.Module, primary: Sequence[str], name: str) -> tuple[str, ...]:
    """PEFT's names for what answers under a name.

    Raises:
        ConfigError: There is no adapter of this name.
        UnsupportedModelError: The module has no LoRA adapter.
    """
    key = known_key(module, name)
    if name == GLOBAL:
        return tuple(primary)
    if key is None:
        msg = f"there is no adapter {name!r}, so it cannot answer. There are {names(module, primary)}."
        raise ConfigError(msg)
    return (key,)


def known_key(module: nn.Module, name: str) -> str | None:
    """PEFT's name for the adapter `name`, made here or by PEFT itself; None where there is none.

    Raises:
        UnsupportedModelError: The module has no LoRA adapter.
    """
    found = registry_of(module)
    hidden = {REMAINDER, *found.keys.values()}
    key = found.keys.get(name, name if name not in hidden else None)
    return key if key in configs_of(module) else None


def has_remainder(module: nn.Module) -> bool:
    """Whether a frozen addition to the base is there."""
    return REMAINDER in (getattr(module, "peft_config", None) or {})


def changes(module: nn.Module, keys: Sequence[str]) -> int:
    """Differs once one of these adapters was written, resized or removed, even to equal factors of another scaling."""
    known = _kept(module)
    return sum(known.changes.get(key, 0) for key in keys) if known is not None else 0


def count_change(module: nn.Module, key: str) -> None:
    """Says that this adapter has changed, or come or gone, in the layers that are listed."""
    found = registry_of(module, listed=False)
    found.configs = dict(configs_of(module))
    found.changes[key] = max(found.changes.values(), default=0) + 1


# --- layers ---------------------------------------------------------------------------------------------------------


def lora_layers(module: nn.Module, key: str) -> dict[str, Any]:
    """Stable name → LoRA layer, for the layers that this adapter has factors in; `key` is PEFT's name for it.

    Raises:
        UnsupportedModelError: There is no such layer, or the adapter is more than two factors a layer (DoRA, LoRA on
            embeddings or convolutions, with a bias), so that factors alone cannot stand for it.
    """
    found = registry_of(module)
    layers = {n: layer for n, layer in found.layers.items() if key in layer._get_available_adapters()}
    odd = [n for n, layer in layers.items() if not _is_plain(layer, key)]
    if odd or not layers:
        msg = (
            f"the adapter {key!r} is no plain LoRA of linear layers ({odd[:2] or 'it has no layer'}), so two factors a "
            "layer cannot stand for it. Use a LoraConfig on linear layers without use_dora or lora_bias."
        )
        raise UnsupportedModelError(msg)
    return layers


def _is_plain(layer: Any, key: str) -> bool:
    return (
        key in layer.lora_A
        and all(type(part[key]) is nn.Linear and part[key].bias is None for part in (layer.lora_A, layer.lora_B))
        and key not in layer.lora_variant
        and key not in layer.lora_magnitude_vector
    )


def one(module: nn.Module, keys: Sequence[str]) -> str:
    """The adapter, where exactly one is meant.

    Raises:
        UnsupportedModelError: No adapter is active, or several are.
    """
    registry_of(module)
    if len(keys) != 1:
        msg = f"the adapters {list(keys)} are active, and it takes exactly one here. Activate one of them."
        raise UnsupportedModelError(msg)
    return keys[0]


# --- switching ------------------------------------------------------------------------------------------------------


@contextmanager
def activated(module: nn.Module, keys: Sequence[str], *, ordinary: bool) -> Iterator[None]:
    """These adapters answer inside, and what answered before does afterwards. The gradients' flags are left alone.

    PEFT's own `set_adapter` also sets every flag, which takes 40 ms over the 210 layers of SmolLM2; this takes one.

    Args:
        module: The caller has its lock.
        keys: PEFT's names of the adapters; an empty sequence is the bare base.
        ordinary: The remainder answers too, and nothing does where the user has switched all adapters off.

    Raises:
        UnsupportedModelError: An adapter is merged into the base, and another is to answer.
    """
    found = _registry(module)
    if found is None:
        yield
        return
    remainder = has_remainder(module)
    wanted = [*keys, REMAINDER] if remainder and ordinary else list(keys)
    layers = list(found.layers.values())
    if not ordinary:
        check_unmerged(found)
    # PEFT's private attributes: its setters also set the gradients' flags of every adapter
    former = [(part, part._active_adapter, part._disable_adapters) for part in (*layers, *found.others)]
    if not found.active:
        found.resting = bool(layers[0]._disable_adapters)
    disabled = found.resting if ordinary else not keys
    found.active.append(ordinary)
    try:
        if remainder and ordinary:
            _freeze_remainder(layers)
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = wanted, disabled
        for part in found.others:
            part._active_adapter = [key for key in keys if key in part._get_available_adapters()]
            part._disable_adapters = disabled
        yield
    finally:
        found.active.pop()
        for part, active, off in former:
            part._active_adapter, part._disable_adapters = active, off
        if remainder != has_remainder(module):  # it came or went inside
            settle(module, found)


def _freeze_remainder(layers: Sequence[Any]) -> None:
    """PEFT's `disable_adapter()` makes all that is active trainable when it ends."""
    parts = [part[REMAINDER] for layer in layers for part in (layer.lora_A, layer.lora_B) if REMAINDER in part]
    if parts[0].weight.requires_grad:
        for part in parts:
            part.requires_grad_(False)  # noqa: FBT003 (torch's signature)


def settle(module: nn.Module, found: AdapterRegistry) -> None:
    """The remainder answers with the ordinary model, and with the module where nobody has chosen; or it is gone."""
    present = has_remainder(module) and (not found.active or found.active[-1])
    for layer in found.layers.values():
        active = layer.active_adapters
        if present != (REMAINDER in active):
            layer._active_adapter = [k for k in active if k != REMAINDER] + [REMAINDER] * present


def check_unmerged(found: AdapterRegistry) -> None:
    """Makes sure that the base weights are the base's.

    Raises:
        UnsupportedModelError: An adapter is merged into the base weights.
    """
    merged = next((name for name, layer in found.layers.items() if layer.merged_adapters), None)
    if merged is not None:
        msg = (
            f"an adapter is merged into the base weights ({merged}), so no other can take its place. "
            "Call module.unmerge_adapter() first."
        )
        raise UnsupportedModelError(msg)


@contextmanager
def requiring_gradients(parameters: Collection[nn.Parameter], *, required: bool) -> Iterator[None]:
    """These parameters require a gradient inside, or none; as before afterwards."""
    changed = [p for p in parameters if p.requires_grad != required]
    try:
        for parameter in changed:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not required)


def parameters_of(module: nn.Module, keys: Collection[str]) -> list[nn.Parameter]:
    """All that these adapters add, without a walk over the whole module."""
    found = _registry(module)
    parts = [*found.layers.values(), *found.others] if found is not None else []
    containers = [attrgetter(name)(part) for part in parts for name in part.adapter_layer_names]
    # private dicts, because most are empty: the containers' own `in` and `[]` would take most of the time
    lone = [c._parameters[key] for c in containers for key in keys if key in c._parameters]
    modules = [c._modules[key] for c in containers for key in keys if key in c._modules]
    return lone + [p for part in modules for p in part.parameters()]


def idle_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The factors of the adapters that do not answer now: no forward pass reads them."""
    found = _registry(module)
    if found is None:
        return set()
    layer = next(iter(found.layers.values()))
    answering = () if layer._disable_adapters else layer.active_adapters
    return set(parameters_of(module, configs_of(module).keys() - set(answering)))
