"""LLMChain: every Runnable verb, composition, and one rendering for training and for invoke.

Belongs here: prompt | llm | parser as one object. Does not: saving (test_saving), recipes (test_library).
"""

from contextvars import ContextVar

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import CommaSeparatedListOutputParser
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tracers.context import register_configure_hook
from taught import ANSWERS, PROMPTS, taught_model
from tiny import PAIRS, TEMPLATE

from llmchain_fed import LLMChain, LocalChatModel, LocalLLM
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.errors import ConfigError, DataError, PromptVariablesError, UnsupportedModelError

INPUT = {"text": "page locked"}
INPUTS = [{"text": english} for english, _ in PAIRS]


@pytest.fixture(params=["causal-full", "causal-lora", "seq2seq-full", "seq2seq-lora"])
def chain(request):
    kind, weights = request.param.split("-")
    return LLMChain(llm=LocalLLM(model=taught_model(kind, lora=weights == "lora"), max_new_tokens=24), prompt=TEMPLATE)


@pytest.fixture
def causal():
    return LLMChain(llm=LocalLLM(model=taught_model("causal"), max_new_tokens=24), prompt=TEMPLATE)


@pytest.fixture
def chat_chain():
    model = taught_model("causal")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return LLMChain(
        llm=LocalChatModel(model=model, max_new_tokens=24), prompt=ChatPromptTemplate([("human", TEMPLATE)])
    )


async def _aiter(*items):
    for item in items:
        yield item


async def every_verb(chain, given, **kwargs):
    events = [e async for e in chain.astream_events(given, version="v2", **kwargs)]
    whole = [e["data"]["output"] for e in events if e["event"] == "on_chain_end"][-1]
    return {
        "invoke": chain.invoke(given, **kwargs),
        "ainvoke": await chain.ainvoke(given, **kwargs),
        "batch": chain.batch([given, given], **kwargs)[1],
        "abatch": (await chain.abatch([given, given], **kwargs))[1],
        "batch_as_completed": dict(chain.batch_as_completed([given, given], **kwargs))[1],
        "abatch_as_completed": dict([r async for r in chain.abatch_as_completed([given, given], **kwargs)])[1],
        "stream": "".join(chain.stream(given, **kwargs)),
        "astream": "".join([piece async for piece in chain.astream(given, **kwargs)]),
        "transform": "".join(chain.transform(iter([given]), **kwargs)),
        "atransform": "".join([piece async for piece in chain.atransform(_aiter(given), **kwargs)]),
        "bind": chain.bind(**kwargs).invoke(given),
        "events": whole,
    }


@pytest.mark.parametrize("part", ["prompt", "llm", "output_parser", "llm_kwargs", "bound"])
def test_a_chains_parts_stay_what_they_are(part, causal):
    with pytest.raises(ConfigError, match=f"a chain's {part} stays what it is. Make another: LLMChain"):
        setattr(causal, part, getattr(causal, part))
    causal.name = "translator"
    assert causal.get_name() == "translator"


# --- verbs ----------------------------------------------------------------------------------------------------------


async def test_every_verb_gives_the_same_answer(chain):
    assert set((await every_verb(chain, INPUT)).values()) == {"page verrouillée"}


async def test_stop_reaches_the_model_in_every_verb(causal, chat_chain):
    for chain in (causal, chat_chain):
        answers = await every_verb(chain, INPUT, stop=["rou"])
        assert answers == dict.fromkeys(answers, "page ver")


async def test_a_call_time_keyword_reaches_the_model_in_every_verb(causal, chat_chain):
    ids = causal.model.tokenizer("page verrouillée")["input_ids"]
    two = causal.model.tokenizer.decode(ids[:2])
    for chain in (causal, chat_chain):
        answers = await every_verb(chain, INPUT, max_new_tokens=2)
        assert answers == dict.fromkeys(answers, two)


