"""Answers that keep to a grammar: within their budget, batched and streamed, for every kind of tokenizer.

Belongs here: tokens. Does not: what a schema's texts are (test_schemas), messages (chain/test_structured,
chain/test_tools). The oracle of a whole answer is Pydantic, that of its end the number of tokens that were allowed.
"""

from __future__ import annotations

import json
import time
from typing import Literal

import pytest
import torch
from pydantic import BaseModel
from tiny import tiny_module, train_tokenizer
from tokenizers_of_kinds import make_module, make_tokenizer

from llmchain_fed import LocalModel
from llmchain_fed.errors import ConfigError, MissingExtraError, SchemaError, UnsupportedModelError
from llmchain_fed.model.generation import vocabulary
from llmchain_fed.model.generation.grammar import Grammar, _characters
from llmchain_fed.model.generation.json_schema import shape_of
from llmchain_fed.model.generation.text_nodes import Text


class Inner(BaseModel):
    kind: Literal["a", "ä€😀"]
    sizes: list[int]


class Outer(BaseModel):
    name: str
    parts: list[Inner] = []
    share: float | None = None


GRAMMAR = Grammar(shape_of(Outer.model_json_schema()).node, "outer")
PROMPTS = ["page", "Save the page, please", "new folder"]


@pytest.fixture
def model():
    tokenizer = train_tokenizer()
    module = tiny_module("causal", len(tokenizer))
    module.config.max_position_embeddings = 512
    return LocalModel(module, tokenizer, name="tiny")


def needed(model):
    """tokens: of the shortest answer with its end token."""
    return len(model.encode(['{"name": ""}'])[0]) + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 8.0])
def test_an_answer_is_whole_and_within_any_budget(model, temperature):
    """At high temperatures a random model writes all that a grammar allows, half characters and open lists too."""
    shortest = needed(model)
    for budget in (shortest, shortest + 1, shortest + 3, 40, 60, 110):
        for seed in range(3):
            options = {"max_new_tokens": budget, "temperature": temperature, "seed": seed, "grammar": GRAMMAR}
            for done in model.complete(PROMPTS, **options):
                Outer.model_validate_json(done.text)
                assert done.finish_reason == "stop"
                assert done.completion_tokens < budget  # and the end token


def test_batch_stream_and_single_answers_are_one(model):
    options = {"max_new_tokens": 70, "grammar": GRAMMAR}
    together = model.generate(PROMPTS, **options)
    assert together == [model.generate([p], **options)[0] for p in PROMPTS]
    assert together == ["".join(model.stream(p, **options)) for p in PROMPTS]
    assert together == model.generate(PROMPTS, batch_size=1, **options)


def test_a_model_that_writes_what_the_grammar_allows_is_left_alone(model):
    """Far from the budget's end the scores of allowed tokens are the model's own: greedy answers are followed."""
    ids = model.encode(PROMPTS[:1])[0]
    text, said = model.generate(PROMPTS[:1], max_new_tokens=90, grammar=GRAMMAR)[0], []
    known = vocabulary.vocabulary_of(model.tokenizer, model.eos_ids, "tiny")
    matcher = known.matcher(GRAMMAR.text)
    for _ in range(90 - GRAMMAR.reach):
        with torch.inference_mode():
            scores = model.module(torch.tensor([ids + said])).logits[0, -1]
        allowed = torch.from_numpy(known.allowed(matcher))
        token = int(scores[: len(allowed)].masked_fill(~allowed, -torch.inf).argmax())
        assert matcher.consume_token(token)
        said.append(token)
    assert text.startswith(model.decoded(said).rstrip("�"))


@pytest.mark.parametrize("kind", ["byte-level", "Llama-like"])
def test_tokenizers_of_bytes_and_of_pieces(kind):
    tokenizer = make_tokenizer(kind)
    model = LocalModel(make_module(tokenizer), tokenizer, name=kind)
    for budget in (20, 30, 60):
        for done in model.complete(["hallo", "welt"], max_new_tokens=budget, grammar=GRAMMAR, temperature=2.0, seed=1):
            Outer.model_validate_json(done.text)
            assert done.completion_tokens < budget


@pytest.mark.parametrize("kind", ["T5-like", "WordPiece"])
def test_tokenizers_whose_tokens_are_no_bytes_are_refused(kind):
    tokenizer = make_tokenizer(kind)
    model = LocalModel(make_module(tokenizer), tokenizer, name=kind)
    with pytest.raises(UnsupportedModelError, match="none that grammars can be kept to with"):
        model.generate(["hallo"], grammar=GRAMMAR)


