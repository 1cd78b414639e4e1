"""A LoRA adapter as a standard PEFT folder: resolved settings and one safetensors file.

With a frozen remainder beside the trained factors the folder contains both side by side, so that plain PEFT computes
their sum, and the chain says which columns are the trained ones. Knows PEFT. Knows nothing of LangChain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmchain_fed.chain.saving.fields import SETTINGS, AdapterSettings, Trained, read_settings
from llmchain_fed.errors import ChainFileError, LLMChainFedError, UnsupportedModelError, WeightsMismatchError
from llmchain_fed.model.adapters.lora_config import check_in_use, unwrapped
from llmchain_fed.model.adapters.residents import Factors
from llmchain_fed.model.adapters.resolved import Layer, Resolved, check_names, resolve, settings
from llmchain_fed.model.adapters.switching import GLOBAL
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.weights import check_state, is_adapter
from llmchain_fed.model.wrapping import wrap
from llmchain_fed.untrusted import checked as checked_fields
from llmchain_fed.untrusted import shown

FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"
_TASK = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
_PREFIX = "base_model.model."

# --- writing --------------------------------------------------------------------------------------------------------


def checked(model: LocalModel) -> Resolved:
    """What would be written of the model's adapter, once it can be.

    Raises:
        ChainFileError: Several adapters answer, or PEFT could not make this one again.
    """
    if len(model.peft_names) != 1:
        msg = (
            f"{model.name!r} answers with {len(model.peft_names)} adapters {list(model.peft_names)}, and a chain is "
            "saved with exactly one. Save the chain itself or chain.with_adapter(name)."
        )
        raise ChainFileError(msg)
    if model.adapter is None:  # a view switches adapters by itself
        try:
            check_in_use(model.module)
        except UnsupportedModelError as error:
            raise ChainFileError(str(error)) from None
    found = resolve(model.module, model.peft_names[0])
    check_names(model.module, found)
    _settings(found, model, base_name="")
    return found


def write(model: LocalModel, directory: Path, *, base_name: str) -> Trained | None:
    """Writes the adapter that answers into `adapter/`; which columns are trained, where others lie beside them.

    The model is locked exclusively. `base_name` is what other tools call the base: a hub id where there is one.
    """
    found = checked(model)
    (key,) = model.peft_names
    module = cast(PeftModel, unwrapped(model.module))
    state = _state_of(module, key)
    remainder = model.remainder() if model.adapter in (None, GLOBAL) else {}
    written, trained = found, None
    if remainder:
        own = settings(found)
        trained = checked_fields(
            Trained,
            {name: own[name] for name in Trained.model_fields},
            what="what is trained of the adapter",
            error=ChainFileError,
        )
        state, written = _side_by_side(state, found, remainder)
    folder = directory / FOLDER
    folder.mkdir()
    text = _settings(written, model, base_name=base_name).model_dump_json(indent=2)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    # copies: tied tensors share memory, which the format refuses; loading ties them again
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in state.items()}, folder / WEIGHTS)
    return trained


def _settings(written: Resolved, model: LocalModel, *, base_name: str) -> AdapterSettings:
    """What is written of an adapter; in the ranges in which it will be read."""
    config: Any = cast(PeftModel, unwrapped(model.module)).peft_config[model.peft_names[0]]
    values = settings(written) | {
        "peft_type": "LORA",
        "task_type": _TASK[model.kind],
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "fan_in_fan_out": bool(config.fan_in_fan_out),
    }
    what = f"the adapter of {model.name!r:.200}, as it would be saved,"
    return checked_fields(AdapterSettings, values, what=what, error=ChainFileError)


def _state_of(module: PeftModel, key: str) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names for them."""
    # No embeddings: the base has them, and PEFT would look for the base's own on a hub. The state is passed in, since
    # of its own PEFT 0.21 warns of lora_bias as of a matrix of the wrong shape (_validate_lora_adapter_state_dict; no
    # report found: https://github.com/huggingface/peft/blob/main/src/peft/utils/save_and_load.py).
    found: dict[str, Tensor] = get_peft_model_state_dict(
        module, state_dict=module.state_dict(), adapter_name=key, save_embedding_layers=False
    )
    return found


def _side_by_side(
    state: Mapping[str, Tensor], found: Resolved, remainder: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], Resolved]:
    """[B, B'/s] and [A; A'], whose product times s is s·B·A + B'·A'."""
    state, layers = dict(state), dict(found.modules)
    for name, factors in remainder.items():
        b, a = _compact(*factors)
        layer = layers[name]
        in_a, in_b = f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"
        state[in_a] = torch.cat([state[in_a].detach().cpu(), a.to(state[in_a].dtype)])
        state[in_b] = torch.cat([state[in_b].detach().cpu(), (b / layer.scaling).to(state[in_b].dtype)], dim=1)
        layers[name] = Layer(layer.rank + a.shape[0], layer.scaling)
    return state, replace(found, modules=layers)


