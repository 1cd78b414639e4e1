"""Regular expressions and numbers within bounds as trees of nodes.

Knows Python's parser of regular expressions. Knows nothing about JSON schemas, tokens or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
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
DIGIT = Chars(((48, 57),))
_MOST_DIGITS = 17  # behind the first, of a number without bounds: they fit into 64 bits, which readers of JSON count on
ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
"""how JSON writes what cannot stand in a string as it is"""

FORMATS = {
    "date": r"[1-9]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])",
    "time": r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    "date-time": (
        r"[1-9]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?"
        r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
    ),
    "duration": r"P(?:[1-9]\d{0,2}D(?:T[1-9]\d?H)?|T[1-9]\d?[HMS])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9_]+(?:[.+-][A-Za-z0-9_]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\.[A-Za-z0-9]+)*\.[A-Za-z]{2,}",
    "ipv4": r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}",
    "uri": r"https?://[A-Za-z0-9]+(?:[.-][A-Za-z0-9]+)*(?::[1-9]\d{0,3})?(?:/[A-Za-z0-9._~%+-]*)*",
}
"""formats of JSON Schema that are kept to; in a month, the 29th to 31st are left out, which not every one has"""


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
    return Series(*(_node(kind, value, pattern) for kind, value in parsed))


def _node(kind: Any, value: Any, pattern: str) -> Node:
    if kind is sre.LITERAL:
        return Fixed(ESCAPED.get(chr(value), chr(value)))
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


# --- numbers --------------------------------------------------------------------------------------------------------


def number(low: Decimal | None, high: Decimal | None, *, low_open: bool, high_open: bool, whole: bool) -> Node:
    """The numbers from one bound to another, as JSON writes them.

    Args:
        low: None where there is no lower bound.
        high: None where there is no upper bound.
        low_open: Whether the lower bound itself is left out.
        high_open: Whether the upper bound itself is left out.
        whole: Whether only whole numbers are meant.

    Raises:
        SchemaError: There is none.

    >>> number(Decimal(3), Decimal(12), low_open=False, high_open=True, whole=True).whole("11")
    True
    """
    options: list[Node] = []
    if low is None or low < 0:  # −high … −low, mirrored
        least, opened = (-high, high_open) if high is not None and high < 0 else (Decimal(0), True)
        options += [Series("-", n) for n in _from(least, None if low is None else -low, opened, low_open, whole)]
    if high is None or high >= 0:
        least, opened = (low, low_open) if low is not None and low >= 0 else (Decimal(0), False)
        options += _from(least, high, opened, high_open, whole)
    if not options:
        msg = f"there is no {'whole ' if whole else ''}number between {low} and {high}. Correct the bounds."
        raise SchemaError(msg)
    unbounded = low is None and high is None
    power = Choice(Series("-", Repeat(DIGIT, 1, 3)), Series(Choice("", "+"), Repeat(DIGIT, 1, 2)))  # finite
    exponent = Choice("", Series(Chars.of("eE"), power))
    return Series(Choice(*options), exponent) if unbounded and not whole else Choice(*options)


def _from(low: Decimal, high: Decimal | None, low_open: bool, high_open: bool, whole: bool) -> list[Node]:  # noqa: FBT001
    """The numbers from `low` ≥ 0 to `high`, without a sign."""
    if high is not None and (low > high or (low == high and (low_open or high_open))):
        return []
    first = int(low.to_integral_value(ROUND_CEILING))
    last = None if high is None else int(high.to_integral_value(ROUND_FLOOR))
    if whole:
        first += low_open and first == low
        last = last if last is None else last - (high_open and last == high)
        return integers(first, last)
    floor = int(low.to_integral_value(ROUND_FLOOR))
    found: list[Node] = []
    if last is not None and floor == last and high is not None:  # both within one whole number
        return [Series(str(floor), f) for f in _fractions(low - floor, high - floor, low_open, high_open)]
    found += [Series(str(floor), f) for f in _fractions(low - floor, None, low_open, False)]  # noqa: FBT003
    found += [Series(n, _FRACTION) for n in integers(floor + 1, None if last is None else last - 1)]
    if last is not None and high is not None:
        found += [Series(str(last), f) for f in _fractions(Decimal(0), high - last, False, high_open)]  # noqa: FBT003
    return found


_FRACTION = Choice("", Series(".", Repeat(DIGIT, 1, _MOST_DIGITS)))


def _fractions(low: Decimal, high: Decimal | None, low_open: bool, high_open: bool) -> list[Node]:  # noqa: FBT001
    """What may stand behind a whole number for its fraction to be within bounds; nothing, where that is 0."""
    found: list[Node] = [Fixed("")] if low == 0 and not low_open and not (high == 0 and high_open) else []
    below, above = _digits(low), None if high is None else _digits(high)
    rest = _fraction(below, above, low_open, high_open)
    return [*found, Series(".", rest)] if rest is not None else found


def _digits(value: Decimal) -> str:
    return f"{value:f}".partition(".")[2].rstrip("0")


def _fraction(low: str | None, high: str | None, low_open: bool, high_open: bool) -> Node | None:  # noqa: FBT001
    """Digits behind the point: at least `low` and at most `high`, zeros behind either, where there is such a bound."""
    if low is None and high is None:
        return Repeat(DIGIT)
    a = int(low[0]) if low else 0 if low is not None else -1
    b = int(high[0]) if high else 0 if high is not None else 10
    options: list[Node] = []
    if a == b:
        rest = (
            _fraction(low[1:] if low else low, high[1:] if high else high, low_open, high_open) if low or high else None
        )
        if not low and not high and not low_open and not high_open:
            return Repeat(Fixed("0"), 1)
        return Series(str(a), rest) if rest is not None else None
    if a >= 0:
        rest = _open_end(low[1:] if low else "", low_open)
        options += [Series(str(a), rest)] if rest is not None else []
    if b > a + 1:
        options.append(Series(Chars(((48 + a + 1, 48 + b - 1),)), Repeat(DIGIT)))
    if b <= 9:
        rest = _closed_end(high[1:] if high else "", high_open)
        options += [Series(str(b), rest)] if rest is not None else []
    return Choice(*options) if options else None


def _open_end(low: str, strict: bool) -> Node | None:  # noqa: FBT001
    """Further digits that make a number of at least `low`."""
    if not low:
        return Series(Repeat(Fixed("0")), Chars.of("123456789"), Repeat(DIGIT)) if strict else Repeat(DIGIT)
    first = int(low[0])
    rest = _open_end(low[1:], strict)
    options: list[Node] = [Series(str(first), rest)] if rest is not None else []
    if first < 9:
        options.append(Series(Chars(((48 + first + 1, 57),)), Repeat(DIGIT)))
    return Choice(*options) if options else None


def _closed_end(high: str, strict: bool) -> Node | None:  # noqa: FBT001
    """Further digits, or none, that make a number of at most `high`."""
    if not high:
        return None if strict else Repeat(Fixed("0"))
    first = int(high[0])
    rest = _closed_end(high[1:], strict)
    options: list[Node] = [Fixed("")]
    options += [Series(str(first), rest)] if rest is not None else []
    if first > 0:
        options.append(Series(Chars(((48, 48 + first - 1),)), Repeat(DIGIT)))
    return Choice(*options)


def integers(low: int, high: int | None) -> list[Node]:
    """The whole numbers from `low` ≥ 0 to `high`, as few nodes.

    >>> [node.shortest for node in integers(7, 12)]
    ['7', '10']
    """
    if high is not None and low > high:
        return []
    if high is None:
        size = len(str(low))
        longer: list[Node] = [Series(Chars(((49, 57),)), Repeat(DIGIT, size, max(size, _MOST_DIGITS)))]
        if low == 0:
            return [Fixed("0"), Series(Chars(((49, 57),)), Repeat(DIGIT, 0, _MOST_DIGITS))]
        return [*integers(low, 10**size - 1), *longer]
    found: list[Node] = []
    for size in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (size - 1) if size > 1 else 0), min(high, 10**size - 1)
        found.append(_of_one_length(str(first), str(last)))
    return found


def _of_one_length(first: str, last: str) -> Node:
    if not first:
        return Fixed("")
    a, b = int(first[0]), int(last[0])
    rest, nines, zeros = len(first) - 1, "9" * (len(first) - 1), "0" * (len(first) - 1)
    if a == b:
        return Series(str(a), _of_one_length(first[1:], last[1:]))
    options: list[Node] = []
    if first[1:] != zeros:
        options.append(Series(str(a), _of_one_length(first[1:], nines)))
        a += 1
    top = b if last[1:] == nines else b - 1
    if a <= top:
        options.append(Series(Chars(((48 + a, 48 + top),)), Repeat(DIGIT, rest, rest)))
    if top < b:
        options.append(Series(str(b), _of_one_length(zeros, last[1:])))
    return options[0] if len(options) == 1 else Choice(*options)
