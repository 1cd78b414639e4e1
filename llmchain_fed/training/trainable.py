"""What a module must be to be trained here, asked of the module itself by small forward passes before any training.

Knows torch and transformers. Knows nothing of LangChain, examples, optimizers or rounds, and has no list of
architectures: what a module does with later tokens, with padding and with its own state shows in what it computes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmchain_fed.data.encoding import IGNORE
from llmchain_fed.errors import DataError, UnsupportedModelError
from llmchain_fed.model.adapters.lora_config import check_in_use, unwrapped
from llmchain_fed.model.generation.answers import evaluating, same
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import check_rows, pad_rows
from llmchain_fed.training import running_state
from llmchain_fed.training.loss import completion_logits, transformers_model

_log = logging.getLogger(__name__)
_said: set[str] = set()
_LENGTH, _SHORT = 8, 5  # tokens of the trial rows
# module → its parts that stay in evaluation mode; module → whether rows of unequal length may share a batch
_still: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
_pads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def admit(model: LocalModel) -> list[str]:
    """Makes sure that training this model here is what plain training of it would be; asked once per module.

    Returns:
        The parts that are frozen in evaluation mode and must stay in it during training.

    Raises:
        UnsupportedModelError: Tokens see later ones, there is no loss per token, a forward pass fails on text alone,
            or some part has running state that training would change. The message has the remedy.
    """
    if model.adapter is None:  # a view switches adapters by itself
        check_in_use(model.module)
    module = unwrapped(model.module)  # a trial is not worth compiling for
    known = _still.get(module)
    pads(model)
    if known is not None and not any(module.get_submodule(name).training for name in known):
        return known
    with model.exclusive():
        trial = _trial(module, model.pad_id)
        if trial is None:
            found = running_state.still_parts(module, None)
        else:
            with _no_trace(model.device):
                found = running_state.still_parts(module, lambda: _forward(module, *trial, "in training mode"))
    _still[module] = found
    return found


def pads(model: LocalModel) -> bool:
    """Whether padding behind a row leaves its loss alone, so that rows of unequal length may share a batch.

    Raises:
        UnsupportedModelError: See `admit`; running state is no matter here, where nothing is trained.
    """
    module = unwrapped(model.module)
    known = _pads.get(module)
    if known is None:
        check_rows(model, ())  # says more than the IndexError of a trial would
        with model.exclusive():
            trial = _trial(module, model.pad_id)
            with _no_trace(model.device), evaluating(module):
                known = trial is None or _check_logits(module, *trial)
        _pads[module] = known
    return known


def check_batches(model: LocalModel, examples_a_pass: int) -> None:
    """Makes sure that padding, where batches have any, leaves the loss alone.

    Raises:
        UnsupportedModelError: Padding changes the loss, and several examples share a forward pass.
    """
    if examples_a_pass > 1 and not pads(model):
        msg = (
            f"the loss of {type(transformers_model(model.module)).__name__} changes with the padding behind a row, so "
            "examples of unequal length cannot share a forward pass. Train with TrainingConfig(micro_batch_size=1)."
        )
        raise UnsupportedModelError(msg)


@contextmanager
def _no_trace(device: torch.device) -> Iterator[None]:
    """No gradients, and the generators of random numbers as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        yield


def _trial(module: nn.Module, pad: int) -> tuple[Any, dict[str, Tensor]] | None:
    """The transformers model and a small batch for it; None where nobody knows what the module takes."""
    base = transformers_model(module)
    ids = None if base is None else _trial_ids(base, pad)
    if ids is None:
        return None
    if base.config.is_encoder_decoder and getattr(base.config, "decoder_start_token_id", None) is None:
        msg = (
            f"{type(base).__name__} has no decoder_start_token_id, so its decoder cannot begin. Set "
            "module.config.decoder_start_token_id and module.generation_config.decoder_start_token_id."
        )
        raise UnsupportedModelError(msg)
    device = next(module.parameters()).device
    rows = _trial_rows(ids, pad, seq2seq=bool(base.config.is_encoder_decoder))
    return base, {k: v.to(device) for k, v in rows.items()}


def _trial_ids(base: Any, pad: int) -> list[int] | None:
    """Ids of ordinary tokens, as many as two rows and a changed token need; None where the module takes none."""
    embeddings = base.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None) or getattr(getattr(embeddings, "weight", None), "shape", [0])[0]
    special = {pad} | _special_ids(base.config)
    ordinary = [i for i in range(min(int(rows), 1000)) if i not in special]
    if len(ordinary) < _LENGTH:
        return None
    return [ordinary[(7 * i + 3) % len(ordinary)] for i in range(2 * _LENGTH)]


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for values in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        named = vars(values) if hasattr(values, "__dict__") else {}
        found |= {v for n, v in named.items() if n.endswith(("token_id", "token_index")) and isinstance(v, int)}
    return found


