"""A chat batch is one batch, with LangChain's own bookkeeping; calls awaited together share one, too."""

import asyncio
import gc
from uuid import UUID

import pytest
from chat_templates import MARKED
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from llmchain_fed import LLMChain, LocalChatModel, LocalLLM
from llmchain_fed.errors import ConfigError, LLMChainFedError

TEXTS = ["Save", "a longer text to read", "x", "Save", "Page locked, try again"]


@pytest.fixture
def chat(make_chain, monkeypatch):
    model = make_chain("causal", lora=True).model
    monkeypatch.setattr(model.tokenizer, "chat_template", MARKED)  # which other tests share
    return LocalChatModel(model=model, max_new_tokens=6)


@pytest.fixture
def passes(chat, monkeypatch):
    """How many prompts each call of the model's `complete` had."""
    found, whole = [], type(chat.model).complete

    def complete(self, prompts, **options):
        found.append(len(prompts))
        return whole(self, prompts, **options)

    monkeypatch.setattr(type(chat.model), "complete", complete)
    return found


class Runs(BaseCallbackHandler):
    def __init__(self):
        self.started: list[UUID] = []
        self.ended: list[UUID] = []

    def on_chat_model_start(self, serialized, messages, *, run_id, **kwargs):
        self.started.append(run_id)

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.ended.append(run_id)


def test_one_forward_for_all_and_the_answers_of_invoke(chat, passes):
    alone = [chat.invoke(text) for text in TEXTS]
    passes.clear()
    together = chat.batch(TEXTS)
    assert passes == [5]
    assert [m.content for m in together] == [m.content for m in alone]
    assert [m.usage_metadata for m in together] == [m.usage_metadata for m in alone]


async def test_async_too(chat, passes):
    together = await chat.abatch(TEXTS)
    assert passes == [5]
    assert [m.content for m in together] == [chat.invoke(text).content for text in TEXTS]


def test_within_a_chain_a_pipe_and_bindings(chat, passes):
    prompt = ChatPromptTemplate.from_messages([("system", "Be short."), ("human", "{text}")])
    rows = [{"text": text} for text in TEXTS]
    for runnable in (
        LLMChain(llm=chat, prompt=prompt),
        prompt | chat | StrOutputParser(),
        prompt | chat.bind(max_tokens=3) | StrOutputParser(),
        (prompt | chat | StrOutputParser()).with_retry(),
    ):
        alone = [runnable.invoke(row) for row in rows]
        passes.clear()
        assert runnable.batch(rows) == alone
        assert passes == [5]


def test_each_has_its_own_run_and_callbacks(chat):
    mine = [Runs() for _ in TEXTS]
    chat.batch(TEXTS, [{"callbacks": [runs]} for runs in mine])
    assert [len(runs.started) for runs in mine] == [1] * 5
    assert all(runs.started == runs.ended for runs in mine)
    assert len({runs.started[0] for runs in mine}) == 5


def test_max_concurrency_bounds_a_batch(chat, passes):
    chat.batch(TEXTS, {"max_concurrency": 2})
    assert passes == [2, 2, 1]


def test_a_bad_input_costs_only_itself(chat, passes):
    long = "word " * 2000
    rows = ["Save", long, "x", 7]
    found = chat.batch(rows, return_exceptions=True)
    assert isinstance(found[1], LLMChainFedError)
    assert isinstance(found[3], (ValueError, LLMChainFedError))
    assert [found[0].content, found[2].content] == [chat.invoke(text).content for text in ("Save", "x")]
    with pytest.raises((ValueError, LLMChainFedError)):
        chat.batch(rows)
    with pytest.raises(ConfigError, match="temprature"):
        chat.batch(["a", "b"], temprature=1)
    assert chat.batch([]) == []


def test_a_cached_answer_is_not_computed_again(chat, passes):
    cached = chat.model_copy(update={"cache": InMemoryCache()})
    first = cached.batch(TEXTS)
    passes.clear()
    assert [m.content for m in cached.batch(TEXTS)] == [m.content for m in first]
    assert passes == []


