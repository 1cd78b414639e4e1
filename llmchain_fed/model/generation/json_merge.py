"""JSON schemas as mappings: keywords checked, references followed, and the schema of what fits two schemas at once.

Knows keywords (2020-12, older ways of writing them, and OpenAPI's `nullable`). Knows nothing about texts or grammars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.json_shapes import is_text, same_as, told

DESCRIBES = frozenset(
    {
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$schema"),
        *("$id", "$comment", "$defs", "definitions", "$anchor", "discriminator", "contentMediaType", "contentEncoding"),
        *("strict", "name", "propertyOrdering"),
    }
)
"""keywords that say nothing of which values fit"""
OF_TYPES: dict[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "additionalItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_KNOWN = frozenset().union(
    DESCRIBES, *OF_TYPES.values(), {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "nullable"}
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TEXTS = ("pattern", "format", "$ref")
_FLAGS = ("nullable", "uniqueItems")
_MOST_OPTIONS, _MOST_PARTS = 200, 10_000
DEPTH = 4
"""so many times a schema may stand within itself, and of schemas that contain one another twice as many in all"""
Flat = dict[str, Any]
"""the keywords of a schema, checked"""
Followed = Mapping[frozenset[str], int]
"""references that lead to one another → how many of them have been followed on the way to a part"""


def wrong(where: str, what: str) -> SchemaError:
    """The error that a part of a schema cannot be kept to."""
    place = f"at {where.lstrip('/')[:200] or 'its top'}"
    return SchemaError(f"the schema {place}: {what}. An answer could not be kept to it; write it otherwise.")


def checked(schema: Any, where: str) -> Flat:
    """A schema's keywords, each of the type that it must have, in one way of writing.

    `const` becomes an `enum`, lists of items `prefixItems`, draft 4's flags bounds, and `nullable` a further type.

    Raises:
        SchemaError: It is no schema, a keyword has no such value, or one is not known here.
    """
    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise wrong(where, f"{told(schema)} is no schema")
    unknown = sorted(told(k) for k in schema if k not in _KNOWN and not str(k).startswith("x-"))
    if unknown:
        raise wrong(where, f"{', '.join(unknown)} is not known here")
    found = {k: v for k, v in schema.items() if k in _KNOWN and k not in DESCRIBES}
    if "type" in found and not _fits("type", found["type"]):
        raise wrong(where, f"{told(found['type'])} is no type")
    for key, value in found.items():
        if not _fits(key, value):
            raise wrong(where, f"{key!r} is {told(value)}, which is no value of that keyword")
    return _in_one_way(found, where)


def _fits(key: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in _COUNTS:
        return number and 0 <= value < math.inf and value == int(value)
    if key in _BOUNDS:
        return (number and (isinstance(value, int) or math.isfinite(value))) or (
            isinstance(value, bool) and key.startswith("exclusive")
        )
    if key in _TEXTS:
        return isinstance(value, str) and is_text(value)
    if key in _FLAGS:
        return isinstance(value, bool)
    if key in ("anyOf", "oneOf", "allOf"):
        return _is_list(value) and len(value) > 0
    if key in ("enum", "prefixItems"):
        return _is_list(value)
    if key == "required":
        return _is_list(value) and all(isinstance(name, str) and is_text(name) for name in value)
    if key == "properties":
        return isinstance(value, Mapping) and all(isinstance(name, str) and is_text(name) for name in value)
    if key == "type":
        kinds = [value] if isinstance(value, str) else value
        return _is_list(kinds) and all(isinstance(kind, str) and kind in OF_TYPES for kind in kinds)
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _in_one_way(found: Flat, where: str) -> Flat:
    for key in _COUNTS:
        if key in found:
            found[key] = int(found[key])
    for key, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(found.get(key), bool):  # as draft 4 has it
            opened = found.pop(key)
            found |= {key: found.pop(bound)} if opened and bound in found else {}
    if "type" in found:
        found["type"] = [found["type"]] if isinstance(found["type"], str) else list(found["type"])
    if isinstance(found.get("items"), Sequence) and not isinstance(found["items"], str):  # as draft 7 has it
        found["prefixItems"], found["items"] = list(found["items"]), found.get("additionalItems", True)
    found.pop("additionalItems", None)
    if "const" in found:
        values = found.get("enum")
        wanted = found.pop("const")
        found["enum"] = [wanted] if values is None else [v for v in values if same_as(v) == same_as(wanted)]
    if any(same_as(value) is None for value in found.get("enum", ())):
        raise wrong(where, f"'enum' has something that is no JSON value ({told(found['enum'])})")
    if found.pop("nullable", False):  # OpenAPI 3.0
        if "type" in found:
            found["type"] = [*found["type"], "null"]
        else:
            found = {"anyOf": [dict(found), {"type": "null"}]}
    return found


def both(one: Flat, other: Flat, where: str) -> Flat:
    """The schema of what fits both of two checked ones.

    Raises:
        SchemaError: A keyword stands in both whose values do not go together in one.
    """
    merged = {**one, **other}
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            merged[key] = max(a, b)
        elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            merged[key] = min(a, b)
        elif key == "type":
            merged[key] = _types(a, b)
        elif key == "enum":
            known = {same_as(value) for value in b}
            merged[key] = [value for value in a if same_as(value) in known]
        elif key == "required":
            merged[key] = list(dict.fromkeys([*a, *b]))
        elif key == "uniqueItems":
            merged[key] = a or b
        elif key == "propertyNames":
            merged[key] = {"allOf": [a, b]}
        elif key == "anyOf":
            if len(a) * len(b) > _MOST_OPTIONS:
                raise wrong(where, f"{len(a)} and {len(b)} choices of which both must hold are too many")
            merged[key] = [{"allOf": [x, y]} for x in a for y in b]
        elif key not in ("properties", "additionalProperties", "items", "prefixItems") and a != b:
            raise wrong(where, f"{key!r} stands in two schemas of which both must hold")
    _merge_properties(one, other, merged)
    _merge_items(one, other, merged)
    return merged


def _types(one: Sequence[str], other: Sequence[str]) -> list[str]:
    found = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
    return [*found, *(kind for kind in other if kind == "integer" and "number" in one and kind not in found)]


def _merge_properties(one: Flat, other: Flat, merged: Flat) -> None:
    """What one schema says of further properties holds for those that only the other one names."""
    known, theirs = one.get("properties", {}), other.get("properties", {})
    if (known and theirs) or "additionalProperties" in {**one, **other}:
        rest, others = one.get("additionalProperties", True), other.get("additionalProperties", True)
        if known or theirs:
            names = dict.fromkeys([*known, *theirs])
            merged["properties"] = {n: _all(known.get(n, rest), theirs.get(n, others)) for n in names}
        if "additionalProperties" in merged:
            merged["additionalProperties"] = _all(rest, others)


def _merge_items(one: Flat, other: Flat, merged: Flat) -> None:
    first, second = one.get("prefixItems", ()), other.get("prefixItems", ())
    rest, others = one.get("items", True), other.get("items", True)
    if first or second:
        merged["prefixItems"] = [
            _all(first[i] if i < len(first) else rest, second[i] if i < len(second) else others)
            for i in range(max(len(first), len(second)))
        ]
    if "items" in merged:
        merged["items"] = _all(rest, others)


def _all(one: Any, other: Any) -> Any:
    if one is True or one == other:
        return other
    return one if other is True else {"allOf": [one, other]}


class References:
    """Follows the references of one schema, those to themselves a few times.

    Args:
        root: The schema.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._parts = root, 0
        self._reached: dict[str, frozenset[str]] = {}
        self._links: dict[str, set[str]] = {}

    def count(self, parts: int) -> None:
        """Counts parts that were read.

        Raises:
            SchemaError: They are too many to be read in a second.
        """
        self._parts += parts
        if self._parts > _MOST_PARTS:
            msg = f"the schema has more than {_MOST_PARTS:,} parts, references followed. Make it smaller."
            raise SchemaError(msg)

    def target(self, name: str, where: str) -> Any:
        """The part that a reference leads to.

        Raises:
            SchemaError: There is none in this schema.
        """
        if name != "#" and not name.startswith("#/"):
            raise wrong(where, f"the reference {told(name)} leads elsewhere")
        target: Any = self._root
        for step in name[2:].split("/") if name != "#" else ():
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and len(step) < 9 and int(step) < len(target):
                target = target[int(step)]
            else:
                raise wrong(where, f"the reference {told(name)} leads nowhere")
        return target

    def _reach(self, name: str) -> frozenset[str]:
        """The references that a reference leads to, over others."""
        if name not in self._reached:
            found, waiting = set[str](), [name]
            while waiting:
                new = self._within(waiting.pop()) - found
                found |= new
                waiting += new
            self._reached[name] = frozenset(found)
        return self._reached[name]

    def _within(self, name: str) -> set[str]:
        """The references in the part that one leads to."""
        if name not in self._links:
            try:
                waiting = [self.target(name, name)]
            except SchemaError:  # said where the reference is followed, if it is
                waiting = []
            self._links[name] = found = set[str]()
            while waiting:
                part = waiting.pop()
                self.count(1)
                if isinstance(part, Mapping):
                    found |= {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
                    waiting += part.values()
                elif isinstance(part, list):
                    waiting += part
        return self._links[name]

    def following(self, name: str, followed: Followed) -> Followed | None:
        """How often references have been followed behind this one; None where that is too often."""
        reach = self._reach(name)
        circle = frozenset(other for other in reach if name in self._reach(other)) if name in reach else frozenset()
        kept = {ring: count for ring, count in followed.items() if ring & reach}
        if circle:
            kept[circle] = kept.get(circle, 0) + 1
            if kept[circle] > DEPTH * min(len(circle), 2):
                return None
        return kept


# --- oneOf ----------------------------------------------------------------------------------------------------------


def apart(one: Flat, other: Flat) -> bool:
    """Whether no value that is written for one of two checked schemas fits the other, and the other way round.

    Told are other types, other values, bounds that leave no common one, a property that both require with other
    values, and one that a schema requires and the other has no place for.
    """
    if not _types(one.get("type", list(OF_TYPES)), other.get("type", list(OF_TYPES))):
        return True
    if "enum" in one and "enum" in other:
        return not {same_as(v) for v in one["enum"]} & {same_as(v) for v in other["enum"]}
    kinds = [schema.get("type") for schema in (one, other)]
    if all(kind in (["number"], ["integer"]) for kind in kinds):
        return _beyond(one, other, "imum") or _beyond(other, one, "imum")
    if all(kind == ["string"] for kind in kinds):
        return _beyond(one, other, "Length") or _beyond(other, one, "Length")
    if all(kind == ["object"] for kind in kinds):
        return _told_apart(one, other) or (_lacks(one, other) and _lacks(other, one))
    return False


def _beyond(one: Flat, other: Flat, what: str) -> bool:
    """Whether all of one lies above all of the other."""
    low, high = one.get(f"min{what}"), other.get(f"max{what}")
    return low is not None and high is not None and bool(low > high)


def _told_apart(one: Flat, other: Flat) -> bool:
    for name in set(one.get("required", ())) & set(other.get("required", ())):
        values = []
        for schema in (one, other):
            part = schema.get("properties", {}).get(name)
            if isinstance(part, Mapping) and ("const" in part or _is_list(part.get("enum"))):
                values.append({same_as(v) for v in ([part["const"]] if "const" in part else part["enum"])})
        if len(values) == 2 and not values[0] & values[1]:
            return True
    return False


def _lacks(one: Flat, other: Flat) -> bool:
    """Whether what is written for one, which has no properties but its own, is never one of the other's."""
    mine, theirs = one.get("properties", {}), other.get("properties", {})
    if mine and any(name not in mine and name not in one.get("required", ()) for name in other.get("required", ())):
        return True
    return other.get("additionalProperties") is False and any(n not in theirs for n in one.get("required", ()))
