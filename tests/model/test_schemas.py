"""Schemas as text: what an answer may be, how little ends a begun one, and objects written as answers.

Belongs here: nodes, patterns, numbers, JSON schemas, and their Lark. Does not: how a model keeps to them
(test_grammar). The oracles are llguidance, Python's `re` and `decimal`, and Pydantic.
"""

from __future__ import annotations

import functools
import json
import random
import re
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, ValidationError
from tiny import train_tokenizer

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.json_schema import shape_of
from llmchain_fed.model.generation.lark import lark
from llmchain_fed.model.generation.nodes import DIGIT, Chars, Choice, Repeat, Series
from llmchain_fed.model.generation.numbers import number
from llmchain_fed.model.generation.patterns import FORMATS, expression
from llmchain_fed.model.generation.text_nodes import Leaf, StringBody, Text
from llmchain_fed.model.generation.vocabulary import vocabulary_of


@pytest.fixture(scope="module")
def engine():
    """Whether llguidance takes a text as the beginning of an answer, and as a whole one."""
    vocabulary = vocabulary_of(train_tokenizer(), [1], "tiny")

    def accepts(grammar, text):
        matcher = vocabulary.matcher(grammar)
        ids = vocabulary.ids(text.encode(), controls=False)
        begun = matcher.try_consume_tokens(ids) == len(ids)
        return begun, begun and matcher.is_accepting()

    return accepts


