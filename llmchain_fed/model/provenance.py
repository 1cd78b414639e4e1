"""Finds, in a text that a template has made, the places that came from foreign values.

A template is a black box: it is rendered a second time with other characters in the values' places, and where the two
texts differ, foreign text stands. Knows templates as functions. Knows nothing about LangChain or tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from llmchain_fed.errors import ChatTemplateError
from llmchain_fed.model.control_tokens import Rendered, occurrences

Change = Callable[[str], str]
"""a value's text → a text of the same length"""

MASK = "ꙮ"  # a letter that is printable, so that repr() and JSON leave it alone, and hardly anybody writes
_LETTERS = "xqzjkvw"


def mark_foreign(text: str, controls: Iterable[str], renders: Iterable[Callable[[Change], str]]) -> str:
    """`text`, as `Rendered` where foreign text spells a control token in it.

    Args:
        text: The template made this of the true values.
        controls: All control tokens of the model and its template.
        renders: Each renders the template anew with its foreign texts changed by the function that it is given; the
            first whose result has the shape of `text` counts. A template that looks into its values may make another
            shape of other values: the later ones change less.

    Raises:
        ChatTemplateError: No rendering has the shape of `text`.
    """
    controls = frozenset(controls)
    spelled = occurrences(text, controls)
    if not spelled:
        return text
    for render in renders:
        for change in (_masked(controls), _without(controls)):
            try:
                other = render(change)
            except Exception:  # noqa: S112 (a template that needs something of its values may raise anything)
                continue
            places = _foreign_places(text, other, spelled)
            if places is not None:
                return Rendered(text, places, controls) if places else text
    shown = sorted({text[start:end] for start, end in spelled})
    msg = (
        f"the text spells control tokens ({', '.join(map(repr, shown[:3]))}), and the template looks into its values, "
        "so which of them came from a value cannot be told. Take them out of the values."
    )
    raise ChatTemplateError(msg)


def _foreign_places(text: str, other: str, spelled: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The spelled places that differ between the two texts; None where the template made another shape."""
    if len(other) != len(text):
        return None
    differ = [a != b for a, b in zip(text, other, strict=True)]
    if any(d and b not in MASK + _LETTERS + _LETTERS.upper() for d, b in zip(differ, other, strict=True)):
        return None
    return [place for place in spelled if any(differ[slice(*place)])]


def _masked(controls: frozenset[str]) -> Change:
    """Every letter is changed. White space stays, for templates trim it, but within a control token."""

    def change(text: str) -> str:
        found = list(re.sub(r"\S", MASK, text))
        for start, end in occurrences(text, controls):
            found[start:end] = MASK * (end - start)
        return "".join(found)

    return change


def _without(controls: frozenset[str]) -> Change:
    """Only what spells a control token is changed, to letters: for templates that look into their values."""

    def change(text: str) -> str:
        parts, at = [], 0
        for start, end in occurrences(text, controls):
            letter = next(c for c in [*_LETTERS, MASK] if c not in text[start:end].lower())
            parts += [text[at:start], letter * (end - start)]
            at = end
        return "".join([*parts, text[at:]])

    return change


class _Changed:
    """Stands for an object in a template: shows itself as the object does, changed."""

    def __init__(self, value: object, change: Change) -> None:
        self._value, self._change = value, change

    def __str__(self) -> str:
        return self._change(str(self._value))

    def __repr__(self) -> str:
        return self._change(repr(self._value))

    def __format__(self, spec: str) -> str:
        return self._change(format(self._value, spec))


def map_texts(value: object, change: Change) -> object:
    """The same data with every text in it changed; an object shows itself changed."""
    kind = type(value)
    if kind is str:
        return change(str(value))
    if kind is dict:
        return {map_texts(k, change): map_texts(v, change) for k, v in value.items()}  # type: ignore[attr-defined]
    if kind in (list, tuple):
        return kind(map_texts(v, change) for v in value)  # type: ignore[attr-defined]
    return value if value is None or kind in (bool, int, float) else _Changed(value, change)


def texts_of(value: object) -> list[str]:
    """Every text that a template could make of some data."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in texts_of(part)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in texts_of(part)]
    return [] if value is None or isinstance(value, (bool, int, float)) else [str(value), repr(value)]
