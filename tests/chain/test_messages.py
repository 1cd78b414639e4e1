"""Messages as completions and as answers: what is learnt of an AIMessage, and where reasoning is found again.

Belongs here: one message in, one message out, over the chat face. Does not: conversations (data/test_dialogues), the
template's text (model/test_chat_answer).
"""

from __future__ import annotations

import pytest
from chat_templates import FORGETS, OPENS, TOOLS, TRIMS
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from tokenizers_of_kinds import make_module, make_tokenizer

from llmchain_fed import DataError, DialogueError, FederatedAveraging, LLMChain, LocalChatModel, LocalLLM, LocalModel
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.chain.recording import recording
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.model.generation.answers import Completion

CALL = {"name": "weather", "args": {"city": "Bern"}, "id": "1"}
THINKING = AIMessage("hallo", additional_kwargs={"reasoning_content": "a greeting"})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("byte-level")


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TOOLS
    return LocalChatModel(model=LocalModel(make_module(tokenizer), tokenizer), max_new_tokens=48)


class Says:
    """Answers every text with one of its own."""

    def __init__(self, text):
        self.text = text

    def answer(self, face, text, run, options, /):
        return Completion(self.text, 1, 1, "stop")


def row_of(example, learner):
    encoded = encode_examples([example], learner.model, learner.as_prompt())
    return encoded[0]


# --- as completions --------------------------------------------------------------------------------------------------


def test_a_message_of_text_is_learnt_as_its_text_is(chat):
    asked = [HumanMessage("guten morgen")]
    wanted = row_of((asked, "hallo"), chat)
    forms = [
        AIMessage("hallo"),
        AIMessage([{"type": "text", "text": "hallo"}]),
        {"role": "assistant", "content": "hallo"},
        [AIMessage("hallo")],
    ]
    for completion in forms:
        assert row_of((asked, completion), chat) == wanted
    chain = LLMChain(llm=chat, prompt=ChatPromptTemplate.from_messages([("human", "{text}")]))
    for completion in forms:
        assert row_of(({"text": "guten morgen"}, completion), chain) == wanted


def test_calls_and_reasoning_are_learnt_as_the_template_writes_them(chat, tokenizer):
    calling = AIMessage("", tool_calls=[CALL])
    assert tokenizer.decode(row_of(("wie", calling), chat)[1]) == '<call>weather {"city": "Bern"}</call><eos>'
    assert tokenizer.decode(row_of(("wie", THINKING), chat)[1]) == "<think>\na greeting\n</think>\n\nhallo<eos>"
    blocks = AIMessage([{"type": "thinking", "thinking": "a greeting"}, {"type": "text", "text": "hallo"}])
    assert row_of(("wie", blocks), chat) == row_of(("wie", THINKING), chat)


def test_the_switches_of_a_call_count(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and mood %}{{ mood }}: {% endif %}"
        "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = LocalChatModel(model=LocalModel(make_module(tokenizer), tokenizer))
    for glad in (chat.bind(chat_template_kwargs={"mood": "glad"}), LLMChain(llm=chat, prompt="{text}").bind(
        chat_template_kwargs={"mood": "glad"}
    )):  # fmt: skip
        encoded = encode_examples([("wie", AIMessage("hallo"))], chat.model, find_prompt(glad))
        assert tokenizer.decode(encoded[0][1]) == "glad: hallo<eos>"
        encoded = encode_examples([("wie", AIMessage("hallo"))], chat.model, find_prompt(RunnableLambda(str) | glad))
        assert tokenizer.decode(encoded[0][1]) == "glad: hallo<eos>"


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        (HumanMessage("hallo"), "a completion is what the assistant says, got a message of 'user'"),
        (ToolMessage("hallo", tool_call_id="1"), "got a message of 'tool'"),
        ({"role": "user", "content": "hallo"}, "got a message of 'user'"),
    ],
)
def test_what_is_no_answer_is_refused(completion, why, chat):
    with pytest.raises(DialogueError, match="example 0: .*" + why):
        row_of(("wie", completion), chat)


def test_a_string_model_takes_no_message(chat):
    with pytest.raises(DataError, match="a completion is text, got AIMessage"):
        row_of(("wie", AIMessage("hallo")), LocalLLM(model=chat.model))


@pytest.mark.parametrize("template", [TOOLS, FORGETS])
def test_an_example_whose_message_says_nothing_is_counted(template, chat, tokenizer):
    tokenizer.chat_template = template
    encoded = encode_examples([("wie", AIMessage("")), ("wie", AIMessage("hallo"))], chat.model, chat.as_prompt())
    assert (encoded.report.empty, encoded.report.used) == (1, 1)