async def test_an_unknown_keyword_is_refused_in_every_verb(causal):
    for call in (
        lambda: causal.invoke(INPUT, max_new_token=2),
        lambda: causal.batch([INPUT], max_new_token=2),
        lambda: list(causal.stream(INPUT, max_new_token=2)),
        lambda: list(causal.batch_as_completed([INPUT], max_new_token=2)),
        lambda: list(causal.transform(iter([INPUT]), max_new_token=2)),
    ):
        with pytest.raises(ConfigError, match="did you mean `max_new_tokens`"):
            call()
    with pytest.raises(ConfigError):
        await causal.ainvoke(INPUT, max_new_token=2)
    with pytest.raises(ConfigError):
        [piece async for piece in causal.astream(INPUT, max_new_token=2)]
    with pytest.raises(ConfigError):
        [event async for event in causal.astream_events(INPUT, version="v2", max_new_token=2)]


async def test_an_event_stream_reports_the_models_pieces(causal):
    events = [e async for e in causal.astream_events(INPUT, version="v2")]
    pieces = [e["data"]["chunk"].text for e in events if e["event"] == "on_llm_stream"]
    assert "".join(pieces) == "page verrouillée"
    assert len(pieces) > 2
    only = [e async for e in causal.astream_events(INPUT, version="v2", include_types=["llm"], stop=["rou"])]
    assert {e["event"] for e in only} == {"on_llm_start", "on_llm_stream", "on_llm_end"}
    assert "".join(e["data"]["chunk"].text for e in only if e["event"] == "on_llm_stream") == "page ver"


def test_a_batch_is_one_call_to_the_model(chain, monkeypatch):
    calls, original = [], chain.model.module.generate
    monkeypatch.setattr(
        chain.model.module, "generate", lambda **given: (calls.append(len(given["input_ids"])), original(**given))[1]
    )
    assert chain.batch(INPUTS) == ANSWERS
    assert chain.apply(INPUTS) == ANSWERS
    assert chain.batch(INPUTS, stop=["xyz"]) == ANSWERS
    assert calls == [12, 12, 12]


def test_the_legacy_verbs(causal):
    assert causal.predict(text="page locked") == "page verrouillée"
    assert causal.apply(INPUTS[:2]) == ANSWERS[:2]


def test_a_string_stands_for_the_only_variable(causal):
    assert causal.invoke("page locked") == "page verrouillée"
    assert causal.batch(["page locked", {"text": "sign in"}]) == ["page verrouillée", "se connecter"]


def test_stream_comes_in_pieces_that_join_to_the_answer(chain):
    for given, answer in list(zip(INPUTS, ANSWERS, strict=True))[:4]:
        pieces = list(chain.stream(given))
        assert "".join(pieces) == answer
        assert len(pieces) > 2


def test_one_failing_input_can_be_returned_instead_of_raised(causal):
    good, bad = causal.batch([INPUT, {"other": 1}], return_exceptions=True)
    assert good == "page verrouillée"
    assert isinstance(bad, KeyError)


def test_defaults_bound_at_construction_are_overridden_by_a_call(causal):
    chain = LLMChain(llm=causal.llm, prompt=TEMPLATE, llm_kwargs={"stop": ["rou"]})
    assert chain.invoke(INPUT) == "page ver"
    assert chain.invoke(INPUT, stop=["ill"]) == "page verrou"
    assert chain.invoke(INPUT) == "page ver"
    assert chain.llm_kwargs == {"stop": ["rou"]}
    bound = LLMChain(llm=causal.llm.bind(stop=["ill"]), prompt=TEMPLATE)
    assert bound.invoke(INPUT) == "page verrou"
    assert bound.invoke(INPUT, stop=["rou"]) == "page ver"


def test_generation_options_reproduce_the_chains_answers(causal):
    llm = LocalLLM(model=causal.model, max_new_tokens=3, num_beams=2)
    chain = LLMChain(llm=llm.bind(max_new_tokens=24, stop=["xyz"]), prompt=TEMPLATE, llm_kwargs={"stop": ["rou"]})
    options = chain.generation_options()
    assert (options["max_new_tokens"], options["num_beams"], options["stop"]) == (24, 2, ["rou"])
    assert chain.model.generate([chain.render(INPUT)], **options) == [chain.invoke(INPUT)]


# --- composition ----------------------------------------------------------------------------------------------------


