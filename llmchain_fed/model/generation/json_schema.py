"""JSON Schema → what its values look like as text.

Kept to are types, enumerations, properties, items, bounds, lengths, patterns, some formats, references and choices.
What only describes is passed over; what restricts and is not known here is refused, for an answer that does not keep to
its schema would be a surprise. References to themselves are followed a few times. Knows JSON Schema (2020-12 and what
Pydantic writes). Knows nothing about tokens, models or Pydantic itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llmchain_fed.errors import SchemaError
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
)
from llmchain_fed.model.generation.patterns import FORMATS, expression, number

_DEPTH = 4
"""so many times a schema may stand within itself"""
_DESCRIBES = frozenset(
    {
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$schema"),
        *("$id", "$comment", "$defs", "definitions", "discriminator", "contentMediaType", "contentEncoding"),
        *("uniqueItems", "additionalItems", "strict", "name", "nullable", "propertyOrdering"),
    }
)
_OF_TYPES: dict[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_KNOWN = frozenset().union(
    _DESCRIBES, *_OF_TYPES.values(), {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
)


def shape_of(schema: Mapping[str, Any], style: Style | None = None) -> Shape:
    """What the values of a schema look like.

    Args:
        schema: The JSON Schema.
        style: How JSON is written; by default as Python does.

    Raises:
        SchemaError: No value fits, or something in it is not known here.

    >>> shape_of({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}).node.shortest
    '{"n": 0}'
    """
    try:
        found = _Reader(schema, style or Style()).shape(schema, "", {})
        _ = found.node.shortest if found is not None else ""
    except RecursionError:
        msg = "the schema is nested too deep to be kept to. Make it flatter."
        raise SchemaError(msg) from None
    if found is None:
        msg = "no value fits the schema: it requires itself, or something that there is not. Correct it."
        raise SchemaError(msg)
    return found


class _Reader:
    """Reads one schema; a part for which there is no value is None, and whoever requires it is None, too."""

    def __init__(self, root: Any, style: Style) -> None:
        self._root, self._style = root, style
        self._kept: dict[tuple[str, int], Shape | None] = {}

    def shape(self, schema: Any, where: str, followed: Mapping[str, int]) -> Shape | None:
        """What a part of the schema describes.

        Args:
            schema: The part.
            where: Its place, for messages.
            followed: How often each reference has been followed on the way here.
        """
        if schema is False:
            return None
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise _wrong(where, f"{schema!r:.80} is no schema")
        if "$ref" in schema:
            return self._referenced(schema, where, followed)
        unknown = sorted(set(schema) - _KNOWN - {k for k in schema if str(k).startswith("x-")})
        if unknown:
            raise _wrong(where, f"{', '.join(map(repr, unknown))} is not known here")
        if "allOf" in schema:
            return self.shape(self._together(schema, where), where, followed)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                common = {k: v for k, v in schema.items() if k != key and k not in _DESCRIBES}
                parts = [_both(common, part, where) if common else part for part in schema[key]]
                return _any([self.shape(part, f"{where}/{key}/{i}", followed) for i, part in enumerate(parts)])
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else list(schema["enum"])
            values = [v for v in values if "type" not in schema or any(_is(v, t) for t in _listed(schema["type"]))]
            return Constants(values, self._style) if values else None
        kinds = _listed(schema["type"]) if "type" in schema else _guessed(schema)
        if schema.get("nullable") is True and "null" not in kinds:
            kinds = [*kinds, "null"]
        return _any([self._of_type(kind, schema, where, followed) for kind in kinds])

    def _referenced(self, schema: Mapping[str, Any], where: str, followed: Mapping[str, int]) -> Shape | None:
        name = schema["$ref"]
        if not isinstance(name, str) or not name.startswith("#"):
            raise _wrong(where, f"the reference {name!r:.80} leads elsewhere")
        target: Any = self._root
        for step in name[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or step not in target:
                raise _wrong(where, f"the reference {name!r:.80} leads nowhere")
            target = target[step]
        count = followed.get(name, 0)
        if count >= _DEPTH:
            return None
        others = {k: v for k, v in schema.items() if k != "$ref" and k not in _DESCRIBES}
        if others:
            target = _both(others, target, where)
        key = name + repr(sorted(others.items(), key=str)) + repr(sorted(followed.items())), count
        if key not in self._kept:
            self._kept[key] = self.shape(target, name, {**followed, name: count + 1})
        return self._kept[key]

    def _together(self, schema: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        whole: Mapping[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for part in schema["allOf"]:
            while isinstance(part, Mapping) and set(part) == {"$ref"}:
                target: Any = self._root
                for step in str(part["$ref"])[1:].split("/")[1:]:
                    target = target[step] if isinstance(target, Mapping) and step in target else {}
                part = target
            whole = _both(whole, part, where)
        return whole

    def _of_type(self, kind: str, schema: Mapping[str, Any], where: str, followed: Mapping[str, int]) -> Shape | None:
        made: dict[str, Callable[[], Shape | None]] = {
            "object": lambda: self._object(schema, where, followed),
            "array": lambda: self._array(schema, where, followed),
            "string": lambda: self._string(schema, where),
            "number": lambda: self._number(schema, where, whole=False),
            "integer": lambda: self._number(schema, where, whole=True),
            "boolean": lambda: Constants([True, False], self._style),
            "null": lambda: Constants([None], self._style),
        }
        if kind not in made:
            raise _wrong(where, f"{kind!r:.80} is no type")
        return made[kind]()

    def _object(self, schema: Mapping[str, Any], where: str, followed: Mapping[str, int]) -> Shape | None:
        known, required = schema.get("properties") or {}, frozenset(schema.get("required") or ())
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        others = schema.get("additionalProperties", not known)
        if not known and not required and others is not False:
            inner = followed if isinstance(others, Mapping) and others else {**followed, "*": followed.get("*", 0) + 1}
            value = None if inner.get("*", 0) > _DEPTH - 1 else self.shape(others, f"{where}/*", inner)
            if value is None:
                return Properties({}, frozenset(), self._style) if not least else None
            names = schema.get("propertyNames")
            name = self.shape({"type": "string", **names}, f"{where}/propertyNames", followed) if names else None
            return Named(name or string(self._style), value, least, most, self._style)
        shapes = {str(k): self.shape(v, f"{where}/{k}", followed) for k, v in known.items()}
        if any(shapes.get(name) is None for name in required):
            return None
        if least > len(required) or (most is not None and most < len(known)):
            raise _wrong(where, "minProperties and maxProperties are known without properties alone")
        return Properties({k: v for k, v in shapes.items() if v is not None}, required, self._style)

    def _array(self, schema: Mapping[str, Any], where: str, followed: Mapping[str, int]) -> Shape | None:
        least, most, items = schema.get("minItems", 0), schema.get("maxItems"), schema.get("items", True)
        first = [self.shape(part, f"{where}/{i}", followed) for i, part in enumerate(schema.get("prefixItems", ()))]
        anything = items is True or items == {}
        inner = {**followed, "*": followed.get("*", 0) + 1} if anything else followed
        rest = None if anything and inner["*"] > _DEPTH - 1 else self.shape(items, f"{where}/items", inner)
        known = [shape for shape in first if shape is not None]
        if len(known) < len(first):
            known, rest = known[: first.index(None)], None
        if (rest is None and len(known) < least) or (most is not None and most < least):
            return None
        return Items(known, rest, least, most, self._style)

    def _string(self, schema: Mapping[str, Any], where: str) -> Shape | None:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if most is not None and most < least:
            return None
        pattern, format_ = schema.get("pattern"), schema.get("format")
        if pattern is None and format_ in FORMATS:
            body = expression(f"^(?:{FORMATS[format_]})$")
            return string(self._style, body=body, named=f"a string of the format {format_!r}")
        if pattern is None:
            return string(self._style, least, most)
        body = expression(str(pattern))
        if least > 0 or most is not None:
            shortest = len(body.shortest)
            if shortest < least or (most is not None and shortest > most):
                raise _wrong(where, "lengths beside a pattern that they cut are not known here: write them into it")
        return string(self._style, body=body, named=f"a string that matches {pattern!r:.80}")

    def _number(self, schema: Mapping[str, Any], where: str, *, whole: bool) -> Shape | None:
        if "multipleOf" in schema and not (whole and schema["multipleOf"] == 1):
            raise _wrong(where, "'multipleOf' is not known here")
        low, high, opens = schema.get("minimum"), schema.get("maximum"), [False, False]
        for i, key in enumerate(("exclusiveMinimum", "exclusiveMaximum")):
            bound = schema.get(key)
            if bound is True:  # as draft 4 has it
                opens[i] = True
            elif isinstance(bound, (int, float)) and not isinstance(bound, bool):
                if i == 0 and (low is None or bound >= low):
                    low, opens[0] = bound, True
                if i == 1 and (high is None or bound <= high):
                    high, opens[1] = bound, True
        bounds = [None if bound is None else Decimal(str(bound)) for bound in (low, high)]
        try:
            node = number(*bounds, low_open=opens[0], high_open=opens[1], whole=whole)
        except SchemaError as error:
            raise _wrong(where, str(error)) from None
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        limits = f" from {low} to {high}" if low is not None or high is not None else ""
        return Scalar(node, kinds, f"{'a whole' if whole else 'a'} number{limits}", self._style)


def _any(options: Sequence[Shape | None]) -> Shape | None:
    found = [option for option in options if option is not None]
    return AnyOf(found) if len(found) > 1 else found[0] if found else None


def _listed(kind: Any) -> list[str]:
    return [kind] if isinstance(kind, str) else [str(k) for k in kind]


def _guessed(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema without one speaks of; all, where it speaks of none."""
    spoken = [kind for kind, keys in _OF_TYPES.items() if keys & schema.keys() and kind != "integer"]
    return spoken[:1] or ["string", "number", "boolean", "null", "object", "array"]


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,), "integer": (int,), "number": (int, float), "object": (Mapping,), "array": (list, tuple)
    }  # fmt: skip
    return isinstance(value, kinds.get(kind, ()))


def _both(one: Mapping[str, Any], other: Any, where: str) -> Mapping[str, Any]:
    """The schema of what fits both, where no keyword but lists of properties stands in both with different values."""
    if other is True or not isinstance(other, Mapping):
        return one
    merged = dict(one)
    for key, value in other.items():
        if key not in merged or key in _DESCRIBES or merged[key] == value:
            merged[key] = value
        elif key == "properties":
            merged[key] = {**merged[key], **value}
        elif key == "required":
            merged[key] = [*merged[key], *value]
        else:
            raise _wrong(where, f"{key!r} stands in two schemas of which both must hold")
    return merged


def _wrong(where: str, what: str) -> SchemaError:
    place = f"at {where.lstrip('/') or 'its top'}"
    return SchemaError(f"the schema {place}: {what}. An answer could not be kept to it; write it otherwise.")
