"""LocalLLM: a conformance suite of our own, because langchain-tests has none for string LLMs.

Belongs here: what LangChain's LLM interface promises, in every verb. Does not: what the text should be
(test_local_model).
"""

import asyncio
import threading
import time

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.runnables import ConfigurableField
from taught import ANSWERS, PROMPTS, taught_model

from llmchain_fed import LocalLLM
from llmchain_fed.errors import ConfigError


@pytest.fixture(params=["causal-full", "causal-lora", "seq2seq-full", "seq2seq-lora"])
def llm(request):
    kind, weights = request.param.split("-")
    return LocalLLM(model=taught_model(kind, lora=weights == "lora"), max_new_tokens=24)


@pytest.fixture
def causal():
    return LocalLLM(model=taught_model("causal"), max_new_tokens=24)


@pytest.fixture
def cache():
    store = InMemoryCache()
    set_llm_cache(store)
    yield store
    set_llm_cache(None)


def count_generates(monkeypatch, llm):
    calls, original = [], llm.model.module.generate
    monkeypatch.setattr(
        llm.model.module, "generate", lambda **given: (calls.append(len(given["input_ids"])), original(**given))[1]
    )
    return calls


def factor(llm):
    """What makes the weights useless; its inverse is exact."""
    return 32.0 if hasattr(llm.model.module, "peft_config") else -0.5


def forget(llm):
    """Loads other weights: every trainable tensor times `factor`."""
    llm.model.load_state({n: factor(llm) * t for n, t in llm.model.trainable_state().items()})


async def every_verb(llm, prompt, **kwargs):
    """The answer to one prompt through each verb."""
    events = [e async for e in llm.astream_events(prompt, version="v2", **kwargs)]
    return {
        "invoke": llm.invoke(prompt, **kwargs),
        "ainvoke": await llm.ainvoke(prompt, **kwargs),
        "batch": llm.batch([prompt], **kwargs)[0],
        "abatch": (await llm.abatch([prompt], **kwargs))[0],
        "stream": "".join(llm.stream(prompt, **kwargs)),
        "astream": "".join([piece async for piece in llm.astream(prompt, **kwargs)]),
        "generate": llm.generate([prompt], **kwargs).generations[0][0].text,
        "agenerate": (await llm.agenerate([prompt], **kwargs)).generations[0][0].text,
        "as_completed": next(iter(llm.batch_as_completed([prompt], **kwargs)))[1],
        "astream_events": "".join(e["data"]["chunk"] for e in events if e["event"] == "on_llm_stream"),
        "bound": llm.bind(**kwargs).invoke(prompt),
        "transform": "".join(llm.transform(iter([prompt]), **kwargs)),
    }


# --- verbs ----------------------------------------------------------------------------------------------------------


async def test_every_verb_gives_the_same_answer_without_the_prompt(llm):
    assert set((await every_verb(llm, PROMPTS[0])).values()) == {"page verrouillée"}


async def test_stop_means_the_same_in_every_verb(llm):
    assert set((await every_verb(llm, PROMPTS[0], stop=["lé", "rou"])).values()) == {"page ver"}


async def test_a_call_time_keyword_reaches_the_model_in_every_verb(causal):
    first = causal.model.tokenizer("page verrouillée")["input_ids"][:2]
    answers = await every_verb(causal, PROMPTS[0], max_new_tokens=2)
    assert set(answers.values()) == {causal.model.tokenizer.decode(first)}
    assert set((await every_verb(causal, PROMPTS[0], max_tokens=2)).values()) == set(answers.values())


