"""Trees of nodes as grammars of llguidance's Lark.

Knows nodes and how Lark spells them. Knows nothing about tokens, JSON or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llmchain_fed.model.generation.nodes import Choice, Control, Fixed, Node, Repeat, Series, quantifier
from llmchain_fed.model.generation.text_nodes import Leaf, Members, Text


def lark(root: Node, controls: Mapping[str, int] | None = None) -> str:
    r"""A node as a grammar.

    Args:
        root: The node.
        controls: The id of every control token in it, by its text.

    >>> from llmchain_fed.model.generation.nodes import Chars
    >>> print(lark(Series("[", Leaf(Repeat(Chars.of("01"), 1)), "]")))
    start: "[" T1 "]"
    T1: /(?:[0-1])+/
    """
    written: dict[int, str] = {}
    rules: list[str] = []
    waiting: list[Node] = []  # instead of a recursion, whose depth Python bounds

    def name(node: Node) -> str:
        if isinstance(node, Control) and controls is not None and node.text in controls:
            return f"<[{controls[node.text]}]>"
        if isinstance(node, Fixed):
            return json.dumps(node.text, ensure_ascii=False) if node.text else '""'
        if id(node) not in written:
            written[id(node)] = f"{'T' if isinstance(node, (Leaf, Text)) else 'r'}{len(written) + 1}"
            waiting.append(node)
        return written[id(node)]

    def body(node: Node) -> str:
        if isinstance(node, (Leaf, Text)):
            return _terminal(node)
        if isinstance(node, Series):
            return _joined([name(part) for part in node.parts], " ")
        if isinstance(node, Choice):
            return _joined([name(option) for option in node.options], " | ")
        if isinstance(node, Repeat):
            return f"({name(node.item)}){quantifier(node.least, node.most)}"
        if isinstance(node, Members):
            return members(node)
        return name(node)

    def members(node: Members) -> str:
        """Part by part from the last: what may follow where nothing stands before it, and where something does."""
        mine = len(rules)
        fresh, begun = '""', '""'
        for i in reversed(range(len(node.parts))):
            one = f"{name(node.parts[i])} {begun}"
            other = f"{json.dumps(node.by)} {one}"
            if node.optional[i]:
                one, other = f"{one} | {fresh}", f"{other} | {begun}"
            rules.extend((f"f{mine}_{i}: {one}", f"b{mine}_{i}: {other}"))
            fresh, begun = f"f{mine}_{i}", f"b{mine}_{i}"
        return fresh

    top = f"start: {name(root) if isinstance(root, (Leaf, Text)) else body(root)}"
    while waiting:
        node = waiting.pop()
        rules.append(f"{written[id(node)]}: {body(node)}")
    return "\n".join([top, *rules])


def _joined(parts: Sequence[str], by: str) -> str:
    return by.join(parts) or '""'


def _terminal(node: Node) -> str:
    if isinstance(node, Text):
        marker = Fixed(node.marker).pattern()
        without = f"/(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/"
        return f"({without}) /{marker}/" if node.marked else without
    within = f" & /{node.within.pattern()}/" if isinstance(node, Leaf) and node.within is not None else ""
    return f"/{node.pattern()}/{within}"
