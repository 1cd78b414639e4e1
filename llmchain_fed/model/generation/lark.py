"""Trees of nodes as grammars of llguidance's Lark.

Knows nodes and how Lark spells them. Knows nothing about tokens, JSON or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llmchain_fed.model.generation.nodes import Choice, Control, Fixed, Node, Repeat, Series, quantifier
from llmchain_fed.model.generation.text_nodes import Leaf, Text


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

    def name(node: Node) -> str:
        if isinstance(node, Control) and controls is not None and node.text in controls:
            return f"<[{controls[node.text]}]>"
        if isinstance(node, Fixed):
            return json.dumps(node.text, ensure_ascii=False) if node.text else '""'
        if id(node) not in written:
            terminal = isinstance(node, (Leaf, Text))
            written[id(node)] = f"{'T' if terminal else 'r'}{len(written) + 1}"
            at = len(rules)
            rules.append("")
            rules[at] = f"{written[id(node)]}: {_terminal(node) if terminal else body(node)}"
        return written[id(node)]

    def body(node: Node) -> str:
        if isinstance(node, Series):
            return _joined([name(part) for part in node.parts], " ")
        if isinstance(node, Choice):
            return _joined([name(option) for option in node.options], " | ")
        if isinstance(node, Repeat):
            return f"({name(node.item)}){quantifier(node.least, node.most)}"
        return name(node)

    top = f"start: {body(root)}"
    return "\n".join([top, *rules])


def _joined(parts: Sequence[str], by: str) -> str:
    return by.join(parts) or '""'


def _terminal(node: Node) -> str:
    if isinstance(node, Text):
        marker = Fixed(node.marker).pattern()
        without = f"/(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/"
        return f"({without}) /{marker}/" if node.marked else without
    return f"/{node.pattern()}/"