async def test_it_composes_on_both_sides(causal):
    pipeline = RunnableLambda(str.lower) | causal | RunnableLambda(str.upper)
    assert pipeline.invoke("PAGE LOCKED") == await pipeline.ainvoke("PAGE LOCKED") == "PAGE VERROUILLÉE"
    assert "".join((causal | RunnableLambda(lambda x: x)).stream(INPUT)) == "page verrouillée"
    both = RunnableParallel(fr=causal, en=RunnablePassthrough())
    assert both.invoke(INPUT) == {"fr": "page verrouillée", "en": INPUT}
    assert ({"text": RunnablePassthrough()} | causal).invoke("sign in") == "se connecter"
    assert causal.map().invoke(INPUTS[:2]) == ANSWERS[:2]


def test_wrapped_chains_answer_alike_and_forward_keywords(causal):
    wrapped = [
        causal.with_config(tags=["t"]),
        causal.with_retry(stop_after_attempt=2),
        causal.with_fallbacks([RunnableLambda(lambda _: "fallback")]),
        causal.bind(stop=["xyz"]),
        causal.with_types(input_type=dict),
        causal.with_listeners(),
    ]
    for chain in wrapped:
        assert chain.invoke(INPUT) == "page verrouillée"
        assert chain.invoke(INPUT, stop=["rou"]) == "page ver"
        assert chain.batch(INPUTS[:2]) == ANSWERS[:2]
        assert "".join(chain.stream(INPUT)) == "page verrouillée"


def test_a_fallback_takes_over_after_an_error(causal):
    chain = causal.with_fallbacks([RunnableLambda(lambda _: "fallback")])
    assert chain.invoke({"text": "x" * 200}) == "fallback"


def test_find_prompt_sees_through_every_wrapping(causal):
    for wrap in (
        causal,
        causal.with_config(tags=["t"]),
        causal.with_retry().with_config(run_name="r"),
        causal.with_fallbacks([RunnableLambda(str)]),
        causal | RunnableLambda(str),
        causal | RunnableLambda(str) | RunnableLambda(str),
    ):
        assert find_prompt(wrap) is causal
    bound = find_prompt(causal.with_fallbacks([RunnableLambda(str)]).bind(stop=["rou"]))
    assert bound.model is causal.model
    assert bound.invoke(INPUT) == "page ver"


def test_find_prompt_makes_one_of_a_plain_sequence(causal):
    found = find_prompt(causal.prompt | causal.llm.bind(stop=["rou"]) | CommaSeparatedListOutputParser())
    assert found.model is causal.model
    assert found.invoke(INPUT) == ["page ver"]
    assert found.render(INPUT) == PROMPTS[0]
    assert find_prompt((causal.prompt | causal.llm).with_config(tags=["t"])).invoke(INPUT) == "page verrouillée"


def test_find_prompt_finds_nothing_where_there_is_none(causal):
    for other in (
        RunnableLambda(str),
        "text",
        None,
        causal.prompt,
        RunnableLambda(str) | RunnableLambda(str),
    ):
        assert find_prompt(other) is None


# --- prompts and rendering ------------------------------------------------------------------------------------------

FEW_SHOT = FewShotPromptTemplate(
    prefix="Translate.\n",
    examples=[{"en": "yes", "fr": "oui"}, {"en": "no", "fr": "non"}],
    example_prompt=PromptTemplate.from_template("{en} = {fr}"),
    example_separator="\n",
    suffix="{text} =",
    input_variables=["text"],
)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (TEMPLATE, "Translate to French: page locked\n"),
        (PromptTemplate.from_template(TEMPLATE), "Translate to French: page locked\n"),
        (PromptTemplate.from_template("{a}{text}").partial(a="é {b} "), "é {b} page locked"),
        ("{{text}} {text}", "{text} page locked"),
        (FEW_SHOT, "Translate.\n\nyes = oui\nno = non\npage locked ="),
        (
            ChatPromptTemplate([("system", "Be {{brief}}."), ("human", "{text}")]),
            "System: Be {brief}.\nHuman: page locked",
        ),
    ],
)
def test_render_is_what_the_tokenizer_receives_on_invoke(causal, monkeypatch, prompt, text):
    chain = LLMChain(llm=causal.llm, prompt=prompt)
    seen, original = [], chain.model._tokenize
    monkeypatch.setattr(
        chain.model,
        "_tokenize",
        lambda texts, **options: (seen.append((texts, options)), original(texts, **options))[1],
    )
    chain.invoke(INPUT, max_new_tokens=1)
    list(chain.stream(INPUT, max_new_tokens=1))
    chain.batch([INPUT], max_new_tokens=1)
    assert [texts for texts, _ in seen] == [[text]] * 3
    assert {options["add_special_tokens"] for _, options in seen} == {chain.adds_special_tokens} == {True}
    assert chain.render(INPUT) == chain.render("page locked") == text


