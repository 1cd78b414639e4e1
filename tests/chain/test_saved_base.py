"""What decides an answer and differs from what the base's name alone would load: it travels with a saved chain, or
training it is refused before the first round.

Belongs here: tokenizer, generation_config, configuration, changed and new rows of a named base, other tools that load
the adapter by the base's name. Does not: LoRA settings (test_lora_configs), chain.yaml and tampering (test_saving).
"""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from langchain_core.output_parsers import PydanticOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from lora_outcomes import outcome, trained
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, get_peft_model
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer
from tokenizers import NormalizedString, normalizers
from transformers import AddedToken, AutoModelForCausalLM

from llmchain_fed import FederatedAveraging, LLMChain, LocalChatModel, LocalLLM, LocalModel
from llmchain_fed.errors import ChainFileError, RecipeError, UnsupportedModelError
from llmchain_fed.federated.target import Target
from llmchain_fed.model import loading, pristine
from llmchain_fed.model.folder import load_options

PEOPLE = {"a": PAIRS[:4], "b": PAIRS[4:8]}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(kind)`: the id of a tiny model in a cache like the hub's own, which nothing else is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)

    def make(kind="causal"):
        folder = tmp_path / "hub" / f"models--some--{kind}"
        snapshot = folder / "snapshots" / SHA
        if not snapshot.exists():
            tokenizer = train_tokenizer()
            module = tiny_module(kind, len(tokenizer))
            module.save_pretrained(snapshot)
            tokenizer.save_pretrained(snapshot)
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text(SHA)
        return f"some/{kind}"

    return make


def chain_over(name, **options):
    config = {"target_modules": ["q_proj", "v_proj"]} if "causal" in name else {"target_modules": ["q", "v"]}
    lora = lora_config("causal", task_type=None, **(config | options))
    return LLMChain(llm=LocalLLM.from_pretrained(name, lora=lora, max_new_tokens=6), prompt=TEMPLATE)


def there_and_back(chain, directory):
    chain.save(directory)
    return LLMChain.load(directory)


def names_in(directory):
    return sorted(p.name for p in directory.iterdir())


# --- the base by its name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_name_alone_is_enough_where_nothing_was_changed(kind, hub, tmp_path):
    chain = trained(chain_over(hub(kind)))
    loaded = there_and_back(chain, tmp_path / "chain")
    assert names_in(tmp_path / "chain") == ["adapter", "chain.yaml", "tokenizer"]
    torch.testing.assert_close(outcome(loaded.model.module, kind)[1], outcome(chain.model.module, kind)[1])


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_auto_peft_loads_the_adapter_by_the_name(kind, hub, tmp_path):
    chain = trained(chain_over(hub(kind)))
    chain.save(tmp_path / "chain")
    auto = AutoPeftModelForCausalLM if kind == "causal" else AutoPeftModelForSeq2SeqLM
    alone = auto.from_pretrained(str(tmp_path / "chain" / "adapter")).eval()
    torch.testing.assert_close(outcome(alone, kind)[1], outcome(chain.model.module, kind)[1])


def test_the_embedded_model_is_known_by_its_hub_id_and_says_that_it_was_dequantised(hub, tmp_path, monkeypatch):
    name = hub("causal")
    folder = tmp_path / "hub" / "models--some--causal" / "snapshots" / SHA
    monkeypatch.setattr(loading, "resolve", lambda given: str(folder) if given == loading.EMBEDDED else given)
    chain = LLMChain(llm=LocalLLM.from_pretrained(loading.EMBEDDED, lora=lora_config()), prompt=TEMPLATE)
    for module in (loading, load_options):
        monkeypatch.setattr(module, "HUB_ID", name)
    loaded = there_and_back(chain, tmp_path / "chain")
    data = yaml.safe_load((tmp_path / "chain" / "chain.yaml").read_text())["model"]
    assert data["reference"] == loading.EMBEDDED
    assert "Q4_1" in data["dequantised_from"]
    card = (tmp_path / "chain" / "adapter" / "README.md").read_text()
    assert "dequantised" in card
    assert name in card
    assert loaded.model.reference == loading.EMBEDDED
    alone = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "chain" / "adapter")).eval()
    torch.testing.assert_close(outcome(alone)[1], outcome(chain.model.module)[1])


def test_tokens_template_and_ends_come_along(hub, tmp_path):
    chat = LocalChatModel.from_pretrained(hub(), lora=lora_config(r=2), max_new_tokens=6)
    tokenizer = chat.model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.add_tokens(["<SYM1>", AddedToken("<SYM2>", lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<END>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<END>", "<SYM1>"
    chat.model.module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chain = LLMChain(llm=chat, prompt=ChatPromptTemplate.from_messages([("human", "{text}")]))
    loaded = there_and_back(chain, tmp_path / "chain")
    assert loaded.render("hi") == chain.render("hi") == "[user] hi\n"
    for text in ("<SYM1>", "a <SYM2> b", "<END>", "é 日本"):
        assert loaded.model.encode([text], add_special_tokens=False) == chain.model.encode(
            [text], add_special_tokens=False
        )
    assert loaded.model.eos_ids == chain.model.eos_ids
    assert loaded.model.pad_id == chain.model.pad_id
    torch.testing.assert_close(outcome(loaded.model.module)[1], outcome(chain.model.module)[1])
    loaded_again = there_and_back(loaded, tmp_path / "again")
    torch.testing.assert_close(outcome(loaded_again.model.module)[1], outcome(chain.model.module)[1])
    assert names_in(tmp_path / "again") == ["adapter", "base_changes.safetensors", "chain.yaml", "tokenizer"]


@pytest.mark.parametrize("when", ["before the adapter", "after it"])
@pytest.mark.parametrize("rows", [400, 403, 416, 390])
def test_resized_embeddings_of_a_named_base_come_along(rows, when, hub, tmp_path):
    model = LocalModel.from_pretrained(hub())
    if when == "before the adapter":
        model.module.resize_token_embeddings(rows)
    module = get_peft_model(model.module, lora_config()).eval()
    if when == "after it":
        module.resize_token_embeddings(rows)
    named = LocalModel(module, model.tokenizer, name="causal", reference=hub())
    chain = LLMChain(llm=LocalLLM(model=named, max_new_tokens=6), prompt=TEMPLATE)
    if rows >= 400:  # else the examples have tokens without a row
        trained(chain)
    loaded = there_and_back(chain, tmp_path / "chain")
    assert ("base_changes.safetensors" in names_in(tmp_path / "chain")) == (rows != 400)
    assert loaded.model.module.get_input_embeddings().weight.shape[0] == rows
    torch.testing.assert_close(outcome(loaded.model.module)[1], outcome(chain.model.module)[1])
    assert Target.of(loaded).contract() == Target.of(chain).contract()
    if rows >= 400:
        assert loaded.batch([{"text": "a"}]) == chain.batch([{"text": "a"}])


def test_a_base_that_its_owner_calls_by_name_and_has_resized_comes_along(hub, tmp_path):
    """Nobody has a record of it, and its name would load another: it is not left to the name."""
    module = AutoModelForCausalLM.from_pretrained(hub(), dtype=torch.float32)
    module.resize_token_embeddings(403)
    model = LocalModel(get_peft_model(module, lora_config()).eval(), train_tokenizer(), reference=hub())
    chain = trained(LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE))
    loaded = there_and_back(chain, tmp_path / "chain")
    assert "base" in names_in(tmp_path / "chain")
    torch.testing.assert_close(outcome(loaded.model.module)[1], outcome(chain.model.module)[1])


def change_rows(module):
    with torch.no_grad():
        module.get_input_embeddings().weight[[5, 77]] *= -1  # a sign alone, and in pairs


CHANGES = {
    "two rows": (change_rows, True),
    "one value by a hair": (lambda m: m.get_input_embeddings().weight.data[9, 3].add_(1e-6), True),
    "a norm": (lambda m: m.model.norm.weight.data.mul_(1.5), True),
    "a buffer": (lambda m: m.model.rotary_emb.inv_freq.mul_(0.5), True),
    "the configuration": (lambda m: setattr(m.config, "attention_dropout", 0.25), False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_in_a_named_base_comes_along(what, hub, tmp_path):
    change, written = CHANGES[what]
    chain = chain_over(hub())
    change(chain.model.module.get_base_model())
    trained(chain)
    loaded = there_and_back(chain, tmp_path / "chain")
    found = names_in(tmp_path / "chain")
    assert ("base_changes.safetensors" in found) == written
    assert "base" not in found
    torch.testing.assert_close(outcome(loaded.model.module)[1], outcome(chain.model.module)[1])
    assert loaded.model.module.config.attention_dropout == chain.model.module.config.attention_dropout
    if what == "two rows":
        size = (tmp_path / "chain" / "base_changes.safetensors").stat().st_size
        assert size < 2 * 32 * 4 + 600


def test_where_most_of_the_base_was_changed_the_whole_comes_along(hub, tmp_path):
    chain = chain_over(hub())
    with torch.no_grad():
        for parameter in chain.model.module.get_base_model().parameters():
            parameter.mul_(1.01)
    loaded = there_and_back(chain, tmp_path / "chain")
    assert names_in(tmp_path / "chain")[:2] == ["adapter", "base"]
    shutil.rmtree(tmp_path / "hub")
    torch.testing.assert_close(
        outcome(LLMChain.load(tmp_path / "chain").model.module)[1], outcome(chain.model.module)[1]
    )
    assert loaded.model.reference is None


def test_a_changed_hub_is_noticed_to_the_last_value(hub, tmp_path):
    chain = chain_over(hub())
    chain.save(tmp_path / "chain")
    path = tmp_path / "hub" / "models--some--causal" / "snapshots" / SHA / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up_proj.weight"][3, 7] += 1e-5
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ChainFileError, match="base weights differ"):
        LLMChain.load(tmp_path / "chain")


@pytest.mark.parametrize("change", ["other name", "row beyond", "other width", "values missing", "other type"])
def test_changes_of_another_base_are_refused(change, hub, tmp_path):
    from saved_chains import rehash

    chain = chain_over(hub())
    change_rows(chain.model.module.get_base_model())
    chain.save(tmp_path / "chain")
    path = tmp_path / "chain" / "base_changes.safetensors"
    state = load_file(path)
    rows, values = "rows/model.embed_tokens.weight", "values/model.embed_tokens.weight"
    match change:
        case "other name":
            state["rows/x"], state["values/x"] = state.pop(rows), state.pop(values)
        case "row beyond":
            state[rows] = state[rows] + 10_000
        case "other width":
            state[values] = state[values][:, :-1].contiguous()
        case "values missing":
            del state[values]
        case "other type":
            state[values] = state[values].half()
    save_file(state, path)
    rehash(tmp_path / "chain")
    with pytest.raises(ChainFileError, match="changes"):
        LLMChain.load(tmp_path / "chain")


def test_the_record_of_a_base_costs_little():
    """540 MB are to take half a second; here a share of that, with much to spare for a busy machine."""
    import time

    module = torch.nn.Sequential(torch.nn.Embedding(4096, 576), torch.nn.Linear(576, 4096))
    start = time.perf_counter()
    pristine.record(module)
    assert time.perf_counter() - start < 1.0
    assert pristine.digest(module) == pristine.digest(module)
    before = pristine.digest(module)
    with torch.no_grad():
        module[0].weight[0, :2] *= -1
    assert pristine.digest(module) != before


# --- generation_config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_generation_config_comes_along_whatever_transformers_thinks_of_it(named, hub, tmp_path):
    fields = {
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "eos_token_id": [1, 7],
        "bad_words_ids": [[5]],
    }
    if named:
        chain = chain_over(hub())
    else:
        model = LocalModel(get_peft_model(tiny_module("causal", 400), lora_config()).eval(), train_tokenizer())
        chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=6), prompt=TEMPLATE)
    for name, value in fields.items():
        setattr(chain.model.module.generation_config, name, value)
    trained(chain)
    loaded = there_and_back(chain, tmp_path / "chain")
    for name, value in fields.items():
        assert getattr(loaded.model.module.generation_config, name) == value
    assert loaded.model.eos_ids == chain.model.eos_ids == (1, 7)
    assert loaded.batch([{"text": t} for t, _ in PAIRS[:3]]) == chain.batch([{"text": t} for t, _ in PAIRS[:3]])


# --- a base of the caller's own -------------------------------------------------------------------------------------


def given_base():
    return LocalModel(tiny_module("causal", 400), train_tokenizer())


@pytest.mark.parametrize("what", ["a token", "the template", "the end", "generation_config", "one value"])
def test_a_given_base_must_be_what_the_chain_needs(what, tmp_path):
    model = LocalModel(get_peft_model(tiny_module("causal", 400), lora_config()).eval(), train_tokenizer())
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    assert LLMChain.load(tmp_path / "chain", model=given_base()).model.tokenizer is not None
    given = given_base()
    match what:
        case "a token":
            given.tokenizer.add_tokens(["<X>"])
        case "the template":
            given.tokenizer.chat_template = "x"
        case "the end":
            given.tokenizer.eos_token = "<pad>"
        case "generation_config":
            given.module.generation_config.eos_token_id = [1, 5]
        case "one value":
            with torch.no_grad():
                given.module.model.layers[0].mlp.up_proj.weight[3, 7] += 1e-4
    with pytest.raises(ChainFileError, match=r"tokenizer|generation_config|base weights differ"):
        LLMChain.load(tmp_path / "chain", model=given)


# --- before the first round -----------------------------------------------------------------------------------------


class Shout:
    """A normaliser of somebody's own, which no file can store."""

    def normalize(self, text: NormalizedString) -> None:
        text.map(lambda c: c)


def broken_tokenizer():
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(Shout())
    return tokenizer


class Odd(type(tiny_module("causal", 400))):
    pass


def odd_class():
    module = tiny_module("causal", 400)
    module.__class__ = Odd
    return module


def more_layers():
    module = tiny_module("causal", 400)
    module.model.layers.append(module.model.layers[0])
    return module


def tied_against_its_configuration():
    module = tiny_module("causal", 400)
    module.config.tie_word_embeddings = False
    return module


def untied_against_its_configuration():
    module = tiny_module("causal", 400)
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() * 2)
    return module


UNSAVABLE = {
    "a head that is tied and should not be": lambda: LocalModel(tied_against_its_configuration(), train_tokenizer()),
    "a head that is not tied and should be": lambda: LocalModel(untied_against_its_configuration(), train_tokenizer()),
    "a tokenizer with a part of its own": lambda: LocalModel(tiny_module("causal", 400), broken_tokenizer()),
    "no tokenizer": lambda: LocalModel(tiny_module("causal", 400)),
    "a class that transformers does not load": lambda: LocalModel(odd_class(), train_tokenizer()),
    "tensors that the configuration does not make": lambda: LocalModel(more_layers(), train_tokenizer()),
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_a_model_that_no_file_can_store_is_refused_before_the_first_round(what, tmp_path):
    chain = LLMChain(llm=LocalLLM(model=UNSAVABLE[what]()), prompt=TEMPLATE)
    with pytest.raises(ChainFileError):
        chain.save(tmp_path / "chain")
    with pytest.raises(ChainFileError):
        chain.check_savable()
    with pytest.raises(ChainFileError):
        FederatedAveraging(chain, participants=PEOPLE, lr=0.01, batch_size=4, progress=False)
    assert not (tmp_path / "chain").exists()


class Answer(BaseModel):
    text: str


def test_a_parser_that_no_file_can_store_is_refused_before_training(make_model):
    """Behind the chain, or in a pipe, which has no `save`, it is no matter."""
    face, parser = LocalLLM(model=make_model(lora=True)), PydanticOutputParser(pydantic_object=Answer)
    with pytest.raises(RecipeError, match=r"chain \| parser"):
        FederatedAveraging(LLMChain(llm=face, prompt=TEMPLATE, output_parser=parser), participants=PEOPLE)
    pipe = PromptTemplate.from_template(TEMPLATE) | face | parser
    for learner in (LLMChain(llm=face, prompt=TEMPLATE) | parser, pipe):
        FederatedAveraging(learner, participants=PEOPLE, lr=0.01, batch_size=4, progress=False).fit(1)


def test_an_adapter_on_the_hub_is_not_followed(hub, tmp_path):
    """Its settings can name another base, and code: nothing is read in their place, whoever names the hub's id."""
    name = hub("causal")
    chain = chain_over(name)
    chain.save(tmp_path / "chain")
    (snapshot,) = (tmp_path / "hub").glob("models--some--causal/snapshots/*")
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    with pytest.raises(UnsupportedModelError, match="contains an adapter's settings"):
        LocalModel.from_pretrained(name)
    with pytest.raises(ChainFileError, match="contains an adapter's settings"):
        LLMChain.load(tmp_path / "chain")
