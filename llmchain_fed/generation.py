"""How text comes out of a module: the options, where an answer ends, and its pieces while it is being made.

Knows transformers' `generate` and tokenizers. Knows nothing about weights, chains or training.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llmchain_fed._config import FrozenConfig
from llmchain_fed.errors import ConfigError


class GenerationOptions(FrozenConfig):
    """What one call to `generate` may vary; everything else stays as the model's authors set it.

    >>> GenerationOptions(max_new_tokens=24)
    GenerationOptions(max_new_tokens=24)
    """

    max_new_tokens: int = Field(default=256, ge=1)
    """tokens: at most this many are generated"""
    min_new_tokens: int | None = Field(default=None, ge=0)
    """tokens: the answer does not end before this many"""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy (the default); above 0 the answer is sampled"""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """share of probability mass sampled from (with temperature > 0)"""
    top_k: int | None = Field(default=None, ge=1)
    """number of candidate tokens sampled from (with temperature > 0)"""
    num_beams: int = Field(default=1, ge=1)
    """beams searched; above 1 a stream arrives as one piece"""
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    """above 1 discourages tokens already present (arXiv 1909.05858)"""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """tokens: no n-gram of this size occurs twice; 0 is off"""
    seed: int | None = None
    """makes a sampled answer reproducible; torch's global generator is as before afterwards"""

    @property
    def reads_padding(self) -> bool:
        """True when tokens already present count, so that padding in front of a prompt would count too."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    def to_transformers(self, *, eos: Sequence[int], pad: int) -> GenerationConfig:
        """The same as a transformers `GenerationConfig`; sampling options are absent when greedy."""
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            # top_k=0 switches off transformers' own default of 50, which nobody asked for
            sampling |= {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            eos_token_id=list(eos) or None,
            pad_token_id=pad,
            **sampling,
        )


@dataclass(frozen=True)
class Completion:
    """One answer: its text without prompt, stop string or special tokens, and what it cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]


def checked_stops(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """The stop strings as a tuple; a single string counts as one.

    Raises:
        ConfigError: A stop string that is empty or not text.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            msg = f"a stop string must be non-empty text, got {text!r}. Leave `stop` out to stop at the end token only."
            raise ConfigError(msg)
    return stops


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string that occurs in it.

    >>> cut_at_stop("Bonjour ### fin ###", ["fin", "###"])
    'Bonjour '
    """
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of an unfinished text may be shown: not what could be the beginning of a stop string.

    >>> safe_length("Bonjour ##", ["###"])
    8
    """
    longest = max((len(s) for s in stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(s.startswith(text[start:]) for s in stops):
            return start
    return len(text)


class StopOnText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row as soon as its new text contains a stop string.

    Compares text, not token ids, because a stop string may fall anywhere within tokens. transformers' own
    `stop_strings` needs a table over the whole vocabulary for that.
    """

    def __init__(self, decode: Callable[[Any], list[str]], stops: Sequence[str], prompt_width: int) -> None:
        self._decode, self._stops, self._prompt_width = decode, stops, prompt_width
        # Every token adds at least a byte; the margin covers special tokens and a cut character in front.
        self._window = max(len(s.encode()) for s in stops) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 (transformers' signature)
        """(rows, T) token ids so far → (rows,) which are done."""
        start = max(self._prompt_width, input_ids.shape[1] - self._window)
        done = [any(s in text for s in self._stops) for text in self._decode(input_ids[:, start:])]
        return torch.tensor(done, device=input_ids.device)


class StopOnEvent(StoppingCriteria):  # type: ignore[misc]
    """Ends all rows once nobody reads the stream any more."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 (transformers' signature)
        """(rows, T) → (rows,) all true or all false."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):  # type: ignore[misc]
    """Receives token ids from `generate`; the first call holds the prompt and is passed over."""

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
    stops: Sequence[str],
) -> Generator[str, None, list[int]]:
    """Runs `work` in a thread and yields its text piece by piece.

    The pieces joined equal `cut_at_stop(finish(all ids), stops)`. An error in `work` is raised here at once, and
    closing the iterator ends `work` at its next token (TextIteratorStreamer does neither:
    https://github.com/huggingface/transformers/issues/22576). The return value is all token ids.

    Args:
        work: Generates; takes the streamer to feed and a criterion that ends it.
        finish: Token ids so far → text.
        stops: Where to cut. A possible beginning of one is held back.
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
            text = finish(ids)
            if cut_at_stop(text, stops) != text:
                break
            # An incomplete multi-byte character decodes to U+FFFD until its last byte is there.
            ready = text[: safe_length(text.rstrip("\ufffd"), stops)]
            if len(ready) > len(shown) and ready.startswith(shown):
                yield ready[len(shown) :]
                shown = ready
        yield cut_at_stop(finish(ids), stops)[len(shown) :]
        return ids
    finally:
        abandoned.set()
        worker.join()


def pad_rows(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids → (B, T) ids and attention mask.

    >>> pad_rows([[5, 6], [7]], 0, left=True)[0]
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


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
