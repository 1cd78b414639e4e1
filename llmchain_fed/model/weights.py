"""A module's weights as named tensors: stable names, exact loading, short hashes.

Knows torch modules and PEFT's naming. Knows nothing about text, training or federation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmchain_fed.errors import UnsupportedModelError, WeightsMismatchError

_SAMPLED_VALUES = 64  # per tensor, for the fingerprint of a base that may be many gigabytes
_WATCHED_VALUES = 16  # per tensor, to notice a change before every call
_PIECE = 2**18  # values that are looked at together
_WRAPPINGS = ("_orig_mod", "base_layer", "original_module", "token_adapter")
_SLOTS = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")


def stable_name(name: str, adapters: Iterable[str] = ()) -> str:
    """A parameter's name without what only the wrapping adds (PEFT's prefixes, the adapter's name, compile).

    >>> stable_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight", ["default"])
    'model.layers.0.q_proj.lora_A.weight'
    """
    given = name.removeprefix("_orig_mod.").removeprefix("base_model.model.").split(".")
    slot = next((i for i, p in enumerate(given) if _is_adapter_slot(p)), None)
    # a LoRA layer within another (two parameters of one module): only the place within tells their factors apart
    nested = slot is not None and given[slot - 1] == "base_layer"
    parts = [p for p in given if p not in _WRAPPINGS or (nested and p == "base_layer")]
    known = set(adapters)
    kept = [p for i, p in enumerate(parts) if not (i and p in known and _is_adapter_slot(parts[i - 1]))]
    return ".".join(kept)


def _is_adapter_slot(part: str) -> bool:
    return part.startswith("lora_") or part in _SLOTS


def adapter_names(module: nn.Module) -> list[str]:
    """The names of a PEFT module's active adapters; empty for a plain module."""
    active = getattr(module, "active_adapters", None) if hasattr(module, "peft_config") else None
    names = active() if callable(active) else active
    return [names] if isinstance(names, str) else list(names or [])


