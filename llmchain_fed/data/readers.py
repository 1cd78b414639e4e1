"""Readers: rows out of JSONL and CSV files, frames and other iterables, each with the place where it stands.

Knows files and frames. Knows nothing about prompts or what a row must have. Nothing is repaired, merged,
renamed or dropped: what is not as it should be is refused with file and line.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmchain_fed.data.text_files import check_encoding, read_csv, read_jsonl, refuse, undecodable
from llmchain_fed.errors import DataError
from llmchain_fed.untrusted import reason, shown


def numbered(source: Any) -> Iterator[tuple[str, Any]]:
    """Every row of a source with its place, such as "example 3" or "example 3 (a.csv, line 5)".

    A source is the path of a .jsonl or .csv file, a frame of pandas or polars, a pyarrow table, or an iterable of rows.

    Raises:
        DataError: It is none of these, or a file is not as it should be.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        for number, (line, row) in enumerate(_read(path)):
            yield f"example {number} ({shown(path.name, 255)}, line {line})", row
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
    if isinstance(source, (set, frozenset)):
        msg = "a set has no order of its own, so no two runs would train alike. Pass sorted(examples)."
        raise DataError(msg)
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
    if twice := [str(name) for name, count in collections.Counter(names).items() if count > 1]:
        msg = f"the {kind} has two columns {twice[0]!r:.80}, of which a row would keep one. Rename or drop the other."
        raise DataError(msg)
    if package == "pandas":
        return source.to_dict("records")  # type: ignore[no-any-return]
    if package == "csv":
        return source  # type: ignore[no-any-return]
    return source.to_dicts() if package == "polars" else source.to_pylist()  # type: ignore[no-any-return]


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
        check_encoding(path)
        # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
            yield from read_csv(file, path.name) if suffix == ".csv" else read_jsonl(file, path.name)
    except UnicodeDecodeError as error:
        refuse(path.name, undecodable(path), f"is not UTF-8 text: {error}. Save the file as UTF-8")
    except OSError as error:
        msg = f"{path.name} cannot be read: {reason(error)}."
        raise DataError(msg) from error
