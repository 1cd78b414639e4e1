"""What a JSON schema says is kept to or refused: keywords beside one another, references, sizes, and what is no schema.

Belongs here: `shape_of` against JSON Schema. Does not: how texts are read (test_schemas), models (test_grammar). The
oracle is jsonschema's validator, which reads the schema by itself.
"""

from __future__ import annotations

import json
import time
from datetime import date, timedelta
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import HttpUrl, TypeAdapter
from tiny import train_tokenizer

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.json_schema import shape_of
from llmchain_fed.model.generation.lark import lark
from llmchain_fed.model.generation.patterns import FORMATS, expression
from llmchain_fed.model.generation.vocabulary import vocabulary_of

jsonschema = pytest.importorskip("jsonschema")


def takes(schema, value):
    """Whether a completion is taken, and then whether what is taught is an answer that gives it back."""
    shape = shape_of(schema)
    try:
        text = shape.write(value)
    except SchemaError:
        return False
    assert shape.node.whole(text)
    assert json.loads(text) == value
    return True


INNER = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5}}, "required": ["a"]}
DEFS = {"n": {"type": "integer"}, "a/b": {"type": "integer"}, "c~d e": {"type": "integer"}, "S": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string", "pattern": "^a*$", "maxLength": 3}, ["", "aaa", "aaaa", "b"]),
        ({"type": "string", "pattern": "^[0-9]+$", "minLength": 4}, ["1234", "123", "12345678"]),
        ({"type": "string", "pattern": "b", "maxLength": 2}, ["b", "xb", "xbx", "aa"]),
        ({"type": "string", "pattern": "^[A-Z]{2}\\d*$", "minLength": 4, "maxLength": 5}, ["AB1", "AB12", "AB1234"]),
        ({"type": "string", "pattern": '^["\\\\]*$', "minLength": 2, "maxLength": 2}, ['"\\', '"""', '"']),
        ({"type": "string", "format": "date", "maxLength": 10}, ["2024-01-31", "2024-02-30"]),
        ({"type": "string", "format": "uri", "maxLength": 12}, ["http://a.de", "http://aaaaaaaaaa.de"]),
        ({"type": "integer", "enum": [1, 2, 3], "minimum": 2}, [1, 2, 3]),
        ({"enum": ["a", "bb", 1], "maxLength": 1}, ["a", "bb", 1]),
        ({"enum": ["ab", "b"], "pattern": "^a"}, ["ab", "b"]),
        ({"enum": [1, 2.0, True, None], "const": 2}, [1, 2, 2.0]),
        ({"type": "number", "enum": [1, "1"]}, [1, "1"]),
        ({"const": {"a": 1, "b": [None]}}, [{"b": [None], "a": 1}, {"a": 1}]),
        ({"allOf": [INNER, {"properties": {"a": {"maximum": 9}}}]}, [{"a": 5}, {"a": 1}, {"a": 10}, {"a": 5.5}, {}]),
        ({"$defs": DEFS, "allOf": [{"$ref": "#/$defs/a~1b"}]}, [1, "not an int"]),
        ({"$defs": DEFS, "allOf": [{"$ref": "#/$defs/c~0d%20e"}]}, [1, "not an int"]),
        ({"$defs": DEFS, "$ref": "#/$defs/n", "minimum": 3}, [2, 3]),
        ({"$defs": DEFS, "$ref": "#/$defs/S", "maxLength": 2}, ["ab", "abc"]),
        ({"$defs": DEFS, "allOf": [{"$ref": "#/$defs/n"}, {"maximum": 3}, {"minimum": 3}]}, [2, 3, 4]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "maxLength": 2}, ["ab", None, "abc"]),
        ({"anyOf": [{"minimum": 5}, {"maximum": 1}], "type": "integer"}, [1, 3, 5]),
        ({"allOf": [{"anyOf": [{"minimum": 5}, {"maximum": 1}]}, {"enum": [0, 3, 9]}], "type": "integer"}, [0, 3, 9]),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, [1, 1.5]),
        ({"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
                    {"properties": {"b": {"type": "string"}}}]}, [{"a": "x"}, {"b": "x"}]),
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, [[1], [1, 2]]),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[], [1], [1, 1]]),
        ({"oneOf": [{"type": "integer", "maximum": 0}, {"type": "integer", "minimum": 5}]}, [0, 3, 5]),
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"]},
         [{"k": "a"}, {"k": "b"}, {"k": "c"}, {}]),
        ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, [{"a": 1, "b": 2}, {"a": 1}]),
        ({"type": "object", "propertyNames": {"pattern": "^x"}, "properties": {"xa": {}, "b": {}}},
         [{"xa": 1}, {"b": 1}]),
        ({"type": "number", "minimum": 0, "maximum": 1}, [1e-5, 1e-7, 0.1 + 0.2, 1, 1.0000001]),
        ({"type": "number", "minimum": 0}, [1e20, 1.5e25, 1e-12, -1e-12]),
        ({"type": "number", "exclusiveMaximum": 0}, [-1e20, -1e-9, 0]),
        ({"type": "number", "maximum": 1e30}, [1e20, -1e40, 1e31]),
        ({"type": "integer"}, [2**63 - 1, -(2**63), 1234567890123456789, 0, 3.5]),
        ({"type": "integer", "minimum": 0}, [1234567890123456789, -1]),
        ({"type": "number", "multipleOf": 1}, [3, 3.5]),
    ],
)  # fmt: skip
def test_keywords_that_stand_beside_one_another_all_hold(schema, values):
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    if isinstance(schema.get("items"), list):
        check = jsonschema.Draft7Validator(schema)
    assert [takes(schema, value) for value in values] == [check.is_valid(value) for value in values]
    assert check.is_valid(json.loads(shape_of(schema).node.shortest))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "format": "date", "pattern": "^2024"}, "a pattern beside a format"),
        ({"type": "string", "format": "regex"}, "the format 'regex' is not known"),
        ({"type": "string", "format": "foo"}, "the format 'foo' is not known"),
        ({"type": "string", "pattern": "a*b", "minLength": 4}, "a length of at least 4 beside the pattern"),
        ({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}, "'pattern' stands in two schemas"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "have values in common"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"allOf": [{"$ref": "#/$defs/gone"}]}, "leads nowhere"),
        ({"allOf": [{"$ref": "http://x/y.json#/A"}]}, "leads elsewhere"),
        ({"$ref": "#name", "$defs": {"A": {"$anchor": "name", "type": "integer"}}}, "leads elsewhere"),
        ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"$ref": "#/$defs/A"}}}, "nothing but itself"),
        ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"allOf": [{"$ref": "#/$defs/A"}]}}}, "nothing but itself"),
        ({"const": 5, "enum": [1, 2]}, "no value fits"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}}, "'patternProperties'"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(schema, said):
    with pytest.raises(SchemaError, match=said):
        shape_of(schema)


