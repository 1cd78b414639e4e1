"""A `tokenizer.json` that somebody else wrote: no rules that swell a text beyond memory, no millions of added tokens.

Knows which of the tokenizers library's rules make texts longer, which it applies while it reads the file and where
nothing in Python can stop it. Knows nothing of vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmchain_fed.untrusted import parse_json, read_file, shown
from llmchain_fed.untrusted.text import ErrorType, refusal

_MOST = 2**28  # bytes; the largest of vendors have some 35 MB
_MOST_ADDED = 2**15  # tokens: each is searched for in every text, and more take a minute to read
_MOST_GROWTH = 2**16  # times as long as before


def check(folder: Path, *, remedy: str, error: ErrorType) -> None:
    """Makes sure that the tokenizer in a folder, if it has one in this form, can be read in bounded time and memory."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    what = shown(str(path), 300)
    data = read_file(path, most=_MOST, what="the tokenizer", error=error)
    found = parse_json(data, most=_MOST, what=what, error=error, bounded=False)
    if not isinstance(found, dict):
        raise refusal(error, f"{what} is no tokenizer", remedy)
    added = found.get("added_tokens")
    if isinstance(added, list) and len(added) > _MOST_ADDED:
        raise refusal(error, f"`added_tokens` in {what} are {len(added):,}, at most {_MOST_ADDED:,} make sense", remedy)
    for part in ("normalizer", "decoder"):
        growth = math.prod(_growth(rule) for rule in _rules(found.get(part)))
        if growth > _MOST_GROWTH:
            raise refusal(error, f"`{part}` in {what} can make a text {_times(growth)} times as long", remedy)


def _rules(part: Any) -> Iterator[dict[str, Any]]:
    """Every rule in a part, those of sequences within each other included."""
    left = [part]
    while left:
        rule = left.pop()
        if isinstance(rule, list):
            left += rule
        elif isinstance(rule, dict):
            yield rule
            left += [inner for inner in rule.values() if isinstance(inner, list)]


def _growth(rule: dict[str, Any]) -> int:
    """How many times as long a text can become by a rule that replaces; an expression may match nothing."""
    content, pattern = rule.get("content"), rule.get("pattern")
    if not isinstance(content, str) or pattern is None:
        return 1
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1, -(-len(content) // len(literal)))
    return 1 + len(content)


def _times(growth: int) -> str:
    return f"{growth:,}" if growth < 10**12 else "10¹² and more"
