"""Nodes of texts that are read in one go: what stands in a JSON string, and free text up to a marker.

Knows nodes, and how JSON escapes. Knows nothing about grammars' engines, tokens or models.
"""

from __future__ import annotations

import re

from llmchain_fed.model.generation.nodes import NOTHING, Node, Reading, quantifier, repeated


class StringBody(Node):
    r"""What stands between the quotes of a JSON string; characters are counted as JSON reads them.

    Args:
        least: So many characters at least.
        most: So many at most; None: any number.
    """

    _UNIT = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u00[01][0-9a-f])'
    _BEGUN = re.compile(r"\\(?:u(?:0(?:0(?:[01])?)?)?)?\Z")
    _RUN = re.compile(f"{_UNIT}*")
    _ONE = re.compile(_UNIT)

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self.least, self.most = least, most

    @property
    def shortest(self) -> str:
        """A letter again and again."""
        return repeated("a", self.least)

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return self.least + 6

    def read(self, text: str, at: int) -> Reading:
        """Reads all that can stand in a string: what ends it, a quote, cannot."""
        end = self._RUN.match(text, at).end()  # type: ignore[union-attr] # it matches nothing, too
        counted = end - at if "\\" not in text[at:end] else sum(1 for _ in self._ONE.finditer(text, at, end))
        if self.most is not None and counted > self.most:
            return NOTHING
        missing = max(self.least - counted, 0)
        ends = frozenset((end,)) if not missing else frozenset[int]()
        if end == len(text):
            return Reading(ends, "a" * missing)
        begun = self._BEGUN.match(text, end)
        if begun is None or counted == self.most:
            return Reading(ends, None)
        rest = "n" if begun.end() - end == 1 else "000a"[begun.end() - end - 2 :]
        return Reading(ends, rest + "a" * max(missing - 1, 0))

    def pattern(self) -> str:
        """A quantified group of characters and escapes."""
        return r'(?:[^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u00[01][0-9a-f])' + quantifier(self.least, self.most)


class Text(Node):
    """Any text in which a marker does not stand; with `marked`, it ends in the only one.

    Args:
        marker: What does not stand in it; not empty.
        marked: Whether the marker follows.
    """

    def __init__(self, marker: str, *, marked: bool = False) -> None:
        self.marker, self.marked = marker, marked

    @property
    def shortest(self) -> str:
        """Nothing, or the marker by itself."""
        return self.marker if self.marked else ""

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return len(self.shortest)

    def read(self, text: str, at: int) -> Reading:
        """Looks for the marker; without one, all of the text is read."""
        found = text.find(self.marker, at)
        if not self.marked:  # nothing but the marker can be told from a text
            return Reading(frozenset((len(text),)), "") if found < 0 else Reading(frozenset((found,)), None)
        if found >= 0:
            end = found + len(self.marker)
            return Reading(frozenset((end,)), "" if end == len(text) else None)
        begun = next((n for n in range(len(self.marker) - 1, 0, -1) if text[at:].endswith(self.marker[:n])), 0)
        return Reading(frozenset(), self.marker[begun:])

    def pattern(self) -> str:
        """Not of Python's kind: see `lark`."""
        raise NotImplementedError


class Leaf(Node):
    """A node that the grammar's engine reads as one word, for nothing in it is nested."""

    def __init__(self, inner: Node) -> None:
        self.inner = inner

    @property
    def shortest(self) -> str:
        """The inner one's."""
        return self.inner.shortest

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return self.inner.longest_rest

    def read(self, text: str, at: int) -> Reading:
        """As the inner one."""
        return self.inner.read(text, at)

    def pattern(self) -> str:
        """The inner one's."""
        return self.inner.pattern()