def _parameters_without(module: nn.Module, adapters: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    """`named_parameters()` that does not walk into these adapters, of which there may be many beside the one."""
    found: list[tuple[str, nn.Parameter]] = []
    seen: set[int] = set()

    # A list, because generators inside generators hand every parameter up through all levels.
    def walk(part: nn.Module, prefix: str, inside: Collection[str]) -> None:
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in seen and name not in inside:
                seen.add(id(parameter))
                found.append((prefix + name, parameter))
        for name, child in part._modules.items():
            if child is not None and id(child) not in seen and name not in inside:
                seen.add(id(child))
                if child._parameters or child._modules:
                    walk(child, f"{prefix}{name}.", adapters if _is_adapter_slot(name) else ())

    walk(module, "", ())
    return found


def _other_adapters(module: nn.Module, adapters: Collection[str]) -> set[str]:
    return set(getattr(module, "peft_config", None) or ()) - set(adapters)


def trainable_parameters(module: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Stable name → parameter, for every parameter that requires a gradient; tied ones once.

    Those of these adapters, by default of the active ones, and of no adapter.

    Raises:
        UnsupportedModelError: Two parameters share a stable name, because several adapters are trained at once.
    """
    adapters = adapter_names(module) if adapters is None else adapters
    found: dict[str, nn.Parameter] = {}
    for name, parameter in _parameters_without(module, _other_adapters(module, adapters)):
        if not parameter.requires_grad:
            continue
        stable = stable_name(name, adapters)
        if stable in found:
            msg = f"{stable} is trained by more than one of the adapters {adapters}. Activate one of them."
            raise UnsupportedModelError(msg)
        found[stable] = parameter
    return found


def adapter_parameters(module: nn.Module, adapters: Sequence[str]) -> dict[str, nn.Parameter]:
    """Stable name → parameter, for all that these adapters add, whether it requires a gradient or not."""
    named = _parameters_without(module, _other_adapters(module, adapters))
    return {stable_name(n, adapters): p for n, p in named if _belongs_to(n, adapters)}


def _belongs_to(name: str, adapters: Collection[str]) -> bool:
    parts = name.split(".")
    return any(p in adapters and _is_adapter_slot(parts[i]) for i, p in enumerate(parts[1:]))


def deciding_parameters(
    module: nn.Module, adapters: Sequence[str] | None = None, *, with_others: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """Stable name → parameter, for all that can differ over one base: the trainable ones and these adapters'.

    Those of `with_others`, which answer along with them, keep their adapter's name.
    """
    adapters = adapter_names(module) if adapters is None else adapters
    named = _parameters_without(module, _other_adapters(module, {*adapters, *with_others}))
    return {stable_name(n, adapters): p for n, p in named if p.requires_grad or is_adapter(n)}


def change_stamp(parameters: Mapping[str, Tensor]) -> bytes:
    """Differs once the values have changed; cheap enough for every call.

    torch counts in-place changes, but not those through `.data` nor those of fused optimizers, for which 16 values of
    each tensor are watched: a training step changes them all, a single value written by hand may go unnoticed.
    """
    versions = sum(p._version for p in parameters.values()).to_bytes(8, "little")
    device = next((p.device for p in parameters.values()), None)  # collected there: one transfer, not one per tensor
    watched = [_spread(p, _WATCHED_VALUES).to(device, torch.float32) for p in parameters.values()]
    return versions + bytes(_raw(torch.cat(watched).cpu())) if watched else versions


def copy_state(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory with the module."""
    return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in parameters.items()}


def check_state(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Makes sure that a state fits, before any of it is used.

    Raises:
        WeightsMismatchError: Names are missing or too many, a shape differs, or values are not finite floats.
    """
    missing, extra = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or extra:
        msg = (
            f"the state lacks {len(missing)} tensors {missing[:3]} and adds {len(extra)} {extra[:3]}: it was made for "
            "another model or adapter. Use the same base model and LoraConfig."
        )
        raise WeightsMismatchError(msg)
    for name, parameter in parameters.items():
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise WeightsMismatchError(f"{name} is not a floating-point tensor but {kind}.")  # noqa: EM102
        if value.shape != parameter.shape:
            msg = (
                f"{name} has shape {tuple(value.shape)}, the model's is {tuple(parameter.shape)}: it was made for "
                "another model or rank. Use the same base model and LoraConfig."
            )
            raise WeightsMismatchError(msg)
        if not all_finite(value.to(parameter.dtype)):  # the model's own type may represent less
            msg = (
                f"{name} contains NaN or values infinite in {parameter.dtype}. Lower the learning rate or "
                "set max_grad_norm."
            )
            raise WeightsMismatchError(msg)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass over the values in the usual case."""
    # NaN and infinity carry over into a sum; only a sum that overflowed by itself needs the closer look, which is taken
    # in pieces, so that memory for the answer stays small
    if math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return True
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), _PIECE))


@torch.no_grad()
def write_state(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies an already checked state into the parameters, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """64 bits over names, shapes, types and every value, as hex; independent of the mapping's order."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def base_fingerprint(module: nn.Module) -> str:
    """64 bits that tell one base from another, as hex; adapters do not count.

    Covers every base parameter's name and shape, 64 values of each and one of each of its rows, rounded to bfloat16, so
    that the same base kept in float32 and in bfloat16 agree. It tells honest mistakes apart, a changed row among them;
    it is no proof against forgery.
    """
    digest = hashlib.blake2b(digest_size=8)
    base = {stable_name(n): p for n, p in module.named_parameters() if not is_adapter(n)}
    for name, parameter in sorted(base.items()):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        digest.update(_raw(_spread(parameter, _SAMPLED_VALUES).to("cpu", torch.bfloat16).contiguous()))
        if parameter.dim() > 1:
            digest.update(_raw(_one_a_row(parameter).to("cpu", torch.bfloat16).contiguous()))
    return digest.hexdigest()


def _one_a_row(tensor: Tensor) -> Tensor:
    """(rows,) one value of each row, from another column each time."""
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    index = torch.arange(len(rows), device=rows.device)
    return rows[index, index * 7919 % rows.shape[1]]


def _spread(tensor: Tensor, count: int) -> Tensor:
    """(≤ count,) values spread evenly over a tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def is_adapter(name: str) -> bool:
    """True for a parameter that an adapter adds, by its name within the module."""
    return any(_is_adapter_slot(part) for part in name.split("."))


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
