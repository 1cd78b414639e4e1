"""How text comes out of a module: options, which prompts may share a batch, and an answer's pieces while it is made.

Knows transformers' `generate`. Knows nothing about weights, chains or training.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llmchain_fed._config import FrozenConfig
from llmchain_fed.model.adapters.lora_config import unwrapped
from llmchain_fed.model.generation import fields
from llmchain_fed.model.generation.fields import CompleteConfig
from llmchain_fed.model.generation.stop_strings import cut_at_stop, safe_length
from llmchain_fed.model.tokens import pad_rows

_LENGTH, _CUTS, _STEPS = 12, (1, 7), 2  # tokens of the trial prompt, tokens cut off for the others, tokens generated
_HALF = {torch.float16, torch.bfloat16}
Sharing = Literal["any", "equal", "none"]
# module → which prompts may share a batch
_known: weakref.WeakKeyDictionary[nn.Module, Sharing] = weakref.WeakKeyDictionary()


class GenerationOptions(FrozenConfig):
    """What one call to `generate` may vary; everything else stays as the model's authors set it.

    >>> GenerationOptions(max_new_tokens=24)
    GenerationOptions(max_new_tokens=24)
    """

    max_new_tokens: int = Field(default=256, ge=1, le=2**24)
    """tokens: at most this many are generated"""
    min_new_tokens: int | None = Field(default=None, ge=0, le=2**24)
    """tokens: the answer does not end before this many (or before `max_new_tokens`); None: as the model ships it"""
    temperature: float = Field(default=0.0, ge=0.0, le=1e6)
    """0 is greedy (the default); above 0 the answer is sampled"""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """share of probability mass sampled from (with temperature > 0)"""
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    """number of candidate tokens sampled from (with temperature > 0)"""
    num_beams: int = Field(default=1, ge=1, le=256)
    """beams searched; above 1 a stream arrives as one piece"""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=1e6)
    """above 1 discourages tokens already present (arXiv 1909.05858)"""
    no_repeat_ngram_size: int = Field(default=0, ge=0, le=2**24)
    """tokens: no n-gram of this size occurs twice; 0 is off"""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """makes a sampled answer reproducible; torch's global generator is as before afterwards"""

    @property
    def reads_padding(self) -> bool:
        """True when tokens already present count, so that padding in front of a prompt would count too."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    def to_transformers(
        self, own: GenerationConfig | None = None, *, eos: Sequence[int], pad: int, start: int
    ) -> GenerationConfig:
        """All that `generate` is to do: these options over what the model ships.

        Args:
            own: The module's `generation_config`; `generation.fields` says which of its fields apply.
            eos: These ids end an answer.
            pad: The id of the padding token.
            start: tokens: The answer begins here in a row, behind the prompt or the decoder's start.

        Raises:
            ConfigError: What the model ships cannot be used.
        """
        values = fields.shipped(own, sampling=self.temperature > 0, beams=self.num_beams > 1)
        # One field for both, counted from the row's start, because transformers warns where the model ships the other.
        new = self.min_new_tokens if self.min_new_tokens is not None else values.pop("min_new_tokens", None)
        shortest = start + new if new is not None else values.get("min_length", 0)
        values |= {"min_new_tokens": None, "min_length": min(shortest, start + self.max_new_tokens)}
        values |= {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            # top_k=0 switches off transformers' own default of 50, which nobody asked for
            values |= {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        if not eos:
            values.pop("exponential_decay_length_penalty", None)  # there is no end to bring nearer
        return CompleteConfig(
            **values
            | {
                "max_new_tokens": self.max_new_tokens,
                "num_beams": self.num_beams,
                "repetition_penalty": self.repetition_penalty,
                "no_repeat_ngram_size": self.no_repeat_ngram_size,
                "eos_token_id": list(eos) or None,
                "pad_token_id": pad,
            }
        )


@dataclass(frozen=True)
class Completion:
    """One answer: its text without prompt, stop string or special tokens, and what it cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    ids: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """the tokens that were generated, without the end token, and with those of a stop string"""


class StopOnEvent(StoppingCriteria):  # type: ignore[misc]
    """Ends all rows once nobody reads the stream any more."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 (transformers' signature)
        """(rows, T) → (rows,) all true or all false."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):  # type: ignore[misc]
    """Receives token ids from `generate`; the first call brings the prompt and is passed over."""

    def __init__(self, items: queue.SimpleQueue[list[int] | BaseException | None]) -> None:
        self._items, self._seen_prompt = items, False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self._items.put(value.flatten().tolist())
        self._seen_prompt = True

    def end(self) -> None:
        """The worker, not `generate`, ends the stream: after an error `generate` would not."""


def stream_text(
    work: Callable[[BaseStreamer, StoppingCriteria], None],
    finish: Callable[[list[int]], str],
    settled: Callable[[list[int]], str],
    stops: Sequence[str],
) -> Generator[str, None, list[int]]:
    """Runs `work` in a thread and yields its text piece by piece.

    The pieces joined equal `cut_at_stop(finish(all ids), stops)`. An error in `work` is raised here at once, and
    closing the iterator ends `work` at its next token (TextIteratorStreamer does neither:
    https://github.com/huggingface/transformers/issues/22576). The return value is all token ids.

    Args:
        work: It generates; it takes the streamer to feed and a criterion that ends it.
        finish: It makes text of all token ids.
        settled: It makes of the token ids so far the beginning of that text that no further token can change.
        stops: The text is cut at these strings. A possible beginning of one is kept back.
    """
    items: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        try:
            work(_TokenQueue(items), StopOnEvent(abandoned))
        except BaseException as error:
            items.put(error)
        else:
            items.put(None)

    worker = threading.Thread(target=run, name="llmchain_fed-stream", daemon=True)
    worker.start()
    ids: list[int] = []
    shown = ""
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ids += item
            text = settled(ids)
            if cut_at_stop(text, stops) != text:
                break
            ready = text[: safe_length(text, stops)]
            if len(ready) > len(shown) and ready.startswith(shown):
                yield ready[len(shown) :]
                shown = ready
        yield cut_at_stop(finish(ids), stops)[len(shown) :]
        return ids
    finally:
        abandoned.set()
        worker.join()


def chunks(order: Sequence[int], keys: Sequence[object], size: int) -> Iterator[list[int]]:
    """Splits `order` into batches of at most `size` whose members all have the same key."""
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) == size or keys[i] != keys[chunk[0]]):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off, and every part's former mode back afterwards: `get_peft_model` leaves training mode on in some."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """With a seed, what is drawn inside is reproducible and the global generators are left as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --- batches of prompts, asked of the module's own `generate` --------------------------------------------------------


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
