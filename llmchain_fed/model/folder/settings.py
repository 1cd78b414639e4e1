"""Settings of models and tokenizers that somebody else wrote: JSON that says nothing of code or of other places.

Knows which keys lead transformers to code, to other files or to a hub, and which rules of a `tokenizer.json` swell a
text beyond memory while nothing in Python can stop it. Knows nothing of what the other keys mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.model.generation import saved
from llmchain_fed.untrusted import parse_json, read_file, read_json, shown
from llmchain_fed.untrusted.text import ErrorType, refusal

_MOST = 16 * 2**20  # bytes of a file of settings; a tokenizer's, with all its added tokens, has been seen at 2 MB
_MOST_TEMPLATE = 2**18  # bytes; what vendors ship has up to 30,000
_MOST_TOKENIZER = 2**28  # bytes; the largest of vendors have some 35 MB
_MOST_ADDED = 2**15  # tokens: each is searched for in every text, and more take a minute to read
_MOST_GROWTH = 2**16  # times as long as before
_ORIGIN = frozenset({"auto_map", "custom_pipelines", "custom_generate", "_name_or_path", "name_or_path"})
"""where a model comes from, and the code that came with it: of no use to one that is loaded without"""
_CODE = frozenset({"auto_map", "trust_remote_code", "custom_generate"})
_OTHER_FILES = frozenset({"configuration_files", "fast_tokenizer_files"})
_LEADING = frozenset(
    {
        *(_ORIGIN | _CODE | _OTHER_FILES),
        *("transformers_weights", "quantization_config", "distributed_config", "fusion_config", "kernel_config"),
        *("use_kernels", "base_model_name_or_path", "backbone", "use_timm_backbone", "use_pretrained_backbone"),
        *("init_inputs", "tokenizer_object", "backend_tokenizer", "from_slow", "config", "revision", "token"),
        *("subfolder", "proxies", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs"),
    }
)
"""keys of config.json and tokenizer_config.json that can lead to code, to other files or to a hub"""
_PLACE = re.compile(r".*(_files?|_path|_dir|_folder|_url|_repo|_repo_id)")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_BUILT_IN = frozenset(
    {None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
    | {"flash_attention_2", "flash_attention_3", "flash_attention_4"}
)
_KERNELS = frozenset({"kernel_config", "use_kernels"})
_TEXTS = frozenset({"id2label", "label2id", "task_specific_params"})
"""keys below which any text may stand"""
_COUNT = re.compile("^(?!.*vocab).*(layer|block|depth|expert|head)")  # Gemma has a vocabulary per layer
_MOST_COUNT = 2**16
_LAYERS = re.compile(r"((num|n)_)?((hidden|encoder|decoder|transformer)_)?layers?")
_MOST_LAYERS = 2**10
_MOST_REPEATED = 2**20
"""what an integer within a list may be: token ids and sizes; GPT-Neo's says how often a layer's kind is repeated"""


def check_saved(folder: Path, *, error: ErrorType) -> None:
    """Makes sure that the settings in `base/` and `tokenizer/` of a saved chain are data about this folder alone."""
    for part, name in (("base", "config.json"), ("tokenizer", "tokenizer_config.json")):
        if (found := _read(folder / part / name, error)) is not None:
            _check_keys(found, f"{part}/{name}", texts=part == "tokenizer", error=error)
    if (found := _read(folder / "base" / "generation_config.json", error)) is not None:
        known = {*saved.names(), *saved.METADATA}
        if strange := sorted(found.keys() - known):
            file = "base/generation_config.json"
            raise _refusal(file, strange[0], "transformers has no such field", error)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        _read(folder / "tokenizer" / name, error)
    for path in (folder / "tokenizer").rglob("*.jinja"):
        if path.stat().st_size > _MOST_TEMPLATE:
            why = f"{shown(str(path), 300)} has more than the {_MOST_TEMPLATE:,} bytes of a chat template"
            raise refusal(error, why, SAVE_AGAIN)


def check_writable(config: Any, *, error: ErrorType) -> None:
    """Makes sure that a model's configuration, once saved, is one that `check_saved` lets through."""
    written = _without(json.loads(config.to_json_string()))
    remedy = "Change or remove that field of module.config: it means nothing to a model that is loaded as data."
    _check_keys(written, "the model's config.json", texts=False, error=error, remedy=remedy)


def check_implementations(config: Any, *, what: str) -> None:
    """Makes sure that a configuration names no code of a hub's for its attention or its experts.

    Raises:
        UnsupportedModelError: The configuration names such code.
    """
    for key, value in _pairs(_fields(config)):
        _check_implementation(key, value, what, UnsupportedModelError)


def _fields(value: Any, depth: int = 0) -> Any:
    """The attributes of a configuration and of those within it; `to_dict` leaves implementations out."""
    if hasattr(value, "to_dict"):
        value = vars(value)
    if isinstance(value, dict) and depth < 32:
        return {key: _fields(inner, depth + 1) for key, inner in value.items()}
    return value


def _check_implementation(key: str, value: Any, what: str, error: ErrorType) -> None:
    named = value.values() if isinstance(value, dict) else [value]
    kernels = key in _KERNELS and value not in (None, False, {})
    if kernels or (_IMPLEMENTATION.fullmatch(key) and any(not _is_built_in(v) for v in named)):
        raise refusal(
            error,
            f"`{shown(key)}` in {what} is {shown(value)}, code of a hub's rather than one of transformers' own "
            "implementations",
            "Remove the key from that file; the answers are the same, and a model is loaded as data alone. Or load the "
            "model yourself and pass LocalModel(module, tokenizer).",
        )


