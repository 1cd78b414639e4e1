"""A chain as a directory: a declarative `chain.yaml` and safetensors files, nothing that can run.

Knows files, digests and how a LocalModel's base and adapter are stored. Knows nothing of LangChain: what the prompt
and the parser mean is `chain`'s business.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmchain_fed import adapters
from llmchain_fed.errors import ChainFileError, UnsupportedModelError, WeightsMismatchError
from llmchain_fed.model import LocalModel
from llmchain_fed.pretrained import add_adapter
from llmchain_fed.recipes import PromptData
from llmchain_fed.weights import base_fingerprint, check_state, is_adapter, stable_name
from llmchain_fed.wrapping import every_tensor_saved

RECIPE, BASE, ADAPTER, REMAINDER = "chain.yaml", "base", "adapter", "remainder"
_FOLDERS = (BASE, ADAPTER, REMAINDER)
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
DType = Literal["float32", "bfloat16", "float16", "float64"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelData(_Strict):
    """Which base the chain stands on, and whether its weights lie in the directory."""

    name: str
    reference: str | None
    """embedded name or hub id to load the base from; None: it lies in `base/` or must be passed"""
    fingerprint: str
    dtype: DType
    kind: Literal["causal", "seq2seq"]


class ChainFile(_Strict):
    """`chain.yaml`: everything but the weights."""

    format: Literal[1, 2] = 1
    """2: with a remainder, which versions that know only 1 would leave out without a word"""
    llmchain_fed: str
    """the version that wrote it"""
    face: Literal["llm", "chat"]
    options: dict[str, Any]
    llm_kwargs: dict[str, Any]
    prompt: PromptData
    parser: str
    model: ModelData
    files: dict[str, str]
    """path within the directory → SHA-256 of its content"""

    @model_validator(mode="after")
    def _format_says_what_is_there(self) -> Self:
        if self.format != _format_of(self.files):
            msg = f"format {self.format} does not go with the files listed"
            raise ValueError(msg)
        return self


def _format_of(files: Iterable[str]) -> Literal[1, 2]:
    return 2 if any(name.startswith(f"{REMAINDER}/") for name in files) else 1


def write(directory: Path, model: LocalModel, **parts: Any) -> None:
    """Writes the whole directory or leaves what was there before.

    Raises:
        ChainFileError: The directory holds something else than a chain.
    """
    if directory.exists() and not _may_be_replaced(directory):
        msg = (
            f"{str(directory)!r} holds something else than a chain, so it is not overwritten. Choose another directory."
        )
        raise ChainFileError(msg)
    with _replaced(directory) as scratch, model.exclusive():
        data = _write_model(model, scratch)
        files = {name: _digest(scratch / name) for name in _files(scratch)}
        parts |= {"format": _format_of(files), "llmchain_fed": importlib.metadata.version("llmchain-fed")}
        file = ChainFile(model=data, files=files, **parts)
        try:
            text = yaml.safe_dump(file.model_dump(), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            msg = f"the chain's options or llm_kwargs hold more than data ({error}), which no file can. Leave that out."
            raise ChainFileError(msg) from None
        (scratch / RECIPE).write_text(text, encoding="utf-8")


def _may_be_replaced(directory: Path) -> bool:
    """An empty directory, or one with a chain and nothing of the user's beside it."""
    if not directory.is_dir() or {p.name for p in directory.iterdir()} - {RECIPE, *_FOLDERS}:
        return False
    try:
        return not any(directory.iterdir()) or bool(_parse(directory / RECIPE))
    except ChainFileError:
        return False


