"""JSON Schema → what its values look like as text.

Kept to are types, enumerations, properties, items, bounds, lengths, patterns, formats, references and choices. What
only describes is passed over; what restricts and is not known here is refused, for an answer that does not keep to its
schema would be a surprise. References to themselves are followed a few times. Knows JSON Schema (2020-12 and what
Pydantic writes). Knows nothing about tokens, models or Pydantic itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.json_merge import (
    DEPTH,
    DESCRIBES,
    OF_TYPES,
    Flat,
    Followed,
    References,
    apart,
    both,
    checked,
    wrong,
)
from llmchain_fed.model.generation.json_shapes import (
    AnyOf,
    Constants,
    Items,
    Named,
    Properties,
    Scalar,
    Shape,
    Style,
    string,
    told,
)
from llmchain_fed.model.generation.numbers import number
from llmchain_fed.model.generation.patterns import ANNOTATIONS, FORMATS, expression, lengthened

_DEEPEST, _MOST_FIRST = 64, 50
"""levels, and items before the rest"""
_INT32 = 2**31


def shape_of(schema: Mapping[str, Any], style: Style | None = None) -> Shape:
    """What the values of a schema look like.

    Args:
        schema: The JSON Schema.
        style: How JSON is written; by default as Python does.

    Raises:
        SchemaError: No value fits, something in it is not known here, or it is too deep or too large.

    >>> shape_of({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}).node.shortest
    '{"n": 0}'
    """
    try:
        found = _Reader(schema, style or Style()).shape(schema, "", {})
        _ = (found.node.shortest, found.node.longest_rest) if found is not None else ()
    except RecursionError:
        msg = "the schema is nested too deep to be kept to. Make it flatter."
        raise SchemaError(msg) from None
    if found is None:
        msg = "no value fits the schema: it requires itself, or something that there is not. Correct it."
        raise SchemaError(msg)
    return found


class _Reader(References):
    """Reads one schema; a part for which there is no value is None, and whoever requires it is None, too."""

    def __init__(self, root: Any, style: Style) -> None:
        super().__init__(root)
        self._style, self._level = style, 0
        self._kept: dict[Any, Shape | None] = {}

    def shape(self, schema: Any, where: str, followed: Followed) -> Shape | None:
        """What a part of the schema describes.

        Args:
            schema: The part.
            where: Its place, for messages.
            followed: How often references that lead to one another have been followed on the way here.
        """
        self.count(1)
        if self._level >= _DEEPEST:
            msg = f"the schema is nested too deep to be kept to, more than {_DEEPEST} levels. Make it flatter."
            raise SchemaError(msg)
        self._level += 1
        try:
            name = schema.get("$ref") if isinstance(schema, Mapping) and schema.keys() - DESCRIBES == {"$ref"} else None
            if not isinstance(name, str):
                return self._flat_shape(*self._flat(schema, where, followed, ()), where)
            inner = self.following(name, followed)
            key = name, frozenset(inner.items()) if inner is not None else None
            if key not in self._kept:
                target = self.target(name, where)
                self._kept[key] = self.shape(target, name, inner) if inner is not None else None
            return self._kept[key]
        finally:
            self._level -= 1

    # --- references, and schemas of which several must hold ---------------------------------------------------------

    def _flat(self, schema: Any, where: str, followed: Followed, trail: tuple[str, ...]) -> tuple[Flat, Followed]:
        """A part's keywords with those of all that must hold, too: no reference, `allOf` or `oneOf` is left."""
        self.count(1)
        given = checked(schema, where)
        found = {key: value for key, value in given.items() if key not in ("$ref", "allOf", "oneOf")}
        if "oneOf" in given:
            tag = schema.get("discriminator")
            options = self._apart(given["oneOf"], where, followed, tag if isinstance(tag, Mapping) else {})
            found = both(found, {"anyOf": options}, where)
        if "$ref" in given:
            name = given["$ref"]
            if name in trail:
                raise wrong(where, f"the reference {told(name)} leads to nothing but itself")
            target, inner = self.target(name, where), self.following(name, followed)
            if inner is None:
                return {"enum": []}, followed
            part, followed = self._flat(target, where, inner, (*trail, name))
            found = both(found, part, where)
        for one in given.get("allOf", ()):
            part, followed = self._flat(one, where, followed, trail)
            found = both(found, part, where)
        return found, followed

    def _apart(self, options: Sequence[Any], where: str, followed: Followed, tag: Mapping[str, Any]) -> list[Any]:
        """The options of a `oneOf`, of which no two have a value in common: then one is as good as any."""
        if isinstance(tag.get("propertyName"), str):  # whoever reads it wants it there, even where it has a default
            options = [{"allOf": [option, {"required": [tag["propertyName"]]}]} for option in options]
        flats = [self._leaves(option, f"{where}/oneOf/{i}", followed) for i, option in enumerate(options)]
        self.count(sum(map(len, flats)) ** 2 // 20)
        if all(apart(a, b) for one, other in combinations(flats, 2) for a in one for b in other):
            return list(options)
        raise wrong(where, "options of 'oneOf' have values in common, as far as can be seen: 'anyOf' takes those, too")

    def _leaves(self, option: Any, where: str, followed: Followed) -> list[Flat]:
        """The options within an option."""
        flat, inner = self._flat(option, where, followed, ())
        if "anyOf" not in flat:
            return [flat]
        common = {key: value for key, value in flat.items() if key != "anyOf"}
        return [leaf for part in flat["anyOf"] for leaf in self._leaves({"allOf": [common, part]}, where, inner)]

    # --- values of each kind ----------------------------------------------------------------------------------------

    def _flat_shape(self, schema: Flat, followed: Followed, where: str) -> Shape | None:
        if not schema:
            return self._anything(0)
        if "anyOf" in schema:
            common = {k: v for k, v in schema.items() if k != "anyOf"}
            parts = [{"allOf": [common, part]} if common else part for part in schema["anyOf"]]
            return _any([self.shape(part, f"{where}/anyOf/{i}", followed) for i, part in enumerate(parts)])
        if "enum" in schema:
            self.count(len(schema["enum"]))
            values = self._fitting(schema, where, followed)
            return Constants(values, self._style) if values else None
        kinds = schema["type"] if "type" in schema else _guessed(schema)
        if "integer" in kinds and "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return _any([self._of_type(kind, schema, where, followed) for kind in dict.fromkeys(kinds)])

    def _fitting(self, schema: Flat, where: str, followed: Followed) -> list[Any]:
        """The values of an enumeration that the keywords beside it allow."""
        others = {key: value for key, value in schema.items() if key not in ("enum", "type")}
        kinds = schema.get("type", list(OF_TYPES))
        found = []
        for value in schema["enum"]:
            kind = _kind(value)
            if kind not in kinds and not (kind == "integer" and "number" in kinds):
                continue
            bounds = {key: bound for key, bound in others.items() if key in OF_TYPES[kind]}
            if not bounds or _takes(self.shape({"type": [kind], **bounds}, where, followed), value):
                found.append(value)
        return found

    def _of_type(self, kind: str, schema: Flat, where: str, followed: Followed) -> Shape | None:
        made: dict[str, Callable[[], Shape | None]] = {
            "object": lambda: self._object(schema, where, followed),
            "array": lambda: self._array(schema, where, followed),
            "string": lambda: self._string(schema, where),
            "number": lambda: self._number(schema, where, whole=False),
            "integer": lambda: self._number(schema, where, whole=True),
            "boolean": lambda: Constants([True, False], self._style),
            "null": lambda: Constants([None], self._style),
        }
        return made[kind]()

    def _anything(self, level: int) -> Shape | None:
        """Any JSON value, with so many levels around it."""
        key = "anything", level
        if key not in self._kept:
            inner = self._anything(level + 1) if level < DEPTH - 1 else None
            plain = [self._of_type(kind, {}, "", {}) for kind in ("string", "number", "boolean", "null")]
            named = Properties({}, frozenset(), self._style)
            pairs = named if inner is None else Named(string(self._style), inner, 0, None, self._style)
            self._kept[key] = _any([*plain, pairs, Items([], inner, 0, None, self._style)])
        return self._kept[key]

    def _part(self, schema: Any, where: str, followed: Followed) -> Shape | None:
        """What all items or properties are; where nothing is said of them, they may be nested so deep."""
        return self._anything(1) if schema is True or schema == {} else self.shape(schema, where, followed)

    def _object(self, schema: Flat, where: str, followed: Followed) -> Shape | None:
        known, required = dict(schema.get("properties", {})), frozenset(schema.get("required", ()))
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        others = schema.get("additionalProperties", True)
        known |= {name: others for name in schema.get("required", ()) if name not in known}
        names = schema.get("propertyNames", True)
        name = None if names is True else self.shape({"allOf": [{"type": "string"}, names]}, f"{where}/names", followed)
        if not known and others is not False:
            value = self._part(others, f"{where}/*", followed)
            if value is None or (name is None and names is not True):
                return Properties({}, frozenset(), self._style) if not least else None
            if most is not None and most < least:
                return None
            if least > 1:
                raise wrong(where, "'minProperties' above 1 is not known for any names: an answer could repeat one")
            return Named(name or string(self._style), value, least, most, self._style)
        shapes = {k: self.shape(v, f"{where}/{k}", followed) for k, v in known.items()}
        found = {k: v for k, v in shapes.items() if v is not None and (names is True or _takes(name, k))}
        if required - found.keys():
            return None
        if least > len(required) or (most is not None and most < len(found)):
            raise wrong(where, "minProperties and maxProperties are known without properties alone")
        return Properties(found, required, self._style)

    def _array(self, schema: Flat, where: str, followed: Followed) -> Shape | None:
        least, most, items = schema.get("minItems", 0), schema.get("maxItems"), schema.get("items", True)
        given = schema.get("prefixItems", ())
        if len(given) > _MOST_FIRST:
            raise wrong(where, f"{len(given)} 'prefixItems' are too many")
        first = [self.shape(part, f"{where}/{i}", followed) for i, part in enumerate(given)]
        rest = self._part(items, f"{where}/items", followed)
        known = [shape for shape in first if shape is not None]
        if len(known) < len(first):
            known, rest = known[: first.index(None)], None
        if (rest is None and len(known) < least) or (most is not None and most < least):
            return None
        if schema.get("uniqueItems") and (most is None or most > 1) and (rest is not None or len(known) > 1):
            raise wrong(where, "'uniqueItems' is known for one item at most")
        return Items(known, rest, least, most, self._style)

    def _string(self, schema: Flat, where: str) -> Shape | None:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        pattern, format_ = schema.get("pattern"), schema.get("format")
        if most is not None and most < least:
            return None
        if format_ in ANNOTATIONS:
            format_ = None
        if format_ is not None and format_ not in FORMATS:
            raise wrong(where, f"the format {told(format_)} is not known here")
        if format_ is not None and pattern is not None:
            raise wrong(where, "a pattern beside a format is not known here")
        if pattern is None and format_ is None:
            return string(self._style, least, most)
        what = f"the format {format_!r}" if pattern is None else f"the pattern {pattern!r:.80}"
        body = expression(f"^(?:{FORMATS[format_]})$" if format_ is not None else str(pattern))
        try:
            body = lengthened(body, least, what)
        except SchemaError as error:
            raise wrong(where, str(error)) from None
        named = f"a string of {what}" if pattern is None else f"a string that matches {pattern!r:.80}"
        found = string(self._style, least, most, body, named)
        return found if found.node.read("", 0).rest is not None else None

    def _number(self, schema: Flat, where: str, *, whole: bool) -> Shape | None:
        step, format_ = schema.get("multipleOf", 1), schema.get("format")
        whole = whole or ("multipleOf" in schema and step == 1)
        if step != 1:
            raise wrong(where, f"'multipleOf' is not known here but for 1, got {told(step)}")
        low, high, opens = schema.get("minimum"), schema.get("maximum"), [False, False]
        if (bound := schema.get("exclusiveMinimum")) is not None and (low is None or bound >= low):
            low, opens[0] = bound, True
        if (bound := schema.get("exclusiveMaximum")) is not None and (high is None or bound <= high):
            high, opens[1] = bound, True
        if format_ == "int32":
            low, high = (
                (max(-_INT32, low) if low is not None else -_INT32),
                min(_INT32 - 1, _INT32 if high is None else high),
            )
        elif format_ not in (None, "int64", "float", "double"):
            raise wrong(where, f"the format {told(format_)} is not known here")
        bounds = [Decimal(repr(b)) if isinstance(b, float) else None if b is None else Decimal(b) for b in (low, high)]
        try:
            node = number(*bounds, low_open=opens[0], high_open=opens[1], whole=whole)
        except SchemaError as error:
            raise wrong(where, str(error)) from None
        limits = "".join(f" {word} {told(b)}" for word, b in (("from", low), ("to", high)) if b is not None)
        size = " of at most 64 bits" if whole and None in bounds else ""
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        return Scalar(node, kinds, f"{'a whole' if whole else 'a'} number{limits}{size}", self._style)


def _takes(shape: Shape | None, value: Any) -> bool:
    try:
        return shape is not None and bool(shape.write(value))
    except SchemaError:
        return False


def _any(options: Sequence[Shape | None]) -> Shape | None:
    found = [option for option in options if option is not None]
    return AnyOf(found) if len(found) > 1 else found[0] if found else None


def _guessed(schema: Flat) -> list[str]:
    """The types that a schema without one speaks of; all, where it speaks of none."""
    spoken = [kind for kind, keys in OF_TYPES.items() if keys & schema.keys() and kind != "integer"]
    return spoken[:1] or ["string", "number", "boolean", "null", "object", "array"]


def _kind(value: Any) -> str:
    """The type of a JSON value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"
