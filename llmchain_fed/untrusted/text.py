"""Text from elsewhere for people's eyes, regular files up to a size, and the error that a stranger's input ends in.

Knows characters, lengths and the file system. Knows nothing of formats.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from llmchain_fed.errors import LLMChainFedError

MAX_INTEGER = 2**63  # what every other reader of JSON or YAML can represent, too
# C0 and C1 controls but tab and newline, halves of surrogate pairs, line separators that terminals and editors take for
# newlines, and what turns the direction of the text around it; joiners stay, which Persian and emoji need
DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
ErrorType = type[LLMChainFedError]


@contextmanager
def decoding(what: str, error: ErrorType) -> Iterator[None]:
    """Whatever goes wrong within is an error of our tree: what a stranger sent ends in a refusal, never in a crash."""
    try:
        yield
    except LLMChainFedError:
        raise
    except Exception as found:
        msg = f"{what} cannot be read ({type(found).__name__}: {shown(str(found), 200)})."
        raise error(msg) from None


class PanicError(RuntimeError):
    """What a library in Rust died of, as an Exception."""


@contextmanager
def no_panic() -> Iterator[None]:
    """A panic within a library in Rust (tokenizers), which is no Exception to Python, is raised as a `PanicError`."""
    try:
        yield
    except BaseException as found:
        if isinstance(found, Exception) or type(found).__name__ != "PanicException":
            raise
        raise PanicError(str(found)) from None


def printable(text: object, longest: int = 2000) -> str:
    r"""Text that can be shown on a terminal, logged, and written as UTF-8; at most so many characters of it.

    >>> printable("naïve \x1b[2J 日本語")
    'naïve \\x1b[2J 日本語'
    """
    found = text if isinstance(text, str) else str(text)
    cut = found[:longest]
    cut = DANGEROUS.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), cut)
    return cut if len(found) <= longest else f"{cut}…"


def one_line(text: object, longest: int = 2000) -> str:
    r"""The same in one line: what stands in a table or a log cannot write further lines of it.

    >>> one_line("lost\n  7  3 of 3  0.100")
    'lost\\n  7  3 of 3  0.100'
    """
    return printable(text, longest).replace("\n", "\\n").replace("\t", "\\t")


def reason(error: BaseException) -> str:
    r"""Why something failed, in the system's words; without the path, which can be a descriptor's number.

    >>> reason(IsADirectoryError(21, "Is a directory", 3))
    'Is a directory'
    """
    said = error.strerror if isinstance(error, OSError) else None
    return one_line(said or str(error) or type(error).__name__, 200)


def shown(value: object, longest: int = 80) -> str:
    """A short, printable form of any value, for a message; it never fails and never walks all of large plain data."""
    if isinstance(value, str):
        return printable(value, longest)
    if isinstance(value, int) and value.bit_length() > min(4 * longest, 14_000):  # Python spells 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) and len(value) > longest:
        return f"{type(value).__name__} of {len(value):,} entries"
    try:
        return printable(_spelled(value, longest), longest)
    except Exception:  # a huge integer or a deep nest within
        return f"a {type(value).__name__}"


_BRACKETS: dict[type, str] = {list: "[]", tuple: "()", dict: "{}", set: "{}"}


def _spelled(value: object, room: int, depth: int = 0) -> str:
    """`repr`, of which at least so many characters are right: what lies behind them is not looked at."""
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[: room + 1])
    brackets = _BRACKETS.get(type(value), "")
    if not brackets or not isinstance(value, (list, tuple, dict, set)) or not value:
        return repr(value)
    if room <= 0 or depth > 16:
        return "…"
    parts: list[str] = []
    for item in islice(value, room):
        part = _spelled(item, room, depth + 1)
        if isinstance(value, dict):
            part = f"{part}: {_spelled(value[item], room - len(part), depth + 1)}"
        parts.append(part)
        room -= len(part) + 2
        if room <= 0:
            parts.append("…")
            break
    last = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return brackets[0] + ", ".join(parts) + last + brackets[1]


def refusal(error: ErrorType, reason: str, remedy: str = "") -> LLMChainFedError:
    """The error with its reason and remedy."""
    return error(f"{reason}." + (f" {remedy}" if remedy else ""))


def machine_memory() -> int:
    """This machine's, in bytes: what nothing that is read exceeds."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # pragma: no cover (not every system tells)
        return 2**36


def read_file(path: str | Path, *, most: int, what: str, error: ErrorType, follow: bool = True) -> bytes:
    """A regular file's content; a pipe or a device is refused rather than waited for.

    Args:
        path: Of the file.
        most: bytes that make sense; of a file with more nothing is read.
        what: Is read, for the message.
        error: Raised.
        follow: Whether the last part of the path may be a symbolic link.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise refusal(error, f"{what} {shown(str(path), 300)} is no regular file")
            # its size is looked at first: a reader makes room for all that it is told to read
            data = file.read(min(most, found.st_size) + 1) if found.st_size <= most else None
    except (OSError, ValueError) as failed:
        raise refusal(error, f"{what} {shown(str(path), 300)} cannot be read ({reason(failed)})") from None
    if data is None or len(data) > most:
        raise refusal(error, f"{what} {shown(str(path), 300)} has more than the {most:,} bytes that make sense")
    return data
