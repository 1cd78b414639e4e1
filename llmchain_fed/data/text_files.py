"""Rows out of the text of a CSV or JSONL file, UTF-8 and of a bounded size, each with the line in which it begins.

Knows encodings, line ends, both formats, and which words programs write for a value that is missing. Knows nothing of
what a row must have.
"""

from __future__ import annotations

import collections
import csv
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from llmchain_fed.errors import DataError, EmptyParticipantError
from llmchain_fed.untrusted import shown

LONGEST = 2**24
"""characters of a line, and of a record of several; no model reads a tenth of that"""
_ESCAPED = re.compile("[\udc80-\udcff]")
_DEEPEST = 64
"""levels of lists and objects in a line of JSON; Python's own limit depends on who calls"""
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MOST_COLUMNS = 4096
_LIMIT = threading.Lock()
CSV_MARKERS = frozenset(
    {"nan", "NaN", "NAN", "-nan", "-NaN", "NaT", "<NA>", "NA", "N/A", "n/a", "NULL", "null", "None", "\\N"}
    | {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
)
"""what pandas, R, SQL and spreadsheets write, without quotes, for a value that is missing"""


def refuse(name: str, line: int, what: str) -> NoReturn:
    """Raises the error of a line that is not as it should be."""
    msg = f"{shown(name, 255)}, line {line} {what}."
    raise DataError(msg) from None


def check_encoding(path: Path) -> None:
    """Makes sure that a file does not begin as UTF-16 or UTF-32."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        msg = (
            f"{path.name} is UTF-16 or UTF-32 text (its first bytes say so), and examples are read as UTF-8. "
            "Save it as UTF-8."
        )
        raise DataError(msg)


def undecodable(path: Path) -> int:
    """The first line that is no UTF-8, with lines counted as the reader counts them."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline=None) as file:
        return next((n for n, line in numbered_lines(file, path.name) if _ESCAPED.search(line)), 1)


def numbered_lines(file: TextIO, name: str) -> Iterator[tuple[int, str]]:
    """Every line with its number; memory is taken for one of them.

    Raises:
        DataError: A line has more than `LONGEST` characters.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            refuse(name, number, f"has more than the {LONGEST:,} characters of an example. Put a line break after each")
        yield number, line


def checked_lines(file: TextIO, name: str) -> Iterator[str]:
    """The lines of a file, none of which contains what no text has."""
    for number, line in numbered_lines(file, name):
        if "\0" in line:
            why = "has a NUL byte, which no text has: the file is UTF-16, perhaps, or was cut off. Save it as UTF-8"
            refuse(name, number, why)
        yield line


# --- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """Every row by its columns' names, with the line in which it begins.

    Raises:
        DataError: A record cannot be read, or has other columns than the first line names.
    """
    records = _records(file, name)
    line, header, _ = next(records, (1, None, ""))
    if header is None:
        refuse(name, 1, "is the end of an empty file: the first line names the columns, the last one `completion`")
    _check_header(header, name, line)
    found = 0
    for line, cells, raw in records:
        if len(cells) != len(header):
            cells_found = f"has {len(cells)} cells under {len(header)} columns ({_few(header)})"
            refuse(name, line, f"{cells_found}: quote values that contain commas, quotes or line breaks")
        found += 1
        if not CSV_MARKERS.isdisjoint(cells):
            bare = _bare(raw)
            cells = [None if c in CSV_MARKERS and bare[i] else c for i, c in enumerate(cells)]  # type: ignore[misc]
        yield line, dict(zip(header, cells, strict=True))
    if not found:
        refuse(name, line, f"names the columns ({_few(header)}), and no row follows")


def _records(file: TextIO, name: str) -> Iterator[tuple[int, list[str], str]]:
    """(first physical line, cells, raw text) of every record; blank lines stand for none."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        size = 0
        for number, line in enumerate(checked_lines(file, name), start=1):
            size = len(line) if not taken else size + len(line)
            if size > LONGEST:
                why = f"belongs to a record of more than the {LONGEST:,} characters of an example: is a quote left open"
                refuse(name, number, f"{why}? Close it")
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        start = reader.line_num + 1
        taken.clear()
        try:
            with _any_size():
                cells = next(reader, None)
        except csv.Error as error:
            until = f" (from line {start} on)" if reader.line_num > start else ""
            why = f"is not CSV{until}: {error}. Quote values that contain commas, quotes or line breaks"
            refuse(name, max(reader.line_num, start), why)
        if cells is None:
            return
        raw = "".join(taken)
        if raw.strip():
            yield start, cells, raw


@contextmanager
def _any_size() -> Iterator[None]:
    """Cells of a record's size inside: the csv module has one limit for the whole process, which is back afterwards."""
    with _LIMIT:
        former = csv.field_size_limit(LONGEST)
        try:
            yield
        finally:
            csv.field_size_limit(former)


def _check_header(header: list[str], name: str, line: int) -> None:
    """Makes sure that every column has a name of its own."""
    if header[0].lower().startswith("sep="):
        refuse(name, line, f"is a spreadsheet's note {header[0]!r:.80} and names no columns. Delete it")
    if len(header) == 1:
        for separator, words in _SEPARATORS.items():
            if separator in header[0]:
                refuse(
                    name,
                    line,
                    f"separates its columns by {words}, and examples are read as comma-separated. Save it with "
                    f"commas, or pass pandas.read_csv(path, sep={separator!r}).to_dict('records')",
                )
    if len(header) > _MOST_COLUMNS:
        refuse(name, line, f"names {len(header):,} columns, and an example has at most {_MOST_COLUMNS:,}. Drop some")
    first: dict[str, int] = {}
    for column, title in enumerate(header, start=1):
        if not title.strip():
            why = "Name it, or drop it (pandas writes an index so: to_csv(index=False))"
            refuse(name, line, f"gives column {column} no name. {why}")
        if first.setdefault(title, column) != column:
            twice = f"has the column {title!r:.80} twice ({first[title]} and {column})"
            refuse(name, line, f"{twice}, and only one can count. Rename or drop the other")


def _few(header: list[str]) -> str:
    return ", ".join(shown(title, 40) for title in header[:6]) + (", …" if len(header) > 6 else "")


def _bare(record: str) -> list[bool]:
    """Whether each cell of a record stands without quotes: a word in quotes is meant as the word.

    >>> _bare('NA,"NA",a"b,')
    [True, False, True, True]
    """
    bare: list[bool] = []
    at_start, inside = True, False
    for c in record.rstrip("\r\n"):
        if at_start:
            bare.append(c != '"')
            inside, at_start = c == '"', c == ","
        elif c == '"':
            inside = not inside and not bare[-1]
        elif c == "," and not inside:
            at_start = True
    return [*bare, True] if at_start else bare


# --- JSONL -----------------------------------------------------------------------------------------------------------


def read_jsonl(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """Every object with its line; a blank line is passed over.

    Raises:
        DataError: A line cannot be read, or is no object, or there is none (EmptyParticipantError).
    """
    number, found = 0, 0
    for number, line in enumerate(checked_lines(file, name), start=1):
        if line.strip():
            found += 1
            yield number, _object(line, name, number)
    if not found:
        msg = f"the participant has no usable example: {name} ends at line {max(number, 1)} without one."
        raise EmptyParticipantError(msg)


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    """The object in a line of JSON; NaN is a missing value, as Python's and pandas' writers have it."""
    if line.count("[") + line.count("{") > _DEEPEST and _depth(line) > _DEEPEST:
        refuse(name, number, f"is nested more than {_DEEPEST} levels deep: no example needs that")
    try:
        row = json.loads(line, object_pairs_hook=_without_twins, parse_constant=_constant, parse_float=_number)
    except json.JSONDecodeError as error:
        hint = " It begins like a JSON list: write one object a line" if line.lstrip()[:1] == "[" else ""
        refuse(name, number, f"is not JSON: {error}.{hint}".rstrip("."))
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, for one
        refuse(name, number, f"cannot be read: {str(error)[:200].rstrip('.')}")
    if not isinstance(row, dict):
        kind = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        refuse(name, number, f"is {kind}, not an object such as {{'text': …, 'completion': …}}")
    return row


def _depth(line: str) -> int:
    """Levels of lists and objects, brackets within texts left out."""
    deepest = level = 0
    inside = escaped = False
    for c in line:
        if inside:
            inside, escaped = escaped or c != '"', c == "\\" and not escaped
        elif c == '"':
            inside = True
        elif c in "[{":
            level += 1
            deepest = max(deepest, level)
        elif c in "]}":
            level -= 1
    return deepest


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        msg = f"it has the key {twice!r:.80} twice, and only one value can count"
        raise ValueError(msg)
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        return math.nan
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


def _number(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):
        msg = f"the number {digits[:40]} is larger than any float; as a text in quotes it would stay as it is"
        raise ValueError(msg)
    return found
