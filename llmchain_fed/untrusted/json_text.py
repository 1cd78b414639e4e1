"""JSON from elsewhere.

Knows JSON and limits. Knows nothing of what a message means.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from llmchain_fed.untrusted.text import MAX_INTEGER, ErrorType, refusal, shown

MAX_DEPTH = 32
"""levels of mappings and lists within each other"""
_LONG_DIGITS = re.compile("[0-9]{19}")


def parse_json(
    data: bytes | bytearray | memoryview | str, *, most: int, what: str, error: ErrorType, bounded: bool = True
) -> Any:
    """A JSON value in UTF-8: no name twice, no constant that JSON has not, integers below 2⁶³, at most 32 levels.

    Args:
        data: bytes, or text that was read before.
        most: bytes (characters of text) that are parsed at all; memory is at most some 60 times that.
        what: Is parsed, for the message.
        error: Raised.
        bounded: False for a file whose integers may have up to the 4,300 digits that Python reads.
    """
    found = loads(data, most=most, what=what, error=error, bounded=bounded)
    if _is_deep(found):
        raise refusal(error, f"{what} is no JSON of ours (more than {MAX_DEPTH} levels)")
    return found


def read_json(
    data: bytes | bytearray | memoryview | str, *, most: int, what: str, error: ErrorType, bounded: bool = True
) -> dict[str, Any]:
    """A JSON object; see `parse_json`."""
    found = parse_json(data, most=most, what=what, error=error, bounded=bounded)
    if not isinstance(found, dict):
        raise refusal(error, f"{what} is {type(found).__name__}, not a JSON object")
    return found


def loads(data: bytes | bytearray | memoryview | str, *, most: int, what: str, error: ErrorType, bounded: bool) -> Any:
    """JSON of any depth that the scanner's own limit of recursion lets through; with bounded integers or any."""
    if len(data) > most:
        raise refusal(error, f"{what} has {len(data):,} bytes where at most {most:,} make sense")
    try:
        text = data if isinstance(data, str) else bytes(data).decode("utf-8")
        # the scanner in C makes integers itself; only where long ones stand is each of them looked at
        integer = _integer if bounded and _LONG_DIGITS.search(text) else None
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=integer)
    except (ValueError, RecursionError) as found:
        raise refusal(error, f"{what} is no JSON of ours ({type(found).__name__}: {shown(str(found), 200)})") from None


def _is_deep(found: Any) -> bool:
    """Whether there are more than `MAX_DEPTH` levels, told level by level."""
    level = [found] if isinstance(found, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
    return bool(level)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or not -MAX_INTEGER <= (found := int(text)) < MAX_INTEGER:
        msg = f"an integer of {len(text)} digits"
        raise ValueError(msg)
    return found


def _no_constant(name: str) -> NoReturn:
    msg = f"{name} is no JSON"
    raise ValueError(msg)
