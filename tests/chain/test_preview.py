"""`preview` of chains and faces: the tokens are those of training, and every piece of text says where it came from."""

import io

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from llmchain_fed import (
    FederatedAveraging,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    Participant,
    RawText,
    TrainingConfig,
)
from llmchain_fed.data import collate, encode_examples
from llmchain_fed.errors import ConfigError, DataError
from tests.support.chat_templates import TOOLS
from tests.support.tiny import TEMPLATE, tiny_module, train_tokenizer

OWN_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>You are a good helper.</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATES = (
    "<|system|>Today is 3 May 2026\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}</s>"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"
)
ADDED = "a system prompt that the chat template adds"


@pytest.fixture
def model():
    tokenizer = train_tokenizer()
    return LocalModel(tiny_module("causal", len(tokenizer)), tokenizer)


@pytest.fixture
def chat(model):
    return LocalChatModel(model=model)


def told(preview):
    """(source, text) of each run, whatever is learnt by the name `learnt`."""
    return [(source, "".join(t.text for t in run)) for e in preview.examples for _, source, run in e.runs()]


def check_trained_on(preview, model, examples, prompt):
    """The ids and what of them is learnt are those of the batches that training makes of the examples."""
    data = encode_examples(examples, model, prompt)
    batch = collate([data[i] for i in range(len(data))], model)
    rows = [row for example in preview.examples for row in example.rows]
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert [t.id for t in row] == ids[mask.bool()].tolist()
        assert [t.learnt for t in row] == (labels[mask.bool()] != -100).tolist()


def test_a_chain_over_text(model):
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    example = ({"text": "page locked"}, "page verrouillée")
    preview = chain.preview(example)
    assert told(preview) == [
        ("the prompt", "Translate to French:"),
        ("input 'text'", " page locked"),
        ("the prompt", "\n"),
        ("learnt", "page verrouillée</s>"),
    ]
    assert preview.text == "Translate to French: page locked\npage verrouillée</s>"
    assert preview.learnt == ["page verrouillée</s>"]
    check_trained_on(preview, model, [example], chain)


def test_a_chain_over_messages_and_a_system_prompt_that_nobody_wrote(chat):
    chat.model.tokenizer.chat_template = OWN_SYSTEM
    chain = LLMChain(llm=chat, prompt=ChatPromptTemplate.from_messages([("human", "To {language}: {text}!")]))
    example = {"text": "page", "language": "French", "completion": "page"}
    preview = chain.preview(example)
    assert told(preview) == [
        ("the chat template", "<|system|>"),
        (ADDED, "You are a good helper."),
        ("the chat template", "</s><|user|>"),
        ("the prompt", "To"),
        ("input 'language'", " French"),
        ("the prompt", ":"),
        ("input 'text'", " page"),
        ("the prompt", "!"),
        ("the chat template", "</s><|assistant|>"),
        ("learnt", "page</s>"),
    ]
    assert preview.notes == ("the chat template adds a system prompt of its own: 'You are a good helper.'",)
    check_trained_on(preview, chat.model, [example], chain)


def test_a_system_prompt_of_ones_own_takes_its_place(chat):
    chat.model.tokenizer.chat_template = OWN_SYSTEM
    preview = chat.preview(([SystemMessage("Be brief."), HumanMessage("Hi")], "Yes"))
    assert ADDED not in preview.sources
    assert preview.notes == ()
    assert ("message 0 of the input", "Be brief.") in told(preview)


def test_what_a_template_adds_to_a_system_prompt_is_told(chat):
    chat.model.tokenizer.chat_template = DATES
    for messages in ([HumanMessage("Hi")], [SystemMessage("Be brief."), HumanMessage("Hi")]):
        preview = chat.preview((messages, "Yes"))
        assert (ADDED, "Today is 3 May 2026") in [(s, t.strip()) for s, t in told(preview)] or any(
            s == ADDED and "Today is 3 May 2026" in t for s, t in told(preview)
        )


def test_a_value_that_the_template_trims_is_found_all_the_same(chat):
    chat.model.tokenizer.chat_template = OWN_SYSTEM
    chain = LLMChain(llm=chat, prompt=ChatPromptTemplate.from_messages([("human", "{text}")]))
    preview = chain.preview(({"text": "  sign in \n"}, "se connecter"))
    assert ("input 'text'", "sign in") in told(preview)