@pytest.mark.parametrize(
    ("prompt", "given", "text"),
    [
        (
            ChatPromptTemplate([("system", "Be brief."), ("human", "{text}"), ("ai", "ok"), ("human", "{more}")]),
            {"text": "a {b}", "more": "c"},
            "<|system|>Be brief.</s><|user|>a {b}</s><|assistant|>ok</s><|user|>c</s><|assistant|>",
        ),
        (
            ChatPromptTemplate([MessagesPlaceholder("past", optional=True), ("human", "{text}")]),
            {"text": "b", "past": [HumanMessage("a")]},
            "<|user|>a</s><|user|>b</s><|assistant|>",
        ),
        (PromptTemplate.from_template("Say {text}"), {"text": "hi"}, "<|user|>Say hi</s><|assistant|>"),
    ],
)
def test_render_over_a_chat_model_is_what_the_tokenizer_receives(make_model, monkeypatch, prompt, given, text):
    chain = LLMChain(llm=LocalChatModel(model=make_model(), max_new_tokens=1), prompt=prompt)
    seen, original = [], chain.model._tokenize
    monkeypatch.setattr(
        chain.model,
        "_tokenize",
        lambda texts, **options: (seen.append((texts, options)), original(texts, **options))[1],
    )
    chain.invoke(given)
    list(chain.stream(given))
    assert [texts for texts, _ in seen] == [[text]] * 2
    assert {options["add_special_tokens"] for _, options in seen} == {chain.adds_special_tokens} == {False}
    assert chain.render(given) == text


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.runs = []

    def on_chain_start(self, *args, **kwargs):
        self.runs.append("chain")

    def on_llm_start(self, *args, **kwargs):
        self.runs.append("llm")

    def on_chat_model_start(self, *args, **kwargs):
        self.runs.append("chat")


def test_render_fires_no_callbacks(causal, chat_chain):
    """Examples of a participant must not reach a tracer; not even one that is on for everything."""
    heard = Heard()
    everywhere = ContextVar("everywhere", default=None)
    register_configure_hook(everywhere, inheritable=True)
    token = everywhere.set(heard)
    for chain in (causal, chat_chain):
        chain.render(INPUT)
        assert chain.literals
    assert heard.runs == []
    causal.invoke(INPUT, max_new_tokens=1)  # the listener does listen
    everywhere.reset(token)
    assert set(heard.runs) == {"chain", "llm"}


def test_literals_are_the_templates_fixed_texts(causal, chat_chain):
    assert list(causal.literals) == ["Translate to French: ", "\n"]
    assert list(chat_chain.literals) == ["Translate to French: ", "\n"]
    assert list(LLMChain(llm=causal.llm, prompt="{a} and {b}.").literals) == ["", " and ", "."]


def test_variables_are_checked_when_rendering(causal):
    with pytest.raises(PromptVariablesError, match=r"\['text'\] is missing from \['txt'\]"):
        causal.render({"txt": "x"})
    two = LLMChain(llm=causal.llm, prompt="{a} {b}")
    with pytest.raises(PromptVariablesError, match="Pass a mapping"):
        two.render("x")
    assert causal.render({"text": "x", "unused": 1}) == "Translate to French: x\n"


def test_variables_and_schema(causal):
    chain = LLMChain(llm=causal.llm, prompt=PromptTemplate.from_template("{a} {b}").partial(b="x"))
    assert list(chain.input_variables) == ["a"]
    assert list(chain.optional_variables) == ["b"]
    assert set(chain.get_input_jsonschema()["properties"]) >= {"a"}
    assert set(causal.get_input_jsonschema()["properties"]) == {"text"}
    assert causal.get_input_jsonschema()["required"] == ["text"]
    assert causal.get_output_jsonschema()["type"] == "string"


def test_a_parser_makes_the_answer(causal):
    chain = LLMChain(llm=causal.llm, prompt=TEMPLATE, output_parser=CommaSeparatedListOutputParser())
    assert chain.invoke(INPUT) == ["page verrouillée"]


