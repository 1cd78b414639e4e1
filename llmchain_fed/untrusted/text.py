"""Text from elsewhere for people's eyes, and the error that a stranger's input ends in.

Knows characters and lengths. Knows nothing of formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmchain_fed.errors import LLMChainFedError

MAX_INTEGER = 2**63  # what every other reader of JSON or YAML can hold, too
# C0 and C1 controls but tab and newline, halves of surrogate pairs, line separators that terminals and editors take for
# newlines, and what turns the direction of the text around it; joiners stay, which Persian and emoji need
DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
ErrorType = type[LLMChainFedError]


@contextmanager
def decoding(what: str, error: ErrorType) -> Iterator[None]:
    """Whatever goes wrong within is an error of our tree: what a stranger sent ends in a refusal, never in a crash.

    Args:
        what: Is decoded, for the message.
        error: Raised in place of any exception that is not of our tree.
    """
    try:
        yield
    except LLMChainFedError:
        raise
    except Exception as found:
        msg = f"{what} cannot be read ({type(found).__name__}: {shown(str(found), 200)})."
        raise error(msg) from None


def printable(text: object, longest: int = 2000) -> str:
    r"""Text that can be shown on a terminal, logged, and written as UTF-8; at most so many characters of it.

    >>> printable("naïve \x1b[2J 日本語")
    'naïve \\x1b[2J 日本語'
    """
    found = text if isinstance(text, str) else str(text)
    cut = found[:longest]
    cut = DANGEROUS.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), cut)
    return cut if len(found) <= longest else f"{cut}…"


_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_MOST_SHOWN = 1000  # entries, at all levels together, of what is spelled out before it is cut


def _is_large(value: object) -> bool:
    """Whether there are more entries in it, and in what it holds, than are spelled out; no more are counted."""
    left, count = [value], 0
    while left and count <= _MOST_SHOWN:
        item = left.pop()
        if isinstance(item, _CONTAINERS):
            count += len(item)
            if count <= _MOST_SHOWN:
                left += item.values() if isinstance(item, Mapping) else item
    return count > _MOST_SHOWN


def shown(value: object, longest: int = 80) -> str:
    """A short, printable form of any value, for a message; it never fails and never walks all of a large one."""
    if isinstance(value, str):
        return printable(value, longest)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, _CONTAINERS) and (len(value) > longest or _is_large(value)):
        return f"{type(value).__name__} of {len(value):,} entries"
    try:
        return printable(repr(value), longest)
    except Exception:  # a huge integer or a deep nest within
        return f"a {type(value).__name__}"


def refusal(error: ErrorType, reason: str, remedy: str = "") -> LLMChainFedError:
    """The error with its reason and remedy."""
    return error(f"{reason}." + (f" {remedy}" if remedy else ""))