def test_a_schema_that_does_not_fit_says_how_many_tokens_it_takes(model):
    shortest = needed(model)
    with pytest.raises(SchemaError, match=f"takes {shortest} tokens .* room for {shortest - 1}"):
        model.generate(PROMPTS, max_new_tokens=shortest - 1, grammar=GRAMMAR)
    with pytest.raises(SchemaError, match=f"max_new_tokens={shortest}"):
        model.stream(PROMPTS[0], max_new_tokens=3, grammar=GRAMMAR)
    long = "the page is empty " * 40
    room = 512 - len(model.encode([long])[0])
    assert 0 < room < 512
    model.module.config.max_position_embeddings = 512 - room + shortest - 1
    with pytest.raises(SchemaError, match="prompt short enough"):
        model.generate([long], max_new_tokens=100, grammar=GRAMMAR)


def test_what_else_forbids_tokens_gives_way(model):
    """`min_new_tokens` forbids the end token, and a finished answer has no other."""
    grammar = Grammar(shape_of({"const": "a"}).node, "a")
    assert model.generate(["page"], max_new_tokens=20, min_new_tokens=15, grammar=grammar) == ['"a"']


def test_beams_are_refused(model):
    with pytest.raises(ConfigError, match="num_beams=2"):
        model.generate(PROMPTS, num_beams=2, grammar=GRAMMAR)


def test_without_an_end_token_nothing_could_end(model):
    model.tokenizer.eos_token = None
    model.module.generation_config.eos_token_id = None
    with pytest.raises(UnsupportedModelError, match="no end token"):
        model.generate(PROMPTS, grammar=GRAMMAR)


def test_without_the_extra_its_name_is_said(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"\.\[structured\]"):
        model.generate(PROMPTS, grammar=GRAMMAR)


@pytest.mark.parametrize("character", ["é", "€", "ࠀ", "𐀀", "😀", "퟿", "\U0010ffff"])
def test_half_a_character_is_finished(character):
    whole = character.encode()
    for cut in range(1, len(whole)):
        text, more = _characters(b"a" + whole[:cut])
        assert text.encode() == b"a" + whole[:cut] + more
        assert len(text) == 2


# --- how an answer ended --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["7", '"n', "e", "a"])
def test_a_row_that_a_stop_string_ended_does_not_disturb_the_others(model, stop):
    """`generate` fills a row up with padding beside longer ones, which no grammar has a place for."""
    options = {"max_new_tokens": 60, "grammar": GRAMMAR, "stop": [stop]}
    prompts = [*PROMPTS, "file", "user"]
    assert model.tokenizer.pad_token_id not in model.eos_ids
    together = model.generate(prompts, **options)
    assert together == [model.generate([p], **options)[0] for p in prompts]
    model.generate(prompts, temperature=1.5, seed=3, **options)


def test_text_that_the_budget_cuts_ends_for_its_length_and_what_is_whole_does_not(model):
    """As without a grammar; where the shortest end of an object had to be written it is whole, and says so."""
    text = Grammar(Text("<call>"), "text")
    for prompt in PROMPTS:
        for budget in (1, 3, 8):
            (plain,) = model.complete([prompt], max_new_tokens=budget)
            (kept,) = model.complete([prompt], max_new_tokens=budget, grammar=text)
            stream = model.stream(prompt, max_new_tokens=budget, grammar=text)
            try:
                while True:
                    next(stream)
            except StopIteration as end:
                streamed = end.value
            assert streamed == kept
            assert kept.finish_reason == plain.finish_reason == "length"
            assert plain.text.startswith(kept.text)
    (whole,) = model.complete(PROMPTS[:1], max_new_tokens=needed(model), grammar=GRAMMAR)
    assert whole.finish_reason == "stop"


def test_a_long_string_takes_a_time_that_grows_with_its_length(model):
    begun = time.process_time()
    grammar = Grammar(shape_of({"type": "string", "minLength": 300}).node, "long")
    model.module.config.max_position_embeddings = 1024
    (done,) = model.complete(["page"], max_new_tokens=340, temperature=1.0, seed=1, grammar=grammar)
    assert len(json.loads(done.text)) >= 300
    assert time.process_time() - begun < 6
