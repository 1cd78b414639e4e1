"""How calls are written and read: a template's own way found by rendering, ours elsewhere, whole and piece by piece.

Belongs here: texts. Does not: messages and bindings (chain/test_tools). The oracles are texts written by hand, and the
templates themselves.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
from chat_templates import FORGETS, TOOLS, TRIMS
from tokenizers_of_kinds import make_tokenizer

from llmchain_fed.errors import SchemaError
from llmchain_fed.model.generation.json_shapes import Style
from llmchain_fed.model.tool_format import (
    OURS,
    ToolFormat,
    calls_node,
    control_ids,
    shapes_of,
    told,
    told_to_user,
    tool_format,
)
from llmchain_fed.model.tool_reading import Broken, Called, CallReader, Said, read_calls

HERMES = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""as Qwen2.5 writes calls"""
LLAMA = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>\n{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}"
    '<|assistant|>{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<eos>\n'
    "{% else %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""as Llama 3.1 writes its one call"""
XML = TOOLS.replace("{{ c.function.name }} {{ c.function.arguments | tojson }}",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}")  # fmt: skip
"""in no JSON, as Qwen3-Coder does"""


def form(template, **options):
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template = template
    return tool_format(tokenizer, {}, controls=frozenset({"<eos>", "<pad>", "<bos>"}), name="tiny", **options)


def test_a_templates_own_way_is_found():
    hermes = form(HERMES)
    assert (hermes.own, hermes.marker) == (True, "<tool_call>")
    assert hermes.written([("f", '{"a": 1}'), ("g", "{}")]) == OURS.written([("f", '{"a": 1}'), ("g", "{}")])
    llama = form(LLAMA)
    assert (llama.begin, llama.middle, llama.end, llama.again) == ('{"name": "', '", "parameters": ', "}", None)
    with pytest.raises(SchemaError, match="one call an answer, got 2"):
        llama.written([("f", "{}"), ("g", "{}")])
    calls = form(TOOLS)
    assert calls.written([("f", '{"a": "b"}')] * 2) == '<call>f {"a": "b"}</call>' * 2
    assert calls.marker == "<call>"


def test_elsewhere_ours_is_used():
    for template, shows in ((TRIMS, False), (FORGETS, False), (XML, True)):
        found = form(template)
        assert (found.own, found.shows) == (False, shows)
        assert found.begin == OURS.begin


TEXTS = {
    "text": ("Hello {there} <tool", "Hello {there} <tool", [], 0),
    "blank": (" \n", " \n", [], 0),
    "one": (OURS.written([("f", '{"a": "}\\"{"}')]), "", [("f", '{"a": "}\\"{"}')], 0),
    "two behind text": ("Well.\n" + OURS.written([("f", '{"a": [1]}'), ("g", "{}")]), "Well.",
                        [("f", '{"a": [1]}'), ("g", "{}")], 0),
    "loose": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')], 0),
    "parameters": ('<tool_call>\n{"function": {"name": "f", "parameters": {}}}', "", [("f", "{}")], 0),
    "broken": ("<tool_call>\nf(1)", "", [], 1),
    "cut off": ('<tool_call>\n{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ')], 0),
    "text behind": (OURS.written([("f", "{}")]) + "\nDone.", "\nDone.", [("f", "{}")], 0),
    "two apart": (OURS.written([("f", "{}")]) + "and" + OURS.written([("g", "{}")]), "and",
                  [("f", "{}"), ("g", "{}")], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read(name):
    text, said, calls, broken = TEXTS[name]
    found = read_calls(text, OURS)
    assert (found[0], found[1], len(found[2])) == (said, calls, broken)


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_joined_are_what_is_read_at_once(name):
    text = TEXTS[name][0]
    draw = random.Random(0)
    for _ in range(40):
        cuts = sorted({0, len(text), *(draw.randint(0, len(text)) for _ in range(draw.randint(0, 9)))})
        reader, said, calls, broken = CallReader(OURS), "", {}, []
        parts = [part for a, b in pairwise(cuts) for part in reader.feed(text[a:b])]
        for part in [*parts, *reader.end()]:
            if isinstance(part, Said):
                said += part.text
            elif isinstance(part, Broken):
                broken.append(part.text)
            elif isinstance(part, Called):
                name, arguments = calls.get(part.index, ("", ""))
                calls[part.index] = name + (part.name or ""), arguments + part.arguments
        assert (said, list(calls.values()), broken) == read_calls(text, OURS)


PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}


@pytest.mark.parametrize("template", [HERMES, TOOLS])
def test_the_grammar_takes_what_the_template_writes_and_nothing_else(template):
    own = form(template)
    shapes = shapes_of([TOOL], own.style)
    call = own.written([("add", '{"a": 1, "b": "x"}')])
    two = own.written([("add", '{"a": 1}')] * 2)
    for text, several, wanted in (
        (False, True, {call: True, two: True, "Hi": False, "Hi" + call: False}),
        (True, True, {call: True, two: True, "Hi": True, "Hi" + call: True, "": True}),
        (False, False, {call: True, two: False}),
    ):
        node = calls_node(own, shapes, text=text, several=several, controls={})
        assert {t: node.whole(t) for t in wanted} == wanted
        assert not node.whole(call.replace('"a": 1', '"a": "1"'))
        assert not node.whole(call.replace("add", "sub"))
        assert node.whole(node.shortest)


def test_a_tag_that_is_a_special_token_is_that_token():
    tokenizer = make_tokenizer("byte-level")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CALLS]"]})
    ids = control_ids(tokenizer, '[CALLS]{"name": "', None)
    assert ids == {"[CALLS]": tokenizer.convert_tokens_to_ids("[CALLS]")}
    own = ToolFormat(begin='[CALLS]{"name": "', end="}", again=None)
    node = calls_node(own, shapes_of([TOOL], Style()), text=True, several=False, controls=ids)
    assert node.whole('Hi[CALLS]{"name": "add", "arguments": {"a": 3}}')
    assert node.whole("Hi")
    assert not node.whole("Hi[CALLS]")


def test_tools_of_one_name_and_tools_without_one_are_refused():
    other = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(SchemaError, match="two tools are called 'add'"):
        shapes_of([TOOL, other], Style())
    assert list(shapes_of([TOOL, json.loads(json.dumps(TOOL))], Style())) == ["add"]
    with pytest.raises(SchemaError, match="has no name"):
        shapes_of([{"function": {}}], Style())
    with pytest.raises(SchemaError, match=r"parameters of the tool 'f': .*'not' is not known"):
        shapes_of([{"function": {"name": "f", "parameters": {"not": {}}}}], Style())


def test_a_template_without_tools_is_told_of_them_in_messages():
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum"},
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    system, user, assistant, results = told(talk, [TOOL])
    assert system["content"].startswith("Be brief.\n\n# Tools")
    assert json.dumps(TOOL) in system["content"]
    assert assistant == {"role": "assistant", "content": "Well.\n" + OURS.written([("add", '{"a": 1}')])}
    both = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert results == {"role": "user", "content": both}
    assert told_to_user([system, user])[0]["content"] == system["content"] + "\n\nSum"
    assert told([user], []) == [user]
    assert talk[2]["tool_calls"] == [call]  # nobody's messages are changed