def test_a_number_and_a_history_come_from_the_inputs_too(chat):
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{n} pages")])
    chain = LLMChain(llm=chat, prompt=prompt)
    history = [HumanMessage("open the file"), AIMessage("done")]
    found = told(chain.preview(({"history": history, "n": 41}, "ok")))
    assert ("input 'history'", "open the file") in found
    assert ("input 'history'", "done") in found
    assert ("input 'n'", "41") in found


def test_every_answer_of_a_dialogue_is_learnt_and_every_message_told(chat):
    messages = [("user", "Hi you"), ("assistant", "Yes"), ("user", "Again"), ("assistant", "No é")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    preview = chat.preview(row)
    assert preview.learnt == ["Yes</s>", "No é</s>"]
    assert ("message 0 (user)", "Hi you") in told(preview)
    assert ("message 2 (user)", "Again") in told(preview)
    assert len(preview.examples[0].rows) == 1
    check_trained_on(preview, chat.model, [row], chat.as_prompt())


def test_raw_text_says_so_and_a_face_by_itself_has_an_input(model):
    llm = LocalLLM(model=model)
    assert told(llm.preview(RawText("save", "oui"))) == [("raw text", "save"), ("learnt", "oui</s>")]
    assert told(llm.preview(("save", "oui"))) == [("the input", "save"), ("learnt", "oui</s>")]


def test_what_cannot_be_learnt_says_why(model):
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    assert "longer than 128 tokens" in str(chain.preview(("page " * 200, "x")))
    assert "missing or blank" in str(chain.preview(("page", "  ")))
    stopped = LLMChain(llm=LocalLLM(model=model, stop=["v"]), prompt=TEMPLATE)
    assert "stop string" in str(stopped.preview(("page", "page verrouillée")))
    with pytest.raises(DataError, match="cannot read"):
        chain.preview("page locked")


def test_a_seq2seq_model_reads_and_learns_apart(make_chain):
    chain = make_chain("seq2seq")
    preview = chain.preview(("page locked", "oui"))
    assert [source for source, _ in told(preview)][-1] == "learnt"
    assert "page locked" in preview.text


def test_characters_of_several_tokens_are_whole(model):
    text = "日本語 😀 é’ \N{ZERO WIDTH JOINER}"
    preview = LocalLLM(model=model).preview((text, "été 😀"))
    assert preview.text == text + "été 😀</s>"


def test_colours_are_for_terminals_and_nothing_steers_one(model):
    preview = LocalLLM(model=model).preview(("a\x1b[31m<b>&", "oui"))
    assert "\x1b" not in str(preview)
    assert "\\x1b" in str(preview).replace("·", "")
    page = preview._repr_html_()
    assert "<b>&" not in page.replace("<b>example 0</b>", "")
    assert page.count("<span title=") == len(preview.examples[0].rows[0])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    plain, terminal = io.StringIO(), Terminal()
    preview.show(plain)
    preview.show(terminal)
    assert plain.getvalue() == f"{preview}\n"
    assert "\x1b[30;42m" in terminal.getvalue()


def test_no_colours_where_none_are_wanted(model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    LocalLLM(model=model).preview(("a", "oui")).show(terminal)
    assert "\x1b" not in terminal.getvalue()


# --- a federation's ---------------------------------------------------------------------------------------------------


def federation(model, participants, **options):
    return FederatedAveraging(model, participants=participants, progress=False, **options)


def test_a_participants_examples_with_what_became_of_them(model):
    chain = LLMChain(llm=LocalLLM(model=model, stop=["§"]), prompt=TEMPLATE)
    examples = [("page", "a § b"), ("open", "ouvrir"), ("save", "oui"), ("sign in", "se connecter")]
    fed = federation(chain, {"org-a": examples, "org-b": examples[1:]}, training=TrainingConfig(tolerance=0.5))
    preview = fed.preview("org-a", count=2)
    assert [e.title for e in preview.examples] == [f"org-a, example {i}" for i in range(3)]
    assert "stop string" in preview.examples[0].left_out
    assert preview.learnt == ["ouvrir</s>", "oui</s>"]
    assert any("3 examples, 1 more left out" in note for note in preview.notes)
    assert any("first that is left out" in note for note in preview.notes)
    assert fed.round == 0


def test_a_refused_data_set_can_be_looked_at(model):
    chain = LLMChain(llm=LocalLLM(model=model, stop=["§"]), prompt=TEMPLATE)
    preview = federation(chain, {"org-a": [("page", "a § b"), ("open", "ouvrir")]}).preview("org-a")
    assert any(note.startswith("these examples are refused") for note in preview.notes)
    assert "stop string" in str(preview)


def test_a_generator_is_read_once_and_a_dataloader_by_its_labels(model):
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    fed = federation(chain, {"a": (pair for pair in [("open", "ouvrir"), ("save", "oui")])})
    assert fed.preview("a", count=5).learnt == ["ouvrir</s>", "oui</s>"]
    data = encode_examples([("open", "ouvrir"), ("save", "oui")], model, chain)
    loader = torch.utils.data.DataLoader([data[0], data[1]], batch_size=2, collate_fn=lambda rows: collate(rows, model))
    assert federation(chain, {"a": loader}).preview("a", count=2).learnt == ["ouvrir</s>", "oui</s>"]


def test_a_composed_chain_shows_what_its_model_reads(chat):
    prompt = ChatPromptTemplate.from_messages([("human", "{context} | {question}")])
    find = RunnableLambda(lambda question: f"notes on {question}")
    chain = {"context": find, "question": RunnablePassthrough()} | prompt | chat
    preview = federation(chain, {"a": [("sign in", "oui")]}).preview("a")
    assert preview.learnt == ["oui</s>"]
    assert ("the input", "sign in") in [(s, t.strip()) for s, t in told(preview)]
    assert "notes on sign in | sign in" in preview.text


def test_a_composed_chains_messages_are_told_and_their_roles_are_the_templates(chat):
    chain = RunnableLambda(lambda state: chat.invoke(state["messages"]))
    messages = [{"role": "user", "content": "sign in"}]
    preview = federation(chain, {"a": [({"messages": messages}, "oui")]}, llm=chat).preview("a")
    assert ("input 'messages', message 0", "sign in") in told(preview)
    assert [source for source, text in told(preview) if text.strip() == "user"] == []


def test_nobody_of_that_name(model):
    fed = federation(model, {"a": [RawText("save", "oui")]})
    with pytest.raises(ConfigError, match=r"no participant org-z is in this process \(\['a'\] are\)"):
        fed.preview("org-z")
    with pytest.raises(ConfigError, match="at least 1"):
        fed.preview("a", count=0)
    assert fed.preview("a").learnt == ["oui</s>"]


def test_a_participant_is_given_as_itself_nowhere(model):
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    fed = federation(chain, [Participant("a", [("open", "ouvrir")], training={"max_length": 2})])
    assert "longer than 2 tokens" in str(fed.preview("a"))


def test_a_model_without_end_token_is_said_once():
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    module = tiny_module("causal", len(tokenizer))
    module.generation_config.eos_token_id = module.config.eos_token_id = None
    model = LocalModel(module, tokenizer)
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    report = encode_examples([("save", "oui"), ("open", "ouvrir")], model, chain).report
    assert report.without_end == 2
    assert report.worth_saying
    assert report.in_words().count("end token") == 1
    assert sum("no end token" in note for note in chain.preview(("save", "oui")).notes) == 1


# --- tools and objects ------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def roomy(chat):
    chat.model.module.config.max_position_embeddings = 2048  # tools are long
    return chat


def test_tools_are_told_and_a_template_without_a_place_for_them_is_noted(roomy):
    call = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Rome"}, "id": "call00001"}])
    bound = roomy.bind_tools([WEATHER])
    preview = federation(bound, {"a": [("Rome?", call)]}).preview("a")
    tools = [text for source, text in told(preview) if source == "the tools"]
    assert len(tools) == 1
    assert '"weather"' in tools[0]
    assert "weather" in preview.learnt[0]
    assert "Rome" in preview.learnt[0]
    assert ("the input", "Rome?") in told(preview)
    assert any("no place for tools" in note for note in preview.notes)


def test_a_template_with_a_place_for_tools_says_nothing_of_it(roomy):
    roomy.model.tokenizer.chat_template = TOOLS
    row = {
        "messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny"}],
        "tools": [WEATHER],
    }
    preview = roomy.preview(row)
    assert not any("place for tools" in note for note in preview.notes)
    assert any(source == "the tools" and "weather" in text for source, text in told(preview))
