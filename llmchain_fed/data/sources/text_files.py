"""The text of files, UTF-8 and in lines of a bounded size; and rows out of CSV, each with the line in which it begins.

Knows line ends and separators. Knows nothing of what a row must have, or how a file is opened. An empty cell is a value
that is missing; a word such as None or NA is that word, which may be somebody's label.
"""

from __future__ import annotations

import csv
import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from llmchain_fed.errors import DataError
from llmchain_fed.untrusted import shown

LONGEST = 2**24
"""characters of a line, and of a record of several; no model reads a tenth of that"""
NUL = "has a NUL byte, which no text has: the file is UTF-16, perhaps, or was cut off. Save it as UTF-8"
_QUOTED = re.compile(r'"[^"]*"?')
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MOST_COLUMNS = 4096
_LIMIT = threading.Lock()


def refuse(name: str, line: int, what: str) -> NoReturn:
    """Raises the error of a line that is not as it should be."""
    msg = f"{shown(name, 255)}, line {line} {what}."
    raise DataError(msg) from None


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
            refuse(name, number, NUL)
        yield line


# --- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(file: TextIO, name: str, separator: str | None = None) -> Iterator[tuple[int, Any]]:
    """Every row by its columns' names, with the line in which it begins.

    Args:
        file: The text, with its line ends as they are.
        name: What errors call it.
        separator: Between two cells; None is the one of commas, semicolons, tabs and vertical bars that the line with
            the columns' names has most of, outside quotes.

    Raises:
        DataError: A record cannot be read, or has other columns than the first line names.
    """
    lines = checked_lines(file, name)
    blank, start = 0, ""
    for start in lines:
        if start.strip():
            break
        blank += 1
    separator = separator or separator_of(start)
    records = _records(itertools.chain([start], lines) if start.strip() else (), name, separator, blank)
    line, header = next(records, (1, None))
    if header is None:
        refuse(name, 1, "is the end of an empty file: the first line names the columns, the last one `completion`")
    header = [title.strip() for title in header]
    _check_header(header, name, line)
    found = 0
    for line, cells in records:
        if len(cells) != len(header):
            cells_found = f"has {len(cells)} cells under {len(header)} columns ({_few(header)})"
            quoting = f"quote values that contain {_SEPARATORS[separator]}, quotes or line breaks"
            refuse(name, line, f"{cells_found}: {quoting}")
        found += 1
        yield line, dict(zip(header, cells, strict=True))
    if not found:
        refuse(name, line, f"names the columns ({_few(header)}), and no row follows")


def separator_of(header: str) -> str:
    """What separates the columns' names.

    >>> separator_of('id;"text, in English";completion'), separator_of("completion")
    (';', ',')
    """
    bare = _QUOTED.sub("", header)
    return max(_SEPARATORS, key=bare.count)  # of several, the first


def _records(text: Iterable[str], name: str, separator: str, blank: int) -> Iterator[tuple[int, list[str]]]:
    """(first physical line, cells) of every record; blank lines, as before the text, stand for none."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        size = 0
        for number, line in enumerate(text, start=blank + 1):
            size = len(line) if not taken else size + len(line)
            if size > LONGEST:
                why = f"belongs to a record of more than the {LONGEST:,} characters of an example: is a quote left open"
                refuse(name, number, f"{why}? Close it")
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True, delimiter=separator)
    while True:
        start = blank + reader.line_num + 1
        taken.clear()
        try:
            with _any_size():
                cells = next(reader, None)
        except csv.Error as error:
            reached = blank + reader.line_num
            until = f" (from line {start} on)" if reached > start else ""
            words = _SEPARATORS[separator]
            why = f"is not CSV{until}: {error}. Quote values that contain {words}, quotes or line breaks"
            refuse(name, max(reached, start), why)
        if cells is None:
            return
        if any(line.strip() for line in taken):
            yield start, cells


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
    if len(header) > _MOST_COLUMNS:
        refuse(name, line, f"names {len(header):,} columns, and an example has at most {_MOST_COLUMNS:,}. Drop some")
    first: dict[str, int] = {}
    for column, title in enumerate(header, start=1):
        if not title:
            why = "Name it, or drop it (pandas writes an index so: to_csv(index=False))"
            refuse(name, line, f"gives column {column} no name. {why}")
        if first.setdefault(title, column) != column:
            twice = f"has the column {title!r:.80} twice ({first[title]} and {column})"
            refuse(name, line, f"{twice}, and only one can count. Rename or drop the other")


def _few(header: list[str]) -> str:
    return ", ".join(shown(title, 40) for title in header[:6]) + (", …" if len(header) > 6 else "")
