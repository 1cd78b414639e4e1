"""Regular expressions and formats of strings as trees of nodes.

Knows Python's parser of regular expressions. Knows nothing about JSON schemas, tokens or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from re import _constants as sre  # type: ignore[attr-defined] # `re` has no public parser; there since Python 3.11
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.nodes import Chars, Choice, Fixed, Node, Ranges, Repeat, Series, merged

_FIRST, _LAST = 0x20, 0x10FFFF
_OUTSIDE = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF))
"""what stands in a JSON string behind a backslash only, and halves of pairs"""
_CATEGORIES: dict[Any, Ranges] = {
    sre.CATEGORY_DIGIT: ((48, 57),),
    sre.CATEGORY_WORD: ((48, 57), (65, 90), (95, 95), (97, 122)),
    sre.CATEGORY_SPACE: ((9, 13), (32, 32)),
}
_NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
}
ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
"""how JSON writes what cannot stand in a string as it is"""

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP = r"(?:(?:[1-9]\d|0\d)(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26]|0[48])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|"
    rf"02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?"
_OFFSET = r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]{1,60}(?:-[A-Za-z0-9]{1,20}){0,2}"
_HOST = rf"(?:{_LABEL}\.){{0,3}}[A-Za-z]{{1,60}}"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_V4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = r"[0-9a-fA-F]{1,4}"
_GROUPS = [rf"(?:{_GROUP}:){{{n - 1}}}{_GROUP}::(?:(?:{_GROUP}:){{0,{6 - n}}}{_GROUP})?" for n in range(1, 7)]
_V6 = "|".join(
    [
        rf"::(?:(?:{_GROUP}:){{0,6}}{_GROUP})?",
        *_GROUPS,
        rf"(?:{_GROUP}:){{6}}{_GROUP}::",
        rf"(?:{_GROUP}:){{7}}{_GROUP}",
    ]
)
_SAID = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_BEHIND = rf"(?:/{_SAID}*)*(?:\?(?:{_SAID}|[/?])*)?(?:#(?:{_SAID}|[/?])*)?"
_URI = rf"https?://{_HOST}(?::[1-9]\d{{0,3}})?{_BEHIND}"
_EMAIL = rf"[A-Za-z0-9_]{{1,40}}(?:[.+-][A-Za-z0-9_]{{1,10}}){{0,2}}@(?:{_LABEL}\.){{1,2}}[A-Za-z]{{2,60}}"
FORMATS = {
    "date": _DATE,
    "time": _TIME + _OFFSET,
    "time-local": _TIME,
    "date-time": f"{_DATE}T{_TIME}{_OFFSET}",
    "date-time-local": f"{_DATE}T{_TIME}",
    "duration": (
        r"P(?:[1-9]\d{0,2}D(?:T[1-9]\d?H)?|T[1-9]\d?[HMS])|"
        r"-?P(?:\d{1,8}D)?T(?:(?:\d|1\d|2[0-3])H(?:[0-5]?\d(?:M(?:[0-5]?\d(?:\.\d{1,6})?S)?|(?:\.\d{1,6})?S))?|"
        r"[0-5]?\dM(?:[0-5]?\d(?:\.\d{1,6})?S)?|[0-5]?\d(?:\.\d{1,6})?S)|-?P\d{1,8}D"
    ),
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": _V4,
    "ipv6": _V6,
    "uri": _URI,
    "iri": _URI,
    "uri-reference": f"{_URI}|/{_SAID}{_BEHIND}",
    "iri-reference": f"{_URI}|/{_SAID}{_BEHIND}",
    "json-pointer": r"(?:/(?:[^/~]|~[01])*)*",
    "base64": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?",
    "ipvanyaddress": f"{_V4}|{_V6}",
}
"""formats that are kept to: JSON Schema's, two of OpenAPI's registry, and some of Pydantic's; most are narrower"""
FORMATS["byte"] = FORMATS["base64"]
ANNOTATIONS = frozenset({"password", "binary", "path"})
"""formats that any string is of, for JSON Schema, OpenAPI and Pydantic alike"""


