"""Rows out of CSV text, each with the line in which it begins.

Knows what the format allows, and which words programs write for a value that is missing. Knows nothing of files.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from llmchain_fed.data.text_lines import LONGEST, checked_lines, refuse
from llmchain_fed.untrusted import shown

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MOST_COLUMNS = 4096
_LIMIT = threading.Lock()
CSV_MARKERS = frozenset(
    {"nan", "NaN", "NAN", "-nan", "-NaN", "NaT", "<NA>", "NA", "N/A", "n/a", "NULL", "null", "None", "\\N"}
    | {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
)
"""what pandas, R, SQL and spreadsheets write, without quotes, for a value that is missing"""


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
            refuse(
                name,
                line,
                f"has {len(cells)} cells under {len(header)} columns ({_few(header)}): quote values that contain "
                "commas, quotes or line breaks",
            )
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
            refuse(
                name,
                max(reader.line_num, start),
                f"is not CSV{until}: {error}. Quote values that contain commas, quotes or line breaks",
            )
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
    """Makes sure that every column has a name of its own.

    Raises:
        DataError: A column has no name or another's, or the columns are not separated by commas.
    """
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
            refuse(
                name,
                line,
                f"gives column {column} no name. Name it, or drop it (pandas writes an index so: to_csv(index=False))",
            )
        if first.setdefault(title, column) != column:
            refuse(
                name,
                line,
                f"has the column {title!r:.80} twice ({first[title]} and {column}), and only one can "
                "count. Rename or drop the other",
            )


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