def test_a_whole_number_of_more_than_64_bits_is_refused_with_the_reason():
    with pytest.raises(SchemaError, match="a whole number of at most 64 bits"):
        shape_of({"type": "integer"}).write(2**63)


def test_a_tag_that_tells_options_apart_is_there_even_with_a_default():
    """Pydantic writes a tag with a default as optional, and does not read an object without it."""
    options = [{"type": "object", "properties": {"k": {"const": k, "default": k}}} for k in "ab"]
    with pytest.raises(SchemaError, match="in common"):
        shape_of({"oneOf": options})
    assert shape_of({"oneOf": options, "discriminator": {"propertyName": "k"}}).node.shortest == '{"k": "a"}'


def test_null_for_what_may_be_left_out_leaves_it_out():
    """Tables have one set of columns for all rows, and put null where a row has no such value."""
    shape = shape_of(
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a"]}
    )
    assert shape.write({"a": "x", "b": None}) == '{"a": "x"}'
    with pytest.raises(SchemaError, match="a is None"):
        shape.write({"a": None})
    may = shape_of({"type": "object", "properties": {"b": {"type": ["string", "null"]}}})
    assert may.write({"b": None}) == '{"b": null}'


# --- formats --------------------------------------------------------------------------------------------------------


def test_every_day_there_is_is_a_date_and_no_other():
    node = expression(f"^(?:{FORMATS['date']})$")
    for start in (date(1899, 12, 25), date(2000, 1, 1), date(2023, 12, 25)):
        assert all(node.whole(str(start + timedelta(days=i))) for i in range(430))
    for year in (1900, 2000, 2023, 2024, 2100):
        for month in range(1, 13):
            for day in (0, 29, 30, 31, 32):
                text = f"{year}-{month:02}-{day:02}"
                try:
                    date.fromisoformat(text)
                except ValueError:
                    assert not node.whole(text), text
                else:
                    assert node.whole(text), text
    assert node.whole("0001-01-01")
    assert not node.whole("0000-01-01")


