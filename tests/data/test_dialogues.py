"""Rows of messages: which forms they may have, what of them is learnt, and what is refused.

Belongs here: dialogues from a row to labels. Does not: how a message is written (test_chat_answer, test_messages). The
oracles are transformers' own mask of assistant tokens and pairs written by hand.
"""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from chat_templates import FORGETS, OPENS, TOOLS, TRIMS
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import JsonOutputToolsParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda
from tokenizers_of_kinds import KINDS, make_module, make_tokenizer

from llmchain_fed import (
    ChatTemplateError,
    DataError,
    DialogueError,
    FederatedAveraging,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
)
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.data.encoding import collate, encode_examples, labels_of
from llmchain_fed.training.loss import summed_loss

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "guten morgen"}
SAID = {"role": "assistant", "content": "hallo welt"}
ASKED_AGAIN = {"role": "user", "content": "licht"}
SAID_AGAIN = {"role": "assistant", "content": "mond"}
TALK = [SYSTEM, ASKED, SAID, ASKED_AGAIN, SAID_AGAIN]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00100", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00100", "content": "sunny"}
AGENT = [ASKED, CALLING, RESULT, SAID]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("byte-level")


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TOOLS
    return LocalChatModel(model=LocalModel(make_module(tokenizer), tokenizer), max_new_tokens=16)


def rows_of(rows, learner):
    encoded = encode_examples(rows, learner.model, learner.as_prompt())
    return [encoded[i] for i in range(len(encoded))], encoded.report


def flat(row):
    return [i for ids in row for i in ids]


def masked_by_transformers(tokenizer, messages, tools=None, first=0):
    """(ids, labels) with transformers' mask of the assistant's tokens, without those before message `first`."""
    done = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    before = 0
    if first:
        given = tokenizer.apply_chat_template(
            messages[:first], tools=tools, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        before = len(given["input_ids"])
    ids, mask = done["input_ids"], done["assistant_masks"]
    return ids, [i if m and at >= before else -100 for at, (i, m) in enumerate(zip(ids, mask, strict=True))]


# --- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("messages", "tools"), [(TALK, None), (AGENT, [WEATHER]), ([*AGENT, *TALK[3:]], [WEATHER])])
def test_labels_are_those_of_transformers_own_assistant_mask(messages, tools, chat, tokenizer):
    (row,), report = rows_of([{"messages": messages, "tools": tools}], chat)
    ids, labels = masked_by_transformers(tokenizer, messages, tools)
    # behind the last end token the template writes a line break, which no answer has
    assert flat(row) == ids[: len(flat(row))]
    assert labels_of(row) == labels[: len(flat(row))]
    assert tokenizer.decode(ids[len(flat(row)) :]) == "\n"
    assert report.used == 1


def test_of_trls_conversational_form_the_completions_answers_are_learnt(chat, tokenizer):
    rows = [
        {"prompt": TALK[:2], "completion": TALK[2:3]},
        {"prompt": TALK[:4], "completion": TALK[4:]},
        {"prompt": TALK[:2], "completion": TALK[2:]},
        {"prompt": AGENT[:1], "completion": AGENT[1:], "tools": [WEATHER]},
        {"prompt": AGENT[:3], "completion": AGENT[3]["content"], "tools": json.dumps([WEATHER])},
    ]
    found, report = rows_of(rows, chat)
    lists = [(TALK[:3], 2, None), (TALK, 4, None), (TALK, 2, None), (AGENT, 1, [WEATHER]), (AGENT, 3, [WEATHER])]
    for row, (messages, first, tools) in zip(found, lists, strict=True):
        ids, labels = masked_by_transformers(tokenizer, messages, tools, first)
        assert flat(row) == ids[: len(flat(row))]
        assert labels_of(row) == labels[: len(flat(row))]
    assert report.used == 5


def test_of_openais_weights_those_of_nothing_are_read_and_not_learnt(chat, tokenizer):
    weighed = [{**m, "weight": 0} if at == 2 else {**m, "weight": 1} if at == 4 else m for at, m in enumerate(TALK)]
    (row,), _ = rows_of([{"messages": weighed}], chat)
    ids, labels = masked_by_transformers(tokenizer, TALK, None, 4)
    assert flat(row) == ids[: len(flat(row))]
    assert labels_of(row) == labels[: len(flat(row))]
    for weight in (2, "0", -1):
        with pytest.raises(DialogueError, match=r"It is 1 \(learnt\) or 0"):
            rows_of([{"messages": [*TALK[:4], {**TALK[4], "weight": weight}]}], chat)


def test_a_rows_tools_are_those_the_model_answers_with(chat):
    bound = chat.bind_tools([WEATHER])
    other = {**WEATHER, "function": {**WEATHER["function"], "description": "another"}}
    for learner in (
        bound,
        LLMChain(
            llm=bound, prompt=ChatPromptTemplate([("placeholder", "{messages}")]), output_parser=JsonOutputToolsParser()
        ),
    ):
        given, _ = rows_of([{"messages": AGENT, "tools": [WEATHER]}], learner)
        alone, _ = rows_of([{"messages": AGENT}], learner)
        assert given == alone
        with pytest.raises(DialogueError, match="are not those that are bound to the model"):
            rows_of([{"messages": AGENT, "tools": [other]}], learner)


def gradients(module, rows, model):
    module.zero_grad()
    batch = collate(rows, model)
    loss, tokens = summed_loss(module, batch)
    (loss / tokens).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return float(loss.detach() / tokens), tokens, found


def test_one_pass_gives_the_loss_and_gradients_of_the_pairs(chat):
    (row,), _ = rows_of([{"messages": [*TALK, ASKED, SAID]}], chat)
    pairs = [(TALK[:2], "hallo welt"), (TALK[:4], "mond"), ([*TALK, ASKED], "hallo welt")]
    several, _ = rows_of(pairs, chat)
    assert len(several) == 3
    module = chat.model.module
    loss, tokens, found = gradients(module, [row], chat.model)
    wanted, wanted_tokens, others = gradients(module, several, chat.model)
    assert tokens == wanted_tokens
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert found.keys() == others.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4)