def _trial_rows(ids: list[int], pad: int, *, seq2seq: bool) -> dict[str, Tensor]:
    """Three rows: one; the same with another last token; a shorter one, padded behind."""
    first, other = ids[:_LENGTH], ids[_LENGTH:]
    rows = [first, [*first[:-1], other[-1]], other[:_SHORT]]
    input_ids, mask = pad_rows(rows, pad, left=False)
    if seq2seq:
        targets = [first, first, other[:_SHORT]]
        labels, _ = pad_rows(targets, IGNORE, left=False)
    else:
        labels = input_ids.masked_fill(mask == 0, IGNORE)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def _forward(module: nn.Module, base: Any, batch: Mapping[str, Tensor], where: str) -> Tensor:
    """The logits of the labelled tokens; whatever fails is this package's error."""
    try:
        return completion_logits(module, batch)[0]
    except DataError as error:
        raise UnsupportedModelError(str(error)) from error
    except Exception as error:
        msg = (
            f"{type(base).__name__} cannot be run on token ids, attention mask and labels {where}, so it cannot be "
            f"trained on text: {type(error).__name__}: {error}. Set in its configuration what this asks for, or wrap "
            "it so that forward(input_ids, attention_mask, labels) works."
        )
        raise UnsupportedModelError(msg) from error


def _check_logits(module: nn.Module, base: Any, batch: Mapping[str, Tensor]) -> bool:
    """Refuses what sees later tokens, says what its own loss adds; whether padding leaves the logits alone."""
    rows = _forward(module, base, batch, "in evaluation mode")
    seq2seq = bool(base.config.is_encoder_decoder)
    count = _LENGTH if seq2seq else _LENGTH - 1  # labelled positions of a full row
    first, changed = rows[:count], rows[count : 2 * count]
    # the last labelled position of a decoder-only row has not seen the changed token either
    if not seq2seq and not same(first, changed, exact=True):
        msg = (
            f"in {type(base).__name__} a token's logits depend on later tokens, so next-token training would teach it "
            "to copy what it sees, and its answers would be senseless. Set config.is_decoder=True before making it, "
            "where there is such a switch, or use a decoder-only model."
        )
        raise UnsupportedModelError(msg)
    if seq2seq:
        _check_decoder(module, base, batch, first)
    _say_what_else_is_in_its_loss(module, base, batch, rows)
    short = {k: v[2:, :_SHORT] for k, v in batch.items()}
    return same(rows[2 * count :], _forward(module, base, short, "in evaluation mode"))


def _check_decoder(module: nn.Module, base: Any, batch: Mapping[str, Tensor], first: Tensor) -> None:
    """A decoder that sees its own later tokens would be taught to copy them."""
    row = {k: v[:1].clone() for k, v in batch.items()}
    row["labels"][0, -2] = batch["labels"][2, 0]  # the input of the last position alone
    other = _forward(module, base, row, "in evaluation mode")
    if not same(first[:-1], other[:-1]):
        msg = (
            f"in {type(base).__name__} the decoder's logits depend on later tokens, so training would teach it to copy "
            "what it sees. Set is_decoder=True in the decoder's configuration before making it."
        )
        raise UnsupportedModelError(msg)


def _say_what_else_is_in_its_loss(module: nn.Module, base: Any, batch: Mapping[str, Tensor], rows: Tensor) -> None:
    labels = batch["labels"] if base.config.is_encoder_decoder else batch["labels"][:, 1:]
    ours = float(nn.functional.cross_entropy(rows.float(), labels[labels != IGNORE].to(rows.device)))
    try:
        own = getattr(module(**{k: v.clone() for k, v in batch.items()}), "loss", None)
    except Exception:  # its own loss is not used here, so whatever fails in it is no harm
        return
    name = type(base).__name__
    if name not in _said and isinstance(own, Tensor) and own.numel() == 1 and abs(float(own) - ours) > 0.02 * ours:
        _said.add(name)
        _log.warning(
            "%s's own loss (%.4f on a trial batch) is not the cross-entropy of the next token (%.4f): it smooths "
            "labels, adds further tokens or a router's balance, or expects labels that are shifted already. Trained "
            "and reported here is that cross-entropy, per completion token.",
            name, float(own), ours,
        )  # fmt: skip
