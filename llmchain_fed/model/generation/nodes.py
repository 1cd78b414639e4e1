"""Languages as trees of nodes: what a text may be, and the shortest way on from a begun one.

A node is read by a grammar's engine as Lark, and by the budget in Python: of a text that has begun it says how little
must follow. Knows texts alone. Knows nothing about JSON, tokens or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from llmchain_fed.errors import SchemaError

_LONGEST = 2**17  # characters
Ranges = tuple[tuple[int, int], ...]
"""code points from–to, ascending and apart"""


class Reading(NamedTuple):
    """What reading a text from somewhere on has shown."""

    ends: frozenset[int]
    """where what the node stands for may have ended"""
    rest: str | None
    """the shortest text with which it ends behind the given one; None where the given text is none of its beginnings"""


NOTHING = Reading(frozenset(), None)


class Node(ABC):
    """A set of texts."""

    @property
    @abstractmethod
    def shortest(self) -> str:
        """One of the shortest of its texts."""

    @property
    @abstractmethod
    def longest_rest(self) -> int:
        """characters: however a text of it has begun, this many are enough to end it."""

    @abstractmethod
    def read(self, text: str, at: int) -> Reading:
        """Reads `text` from `at` on."""

    @abstractmethod
    def pattern(self) -> str:
        """The node as a regular expression, as Lark takes them."""

    def whole(self, text: str) -> bool:
        """Whether the text is one of the node's.

        >>> Repeat(Chars.of("ab"), 1, 2).whole("ab")
        True
        """
        return len(text) in self.read(text, 0).ends


class Fixed(Node):
    """One text."""

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def shortest(self) -> str:
        """The text."""
        return self.text

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return len(self.text)

    def read(self, text: str, at: int) -> Reading:
        """Reads the one text."""
        if text.startswith(self.text, at):
            end = at + len(self.text)
            return Reading(frozenset((end,)), "" if end == len(text) else None)
        begun = len(text) - at
        return Reading(frozenset(), self.text[begun:]) if self.text.startswith(text[at:]) else NOTHING

    def pattern(self) -> str:
        """The text with every character that means something escaped."""
        return "".join(_escaped(ord(c)) for c in self.text)


class Control(Fixed):
    """A control token by its text: no other spelling of it is one."""


class Chars(Node):
    """One character out of some."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges

    @classmethod
    def of(cls, characters: str) -> Chars:
        """These characters."""
        return cls(merged((ord(c), ord(c)) for c in characters))

    @cached_property
    def shortest(self) -> str:
        """A plain one of them where there is one."""
        return next((c for c in "a0A- " if self.has(c)), chr(self.ranges[0][0]))

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return 1

    def has(self, character: str) -> bool:
        """Whether it is one of them."""
        return any(low <= ord(character) <= high for low, high in self.ranges)

    def read(self, text: str, at: int) -> Reading:
        """Reads one character."""
        if at == len(text):
            return Reading(frozenset(), self.shortest)
        if not self.has(text[at]):
            return NOTHING
        return Reading(frozenset((at + 1,)), "" if at + 1 == len(text) else None)

    def pattern(self) -> str:
        """A class of characters."""
        parts = (_escaped(a) if a == b else f"{_escaped(a)}-{_escaped(b)}" for a, b in self.ranges)
        return f"[{''.join(parts)}]"


DIGIT = Chars(((48, 57),))


class Series(Node):
    """Texts one behind the other."""

    def __init__(self, *parts: Node | str) -> None:
        self.parts: tuple[Node, ...] = tuple(Fixed(p) if isinstance(p, str) else p for p in parts)

    @cached_property
    def _ends(self) -> list[int]:
        """For each part, where its shortest text ends in that of the whole."""
        return list(accumulate(len(part.shortest) for part in self.parts))

    @cached_property
    def shortest(self) -> str:
        """The shortest of each.

        Raises:
            SchemaError: They are longer than any answer.
        """
        return joined(part.shortest for part in self.parts)

    @cached_property
    def longest_rest(self) -> int:
        """Within any of the parts, with the shortest of those behind it."""
        whole = len(self.shortest)
        behind = zip(self.parts, self._ends, strict=True)
        return max((part.longest_rest + whole - end for part, end in behind), default=0)

    def read(self, text: str, at: int) -> Reading:
        """Reads part by part, along every way in which the former may have ended."""
        places, rest = frozenset((at,)), None
        for part, end in zip(self.parts, self._ends, strict=True):
            ends: set[int] = set()
            for place in places:
                found = part.read(text, place)
                ends |= found.ends
                if found.rest is not None:
                    rest = shorter(rest, found.rest + self.shortest[end:])
            places = frozenset(ends)
            if not places:
                break
        if not self.parts and at == len(text):
            rest = ""
        return Reading(places, rest)

    def pattern(self) -> str:
        """The parts' patterns."""
        return "".join(part.pattern() for part in self.parts)