def test_where_a_template_does_not_keep_its_prefix_every_answer_is_a_row(chat, tokenizer):
    tokenizer.chat_template = FORGETS
    said = [{**SAID, "reasoning_content": "why"}, {**SAID_AGAIN, "reasoning_content": "because"}]
    found, report = rows_of([{"messages": [ASKED, said[0], ASKED_AGAIN, said[1]]}], chat)
    texts = [
        ("<|user|>guten morgen<eos>\n<|assistant|>", "<think>\nwhy\n</think>\n\nhallo welt<eos>"),
        (
            "<|user|>guten morgen<eos>\n<|assistant|>hallo welt<eos>\n<|user|>licht<eos>\n<|assistant|>",
            "<think>\nbecause\n</think>\n\nmond<eos>",
        ),
    ]
    assert [tuple(map(tokenizer.decode, row)) for row in found] == texts
    assert report.used == 2


def expanded(row):
    """A row as pairs: each learnt segment with all that stands before it."""
    return [(flat(row[:at]), row[at]) for at in range(1, len(row), 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [TOOLS, FORGETS, OPENS, TRIMS])
def test_a_dialogue_is_its_pairs_for_every_kind_of_tokenizer(kind, template):
    other = make_tokenizer(kind)
    other.chat_template = template
    chat = LocalChatModel(model=LocalModel(make_module(other), other))
    found, report = rows_of([{"messages": TALK}], chat)
    pairs, _ = rows_of([(TALK[:2], AIMessage("hallo welt")), (TALK[:4], AIMessage("mond"))], chat)
    assert [pair for row in found for pair in expanded(row)] == [tuple(pair) for pair in pairs]
    assert report.used == len(found)


def test_what_is_read_before_an_answer_is_what_invoke_sends(chat):
    messages = [SystemMessage("Be brief."), HumanMessage("guten morgen"), AIMessage("hallo welt"), HumanMessage("x")]
    sent = []
    chat.model.module.register_forward_pre_hook(
        lambda m, args, kwargs: sent.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    for until in (2, 4):
        chat.invoke(messages[:until], max_new_tokens=1)
    (row,), _ = rows_of([{"messages": [*messages, AIMessage("mond")]}], chat)
    assert sent == [row[0], flat(row[:3])]


# --- forms -----------------------------------------------------------------------------------------------------------

WIRE = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
FORMS = {
    "OpenAI's arguments as text": [ASKED, {**CALLING, "content": None, "tool_calls": [WIRE]}, RESULT, SAID],
    "no ids": [
        ASKED,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL["function"]}]},
        {"role": "tool", "name": "weather", "content": "sunny"},
        SAID,
    ],
    "the function without its frame": [ASKED, {**CALLING, "tool_calls": [CALL["function"]]}, RESULT, SAID],
    "OpenAI's older function calls": [
        ASKED,
        {"role": "assistant", "content": None, "function_call": WIRE["function"]},
        {"role": "function", "name": "weather", "content": "sunny"},
        SAID,
    ],
    "null keys": [{**m, "tool_calls": m.get("tool_calls"), "name": m.get("name")} for m in AGENT],
    "null arguments of other tools": [
        ASKED,
        {
            **CALLING,
            "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Bern", "day": None}}}],
        },
        RESULT,
        SAID,
    ],
    "LangChain's objects": [
        HumanMessage("guten morgen"),
        AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "call00100"}]),
        ToolMessage("sunny", tool_call_id="call00100", name="weather"),
        AIMessage("hallo welt"),
    ],
    "mixed": [("user", "guten morgen"), CALLING, RESULT, ("ai", "hallo welt")],
    "an array, as frames have them": np.array(AGENT, dtype=object),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(form, chat):
    wanted, _ = rows_of([{"messages": AGENT, "tools": [WEATHER]}], chat)
    assert rows_of([{"messages": FORMS[form], "tools": [WEATHER]}], chat)[0] == wanted