def _files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        if directory.exists():
            old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
            directory.rename(old / directory.name)
            try:
                scratch.rename(directory)
            except BaseException:
                (old / directory.name).rename(directory)
                raise
            shutil.rmtree(old)
        else:
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(directory: Path) -> ChainFile:
    """`chain.yaml`, once every file it lists has been found and has its content.

    Raises:
        ChainFileError: Not a chain directory, or one that is incomplete or altered.
    """
    file = _parse(directory / RECIPE)
    for name, digest in file.files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            msg = f"{name!r} is missing from {str(directory)!r}. Copy the whole directory again."
            raise ChainFileError(msg)
        if _digest(path) != digest:
            msg = (
                f"{name!r} has changed since the chain was saved (SHA-256 differs), so it is not loaded. "
                "Copy or save it again."
            )
            raise ChainFileError(msg)
    # what is not listed was not checked; a note of the user's beside chain.yaml is never read
    ours = tuple(f"{folder}/" for folder in _FOLDERS)
    if unlisted := [n for n in _files(directory) if n.startswith(ours) and n not in file.files]:
        msg = f"{unlisted[:3]} in {str(directory)!r} were not written by save(), so nothing is loaded. Remove them."
        raise ChainFileError(msg)
    return file


def _parse(recipe: Path) -> ChainFile:
    if not recipe.is_file():
        msg = (
            f"there is no {RECIPE} in {str(recipe.parent)!r}, so this is no saved chain. Give the directory "
            "that save() wrote."
        )
        raise ChainFileError(msg)
    try:
        return ChainFile.model_validate(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        msg = f"{recipe} is not what save() writes: {error}. Save the chain again; a chain file holds data only."
        raise ChainFileError(msg) from None


def load_model(directory: Path, data: ModelData, given: LocalModel | None) -> LocalModel:
    """The model of a saved chain, with its adapter's weights.

    Args:
        directory: Where `read` has just checked every file.
        data: From `chain.yaml`.
        given: The base, instead of the one on record; its trainable weights are overwritten.

    Raises:
        ChainFileError: No base to be had, one of other weights, or one with another adapter.
    """
    base = directory / BASE
    if given is None:
        source = str(base) if base.is_dir() else data.reference
        if source is None:
            msg = (
                f"the base {data.name!r} was not saved (it is quantised). Pass it: "
                "LLMChain.load(directory, model=LocalModel(…))."
            )
            raise ChainFileError(msg)
        given = LocalModel.from_pretrained(source, dtype=getattr(torch, data.dtype))
        given.name, given.reference = data.name, data.reference
    found = base_fingerprint(given.module)  # as it is now: `given` may have learnt since it was made
    if found != data.fingerprint:
        msg = (
            f"the base weights differ: saved over {data.name!r} ({data.fingerprint}), found {given.name!r} ({found}). "
            "Use the same base model and revision."
        )
        raise ChainFileError(msg)
    if (directory / ADAPTER).is_dir():
        return _with_adapter(given, directory)
    if isinstance(given.module, PeftModel):
        msg = f"the chain was saved without an adapter, {given.name!r} has one, so answers would differ. Pass its base."
        raise ChainFileError(msg)
    return given


def _write_model(model: LocalModel, directory: Path) -> ModelData:
    module, reference = model.module, model.reference
    base = cast(Any, module).get_base_model() if isinstance(module, PeftModel) else cast(Any, module)
    quantised = getattr(base, "is_quantized", False)
    if isinstance(module, PeftModel):
        _write_adapters(model, module, directory)
    else:
        reference = None  # the whole model was trained: the base on a hub is not it
    if reference is None and not quantised:
        if not hasattr(base, "save_pretrained") or model.tokenizer is None:
            msg = (
                f"{model.name!r} has no save_pretrained or no tokenizer, so it could not be loaded again. "
                "Wrap a Hugging Face model."
            )
            raise ChainFileError(msg)
        state = {stable_name(n): t for n, t in base.state_dict().items() if not is_adapter(n)}
        with every_tensor_saved(base):
            base.save_pretrained(directory / BASE, state_dict=state)
        model.tokenizer.save_pretrained(directory / BASE)
    types = [str(p.dtype).removeprefix("torch.") for n, p in base.named_parameters() if not is_adapter(n)]
    dtype: Any = next((t for t in types if t in get_args(DType)), "float32")  # a quantised base also has integers
    # a base in the directory is saved as it is now, with all that was trained in it
    fingerprint = model.fingerprint() if reference or quantised else base_fingerprint(module)
    return ModelData(name=model.name, reference=reference, fingerprint=fingerprint, dtype=dtype, kind=model.kind)


def _write_adapters(model: LocalModel, module: PeftModel, directory: Path) -> None:
    """Standard PEFT folders: the adapter that answers, and the remainder where it stands on one."""
    if len(model.peft_names) != 1:
        msg = (
            f"{model.name!r} answers with {len(model.peft_names)} adapters {list(model.peft_names)}, and a chain is "
            "saved with exactly one. Save the chain itself or chain.with_adapter(name)."
        )
        raise ChainFileError(msg)
    (name,) = model.peft_names
    # no embeddings: the base has them, and PEFT would look for the base's own on a hub
    state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    _write_adapter(module.peft_config[name], state, model.name, directory / ADAPTER)
    if model.adapter in (None, adapters.GLOBAL) and adapters.has_remainder(module):
        state = {f"base_model.model.{n}": t for n, t in adapters.state(module, adapters.REMAINDER).items()}
        _write_adapter(module.peft_config[adapters.REMAINDER], state, model.name, directory / REMAINDER)


def _write_adapter(config: PeftConfig, state: dict[str, Any], base_name: str, directory: Path) -> None:
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base_name  # not the local path that PEFT's own config and card would hold
    config.save_pretrained(directory)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, directory / _ADAPTER_WEIGHTS)