def test_addresses_are_those_that_python_reads():
    node = expression(f"^(?:{FORMATS['ipv6']})$")
    taken = 0
    for text in (
        "::", "::1", "1::", "2001:db8::8a2e:370:7334", "fe80::1:2:3:4", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "a:b::c:d",  # noqa: E501
        "1:2:3:4:5:6:7", "1::2::3", ":1", "12345::", "g::", "1:2:3:4:5:6:7:8:9", ":::", "1:2:3:4:5:6:7:8::", "hello",
    ):  # fmt: skip
        try:
            ip_address(text)
        except ValueError:
            assert not node.whole(text), text
        else:
            taken += node.whole(text)
    assert taken == 8


@pytest.mark.parametrize("seed", range(3))
def test_addresses_of_pages_are_read_by_pydantic(seed):
    import random

    node = expression(f"^(?:{FORMATS['uri']})$")
    draw, read = random.Random(seed), TypeAdapter(HttpUrl)
    for _ in range(60):
        text = ""
        for _ in range(draw.randint(0, 40)):
            text += draw.choice(["http", "s", "://", "a", "9", "-", ".", "/", "?", "#", "%41", ":8", "x.de", "~"])
            if node.read(text, 0).rest is None:
                text = text[:-1] if node.read(text[:-1], 0).rest is not None else ""
        read.validate_python(text + node.read(text, 0).rest)
    assert not node.whole("http://99999999999")
    assert node.whole("https://example.org/a%20b?c=d&e=f#g")


@pytest.mark.parametrize("name", FORMATS)
def test_the_engine_knows_every_format(name):
    vocabulary = vocabulary_of(train_tokenizer(), [1], "tiny")
    shape = shape_of({"type": "string", "format": name, "maxLength": 200})
    matcher = vocabulary.matcher(lark(shape.node))
    ids = vocabulary.ids(shape.node.shortest.encode(), controls=False)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


# --- sizes ----------------------------------------------------------------------------------------------------------


def mutual(count):
    """Definitions of which each contains all."""
    properties = {f"p{j}": {"$ref": f"#/$defs/D{j}"} for j in range(count)}
    return {
        "$ref": "#/$defs/D0",
        "$defs": {f"D{i}": {"type": "object", "properties": properties} for i in range(count)},
    }


def wide(**part):
    return {
        "type": "object",
        "properties": {f"p{i}": part for i in range(120)},
        "required": [f"p{i}" for i in range(120)],
    }


def doubled(depth):
    """Two of each within each, by name: 2^depth places of a schema of so many parts."""
    defs = {f"D{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/D{i + 1}", "title": k} for k in "ab"}}
            for i in range(depth)}  # fmt: skip
    return {"$ref": "#/$defs/D0", "$defs": defs | {f"D{depth}": {"type": "integer"}}}


def alternatives(depth):
    parts = [{"anyOf": [{"minimum": i}, {"maximum": -i}, {"multipleOf": 1}]} for i in range(1, depth)]
    return {"type": "integer", "allOf": parts}


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        mutual(7), mutual(40), wide(type="string", minLength=10**6), wide(type="string", minLength=10**5), doubled(40),
        doubled(400), alternatives(12), nested(63), nested(64), nested(900), {"enum": list(range(30_000))}, {},
        {"type": "array", "prefixItems": [{}] * 2000}, {"type": "string", "minLength": 10**400},
        {"type": "number", "maximum": 10**5000, "minimum": 5e-324}, {"type": "integer", "minimum": 10**39},
        {"type": "string", "pattern": "(" * 90 + "a" + "*)" * 90}, {"oneOf": [{"const": i} for i in range(900)]},
    ],
)  # fmt: skip
def test_a_schema_is_read_or_refused_within_a_second(schema):
    begun = time.process_time()
    try:
        shape = shape_of(schema)
        assert len(lark(shape.node)) < 10**6
        assert shape.node.whole(shape.node.shortest)
    except SchemaError:
        pass
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("count", [300, 900])
def test_an_object_of_many_properties_is_not_deep(count):
    names = [f"p{i}" for i in range(count)]
    shape = shape_of(
        {"type": "object", "properties": {n: {"type": "integer"} for n in names}, "required": names[1::100]}
    )
    value = {name: i for i, name in enumerate(names) if i % 7 == 0 or i % 100 == 1}
    text = shape.write(value)
    assert json.loads(text) == value
    assert shape.node.whole(text)
    for cut in (1, 20, len(text) // 2, len(text) - 1):
        assert json.loads(text[:cut] + shape.node.read(text[:cut], 0).rest)
    if count == 300:
        vocabulary = vocabulary_of(train_tokenizer(), [1], "tiny")
        text = shape.write({names[1]: 1, names[101]: 2, names[201]: 3, names[250]: 4})
        matcher = vocabulary.matcher(lark(shape.node))
        ids = vocabulary.ids(text.encode(), controls=False)
        assert matcher.try_consume_tokens(ids) == len(ids)
        assert matcher.is_accepting()


def test_schemas_that_contain_one_another_are_followed_a_few_times():
    value = {"p1": {"p0": {"p1": {"p1": {}}}}}
    assert takes(mutual(2), value)


# --- what is no schema ----------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),  # noqa: E501
                    max_leaves=6)  # fmt: skip