def test_sampled_answers_to_one_text_are_drawn_one_by_one(chat):
    found = chat.batch(["Save"] * 8, temperature=2.0)
    assert len({m.content for m in found}) > 1


def test_another_call_within_a_batch_is_answered_by_itself(chat, passes):
    class Asks(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            self.said = chat.invoke([HumanMessage("aside")]).content

    asks = Asks()
    found = chat.batch(["a", "b"], {"callbacks": [asks]})
    assert asks.said == chat.invoke([HumanMessage("aside")]).content
    assert [m.content for m in found] == [chat.invoke(t).content for t in "ab"]


# --- gathering --------------------------------------------------------------------------------------------------------


async def test_calls_awaited_together_share_a_batch(chat, passes):
    alone = [chat.invoke(text).content for text in TEXTS]
    passes.clear()
    found = await asyncio.gather(*(chat.ainvoke(text) for text in TEXTS))
    assert passes == [5]
    assert [m.content for m in found] == alone
    assert all(isinstance(m, AIMessage) for m in found)


async def test_string_models_too(chat, passes):
    llm = LocalLLM(model=chat.model, max_new_tokens=6)
    alone = [llm.invoke(text) for text in TEXTS]
    passes.clear()
    assert await asyncio.gather(*(llm.ainvoke(text) for text in TEXTS)) == alone
    assert passes == [5]


async def test_only_equal_options_are_gathered_and_zero_turns_it_off(chat, passes):
    await asyncio.gather(chat.ainvoke("a"), chat.ainvoke("b"), chat.ainvoke("c", max_tokens=2))
    assert sorted(passes) == [1, 2]
    passes.clear()
    off = chat.model_copy(update={"gather_ms": 0.0})
    await asyncio.gather(*(off.ainvoke(text) for text in TEXTS))
    assert passes == [1] * 5
    passes.clear()
    await asyncio.gather(*(chat.ainvoke(text, seed=1, temperature=1.0) for text in TEXTS))
    assert passes == [1] * 5, "draws must not depend on who else calls"
    with pytest.raises(ConfigError, match="gather_ms"):
        LocalChatModel(model=chat.model, gather_ms=11)


async def test_models_of_several_adapters_are_never_one_batch(chat, passes):
    """They share a module, and each answers with weights of its own."""
    import torch

    with torch.no_grad():
        for parameter in chat.model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    bare = chat.model_copy(update={"model": chat.model.without_adapter()})
    apart = [chat.invoke("Save").content, bare.invoke("Save").content]
    assert apart[0] != apart[1]
    passes.clear()
    found = await asyncio.gather(chat.ainvoke("Save"), bare.ainvoke("Save"))
    assert passes == [1, 1]
    assert [m.content for m in found] == apart


async def test_a_window_is_no_larger_than_a_batch(chat, passes):
    small = chat.model_copy(update={"batch_size": 2})
    found = await asyncio.gather(*(small.ainvoke(text) for text in TEXTS))
    assert sorted(passes) == [1, 2, 2]
    assert [m.content for m in found] == [chat.invoke(text).content for text in TEXTS]


async def test_a_bad_call_and_one_that_is_given_up_cost_the_others_nothing(chat):
    calls = [asyncio.create_task(chat.ainvoke(text)) for text in ("Save", "word " * 2000, "x", "given up")]
    await asyncio.sleep(0)
    calls[3].cancel()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[1], LLMChainFedError)
    assert isinstance(found[3], asyncio.CancelledError)
    assert [found[0].content, found[2].content] == [chat.invoke(text).content for text in ("Save", "x")]


def test_a_loop_that_is_gone_leaves_nothing(chat):
    from llmchain_fed.chain.batching import gathering

    asyncio.run(chat.ainvoke("a"))
    gc.collect()
    assert all(loop.is_running() or not windows for loop, windows in gathering._open.items())
