"""How probable each of a set of answers is: log p(answer | prompt), every prompt read once for all of them.

Knows modules, token ids and caches of keys and values. Knows nothing about labels' texts, losses or LangChain. What is
returned can be differentiated.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from llmchain_fed.errors import LabelError, PromptTooLongError, UnsupportedModelError
from llmchain_fed.model.adapters.lora_config import unwrapped
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import pad_rows

Ids = Sequence[Sequence[int]]

_NO_SCORE = -100
# module → whether a prompt that is read once gives the same scores as whole rows, one by one
_shares: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def answer_scores(model: LocalModel, prompts: Ids, answers: Ids, *, rows: int = 64) -> Tensor:
    """(prompts, answers) nats: log p(answer | prompt), summed over the answer's tokens, its end token included.

    A prompt passes the model once and all answers go on from its keys and values. Whether that gives what whole rows
    give is tried once per module; where it does not (recurrent states, sliding windows), each row is computed alone.

    Args:
        model: It computes in the mode and precision that it is in.
        prompts: Token ids of each prompt.
        answers: Token ids of each answer, the same for every prompt.
        rows: How many (prompt, answer) rows share a forward pass at most.

    Raises:
        LabelError: A prompt or an answer has no token.
        PromptTooLongError: A prompt with the longest answer exceeds the model's context.
        UnsupportedModelError: The module gives no logits.
    """
    _check(model, prompts, answers)
    # checkpointing computes layers anew in the backward pass, so none of their keys and values are kept
    anew = model.module.training and any(getattr(m, "gradient_checkpointing", False) for m in model.module.modules())
    if anew or not _can_share(model, prompts, answers):
        scores = [_whole(model, prompt, answer) for prompt in prompts for answer in answers]
        return torch.stack(scores).view(len(prompts), len(answers))
    size = max(1, rows // len(answers))
    shared = _encoded_once if model.kind == "seq2seq" else _read_once
    parts = [shared(model, prompts[at : at + size], answers, rows) for at in range(0, len(prompts), size)]
    return torch.cat(parts)


def _check(model: LocalModel, prompts: Ids, answers: Ids) -> None:
    if not all(prompts) or not all(answers):
        msg = "a prompt or an answer has no token, so there is nothing to score. Give text for both."
        raise LabelError(msg)
    longest_prompt, longest = max(map(len, prompts)), max(map(len, answers))
    length = max(longest_prompt, longest) if model.kind == "seq2seq" else longest_prompt + longest
    if model.context_length is not None and length > model.context_length:
        msg = (
            f"a prompt of {longest_prompt:,} tokens with an answer of {longest:,} exceeds the context of "
            f"{model.name!r}, {model.context_length:,} tokens. Shorten the inputs."
        )
        raise PromptTooLongError(msg)


def _can_share(model: LocalModel, prompts: Ids, answers: Ids) -> bool:
    """Compares both ways once per module, on a prompt and its first half, which padding makes of one length."""
    module = unwrapped(model.module)
    if module not in _shares:
        some, two = [list(prompts[0]), list(prompts[0])[: len(prompts[0]) // 2 + 1]], answers[:2]
        shared = _encoded_once if model.kind == "seq2seq" else _read_once
        with torch.no_grad(), evaluating(model.module):
            whole = torch.stack([_whole(model, p, a) for p in some for a in two]).view(len(some), len(two))
            try:
                found = shared(model, some, two, 64)
            except (TypeError, AttributeError, RuntimeError, ValueError, NotImplementedError, IndexError, KeyError):
                found = torch.full_like(whole, torch.nan)  # a module of another signature, or with another state
        exact = whole.dtype == torch.float32 and _dtype(module) == torch.float32
        close = 1e-4 if exact and not torch.is_autocast_enabled(model.device.type) else 3e-2
        _shares[module] = bool(torch.allclose(found, whole, rtol=close, atol=close))
    return _shares[module]


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _whole(model: LocalModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The score of one answer, from a forward pass of its own without any padding."""
    answer_ids = torch.tensor([list(answer)], device=model.device)
    if model.kind == "seq2seq":
        prompt_ids = torch.tensor([list(prompt)], device=model.device)
        logits = _logits(
            model, input_ids=prompt_ids, decoder_input_ids=decoder_inputs(unwrapped(model.module), answer_ids)
        )
    else:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = _logits(model, input_ids=ids, use_cache=False)[:, -1 - len(answer) : -1]
    return _summed(logits, answer_ids)[0]


