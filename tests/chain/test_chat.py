"""LocalChatModel: langchain-tests' suites, and what they leave open (stop, rendering, caches, usage).

Belongs here: messages in and out. Does not: what the text should be (test_local_model).
"""

import asyncio
import functools
import threading
import time

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from taught import ANSWERS, PROMPTS, taught_model
from taught_tools import taught_tools_model
from tiny import tiny_module, train_tokenizer

from llmchain_fed import LocalChatModel, LocalModel
from llmchain_fed.errors import ConfigError, PromptTooLongError, UnsupportedModelError

PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # writes just what the taught model knows
TALK = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("Bye")]


@pytest.fixture
def chat():
    model = taught_model("causal")
    model.tokenizer.chat_template = PLAIN
    return LocalChatModel(model=model, max_new_tokens=24)


@pytest.fixture
def spoken(chat, monkeypatch):
    """The chat model over the turn-by-turn template, and what its tokenizer received."""
    chat.model.tokenizer.chat_template = train_tokenizer().chat_template
    seen, original = [], chat.model._tokenize
    monkeypatch.setattr(
        chat.model,
        "_tokenize",
        lambda texts, **options: (seen.append((texts, options)), original(texts, **options))[1],
    )
    return chat, seen


@functools.cache
def tiny_local_model():
    tokenizer = train_tokenizer()
    module = tiny_module("causal", len(tokenizer))
    module.config.max_position_embeddings = 8192  # tools in the system message are long in tiny tokens
    return LocalModel(module, tokenizer, name="tiny")


class _Local:
    @property
    def chat_model_class(self):
        return LocalChatModel

    @property
    def chat_model_params(self):
        return {"model": tiny_local_model(), "max_new_tokens": 160}

    @property
    def standard_chat_model_params(self):
        """The suites' own, with fewer tokens than their 100."""
        return super().standard_chat_model_params | {"max_tokens": 160}


class TestUnit(_Local, ChatModelUnitTests):
    pass


class TestIntegration(_Local, ChatModelIntegrationTests):
    """With a model that knows what the suite asks of tools; the rest it need not know."""

    @property
    def chat_model_params(self):
        return {"model": taught_tools_model(), "max_new_tokens": 160}

    @property
    def has_tool_calling(self):
        return True

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_model_override(self):
        return False  # the weights are the object; another name loads nothing


# --- messages → text ------------------------------------------------------------------------------------------------


def test_rendering_is_the_tokenizers_own_chat_template(spoken):
    chat, _ = spoken
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    wanted = chat.model.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert chat.render(TALK) == wanted
    assert wanted == "<|system|>Be brief.</s><|user|>Hi</s><|assistant|>Hello</s><|user|>Bye</s><|assistant|>"


async def test_every_verb_sends_the_rendered_text_without_further_special_tokens(spoken):
    chat, seen = spoken
    chat.invoke(TALK)
    list(chat.stream(TALK))
    chat.batch([TALK])
    await chat.ainvoke(TALK)
    [piece async for piece in chat.astream(TALK)]
    assert [texts for texts, _ in seen] == [[chat.render(TALK)]] * 5
    assert {options["add_special_tokens"] for _, options in seen} == {False}


