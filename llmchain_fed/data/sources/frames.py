"""Rows out of what other libraries have in memory: frames, Arrow tables, data sets; a few at a time.

Knows pandas, polars, pyarrow, datasets and torch by their types' names, and imports none of them.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmchain_fed.errors import DataError

_ROWS = 1024
"""rows that are made at a time, of a frame that has them as columns"""
_COLUMNS = {
    ("pandas", "DataFrame"): "columns",
    ("polars", "DataFrame"): "columns",
    ("pyarrow", "Table"): "column_names",
    ("pyarrow", "RecordBatch"): "schema",
    ("pyarrow", "RecordBatchReader"): "schema",
    ("csv", "DictReader"): "fieldnames",
}
"""(package, type) → the attribute with the names of its columns"""
_DATASETS = {("datasets", "Dataset"), ("datasets", "IterableDataset")}
_ONCE = {("pyarrow", "RecordBatchReader"), ("csv", "DictReader"), ("datasets", "IterableDataset")}


def kinds(source: Any) -> set[tuple[str, str]]:
    """(package, name) of a source's type and of those that it is made of."""
    return {(kind.__module__.partition(".")[0].lstrip("_"), kind.__name__) for kind in type(source).__mro__}


def is_table(source: Any) -> bool:
    """Whether it is a frame, a table or a data set, whose rows may have columns that nobody reads."""
    return not kinds(source).isdisjoint(_COLUMNS.keys() | _DATASETS)


def is_read_once(source: Any) -> bool:
    """Whether nobody should read it a second time: an iterator, a stream, a data set of unknown cost."""
    found = kinds(source)
    return isinstance(source, Iterator) or not found.isdisjoint(_ONCE | {("torch", "IterableDataset")})


def frame_rows(source: Any) -> Iterable[Any] | None:
    """The rows of what would otherwise give the names of its columns, or the columns themselves; else None.

    Raises:
        DataError: Two columns have one name, or the source is not rows yet.
    """
    found = kinds(source)
    if ("polars", "LazyFrame") in found:
        msg = "a LazyFrame has no rows before it is collected. Pass frame.collect()."
        raise DataError(msg)
    kind = next((kind for kind in _COLUMNS if kind in found), None)
    if kind is None:
        return _by_index(source) if is_map_style(source) else None
    names = getattr(source, _COLUMNS[kind])
    names = names.names if kind[1].startswith("RecordBatch") else list(names) if names is not None else []
    if twice := [str(name) for name, count in collections.Counter(names).items() if count > 1]:
        what = f"the {kind[1]} has two columns {twice[0]!r:.80}"
        msg = f"{what}, of which a row would keep one. Rename or drop the other."
        raise DataError(msg)
    if kind[0] == "pandas":
        return _pandas_rows(source)
    if kind[0] == "polars":
        return source.iter_rows(named=True)  # type: ignore[no-any-return]
    return _arrow_rows(source) if kind[0] == "pyarrow" else source


def _pandas_rows(source: Any) -> Iterator[Any]:
    """Its rows; whole numbers that pandas has made floats of, because others are missing, are whole numbers."""
    whole = [name for name in source.columns if _is_whole_with_gaps(source[name])]
    for at in range(0, len(source), _ROWS):
        for row in source.iloc[at : at + _ROWS].to_dict("records"):
            yield row | {name: int(row[name]) for name in whole if row[name] == row[name]} if whole else row


def _is_whole_with_gaps(column: Any) -> bool:
    if str(column.dtype) not in ("float64", "float32"):
        return False
    there = column[column.notna()]
    return 0 < len(there) < len(column) and bool((there % 1 == 0).all())


def _arrow_rows(source: Any) -> Iterator[Any]:
    batches = source.to_batches() if hasattr(source, "to_batches") else [source] if hasattr(source, "slice") else source
    for batch in batches:
        for at in range(0, batch.num_rows, _ROWS):
            yield from batch.slice(at, _ROWS).to_pylist()


def is_map_style(source: Any) -> bool:
    """Whether rows are fetched by their number: torch's Dataset, and what is made like one.

    Raises:
        DataError: It is one, and does not say how many rows it has.
    """
    if isinstance(source, Mapping) or hasattr(source, "keys") or hasattr(source, "__iter__"):
        return False
    if ("torch", "Dataset") in kinds(source) and not hasattr(source, "__len__"):
        msg = f"{type(source).__name__} does not say how many rows it has. Give it __len__, or pass an IterableDataset."
        raise DataError(msg)
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _by_index(source: Any) -> Iterator[Any]:
    return (source[at] for at in range(len(source)))