def _read_once(model: LocalModel, prompts: Ids, answers: Ids, rows: int) -> Tensor:
    """Scores of a decoder: prompts padded on the left, answers behind their expanded keys and values on the right."""
    ids, mask = (t.to(model.device) for t in pad_rows(prompts, model.pad_id, left=True))  # (P, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    forward = inspect.signature(_transformers_forward(model)).parameters
    places = "position_ids" in forward
    cache_word = "cache" if "cache" in forward else "past_key_values"  # transformers 5.24 renamed it
    cache = DynamicCache(config=unwrapped(model.module).config)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, cache_word: cache, "use_cache": True}
    if places:
        inputs["position_ids"] = positions
    last = _logits(model, **inputs, **({"logits_to_keep": 1} if "logits_to_keep" in forward else {}))[:, -1:]
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        msg = "a sliding window forgets the beginning of the prompt"
        raise NotImplementedError(msg)  # caught by the trial
    chunk, parts = max(1, rows // len(prompts)), []
    for at in range(0, len(answers), chunk):
        some = answers[at : at + chunk]
        count = len(some)
        suffix, _ = pad_rows(some, _NO_SCORE, left=False)  # (A, S)
        suffix = suffix.to(model.device).repeat(len(prompts), 1)  # (P·A, S): all answers of a prompt side by side
        logits = last.repeat_interleave(count, 0)
        if suffix.shape[1] > 1:
            read = suffix[:, :-1].masked_fill(suffix[:, :-1] == _NO_SCORE, model.pad_id)
            seen = torch.cat([mask.repeat_interleave(count, 0), (suffix[:, :-1] != _NO_SCORE).long()], 1)
            inputs = {
                "input_ids": read,
                "attention_mask": seen,
                cache_word: _expanded(model, cache, count),
                "use_cache": True,
            }
            if places:
                steps = torch.arange(1, suffix.shape[1], device=model.device)
                inputs["position_ids"] = positions[:, -1:].repeat_interleave(count, 0) + steps
            logits = torch.cat([logits, _logits(model, **inputs)], 1)
        parts.append(_summed(logits, suffix).view(len(prompts), count))
    return torch.cat(parts, 1)


def _expanded(model: LocalModel, cache: DynamicCache, count: int) -> DynamicCache:
    """The same keys and values for so many rows each; another object, for a cache grows with what reads it."""
    copy = DynamicCache(config=unwrapped(model.module).config)
    for at, layer in enumerate(cache.layers):
        copy.update(layer.keys.repeat_interleave(count, 0), layer.values.repeat_interleave(count, 0), at)
    return copy


def _encoded_once(model: LocalModel, prompts: Ids, answers: Ids, rows: int) -> Tensor:
    """Scores of an encoder-decoder: prompts pass the encoder once."""
    ids, mask = (t.to(model.device) for t in pad_rows(prompts, model.pad_id, left=False))
    encoder: Any = model.module.get_encoder()  # type: ignore[operator]
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (P, T, H)
    chunk, parts = max(1, rows // len(prompts)), []
    for at in range(0, len(answers), chunk):
        some = answers[at : at + chunk]
        labels, _ = pad_rows(some, _NO_SCORE, left=False)
        labels = labels.to(model.device).repeat(len(prompts), 1)
        logits = _logits(
            model,
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden.repeat_interleave(len(some), 0)),
            attention_mask=mask.repeat_interleave(len(some), 0),
            decoder_input_ids=decoder_inputs(unwrapped(model.module), labels),
        )
        parts.append(_summed(logits, labels).view(len(prompts), len(some)))
    return torch.cat(parts, 1)


def decoder_inputs(module: Any, labels: Tensor) -> Tensor:
    """Labels, −100 where there is none → the decoder's inputs, as the model's own method makes them.

    Transformers' collator calls that method, too.
    """
    own = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(labels=labels.clone())  # some write into what they are given
        return shifted
    pad = module.config.pad_token_id or 0
    shifted = torch.full_like(labels, module.config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == _NO_SCORE, pad)
    return shifted


def _transformers_forward(model: LocalModel) -> Any:
    """The forward of the model below an adapter, whose own takes anything."""
    module: Any = unwrapped(model.module)
    return (module.get_base_model() if hasattr(module, "get_base_model") else module).forward


def _logits(model: LocalModel, **inputs: Any) -> Tensor:
    logits = getattr(model.module(**inputs), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        msg = (
            f"{type(model.module).__name__} gives no logits for its tokens, so answers have no probability. Use a "
            "model with a language modelling head."
        )
        raise UnsupportedModelError(msg)
    return logits


def _summed(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, S, V) logits and (B, S) tokens, −100 where there is none → (B,) summed log-probabilities in float32."""
    there = tokens != _NO_SCORE
    chosen = logits.float().log_softmax(-1).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(~there, 0.0).sum(1)