COUNT, BOUND = st.integers(0, 4), st.integers(-4, 4) | st.sampled_from([0.5, -1.25, 2.0])
REFERENCE = st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/$defs/gone", "#x", "http://a"])
TYPES = ["string", "number", "integer", "boolean", "null", "object", "array"]


def schemas(part):
    return st.fixed_dictionaries({}, optional={
        "type": st.sampled_from(TYPES) | st.lists(st.sampled_from(TYPES), min_size=1, max_size=3),
        "enum": st.lists(JSON, max_size=3), "const": JSON, "minimum": BOUND, "maximum": BOUND,
        "exclusiveMinimum": BOUND, "exclusiveMaximum": BOUND, "minLength": COUNT, "maxLength": COUNT,
        "minItems": COUNT, "maxItems": COUNT, "minProperties": COUNT, "maxProperties": COUNT,
        "pattern": st.sampled_from(["^a+$", "b", "^[xy]{2,3}$"]), "format": st.sampled_from(["date", "ipv4", "foo"]),
        "properties": st.dictionaries(st.sampled_from("ab"), part, max_size=2),
        "required": st.lists(st.sampled_from("abc"), max_size=2), "additionalProperties": part,
        "propertyNames": part, "items": part, "prefixItems": st.lists(part, max_size=2), "uniqueItems": st.booleans(),
        "anyOf": st.lists(part, min_size=1, max_size=3), "oneOf": st.lists(part, min_size=1, max_size=2),
        "allOf": st.lists(part, min_size=1, max_size=2), "$ref": REFERENCE,
    })  # fmt: skip


SCHEMA = st.recursive(st.booleans() | schemas(st.booleans()), schemas, max_leaves=5)
WHOLE = st.builds(lambda top, a, b: {**top, "$defs": {"a": a, "b": b}}, schemas(SCHEMA), SCHEMA, SCHEMA)
FUZZ = settings(max_examples=80, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(WHOLE, JSON)
def test_whatever_is_taken_or_answered_is_valid_by_the_schema(schema, value):
    try:
        shape = shape_of(schema)
    except SchemaError:
        return
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    answer = json.loads(shape.node.shortest)
    assert check.is_valid(answer), answer
    assert shape.node.whole(shape.write(answer))
    try:
        text = shape.write(value)
    except SchemaError:
        return
    assert shape.node.whole(text)
    assert check.is_valid(json.loads(text))


KEYWORDS = sorted(
    ["type", "enum", "const", "minimum", "exclusiveMinimum", "minLength", "maxLength", "minItems", "minProperties",
     "pattern", "format", "properties", "required", "additionalProperties", "propertyNames", "items", "prefixItems",
     "uniqueItems", "anyOf", "oneOf", "allOf", "$ref", "$defs", "nullable", "discriminator", "multipleOf", "title"]
)  # fmt: skip
HOSTILE = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3)
                       | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(max_size=2), part, max_size=4), max_leaves=8)  # fmt: skip  # noqa: E501


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYWORDS), HOSTILE | REFERENCE, max_size=4), HOSTILE)
def test_what_is_no_schema_is_refused_as_such(schema, value):
    try:
        shape = shape_of(schema)
        lark(shape.node)
        shape.write(value)
    except SchemaError:
        pass
