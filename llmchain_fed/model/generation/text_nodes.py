"""Nodes of texts beyond regular ones: what stands in a JSON string or an object, and free text up to a marker.

Knows nodes, and how JSON escapes. Knows nothing about grammars' engines, tokens or models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

from llmchain_fed.model.generation.nodes import (
    NOTHING,
    Fixed,
    Node,
    Reading,
    Series,
    joined,
    quantifier,
    repeated,
    shorter,
)


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
        counted = end - at if "\\" not in text[at:end] else len(self._ONE.findall(text, at, end))
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
    """A node that the grammar's engine reads as one word, for nothing in it is nested.

    Args:
        inner: What it is.
        most: So many characters at most stand between the quotes of it; None: any number.
    """

    def __init__(self, inner: Node, most: int | None = None) -> None:
        self.inner, self.within = inner, None if most is None else Series('"', StringBody(0, most), '"')

    @property
    def shortest(self) -> str:
        """The inner one's, which must not be longer than `most`."""
        return self.inner.shortest

    @property
    def longest_rest(self) -> int:
        """See `Node`."""
        return self.inner.longest_rest

    def read(self, text: str, at: int) -> Reading:
        """As the inner one, where it does not become too long."""
        found = self.inner.read(text, at)
        if self.within is None or found == NOTHING:
            return found
        ends = found.ends & self.within.read(text, at).ends if found.ends else found.ends
        fits = found.rest is not None and self.within.whole(text[at:] + found.rest)
        return Reading(ends, found.rest if fits else None)

    def pattern(self) -> str:
        """The inner one's."""
        return self.inner.pattern()


def _lead(node: Node) -> str:
    """How every text of a node begins."""
    while isinstance(node, Series) and node.parts:
        node = node.parts[0]
    return node.text if isinstance(node, Fixed) else ""


class Members(Node):
    """Texts one behind the other, of which some may be left out, with a separator between those that are there.

    Args:
        parts: The texts; none is empty.
        optional: Which may be left out.
        by: What stands between two; not empty.
    """

    def __init__(self, parts: Sequence[Node], optional: Sequence[bool], by: str) -> None:
        self.parts, self.optional, self.by = list(parts), list(optional), by
        self.behind = [Series(by, part) for part in parts]
        self._leads = [_lead(part) for part in self.parts], [by + _lead(part) for part in self.parts]

    @cached_property
    def _shortest(self) -> tuple[str, list[int]]:
        """A separator and a text for each that must be there, and where those up to each part end."""
        texts = ["" if free else self.by + part.shortest for part, free in zip(self.parts, self.optional, strict=True)]
        return joined(texts), list(accumulate(map(len, texts), initial=0))

    @property
    def shortest(self) -> str:
        """Those that must be there."""
        return self._shortest[0].removeprefix(self.by)

    @cached_property
    def longest_rest(self) -> int:
        """Within any, with the shortest of those behind it."""
        whole, ends = self._shortest
        return max((node.longest_rest + len(whole) - ends[i + 1] for i, node in enumerate(self.behind)), default=0)

    def read(self, text: str, at: int) -> Reading:
        """Reads part by part, from where nothing stands before it and from where something does."""
        whole, ends = self._shortest
        fresh, begun, rest = {at}, set[int](), None
        for i, (part, behind, optional) in enumerate(zip(self.parts, self.behind, self.optional, strict=True)):
            next_begun = set(begun) if optional else set[int]()
            leads = (leads[i] for leads in self._leads)
            for node, places, lead in zip((part, behind), (fresh, begun), leads, strict=True):
                for place in places:
                    if len(text) - place >= len(lead) and not text.startswith(lead, place):
                        continue  # another one's name stands there, as with most of many
                    found = node.read(text, place)
                    next_begun |= found.ends
                    if found.rest is not None:
                        rest = shorter(rest, found.rest + whole[ends[i + 1] :])
            fresh, begun = fresh if optional else set(), next_begun
            if not fresh and not begun:
                break
        done = frozenset(fresh | begun)
        return Reading(done, "" if len(text) in done else rest)

    def pattern(self) -> str:
        """It is no word: see `lark`."""
        raise NotImplementedError
