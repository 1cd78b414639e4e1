"""Readers: rows out of JSONL and CSV files, frames and other iterables, each with the place where it stands.

Knows files, encodings and what their formats allow. Knows nothing about prompts or what a row must hold. Nothing is
repaired, merged, renamed or dropped: what is not as it should be is refused with file and line.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from llmchain_fed.errors import DataError, EmptyParticipantError

_DEEPEST = 64
"""levels of lists and objects in a line of JSON; Python's own limit depends on who calls"""
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_LONGEST_CELL = 2**31 - 1  # characters; what a C long holds everywhere
_LIMIT = threading.Lock()
CSV_MARKERS = frozenset(
    {"nan", "NaN", "NAN", "-nan", "-NaN", "NaT", "<NA>", "NA", "N/A", "n/a", "NULL", "null", "None", "\\N"}
    | {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
)
"""what pandas, R, SQL and spreadsheets write, without quotes, for a value that is missing"""


def numbered(source: Any) -> Iterator[tuple[str, Any]]:
    """Every row of a source with its place, such as "example 3" or "example 3 (a.csv, line 5)".

    Args:
        source: A path of a .jsonl or .csv file, a pandas or polars frame, a pyarrow table, or any iterable of rows.

    Raises:
        DataError: None of these, or a file that is not as it should be.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        for number, (line, row) in enumerate(_read(path)):
            yield f"example {number} ({path.name}, line {line})", row
    else:
        for number, row in enumerate(_rows(source)):
            yield f"example {number}", row


def _rows(source: Any) -> Iterable[Any]:
    if isinstance(source, Mapping) and source and all(hasattr(part, "column_names") for part in source.values()):
        splits = ", ".join(map(repr, source))
        msg = f"the splits {splits} of a data set are not examples. Pass one of them: d[{next(iter(source))!r}]."
        raise DataError(msg)
    frame = _frame_rows(source)
    if frame is not None:
        return frame
    if isinstance(source, (Mapping, bytes, bytearray)) or not isinstance(source, Iterable):
        msg = (
            "examples are a list of (inputs, completion), a JSONL or CSV path or a dataset, got "
            f"{type(source).__name__}."
        )
        raise DataError(msg)
    if inspect.isgenerator(source) and inspect.getgeneratorstate(source) == inspect.GEN_CLOSED:
        msg = "the generator has been read to its end before: it gives nothing a second time. Pass list(generator)."
        raise DataError(msg)
    return source


def _frame_rows(source: Any) -> Iterable[Any] | None:
    """The rows of what would otherwise give the names of its columns, or the columns themselves; else None."""
    package, kind = type(source).__module__.partition(".")[0], type(source).__name__
    frames = {("pandas", "DataFrame"): "columns", ("polars", "DataFrame"): "columns"}
    others = {("pyarrow", "Table"): "column_names", ("csv", "DictReader"): "fieldnames"}
    where = (frames | others).get((package, kind))
    if where is None:
        return None
    given = getattr(source, where)
    names = list(given) if given is not None else []
    if twice := [str(name) for name in names if names.count(name) > 1]:
        msg = f"the {kind} has two columns {twice[0]!r}, of which a row would keep one. Rename or drop the other."
        raise DataError(msg)
    if package == "pandas":
        return source.to_dict("records")  # type: ignore[no-any-return]
    if package == "csv":
        return source  # type: ignore[no-any-return]
    return source.to_dicts() if package == "polars" else source.to_pylist()  # type: ignore[no-any-return]


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text of some length is no name that a file could have
        is_file = False
    if not is_file:
        msg = f"there is no file {str(path)[:200]!r}. Give the path of a .jsonl or .csv file."
        raise DataError(msg)
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        msg = (
            f"{path.name}: examples are read from .jsonl or .csv files, not {path.suffix or 'files without a suffix'}. "
            "Other tables can be read with pandas and passed as frame.to_dict('records')."
        )
        raise DataError(msg)
    try:
        _check_encoding(path)
        # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
            yield from _read_csv(file, path.name) if suffix == ".csv" else _read_jsonl(file, path.name)
    except UnicodeDecodeError as error:
        _refuse(path.name, _undecodable(path), f"is not UTF-8 text: {error}. Save the file as UTF-8")
    except OSError as error:
        msg = f"{path.name} cannot be read: {error}."
        raise DataError(msg) from error


def _refuse(name: str, line: int, what: str) -> NoReturn:
    msg = f"{name}, line {line} {what}."
    raise DataError(msg) from None


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        msg = (
            f"{path.name} is UTF-16 or UTF-32 text (its first bytes say so), and examples are read as UTF-8. "
            "Save it as UTF-8."
        )
        raise DataError(msg)


def _undecodable(path: Path) -> int:
    """The first line that is no UTF-8, with lines counted as the reader counts them."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline=None) as file:
        return next((n for n, line in enumerate(file, start=1) if any("\udc80" <= c <= "\udcff" for c in line)), 1)


def _checked(file: TextIO, name: str) -> Iterator[str]:
    """The physical lines of a file."""
    for number, line in enumerate(file, start=1):
        if "\0" in line:
            _refuse(
                name,
                number,
                "holds a NUL byte, which no text has: the file is UTF-16, perhaps, or was cut off. Save it as UTF-8",
            )
        yield line


# --- JSONL -----------------------------------------------------------------------------------------------------------


def _read_jsonl(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    number, found = 0, 0
    for number, line in enumerate(_checked(file, name), start=1):
        if line.strip():
            found += 1
            yield number, _object(line, name, number)
    if not found:
        msg = f"the participant has no usable example: {name} ends at line {max(number, 1)} without one."
        raise EmptyParticipantError(msg)


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    """The object in a line of JSON; NaN is a missing value, as Python's and pandas' writers have it."""
    if line.count("[") + line.count("{") > _DEEPEST and _depth(line) > _DEEPEST:
        _refuse(name, number, f"is nested more than {_DEEPEST} levels deep: no example needs that")
    try:
        row = json.loads(line, object_pairs_hook=_without_twins, parse_constant=_constant, parse_float=_number)
    except json.JSONDecodeError as error:
        hint = " It begins like a JSON list: write one object a line" if line.lstrip()[:1] == "[" else ""
        _refuse(name, number, f"is not JSON: {error}.{hint}".rstrip("."))
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, for one
        _refuse(name, number, f"cannot be read: {str(error)[:200].rstrip('.')}")
    if not isinstance(row, dict):
        kind = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        _refuse(name, number, f"is {kind}, not an object such as {{'text': …, 'completion': …}}")
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
        keys = [key for key, _ in pairs]
        msg = f"it has the key {next(k for k in keys if keys.count(k) > 1)!r:.80} twice, and only one value can count"
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


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    records = _records(file, name)
    line, header, _ = next(records, (1, None, ""))
    if header is None:
        _refuse(name, 1, "is the end of an empty file: the first line names the columns, the last one `completion`")
    _check_header(header, name, line)
    found = 0
    for line, cells, raw in records:
        if len(cells) != len(header):
            _refuse(
                name,
                line,
                f"has {len(cells)} cells under {len(header)} columns ({_few(header)}): quote values that hold "
                "commas, quotes or line breaks",
            )
        found += 1
        if not CSV_MARKERS.isdisjoint(cells):
            bare = _bare(raw)
            cells = [None if c in CSV_MARKERS and bare[i] else c for i, c in enumerate(cells)]  # type: ignore[misc]
        yield line, dict(zip(header, cells, strict=True))
    if not found:
        _refuse(name, line, f"names the columns ({_few(header)}), and no row follows")


def _records(file: TextIO, name: str) -> Iterator[tuple[int, list[str], str]]:
    """(first physical line, cells, raw text) of every record; blank lines stand for none."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in _checked(file, name):
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
            _refuse(
                name,
                max(reader.line_num, start),
                f"is not CSV{until}: {error}. Quote values that hold commas, quotes or line breaks",
            )
        if cells is None:
            return
        raw = "".join(taken)
        if raw.strip():
            yield start, cells, raw


@contextmanager
def _any_size() -> Iterator[None]:
    """Cells of any size inside: the csv module has one limit for the whole process, which is back afterwards."""
    with _LIMIT:
        former = csv.field_size_limit(min(_LONGEST_CELL, sys.maxsize))
        try:
            yield
        finally:
            csv.field_size_limit(former)


def _check_header(header: list[str], name: str, line: int) -> None:
    """Makes sure that every column has a name of its own.

    Raises:
        DataError: One has none, or another's; or the columns are not separated by commas.
    """
    if header[0].lower().startswith("sep="):
        _refuse(name, line, f"is a spreadsheet's note {header[0]!r} and names no columns. Delete it")
    if len(header) == 1:
        for separator, words in _SEPARATORS.items():
            if separator in header[0]:
                _refuse(
                    name,
                    line,
                    f"separates its columns by {words}, and examples are read as comma-separated. Save it with "
                    f"commas, or pass pandas.read_csv(path, sep={separator!r}).to_dict('records')",
                )
    for column, title in enumerate(header, start=1):
        if not title.strip():
            _refuse(
                name,
                line,
                f"gives column {column} no name. Name it, or drop it (pandas writes an index so: to_csv(index=False))",
            )
        if header.index(title) != column - 1:
            _refuse(
                name,
                line,
                f"has the column {title!r:.80} twice ({header.index(title) + 1} and {column}), and only one can "
                "count. Rename or drop the other",
            )


def _few(header: list[str]) -> str:
    return ", ".join(title[:40] for title in header[:6]) + (", …" if len(header) > 6 else "")


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
