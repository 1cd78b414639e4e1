"""A bar on stderr while many examples are read; where it takes a moment alone, nothing is shown.

Knows tqdm and stderr. Knows nothing of what is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm.auto import tqdm

from llmchain_fed.data.sources.readers import count_of

_DELAY = 1.0  # seconds


@contextmanager
def bar_of(name: str | None, source: Any) -> Iterator[Callable[[int], object]]:
    """What is called with every count of rows that have been read; None as a name shows nothing."""
    if name is None or not _shows_a_bar():
        yield lambda _: None
        return
    total = count_of(source)
    bar: tqdm[Any] | None = None
    with suppress(OSError):  # a terminal that has gone ends no training
        bar = tqdm(desc=name[:60], total=total, unit=" examples", delay=_DELAY, leave=False, unit_scale=True)

    def advance(count: int) -> None:
        with suppress(OSError):
            if bar is not None:
                bar.update(count)

    try:
        yield advance
    finally:
        with suppress(OSError):
            if bar is not None:
                bar.close()


def _shows_a_bar() -> bool:
    in_notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
    return in_notebook or (hasattr(sys.stderr, "isatty") and sys.stderr.isatty())
