"""Composed chains: what is recorded is what `invoke` sends; each call has its gold answer, by order or by step."""

import asyncio
import functools
import operator
import threading
import time
from operator import itemgetter
from typing import Annotated, TypedDict

import pytest
from chat_templates import MARKED
from langchain_core.caches import InMemoryCache
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    ConfigurableField,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.runnables.history import RunnableWithMessageHistory
from langsmith import utils

from llmchain_fed import LLMChain, LocalChatModel, LocalLLM
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.chain.recording import recording
from llmchain_fed.chain.tracing.composed import ComposedChain
from llmchain_fed.data.encoding import encode_examples, encoded
from llmchain_fed.errors import ConfigError, DataError, ExampleFailedError, UnsupportedModelError
from llmchain_fed.model.generation.answers import Completion

DOCUMENTS = {"who": "Ada wrote the first program.", "when": "It was in 1843."}
PROMPT = PromptTemplate.from_template("{context}\nQ: {question}\nA:")


class Library(BaseRetriever):
    """Finds a document by a word."""

    fails: bool = False

    def _get_relevant_documents(self, query, *, run_manager):
        if self.fails and query == "fails":
            raise ConnectionError("the index is away")
        return [Document(DOCUMENTS.get(query, "nothing"))]


def joined(documents):
    return " ".join(d.page_content for d in documents)


@pytest.fixture
def llm(make_chain):
    return make_chain("causal", lora=True).llm


@pytest.fixture
def chat(make_chain, monkeypatch):
    model = make_chain("causal", lora=True).model
    monkeypatch.setattr(model.tokenizer, "chat_template", MARKED)  # other tests have the same tokenizer
    return LocalChatModel(model=model, max_new_tokens=8)


class Watch:
    """An independent witness: the texts that `invoke` sends, each answered by what comes next."""

    def __init__(self, *answers):
        self.texts, self.answers = [], list(answers)

    def answer(self, face, text, run, options):
        self.texts.append(str(text))
        return Completion(self.answers.pop(0), 0, 0, "stop")


def seen(runnable, inputs, *answers):
    watch = Watch(*answers)
    with recording(watch):
        result = runnable.invoke(inputs)
    return watch.texts, result


