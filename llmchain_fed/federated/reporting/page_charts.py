"""Charts as SVG: losses over the rounds, and one participant's before and after. Drawn for a desk and for a phone.

Knows points and colours' names. Knows nothing of records, nor of what a line means.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmchain_fed.federated.reporting.page_style import CHART, LIGHT, PAPER, variables
from llmchain_fed.federated.reporting.page_text import digits_of, inline, number
from llmchain_fed.untrusted import one_line

Point = tuple[float, float]
MOST_NAMED = len(LIGHT)
"""lines that have a colour and a name each; of more the whole is shown, and which are outermost"""
_MARKED = 40  # points of a line that are marked
_SPREAD = 20.0  # of the largest value to the smallest, beyond which the scale is logarithmic
_GAP = 16.0  # between two names


@dataclass(frozen=True)
class Line:
    """A participant's values over the rounds; where two parts meet nothing can be compared."""

    name: str
    parts: Sequence[Sequence[Point]]

    @property
    def last(self) -> Point:
        """Where it ends."""
        return self.parts[-1][-1]


@dataclass(frozen=True)
class Canvas:
    """Where in a picture what is drawn, in its own units."""

    width: float
    height: float
    left: float
    right: float
    top: float = 14
    bottom: float = 40
    values: bool = True
    """whether names are followed by their last values"""


WIDE, NARROW = Canvas(1024, 420, 50, 200), Canvas(360, 300, 42, 100, values=False)