# --- as answers ------------------------------------------------------------------------------------------------------


async def every_verb(runnable, value):
    streamed = None
    for chunk in runnable.stream(value):
        streamed = chunk if streamed is None else streamed + chunk
    joined = None
    async for chunk in runnable.astream(value):
        joined = chunk if joined is None else joined + chunk
    return [
        runnable.invoke(value), await runnable.ainvoke(value), runnable.batch([value, value])[1],
        (await runnable.abatch([value]))[0], streamed, joined,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TOOLS, "<think>\na greeting\n</think>\n\nhallo"),
        (FORGETS, "<think>a greeting</think>hallo"),
        (OPENS, "a greeting\n</think>\n\nhallo"),
        (TRIMS, "\n<think>\na greeting\n</think>\nhallo"),
    ],
)
async def test_what_was_thought_is_found_beside_what_is_said_in_every_verb(template, text, chat, tokenizer):
    tokenizer.chat_template = template
    with recording(Says(text)):
        answers = await every_verb(chat, "guten morgen")
        texts = await every_verb(chat | StrOutputParser(), "guten morgen")
    for answer in answers:
        assert answer.content == "hallo"
        assert answer.additional_kwargs == {"reasoning_content": "a greeting"}
    assert texts == ["hallo"] * 6


async def test_an_answer_without_reasoning_is_as_it_was(chat):
    with recording(Says("1 < 2 </think> \n")):
        for answer in await every_verb(chat, "guten morgen"):
            assert (answer.content, answer.additional_kwargs) == ("1 < 2 </think> \n", {})


async def test_reasoning_that_was_taught_is_answered(chat):
    other = AIMessage("mond", additional_kwargs={"reasoning_content": "light\nat night"})
    fed = FederatedAveraging(
        chat, participants={"a": [("guten morgen", THINKING), ("licht", other)]}, lr=1e-2, batch_size=2, progress=False
    )
    fed.fit(60)
    for asked, wanted in (("guten morgen", THINKING), ("licht", other)):
        for answer in await every_verb(chat, asked):
            assert answer.content == wanted.content
            assert answer.additional_kwargs == wanted.additional_kwargs


# --- counted ---------------------------------------------------------------------------------------------------------


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"sunny in {city}"


def test_messages_are_counted_with_what_the_template_puts_around_them(chat, tokenizer):
    messages = [SystemMessage("Be brief."), HumanMessage("guten morgen"), AIMessage("hallo"), HumanMessage("licht")]
    plain = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "guten morgen"},
        {"role": "assistant", "content": "hallo"}, {"role": "user", "content": "licht"},
    ]  # fmt: skip
    wanted = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.get_num_tokens_from_messages(messages) == len(wanted)
    assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]
    assert chat.get_num_tokens_from_messages([]) == 0
    with_tools = chat.get_num_tokens_from_messages(messages, tools=[weather])
    assert with_tools > len(wanted) + len(tokenizer("Tells the weather.")["input_ids"])


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""refuses a system message and whatever begins with an answer, as Mistral's and Gemma's do"""


@pytest.mark.parametrize("template", [TOOLS, STRICT])
def test_messages_are_trimmed_to_what_fits(template, chat, tokenizer):
    """LangChain counts a system message, and the rest in reverse order, apart: what a template may well refuse."""
    tokenizer.chat_template = template
    talk = [
        HumanMessage("guten morgen"),
        AIMessage("hallo"),
        HumanMessage("licht"),
        AIMessage("mond"),
        HumanMessage("x"),
    ]
    messages = talk if template == STRICT else [SystemMessage("Be brief."), *talk]
    options = {"token_counter": chat, "include_system": True, "start_on": "human"}
    whole = chat.get_num_tokens_from_messages(messages)
    lengths = []
    for limit in range(6, 2 * whole):
        kept = trim_messages(messages, max_tokens=limit, **options)
        lengths.append(len(kept))
        assert kept[-1:] in ([], messages[-1:], messages[:1])
        assert chat.get_num_tokens_from_messages(kept) <= limit or len(kept) < 2
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(messages)
    assert len(set(lengths)) > 2


def test_what_a_template_refuses_is_counted_message_by_message(chat, tokenizer):
    tokenizer.chat_template = STRICT
    said = [chat.get_num_tokens_from_messages([HumanMessage(text)]) for text in ("Be brief.", "licht")]
    assert chat.get_num_tokens_from_messages([SystemMessage("Be brief."), HumanMessage("licht")]) == sum(said)