def _is_built_in(value: object) -> bool:
    return isinstance(value, (str, type(None))) and value in _BUILT_IN


def check_own(folder: Path, *, error: ErrorType) -> None:
    """Makes sure that the settings of a user's own model do not bring code; see `check_saved`."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        found = _read(folder / name, error) or {}
        for key, value in _pairs(found):
            file = shown(str(folder / name), 300)
            _check_implementation(key, value, file, error)
            _check_sizes(key, value, file, error, "Take the folder from another source.")
            weights = key == "transformers_weights" and not re.fullmatch(r"[\w.-]+\.safetensors", str(value))
            if value is not None and (key in _CODE | _OTHER_FILES or weights):
                raise refusal(
                    error,
                    f"`{key}` in {file} names code or another file, and a model is loaded as data alone",
                    "If transformers knows the model without it, remove the key from that file; else load the model "
                    "yourself and pass LocalModel(module, tokenizer).",
                )


def without_origin(folder: Path) -> None:
    """Drops from the settings in a folder what says where a model came from: another machine's path, a hub's code."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        kept = _without(data)
        if kept != data:
            text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in _ORIGIN}
    return [_without(v) for v in value] if isinstance(value, list) else value


def _read(path: Path, error: ErrorType) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    data = read_file(path, most=_MOST, what="the file", error=error)
    # a tokenizer without a longest text says 10³⁰
    return read_json(data, most=_MOST, what=shown(str(path), 300), error=error, bounded=False)


def _check_keys(
    found: Mapping[str, Any], file: str, *, texts: bool, error: ErrorType, remedy: str = SAVE_AGAIN
) -> None:
    for key, value in _pairs(found):
        if value is None or value == [] or value == {}:
            continue
        if key in _LEADING or (_PLACE.fullmatch(key) and not isinstance(value, bool)):
            raise _refusal(file, key, "it can lead to code or to another place", error, remedy)
        if _IMPLEMENTATION.fullmatch(key):
            named = value.values() if isinstance(value, dict) else [value]
            if any(not _is_built_in(v) for v in named):
                raise _refusal(file, key, f"{shown(value)} is none of transformers' own implementations", error, remedy)
        if not texts and isinstance(value, str) and ("/" in value or "\\" in value or len(value) > 1000):
            raise _refusal(file, key, f"{shown(value)} is a place rather than a value", error, remedy)
        _check_sizes(key, value, file, error, remedy)


def _check_sizes(key: str, value: Any, file: str, error: ErrorType, remedy: str) -> None:
    """Of what a configuration's own class expands before anybody can compare it with the weights."""
    layers = key == "attention_types" or _LAYERS.fullmatch(key)
    most = _MOST_LAYERS if layers else _MOST_COUNT if _COUNT.search(key) else _MOST_REPEATED
    counts = [value] if isinstance(value, int) and _COUNT.search(key) else list(_integers(value))
    if any(count > most for count in counts) or (key == "attention_types" and sum(counts) > most):
        raise refusal(error, f"{file}: `{shown(key)}` is {shown(value)}, which is more than any model has", remedy)


def _integers(value: Any) -> Iterator[int]:
    """Those within a list and its lists."""
    left = list(value) if isinstance(value, list) else []
    while left:
        inner = left.pop()
        if isinstance(inner, list):
            left += inner
        elif isinstance(inner, int):
            yield inner


def _pairs(found: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, also of what lies deeper, but for texts that mean nothing to a loader."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield key, value
            if key not in _TEXTS:
                yield from _pairs(value)
    elif isinstance(found, list):
        for value in found:
            yield from _pairs(value)


def _refusal(file: str, key: str, why: str, error: ErrorType, remedy: str = SAVE_AGAIN) -> Exception:
    return refusal(error, f"{file}: `{shown(key)}` has no place in a saved chain ({why})", remedy)


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def check_tokenizer(folder: Path, *, remedy: str, error: ErrorType) -> None:
    """Makes sure that the tokenizer in a folder, if it has one in this form, can be read in bounded time and memory."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    what = shown(str(path), 300)
    data = read_file(path, most=_MOST_TOKENIZER, what="the tokenizer", error=error)
    found = parse_json(data, most=_MOST_TOKENIZER, what=what, error=error, bounded=False)
    if not isinstance(found, dict):
        raise refusal(error, f"{what} is no tokenizer", remedy)
    added = found.get("added_tokens")
    if isinstance(added, list) and len(added) > _MOST_ADDED:
        raise refusal(error, f"`added_tokens` in {what} are {len(added):,}, at most {_MOST_ADDED:,} make sense", remedy)
    for part in ("normalizer", "decoder"):
        growth = math.prod(_growth(rule) for rule in _rules(found.get(part)))
        if growth > _MOST_GROWTH:
            times = f"{growth:,}" if growth < 10**12 else "10¹² and more"
            raise refusal(error, f"`{part}` in {what} can make a text {times} times as long", remedy)


def _rules(part: Any) -> Iterator[dict[str, Any]]:
    """Every rule in a part, those of sequences within each other included."""
    left = [part]
    while left:
        rule = left.pop()
        if isinstance(rule, list):
            left += rule
        elif isinstance(rule, dict):
            yield rule
            left += [inner for inner in rule.values() if isinstance(inner, list)]


def _growth(rule: dict[str, Any]) -> int:
    """How many times as long a text can become by a rule that replaces; an expression may match nothing."""
    content, pattern = rule.get("content"), rule.get("pattern")
    if not isinstance(content, str) or pattern is None:
        return 1
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1, -(-len(content) // len(literal)))
    return 1 + len(content)
