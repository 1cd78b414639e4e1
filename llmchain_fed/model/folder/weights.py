"""Weights in a folder that somebody else made, before a library is asked for them: which tensors, where, how large.

Knows safetensors' headers, and how large a model a configuration makes. Knows nothing of what is done with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from llmchain_fed.model import wrapping
from llmchain_fed.untrusted import TensorHeader, decoding, read_file, read_json, read_safetensors_header, reason, shown
from llmchain_fed.untrusted.text import ErrorType, refusal

_AGAIN = "Download the folder again, or save the model or the chain again where it was made."
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 8 * 2**20  # bytes; some 50,000 tensors
_MOST_INDEX = 64 * 2**20  # bytes
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
_SPARE = 2**28  # values of buffers that a model makes anew: tables of positions, masks


def headers(path: Path, *, error: ErrorType) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file; values are not read.

    Raises:
        ErrorType: The file is no safetensors file, its header is larger than 8 MB, or tensors and file do not agree.
    """
    what = shown(str(path), 300)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(start := file.read(8), "little")
            data = start + file.read(min(size, _MOST_HEADER))
            total = path.stat().st_size
    except OSError as failed:
        raise refusal(error, f"{what} cannot be read ({reason(failed)})", _AGAIN) from None
    return read_safetensors_header(data, max_header=_MOST_HEADER, what=what, error=error, total=total)[1]


def check_index(folder: Path, *, error: ErrorType) -> None:
    """Makes sure that a list of weights' files names files of this folder alone."""
    path = folder / INDEX
    if not path.is_file():
        return
    what = shown(str(path), 300)
    found = read_json(read_file(path, most=_MOST_INDEX, what="", error=error), most=_MOST_INDEX, what=what, error=error)
    listed = found.get("weight_map")
    if not isinstance(listed, dict) or not isinstance(found.get("metadata"), dict):
        raise refusal(error, f"{what} has no `weight_map` and `metadata`", _AGAIN)
    for name in listed.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        if not plain or not (folder / name).is_file():
            raise refusal(
                error,
                f"`weight_map` in {what} names {shown(name)}, which is no safetensors file of that folder",
                _AGAIN,
            )


def check_fits(folder: Path, *, error: ErrorType) -> None:
    """Makes sure that `config.json` makes no larger a model than the weights beside it fill.

    What transformers does not find it makes up, and takes the memory for it.
    """
    check_index(folder, error=error)
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in headers(file, error=error).values()]
    with decoding(f"the base in {shown(str(folder), 300)}", error):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        layers = _largest(config.to_dict())
        if layers > len(stored):
            msg = f"config.json of {shown(str(folder), 300)} has {layers} layers, and {len(stored)} tensors lie there"
            raise refusal(error, msg, _AGAIN)
        loader = wrapping.loader_of(config)
        with torch.device("meta"):
            automatic = hasattr(loader, "from_config")
            made: Any = loader.from_config(config, trust_remote_code=False) if automatic else loader(config)
        wanted = sum(p.numel() for p in made.parameters())
        spare = sum(b.numel() for b in made.buffers())
    found = sum(math.prod(tensor.shape) for tensor in stored)
    # a tied tensor is stored once and may be counted twice; quantised, a stored value packs up to 32 of one bit
    packed = 32 if getattr(config, "quantization_config", None) is not None else 2
    if wanted > packed * found + 2**20 or spare > found + _SPARE:
        msg = (
            f"config.json of {shown(str(folder), 300)} makes a model of {wanted:,} values and tables of {spare:,}, and "
            f"the weights there have {found:,}"
        )
        raise refusal(error, msg, _AGAIN)


def _largest(config: Mapping[str, Any]) -> int:
    """The number of layers."""
    own = [value for name in _LAYERS if type(value := config.get(name)) is int]
    return max([*own, *(_largest(value) for value in config.values() if isinstance(value, dict))], default=0)
