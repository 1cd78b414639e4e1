"""`bind_tools`: what a model is told, what it may answer, the messages of it by every verb, and calls as completions.

Belongs here: the chat face. Does not: how calls are written (model/test_tool_format), objects (test_structured).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Literal

import pytest
import torch
from chat_templates import HYBRID, OPENS, THINKS, TOOLS, TRIMS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import JsonOutputToolsParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from tiny import tiny_module
from tokenizers_of_kinds import make_tokenizer

from llmchain_fed import (
    FederatedAveraging,
    LLMChain,
    LocalChatModel,
    LocalModel,
    TrainingConfig,
    evaluate_locally,
)
from llmchain_fed.chain.bare import shared_keywords
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.chain.messages import read
from llmchain_fed.chain.recording import recording
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.data.examples import read_examples, wanted_text
from llmchain_fed.errors import ConfigError, DataError, DialogueError, LLMChainFedError, SchemaError
from llmchain_fed.model.generation.answers import Completion
from llmchain_fed.model.scoring import answer_scores
from llmchain_fed.model.tool_format import OURS


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@tool
def shout(text: str, times: Literal[1, 2] = 1) -> str:
    """Says it aloud."""
    return text.upper() * times


TWO = [add, shout]
CALL = {"name": "add", "args": {"a": 1, "b": 2}, "id": "call00001", "type": "tool_call"}


class Says:
    """A model that answers this text."""

    def __init__(self, text):
        self.text = text

    def answer(self, face, text, run, options, /):
        return Completion(self.text, 0, 0, "stop")


def make_chat(template, **options):
    tokenizer = make_tokenizer("byte-level")
    tokenizer.chat_template = template
    module = tiny_module("causal", len(tokenizer))
    module.config.max_position_embeddings = 4096
    return LocalChatModel(model=LocalModel(module, tokenizer, name="tiny"), max_new_tokens=100, **options)


@pytest.fixture(params=["own", "ours", "opens"])
def chat(request):
    """Over a template that writes tools and calls itself, over one that knows neither, and over one that thinks."""
    return make_chat({"own": TOOLS, "ours": TRIMS, "opens": OPENS}[request.param])


def said(chat, text, *, calls=True):
    """The message that an answer of this text becomes."""
    kwargs = chat.bind_tools(TWO).kwargs if calls else {}
    return chat.message(Completion(text, 1, 1, "stop"), kwargs)


# --- what a model is told -------------------------------------------------------------------------------------------


def test_a_template_with_tools_tells_of_them_itself():
    chat = make_chat(TOOLS)
    schemas = chat.bind_tools(TWO).kwargs["tools"]
    wanted = chat.model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tools=schemas, tokenize=False, add_generation_prompt=True
    )
    assert chat.render("hi", tools=TWO) == wanted
    assert chat.tool_note() == ""


def test_elsewhere_the_system_message_does():
    chat = make_chat(TRIMS)
    text = chat.render([SystemMessage("Be brief."), HumanMessage("hi")], tools=TWO)
    assert text.startswith("<|system|>Be brief.\n\n# Tools")
    assert '"name": "add"' in text
    assert "<tool_call>" in text
    assert text.endswith("<|user|>hi<eos><|assistant|>")
    assert "no place for tools" in chat.tool_note()
    no_system = TRIMS.replace("<|{{ m.role }}|>", "{{ raise_exception('no') if m.role == 'system' }}<|{{ m.role }}|>")
    assert make_chat(no_system).render("hi", tools=TWO).startswith("<|user|># Tools")


def test_calls_and_results_of_a_conversation_are_always_shown(chat):
    talk = [HumanMessage("sum"), AIMessage("", tool_calls=[CALL]), ToolMessage("3", tool_call_id="call00001")]
    for tools in ((), TWO):
        text = chat.render(talk, tools=tools)
        assert '{"a": 1, "b": 2}' in text
        assert text.count("3") >= 1


async def test_every_verb_sends_the_same(chat, monkeypatch):
    sent = []
    encode = LocalModel.encode
    monkeypatch.setattr(LocalModel, "encode", lambda m, texts, **o: sent.extend(texts) or encode(m, texts, **o))
    bound = chat.bind_tools(TWO, tool_choice="any")
    bound.invoke("hi")
    list(bound.stream("hi"))
    bound.batch(["hi", "hi"])
    await bound.ainvoke("hi")
    text = chat.render("hi", tools=TWO)
    assert sent.count(text) == len(sent) == 5


# --- what it may answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_forced_calls_exist_and_fit(chat, temperature):
    chat = chat.model_copy(update={"temperature": temperature})
    for choice in ("any", "required", "shout", {"type": "function", "function": {"name": "shout"}}):
        message = chat.bind_tools(TWO, tool_choice=choice).invoke("hi")
        assert message.tool_calls
        assert not message.invalid_tool_calls
        for call in message.tool_calls:
            assert call["name"] in ("add", "shout") if choice in ("any", "required") else call["name"] == "shout"
            {"add": add, "shout": shout}[call["name"]].invoke(call["args"])


def test_one_call_at_most_where_parallel_ones_are_off(chat):
    chat = chat.model_copy(update={"temperature": 4.0, "max_new_tokens": 300})
    one = chat.bind_tools(TWO, tool_choice="any", parallel_tool_calls=False)
    assert [len(one.invoke(text).tool_calls) for text in ("a", "b", "c")] == [1, 1, 1]
    loose = chat.message(
        Completion(chat.written(AIMessage("", tool_calls=[CALL, CALL]), {"tools": TWO}), 1, 1, "stop"),
        {"tools": one.kwargs["tools"], "parallel_tool_calls": False, "strict": False},
    )
    assert (len(loose.tool_calls), len(loose.invalid_tool_calls)) == (1, 1)
    assert "allows one call" in loose.invalid_tool_calls[0]["error"]


def test_none_of_them_and_a_choice_that_is_none(chat):
    message = chat.bind_tools(TWO, tool_choice="none").invoke("hi")
    assert message.tool_calls == []
    with pytest.raises(ConfigError, match=r"tool_choice .*\('add', 'shout' given\), got 'gone'"):
        chat.bind_tools(TWO, tool_choice="gone")


def test_tools_that_are_none_are_refused(chat):
    with pytest.raises(DataError, match="no tool"):
        chat.bind_tools([3])
    with pytest.raises(DataError, match="a tool of a provider's own"):
        chat.bind_tools([{"type": "web_search"}])
    bad = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(SchemaError, match=r"parameters of the tool 'f': .*'not' is not known here"):
        chat.bind_tools([bad])


@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_a_stream_joined_is_the_answer(chat, choice):
    bound = chat.bind_tools(TWO, tool_choice=choice)
    whole = bound.invoke("hi")
    for chunks in (list(bound.stream("hi")), [chunk async for chunk in bound.astream("hi")]):
        joined = sum(chunks[1:], chunks[0])
        assert isinstance(joined, AIMessageChunk)
        assert joined.content == whole.content
        assert [(c["name"], c["args"]) for c in joined.tool_calls] == [(c["name"], c["args"]) for c in whole.tool_calls]
        assert joined.additional_kwargs == whole.additional_kwargs
    if choice == "any":  # the name comes before the arguments, which come in pieces
        pieces = [c for chunk in chunks for c in chunk.tool_call_chunks]
        assert pieces[0]["name"] in ("add", "shout")
        assert len(pieces) > 3
        assert {c["index"] for c in pieces} == set(range(len(whole.tool_calls)))
    assert [(m.content, len(m.tool_calls)) for m in bound.batch(["hi"] * 2)] == [
        (whole.content, len(whole.tool_calls))
    ] * 2


def test_answers_become_messages(chat):
    form = chat.form({})
    begin = "" if not chat.plan({}).opened else "thinks\n</think>\n\n"
    calls = form.written([("add", '{"a": 1, "b": 2}')])
    message = said(chat, begin + calls)
    assert (message.content, [c["name"] for c in message.tool_calls]) == ("", ["add"])
    assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}
    assert message.additional_kwargs.get("reasoning_content") == ("thinks" if begin else None)
    assert said(chat, begin + calls, calls=False).content == calls  # no tools, no calls
    for name, arguments, error in (
        ("gone", "{}", "names the tool 'gone'"),
        ("add", '{"a": 1}', "'b' is missing"),
        ("add", '{"a": 1, "b": "x"}', "b is 'x'"),
        ("add", '{"a": 1, ', "no JSON"),
    ):
        message = said(chat, begin + form.begin + name + form.middle + arguments + form.end)
        assert message.tool_calls == []
        assert error in message.invalid_tool_calls[0]["error"]


# --- calls as completions -------------------------------------------------------------------------------------------


def test_a_call_is_taught_as_it_is_answered(chat):
    bound = chat.bind_tools(TWO)
    prompt = find_prompt(bound)
    swapped = {**CALL, "args": {"b": 2, "a": 1}}
    (call,) = prompt.calls("sum", AIMessage("Well.", tool_calls=[swapped, CALL]))
    assert call.text == chat.render("sum", tools=TWO)
    message = said(chat, call.completion)
    assert message.content == "Well."
    assert [c["args"] for c in message.tool_calls] == [CALL["args"]] * 2
    assert chat.plan(bound.kwargs).node.whole(call.completion)
    (as_data,) = prompt.calls("sum", {"role": "assistant", "content": "Well.", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}] * 2})  # fmt: skip
    assert as_data == call


def test_completions_that_could_not_be_answered_are_refused(chat):
    def refused(completion, said, **options):
        with pytest.raises(SchemaError, match=said):
            encode_examples([("sum", completion)], chat.model, find_prompt(chat.bind_tools(TWO, **options)))

    refused(AIMessage("", tool_calls=[{**CALL, "name": "gone"}]), "names the tool 'gone', .* are 'add', 'shout'")
    refused(AIMessage("", tool_calls=[{**CALL, "args": {"a": "x", "b": 1}}]), "a is 'x', and the schema wants a whole")
    refused(AIMessage("", tool_calls=[CALL]), "names the tool 'add'", tool_choice="shout")
    refused(AIMessage("", tool_calls=[CALL, CALL]), "one at most", parallel_tool_calls=False)
    refused("three", "a call of a tool", tool_choice="any")


def test_in_our_form_calls_are_ours():
    chat = make_chat(TRIMS)
    assert chat.written(AIMessage("", tool_calls=[CALL])) == OURS.written([("add", '{"a": 1, "b": 2}')])
    thought = AIMessage("", tool_calls=[CALL], additional_kwargs={"reasoning_content": "hm"})
    assert chat.written(thought).startswith("<think>\nhm\n</think>\n\n<tool_call>")


SAYS = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "switches", "thoughts"),
    [
        (HYBRID, {}, ("", "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n")),
        (HYBRID, {"enable_thinking": False}, ("",)),
        (THINKS, {}, ("</think>\n\n", "hm\n</think>\n\n")),
    ],
)
def test_models_that_think_call_tools_too(template, switches, thoughts):
    """Whatever is thought before, calls are read, forced calls exist, and what is taught is what is answered."""
    chat = make_chat(template, chat_template_kwargs=switches)
    bound, forced = chat.bind_tools(TWO), chat.bind_tools(TWO, tool_choice="any")
    assert chat.form(switches).own
    for thought in thoughts:
        with recording(Says(thought + SAYS)):
            for runnable in (bound, forced):
                answer = runnable.invoke("hi")
                assert [(c["name"], c["args"]) for c in answer.tool_calls] == [("add", CALL["args"])]
                assert answer.content == ""
                assert answer.additional_kwargs == ({"reasoning_content": "hm"} if "hm" in thought else {})
    answer = forced.invoke("hi")
    assert answer.tool_calls
    assert not answer.invalid_tool_calls
    for text in ("", "hm")[: len(thoughts)]:  # where thinking is off, an answer has no thoughts
        message = AIMessage("", tool_calls=[CALL], additional_kwargs={"reasoning_content": text} if text else {})
        for runnable in (bound, forced):
            (call,) = find_prompt(runnable).calls("hi", message)
            assert call.completion.endswith(SAYS)
            with recording(Says(call.completion)):
                assert runnable.invoke("hi").tool_calls[0]["args"] == CALL["args"]
    written = [find_prompt(bound).calls("hi", said)[0].completion for said in ("Hello.", AIMessage("Hello."))]
    assert written[0] == written[1]
    with recording(Says(written[0])):
        assert bound.invoke("hi").content == "Hello."


@pytest.mark.parametrize("template", [HYBRID, THINKS])
def test_text_is_taught_as_what_is_said_and_never_as_what_is_thought(template):
    chat = make_chat(template)
    pair = encode_examples([("hi", "Hello.")], chat.model, chat.as_prompt())
    dialogue = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}
    assert pair[0] == encode_examples([dialogue], chat.model, chat.as_prompt())[0]
    with recording(Says(chat.written("Hello."))):
        answer = chat.invoke("hi")
    assert (answer.content, answer.additional_kwargs) == ("Hello.", {})


def test_a_stop_string_would_cut_what_keeps_to_a_schema(chat):
    for runnable in (
        chat.bind_tools(TWO, tool_choice="any"),
        chat.with_structured_output({"title": "T", "type": "object"}),
    ):
        with pytest.raises(ConfigError, match="would cut an answer"):
            runnable.invoke("hi", stop=[","])
    assert chat.bind_tools(TWO).invoke("hi", stop=[","]) is not None


def test_functions_for_tools_are_the_same_in_every_process(chat):
    shared = [shared_keywords(chat, {"tools": [tools]}) for tools in (add, convert_to_openai_tool(add))]
    assert shared[0] == shared[1]
    assert "0x" not in str(shared)


def test_all_that_is_asked_of_a_bound_model_has_what_is_bound(chat):
    """Text, tokens, scores and losses are those of what `invoke` sends: the tools are in it."""
    bound = chat.bind_tools(TWO).with_config(tags=["x"])
    text = chat.render("hi", tools=TWO)
    assert bound.render("hi") == text != chat.render("hi")
    sent = bound.invoke("hi").usage_metadata["input_tokens"]
    assert bound.get_num_tokens_from_messages([HumanMessage("hi")]) == sent
    ids = chat.model.encode([text], add_special_tokens=False)
    answer = chat.model.encode_completions([chat.written("Hello.", {"tools": TWO})])
    with torch.inference_mode():
        assert bound.loglikelihood("hi", "Hello.") == pytest.approx(float(answer_scores(chat.model, ids, answer)[0, 0]))
    labels = ["Hello.", "three"]
    scores = torch.tensor([bound.loglikelihood("hi", label) for label in labels])
    probabilities = bound.classify("hi", labels).probabilities
    assert list(probabilities.values()) == pytest.approx(scores.softmax(0).tolist(), abs=1e-4)
    assert f"{len(ids[0]) + len(answer[0])} tokens, {len(answer[0])} of them" in str(bound.preview(("hi", "Hello.")))
    found = evaluate_locally(bound, [("hi", "Hello.")])
    assert found.loss * found.tokens == pytest.approx(-float(scores[0]), rel=1e-4)


def test_a_chain_whose_answers_would_lose_their_calls_is_refused(chat):
    prompt = ChatPromptTemplate.from_template("{text}")
    with pytest.raises(ConfigError, match="calls would be lost"):
        LLMChain(llm=chat.bind_tools(TWO), prompt=prompt)
    kept = LLMChain(llm=chat.bind_tools(TWO, tool_choice="any"), prompt=prompt, output_parser=JsonOutputToolsParser())
    assert kept.invoke({"text": "hi"})


def test_an_agent_answers_with_an_object(chat):
    class Sum(BaseModel):
        """A sum."""

        value: int

    found = create_agent(chat, [], response_format=Sum).invoke({"messages": [HumanMessage("hi")]})
    assert isinstance(found["structured_response"], Sum)


def test_an_agent_learns_in_a_federation_to_call_its_tools():
    """`create_agent`, two participants: it calls the right tool, reads the result and answers."""
    chat = make_chat(TOOLS)
    agent = create_agent(chat, TWO)

    def asking(text):
        return {"messages": [HumanMessage(text)]}

    sung = AIMessage("", tool_calls=[{**CALL, "name": "shout", "args": {"text": "la"}}])
    greeted = asking("hi"), ["Hello."]
    examples = {
        "a": [(asking("sum"), [AIMessage("", tool_calls=[CALL]), "three"]), greeted],
        "b": [(asking("sing"), [sung, "sung"]), greeted],
    }
    training = TrainingConfig(learning_rate=6e-3, batch_size=4, epochs=2)
    FederatedAveraging(agent, participants=examples, training=training).fit(rounds=50)
    _, call, result, answer = agent.invoke(asking("sum"))["messages"]
    assert [(c["name"], c["args"]) for c in call.tool_calls] == [("add", CALL["args"])]
    assert (result.content, answer.content) == ("3", "three")
    assert agent.invoke(asking("sing"))["messages"][2].content == "LA"
    assert agent.invoke(asking("hi"))["messages"][-1].content == "Hello."


# --- what is no tool ------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}, "k": {"type": "integer"}}, "required": ["q"]}


def function(**fields):
    return {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, **fields}}


@pytest.mark.parametrize(
    "tools",
    [
        [function(name=None)], [function(name="")], [function(name=3)], [function(parameters=[1])],
        [{"type": "function", "function": {"description": "d"}}],
        [function(parameters={"type": "object", "properties": 3})],
        [{"type": "function", "function": "f"}], [{"type": "function"}], [None], [[]], [function(parameters={"a": 1})],
        [function(parameters=functools.reduce(lambda s, _: {"type": "array", "items": s}, range(5000), {}))],
    ],
)  # fmt: skip
def test_what_is_no_tool_is_refused_as_such_bound_or_in_a_row(tools):
    chat = make_chat(TRIMS)
    with pytest.raises((DataError, SchemaError)):
        chat.bind_tools(tools)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with contextlib.suppress(LLMChainFedError):
        encode_examples([{"messages": talk, "tools": tools}], chat.model, find_prompt(chat))
    with contextlib.suppress(LLMChainFedError):
        chat.render("hi", tools=tools)


def test_a_tool_without_parameters_may_say_so_by_null():
    chat = make_chat(TRIMS)
    message = chat.bind_tools([function(parameters=None)], tool_choice="any", parallel_tool_calls=False).invoke("hi")
    assert [call["args"] for call in message.tool_calls] == [{}]


@pytest.mark.parametrize("choice", [{"function": "f"}, {"function": {}}, {}, ["f"], 3, {"function": {"name": ["f"]}}])
def test_a_choice_that_names_no_tool_is_refused(choice):
    with pytest.raises(ConfigError, match="tool_choice is"):
        make_chat(TRIMS).bind_tools([function()], tool_choice=choice)


def test_null_arguments_of_a_table_are_those_that_a_call_does_not_have(chat):
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"q": "x", "k": None}}}
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": talk, "tools": [function()]}
    (example,) = read_examples([row], find_prompt(chat))
    assert '{"q": "x"}' in wanted_text(example, find_prompt(chat))


def test_two_calls_of_one_id_are_refused():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"q": "x"}'}}
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "1", "content": "a"}, {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "done"}]  # fmt: skip
    chat = make_chat(TRIMS)
    with pytest.raises(DialogueError, match="two calls of one id"):
        encode_examples([{"messages": talk}], chat.model, find_prompt(chat))
    with pytest.raises(DialogueError, match="no call waits"):
        read(talk[2:4])


def test_a_broken_call_without_a_name_is_what_was_written():
    broken = {"name": None, "args": "<tool_call>x", "id": "1", "error": None, "type": "invalid_tool_call"}
    chat = make_chat(TRIMS)
    message = AIMessage("So: ", invalid_tool_calls=[broken])
    assert "None" not in (text := chat.render([HumanMessage("a"), message, HumanMessage("b")]))
    assert "So: <tool_call>x" in text
    with pytest.raises(DialogueError, match="names no tool"):
        encode_examples([("a", message)], chat.model, find_prompt(chat))


def test_tokens_that_are_added_later_are_those_of_calls():
    chat = make_chat(TRIMS)
    kwargs = chat.bind_tools(TWO, tool_choice="any").kwargs
    assert chat.plan(kwargs).control_ids == {}
    chat.model.tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    chat.model.module.resize_token_embeddings(len(chat.model.tokenizer))
    assert chat.plan(kwargs).control_ids.keys() == {"<tool_call>", "</tool_call>"}
    assert chat.bind(**kwargs).invoke("hi").tool_calls


def test_text_that_the_budget_cuts_says_so_with_tools_bound_too(chat):
    message = chat.bind_tools(TWO).invoke("hi", max_new_tokens=14)
    assert not message.tool_calls
    assert message.response_metadata["finish_reason"] == "length"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "parameters", "properties", "a"]), part, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=3000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(JSON | st.builds(lambda p: function(parameters=p), JSON), max_size=2), JSON)
def test_whatever_is_given_as_tools_is_taken_or_refused_as_such(tools, choice):
    with contextlib.suppress(LLMChainFedError):
        _FUZZED.bind_tools(tools, tool_choice=choice)


_FUZZED = make_chat(TRIMS)
