"""Vocabulary: whether a module has a row for every token that its tokenizer knows.

Knows embeddings and token ids. Knows nothing about examples or how text becomes tokens. An id beyond the embedding is
an IndexError on the CPU, and on CUDA an assertion that ends the process, in the middle of a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from llmchain_fed.errors import UnsupportedModelError


def check(model: Any, prompts: Iterable[Sequence[int]], completions: Iterable[Sequence[int]] = ()) -> None:
    """Makes sure that the model can look up every token of these rows, and be taught those of the completions.

    Raises:
        UnsupportedModelError: A token has no row; the message names it.
    """
    _check_decoder(model)
    for rows, limit, where in (
        (prompts, input_rows(model.module), "prompt"),
        (completions, output_rows(model.module), "completion"),
    ):
        highest = max((max(row) for row in rows if row), default=-1)
        if limit is not None and highest >= limit:
            _refuse(model, highest, limit, where)


def _check_decoder(model: Any) -> None:
    """Makes sure that what an encoder-decoder puts before and behind labels by itself has a row.

    Raises:
        UnsupportedModelError: One of them has no row.
    """
    config, limit = getattr(model.module, "config", None), output_rows(model.module)
    if not getattr(config, "is_encoder_decoder", False) or limit is None:
        return
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= limit:
            msg = (
                f"{name} in the configuration of {model.name!r} is {token}, and its decoder has {limit} rows of "
                f"embedding: it would read that id in every batch. Set module.config.{name} to one below {limit}, or "
                "call module.resize_token_embeddings(len(tokenizer)) before any adapter is added."
            )
            raise UnsupportedModelError(msg)


def _refuse(model: Any, token: int, rows: int, where: str) -> None:
    text = model.tokenizer.convert_ids_to_tokens(token)
    end = " It is the end token, which stands behind every completion." if token in model.eos_ids else ""
    msg = (
        f"a {where} contains the token {text!r} with id {token}, and the model {model.name!r} has {rows} rows of "
        f"embedding, for the ids below {rows}.{end} Make rows for the tokens that were added, before any adapter: "
        "module.resize_token_embeddings(len(tokenizer)), and train them (modules_to_save=['embed_tokens'] in "
        "LoraConfig, or all weights), for they are random."
    )
    raise UnsupportedModelError(msg)


def usable_pad(module: nn.Module, wanted: Sequence[int]) -> int:
    """The first id of `wanted` that has a row, else 0: behind the mask, padding is looked up all the same."""
    rows = input_rows(module)
    return next((i for i in wanted if rows is None or 0 <= i < rows), 0)


def input_rows(module: nn.Module) -> int | None:
    """Ids below this can be in a prompt; None where the module does not say."""
    return _rows(_ask(module, "get_input_embeddings"))


def output_rows(module: nn.Module) -> int | None:
    """Ids below this can be in a completion: it has a logit for them and, read again, a row of embedding."""
    found = [_rows(_ask(module, "get_output_embeddings"))]
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        decoder = _ask(module, "get_decoder")
        found.append(_rows(_ask(decoder, "get_input_embeddings")) if decoder is not None else None)
    else:
        found.append(input_rows(module))
    return min((rows for rows in found if rows is not None), default=None)


def _ask(module: Any, what: str) -> Any:
    """What a module answers, or None: not every one has embeddings, or a decoder of its own."""
    try:
        return getattr(module, what)()
    except (AttributeError, NotImplementedError, TypeError, KeyError):
        return None


def _rows(embedding: Any) -> int | None:
    for inner in ("base_layer", "original_module"):  # PEFT's wrappers around the layer itself
        embedding = getattr(embedding, inner, embedding)
    count = getattr(embedding, "num_embeddings", None) or getattr(embedding, "out_features", None)
    if isinstance(count, int):
        return count
    shape: Sequence[int] = getattr(getattr(embedding, "weight", None), "shape", ())
    return int(shape[0]) if len(shape) == 2 else None
