"""The model of a saved chain: its base by name or in the folder, what differs from the name, tokenizer and adapter.

Knows transformers' models and what decides their answers. Knows nothing of LangChain, prompts or digests of files.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from llmchain_fed.chain.saving import adapter
from llmchain_fed.chain.saving import tokenizer as saved_tokenizer
from llmchain_fed.chain.saving.fields import DType, ModelData
from llmchain_fed.errors import ChainFileError, LLMChainFedError, UnsupportedModelError
from llmchain_fed.model import loading, pristine
from llmchain_fed.model.adapters.lora_config import unwrapped
from llmchain_fed.model.folder import load_options, settings
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.model.generation import saved
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.weights import base_fingerprint, is_adapter, stable_name
from llmchain_fed.model.wrapping import every_tensor_saved, loader_of
from llmchain_fed.recipes.schema import HUB_ID
from llmchain_fed.untrusted import dump_yaml, parse_yaml, shown

BASE, CHANGES = "base", "base_changes.safetensors"
FOLDERS = (BASE, adapter.FOLDER, saved_tokenizer.FOLDER)


# --- before anything is trained -------------------------------------------------------------------------------------


def check(model: LocalModel) -> None:
    """Makes sure that a chain over this model could be saved and would answer the same once loaded; writes nothing.

    Raises:
        ChainFileError: What no file can store, with the remedy.
    """
    base = base_of(model)
    if model.reference is not None and (len(model.reference) > 200 or not re.fullmatch(HUB_ID, model.reference)):
        msg = (
            f"{shown(model.reference)!r} is no id of a hub, by which others could load the base. Leave reference out: "
            "the base comes along then."
        )
        raise ChainFileError(msg)
    if isinstance(unwrapped(model.module), PeftModel):
        adapter.checked(model)
    if model.tokenizer is None or not hasattr(base, "save_pretrained"):
        msg = (
            f"{model.name!r} has no save_pretrained or no tokenizer, so it could not be loaded again. "
            "Wrap a Hugging Face model."
        )
        raise ChainFileError(msg)
    saved_tokenizer.check(model.tokenizer)
    _generation(base)
    if _comes_along(model):
        _check_base(base)
    if not getattr(base, "is_quantized", False):
        _check_structure(base)


def base_of(model: LocalModel) -> Any:
    """The module below its adapter."""
    outer = unwrapped(model.module)
    return outer.get_base_model() if isinstance(outer, PeftModel) else outer


def _comes_along(model: LocalModel) -> bool:
    """Whether the base's weights lie in the directory: nobody could load it by name, or its weights were trained."""
    named = model.reference is not None and isinstance(unwrapped(model.module), PeftModel)
    quantised = getattr(base_of(model), "is_quantized", False)
    return not quantised and (not named or _is_contradicted(model))


def _is_contradicted(model: LocalModel) -> bool:
    """Whether the base cannot be what its name loads, though its owner says so: it has other rows.

    A base that `from_pretrained` has loaded has a record, which says exactly what differs.
    """
    base = base_of(model)
    if model.reference is None or pristine.of(base) is not None:
        return False
    try:
        path = loading.resolve(model.reference)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return False  # nobody here knows better
    rows: int = base.get_input_embeddings().weight.shape[0]
    return rows != getattr(config.get_text_config(), "vocab_size", rows)


def _check_base(base: Any) -> None:
    """Makes sure that transformers would make this very class, with these very tensors, from the configuration."""
    auto: Any = loader_of(base.config)
    table = getattr(auto, "_model_mapping", {})
    mapped = table.get(type(base.config), ()) if table else auto
    classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
    if type(base) not in classes:
        known = [c.__name__ for c in classes] or "nothing"
        msg = (
            f"a saved {type(base).__name__} would be loaded as {known} by {auto.__name__}, so its answers would "
            "differ. Wrap a model of that class, or load this one by name with a LoRA adapter."
        )
        raise ChainFileError(msg)
    settings.check_writable(base.config, error=ChainFileError)
    types = {p.dtype for n, p in base.named_parameters() if not is_adapter(n) and p.is_floating_point()}
    if len(types) > 1 and not getattr(base, "_keep_in_fp32_modules", None):
        msg = f"the base has {sorted(map(str, types))} at once, and is loaded in one type. Convert it to one."
        raise ChainFileError(msg)


