"""`with_structured_output`: answers are objects of the schema by every verb, and objects are what is trained on.

Belongs here: chains and faces. Does not: how tokens keep to a grammar (model/test_grammar), tools (test_tools).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import typing
from decimal import Decimal
from ipaddress import IPv6Address
from typing import Annotated, Literal

import pytest
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from pydantic import (
    AwareDatetime,
    BaseModel,
    Field,
    HttpUrl,
    PastDate,
    SecretStr,
    StringConstraints,
    computed_field,
    create_model,
)
from tiny import tiny_module, train_tokenizer
from typing_extensions import TypedDict

from llmchain_fed import FederatedAveraging, LLMChain, LocalChatModel, LocalModel, TrainingConfig
from llmchain_fed.chain.finding import find_prompt
from llmchain_fed.chain.structured import json_schema_of
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.data.examples import Example, read_examples, wanted_text
from llmchain_fed.errors import ConfigError, ContractError, RecipeError, SchemaError
from llmchain_fed.federated.target import Target, check_contract
from llmchain_fed.model.generation.json_schema import shape_of

OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"


class Finding(BaseModel):
    """A finding."""

    organ: str
    grade: Literal["minor", "major"]
    size: int | None = None


class FindingDict(TypedDict):
    """A finding."""

    organ: str
    size: int


PROMPT = ChatPromptTemplate.from_messages([("user", "Read: {text}")])
EXAMPLES = [
    ("page", Finding(organ="lung", grade="minor")),
    ("file", Finding(organ="heart", grade="major", size=3)),
    ("new", Finding(organ="liver", grade="minor", size=12)),
    ("user", Finding(organ="skin", grade="major")),
]
METHODS = ("json_schema", "function_calling")


@pytest.fixture
def chat():
    tokenizer = train_tokenizer()
    module = tiny_module("causal", len(tokenizer))
    module.config.max_position_embeddings = 2048
    return LocalChatModel(model=LocalModel(module, tokenizer, name="tiny"), max_new_tokens=90)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_every_verb_answers_objects(chat, method):
    runnable = chat.with_structured_output(Finding, method=method)
    answer = runnable.invoke("page")
    assert isinstance(answer, Finding)
    assert await runnable.ainvoke("page") == answer
    assert runnable.batch(["page", "page"]) == [answer, answer]
    assert await runnable.abatch(["page"]) == [answer]
    assert list(runnable.stream("page"))[-1] == answer
    assert (PROMPT | runnable).invoke({"text": "page"}) == runnable.invoke("Read: page")
    sampled = chat.model_copy(update={"temperature": 3.0}).with_structured_output(Finding, method=method)
    assert all(isinstance(found, Finding) for found in sampled.batch(["page", "file", "new"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [FindingDict, Finding.model_json_schema()])
def test_other_schemas_answer_dicts(chat, method, schema):
    answer = chat.with_structured_output(schema, method=method).invoke("page")
    assert isinstance(answer, dict)
    assert answer.keys() >= {"organ"}


def test_a_decimal_is_written_as_what_pydantic_reads(chat):
    class Price(BaseModel):
        value: Annotated[Decimal, Field(ge=0, le=100)]
        other: Decimal | None

    for seed in range(5):
        answer = chat.with_structured_output(Price).invoke("page", temperature=1.5, seed=seed)
        assert 0 <= answer.value <= 100


class Inner(typing.TypedDict):
    organ: Literal["lung", "skin"]
    note: typing.NotRequired[str]


class Whole(typing.TypedDict):
    """A report."""

    findings: list[Inner]
    first: Inner | None


def test_typings_own_typed_dicts_are_schemas_as_they_are_elsewhere(chat):
    inner = {
        "organ": {"enum": ["lung", "skin"], "title": "Organ", "type": "string"},
        "note": {"title": "Note", "type": "string"},
    }
    assert json_schema_of(Whole) == {
        "$defs": {"Inner": {"properties": inner, "required": ["organ"], "title": "Inner", "type": "object"}},
        "properties": {
            "findings": {"items": {"$ref": "#/$defs/Inner"}, "title": "Findings", "type": "array"},
            "first": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "null"}]},
        },
        "required": ["findings", "first"],
        "title": "Whole",
        "type": "object",
        "description": "A report.",
    }
    assert chat.with_structured_output(Whole).invoke("page").keys() == {"findings", "first"}


def test_raw_answers_come_along(chat):
    answer = chat.with_structured_output(Finding, include_raw=True).invoke("page")
    assert isinstance(answer["raw"], AIMessage)
    assert Finding.model_validate_json(answer["raw"].content) == answer["parsed"]
    assert answer["parsing_error"] is None


def test_json_mode_answers_some_object(chat):
    assert isinstance(chat.with_structured_output(method="json_mode").invoke("page"), dict)


def test_a_response_format_in_openais_form(chat):
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    assert isinstance(json.loads(chat.invoke("page", response_format=schema).content), int)
    assert chat.invoke("page", response_format={"type": "text"}).content == chat.invoke("page").content
    with pytest.raises(ConfigError, match="with_structured_output writes it"):
        chat.invoke("page", response_format={"type": "yaml"})


def test_a_model_whose_prompt_opens_its_reasoning_ends_it_first(chat):
    chat.model.tokenizer.chat_template = OPENS
    answer = chat.with_structured_output(Finding, include_raw=True).invoke("page")
    assert isinstance(answer["parsed"], Finding)
    assert answer["raw"].additional_kwargs.get("reasoning_content", "") is not None


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(chat):
    runnable = chat.with_structured_output(Finding)
    with pytest.raises(SchemaError, match=r"takes (\d+) tokens .* room for 12. Set max_new_tokens=\1"):
        runnable.invoke("page", max_new_tokens=12)


def test_bad_schemas_are_refused_when_they_are_bound(chat):
    with pytest.raises(SchemaError, match="no value fits"):
        chat.with_structured_output({"title": "x", "type": "object", "properties": {"a": False}, "required": ["a"]})
    with pytest.raises(SchemaError, match="'not' is not known here"):
        chat.with_structured_output({"title": "x", "not": {}})
    with pytest.raises(ConfigError, match="takes a Pydantic class"):
        chat.with_structured_output()
    with pytest.raises(ConfigError, match="method is"):
        chat.with_structured_output(Finding, method="yaml")
    with pytest.raises(ConfigError, match="got 3"):
        chat.with_structured_output(3)


# --- training -------------------------------------------------------------------------------------------------------


def learnt(target, example):
    """What the model reads, and what it is taught."""
    prompt = find_prompt(target)
    (call,) = prompt.calls(*example)
    return call.text, call.completion


@pytest.mark.parametrize("form", ["object", "dict", "text", "loose text", "message"])
def test_an_object_is_taught_as_the_answer_that_gives_it_back(chat, form):
    wanted = EXAMPLES[1][1]
    data = wanted.model_dump(mode="json")
    completion = {
        "object": wanted,
        "dict": dict(reversed(data.items())),
        "text": json.dumps(data),
        "loose text": json.dumps(data, indent=3),
        "message": AIMessage(json.dumps(data)),
    }[form]
    text, taught = learnt(chat.with_structured_output(Finding), ("page", completion))
    assert text == chat.render("page")
    assert taught == '{"organ": "heart", "grade": "major", "size": 3}'
    assert shape_of(Finding.model_json_schema()).node.whole(taught)


def test_a_dataclass_is_an_object_too(chat):
    @dataclasses.dataclass
    class Record:
        organ: str
        size: int

    _, taught = learnt(chat.with_structured_output(FindingDict), ("page", Record("lung", 2)))
    assert taught == '{"organ": "lung", "size": 2}'


def test_with_function_calling_the_object_is_a_call(chat):
    runnable = chat.with_structured_output(Finding, method="function_calling")
    text, taught = learnt(runnable, EXAMPLES[1])
    assert text == chat.render("file", tools=[Finding])
    assert taught == (
        '<tool_call>\n{"name": "Finding", "arguments": {"organ": "heart", "grade": "major", "size": 3}}\n</tool_call>'
    )
    assert learnt(runnable, ("page", EXAMPLES[1][1].model_dump()))[1] == taught


WRAPPINGS = {
    "face": lambda r: (r, lambda text: text),
    "pipe": lambda r: (PROMPT | r, lambda text: {"text": text}),
    "behind a function": lambda r: (RunnableLambda(lambda x: f"Read: {x}") | r, lambda text: text),
    "configured": lambda r: (r.with_config(tags=["a"]), lambda text: text),
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_is_trained_on_is_what_invoke_sends_and_may_answer(chat, wrapping, method, raw, monkeypatch):
    target, given = WRAPPINGS[wrapping](chat.with_structured_output(Finding, method=method, include_raw=raw))
    sent, complete = [], LocalModel.complete

    def listening(self, texts, **options):
        sent.append((texts, options))
        return complete(self, texts, **options)

    monkeypatch.setattr(LocalModel, "complete", listening)
    target.invoke(given("page"))
    ((texts, options),) = sent
    text, taught = learnt(target, (given("page"), EXAMPLES[0][1]))
    assert [text] == texts
    assert options["grammar"].node.whole(taught)


def test_a_federation_learns_objects(chat):
    """Two participants teach two objects each; the very same Runnable then answers them."""
    runnable = chat.with_structured_output(Finding)
    before = runnable.batch([x for x, _ in EXAMPLES])
    training = TrainingConfig(learning_rate=6e-3, batch_size=2, epochs=10)
    fed = FederatedAveraging(runnable, participants={"a": EXAMPLES[:2], "b": EXAMPLES[2:]}, training=training)
    fed.fit(rounds=20)
    assert [runnable.invoke(x) for x, _ in EXAMPLES] == [wanted for _, wanted in EXAMPLES] != before
    assert fed.evaluate(EXAMPLES).loss < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_sites_with_other_schemas_are_sides_of_no_federation(chat, method):
    ours, theirs = (PROMPT | chat.with_structured_output(schema, method=method) for schema in (Finding, FindingDict))
    same = PROMPT | chat.with_structured_output(Finding, method=method)
    hub = Target.of(ours).contract()
    with pytest.raises(ContractError, match="another contract"):
        check_contract("b", site=Target.of(theirs).contract(), server=hub)
    with pytest.raises(ContractError, match="another contract"):
        check_contract("b", site=Target.of(PROMPT | chat).contract(), server=hub)
    check_contract("b", site=Target.of(same).contract(), server=hub)


def test_bad_completions_say_what_does_not_fit(chat):
    runnable = chat.with_structured_output(Finding)
    for completion, said in (
        ({"organ": "lung", "grade": "worst"}, "grade is 'worst'"),
        ({"grade": "minor"}, "'organ' is missing"),
        ("lung, minor", "is no JSON"),
        (["lung"], "an object with"),
    ):
        with pytest.raises(SchemaError, match=said):
            learnt(runnable, ("page", completion))
    with pytest.raises(SchemaError, match="grade is 'worst'"):
        encode_examples([("page", {"organ": "a", "grade": "worst"})], chat.model, find_prompt(runnable))


# --- chains ---------------------------------------------------------------------------------------------------------


def test_an_llm_chain_takes_it_apart_and_is_saved(chat, tmp_path):
    schema = Finding.model_json_schema()
    chain = LLMChain(llm=chat.with_structured_output(schema), prompt="Read: {text}")
    assert isinstance(chain.output_parser, JsonOutputParser)
    answer = chain.invoke({"text": "page"})
    Finding.model_validate(answer)
    FederatedAveraging(chain, participants={"a": [({"text": x}, y) for x, y in EXAMPLES]}, lr=1e-3).fit(rounds=1)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.invoke({"text": "page"}) == chain.invoke({"text": "page"})
    assert loaded.calls({"text": "page"}, EXAMPLES[1][1]) == chain.calls({"text": "page"}, EXAMPLES[1][1])


def test_an_llm_chain_of_a_class_answers_and_says_before_training_that_no_file_holds_it(chat):
    chain = LLMChain(llm=chat.with_structured_output(Finding), prompt="Read: {text}")
    assert isinstance(chain.invoke({"text": "page"}), Finding)
    with pytest.raises(RecipeError, match="put this parser behind the chain"):
        FederatedAveraging(chain, participants={"a": [({"text": x}, y) for x, y in EXAMPLES]})


def test_examples_of_objects_are_no_empty_ones(chat):
    prompt = find_prompt(chat.with_structured_output(Finding))
    assert [example.empty for example in read_examples(EXAMPLES, prompt)] == [False] * 4
    assert encode_examples(EXAMPLES, chat.model, prompt).report.used == 4


NULLS = {"title": "t", "type": "object", "required": ["a", "b"], "properties": {
    "a": {"type": ["string", "null"]}, "b": {"type": "array", "items": {"type": ["integer", "null"]}}}}  # fmt: skip


@pytest.mark.parametrize("form", ["pair", "list", "row", "example", "text"])
def test_null_within_an_object_is_null_in_every_form_of_a_row(chat, form):
    """In a row null is a text that is missing; within the object that is the answer it is a value of its own."""
    data = {"a": None, "b": [1, None]}
    row = {
        "pair": ("page", data),
        "list": ["page", data],
        "row": {"prompt": "page", "completion": data},
        "example": Example("page", data),
        "text": ("page", json.dumps(data)),
    }[form]
    prompt = find_prompt(chat.with_structured_output(NULLS))
    (example,) = read_examples([row], prompt)
    assert not example.empty
    assert wanted_text(example, prompt) == '{"a": null, "b": [1, null]}'
    assert encode_examples([row], chat.model, prompt).report.used == 1


def test_a_number_that_is_missing_within_an_object_is_no_completion(chat):
    prompt = find_prompt(chat.with_structured_output(NULLS))
    for row in (("page", {"a": "x", "b": [float("nan")]}), {"prompt": "page", "completion": {"a": float("nan")}}):
        assert encode_examples([row], chat.model, prompt).report.empty == 1


# --- objects and what reads them -------------------------------------------------------------------------------------


class Priced(BaseModel):
    price: Decimal = Decimal("1.25")

    @computed_field
    def double(self) -> float:
        return float(self.price) * 2


def holding(kind):
    return create_model("Holding", held=(kind, Field(validation_alias="weight", serialization_alias="mass")))


READ = {
    "computed fields": (Priced, Priced()),
    "nested computed fields": (list[Priced], [Priced(price=Decimal(3))]),
    "a decimal": (Decimal, Decimal("2.50")),
    "a time without an offset": (datetime.datetime, datetime.datetime(2024, 1, 31, 10)),
    "a time with one": (datetime.datetime, datetime.datetime(2024, 1, 31, 10, tzinfo=datetime.UTC)),
    "a time of day": (datetime.time, datetime.time(10, 30)),
    "an aware time": (AwareDatetime, datetime.datetime(2024, 1, 31, 10, tzinfo=datetime.UTC)),
    "a leap day": (datetime.date, datetime.date(2024, 2, 29)),
    "a duration": (datetime.timedelta, datetime.timedelta(days=2, seconds=61, microseconds=30)),
    "numbers as keys": (dict[int, str], {1: "a", -5: "b"}),
    "days as keys": (dict[datetime.date, int], {datetime.date(2024, 1, 31): 1}),
    "a set": (set[int], {1, 2}),
    "a pattern and a length": (Annotated[str, Field(pattern="^[a-z]*$", max_length=5)], "abc"),
    "stripped text": (Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], "a b"),
    "an address": (IPv6Address, IPv6Address("::1")),
    "a page": (HttpUrl, HttpUrl("https://example.org/a?b=c")),
    "tagged options": (Annotated[Finding | Priced | None, Field()], Finding(organ="a", grade="minor")),
}


@pytest.mark.parametrize("name", READ)
def test_what_pydantic_reads_is_taught_as_what_it_reads_again(chat, name):
    kind, value = READ[name]
    model = holding(kind)
    wanted = model(weight=value)
    prompt = find_prompt(chat.with_structured_output(model))
    (call,) = prompt.calls("page", wanted)
    assert model.model_validate_json(call.completion) == wanted
    shape = shape_of(json_schema_of(model))
    assert shape.node.whole(call.completion)
    model.model_validate_json(shape.node.shortest)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (PastDate, "a date with bounds"),
        (dict[float, int], "keys"),
        (Annotated[set[int], Field(min_length=2)], "uniqueItems"),
        (Annotated[Decimal, Field(decimal_places=2)], "decimal_places"),
        (Annotated[datetime.date, Field(gt=datetime.date(2024, 1, 1))], "a date with bounds"),
    ],
)
def test_what_pydantic_checks_and_no_schema_says_is_refused(chat, kind, said):
    with pytest.raises(SchemaError, match=said):
        chat.with_structured_output(holding(kind))


def test_a_secret_is_not_learnt_as_asterisks(chat):
    model = holding(SecretStr)
    runnable = chat.with_structured_output(model)
    with pytest.raises(SchemaError, match="asterisks"):
        learnt(runnable, ("page", model(weight="abc")))
    assert learnt(runnable, ("page", {"weight": "abc"}))[1] == '{"weight": "abc"}'


@pytest.mark.parametrize("method", METHODS)
def test_openais_form_of_a_schema_is_that_schema(chat, method):
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": inner, "strict": True}}
    assert chat.with_structured_output(form, method=method).invoke("page").keys() == {"n"}
    with pytest.raises(ConfigError, match="json_schema"):
        chat.with_structured_output({"type": "json_schema", "json_schema": {"name": "a"}})


@pytest.mark.parametrize("bound", [None, "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_training_needs_the_room_that_an_answer_needs(chat, bound):
    """As `invoke` does: with the number of tokens, before a step is taken."""
    rows = {"a": EXAMPLES}
    if bound:
        runnable = chat.with_structured_output(Finding, **{bound: 12})
    else:
        runnable = chat.model_copy(update={"max_new_tokens": 12}).with_structured_output(Finding)
    with pytest.raises(SchemaError, match=r"takes (\d+) tokens .* room for 12. Set max_new_tokens=\1"):
        FederatedAveraging(runnable, participants=rows, lr=1e-3, progress=False).fit(rounds=1)