async def test_an_unknown_keyword_is_refused_in_every_verb(causal):
    calls = [
        lambda: causal.invoke("x", max_new_token=2),
        lambda: causal.batch(["x"], max_new_token=2),
        lambda: list(causal.stream("x", max_new_token=2)),
        lambda: causal.bind(max_new_token=2).invoke("x"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="did you mean `max_new_tokens`"):
            call()
    with pytest.raises(ConfigError):
        await causal.ainvoke("x", max_new_token=2)
    with pytest.raises(ConfigError):
        await causal.abatch(["x"], max_new_token=2)
    with pytest.raises(ConfigError):
        [piece async for piece in causal.astream("x", max_new_token=2)]


def test_a_batch_is_one_call_to_the_model(llm, monkeypatch):
    calls = count_generates(monkeypatch, llm)
    assert llm.batch(PROMPTS) == ANSWERS
    assert calls == [12]
    assert llm.model_copy(update={"batch_size": 5}).batch(PROMPTS) == ANSWERS
    assert calls == [12, 5, 5, 2]


async def test_an_async_batch_is_one_call_to_the_model(causal, monkeypatch):
    calls = count_generates(monkeypatch, causal)
    assert await causal.abatch(PROMPTS) == ANSWERS
    assert calls == [12]


def test_max_concurrency_limits_a_batch(causal, monkeypatch):
    calls = count_generates(monkeypatch, causal)
    assert causal.batch(PROMPTS, config={"max_concurrency": 4}) == ANSWERS
    assert calls == [4, 4, 4]


def test_an_empty_batch_asks_nothing(causal, monkeypatch):
    calls = count_generates(monkeypatch, causal)
    assert causal.batch([]) == []
    assert calls == []


def test_the_event_loop_keeps_turning_while_the_model_works(causal):
    """Also for a second caller, who has to wait for the first: not on the loop."""
    slow = threading.Event()
    causal.model.module.register_forward_hook(lambda *_: slow.wait(0.02) or None)

    async def beat():
        longest, last = 0.0, time.monotonic()
        both = asyncio.gather(causal.ainvoke(PROMPTS[0]), causal.ainvoke(PROMPTS[1]))
        while not both.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return await both, longest

    answers, longest = asyncio.run(beat())
    assert answers == ANSWERS[:2]
    assert longest < 0.15  # one answer takes 0.2 s or more


def test_defaults_are_overridden_by_a_call_and_come_back(causal):
    llm = LocalLLM(model=causal.model, max_new_tokens=24, stop=["rou"])
    assert llm.invoke(PROMPTS[0]) == "page ver"
    assert llm.invoke(PROMPTS[0], stop=["ill"]) == "page verrou"
    assert llm.invoke(PROMPTS[0], stop=[]) == "page verrouillée"
    assert llm.invoke(PROMPTS[0]) == "page ver"
    assert llm.invoke(PROMPTS[0], max_new_tokens=None) == "page ver"  # as LangChain passes what is not set


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_error_in_a_stream_surfaces_at_once(causal, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(causal.model.module, "generate", broken)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(causal.stream(PROMPTS[0]))

    async def astream():
        return [piece async for piece in causal.astream(PROMPTS[0])]

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(astream())
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("is_async", [False, True])
def test_an_abandoned_stream_stops_computing(causal, is_async):
    calls = []
    causal.model.module.register_forward_hook(lambda *_: calls.append(1) or time.sleep(0.01))
    options = {"min_new_tokens": 80, "max_new_tokens": 80}

    async def aread():
        stream = causal.astream(PROMPTS[0], **options)
        await anext(stream)
        await stream.aclose()

    if is_async:
        asyncio.run(aread())
    else:
        stream = causal.stream(PROMPTS[0], **options)
        next(stream)
        stream.close()
    for _ in range(50):
        if not [t for t in threading.enumerate() if t.name == "llmchain_fed-stream"]:
            break
        time.sleep(0.02)
    assert len(calls) < 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_token": 3}, "did you mean `max_new_tokens`"),
        ({"api_key": "x"}, "unknown option `api_key`"),
        ({"temperature": -0.5}, "`temperature`"),
        ({"max_tokens": 0}, "`max_new_tokens`"),
        ({"num_beams": "many"}, "`num_beams`"),
    ],
)
def test_constructor_options_are_checked(causal, options, words):
    with pytest.raises(ConfigError, match=words):
        LocalLLM(model=causal.model, **options)
    with pytest.raises(ConfigError, match=words):  # and before a weight is read
        LocalLLM.from_pretrained("no/such-model", **options)


def test_a_name_is_no_model():
    with pytest.raises(ConfigError, match="LocalModel"):
        LocalLLM(model="smollm2-135m-instruct")


# --- what LangChain wants to know -----------------------------------------------------------------------------------


def test_token_usage_counts_prompt_and_answer(llm):
    tokenizer = llm.model.tokenizer
    prompt = sum(len(tokenizer(p)["input_ids"]) for p in PROMPTS)
    answer = sum(len(tokenizer(a)["input_ids"]) for a in ANSWERS)
    result = llm._generate(PROMPTS)
    assert result.llm_output["token_usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
    assert {g[0].generation_info["finish_reason"] for g in result.generations} == {"stop"}
    assert llm.generate(PROMPTS).llm_output["token_usage"]["total_tokens"] == prompt + answer
    (short,) = llm.generate(PROMPTS[:1], max_new_tokens=2).generations
    assert short[0].generation_info["finish_reason"] == "length"


class Tokens(BaseCallbackHandler):
    def __init__(self):
        self.tokens, self.ends, self.errors = [], [], []

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)

    def on_llm_end(self, response, **_):
        self.ends.append(response.generations[0][0].text)

    def on_llm_error(self, error, **_):
        self.errors.append(error)


def test_callbacks_hear_every_piece_of_a_stream_once(llm):
    heard = Tokens()
    pieces = list(llm.stream(PROMPTS[0], config={"callbacks": [heard]}))
    assert heard.tokens == pieces
    assert heard.ends == ["page verrouillée"]


def test_callbacks_hear_of_an_error(causal):
    heard = Tokens()
    with pytest.raises(ConfigError):
        list(causal.stream("x", config={"callbacks": [heard]}, bogus=1))
    assert len(heard.errors) == 1


def test_tokens_are_counted_offline_with_the_models_own_tokenizer(causal):
    assert causal.get_token_ids("page verrouillée") == causal.model.tokenizer("page verrouillée")["input_ids"]
    assert causal.get_num_tokens("page verrouillée") == len(causal.model.tokenizer("page verrouillée")["input_ids"])
    assert causal.get_num_tokens("") == 0


