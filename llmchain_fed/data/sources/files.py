"""Rows out of files: CSV, TSV, JSON, JSONL, each also `.gz`, and Parquet, each with the place where it stands.

Knows paths, suffixes, compression and encodings. Knows nothing about prompts or what a row must have. Text is read by
readers of our own, which say what is wrong in which line and take memory for one record; Parquet by pyarrow.
"""

from __future__ import annotations

import collections
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from llmchain_fed.data.sources.json_files import is_object, read_json, read_jsonl
from llmchain_fed.data.sources.text_files import LONGEST, numbered_lines, read_csv, refuse
from llmchain_fed.errors import DataError, MissingExtraError, install
from llmchain_fed.untrusted import reason, shown

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_ROWS = 1024
_ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_ESCAPED = re.compile("[\udc80-\udcff]")


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row with where it stands, such as "a.csv, line 5".

    Raises:
        DataError: There is no such file, it is of no known format, not as it should be, or changes while it is read.
        MissingExtraError: It is Parquet, and pyarrow is not installed.
    """
    suffix = format_of(path)
    name, before = shown(path.name, 255), identity(path)
    try:
        unit = "row" if suffix == ".parquet" else "line"
        for number, row in _parquet(path) if suffix == ".parquet" else _text_rows(path, suffix):
            yield f"{name}, {unit} {number}", row
    except DataError:
        _check_same(path, before)
        raise
    except UnicodeDecodeError as error:
        refuse(path.name, _undecodable(path), f"is not UTF-8 text: {error}. Save the file as UTF-8")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        msg = f"{name} is no whole gzip file: {error!s:.200}. Compress it again, or take `.gz` off its name."
        raise DataError(msg) from error
    except OSError as error:
        msg = f"{name} cannot be read: {reason(error)}."
        raise DataError(msg) from error
    _check_same(path, before)


def format_of(path: Path) -> str:
    """The suffix that says a file's format, of a compressed one that before `.gz`.

    Raises:
        DataError: There is no such file, or it is of no known format.
    """
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text of some length is no name that a file could have
        is_file = False
    known = ", ".join(FORMATS)
    if not is_file:
        why = _why_none(path)
        msg = f"there is no file {str(path)[:200]!r}{why}. Give the path of a file of one of these: {known}."
        raise DataError(msg)
    suffix = _plain(path).suffix.lower()
    if suffix not in FORMATS or (suffix == ".parquet" and _is_gzip(path)):
        msg = (
            f"{shown(path.name, 255)}: examples are read from {known} files and all but the last as .gz, not "
            f"{path.suffix[:20] or 'files without a suffix'}. Read other tables with pandas and pass the frame."
        )
        raise DataError(msg)
    return suffix


def _why_none(path: Path) -> str:
    """What a path is instead of one of a file."""
    text = str(path)
    if _ADDRESS.match(text):
        return ": it is an address, and nothing is fetched. Download it"
    try:
        if path.is_dir():
            return ": it is a folder. Give each file to a participant, or join them with pandas.concat"
    except (OSError, ValueError):
        return ""
    return ": nothing is put in for * and ?. Name one file" if any(c in text for c in "*?") else ""


def identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from what takes its place, or is written into it; None where it cannot be asked."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_same(path: Path, before: tuple[int, ...] | None) -> None:
    if identity(path) != before:
        msg = (
            f"{shown(path.name, 255)} has changed while it was read, so its rows may be of two files. Read it again "
            "when nothing writes to it, or read a copy."
        )
        raise DataError(msg) from None


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _plain(path: Path) -> Path:
    return path.with_suffix("") if _is_gzip(path) else path


@contextmanager
def _text(path: Path, *, newline: str | None = None, errors: str = "strict") -> Iterator[TextIO]:
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
    with path.open("rb") as raw:
        binary = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if _is_gzip(path) else raw
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors=errors, newline=newline) as file:
            yield file


def _text_rows(path: Path, suffix: str) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as raw:
        start = (gzip.GzipFile(fileobj=raw) if _is_gzip(path) else raw).read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        msg = (
            f"{shown(path.name, 255)} is UTF-16 or UTF-32 text (its first bytes say so), and examples are read as "
            "UTF-8. Save it as UTF-8."
        )
        raise DataError(msg)
    if suffix == ".json" and _has_an_object_a_line(path):
        suffix = ".jsonl"
    with _text(path, newline="" if suffix in (".csv", ".tsv") else None) as file:
        if suffix in (".csv", ".tsv"):
            yield from read_csv(file, path.name, "\t" if suffix == ".tsv" else None)
        else:
            yield from (read_json if suffix == ".json" else read_jsonl)(file, path.name)


def _has_an_object_a_line(path: Path) -> bool:
    """Whether a .json file is what others write as .jsonl: its first line is an object, and no list is in it."""
    with _text(path) as file:
        line = next((line for line in iter(lambda: file.readline(LONGEST), "") if line.strip()), "")
    return is_object(line)


def _undecodable(path: Path) -> int:
    """The first line that is no UTF-8, with lines counted as the reader counts them."""
    with _text(path, errors="surrogateescape") as file:
        return next((n for n, line in numbered_lines(file, path.name) if _ESCAPED.search(line)), 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    parquet, errors = _pyarrow()
    number = 0
    try:
        with path.open("rb") as raw:
            file = parquet.ParquetFile(raw)
            names = collections.Counter(file.schema_arrow.names)
            if twice := [name for name, count in names.items() if count > 1]:
                msg = f"{shown(path.name, 255)} has two columns {twice[0]!r:.80}, of which a row would keep one."
                raise DataError(msg)
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except errors as error:
        msg = f"{shown(path.name, 255)} is no whole Parquet file (row {number}): {shown(str(error), 200)}."
        raise DataError(msg) from error


def rows_in(path: Path) -> int | None:
    """How many rows a file has, where that is written in it."""
    if path.suffix.lower() != ".parquet":
        return None
    try:
        return int(_pyarrow()[0].read_metadata(path).num_rows)
    except (OSError, ValueError):
        return None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        msg = f"Parquet files are read by pyarrow: {install('datasets', 'pyarrow')}"
        raise MissingExtraError(msg) from error
    return pyarrow.parquet, pyarrow.ArrowException