def _with_adapter(model: LocalModel, directory: Path) -> LocalModel:
    """The model with the saved adapter as the one that it answers with and trains, and with the saved remainder."""
    folder = directory / ADAPTER
    try:
        state = load_file(folder / _ADAPTER_WEIGHTS)
        remainder = _read_remainder(directory / REMAINDER)
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(model.module, PeftModel):
            if any(is_adapter(name) for name, _ in model.module.named_parameters()):
                msg = (
                    f"another adapter is already in {model.name!r}: loading this one would replace it "
                    "in the chain that uses it. Give every chain a base of its own."
                )
                raise ChainFileError(msg)
            config.inference_mode = False
            config.base_model_name_or_path = None  # the fingerprint has checked the base; PEFT would warn
            module = add_adapter(model.module, config).eval()
            model = model.wrapped(module)
        if model.adapter not in (None, adapters.GLOBAL) or len(model.peft_names) != 1:
            msg = (
                f"{model.name!r} answers with the adapters {list(model.peft_names)}, so this one cannot become the one "
                "that is trained. Pass the base, or the model itself with one adapter active."
            )
            raise ChainFileError(msg)
        (name,) = model.peft_names
        check_state(get_peft_model_state_dict(model.module, adapter_name=name, save_embedding_layers=False), state)
        _check_scaling(model, config)
        with model.exclusive():
            model.load_remainder(remainder)
            set_peft_model_state_dict(model.module, state, adapter_name=name)  # raises on nothing, hence the check
    except (WeightsMismatchError, UnsupportedModelError) as error:
        msg = f"the saved adapter does not fit: {error}"
        raise ChainFileError(msg) from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        msg = f"the adapter in {str(directory)!r} cannot be read: {error}. Save the chain again."
        raise ChainFileError(msg) from None
    return model


def _read_remainder(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer → (B, A); empty where the chain was saved without."""
    if not folder.is_dir():
        return {}
    state = {stable_name(n): t for n, t in load_file(folder / _ADAPTER_WEIGHTS).items()}
    layers = sorted({n.rpartition(".lora_")[0] for n in state})
    return {n: (state[f"{n}.lora_B.weight"], state[f"{n}.lora_A.weight"]) for n in layers}


def _check_scaling(model: LocalModel, config: PeftConfig) -> None:
    """A given adapter of the same shapes may multiply its factors by something else."""
    own = cast(Any, model.module).peft_config[model.peft_names[0]]
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        here, there = getattr(own, field, None), getattr(config, field, None)
        if here != there:
            msg = (
                f"the chain's adapter was saved with {field}={there!r}, {model.name!r} has {here!r}, so answers would "
                "differ. Pass the base without an adapter."
            )
            raise ChainFileError(msg)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
