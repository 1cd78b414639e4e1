"""What each token of a row says, so that the texts joined are the text of the row.

Knows tokenizers. Knows nothing about models, answers or how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MOST = 4  # tokens of one character: UTF-8 has no longer ones


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token says; of a character that takes several tokens, the last one says it.

    Joined they are the text of all, whatever white space a tokenizer puts where a text begins.
    """
    found: list[str] = []
    before = start = 0  # tokens from `before` to `start` have been told, and say what the next ones follow on
    for at in range(len(ids)):
        known = _decoded(tokenizer, ids[before:start])
        whole = _decoded(tokenizer, ids[before : at + 1])
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and at + 1 < len(ids) and at - start < _MOST:
            found.append("")
            continue
        found.append(whole[len(known) :] if whole.startswith(known) else _decoded(tokenizer, ids[start : at + 1]))
        before, start = start, at + 1
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