def _compact(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with at most min(m, n) columns: B = Q₁R₁ and Aᵀ = Q₂R₂, and the small middle decomposed."""
    full = min(b.shape[0], a.shape[1])
    if a.shape[0] <= full:
        return b, a
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return ((q_b @ u) * s)[:, :full].to(b.dtype), (vt @ q_a.T)[:full].to(a.dtype)


# --- reading --------------------------------------------------------------------------------------------------------


def load(model: LocalModel, directory: Path, trained: Trained | None) -> LocalModel:
    """The model with the saved adapter as the one that it answers with and trains, and with the saved remainder.

    Raises:
        ChainFileError: The folder contains something else than `write` writes, or it does not fit the model.
    """
    folder = directory / FOLDER
    try:
        whole = read_settings(folder)
        state = load_file(folder / WEIGHTS)
        _check_ranks(whole, state)
        remainder: Factors = {}
        own = whole
        if trained is not None:
            own = whole.model_copy(update=trained.model_dump())
            state, remainder = _parted(state, whole.layers(), own.layers())
        if not isinstance(unwrapped(model.module), PeftModel):
            if any(is_adapter(name) for name, _ in model.module.named_parameters()):
                msg = (
                    f"another adapter is already in {model.name!r}: loading this one would replace it "
                    "in the chain that uses it. Give every chain a base of its own."
                )
                raise ChainFileError(msg)
            model = model.wrapped(wrap(model.module, own.to_peft(), quiet=True).eval())
        if model.adapter not in (None, GLOBAL) or len(model.peft_names) != 1:
            msg = (
                f"{model.name!r} answers with the adapters {list(model.peft_names)}, so this one cannot become the one "
                "that is trained. Pass the base, or the model itself with one adapter active."
            )
            raise ChainFileError(msg)
        _check_alike(model, own)
        module: Any = unwrapped(model.module)
        (name,) = model.peft_names
        check_state(_state_of(module, name), state)
        with model.exclusive():
            model.load_remainder(remainder)
            _take_types(module, _state_of(module, name), state)
            set_peft_model_state_dict(module, state, adapter_name=name)  # raises on nothing, hence the check
    except (WeightsMismatchError, UnsupportedModelError) as error:
        msg = f"the saved adapter does not fit: {error}"
        raise ChainFileError(msg) from None
    except LLMChainFedError:
        raise
    except Exception as error:  # PEFT may raise anything at all
        msg = f"the adapter in {str(directory)!r} cannot be read: {shown(str(error), 300)}. {SAVE_AGAIN}"
        raise ChainFileError(msg) from None
    return model


def _check_ranks(whole: AdapterSettings, state: Mapping[str, Tensor]) -> None:
    """Makes sure that no rank is larger than what lies in the file: PEFT takes the memory for it first."""
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    rank = max([whole.r, *whole.rank_pattern.values()])
    if rank > largest:
        msg = f"{SETTINGS} has a rank of {rank:,}, and no tensor of {WEIGHTS} is as large. {SAVE_AGAIN}"
        raise ChainFileError(msg)
    if not math.isfinite(sum(layer.scaling for layer in whole.layers().values())):
        msg = f"{SETTINGS} has factors that count by no finite number. {SAVE_AGAIN}"
        raise ChainFileError(msg)


def _take_types(module: PeftModel, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """PEFT makes an adapter in float32 over whatever base; one that was trained in another type answers in it."""
    places = {p.data_ptr(): p for p in module.parameters()}
    for name, tensor in own.items():
        parameter = places.get(tensor.data_ptr())
        if parameter is not None and parameter.dtype != state[name].dtype:
            parameter.data = parameter.data.to(state[name].dtype)


def _check_alike(model: LocalModel, own: AdapterSettings) -> None:
    """PEFT has made, or a given model has, what the file says: every layer, rank and scaling, and nothing else."""
    found = resolve(model.module, model.peft_names[0])
    modules = {n: layer for n, layer in own.layers().items() if n in own.target_modules}
    wanted = Resolved(
        modules=modules,
        parameters={n: layer for n, layer in own.layers().items() if n not in modules},
        modules_to_save=tuple(sorted(own.modules_to_save or ())),
        tied=found.tied if own.ensure_weight_tying else (),
        tokens={n: tuple(i) for n, i in (own.trainable_token_indices or {}).items()},
        tied_tokens=found.tied_tokens,
        dropout=own.lora_dropout,
        use_rslora=own.use_rslora,
        use_dora=own.use_dora,
        lora_bias=own.lora_bias,
    )
    if different := wanted.differences(found):
        msg = (
            f"the chain's adapter was saved with other settings than {model.name!r} has, so answers would differ: "
            f"{'; '.join(different)}. Pass the base without an adapter."
        )
        raise ChainFileError(msg)


def _parted(
    state: Mapping[str, Tensor], whole: Mapping[str, Layer], own: Mapping[str, Layer]
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """The trained factors, and the remainder's by layer: (B', A')."""
    state = dict(state)
    remainder: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in own.items():
        both, rank = whole[name], layer.rank
        if both.rank < rank or abs(both.scaling - layer.scaling) > 1e-6 * abs(layer.scaling):
            msg = f"{name} has {both.rank} columns, of which {rank} should be the trained ones. Save the chain again."
            raise ChainFileError(msg)
        if both.rank == rank:
            continue
        in_a, in_b = f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"
        a, b = state[in_a], state[in_b]
        if a.shape[0] != both.rank or b.shape[1] != both.rank:
            msg = f"{name} has factors of other ranks than its settings say. Save the chain again."
            raise ChainFileError(msg)
        remainder[name] = (b[:, rank:] * layer.scaling, a[rank:].contiguous())
        state[in_a], state[in_b] = a[:rank].contiguous(), b[:, :rank].contiguous()
    return state, remainder
