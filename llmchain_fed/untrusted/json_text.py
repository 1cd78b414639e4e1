"""JSON from elsewhere, and the fields of what was parsed: each has a type and a range, by a strict model of its reader.

Knows JSON, limits and pydantic. Knows nothing of what a message or a field means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmchain_fed.untrusted.text import MAX_INTEGER, ErrorType, refusal, shown

MAX_DEPTH = 32
"""levels of mappings and lists within each other"""
_LONG_DIGITS = re.compile("[0-9]{19}")
ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_ERRORS = 100  # that are looked at one by one: each costs more than what it is about


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


class Strict(BaseModel):
    """Data from elsewhere: nothing unknown, nothing converted, no number that is not finite.

    Every list and mapping among the fields has a largest length, and of a list the first wrong item ends the reading.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked(model: type[ModelT], found: object, *, what: str, error: ErrorType, remedy: str = "") -> ModelT:
    """The strict model of what was parsed: each field has its type and its range, or is refused by name.

    A refusal quotes names and short values only, and ends with the remedy.
    """
    strict = model.model_config.get("extra") == "forbid"
    if strict and isinstance(found, dict) and len(found) > len(model.model_fields):
        # each unknown field would become an error object of its own
        strange = next(name for name in found if name not in model.model_fields)
        raise refusal(error, f"{what} makes no sense: `{shown(strange, 60)}` is unknown", remedy)
    try:
        return model.model_validate(found)
    except ValidationError as failed:
        if failed.error_count() > _MOST_ERRORS:
            why = f"{failed.error_count():,} of its values are unknown, of another type or out of range"
            raise refusal(error, f"{what} makes no sense: {why}", remedy) from None
        wrong: list[Any] = list(failed.errors(include_url=False, include_context=False))
    except (RecursionError, ValueError, TypeError) as failed:
        raise refusal(error, f"{what} makes no sense ({type(failed).__name__})", remedy) from None
    told = [
        f"`{'.'.join(shown(str(part), 60) for part in item['loc']) or 'all of it'}`: {_why(item)}" for item in wrong
    ]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    raise refusal(error, f"{what} makes no sense: {'; '.join(told[:3])}{more}", remedy)


def _why(item: Mapping[str, Any]) -> str:
    message = shown(item["msg"].removeprefix("Value error, "), 200)
    given = "" if item["type"] == "missing" else f" (got {shown(item['input'])})"
    return message + given