# --- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["promt", "memory", "verbose", "output_key"])
def test_an_unknown_constructor_option_is_refused(causal, name):
    with pytest.raises(ConfigError, match=f"unknown option `{name}`"):
        LLMChain(llm=causal.llm, prompt=TEMPLATE, **{name: 1})


def test_keywords_bound_to_the_chain_instead_of_its_model_are_refused(causal):
    with pytest.raises(ConfigError, match="llm_kwargs"):
        LLMChain(llm=causal.llm, prompt=TEMPLATE, kwargs={"stop": ["x"]})


def test_configurable_fields(causal):
    chain = causal.configurable_fields(llm_kwargs=ConfigurableField("model"))
    assert chain.invoke(INPUT, config={"configurable": {"model": {"stop": ["rou"]}}}) == "page ver"
    assert chain.invoke(INPUT) == "page verrouillée"


def test_a_prompt_of_another_type_is_refused(causal):
    with pytest.raises(ConfigError, match="got int"):
        LLMChain(llm=causal.llm, prompt=3)


def test_another_langchain_model_answers_but_cannot_learn():
    chain = LLMChain(llm=FakeListLLM(responses=["bonjour"]), prompt=TEMPLATE)
    assert chain.invoke(INPUT) == "bonjour"
    with pytest.raises(UnsupportedModelError, match="FakeListLLM"):
        chain.model  # noqa: B018
    with pytest.raises(UnsupportedModelError, match="FakeListLLM"):
        chain.render(INPUT)


def test_the_model_is_found_below_bindings(causal):
    chain = LLMChain(llm=causal.llm.bind(stop=["x"]).with_config(tags=["t"]), prompt=TEMPLATE)
    assert chain.model is causal.model
    assert causal.with_config(tags=["t"]).llm is causal.llm


def test_the_same_object_answers_with_new_weights(causal):
    bound, wrapped = causal.bind(stop=["xyz"]), causal.with_config(tags=["t"])
    state = causal.model.trainable_state()
    causal.model.load_state({n: -t for n, t in state.items()})
    answers = {causal.invoke(INPUT), bound.invoke(INPUT), wrapped.invoke(INPUT), causal.batch([INPUT])[0]}
    assert len(answers) == 1
    assert answers != {"page verrouillée"}
    causal.model.load_state(state)
    assert {causal.invoke(INPUT), bound.invoke(INPUT)} == {"page verrouillée"}


def test_name_repr_and_dump(chain):
    from langchain_core.load import dumpd

    assert chain.get_name() == "LLMChain"
    assert LLMChain(llm=chain.llm, prompt=TEMPLATE, name="translator").get_name() == "translator"
    assert len(repr(chain)) < 500
    assert "tensor" not in repr(chain).lower()
    assert dumpd(chain)["type"] == "not_implemented"


@pytest.mark.parametrize("form", ["pandas", "polars", "text", "mapping", "none"])
def test_what_only_looks_like_several_inputs_is_refused_with_the_way_to_write_it(make_chain, form):
    """A frame would be asked its columns' names, a text its characters."""
    import pandas as pd
    import polars as pl

    given = {
        "pandas": pd.DataFrame({"text": ["page", "error"]}), "polars": pl.DataFrame({"text": ["page", "error"]}),
        "text": "page", "mapping": {"text": "page"}, "none": None,
    }[form]  # fmt: skip
    said = {"pandas": "to_dict", "polars": "to_dicts", "none": "got None"}.get(form, "use invoke")
    chain = make_chain()
    chat = LocalChatModel(model=chain.model, max_new_tokens=4)
    several = (chain.apply, chain.batch, chain.llm.batch, chat.batch)
    for ask in (lambda x: chain.classify_batch(x, ["page", "erreur"]), *several):
        with pytest.raises(DataError, match=said):
            ask(given)


def test_a_series_is_several_inputs(make_chain):
    import pandas as pd

    chain, texts = make_chain(), ["page locked", "unknown error"]
    assert chain.batch(pd.Series(texts)) == chain.batch(texts)
    assert chain.classify_batch(pd.Series(texts), ["page", "erreur"]) == chain.classify_batch(texts, ["page", "erreur"])