NUMBER = Leaf(Series(Choice("-", ""), Choice("0", Series(Chars.of("123456789"), Repeat(DIGIT)))))
STRING = Leaf(Series('"', StringBody(1, 3), '"'))
TREES = {
    "json": (
        Series('{"a": ', STRING, Repeat(Series(", ", Choice(NUMBER, STRING, "null")), 0, 2), "}"),
        ['{"a": ', '"', "x", "\\", "u", "0", "1", ", ", "nul", "null", "-", "12", "}", "é"],
    ),
    "marker": (
        Choice(Text("<t>"), Series(Text("<t>", marked=True), NUMBER, "!")),
        ["<", "t", ">", "<t>", "1", "!", " a", "-"],
    ),
    "pattern": (Series('"', Leaf(expression("^(?:ab?|[c-e]{2,3}|x.y)+$")), '"'), ['"', *"abcdexy", "é"]),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_reads_as_the_engine_does_and_ends_what_has_begun(name, engine):
    """Every text of the alphabet that can begin an answer, up to some hundred: Python and Rust agree on all."""
    node, alphabet = TREES[name]
    grammar, begun = lark(node), [""]
    for text in begun:
        if len(begun) > 600:
            break
        for more in alphabet:
            found = node.read(text + more, 0)
            may_begin, may_end = engine(grammar, text + more)
            assert (found.rest is not None, len(text + more) in found.ends) == (may_begin, may_end), text + more
            if may_begin:
                assert engine(grammar, text + more + found.rest) == (True, True)
                assert len(found.rest) <= node.longest_rest
                begun.append(text + more)
    assert len(begun) > 100


def test_numbers_within_bounds_are_those_that_decimal_finds():
    draw = random.Random(1)
    for _ in range(150):
        low, high = (draw.choice([None, Decimal(draw.randint(-150, 150)), Decimal(draw.randint(-3000, 3000)) / 100])
                     for _ in range(2))  # fmt: skip
        opened, whole = (draw.random() < 0.5, draw.random() < 0.5), draw.random() < 0.5
        texts = {str(i) for i in range(-200, 200)} | {
            f"{draw.uniform(-31, 31):.{k}f}" for k in (1, 2, 3) for _ in range(80)
        }
        texts |= {f"{bound}{zeros}" for bound in (low, high) if bound is not None for zeros in ("", "0", "001")}
        texts = {t for t in texts if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", t) and not (whole and "." in t)}
        texts = {t for t in texts if not (t.startswith("-") and Decimal(t) == 0)}

        def fits(value, low=low, high=high, opened=opened):
            over = low is None or (value > low if opened[0] else value >= low)
            return over and (high is None or (value < high if opened[1] else value <= high))

        wanted = {t for t in texts if fits(Decimal(t))}
        try:
            node = number(low, high, low_open=opened[0], high_open=opened[1], whole=whole)
        except SchemaError:
            assert not wanted
            continue
        assert {t for t in texts if node.whole(t)} == wanted, (low, high, opened, whole)
        assert fits(Decimal(node.shortest))


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_shortest_text_is_one_for_python(name):
    text = expression(f"^(?:{FORMATS[name]})$").shortest
    readers = {
        "date": date.fromisoformat,
        "time": time.fromisoformat,
        "date-time": datetime.fromisoformat,
        "uuid": UUID,
    }
    readers.get(name, str)(text)
    assert re.fullmatch(FORMATS[name], text)


@pytest.mark.parametrize("pattern", [r"^[A-Z]{2}\d{1,3}$", r"^(?:a|bc)+[^x-z]$", r"^\w+@\w+$", '^"\\\\$', r"b{2}"])
def test_a_pattern_takes_what_re_takes(pattern):
    node = expression(pattern)
    draw, checked = random.Random(0), 0
    for _ in range(4000):
        text = "".join(draw.choice('ABabc12xz_@b"\\ ') for _ in range(draw.randint(0, 6)))
        wanted = re.search(pattern, text) is not None
        assert node.whole(json.dumps(text, ensure_ascii=False)[1:-1]) == wanted, text
        checked += wanted
    assert checked or pattern.startswith("^[A-Z]")
    assert re.search(pattern, json.loads(f'"{node.shortest}"'))


class Part(BaseModel):
    kind: Literal["screw", 'a "nut"']
    tags: list[str] = []
    within: Part | None = None


class Report(BaseModel):
    """A report."""

    title: str = Field(min_length=1, max_length=9)
    page: int = Field(ge=1, le=120)
    share: float | None = Field(None, gt=0, lt=1)
    parts: list[Part] = Field(min_length=1, max_length=3)
    day: date
    counts: dict[str, int] = {}
    place: tuple[int, str] = (1, "a")
    code: str = Field("ab", pattern="^[a-c]+$")
    done: bool
    rest: Any = None


EXAMPLE = Report(
    title='É "\n', page=77, share=0.125, day=date(2026, 11, 28), done=True, counts={"a": 1, "b\\": -2},
    rest={"z": [1, None]}, parts=[Part(kind="screw", tags=["x"], within=Part(kind='a "nut"'))],
)  # fmt: skip


def test_an_object_is_written_as_an_answer_that_gives_it_back():
    shape = shape_of(Report.model_json_schema())
    text = shape.write(EXAMPLE.model_dump(mode="json"))
    assert Report.model_validate_json(text) == EXAMPLE
    assert shape.node.whole(text)
    assert json.loads(text) == EXAMPLE.model_dump(mode="json")
    assert text == json.dumps(EXAMPLE.model_dump(mode="json"), ensure_ascii=False)


def test_wherever_an_answer_stands_its_shortest_end_makes_a_valid_one():
    shape = shape_of(Report.model_json_schema())
    text = shape.write(EXAMPLE.model_dump(mode="json"))
    for cut in range(len(text) + 1):
        rest = shape.node.read(text[:cut], 0).rest
        assert rest is not None, text[:cut]
        assert len(rest) <= shape.node.longest_rest
        Report.model_validate_json(text[:cut] + rest)


def test_the_engine_takes_what_is_written(engine):
    shape = shape_of(Report.model_json_schema())
    grammar = lark(shape.node)
    assert engine(grammar, shape.write(EXAMPLE.model_dump(mode="json"))) == (True, True)
    assert engine(grammar, shape.node.shortest) == (True, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": "much too long"}, "title is 'much too long', and the schema wants a string of 1 to 9 characters"),
        ({"page": 121}, "page is 121, and the schema wants a whole number from 1 to 120"),
        ({"page": 7.5}, "page is 7.5"),
        ({"parts": []}, "parts is [], and the schema wants an array of 1 to 3 items"),
        ({"parts": [{"kind": "bolt"}]}, "parts[0].kind is 'bolt', and the schema wants one of \"screw\""),
        ({"done": None}, "done is None"),
        ({"code": "abx"}, "code is 'abx'"),
        ({"other": 1}, "'other' is unknown"),
        ({"share": 1.0}, "share is 1.0"),
    ],
)
def test_a_value_that_does_not_fit_says_where(change, said):
    data = EXAMPLE.model_dump(mode="json") | change
    if "other" not in change:  # which Pydantic passes over
        with pytest.raises(ValidationError):
            Report.model_validate_json(json.dumps(data))
    with pytest.raises(SchemaError) as error:
        shape_of(Report.model_json_schema()).write(data)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "minLength": 3, "maxLength": 2}, "no value fits"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no whole number between"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "no value fits"),
        ({"enum": []}, "no value fits"),
        (
            {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}, "$ref": "#/$defs/a"},
            "no value",
        ),
        ({"type": "string", "not": {"const": "a"}}, "'not' is not known here"),
        ({"type": "number", "multipleOf": 0.1}, "'multipleOf' is not known"),
        ({"type": "string", "pattern": "(?=a)b"}, "looks around itself"),
        ({"type": "string", "pattern": "("}, "no regular expression"),
        ({"$ref": "#/$defs/gone"}, "leads nowhere"),
        ({"$ref": "https://example.org/schema"}, "leads elsewhere"),
        ({"type": "text"}, "is no type"),
        ({"type": "string", "minLength": 10**12}, "no answer is so long"),
        ({"type": "array", "minItems": 10**9, "items": {"type": "string", "pattern": "^(?:a{999}){999}$"}}, "so long"),
        (functools.reduce(lambda s, _: {"type": "array", "items": s}, range(2000), {}), "nested too deep"),
    ],
)
def test_a_schema_that_no_answer_can_keep_to_is_refused(schema, said):
    with pytest.raises(SchemaError, match=re.escape(said)):
        shape_of(schema)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ({"oneOf": [{"type": "string", "maxLength": 1}, {"type": "number"}]}, 0.5),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}], "type": "object"}, {"a": 1}),
        ({"type": ["string", "null"], "enum": ["a", None]}, None),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False, "minItems": 1}, [3]),
        ({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}, {"x": True, "y": False}),
        ({"const": {"a": [1, "é"]}}, {"a": [1, "é"]}),
        ({"type": "number"}, 1e-07),
        ({"type": "number"}, 1.5e21),
        ({}, [{"a": None}, "b", -1.5]),
    ],
)
def test_a_value_comes_back(schema, value):
    shape = shape_of(schema)
    text = shape.write(value)
    assert json.loads(text) == value
    assert shape.node.whole(text)
    json.loads(shape.node.shortest)