def expression(pattern: str) -> Node:
    """A regular expression as JSON Schema has it → the texts that match it, as they stand within a JSON string.

    Without `^` and `$` a match may have anything around it, as JSON Schema says.

    Raises:
        SchemaError: It is no regular expression, or looks around or back, which no grammar does.

    >>> expression("^[a-c]{2}$").shortest
    'aa'
    """
    try:
        parsed = list(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        msg = f"the pattern {pattern!r:.100} is no regular expression ({error}). Correct it."
        raise SchemaError(msg) from None
    starts = bool(parsed) and parsed[0] == (sre.AT, sre.AT_BEGINNING)
    ends = bool(parsed) and parsed[-1] in ((sre.AT, sre.AT_END), (sre.AT, sre.AT_END_STRING))
    inner = _nodes(parsed[starts : len(parsed) - ends], pattern)
    anything = Repeat(Choice(Chars(_within(((_FIRST, _LAST),))), *map(Fixed, ESCAPED.values())))
    return Series(*([] if starts else [anything]), inner, *([] if ends else [anything]))


def _nodes(parsed: Iterable[tuple[Any, Any]], pattern: str) -> Node:
    parts = [_node(kind, value, pattern) for kind, value in parsed]
    return parts[0] if len(parts) == 1 else Series(*parts)


def _node(kind: Any, value: Any, pattern: str) -> Node:
    if kind is sre.LITERAL:
        if 0xD800 <= value <= 0xDFFF:
            msg = f"the pattern {pattern!r:.100} has half a surrogate pair, which is no character. Correct it."
            raise SchemaError(msg)
        return Fixed(json.dumps(chr(value), ensure_ascii=False)[1:-1])
    if kind in (sre.IN, sre.NOT_LITERAL, sre.ANY):
        return _characters(kind, value, pattern)
    if kind is sre.SUBPATTERN:
        return _nodes(value[-1], pattern)
    if kind is sre.BRANCH:
        return Choice(*(_nodes(option, pattern) for option in value[1]))
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, inner = value
        item = _nodes(inner, pattern)
        if not item.shortest and least != most:  # an item of nothing would be repeated for ever
            least = 0
        if isinstance(item, Repeat) and item.least <= 1 and item.most is None and least <= 1 and most > 1:
            return Repeat(item.item, item.least * least)  # again and again of again and again
        return Repeat(item, least, None if most is sre.MAXREPEAT else most)
    msg = (
        f"the pattern {pattern!r:.100} looks around itself or back ({str(kind).lower()}), which no grammar does. "
        "Write it without."
    )
    raise SchemaError(msg)


def _characters(kind: Any, value: Any, pattern: str) -> Node:
    whole = _ranges(kind, value)
    plain = _within(whole)
    escaped = [Fixed(text) for char, text in ESCAPED.items() if any(a <= ord(char) <= b for a, b in whole)]
    options: list[Node] = [*([Chars(plain)] if plain else []), *escaped]
    if not options:
        msg = f"the pattern {pattern!r:.100} has a class without a character. Correct it."
        raise SchemaError(msg)
    return options[0] if len(options) == 1 else Choice(*options)


def _ranges(kind: Any, value: Any) -> Ranges:
    """The code points that a class of characters has."""
    if kind is sre.ANY:
        return _others(((10, 10),))
    if kind is sre.NOT_LITERAL:
        return _others(((value, value),))
    negated = value[0][0] is sre.NEGATE
    ranges: list[tuple[int, int]] = []
    for name, found in value[negated:]:
        if name is sre.LITERAL:
            ranges.append((found, found))
        elif name is sre.RANGE:
            ranges.append(found)
        elif found in _NEGATED:
            ranges += _others(_CATEGORIES[_NEGATED[found]])
        else:
            ranges += _CATEGORIES[found]
    return _others(merged(ranges)) if negated else merged(ranges)


def _others(ranges: Ranges) -> Ranges:
    """All code points but these."""
    found, low = [], 0
    for a, b in merged(ranges):
        if a > low:
            found.append((low, a - 1))
        low = b + 1
    return (*found, (low, _LAST)) if low <= _LAST else tuple(found)


def _within(ranges: Ranges) -> Ranges:
    """Of these code points, those that stand in a JSON string as they are."""
    allowed = _others(_OUTSIDE)
    both = ((max(a, c), min(b, d)) for a, b in ranges for c, d in allowed)
    return merged((low, high) for low, high in both if low <= high)


# --- lengths --------------------------------------------------------------------------------------------------------


def lengthened(body: Node, least: int, pattern: str) -> Node:
    """The texts of a pattern's that have so many characters.

    Args:
        body: What the pattern describes, as it stands within a JSON string.
        least: So many at least.
        pattern: It, for messages.

    Raises:
        SchemaError: They are no repetition that could be said to be longer.
    """
    shortest, _ = _lengths(body)
    if shortest >= least:
        return body
    if isinstance(body, Repeat):
        each, same = _lengths(body.item)
        if each and each == same and (body.most is None or body.most * each >= least):
            return Repeat(body.item, -(-least // each), body.most)
    elif isinstance(body, Choice):
        fitting = [option for option in body.options if (most := _lengths(option)[1]) is None or most >= least]
        if fitting:
            return Choice(*(lengthened(option, least, pattern) for option in fitting))
    elif isinstance(body, Series):
        sizes = [_lengths(part) for part in body.parts]
        loose = [i for i, (low, high) in enumerate(sizes) if low != high]
        if len(loose) == 1:
            (at,) = loose
            others = sum(low for i, (low, _) in enumerate(sizes) if i != at)
            longer = lengthened(body.parts[at], least - others, pattern)
            return Series(*body.parts[:at], longer, *body.parts[at + 1 :])
    msg = f"a length of at least {least} beside {pattern} is not known here: write it into a pattern"
    raise SchemaError(msg)


def _lengths(node: Node) -> tuple[int, int | None]:
    """Of how many characters the texts of a pattern's are, as JSON reads them: at least and at most."""
    if isinstance(node, Fixed):
        size = len(json.loads(f'"{node.text}"'))
        return size, size
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        low, high = _lengths(node.item)
        none = high is None or (node.most is None and high > 0)
        return low * node.least, None if none else (high or 0) * (node.most or 0)
    parts = [_lengths(part) for part in (node.parts if isinstance(node, Series) else node.options)]  # type: ignore[attr-defined]
    lows, highs = [low for low, _ in parts], [high for _, high in parts if high is not None]
    bounded = len(highs) == len(parts)
    if isinstance(node, Series):
        return sum(lows), sum(highs) if bounded else None
    return min(lows), max(highs) if bounded else None