def test_rendered_ids_are_those_of_the_tokenizers_template(spoken):
    chat, _ = spoken
    given = []
    chat.model.module.register_forward_pre_hook(
        lambda m, args, kwargs: given.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    chat.invoke("Hi", max_new_tokens=1)
    wanted = chat.model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert given == [wanted["input_ids"] if not isinstance(wanted, list) else wanted]


def test_text_blocks_count_as_text(chat):
    blocks = HumanMessage([{"type": "text", "text": PROMPTS[0]}])
    assert chat.render([blocks]) == PROMPTS[0]


def test_an_image_is_refused(chat):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(UnsupportedModelError, match="more than text"):
        chat.invoke([HumanMessage([{"type": "text", "text": "what is this?"}, image])])


def test_a_missing_chat_template_is_refused(chat):
    chat.model.tokenizer.chat_template = None
    for call in (chat.invoke, lambda x: list(chat.stream(x)), lambda x: chat.render([HumanMessage(x)])):
        with pytest.raises(UnsupportedModelError, match="no chat template"):
            call("Hi")


def test_a_seq2seq_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Use LocalLLM"):
        LocalChatModel(model=taught_model("seq2seq")).invoke("Hi")


def test_too_long_a_conversation_is_refused(chat):
    with pytest.raises(PromptTooLongError):
        chat.invoke([HumanMessage("x" * 200)])


# --- verbs ----------------------------------------------------------------------------------------------------------


async def every_verb(chat, prompt, **kwargs):
    events = [e async for e in chat.astream_events(prompt, version="v2", **kwargs)]
    return {
        "invoke": chat.invoke(prompt, **kwargs).content,
        "ainvoke": (await chat.ainvoke(prompt, **kwargs)).content,
        "batch": chat.batch([prompt, prompt], **kwargs)[1].content,
        "abatch": (await chat.abatch([prompt], **kwargs))[0].content,
        "stream": "".join(piece.content for piece in chat.stream(prompt, **kwargs)),
        "astream": "".join([piece.content async for piece in chat.astream(prompt, **kwargs)]),
        "bound": chat.bind(**kwargs).invoke(prompt).content,
        "events": "".join(e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"),
    }


async def test_every_verb_gives_the_same_answer(chat):
    assert set((await every_verb(chat, PROMPTS[0])).values()) == {"page verrouillée"}


async def test_stop_means_the_same_in_every_verb(chat):
    assert set((await every_verb(chat, PROMPTS[0], stop=["lé", "rou"])).values()) == {"page ver"}


async def test_a_call_time_keyword_reaches_the_model_in_every_verb(chat):
    two = chat.model.tokenizer.decode(chat.model.tokenizer("page verrouillée")["input_ids"][:2])
    assert set((await every_verb(chat, PROMPTS[0], max_tokens=2)).values()) == {two}


def test_an_unknown_keyword_is_refused(chat):
    for call in (chat.invoke, lambda x, **k: list(chat.stream(x, **k)), lambda x, **k: chat.batch([x], **k)):
        with pytest.raises(ConfigError, match="did you mean `max_new_tokens`"):
            call("Hi", max_new_token=2)


def test_an_unknown_constructor_option_is_refused(chat):
    with pytest.raises(ConfigError, match="did you mean `temperature`"):
        LocalChatModel(model=chat.model, temprature=1.0)
    LocalChatModel(model=chat.model, api_key="none", timeout=3)  # LangChain's standard ones are accepted


def test_a_batch_keeps_its_order(chat):
    assert [m.content for m in chat.batch(PROMPTS)] == ANSWERS


def test_usage_counts_the_rendered_prompt_and_the_answer(chat):
    prompt = len(chat.model.tokenizer(PROMPTS[0])["input_ids"])
    answer = len(chat.model.tokenizer("page verrouillée")["input_ids"])
    wanted = {"input_tokens": prompt, "output_tokens": answer, "total_tokens": prompt + answer}
    message = chat.invoke(PROMPTS[0])
    assert message.usage_metadata == wanted
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["model_name"] == "taught"
    total = AIMessageChunk("")
    for piece in chat.stream(PROMPTS[0]):
        total += piece
    assert total.usage_metadata == wanted
    assert total.response_metadata["finish_reason"] == "stop"
    assert chat.invoke(PROMPTS[0], max_tokens=2).response_metadata["finish_reason"] == "length"


def test_an_error_in_a_stream_surfaces_at_once(chat, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.model.module, "generate", broken)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream("Hi"))

    async def astream():
        return [piece async for piece in chat.astream("Hi")]

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(astream())
    assert time.monotonic() - start < 1


def test_an_abandoned_stream_stops_computing(chat):
    calls = []
    chat.model.module.register_forward_hook(lambda *_: calls.append(1) or time.sleep(0.01))
    stream = chat.stream(PROMPTS[0], min_new_tokens=80, max_new_tokens=80)
    next(stream)
    stream.close()
    assert len(calls) < 40
    assert not [t for t in threading.enumerate() if t.name == "llmchain_fed-stream"]


def test_tokens_are_counted_offline(chat):
    assert chat.get_num_tokens("page verrouillée") == len(chat.model.tokenizer("page verrouillée")["input_ids"])
    assert chat.get_num_tokens_from_messages([HumanMessage("Hi")]) > 0


@pytest.mark.parametrize("opt_in", [False, True, None])
def test_a_cache_never_serves_an_answer_of_older_weights(chat, opt_in):
    store = InMemoryCache()
    set_llm_cache(store)
    try:
        cached = chat.model_copy(update={"cache": opt_in})
        assert [cached.invoke(PROMPTS[0]).content for _ in range(2)] == ["page verrouillée"] * 2
        assert bool(store._cache) is (opt_in is not False)
        assert cached.invoke(PROMPTS[0], max_tokens=1).content == cached.invoke(PROMPTS[0], max_new_tokens=1).content
        assert cached.invoke(PROMPTS[0], max_tokens=1).content != "page verrouillée"
        assert cached.invoke(PROMPTS[0], stop=["rou"]).content == "page ver"
        with pytest.raises(ConfigError):
            cached.invoke(PROMPTS[0], bogus=1)
        chat.model.load_state({n: -t for n, t in chat.model.trainable_state().items()})
        assert cached.invoke(PROMPTS[0]).content == chat.invoke(PROMPTS[0]).content != "page verrouillée"
    finally:
        set_llm_cache(None)