@dataclass(frozen=True)
class Scale:
    """From a value to a place, in proportion or, where values differ widely, in proportion to their logarithm."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.begin + (value - low) / ((high - low) or 1.0) * (self.end - self.begin)


def lines_chart(lines: Sequence[Line], *, label: str, whole: Line | None = None, changed: Sequence[int] = ()) -> str:
    """The same chart twice, of which the style sheet shows the one that fits; "" where there is nothing to draw.

    Args:
        lines: To draw.
        label: What it shows, for those who hear it read.
        whole: The line of all together, drawn where there are too many others to have a name each.
        changed: Rounds before which members changed.
    """
    lines = [line for line in lines if line.parts]
    if not lines:
        return ""
    longest = max(width_of(one_line(line.name, 80)) for line in lines) if len(lines) <= MOST_NAMED else 150
    wide = replace(WIDE, right=min(WIDE.right, 44 + longest + width_of(" 00.000")))
    return "".join(
        _chart(lines, canvas, kind, label, whole, changed) for canvas, kind in ((wide, "wide"), (NARROW, "narrow"))
    )


def picture(lines: Sequence[Line], *, label: str) -> str:
    """A chart as a file of its own: with its colours, on paper."""
    canvas = Canvas(WIDE.width, WIDE.height + 34, WIDE.left, WIDE.right, top=48)
    body = _chart([line for line in lines if line.parts], canvas, "", label, None, ())
    style = f"<style>svg{{{variables()}}}{CHART}.title{{font-weight:600;font-size:15px}}</style>"
    extra = f'<rect width="100%" height="100%" fill="{PAPER}"/><text class="title" x="14" y="26">{inline(label)}</text>'
    return (
        body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}{extra}", 1) + "\n"
    )


def _chart(
    lines: Sequence[Line], canvas: Canvas, kind: str, label: str, whole: Line | None, changed: Sequence[int]
) -> str:
    drawn = [*lines, *([whole] if whole is not None and whole.parts and len(lines) > MOST_NAMED else [])]
    points = [point for line in drawn for part in line.parts for point in part]
    x = Scale(min(p[0] for p in points), max(p[0] for p in points), canvas.left + 8, canvas.width - canvas.right)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    logarithmic = low > 0 and high / low > _SPREAD
    low, high = (low / 1.15, high * 1.15) if logarithmic else (low - room, high + room)
    y = Scale(low, high, canvas.height - canvas.bottom, canvas.top, logarithmic)
    parts = [_grid(canvas, x, y, changed)]
    parts += _few(lines, canvas, x, y) if len(lines) <= MOST_NAMED else _crowd(lines, whole, canvas, x, y)
    return (
        f'<svg class="{kind}" viewBox="0 0 {canvas.width:g} {canvas.height:g}" role="img" aria-label="{inline(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _grid(canvas: Canvas, x: Scale, y: Scale, changed: Sequence[int]) -> str:
    edge, floor = canvas.width - canvas.right, canvas.height - canvas.bottom
    marks = _powers(y.low, y.high) if y.logarithmic else ticks(y.low, y.high, 6 if canvas.height > 350 else 5)
    digits = max((_digits(mark) for mark in marks), default=0)
    found = []
    for mark in marks:
        at = y(mark)
        found.append(f'<path class="grid" d="M{canvas.left:g} {at:.1f}H{edge + 8:.1f}"/>')
        said = f"{mark:,.{digits}f}" if not y.logarithmic and abs(mark) < 1e6 else f"{mark:,g}"
        found.append(f'<text class="tick" x="{canvas.left - 8:g}" y="{at + 4:.1f}" text-anchor="end">{said}</text>')
    rounds = [m for m in ticks(x.low, x.high, 10 if canvas.width > 500 else 5) if m == int(m)]
    for mark in rounds:
        said = "start" if mark == 0 else f"{mark:g}"
        found.append(f'<text class="tick" x="{x(mark):.1f}" y="{floor + 18:g}" text-anchor="middle">{said}</text>')
    middle = (canvas.left + edge) / 2
    found.append(f'<text class="tick" x="{middle:.1f}" y="{canvas.height - 4:g}" text-anchor="middle">round</text>')
    found += [f'<path class="changed" d="M{x(n - 1):.1f} {canvas.top:g}V{floor:g}"/>' for n in changed if n - 1 > x.low]
    return "".join(found)


def _few(lines: Sequence[Line], canvas: Canvas, x: Scale, y: Scale) -> list[str]:
    """Every line with its colour, its own mark at each point, and its name where it ends."""
    found = []
    for place, line in enumerate(lines):
        found += [f'<path class="line s{place}" d="{_way(part, x, y)}"/>' for part in line.parts]
        points = [point for part in line.parts for point in part]
        shown = points if len(points) <= _MARKED else [line.last]
        found += [f'<path class="m{place}" d="{_mark(place, x(a), y(b))}"/>' for a, b in shown]
    digits = digits_of([line.last[1] for line in lines])
    names = [(line, f" {number(line.last[1], digits)}" if canvas.values else "", n) for n, line in enumerate(lines)]
    return found + _names(names, canvas, x, y)


def _crowd(lines: Sequence[Line], whole: Line | None, canvas: Canvas, x: Scale, y: Scale) -> list[str]:
    """All lines alike and thin, each saying its name where it is pointed at; the whole, and which end outermost."""
    found = [
        f'<path class="many" d="{_way(part, x, y)}"><title>{inline(line.name, 80)}</title></path>'
        for line in lines
        for part in line.parts
    ]
    marked = [
        (max(lines, key=lambda line: line.last[1]), "highest: "),
        (min(lines, key=lambda line: line.last[1]), "lowest: "),
    ]
    for place, (line, _) in enumerate(marked):
        found += [f'<path class="line s{place}" d="{_way(part, x, y)}"/>' for part in line.parts]
        found.append(f'<path class="m{place}" d="{_mark(place, x(line.last[0]), y(line.last[1]))}"/>')
    if whole is not None and whole.parts:
        found += [f'<path class="all" d="{_way(part, x, y)}"/>' for part in whole.parts]
    named: list[tuple[Line, str, int | None]] = [(line, "", n) for n, (line, _) in enumerate(marked)]
    named += [(whole, "", None)] if whole is not None and whole.parts else []
    return found + _names(named, canvas, x, y)


def _names(named: Sequence[tuple[Line, str, int | None]], canvas: Canvas, x: Scale, y: Scale) -> list[str]:
    """Names beside where their lines end, apart from each other, each with a lead to its own."""
    edge = canvas.width - canvas.right
    order = sorted(named, key=lambda each: y(each[0].last[1]))
    places = apart([y(line.last[1]) for line, _, _ in order], _GAP, canvas.top + 4, canvas.height - canvas.bottom)
    found = []
    for (line, value, colour), at in zip(order, places, strict=True):
        a, b = x(line.last[0]), y(line.last[1])
        found.append(f'<path class="lead" d="M{a + 7:.1f} {b:.1f}L{edge + 18:.1f} {at:.1f}"/>')
        if colour is not None:
            found.append(f'<path class="m{colour}" d="{_mark(colour, edge + 25, at)}"/>')
        room = canvas.right - 34 - width_of(value)
        text = f"{inline(cut(one_line(line.name, 80), room))}{value}"
        found.append(f'<text x="{edge + 33:.1f}" y="{at + 4:.1f}">{text}</text>')
    return found


def bell(
    before: float | None,
    after: float | None,
    others: Sequence[tuple[str, float | None]],
    low: float,
    high: float,
    kind: str,
) -> str:
    """One before and after on a scale that all of a page share, lower to the left.

    Args:
        before: Its value, where it is known.
        after: The same.
        others: What stands beside them: (class, value).
        low: The scale's left end.
        high: Its right end.
        kind: The verdict, which is its class.
    """
    x = Scale(low, high, 10, 290, low > 0 and high / low > _SPREAD)
    found = ['<path class="axis" d="M4 14H296"/>']
    if before is not None and after is not None:
        found.append(f'<path class="way" d="M{x(before):.1f} 14H{x(after):.1f}"/>')
    if before is not None:
        found.append(f'<circle class="was" cx="{x(before):.1f}" cy="14" r="5.5"/>')
    found += [
        f'<path class="{name}" d="M{x(value):.1f} 6l7 8l-7 8l-7 -8z"/>' for name, value in others if value is not None
    ]
    if after is not None:
        found.append(f'<circle class="now" cx="{x(after):.1f}" cy="14" r="6.5"/>')
    return f'<svg class="bell {kind}" viewBox="0 0 300 28" aria-hidden="true">{"".join(found)}</svg>'


# --- the geometry of it ---------------------------------------------------------------------------------------------


def _way(points: Sequence[Point], x: Scale, y: Scale) -> str:
    if len(points) == 1:
        return f"M{x(points[0][0]):.1f} {y(points[0][1]):.1f}h0"
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


_MARKS: Sequence[Callable[[float, float], str]] = (
    lambda a, b: f"M{a - 4.5:.1f} {b:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    lambda a, b: f"M{a - 4:.1f} {b - 4:.1f}h8v8h-8z",
    lambda a, b: f"M{a:.1f} {b - 5.5:.1f}l5 9.5h-10z",
    lambda a, b: f"M{a:.1f} {b - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    lambda a, b: f"M{a:.1f} {b + 5.5:.1f}l5 -9.5h-10z",
    lambda a, b: f"M{a - 1.7:.1f} {b - 5:.1f}h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    lambda a, b: f"M{a - 5:.1f} {b - 2.4:.1f}h10v4.8h-10z",
    lambda a, b: f"M{a - 2.4:.1f} {b - 5:.1f}h4.8v10h-4.8z",
)


def _mark(place: int, a: float, b: float) -> str:
    return _MARKS[place % len(_MARKS)](a, b)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers within a range, evenly apart.

    >>> ticks(1.53, 4.2, 6), ticks(0, 3, 10)
    ([2.0, 2.5, 3.0, 3.5, 4.0], [0, 1, 2, 3])
    """
    if not high > low:
        return [low]
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if s * power >= least * (1 - 1e-9))
    if isinstance(low, int) and isinstance(high, int):
        step = max(1, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within a range, with twos and fives between them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [m for e in exponents for s in steps if low <= (m := s * 10.0**e) <= high]
        if len(found) <= 8:
            return found
    return found[:: math.ceil(len(found) / 8)]


def _digits(value: float) -> int:
    return len(f"{value:.6f}".rstrip("0").partition(".")[2])


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in their order, moved as little as keeps them a gap apart and within bounds.

    >>> apart([10, 11, 50], 10, 0, 100), apart([95, 96], 10, 0, 100)
    ([5.5, 15.5, 50.0], [90, 100])
    """
    groups: list[tuple[float, int]] = []  # (middle, how many), none touching the next
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (m, n), (k, o) = groups.pop(), groups.pop()
            groups.append(((m * n + k * o) / (n + o), n + o))
    found = [middle + gap * (n - (count - 1) / 2) for middle, count in groups for n in range(count)]
    for n in reversed(range(len(found))):
        found[n] = min(found[n], high if n == len(found) - 1 else found[n + 1] - gap)
    for n, place in enumerate(found):
        found[n] = max(place, low if n == 0 else found[n - 1] + gap)
    return found


def width_of(text: str) -> float:
    """How wide a text of 13 units is about."""
    return sum(13.0 if unicodedata.east_asian_width(c) in "WF" else 4.2 if c in " .,:;'|ijl" else 7.7 for c in text)


def cut(text: str, room: float) -> str:
    """As much of a text as has room.

    >>> cut("St. Elsewhere hospital", 60)
    'St. Els…'
    """
    if width_of(text) <= room:
        return text
    while text and width_of(text) + 10 > room:
        text = text[:-1]
    return f"{text}…"
