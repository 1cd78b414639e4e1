"""Text and figures for a page: everything escaped, and digits that are alike in a column.

Knows HTML and numbers. Knows nothing of federations.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from llmchain_fed.untrusted import one_line, printable

NONE = "–"
_LARGEST = 1e100
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def inline(value: object, longest: int = 400) -> str:
    r"""Text in one line, whoever wrote it: no markup, no character that turns text around.

    >>> inline("<b>\u202e")
    '&lt;b&gt;\\u202e'
    """
    return html.escape(one_line(value, longest))


def block(value: str, longest: int = 3000) -> str:
    """Text as it is, each line break with a mark; of a longer one its beginning, and how much more there is."""
    more = f"… and {len(value) - longest:,} more characters" if len(value) > longest else ""
    escaped = html.escape(printable(value[:longest])).replace("\n", '<span class="nl" aria-hidden="true">↵</span>\n')
    return escaped + (f'<span class="nl"> {more}</span>' if more else "")


def who(name: str) -> str:
    """A participant's name, which turns no text beside it around."""
    return f'<bdi title="{inline(name, 400)}">{inline(name, 80)}</bdi>'


def finite(value: float | None) -> float | None:
    """A number that was measured; None for what is none, or too large to be one."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _LARGEST else None


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point.

    >>> number(-1234.5678, 2), number(-0.0001, 2), number(None, 2)
    ('−1,234.57', '0.00', '–')
    """
    if (value := finite(value)) is None:
        return NONE
    said = f"{round(value, digits) + 0.0:,.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"
    return said.replace("-", "−")


def signed(value: float, digits: int) -> str:
    """A change.

    >>> signed(1.25, 1), signed(-0.5, 1), signed(0.0, 1)
    ('+1.2', '−0.5', '0.0')
    """
    said = number(value, digits)
    return f"+{said}" if round(value, digits) > 0 else said


def digits_of(values: Sequence[float | None]) -> int:
    """How many digits after the point tell losses or scores of this size apart.

    >>> digits_of([3.98, 1.6]), digits_of([120.5, 3.0]), digits_of([140_087.0])
    (3, 2, 0)
    """
    largest = max((abs(found) for value in values if (found := finite(value)) is not None), default=0.0)
    return 3 if largest < 100 else 2 if largest < 1000 else 1 if largest < 10_000 else 0


def score_digits(values: Sequence[float | None]) -> int:
    """The same for scores, which go to 1 or to 100.

    >>> score_digits([0.815, None]), score_digits([31.49])
    (3, 1)
    """
    largest = max((abs(found) for value in values if (found := finite(value)) is not None), default=0.0)
    return 3 if largest < 2 else 2 if largest < 10 else 1


def numbers(values: Sequence[float | None], digits: int | None = None) -> list[str]:
    """A column of losses, all with the same number of digits; other figures with so many."""
    digits = digits_of(values) if digits is None else digits
    return [number(value, digits) for value in values]


def sizes(counts: Sequence[float]) -> tuple[str, list[str]]:
    """A column of bytes in one unit with the same number of digits.

    >>> sizes([58_900_000, 11_000, 0])
    ('MB', ['58.9', '<0.1', '0.0'])
    """
    largest = max(counts, default=0)
    unit, scale = next((found for found in _UNITS if largest >= found[1]), _UNITS[-1])
    digits = 0 if unit == "B" else 1 if largest >= 10 * scale else 2
    least = 10.0**-digits
    return unit, [f"<{least:.{digits}f}" if 0 < c / scale < least / 2 else f"{c / scale:,.{digits}f}" for c in counts]


def spans(seconds: Sequence[float]) -> tuple[str, list[str]]:
    """A column of durations in one unit.

    >>> spans([63.21, 4.0]), spans([7200.0, 600.0])
    (('s', ['63.2', '4.0']), ('min', ['120.0', '10.0']))
    """
    largest = max(seconds, default=0.0)
    unit, scale = ("s", 1) if largest < 600 else ("min", 60) if largest < 36_000 else ("h", 3600)
    return unit, [f"{value / scale:,.1f}" for value in seconds]


def ranges(rounds: Sequence[int]) -> str:
    """Rounds in words.

    >>> ranges([3]), ranges([1, 2, 3, 5, 7, 8])
    ('round 3', 'rounds 1–3, 5, 7–8')
    """
    parts: list[tuple[int, int]] = []
    for found in sorted(set(rounds)):
        if parts and found == parts[-1][1] + 1:
            parts[-1] = parts[-1][0], found
        else:
            parts.append((found, found))
    said = [f"{a}" if a == b else f"{a}–{b}" for a, b in parts]
    more = f" and {len(said) - 12} more times" if len(said) > 12 else ""
    return f"round{'s' if len(set(rounds)) > 1 else ''} {', '.join(said[:12])}{more}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in a line; of many the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(who(name) for name in names[:most]) + more


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    what: str,
    words: Sequence[int] = (),
    marks: dict[int, str] | None = None,
    kind: str = "",
) -> str:
    """A table that scrolls by itself where it is wide; headings and cells are markup already.

    Args:
        headings: Of the columns.
        rows: Cells, as many a row.
        what: It shows, for those who hear it read.
        words: Columns of words.
        marks: Row → its class.
        kind: The table's class.
    """
    classes = [' class="words"' if n in words else "" for n in range(len(headings))]
    head = "".join(f'<th scope="col"{c}>{h}</th>' for h, c in zip(headings, classes, strict=True))
    lines = []
    for place, row in enumerate(rows):
        mark = f' class="{marks[place]}"' if marks and place in marks else ""
        lines.append(f"<tr{mark}>{''.join(f'<td{c}>{t}</td>' for t, c in zip(row, classes, strict=True))}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{inline(what)}"><table class="{kind}"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