def test_configurable_fields_share_the_model(causal):
    llm = causal.configurable_fields(max_new_tokens=ConfigurableField("length"), stop=ConfigurableField("stop"))
    two = causal.model.tokenizer.decode(causal.model.tokenizer("page verrouillée")["input_ids"][:2])
    assert llm.invoke(PROMPTS[0], config={"configurable": {"length": 2}}) == two
    assert llm.invoke(PROMPTS[0], config={"configurable": {"stop": ["rou"]}}) == "page ver"
    assert llm.invoke(PROMPTS[0]) == "page verrouillée"
    made, _ = llm.prepare({"configurable": {"length": 2}})
    assert made.model is causal.model


def test_two_faces_share_one_model_and_its_weights(causal):
    other = LocalLLM(model=causal.model, max_new_tokens=24)
    assert other.model is causal.model
    forget(causal)
    assert other.invoke(PROMPTS[0]) == causal.invoke(PROMPTS[0]) != "page verrouillée"


def test_standard_parameters_name_model_temperature_and_length(causal):
    params = causal._get_ls_params(max_new_tokens=3, temperature=0.5)
    assert params["ls_model_name"] == "taught"
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_model_type"]) == (0.5, 3, "llm")


def test_repr_is_short_and_a_dump_has_no_weights(llm):
    assert len(repr(llm)) < 200
    assert "model" not in llm.model_dump()
    dump = llm.asdict() if hasattr(llm, "asdict") else llm.dict()  # renamed in langchain-core 1.5
    assert len(str(dump)) < 1000


# --- answer caches --------------------------------------------------------------------------------------------------


def test_a_global_cache_is_not_used_unless_asked_for(llm, cache):
    assert llm.invoke(PROMPTS[0]) == "page verrouillée"
    assert not cache._cache
    forget(llm)
    assert llm.invoke(PROMPTS[0]) != "page verrouillée"


@pytest.mark.parametrize("opt_in", [True, None, "own"])
async def test_a_cache_never_serves_an_answer_of_older_weights(llm, cache, monkeypatch, opt_in):
    cached = llm.model_copy(update={"cache": InMemoryCache() if opt_in == "own" else opt_in})
    state = llm.model.trainable_state()
    calls = count_generates(monkeypatch, llm)
    assert [cached.invoke(PROMPTS[0]) for _ in range(3)] == ["page verrouillée"] * 3
    assert await cached.ainvoke(PROMPTS[0]) == "page verrouillée"
    assert calls == [1]  # the cache works
    forget(llm)
    other = llm.invoke(PROMPTS[0])
    assert cached.invoke(PROMPTS[0]) == other != "page verrouillée"
    assert await cached.ainvoke(PROMPTS[0]) == other
    assert cached.batch(PROMPTS[:1]) == [other]
    for p in llm.model.trainable_parameters().values():  # others write through .data
        p.data.mul_(1 / factor(llm))
    assert cached.invoke(PROMPTS[0]) == "page verrouillée"
    llm.model.load_state(state)
    assert cached.invoke(PROMPTS[0]) == "page verrouillée"


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
async def test_a_cache_tells_call_time_options_apart(causal, cache, name):
    llm = causal.model_copy(update={"cache": True})
    short, long = llm.invoke(PROMPTS[0], **{name: 1}), llm.invoke(PROMPTS[0], **{name: 24})
    assert (short, long) == (causal.invoke(PROMPTS[0], max_new_tokens=1), "page verrouillée")
    assert await llm.ainvoke(PROMPTS[0], **{name: 1}) == short
    assert llm.bind(**{name: 1}).invoke(PROMPTS[0]) == short
    assert llm.invoke(PROMPTS[0], stop=["rou"]) == "page ver"
    assert llm.invoke(PROMPTS[0]) == "page verrouillée"


def test_a_cached_answer_does_not_excuse_an_unknown_option(causal, cache):
    llm = causal.model_copy(update={"cache": True})
    llm.invoke(PROMPTS[0])
    for options in ({"bogus": 1}, {"temperature": -1.0}):
        with pytest.raises(ConfigError):
            llm.invoke(PROMPTS[0], **options)


def test_a_cache_tells_two_models_apart(causal, cache):
    one = causal.model_copy(update={"cache": True})
    other = LocalLLM(model=taught_model("seq2seq"), max_new_tokens=24, cache=True)
    forget(other)
    one.invoke(PROMPTS[0])
    assert other.invoke(PROMPTS[0]) != "page verrouillée"


def test_a_cache_tells_frozen_adapters_apart(cache):
    """An adapter that is only used has no trainable weights, yet decides the answer."""
    answers = []
    for size in (0.0, 60.0):
        llm = LocalLLM(model=taught_model("causal", lora=True), max_new_tokens=24, cache=True)
        llm.model.load_state({n: size * t for n, t in llm.model.trainable_state().items()})
        llm.model._loads = 0
        llm.model.module.requires_grad_(False)
        answers.append(llm.invoke(PROMPTS[0]))
    assert answers[0] == "page verrouillée" != answers[1]