def rag(llm, **options):
    return (
        {"context": Library(**options) | joined, "question": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()
    )


def graph_of(llm):
    from langgraph.graph import END, START, StateGraph

    ask = PromptTemplate.from_template("Ask {x}")
    graph = StateGraph(TypedDict("State", {"x": str, "y": str}))
    graph.add_node("first", lambda state: {"y": llm.invoke("node " + state["x"])})
    graph.add_node("second", RunnableLambda(lambda state: {"x": state["y"]}) | ask | llm | (lambda y: {"y": y}))
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("second", END)
    return graph.compile()


def structure(name, llm):
    """(runnable, input, completions in order, step names; None: whatever they are)."""
    ask, inner = PromptTemplate.from_template("Ask {x}"), LLMChain(llm=llm, prompt="In {x}")
    other = FakeListChatModel(responses=["a model elsewhere"])
    same = RunnableLambda(lambda x: x)

    def called(value):
        return llm.invoke(f"from a function: {value}")

    if name == "rag":
        return rag(llm), "who", ["Ada"], ["3"]
    if name == "assign":
        return RunnablePassthrough.assign(fr=ask | llm), {"x": "q"}, ["oui"], ["fr/2"]
    if name == "branch":
        no = PromptTemplate.from_template("No {x}")
        return RunnableBranch((lambda d: d["x"] == "q", ask | llm), no | llm), {"x": "q"}, ["yes"], ["1/2"]
    if name == "before and behind":
        runnable = RunnableLambda(str.strip) | RunnableLambda(lambda x: {"x": x}) | inner | str.upper
        return runnable, "  q ", ["ok"], None
    if name == "fallbacks":
        return (same | ask | llm).with_fallbacks([other]), {"x": "q"}, ["first"], ["3"]
    if name == "alternatives":
        far = llm.configurable_alternatives(ConfigurableField(id="llm"), far=other)
        return same | ask | far, {"x": "q"}, ["here"], ["3"]
    if name == "function":
        return RunnableLambda(called), "q", ["said"], ["called"]
    if name == "partial":
        return RunnableLambda(functools.partial(lambda n, x: llm.invoke(n + x), "p")), "q", ["said"], None
    if name == "two in a row":
        then = PromptTemplate.from_template("Then {x}")
        return ask | llm | RunnableLambda(lambda y: {"x": y}) | then | llm, {"x": "q"}, ["one", "two"], ["2", "5"]
    if name == "named":
        first, second = ((ask | llm).with_config(run_name=n) for n in ("translate", "tell"))
        return first | (lambda y: {"x": y}) | second, {"x": "q"}, ["one", "two"], ["translate", "tell"]
    if name == "graph":
        return graph_of(llm), {"x": "q", "y": ""}, ["one", "two"], ["first", "second"]
    assert name == "map"
    return RunnableLambda(lambda x: [{"x": c} for c in x]) | (ask | llm).map(), "ab", ["1", "2"], None


NAMES = [
    "rag", "assign", "branch", "before and behind", "fallbacks", "alternatives", "function", "partial", "two in a row",
    "named", "graph", "map",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_is_what_invoke_sends(name, llm):
    runnable, inputs, gold, steps = structure(name, llm)
    found = find_prompt(runnable)
    assert isinstance(found, ComposedChain)
    assert found.model is llm.model
    texts, _ = seen(runnable, inputs, *gold)
    calls = found.calls(inputs, gold if len(gold) > 1 else gold[0])
    assert [call.text for call in calls] == texts
    assert [call.completion for call in calls] == gold
    if steps is not None:
        assert [call.step for call in calls] == steps
        assert found.calls(inputs, dict(zip(steps, gold, strict=True))) == calls


def test_the_chain_runs_with_the_gold_answer_behind_the_model(llm):
    kept = []
    find_prompt(rag(llm) | kept.append).calls("who", "Ada")
    assert kept == ["Ada"]


def test_everyone_of_a_parallel_has_its_own_by_name_and_never_by_order(llm):
    runnable = RunnableParallel(
        fr=PromptTemplate.from_template("F {x}") | llm, de=PromptTemplate.from_template("D {x}") | llm
    )
    found = find_prompt(runnable)
    calls = found.calls({"x": "q"}, {"de/2": "ja", "fr/2": "oui"})
    assert {(c.text, c.completion) for c in calls} == {("F q", "oui"), ("D q", "ja")}
    with pytest.raises(DataError, match="runs beside others"):
        found.calls({"x": "q"}, ["oui", "ja"])


def beside_one_another(llm):
    """Runnables over ["one", "two"] whose calls run beside one another; the first takes longer."""
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Send

    def asked(x):
        time.sleep(0.1 if x == "one" else 0)
        return llm.invoke(f"A {x}")

    async def awaited(x):
        await asyncio.sleep(0.1 if x == "one" else 0)
        return await llm.ainvoke(f"A {x}")

    async def gathered(xs):
        return await asyncio.gather(*map(awaited, xs))

    def graph(edges):
        class State(TypedDict):
            xs: list
            x: str
            ys: Annotated[list, operator.add]

        made = StateGraph(State)
        for name, x in (("one", "one"), ("two", "two"), ("each", None)):
            made.add_node(name, lambda s, x=x: {"ys": [asked(x or s["x"])]})
            made.add_edge(name, END)
        edges(made, START)
        return (lambda xs: {"xs": xs, "ys": []}) | made.compile()

    def sent(state):
        return [Send("each", {"x": x}) for x in state["xs"]]

    each = RunnableLambda(asked)
    return {
        "map": each.map(),
        "batch": RunnableLambda(each.batch),
        "parallel": RunnableParallel(a=lambda xs: asked(xs[0]), b=lambda xs: asked(xs[1])),
        "gather": RunnableLambda(gathered),
        "nodes": graph(lambda g, start: [g.add_edge(start, name) for name in ("one", "two")]),
        "send": graph(
            lambda g, start: g.add_conditional_edges(start, lambda s: [Send("each", {"x": x}) for x in s["xs"]])
        ),
    }


@pytest.mark.parametrize("name", ["map", "batch", "parallel", "gather", "nodes", "send"])
def test_a_list_never_says_whose_completion_it_is_where_calls_run_beside_one_another(name, llm):
    found = find_prompt(beside_one_another(llm)[name], llm)
    for given in (["ONE", "TWO"], {"each": ["ONE", "TWO"], "asked": ["ONE", "TWO"], "awaited": ["ONE", "TWO"]}):
        with pytest.raises(DataError, match=r"runs beside others|completion for it|left over"):
            found.calls(["one", "two"], given)
    with pytest.raises(DataError, match="runs beside others"):
        found.calls(["one", "two"], ["ONE", "TWO"])


def one_after_the_other(llm):
    asks = PromptTemplate.from_template("A {x}") | llm | StrOutputParser()

    async def awaited(xs):
        return [await llm.ainvoke(f"A {xs[0]}"), await asks.ainvoke({"x": xs[1]})]

    def put(**more):
        return RunnablePassthrough.assign(**more)

    return {
        "function": RunnableLambda(lambda xs: [llm.invoke(f"A {xs[0]}"), asks.invoke({"x": xs[1]})]),
        "chains in a function": RunnableLambda(lambda xs: [asks.invoke({"x": x}) for x in xs]),
        "coroutine": RunnableLambda(awaited),
        "one batch": RunnableLambda(lambda xs: llm.batch([f"A {x}" for x in xs])),
        "assign": (lambda xs: {"x": xs[0], "z": xs[1]}) | put(y=asks) | (lambda s: {"x": s["z"]}) | put(y=asks),
        "branch": (
            RunnableBranch((lambda xs: bool(asks.invoke({"x": xs[0]})), lambda xs: asks.invoke({"x": xs[1]})), llm)
        ),
    }


@pytest.mark.parametrize("name", ["function", "chains in a function", "coroutine", "one batch", "assign", "branch"])
def test_a_list_is_in_the_order_of_calls_that_come_one_after_the_other(name, llm):
    found = find_prompt(one_after_the_other(llm)[name], llm).calls(["one", "two"], ["ONE", "TWO"])
    assert [(c.text, c.completion) for c in found] == [("A one", "ONE"), ("A two", "TWO")]


def test_a_step_keeps_its_own_name_whoever_else_is_called(llm):
    """Neither another model's call, nor one that fails before it reaches the model, is taken for the next one's."""
    judge = FakeListChatModel(responses=["ja"] * 9)
    draft, final = (llm.with_config(run_name=name) for name in ("draft", "final"))

    def work(x):
        judge.invoke(x)
        with pytest.raises(ConfigError):
            llm.with_config(run_name="broken").invoke(x, nonsense=1)
        return final.invoke(f"final {draft.invoke(f'draft {x}')}")

    found = find_prompt(RunnableLambda(work), llm).calls("q", {"final": "two", "draft": "one"})
    assert [(c.text, c.completion, c.step) for c in found] == [
        ("draft q", "one", "draft"),
        ("final one", "two", "final"),
    ]


def test_an_answer_ends_where_its_own_call_lets_it(llm):
    """A stop string, or a length, that a function gives: completions that could never be answered are counted."""
    for options, count in (({"stop": ["x"]}, "contains_stop"), ({"max_new_tokens": 1}, "length_out_of_range")):
        bound = {"t": RunnablePassthrough()} | PromptTemplate.from_template("T {t}") | llm.bind(**options)
        for runnable in (RunnableLambda(lambda x, o=options: llm.invoke(x, **o)), bound):
            prompt = find_prompt(runnable, llm)
            report = encode_examples([("a", "page x rouge"), ("b", "page x")], llm.model, prompt).report
            assert getattr(report, count) == 2, (options, runnable)


def test_a_key_of_a_parallel_or_of_assign_names_its_one_call(llm):
    def asks(text):
        return PromptTemplate.from_template(text) | llm | StrOutputParser()

    both = find_prompt(RunnableParallel(fr=asks("F {x}"), de=asks("D {x}")))
    calls = both.calls({"x": "q"}, {"de": "ja", "fr": "oui"})
    assert {(c.text, c.completion) for c in calls} == {("F q", "oui"), ("D q", "ja")}
    assigned = find_prompt(RunnablePassthrough.assign(y=asks("Y {x}")) | RunnablePassthrough.assign(z=asks("Z {y}")))
    calls = assigned.calls({"x": "q"}, {"z": "two", "y": "one"})
    assert [(c.text, c.completion) for c in calls] == [("Y q", "one"), ("Z one", "two")]
    twice = find_prompt(RunnableParallel(fr=asks("F {x}") | (lambda y: {"x": y}) | asks("G {x}")))
    for given in ("oui", ["oui", "non"]):
        with pytest.raises(DataError, match="there is no completion for it"):
            twice.calls({"x": "q"}, {"fr": given, "other": "a"})


def test_a_skipped_and_a_repeated_step_keep_their_names(llm):
    fix = (PromptTemplate.from_template("Fix {x}") | llm).with_config(run_name="fix")
    tell = (PromptTemplate.from_template("Tell {x}") | llm).with_config(run_name="tell")

    def work(x):
        while x.startswith("!"):
            x = fix.invoke({"x": x})
        return tell.invoke({"x": x})

    found = find_prompt(RunnableLambda(work))
    assert [c.step for c in found.calls("fine", {"tell": "t"})] == ["tell"]
    repeated = found.calls("!a", {"fix": ["!b", "c"], "tell": "t"})
    assert [(c.step, c.text) for c in repeated] == [("fix", "Fix !a"), ("fix", "Fix !b"), ("tell", "Tell c")]


def test_an_agent_that_reads_on_is_one_row(chat):
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, StateGraph
    from langgraph.graph.message import add_messages

    graph = StateGraph(TypedDict("State", {"messages": Annotated[list, add_messages]}))
    graph.add_node("model", lambda s: {"messages": [chat.invoke(s["messages"])]})
    graph.add_node("user", lambda s: {"messages": [("user", "more")]})
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", lambda s: "user" if len(s["messages"]) < 4 else END)
    graph.add_edge("user", "model")
    found = find_prompt(graph.compile(checkpointer=InMemorySaver()))
    source = [({"messages": [("user", "hi")]}, ["one", "two"])] * 2  # a thread of its own: the second remembers nothing
    data = encode_examples(source, chat.model, found)
    assert (len(data), data.report.duplicate) == (2, 1)
    assert len(data[0]) == 4, "read, learnt, read, learnt"
    assert [chat.model.decoded(ids) for ids in data[0][1::2]] == ["one", "two"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_conversation_of_ones_own_for_each_example(chat):
    store = {}

    def history(session_id):
        return store.setdefault(session_id, InMemoryChatMessageHistory())

    prompt = ChatPromptTemplate([MessagesPlaceholder("history"), ("user", "{question}")])
    runnable = RunnableWithMessageHistory(
        prompt | chat, history, input_messages_key="question", history_messages_key="history"
    )
    found = find_prompt(runnable)
    assert isinstance(found, ComposedChain)
    first, second = (found.calls({"question": q}, "yes")[0].text for q in ("one", "two"))
    assert "one" in first
    assert "one" not in second
    assert store
    assert not any(kept.messages for kept in store.values()), "nobody's store of messages keeps an example"


def test_async_chains_too(llm):
    async def only_async(x):
        await asyncio.sleep(0)
        return {"x": x}

    runnable = RunnableLambda(only_async) | PromptTemplate.from_template("A {x}") | llm
    assert find_prompt(runnable).calls("q", "g")[0].text == "A q"


def test_an_async_step_behind_the_model_begins_the_example_anew(llm):
    async def only_async(x):
        return x

    runnable = PromptTemplate.from_template("A {x}") | llm | RunnableLambda(only_async)
    (call,) = ComposedChain(runnable, [llm]).calls({"x": "q"}, "g")
    assert (call.text, call.completion) == ("A q", "g")


@pytest.mark.parametrize("kind", ["llm", "chat"])
def test_each_prompt_of_a_batch_is_a_call_of_its_step(kind, llm, chat):
    face = {"llm": llm, "chat": chat}[kind]
    ask = (PromptTemplate.from_template("Ask {x}") | face).with_config(run_name="ask")
    runnable = RunnableLambda(lambda x: [{"x": c} for c in x]) | ask.map()
    calls = find_prompt(runnable).calls("ab", {"ask": ["1", "2"]})
    assert [(c.step, c.completion) for c in calls] == [("ask", "1"), ("ask", "2")]


def test_an_async_chain_names_its_steps(llm):
    first, second = ((PromptTemplate.from_template(f"{n} {{x}}") | llm).with_config(run_name=n) for n in ("a", "b"))

    async def work(x):
        said = await first.ainvoke({"x": x})
        return await second.ainvoke({"x": said})

    calls = find_prompt(RunnableLambda(work)).calls("q", {"a": "one", "b": "two"})
    assert [(c.step, c.text) for c in calls] == [("a", "a q"), ("b", "b one")]


def test_a_tuple_is_no_list_for_the_memory_of_runs(llm):
    found = find_prompt(RunnableLambda(lambda x: {"x": type(x).__name__}) | PromptTemplate.from_template("{x}") | llm)
    assert [found.calls(x, "c")[0].text for x in (["a"], ("a",))] == ["list", "tuple"]


def test_each_example_runs_once(llm):
    ran = []

    def look(x):
        ran.append(x)
        return {"x": x}

    found = find_prompt(RunnableLambda(look) | PromptTemplate.from_template("{x}") | llm)
    for _ in range(3):
        encode_examples([("a", "b"), ("c", "d")], llm.model, found)
    assert ran == ["a", "c"]


@pytest.mark.parametrize("kind", ["llm", "chat"])
def test_the_cache_of_answers_learns_nothing(kind, llm, chat):
    face = {"llm": llm, "chat": chat}[kind].model_copy(update={"cache": InMemoryCache(), "max_new_tokens": 4})
    runnable = RunnableLambda(lambda x: {"x": x}) | PromptTemplate.from_template("C {x}") | face | StrOutputParser()
    assert find_prompt(runnable).calls("q", "taught")
    assert runnable.invoke("q") != "taught"


def test_no_tracer_hears_of_examples(llm, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", "http://127.0.0.1:9")
    utils.get_env_var.cache_clear()
    assert utils.tracing_is_enabled()
    traced = []

    def look(x):
        traced.append(utils.tracing_is_enabled())
        return {"x": x}

    try:
        find_prompt(RunnableLambda(look) | PromptTemplate.from_template("{x}") | llm).calls("a", "b")
    finally:
        monkeypatch.undo()
        utils.get_env_var.cache_clear()
    assert traced == [False]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_calls_without_gold_and_gold_without_calls(llm):
    runnable, inputs, _, _ = structure("named", llm)
    found = find_prompt(runnable)
    with pytest.raises(DataError, match="calls its model 2 times, at last in the step 'tell', and the example has 1"):
        found.calls(inputs, "one")
    with pytest.raises(DataError, match="'tell' calls the model, and there is no completion for it, but for 'transl"):
        found.calls(inputs, {"translate": "one"})
    with pytest.raises(DataError, match=r"1 completion is left over.*The steps that called: translate, tell"):
        found.calls(inputs, ["one", "two", "three"])
    with pytest.raises(DataError, match="left over for 'other'"):
        found.calls(inputs, {"translate": "one", "tell": "two", "other": "three"})
    with pytest.raises(DataError, match="there is no completion for it, but for 'text'"):
        found.calls(inputs, {"text": "one"})


def test_a_fallback_never_takes_the_recording_for_a_failure(llm):
    runnable = (rag(llm) | llm).with_fallbacks([RunnableLambda(lambda x: "fell back")])
    with pytest.raises(DataError, match="calls its model 2 times"):
        find_prompt(runnable).calls("who", "only one")


def test_a_call_from_a_thread_of_ones_own_is_not_seen(llm):
    def work(x):
        said = []
        thread = threading.Thread(target=lambda: said.append(llm.invoke(x)))
        thread.start()
        thread.join()
        return said[0]

    with pytest.raises(DataError, match=r"did not call its model for it.*thread pool of one's own"):
        find_prompt(RunnableLambda(work)).calls("q", "gold")


def test_a_retriever_that_raises(llm):
    found = find_prompt(rag(llm, fails=True))
    with pytest.raises(ExampleFailedError, match="raises before its model was called: ConnectionError: the ind"):
        found.calls("fails", "x")
    rows = [("who", "Ada"), ("when", "1843"), ("fails", "x")]
    data = encoded(rows, llm.model, found, None, tolerance=0.4)
    assert (data.report.used, data.report.failed) == (2, 1)
    assert "1 more left out (for which the chain fails)" in data.report.in_words()
    with pytest.raises(ExampleFailedError, match=r"fails for 1 of 3 examples, and up to 5% .*example 2: .*is away"):
        encoded(rows, llm.model, found, None, tolerance=0.05)


def test_no_model_and_two_models(llm, make_chain):
    assert find_prompt(RunnableLambda(lambda x: x)) is None
    second = make_chain("causal", lora=True, seed=3).llm
    both = RunnableLambda(lambda x: second.invoke(llm.invoke(x)))
    with pytest.raises(UnsupportedModelError, match="holds two trainable models"):
        find_prompt(both)
    (call,) = find_prompt(both, llm).calls("q", "gold")
    assert (call.text, call.completion) == ("q", "gold")


def test_the_named_model_is_the_one_that_is_trained(llm, make_chain):
    second = make_chain("causal", lora=True, seed=3).llm
    first = LLMChain(llm=llm, prompt="First {x}")
    both = first | (lambda y: {"x": y}) | LLMChain(llm=second, prompt="Then {x}")
    for named, text in ((llm, "First q"), (second, None)):
        found = find_prompt(both, named)
        assert found.model.module is named.model.module
        (call,) = found.calls({"x": "q"}, "gold")
        assert call.text == text or (text is None and call.text.startswith("Then "))
    twice = first | (lambda y: {"x": y}) | LLMChain(llm=LocalLLM(model=llm.model), prompt="Then {x}")
    assert [c.text for c in find_prompt(twice, llm).calls({"x": "q"}, ["one", "two"])] == ["First q", "Then one"]
    assert find_prompt(first, second).model.module is second.model.module


def test_a_model_that_no_walk_finds_is_named(llm):
    class Registry:
        __slots__ = ()

        def model(self):
            return eval("models[0]", {"models": [llm]})

    runnable = RunnableLambda(lambda x: Registry().model().invoke(x))
    assert find_prompt(runnable, llm).calls("q", "gold")[0].text == "q"


def test_rows_of_names(llm):
    runnable = RunnableLambda(itemgetter("q")) | (lambda q: {"x": q}) | PromptTemplate.from_template("R {x}") | llm
    data = encode_examples([{"q": "a", "completion": "b"}], llm.model, find_prompt(runnable))
    assert llm.model.decoded(data[0][0]) == "R a"
    with pytest.raises(DataError, match="does not say whether the chain takes the prompt itself"):
        encode_examples([{"prompt": "a", "completion": "b"}], llm.model, find_prompt(runnable))


def test_both_kinds_of_faces_in_one_chain_are_refused(llm):
    chat = LocalChatModel(model=llm.model)
    plain = LocalLLM(model=llm.model)
    with pytest.raises(UnsupportedModelError, match="as a LocalLLM and as a LocalChatModel"):
        find_prompt(RunnableLambda(lambda x: chat.invoke(plain.invoke(x))))
