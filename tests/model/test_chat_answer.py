"""Answers as a chat template writes them, and answers taken apart into what was thought and what is said.

Belongs here: one answer's text. Does not: conversations (data/test_dialogues), verbs (chain/test_messages). The oracles
are texts written by hand and `str.partition`.
"""

from __future__ import annotations

import re

import pytest
from chat_templates import FORGETS, OPENS, TOOLS, TRIMS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_kinds import make_module, make_tokenizer

from llmchain_fed import ChatTemplateError, LocalModel
from llmchain_fed.model.chat_answer import Parting, answer_text, opens_reasoning, parted

CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
PLAIN = {"role": "assistant", "content": "hallo welt"}
THOUGHT = {**PLAIN, "reasoning_content": "a greeting"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("byte-level")


def written(tokenizer, template, answer, **options):
    tokenizer.chat_template = template
    controls = frozenset({"<pad>", "<bos>", "<eos>"})
    return answer_text(tokenizer, answer, {}, controls=controls, name="tiny", **options)


WRITTEN = {
    ("TOOLS", "plain"): "hallo welt",
    ("TOOLS", "thought"): "<think>\na greeting\n</think>\n\nhallo welt",
    ("TOOLS", "calling"): '<call>weather {"city": "Bern"}</call>' * 2,
    ("FORGETS", "plain"): "<think>\n\n</think>\n\nhallo welt",
    ("FORGETS", "thought"): "<think>\na greeting\n</think>\n\nhallo welt",
    ("FORGETS", "calling"): None,
    ("OPENS", "plain"): "</think>\n\nhallo welt",
    ("OPENS", "thought"): "a greeting\n</think>\n\nhallo welt",
    ("OPENS", "calling"): "</think>\n\n" + '<call>weather {"city": "Bern"}</call>' * 2,
    ("TRIMS", "plain"): "hallo welt",
    ("TRIMS", "thought"): "<think>\na greeting\n</think>\n\nhallo welt",
    ("TRIMS", "calling"): None,
}
TEMPLATES = {"TOOLS": TOOLS, "FORGETS": FORGETS, "OPENS": OPENS, "TRIMS": TRIMS}
ANSWERS = {"plain": PLAIN, "thought": THOUGHT, "calling": CALLING}


@pytest.mark.parametrize(("template", "answer"), WRITTEN)
def test_an_answer_is_written_as_the_template_writes_it(template, answer, tokenizer):
    assert written(tokenizer, TEMPLATES[template], ANSWERS[answer]) == WRITTEN[template, answer]


def test_what_a_template_trims_is_trimmed(tokenizer):
    assert written(tokenizer, TRIMS, {**PLAIN, "content": " hallo\n"}) == "hallo"
    assert written(tokenizer, TOOLS, {**PLAIN, "content": " hallo\n"}) == " hallo\n"


def test_a_template_that_drops_a_calls_arguments_does_not_write_it(tokenizer):
    names = TOOLS.replace("{{ c.function.arguments | tojson }}", "")
    assert names != TOOLS
    assert written(tokenizer, names, CALLING) is None


def test_a_template_that_refuses_the_answer_does_not_write_it(tokenizer):
    assert (
        written(tokenizer, "{{ messages[0].content }}{{ raise_exception('no') if messages|length > 1 }}", PLAIN) is None
    )


def test_an_end_of_a_turn_that_is_the_calls_alone_is_no_part_of_the_answer(tokenizer):
    other = TOOLS.replace("<eos>{% endgeneration %}", "{{ '!<eos>?' if m.tool_calls else '<eos>' }}{% endgeneration %}")
    assert other != TOOLS
    assert written(tokenizer, other, CALLING) == WRITTEN["TOOLS", "calling"] + "!"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("where", ["content", "reasoning_content", "arguments"])
def test_control_tokens_that_an_answer_spells_stay_text(template, where, tokenizer):
    """Ids: as many control tokens as the template itself writes, and decoded they are the text."""
    text = "a<eos>b<|user|>"
    if where == "arguments":
        answer = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": text}}}]}
    else:
        answer = {**THOUGHT, where: text}
    found = written(tokenizer, TEMPLATES[template], answer)
    if found is None:
        assert where == "arguments"
        return
    model = LocalModel(make_module(tokenizer), tokenizer)
    (ids,) = model.encode_completions([found], controls={"<|user|>", "<|assistant|>", "<|system|>"})
    assert text in found
    assert [i for i in ids if i < 6] == [2]  # the end token behind it alone
    assert tokenizer.decode(ids[:-1]) == found


def test_the_tags_that_a_template_writes_are_its_tokens(tokenizer):
    """A call's tag that is an added token is that token in training, where a user's text that spells it is not."""
    own = make_tokenizer("byte-level")
    own.add_tokens(["<call>", "</call>"])
    found = written(own, TOOLS, {**CALLING, "content": "<call>"})
    model = LocalModel(make_module(own), own)
    (ids,) = model.encode_completions([found], controls={"<call>", "</call>"})
    tag, end = own.convert_tokens_to_ids(["<call>", "</call>"])
    assert (ids.count(tag), ids.count(end)) == (2, 2)
    assert own.decode(ids[:-1]) == found == "<call>" + WRITTEN["TOOLS", "calling"]


def test_a_tool_that_spells_a_control_token_is_refused(tokenizer):
    tool = {"type": "function", "function": {"name": "f", "description": "a<eos>"}}
    with pytest.raises(ChatTemplateError, match="the description of a tool spells the control token '<eos>'"):
        written(tokenizer, TOOLS, PLAIN, tools=[tool])


def test_whether_the_template_opens_the_reasoning_is_seen(tokenizer):
    opened = {}
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        opened[name] = opens_reasoning(tokenizer, {}, name="tiny")
    assert opened == {"TOOLS": False, "FORGETS": False, "OPENS": True, "TRIMS": False}


# --- taken apart -----------------------------------------------------------------------------------------------------


def by_hand(text, opened):
    if not opened:
        begun = re.match(r"\s*<think>", text)
        if not begun:
            return "", text
        text = text[begun.end() :]
    reasoning, _, content = text.partition("</think>")
    return reasoning.strip("\n"), content.lstrip("\n")


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " ", "<", "</", "think>", "<th"]), max_size=9)


@given(PIECES, st.booleans(), st.lists(st.integers(1, 5), max_size=20))
@settings(max_examples=300, deadline=None)
def test_an_answer_is_taken_apart_alike_at_once_and_piece_by_piece(pieces, opened, cuts):
    text = "".join(pieces)
    assert parted(text, opened=opened) == by_hand(text, opened)
    parting, found, at = Parting(opened=opened), [], 0
    for length in [*cuts, len(text) + 1]:
        found += parting.feed(text[at : at + length])
        at += length
    found += parting.end()
    assert all(part for _, part in found)
    joined = ("".join(p for kind, p in found if kind == which) for which in ("reasoning", "content"))
    assert tuple(joined) == by_hand(text, opened)


def test_text_that_is_no_tag_is_not_kept_back():
    parting = Parting()
    assert [list(parting.feed(piece)) for piece in ("He", "llo <th")] == [[("content", "He")], [("content", "llo <th")]]
    parting = Parting()
    fed = [list(parting.feed(piece)) for piece in ("<thi", "nk>\nwh", "y\n", "so", "\n</thi", "nk>\n", "\nHi")]
    said = [[], [("reasoning", "wh")], [("reasoning", "y")], [("reasoning", "\nso")], [], [], [("content", "Hi")]]
    assert fed == said
