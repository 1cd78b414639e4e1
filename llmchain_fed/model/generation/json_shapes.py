"""What a JSON value may be: as a tree of nodes for an engine that writes one, and as the writer of a given one.

Both keep to one form of writing: properties in the schema's order, one space behind `,` and `:` or none. Knows JSON.
Knows nothing about schemas as people write them, tokens or models.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.nodes import Choice, Fixed, Node, Repeat, Series
from llmchain_fed.model.generation.text_nodes import Leaf, Members, StringBody

_LONGEST_NUMBER = 400  # digits


@dataclass(frozen=True)
class Style:
    """How JSON is written: as Python does by default, or without a space."""

    item: str = ", "
    key: str = ": "

    def text(self, value: Any) -> str:
        """A value in this style.

        >>> Style().text({"a": [1, "é"]})
        '{"a": [1, "é"]}'
        """
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(self.item, self.key))


class Shape(ABC):
    """A set of JSON values."""

    @property
    @abstractmethod
    def node(self) -> Node:
        """Their texts."""

    @abstractmethod
    def write(self, value: Any, where: str = "") -> str:
        """A value's text, which is one of the node's.

        Args:
            value: JSON data.
            where: The path to it, for the message of an error.

        Raises:
            SchemaError: It is none of these values.
        """


def misfit(value: Any, where: str, wanted: str) -> SchemaError:
    """The error that a value is not what its schema wants."""
    return SchemaError(f"{where or 'the value'} is {told(value)}, and the schema wants {wanted}.")


def told(value: Any) -> str:
    """A value for a message; some have no `repr`, for their size or their depth."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


class Scalar(Shape):
    """Strings or numbers whose text a node describes.

    Args:
        node: Their texts, quotes included.
        kinds: The types of Python that they have; `bool` is no number.
        wanted: What they are, for people.
        style: How JSON is written.
        most: So many characters at most stand between the quotes; None: as the node says.
    """

    def __init__(self, node: Node, kinds: tuple[type, ...], wanted: str, style: Style, most: int | None = None) -> None:
        self._node, self._kinds, self._wanted, self._style = Leaf(node, most), kinds, wanted, style

    @property
    def node(self) -> Node:
        """Their texts."""
        return self._node

    def write(self, value: Any, where: str = "") -> str:
        """The value as JSON writes it, or without an exponent where its bounds have it written out."""
        if not isinstance(value, self._kinds) or isinstance(value, bool):
            whole = isinstance(value, float) and int in self._kinds and value.is_integer()
            if not whole and not (isinstance(value, Decimal) and float in self._kinds):
                raise misfit(value, where, self._wanted)
        for text in self._texts(value):
            if self._node.whole(text):
                return text
        raise misfit(value, where, self._wanted)

    def _texts(self, value: Any) -> list[str]:
        if isinstance(value, str):
            return [self._style.text(value)] if is_text(value) else []
        try:
            exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        except (ValueError, ArithmeticError):
            return []
        if not exact.is_finite() or abs(exact.adjusted()) > _LONGEST_NUMBER:
            return []
        plain = format(abs(exact) if exact == 0 else exact, "f")  # -0.0 is 0
        if float not in self._kinds:
            return [plain.partition(".")[0]]
        own = [] if isinstance(value, Decimal) or value == 0 else [self._style.text(value)]
        short = plain.rstrip("0").rstrip(".") if "." in plain else plain
        return [*own, plain, short] if float(exact) not in (float("inf"), -float("inf")) else []


def string(style: Style, least: int = 0, most: int | None = None, body: Node | None = None, named: str = "") -> Scalar:
    """Strings of so many characters, or those whose text between the quotes a node describes."""
    limit = "any number of" if most is None else most
    size = f" of {least} to {limit} characters" if least or most is not None else ""
    if body is None:
        return Scalar(Series('"', StringBody(least, most), '"'), (str,), f"a string{size}", style)
    return Scalar(Series('"', body, '"'), (str,), f"{named}{size}", style, most)


