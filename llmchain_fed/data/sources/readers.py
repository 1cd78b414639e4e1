"""Readers: rows out of files, frames and other iterables, each with the place where it stands.

Knows what may be a source. Knows nothing about prompts or what a row must have. Nothing is repaired, merged, renamed or
dropped: what is not as it should be is refused with file and line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from llmchain_fed.data.sources import frames
from llmchain_fed.data.sources.files import read_file, rows_in
from llmchain_fed.errors import DataError


def numbered(source: Any) -> Iterator[tuple[str, Any]]:
    """Every row of a source with its place, such as "example 3" or "example 3 (a.csv, line 5)".

    A source is the path of a CSV, TSV, JSON, JSONL or Parquet file (all but the last also as `.gz`), a frame of pandas
    or polars, a pyarrow table, a data set of `datasets` or torch, or an iterable of rows.

    Raises:
        DataError: It is none of these, or a file is not as it should be.
        MissingExtraError: The file needs a library that is not installed.
    """
    if isinstance(source, (str, Path)):
        for number, (place, row) in enumerate(read_file(Path(source))):
            yield f"example {number} ({place})", row
    else:
        for number, row in enumerate(_rows(source)):
            yield f"example {number}", row


def is_table(source: Any) -> bool:
    """Whether rows have columns, of which some may be there for something else: a file, a frame, a data set."""
    return isinstance(source, (str, Path)) or frames.is_table(source)


def reads_again(source: Any) -> bool:
    """Whether it is known to give the same rows whenever it is read: a file, a frame, a list, a data set by index."""
    if isinstance(source, (str, Path, list, tuple)):
        return True
    return not frames.is_read_once(source) and (frames.is_table(source) or frames.is_map_style(source))


def count_of(source: Any) -> int | None:
    """How many rows there are, where that is known before they are read."""
    if isinstance(source, (str, Path)):
        return rows_in(Path(source))
    return len(source) if isinstance(source, Sized) else None


def _rows(source: Any) -> Iterable[Any]:
    if isinstance(source, Mapping) and source and all(hasattr(part, "column_names") for part in source.values()):
        splits = ", ".join(map(repr, source))
        msg = f"the splits {splits} of a data set are not examples. Pass one of them: d[{next(iter(source))!r}]."
        raise DataError(msg)
    frame = frames.frame_rows(source)
    if frame is not None:
        return frame
    if isinstance(source, (set, frozenset)):
        msg = "a set has no order of its own, so no two runs would train alike. Pass sorted(examples)."
        raise DataError(msg)
    if isinstance(source, (Mapping, bytes, bytearray)) or not isinstance(source, Iterable):
        msg = (
            "examples are a list of (inputs, completion), the path of a file, a frame or a data set, got "
            f"{type(source).__name__}."
        )
        raise DataError(msg)
    if inspect.isgenerator(source) and inspect.getgeneratorstate(source) == inspect.GEN_CLOSED:
        msg = "the generator has been read to its end before: it gives nothing a second time. Pass list(generator)."
        raise DataError(msg)
    return source
