"""Where an answer ends: stop strings, found in text that no further token can change.

Knows token ids and their text, through functions that it is given. Knows nothing about models, options or training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from llmchain_fed.errors import ConfigError

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def checked_stops(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """The stop strings as a tuple; a single string counts as one.

    Raises:
        ConfigError: A stop string is empty or not text.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            msg = f"a stop string must be non-empty text, got {text!r}. Leave `stop` out to stop at the end token only."
            raise ConfigError(msg)
    return stops


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of two complete at once, before the longer one.

    Which is complete first does not depend on how the text is cut into tokens, nor on what follows it.

    >>> cut_at_stop("Bonjour ### fin ###", ["fin", "###"])
    'Bonjour '
    >>> cut_at_stop("abcd", ["bcd", "c"])
    'ab'
    """
    found = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else text


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


class Settling:
    """An unfinished answer's text as far as no further token can change it.

    Two things can change: an incomplete character, which reads U+FFFD until its last byte is there, and a run of byte
    tokens (`<0xE2>`), which reads U+FFFD as a whole while it is no valid UTF-8, even after it was.

    Args:
        tokenizer: It says which ids are byte tokens.
        finish: It makes the answer's text of all new ids of a row.
    """

    def __init__(self, tokenizer: Any, finish: Callable[[list[int]], str]) -> None:
        self._finish = finish
        self._name = getattr(tokenizer, "convert_ids_to_tokens", lambda _: None)
        self._bytes: dict[int, bool] = {}

    def is_byte(self, token: int) -> bool:
        """Whether the token stands for one byte, by name."""
        if token not in self._bytes:
            self._bytes[token] = _BYTE.fullmatch(str(self._name(token))) is not None
        return self._bytes[token]

    def __call__(self, ids: list[int]) -> str:
        """All new ids of a row so far → the settled beginning of its text."""
        end = len(ids)
        while end and self.is_byte(ids[end - 1]):
            end -= 1
        return self._finish(ids[:end]).rstrip("\ufffd")


class StopOnText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its settled text contains a stop string, so that ending early never changes an answer.

    Compares text, not token ids, because a stop string may fall anywhere within tokens. transformers' own
    `stop_strings` needs a table over the whole vocabulary for that. The last tokens alone are looked at first; out of
    their context they may read otherwise, so a hit is confirmed on the whole row. A miss only costs time, since the
    answer is cut on its whole text.

    Args:
        decode: It makes text of some ids in a row.
        settled: It makes of all new ids of a row the text that no further token can change.
        stops: The row ends at any of these strings.
        prompt_width: tokens: A row's answer begins behind so many.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], settled: Settling, stops: Sequence[str], prompt_width: int
    ) -> None:
        self._decode, self._settled, self._stops, self._prompt_width = decode, settled, stops, prompt_width
        # The margin is for what stands at a window's beginning and reads otherwise there than in the middle.
        self._window = max(len(s.encode()) for s in stops) + 8
        self.lengths: dict[int, int] = {}
        """row → tokens of its answer when it ended; without beams, whose rows change places"""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 (transformers' signature)
        """(rows, T) token ids so far → (rows,) which are done."""
        rows = input_ids[:, self._prompt_width :].tolist()
        done = [self._ends(row) for row in rows]
        for i, ended in enumerate(done):
            if ended:
                self.lengths.setdefault(i, len(rows[i]))
        return torch.tensor(done, device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        return self._contains(self._last(row)) and self._contains(self._settled(row))

    def _last(self, row: list[int]) -> str:
        """A window's length of text at the end: a token may add none, and byte tokens settle late."""
        start, size = len(row), self._window
        while True:
            counted = 0
            while start and counted < size:
                start -= 1
                counted += not self._settled.is_byte(row[start])
            text = self._decode(row[start:])
            if not start or len(text) >= self._window:
                return text
            size *= 2

    def _contains(self, text: str) -> bool:
        return any(s in text for s in self._stops)