def test_a_dataset_fills_keys_with_null_and_nothing_changes(chat, tmp_path):
    rows = [{"messages": AGENT}, {"messages": TALK}]
    wanted, _ = rows_of(rows, chat)
    assert rows_of(datasets.Dataset.from_list(rows), chat)[0] == wanted
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert rows_of(path, chat)[0] == wanted


def test_what_says_nothing_is_counted(chat):
    rows = [
        {"messages": None},
        {"messages": [ASKED, {**SAID, "content": " "}]},
        {"messages": [{**ASKED, "content": ""}, SAID]},
        {"messages": [{**ASKED, "content": float("nan")}, SAID]},
        {"messages": TALK},
    ]
    _, report = rows_of(rows, chat)
    assert (report.empty, report.used) == (4, 1)


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "no answer": ([SYSTEM, ASKED], "no message is an answer to learn"),
    "an empty list": ([], "no message is an answer to learn"),
    "an answer to nothing": ([SAID, ASKED, SAID], "message 0 is an answer that answers nothing"),
    "two answers": ([ASKED, SAID, SAID_AGAIN], "message 2 is an answer that stands right behind another"),
    "a result without a call": ([ASKED, RESULT, SAID], "message 1 is a tool's result, and no call waits for one"),
    "a second result": ([ASKED, CALLING, RESULT, RESULT, SAID], "message 3 is a tool's result"),
    "another call's result": ([ASKED, CALLING, {**RESULT, "tool_call_id": "x"}, SAID], "the result of the call 'x'"),
    "no message": ([ASKED, "hallo"], "message 1 is 'hallo', which is no message"),
    "text": ("hallo", "`messages` is str, not a list"),
    "broken arguments": (
        [ASKED, {**CALLING, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city"'}}]}],
        "arguments that are no JSON object",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages_out_of_order_are_refused_by_place_and_reason(case, chat):
    messages, why = REFUSED[case]
    with pytest.raises(DialogueError, match="example 1: .*" + why):
        rows_of([{"messages": TALK}, {"messages": messages}], chat)


def test_an_order_that_the_template_refuses_is_its_own_to_refuse(chat, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match=r"example 0: .*must be at the beginning"):
        rows_of([{"messages": [ASKED, SAID, SYSTEM, ASKED, SAID]}], chat)
    assert rows_of([{"messages": [ASKED, ASKED_AGAIN, SAID]}], chat)[1].used == 1  # two of the user's in a row are fine


def test_a_row_without_an_answer_is_refused_and_what_to_give_is_named(chat):
    with pytest.raises(DataError, match=r"\{'prompt': …, 'completion': …\}.*\{'messages': \[…\]\}.*RawText"):
        rows_of([{"text": "guten morgen"}], chat)
    with pytest.raises(DataError, match=r"Write a conversation as \{'messages'"):
        rows_of([{"conversations": [{"from": "human", "value": "guten morgen"}]}], chat)


def test_who_takes_no_messages_says_so(chat):
    rows = [{"messages": TALK}]
    with pytest.raises(DataError, match=r"Use LocalChatModel\(model=llm.model\)"):
        rows_of(rows, LocalLLM(model=chat.model))
    with pytest.raises(DataError, match=r"Use LocalChatModel\(model=llm.model\)"):
        rows_of(rows, LLMChain(llm=LocalLLM(model=chat.model), prompt="{text}"))
    with pytest.raises(DataError, match=r"needs a prompt to become text. Pass LocalChatModel\(model=…\)"):
        encode_examples(rows, chat.model)
    with pytest.raises(DataError, match=r"the keys \['id'\] of a row of messages name variables"):
        rows_of([{"messages": TALK, "id": 7}], chat)
    with pytest.raises(DataError, match="`tools` has something that is no tool"):
        rows_of([{"messages": TALK, "tools": [3]}], chat)
    for text in ("{", "[" * 200_000, "9" * 5_000):
        with pytest.raises(DataError, match="example 0: `tools`"):
            rows_of([{"messages": TALK, "tools": text}], chat)


# --- in a chain ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_ends_in_its_placeholder_holds_a_dialogue(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), MessagesPlaceholder("history")])
    wanted, _ = rows_of([{"messages": TALK}], chat)
    assert rows_of([{"messages": TALK[1:]}], LLMChain(llm=chat, prompt=prompt))[0] == wanted
    with_manner = ChatPromptTemplate.from_messages([("system", "Be {manner}."), ("placeholder", "{history}")])
    assert rows_of([{"messages": TALK[1:], "manner": "brief"}], LLMChain(llm=chat, prompt=with_manner))[0] == wanted
    wanted, _ = rows_of([{"messages": [SYSTEM, *AGENT], "tools": [WEATHER]}], chat)
    assert rows_of([{"messages": AGENT, "tools": [WEATHER]}], LLMChain(llm=chat, prompt=prompt))[0] == wanted


@pytest.mark.parametrize(
    ("prompt", "row"),
    [
        ("{text}", {}),
        (ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")]), {}),
        (ChatPromptTemplate.from_messages([("system", "Be {manner}."), MessagesPlaceholder("history")]), {}),
        (ChatPromptTemplate.from_messages([MessagesPlaceholder("history")]), {"manner": "brief"}),
    ],
)
def test_a_prompt_without_a_clear_place_for_a_dialogue_refuses_it(prompt, row, chat):
    with pytest.raises(DialogueError, match="ends in its one MessagesPlaceholder"):
        rows_of([{"messages": TALK, **row}], LLMChain(llm=chat, prompt=prompt))


def test_dialogues_are_learnt_in_a_federation(chat):
    first = [ASKED, SAID, ASKED_AGAIN, SAID_AGAIN]
    second = [ASKED_AGAIN, SAID, ASKED, SAID_AGAIN]
    fed = FederatedAveraging(
        chat, participants={"a": [{"messages": first}] * 4, "b": [{"messages": second}] * 4},
        lr=1e-2, batch_size=4, progress=False, evaluation={"a": [{"messages": first}]},
    )  # fmt: skip
    history = fed.fit(12)
    assert history[-1].held_out_after < 0.5 < history[0].held_out_before
    (sample, *_) = history[-1].samples
    assert (sample.reference, sample.after) == ("hallo welt", "hallo welt")
    assert chat.invoke([("user", "guten morgen")]).content == "hallo welt"
    assert chat.invoke([("user", "guten morgen"), ("ai", "hallo welt"), ("user", "licht")]).content == "mond"
    assert chat.invoke([("user", "licht")]).content == "hallo welt"


# --- in a composed chain ---------------------------------------------------------------------------------------------


def test_a_graph_over_messages_is_run_for_each_message_of_the_users(chat):
    """The graph's own tool answers; its answer stands in what the model reads next, and tags are the template's."""
    from langgraph.graph import END, START, MessagesState, StateGraph

    def tools(state):
        calls = state["messages"][-1].tool_calls
        return {"messages": [ToolMessage("sunny", tool_call_id=c["id"], name=c["name"]) for c in calls]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [called(chat.invoke(state["messages"]))]})
    graph.add_node("tools", tools)
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", lambda s: "tools" if s["messages"][-1].tool_calls else END)
    graph.add_edge("tools", "model")

    def called(message):
        if not message.content.startswith("<call>"):
            return message
        return AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "call00100"}])

    found = find_prompt(graph.compile())
    wanted, _ = rows_of([{"messages": [*AGENT, *TALK[3:]]}], chat)
    encoded = encode_examples([{"messages": [*AGENT, *TALK[3:]]}], chat.model, found)
    assert [encoded[i] for i in range(len(encoded))] == wanted
    with pytest.raises(DialogueError, match="tools are the chain's own"):
        encode_examples([{"messages": AGENT, "tools": [WEATHER]}], chat.model, found)


