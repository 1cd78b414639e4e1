"""The loss of a batch: negative log-likelihood of the completion's tokens, with logits computed only for them.

Knows modules and labels. Knows nothing about optimizers, examples or rounds.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmchain_fed.data.encoding import IGNORE, check_ready
from llmchain_fed.errors import DataError
from llmchain_fed.model.adapters.lora_config import unwrapped
from llmchain_fed.model.adapters.switching import idle_parameters
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.scoring import decoder_inputs

Precision = Literal["fp32", "bf16"]

# module → whether decoder + output embedding give the same logits as the full forward
_plain_head: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def summed_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Σ −log p(token) over the labelled tokens, in nats, and how many tokens that is.

    For a transformers model that is computed from its logits, whatever its own `.loss` adds to it (label smoothing,
    n-grams to come, a router's balance); a decoder's inputs are the labels as the model itself shifts them.

    The head of a language model is a large part of its arithmetic (a fifth for SmolLM2) and prompts need no logits:
    where the module is a decoder with a linear head, which is checked once against its full forward, only labelled
    positions go through the head.

    Args:
        module: A transformers module, or any that takes the batch by keyword and returns an object with `.loss`, the
            mean over the labelled tokens.
        batch: `labels` (B, T) with −100 where no loss is wanted, and the module's inputs.

    Raises:
        DataError: The batch is no mapping with labels, or the module returns no loss.
    """
    check_ready(batch)
    labels = batch["labels"]
    if not bool((labels != IGNORE).any()):
        return torch.zeros((), device=labels.device, requires_grad=torch.is_grad_enabled()), 0  # a mean would be NaN
    parts = _decoder_and_head(module)
    if parts is not None and _is_plain(module, parts, batch):
        wanted = labels[:, 1:] != IGNORE  # (B, T-1): position t predicts token t + 1
        logits = _logits(parts, batch, wanted)  # (tokens, V)
        tokens = labels[:, 1:][wanted].to(logits.device)
        return F.cross_entropy(logits.float(), tokens, reduction="sum"), len(tokens)
    if transformers_model(module) is None:
        return _own_loss(module, batch)
    logits, tokens = completion_logits(module, batch)
    return F.cross_entropy(logits.float(), tokens, reduction="sum"), len(tokens)


def examples_with_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """How many rows of a batch have a token that carries loss; a row whose labels are all −100 teaches nothing."""
    carrying = _carrying(module, batch["labels"])
    return int((carrying.flatten(1).any(dim=1) if carrying.dim() > 1 else carrying).sum())


def _carrying(module: nn.Module, labels: Tensor) -> Tensor:
    """Which labels carry loss, (B, T); (B, T-1) of a decoder alone, for nothing predicts the first token of a row."""
    return (labels if labels.dim() == 1 or _encodes(module) else labels[:, 1:]) != IGNORE


def _encodes(module: object) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def transformers_model(module: nn.Module) -> Any:
    """The transformers model in a plain or PEFT-wrapped module, or None where its logits are not the labels' own."""
    inner = _without_adapter(unwrapped(module))
    return inner if isinstance(inner, PreTrainedModel) else None


def _without_adapter(module: nn.Module) -> nn.Module | None:
    """The module below PEFT's wrapping, if any; None where the adapter adds positions to those of the tokens."""
    config = getattr(module, "active_peft_config", None)
    if config is None:
        return module
    if getattr(config, "is_prompt_learning", False):
        return None
    return module.get_base_model()  # type: ignore[operator, no-any-return]


def completion_logits(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, V) logits of the labelled tokens, and (tokens,) those tokens, from the full forward.

    Raises:
        DataError: The module gives no logits, or not one row for each label.
    """
    model, labels = transformers_model(module), batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # type: ignore[assignment]
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    if seq2seq and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    logits = getattr(module(**inputs), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] < labels.shape[1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        msg = (
            f"{type(model).__name__} gives logits {got} for labels {tuple(labels.shape)}, so there is no loss per "
            "token. Use a model with a language modelling head, or wrap it so that forward(**batch) returns `.loss`."
        )
        raise DataError(msg)
    logits = logits[:, -labels.shape[1] :]  # what stands in front (an image) carries no labels
    if not seq2seq:
        logits, labels = logits[:, :-1], labels[:, 1:]  # position t predicts token t + 1
    labels = labels.to(logits.device)
    wanted = labels != IGNORE
    return logits[wanted], labels[wanted]


def _own_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    output = module(**batch)
    count = int(_carrying(module, batch["labels"]).sum())
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        msg = (
            f"{type(module).__name__} returned no `.loss` for a batch with labels. Wrap it so that "
            "forward(**batch) does."
        )
        raise DataError(msg)
    return loss * count, count  # the module's own loss is the mean over these tokens


def _decoder_and_head(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The parts of a decoder-only Hugging Face model, or None where there are no such parts."""
    inner = _without_adapter(module)
    decoder, find_head = getattr(inner, "base_model", None), getattr(inner, "get_output_embeddings", None)
    if not isinstance(decoder, nn.Module) or decoder is inner or find_head is None or _encodes(inner):
        return None
    head = find_head()
    return (decoder, head) if isinstance(head, nn.Module) else None


def _logits(parts: tuple[nn.Module, nn.Module], batch: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    decoder, head = parts
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = decoder(**inputs, use_cache=False).last_hidden_state  # (B, T, H)
    logits: Tensor = head(hidden[:, :-1][wanted.to(hidden.device)])
    return logits


@torch.no_grad()
def _is_plain(module: nn.Module, parts: tuple[nn.Module, nn.Module], batch: Mapping[str, Tensor]) -> bool:
    """Compares both ways once per module: a head may also scale, cap or project (Gemma, Cohere, OPT).

    Near zero a cap is almost the identity, so the logits must be the head's own output to the last bit.
    """
    known = _plain_head.get(module)
    if known is None:
        row = {k: v[:1] for k, v in batch.items()}
        wanted = row["labels"][:, 1:] != IGNORE
        if not bool(wanted.any()):
            return False
        with evaluating(module):
            full, headed = _watched_head(module, parts[1], {k: v for k, v in row.items() if k != "labels"})
            full = full[:, :-1][wanted].float()
            try:
                short = _logits(parts, row, wanted).float()
            except (TypeError, AttributeError, RuntimeError):  # a decoder of another signature, output or width
                short = None
        known = headed and short is not None and torch.allclose(full, short, rtol=1e-2, atol=1e-2 * float(full.std()))
        _plain_head[module] = known
    return known


def _watched_head(module: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
    """The full forward's logits, and whether they are what the head gave, untouched."""
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        logits: Tensor = module(**inputs).logits
    finally:
        handle.remove()
    same = bool(given) and given[-1].shape == logits.shape and torch.equal(given[-1].float(), logits.float())
    return logits, same


@contextmanager
def computing_in(precision: Precision, module: nn.Module) -> Iterator[None]:
    """Forward passes inside run in this precision; the weights afterwards are the very same.

    bf16 is autocast, and frozen float32 weights are swapped for bfloat16 copies meanwhile: otherwise autocast would
    convert them anew in every forward. Trainable weights stay in float32, and so do adapters that do not answer now.
    """
    if precision == "fp32":
        yield
        return
    idle = idle_parameters(module)
    frozen = (p for p in module.parameters() if not p.requires_grad and p not in idle)
    kept = {p: p.data for p in frozen if p.dtype == torch.float32}
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
        # without its cache, which would keep the trainable weights as they were before the first optimizer step
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
