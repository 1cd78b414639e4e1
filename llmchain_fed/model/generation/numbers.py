"""Numbers within bounds as trees of nodes, digit by digit.

Knows decimals. Knows nothing about JSON schemas, tokens or models.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.nodes import DIGIT, Chars, Choice, Fixed, Node, Repeat, Series

_MOST_DIGITS = 17
"""behind the first, of the whole part of a number without bounds, and behind its point"""
_LEAST_INTEGER, _MOST_INTEGER = -(2**63), 2**63 - 1
"""whole numbers without bounds fit into 64 bits, which readers of JSON count on"""
_PLACES = 40
"""digits on either side of the point that bounds have; those beyond are rounded inwards"""
_LARGEST = Decimal(10) ** _PLACES
_EXACT = Context(prec=3 * _PLACES)


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
    with localcontext(_EXACT):
        return _number(_rounded(low, ROUND_CEILING), _rounded(high, ROUND_FLOOR), low_open, high_open, whole)


def _number(low: Decimal | None, high: Decimal | None, low_open: bool, high_open: bool, whole: bool) -> Node:  # noqa: FBT001
    if whole:
        above, below = low is None and _within(high), high is None and _within(low)
        low, low_open = (Decimal(_LEAST_INTEGER), False) if above else (low, low_open)
        high, high_open = (Decimal(_MOST_INTEGER), False) if below else (high, high_open)
    if low is None and high is None and not whole:
        return Series(Choice("", "-"), Choice(*_from(Decimal(0), None, False, False, whole, exponent=False)), _EXPONENT)  # noqa: FBT003
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
    return Choice(*options)


def _within(bound: Decimal | None) -> bool:
    """Whether whole numbers of 64 bits are left on either side of a bound."""
    return bound is None or _LEAST_INTEGER < bound < _MOST_INTEGER


def _rounded(bound: Decimal | None, direction: str) -> Decimal | None:
    """A bound of so many digits at most, nearer to what is within.

    Raises:
        SchemaError: It is no finite number, or none that an answer could come near to.
    """
    if bound is None:
        return None
    outwards = bound > 0 if direction == ROUND_CEILING else bound < 0
    if not bound.is_finite() or (abs(bound) > _LARGEST and outwards):
        msg = f"the bound {bound!s:.20} is none of a number that could be written out. Give another, or none."
        raise SchemaError(msg)
    if abs(bound) > _LARGEST:
        return _LARGEST.copy_sign(bound)
    return bound.quantize(Decimal(1).scaleb(-_PLACES), direction).normalize()


_PLUS = Choice("", "+")
_MOST_POWER = 289  # of ten: behind a whole part of 18 digits the number is still finite


def _from(
    low: Decimal,
    high: Decimal | None,
    low_open: bool,  # noqa: FBT001
    high_open: bool,  # noqa: FBT001
    whole: bool,  # noqa: FBT001
    *,
    exponent: bool = True,
) -> list[Node]:
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
    if high is None and exponent:  # what is larger than the digits that are written out
        power = Choice(*integers(max(_MOST_DIGITS + 1, len(str(floor))), _MOST_POWER))
        found = [Series(Chars(((49, 57),)), _FRACTION, Chars.of("eE"), _PLUS, power)]
    if last is not None and floor == last and high is not None:  # both within one whole number
        return [Series(str(floor), f) for f in _fractions(low - floor, high - floor, low_open, high_open)]
    found += [Series(str(floor), f) for f in _fractions(low - floor, None, low_open, False)]  # noqa: FBT003
    found += [Series(n, _FRACTION) for n in integers(floor + 1, None if last is None else last - 1)]
    if last is not None and high is not None:
        found += [Series(str(last), f) for f in _fractions(Decimal(0), high - last, False, high_open)]  # noqa: FBT003
    return found


_FRACTION: Node = Choice("", Series(".", Repeat(DIGIT, 1, _MOST_DIGITS)))


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


_EXPONENT = Choice(
    "",
    Series(
        Chars.of("eE"),
        Choice(Series("-", Repeat(DIGIT, 1, 3)), Series(_PLUS, Choice(*integers(0, 289), Series("0", DIGIT)))),
    ),
)
