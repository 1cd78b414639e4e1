"""The physical lines of a text file: UTF-8, of a bounded length, with the number that an editor gives them.

Knows encodings and line ends. Knows nothing of what stands in a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from llmchain_fed.errors import DataError
from llmchain_fed.untrusted import shown

LONGEST = 2**24
"""characters of a line, and of a record of several; no model reads a tenth of that"""
_ESCAPED = re.compile("[\udc80-\udcff]")


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
            refuse(
                name,
                number,
                "has a NUL byte, which no text has: the file is UTF-16, perhaps, or was cut off. Save it as UTF-8",
            )
        yield line