def test_a_composed_chain_that_takes_no_messages_refuses_a_dialogue(chat):
    prompt = ChatPromptTemplate.from_messages([("human", "{text}")])
    found = find_prompt({"text": RunnableLambda(str.strip)} | prompt | chat)
    with pytest.raises(DialogueError, match="a row of messages is no input of this chain"):
        encode_examples([{"messages": TALK}], chat.model, found)


@pytest.mark.real_model
def test_the_embedded_models_own_template_is_learnt_between_its_marks():
    """Labels found by scanning the ids of the whole conversation for the marks of an assistant's turn."""
    chat = LocalChatModel.from_pretrained("smollm2-135m-instruct")
    tokenizer = chat.model.tokenizer
    messages = [
        ASKED,
        SAID,
        {**ASKED_AGAIN, "content": "Fine.\n"},
        {**SAID_AGAIN, "content": "Good:\n\n1. a\n2. ünïcödé"},
    ]
    (row,), _ = rows_of([{"messages": messages}], chat)
    ids = list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    begin, end = tokenizer("<|im_start|>assistant\n")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels, learning = [], False
    for at, token in enumerate(ids):
        labels.append(token if learning else -100)
        learning = token != end if learning else ids[at + 1 - len(begin) : at + 1] == begin
    assert flat(row) == ids[: len(flat(row))]
    assert labels_of(row) == labels[: len(flat(row))]
    assert all(label == -100 for label in labels[len(flat(row)) :])