def _check_structure(base: Any) -> None:
    """Makes sure that the configuration makes these very tensors, of these kinds of modules."""
    try:
        with torch.device("meta"):
            made = type(base)(base.config)
    except Exception:  # a class with arguments of its own, or one that cannot be made without memory
        return
    own, fresh = _shapes(base), _shapes(made)
    if own != fresh:
        odd = sorted(n for n in own.keys() | fresh.keys() if own.get(n) != fresh.get(n))
        msg = (
            f"{type(base).__name__} has other tensors, or ties others, than its configuration makes ({odd[:3]}), so it "
            "could not be loaded again. Change the configuration along with the module."
        )
        raise ChainFileError(msg)


def _shapes(base: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of what is saved; a parameter that is tied to an earlier one says so by having none."""
    found = {stable_name(n): tuple(t.shape) for n, t in base.state_dict().items() if not is_adapter(n)}
    first = {stable_name(n) for n, _ in base.named_parameters()}
    every = {stable_name(n) for n, _ in base.named_parameters(remove_duplicate=False)}
    return found | dict.fromkeys((every - first) & found.keys(), ())


def _generation(base: Any) -> dict[str, Any] | None:
    own = getattr(base, "generation_config", None)
    if not isinstance(own, GenerationConfig):
        return None
    data = saved.to_data(own)
    try:
        back = saved.to_data(saved.from_data(data))
        text = dump_yaml(data, what="it", error=ChainFileError)
        read = parse_yaml(text, what="it", error=ChainFileError)
    except (ValueError, TypeError, ChainFileError) as error:
        msg = f"the model's generation_config cannot be written as data ({error}). Reset that field."
        raise ChainFileError(msg) from None
    if back != data or read != data:
        odd = [k for k in data if back.get(k) != data[k] or read.get(k) != data[k]]
        msg = f"the model's generation_config has {odd}, which no file can store. Reset them."
        raise ChainFileError(msg)
    return data


# --- writing --------------------------------------------------------------------------------------------------------


def write(model: LocalModel, directory: Path) -> ModelData:
    """Writes all of the model, which the caller has locked, that `load` needs into an empty directory.

    Raises:
        ChainFileError: See `check`.
    """
    check(model)
    base, reference = base_of(model), model.reference
    changes = pristine.Changes()
    along = _comes_along(model)
    if not along and reference is not None and (origin := pristine.of(base)) is not None:
        changes = pristine.changes(base, origin)
        if changes.whole:
            _check_base(base)
            along, changes = True, pristine.Changes()
    if along or not isinstance(unwrapped(model.module), PeftModel):
        reference = None
    tensors = changes.tensors
    if along:
        _write_base(base, directory / BASE)
        tensors = pristine.unsaved_buffers(base)
    if tensors:
        save_file(tensors, directory / CHANGES)
    saved_tokenizer.write(model.tokenizer, directory)
    trained = None
    dequantised = loading.dequantised_from() if reference == load_options.EMBEDDED else None
    if isinstance(unwrapped(model.module), PeftModel):
        known_as = load_options.HUB_ID if reference == load_options.EMBEDDED else reference
        trained = adapter.write(model, directory, base_name=known_as or model.name)
        _write_card(directory, known_as, model.name, dequantised=dequantised, changed=bool(changes.tensors))
    types = [str(p.dtype).removeprefix("torch.") for n, p in base.named_parameters() if not is_adapter(n)]
    dtype: Any = next((t for t in types if t in get_args(DType)), "float32")  # a quantised base also has integers
    return ModelData(
        name=model.name,
        reference=reference,
        fingerprint=base_fingerprint(model.module),
        digest=pristine.digest(base) if along or pristine.of(base) is not None else None,
        dtype=dtype,
        kind=model.kind,
        dequantised_from=dequantised,
        vocabulary=changes.vocabulary,
        config=changes.config,
        generation=_generation(base),
        trained=trained,
    )


def _write_base(base: Any, folder: Path) -> None:
    state = {stable_name(n): t for n, t in base.state_dict().items() if not is_adapter(n)}
    as_written = copy.copy(base)  # shares everything; what transformers must not see is changed on the copy alone
    with saved.save_without_generation_config(as_written), every_tensor_saved(as_written):
        as_written.save_pretrained(folder, state_dict=state)
    settings.without_origin(folder)


def _write_card(directory: Path, known_as: str | None, name: str, *, dequantised: str | None, changed: bool) -> None:
    lines = [f"A LoRA adapter for `{known_as or name}`, made by federated training; PEFT loads this folder."]
    if dequantised:
        lines.append(
            f"It was trained over weights that were dequantised from {dequantised}: over the hub's own weights it "
            "answers a little differently."
        )
    if changed:
        lines.append(
            f"The base was changed as well: what differs lies beside this folder, in {CHANGES}, which PEFT does not "
            "read."
        )
    if known_as is None:
        lines.append(f"The base lies beside this folder, in {BASE}/, unless it is quantised.")
    (directory / adapter.FOLDER / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


# --- reading --------------------------------------------------------------------------------------------------------


def load(directory: Path, data: ModelData, given: LocalModel | None) -> LocalModel:
    """The model of a saved chain, with its adapter's weights.

    `given` takes the place of the base on record; its trainable weights are overwritten.

    Raises:
        ChainFileError: No base to be had, one of other weights, or one with another adapter.
    """
    tokenizer = saved_tokenizer.load(directory)
    generation = _from_data(data.generation)
    model = _base(directory, data, tokenizer, generation) if given is None else given
    if given is not None:
        _check_given(given, data, tokenizer)
    found = base_fingerprint(model.module)  # as it is now: `given` may have learnt since it was made
    same = data.digest is None or pristine.digest(base_of(model)) == data.digest
    if found != data.fingerprint or not same:
        msg = (
            f"the base weights differ: saved over {data.name!r} ({data.fingerprint}), found {model.name!r} ({found}). "
            "Use the same base model and revision, in the same type."
        )
        raise ChainFileError(msg)
    if (directory / adapter.FOLDER).is_dir():
        model = adapter.load(model, directory, data.trained)
    elif isinstance(unwrapped(model.module), PeftModel):
        msg = f"the chain was saved without an adapter, {model.name!r} has one, so answers would differ. Pass its base."
        raise ChainFileError(msg)
    if model.tokenizer is None:
        model.tokenizer = tokenizer
    return model


def _base(directory: Path, data: ModelData, tokenizer: Any, generation: GenerationConfig | None) -> LocalModel:
    """The base on record, as it was when the chain was saved."""
    folder = directory / BASE
    source = str(folder) if folder.is_dir() else data.reference
    if source is None:
        msg = (
            f"the base {data.name!r} was not saved (it is quantised). Pass it: "
            "LLMChain.load(directory, model=LocalModel(…))."
        )
        raise ChainFileError(msg)
    try:
        base: Any = loading.load_base(source, dtype=getattr(torch, data.dtype), by_name=not folder.is_dir())
    except UnsupportedModelError as error:
        msg = f"the base {data.name!r} cannot be loaded: {error}"
        raise ChainFileError(msg) from None
    changed = directory / CHANGES
    try:
        tensors = load_file(changed) if changed.is_file() else {}
        pristine.apply(base, tensors, data.vocabulary, data.config)
        base.generation_config = generation
        return LocalModel(base, tokenizer, name=data.name, reference=data.reference)
    except LLMChainFedError:
        raise
    except Exception as error:  # what transformers raises where a value makes no sense to it
        msg = f"the base in {str(directory)!r} cannot be made: {shown(str(error), 300)}. {SAVE_AGAIN}"
        raise ChainFileError(msg) from None


def _from_data(data: dict[str, Any] | None) -> GenerationConfig | None:
    try:
        return None if data is None else saved.from_data(data)
    except Exception as error:  # a watermark's settings may be anything at all
        msg = f"chain.yaml: {shown(str(error), 300)}. {SAVE_AGAIN}"
        raise ChainFileError(msg) from None


def _check_given(given: LocalModel, data: ModelData, tokenizer: Any) -> None:
    """A base of the caller's own is not changed, so it must be what the chain needs."""
    if given.tokenizer is not None and (different := saved_tokenizer.differences(tokenizer, given.tokenizer)):
        msg = (
            f"the chain was saved with another tokenizer than {given.name!r} has ({', '.join(different)} differ), so "
            "answers would differ. Pass the base with the saved one: AutoTokenizer.from_pretrained(directory / "
            f"'{saved_tokenizer.FOLDER}')."
        )
        raise ChainFileError(msg)
    here = _generation(base_of(given))
    if here != data.generation:
        both = [here or {}, data.generation or {}]
        odd = sorted(k for k in both[0].keys() | both[1].keys() if both[0].get(k) != both[1].get(k))
        msg = (
            f"the chain was saved with another generation_config than {given.name!r} has ({odd} differ), so answers "
            "would differ. Set the same values on the module."
        )
        raise ChainFileError(msg)
