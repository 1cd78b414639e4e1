"""Which prompts may share a batch so that each is answered as it is alone, asked of the module's own `generate`.

Knows transformers' `generate`. Knows nothing of text, options or training.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmchain_fed.model.adapters.lora_config import unwrapped
from llmchain_fed.model.generation.answers import evaluating
from llmchain_fed.model.generation.fields import CompleteConfig
from llmchain_fed.model.tokens import pad_rows

_LENGTH, _CUTS, _STEPS = 12, (1, 7), 2  # tokens of the trial prompt, tokens cut off for the others, tokens generated
_HALF = {torch.float16, torch.bfloat16}
Sharing = Literal["any", "equal", "none"]
# module → which prompts may share a batch
_known: weakref.WeakKeyDictionary[nn.Module, Sharing] = weakref.WeakKeyDictionary()


def sharing(module: Any, rows: Sequence[Sequence[int]], *, pad: int, left: bool) -> Sharing:
    """Which prompts may share a batch, any or those of equal length or none; asked once per module.

    Models that count positions from the first column, padding or not (BART's and Whisper's decoders), or read padding
    as text answer otherwise in a batch of unequal prompts than alone; some (RWKV in transformers 5) in any batch.

    Args:
        module: It generates on its device; the caller has its lock.
        rows: The ids of some prompts; a piece of one makes the trial.
        pad: The id of the padding token.
        left: If true, padding goes in front, as for every decoder-only model.
    """
    known = _known.get(module)
    if known is None:
        longest = max(rows, key=len)
        whole = list(longest[:_LENGTH])
        unequal = [whole, *(whole[cut:] for cut in _CUTS if cut < len(whole))]
        if len(unequal) == 1:
            return "none"  # too short to tell
        if _agree(module, unequal, pad, left=left):
            known = "any"
        else:
            known = "equal" if _agree(module, [whole, whole[::-1]], pad, left=left) else "none"
        _known[module] = known
    return known


@torch.inference_mode()
def _agree(module: Any, trial: list[list[int]], pad: int, *, left: bool) -> bool:
    half = any(p.dtype in _HALF for p in module.parameters())  # `generate` gives its logits in float32 all the same
    with evaluating(module):
        together = _first_logits(module, trial, pad, left=left)
        for i, row in enumerate(trial[1:], start=1):
            alone = _first_logits(module, [row], pad, left=left)
            if not all(same(ours[i], theirs[0], half=half) for ours, theirs in zip(together, alone, strict=False)):
                return False
    return True


def _first_logits(module: Any, rows: list[list[int]], pad: int, *, left: bool) -> tuple[Tensor, ...]:
    device = next(module.parameters()).device
    ids, mask = pad_rows(rows, pad, left=left)
    own = getattr(module, "generation_config", None)
    options = CompleteConfig(
        max_new_tokens=_STEPS, do_sample=False, num_beams=1, pad_token_id=pad, output_logits=True,
        return_dict_in_generate=True, decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
        bos_token_id=getattr(own, "bos_token_id", None),
    )  # fmt: skip
    # by the class: who watches or replaces this object's own `generate` is not asked by a trial
    inner: Any = unwrapped(module)
    output = type(inner).generate(
        inner, input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=options
    )
    logits: tuple[Tensor, ...] = output.logits
    return logits


def same(ours: Tensor, theirs: Tensor, *, exact: bool = False, half: bool = False) -> bool:
    """Whether logits are equal up to the rounding of another shape of batch.

    Args:
        ours: The logits of one computation.
        theirs: The logits of another, of the same shape.
        exact: If true, the tolerance is a tenth.
        half: They were computed in half precision, whose rounding adds up over the layers: their distance as a whole
            counts, a fifth of their spread at most; those of shifted positions are as far apart as strangers.
    """
    half = half or bool({ours.dtype, theirs.dtype} & _HALF)
    ours, theirs = ours.float(), theirs.float()
    spread = float(theirs.std())
    if half:
        return float((ours - theirs).square().mean().sqrt()) <= (0.02 if exact else 0.2) * spread
    return torch.allclose(ours, theirs, rtol=0, atol=(1e-4 if exact else 1e-3) * spread, equal_nan=True)