def is_text(value: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class Constants(Shape):
    """Some values, one by one."""

    def __init__(self, values: Sequence[Any], style: Style) -> None:
        self._texts = {same_as(value): style.text(value) for value in reversed(values)}

    @cached_property
    def node(self) -> Node:
        """Their texts."""
        texts = list(self._texts.values())[::-1]
        return Fixed(texts[0]) if len(texts) == 1 else Choice(*texts)

    def write(self, value: Any, where: str = "") -> str:
        """The value's text, if it is one of them."""
        text = self._texts.get(same_as(value))
        if text is None:
            raise misfit(value, where, f"one of {', '.join(reversed(self._texts.values())):.200}")
        return text


def same_as(value: Any) -> str | None:
    """A key of a JSON value: equal ones have equal keys, as 1 and 1.0 do and 1 and true do not; None for other values.

    >>> same_as({"b": 1, "a": [True]}) == same_as({"a": [True], "b": 1.0}), same_as(float("nan"))
    (True, None)
    """

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(key): plain(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(inner) for inner in part]
        return int(part) if isinstance(part, float) and part.is_integer() else part

    try:
        return json.dumps(plain(value), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


class Items(Shape):
    """Arrays.

    Args:
        first: What the first items are, each.
        rest: What all further items are; None: there are none.
        least: So many items at least.
        most: So many at most; None: any number.
        style: How JSON is written.
    """

    def __init__(self, first: Sequence[Shape], rest: Shape | None, least: int, most: int | None, style: Style) -> None:
        self._first, self._rest, self._style = list(first), rest, style
        limit = len(first) if rest is None else most
        self._least, self._most = least, limit if most is None or limit is None else min(most, limit)

    @cached_property
    def node(self) -> Node:
        """An array is closed at once, or has an item, and others behind a comma each."""
        return Series("[", self._from(0), "]")

    def _from(self, at: int) -> Node:
        comma = [self._style.item] if at else []
        if at < len(self._first):
            if self._most is not None and at >= self._most:
                return Fixed("")
            some = Series(*comma, self._first[at].node, self._from(at + 1))
            return some if at < self._least else Choice("", some)
        if self._rest is None:
            return Fixed("")
        least, most = max(self._least - at, 0), None if self._most is None else self._most - at
        if most is not None and most <= 0:
            return Fixed("")
        item = self._rest.node
        if at:
            return Repeat(Series(self._style.item, item), least, most)
        behind = Repeat(Series(self._style.item, item), max(least - 1, 0), None if most is None else most - 1)
        some = Series(item, behind)
        return some if least else Choice("", some)

    def write(self, value: Any, where: str = "") -> str:
        """The items' texts, one behind the other."""
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise misfit(value, where, "an array")
        if len(value) < self._least or (self._most is not None and len(value) > self._most):
            most = self._most if self._most is not None else "any number"
            raise misfit(value, where, f"an array of {self._least} to {most} items")
        shapes = [self._first[i] if i < len(self._first) else self._rest for i in range(len(value))]
        texts = [
            s.write(v, f"{where}[{i}]") for i, (s, v) in enumerate(zip(shapes, value, strict=True)) if s is not None
        ]
        return f"[{self._style.item.join(texts)}]"


class Properties(Shape):
    """Objects whose properties have names.

    Args:
        known: Their values by name, in the order in which they are written.
        required: Those that an object must have.
        style: How JSON is written.
    """

    def __init__(self, known: Mapping[str, Shape], required: frozenset[str], style: Style) -> None:
        self._known, self._required, self._style = dict(known), required, style

    @cached_property
    def node(self) -> Node:
        """Property by property."""
        pairs = [Series(self._style.text(name) + self._style.key, shape.node) for name, shape in self._known.items()]
        return Series("{", Members(pairs, [name not in self._required for name in self._known], self._style.item), "}")

    def write(self, value: Any, where: str = "") -> str:
        """The properties in their order; those that are None and may not be are left out, where they may."""
        if not isinstance(value, Mapping):
            raise misfit(value, where, f"an object with {', '.join(map(repr, self._known)):.300}")
        unknown = [name for name in value if name not in self._known]
        missing = [name for name in self._known if name in self._required and name not in value]
        if unknown or missing:
            wrong = [f"{', '.join(map(repr, missing)):.200} is missing"] if missing else []
            wrong += [f"{', '.join(map(repr, unknown)):.200} is unknown"] if unknown else []
            known = ", ".join(map(repr, self._known)) or "nothing"
            msg = f"{where or 'the value'}: {' and '.join(wrong)}; the schema has {known:.400}."
            raise SchemaError(msg)
        pairs = []
        for name, shape in self._known.items():
            if name not in value:
                continue
            try:
                text = shape.write(value[name], f"{where}.{name}" if where else name)
            except SchemaError:
                if value[name] is None and name not in self._required:  # tables fill up rows with null
                    continue
                raise
            pairs.append(self._style.text(name) + self._style.key + text)
        return "{" + self._style.item.join(pairs) + "}"


class Named(Shape):
    """Objects of any names, each with a value of one kind.

    Args:
        name: What a name may be: its text with quotes.
        value: What its value may be.
        least: So many pairs at least.
        most: So many at most; None: any number.
        style: How JSON is written.
    """

    def __init__(self, name: Shape, value: Shape, least: int, most: int | None, style: Style) -> None:
        self._name, self._value, self._least, self._most, self._style = name, value, least, most, style

    @cached_property
    def node(self) -> Node:
        """Pairs behind a comma each."""
        pair = Series(self._name.node, self._style.key, self._value.node)
        most = None if self._most is None else self._most - 1
        if most is not None and most < 0:
            return Fixed("{}")
        some = Series(pair, Repeat(Series(self._style.item, pair), max(self._least - 1, 0), most))
        return Series("{", some if self._least else Choice("", some), "}")

    def write(self, value: Any, where: str = "") -> str:
        """The pairs in the order in which they stand."""
        if not isinstance(value, Mapping) or len(value) < self._least:
            raise misfit(value, where, f"an object of {self._least} or more names")
        if self._most is not None and len(value) > self._most:
            raise misfit(value, where, f"an object of at most {self._most} names")
        pairs = [
            self._name.write(k, f"a name in {where or 'the object'}")
            + self._style.key
            + self._value.write(v, f"{where}.{k}")
            for k, v in value.items()
        ]
        return "{" + self._style.item.join(pairs) + "}"


class AnyOf(Shape):
    """Any of some shapes; a value is written by the first that takes it."""

    def __init__(self, options: Sequence[Shape]) -> None:
        self._options = list(options)

    @cached_property
    def node(self) -> Node:
        """A choice."""
        return Choice(*(option.node for option in self._options))

    def write(self, value: Any, where: str = "") -> str:
        """As the first that takes it."""
        errors: list[str] = []
        for option in self._options:
            try:
                return option.write(value, where)
            except SchemaError as error:
                errors.append(str(error))
        raise SchemaError(" Or: ".join(dict.fromkeys(errors)))