class Choice(Node):
    """Any of some languages."""

    def __init__(self, *options: Node | str) -> None:
        self.options: tuple[Node, ...] = tuple(Fixed(o) if isinstance(o, str) else o for o in options)

    @cached_property
    def shortest(self) -> str:
        """The shortest of all."""
        return min((option.shortest for option in self.options), key=len)

    @cached_property
    def longest_rest(self) -> int:
        """The longest of all."""
        return max(option.longest_rest for option in self.options)

    def read(self, text: str, at: int) -> Reading:
        """Reads every option."""
        ends: set[int] = set()
        rest = None
        for option in self.options:
            found = option.read(text, at)
            ends |= found.ends
            rest = shorter(rest, found.rest)
        return Reading(frozenset(ends), rest)

    def pattern(self) -> str:
        """A group of alternatives."""
        return f"(?:{'|'.join(option.pattern() for option in self.options)})"


class Repeat(Node):
    """A language's texts again and again.

    Args:
        item: What is repeated; no text of it is empty.
        least: So many at least.
        most: So many at most; None: any number.
    """

    def __init__(self, item: Node, least: int = 0, most: int | None = None) -> None:
        self.item, self.least, self.most = item, least, most

    @cached_property
    def shortest(self) -> str:
        """As few as may be.

        Raises:
            SchemaError: They are longer than any answer.
        """
        return repeated(self.item.shortest, self.least)

    @cached_property
    def longest_rest(self) -> int:
        """The rest of one, and all that must still be."""
        return self.item.longest_rest + len(self.item.shortest) * max(self.least - 1, 0)

    def read(self, text: str, at: int) -> Reading:
        """Reads item by item; a place that was reached with as many items before is not looked at again."""
        places, ends, rest, count = frozenset((at,)), set[int](), None, 0
        seen: set[int] = set()
        while places:
            missing = max(self.least - count, 0)
            if not missing:
                ends |= places
                if len(text) in places:
                    rest = ""
                if self.most is None:  # where it may end and go on for ever, how it came there does not matter
                    places -= seen
                    seen |= places
            if count == self.most:
                break
            nexts: set[int] = set()
            for place in places:
                found = self.item.read(text, place)
                nexts |= found.ends
                if found.rest is not None:
                    rest = shorter(rest, found.rest + self.item.shortest * max(missing - 1, 0))
            places, count = frozenset(nexts), count + 1
        return Reading(frozenset(ends), rest)

    def pattern(self) -> str:
        """A quantified group."""
        return f"(?:{self.item.pattern()}){quantifier(self.least, self.most)}"


def repeated(text: str, count: int) -> str:
    """A text again and again.

    Raises:
        SchemaError: It is longer than any answer.
    """
    _check_length(len(text) * count)
    return text * count


def joined(texts: Iterable[str]) -> str:
    """Texts one behind the other.

    Raises:
        SchemaError: They are longer than any answer.
    """
    found, length = [], 0
    for text in texts:
        length += len(text)
        _check_length(length)
        found.append(text)
    return "".join(found)


def _check_length(length: int) -> None:
    if length > _LONGEST:
        size = f"{length:,}" if length < 10**18 else "more than 10¹⁸"
        msg = f"the shortest text that keeps to the schema has {size} characters: no answer is so long. Ask for less."
        raise SchemaError(msg)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in order, those that touch as one.

    >>> merged([(5, 6), (1, 2), (3, 3)])
    ((1, 3), (5, 6))
    """
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return tuple(found)


def quantifier(least: int, most: int | None) -> str:
    """How often, as a regular expression says it."""
    if most is None:
        return "*" if not least else "+" if least == 1 else f"{{{least},}}"
    return f"{{{least},{most}}}"


def _escaped(code: int) -> str:
    if chr(code).isalnum() and code < 128:
        return chr(code)
    return f"\\x{code:02x}" if code < 128 else f"\\u{{{code:x}}}"


def shorter(one: str | None, other: str | None) -> str | None:
    """The shorter of two texts, where there is one."""
    if one is None or other is None:
        return other if one is None else one
    return other if len(other) < len(one) else one
