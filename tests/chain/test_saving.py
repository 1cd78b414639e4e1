"""A saved chain: the same answers after loading, and nothing loaded from a directory that was tampered with.

Belongs here: chain.yaml, base/, adapter/. Does not: recipes in prompts/ and chains/ (test_library).
"""

import hashlib
import shutil

import pytest
import torch
import yaml
from langchain_core.output_parsers import CommaSeparatedListOutputParser, PydanticOutputParser
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, MessagesPlaceholder, PromptTemplate
from peft import PeftModel
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from saved_chains import edit, rehash
from taught import ANSWERS, taught_model
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, with_lora
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmchain_fed import LLMChain, LocalChatModel, LocalLLM, LocalModel
from llmchain_fed.chain.saving import model as saved_model
from llmchain_fed.errors import ChainFileError, RecipeError
from llmchain_fed.model import loading

INPUTS = [{"text": english} for english, _ in PAIRS]
MODULE_INPUTS = {
    "causal": {"input_ids": torch.arange(2, 20)[None]},
    "seq2seq": {"input_ids": torch.arange(2, 20)[None], "decoder_input_ids": torch.arange(5, 9)[None]},
}


@pytest.fixture(params=["causal-full", "causal-lora", "seq2seq-full", "seq2seq-lora"])
def chain(request):
    kind, weights = request.param.split("-")
    return LLMChain(llm=LocalLLM(model=taught_model(kind, lora=weights == "lora"), max_new_tokens=24), prompt=TEMPLATE)


@pytest.fixture
def saved(tmp_path):
    """A LoRA chain on disk, with its base."""
    chain = LLMChain(llm=LocalLLM(model=taught_model("causal", lora=True), max_new_tokens=24), prompt=TEMPLATE)
    chain.save(tmp_path / "chain")
    return tmp_path / "chain"


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """No weights and no tokenizer may be read while a tampered directory is refused."""
    from llmchain_fed.chain.saving import adapter
    from llmchain_fed.chain.saving import tokenizer as saved_tokenizer

    def loaded(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_base", loaded)
    monkeypatch.setattr(saved_tokenizer, "load", loaded)
    monkeypatch.setattr(saved_model, "load_file", loaded)
    monkeypatch.setattr(adapter, "load_file", loaded)
    monkeypatch.setattr(torch, "load", loaded)


def shift(model):
    """Weights that differ from where the model started."""
    generator = torch.Generator().manual_seed(0)
    state = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in model.trainable_state().items()}
    model.load_state(state)


def logits(model):
    with torch.no_grad():
        return model.module(**MODULE_INPUTS[model.kind]).logits


# --- there and back -------------------------------------------------------------------------------------------------


def test_a_loaded_chain_has_the_same_weights_and_answers(chain, tmp_path):
    shift(chain.model)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.batch(INPUTS) == chain.batch(INPUTS)
    assert torch.equal(logits(loaded.model), logits(chain.model))
    before, after = chain.model.trainable_state(), loaded.model.trainable_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert loaded.model.kind == chain.model.kind
    assert loaded.model.name == "taught"
    assert loaded.model.weights_hash == chain.model.weights_hash
    assert loaded.prompt == chain.prompt


def test_a_loaded_chain_can_be_saved_and_loaded_again(chain, tmp_path):
    shift(chain.model)
    chain.save(tmp_path / "one")
    LLMChain.load(tmp_path / "one").save(tmp_path / "two")
    again = LLMChain.load(tmp_path / "two")
    assert torch.equal(logits(again.model), logits(chain.model))
    shutil.rmtree(tmp_path / "one")  # the second does not lean on the first
    assert LLMChain.load(tmp_path / "two").batch(INPUTS[:2]) == chain.batch(INPUTS[:2])


def test_a_chat_chain_comes_back_with_its_template_and_messages(tmp_path):
    prompt = ChatPromptTemplate(
        [("system", "Be {{brief}}."), MessagesPlaceholder("past", optional=True), ("human", "{text}"), ("ai", "{a}")]
    ).partial(a="ok")
    chain = LLMChain(llm=LocalChatModel(model=taught_model("causal", lora=True), max_new_tokens=6), prompt=prompt)
    chain.save(tmp_path / "chat")
    loaded = LLMChain.load(tmp_path / "chat")
    assert isinstance(loaded.llm, LocalChatModel)
    for given in ({"text": "a {x}"}, {"text": "b", "past": [("human", "c")]}):
        assert loaded.render(given) == chain.render(given)
        assert loaded.invoke(given) == chain.invoke(given)
    assert "<|system|>Be {brief}.</s>" in loaded.render({"text": "a"})


@pytest.mark.parametrize(
    "prompt",
    [
        PromptTemplate.from_template("{{literal}} {text} {style}").partial(style="é, {plain}"),
        FewShotPromptTemplate(
            prefix="P {{x}}",
            examples=[{"en": "yes", "no": "12:30"}, {"en": "on", "no": "null"}],
            example_prompt=PromptTemplate.from_template("{en}={no}"),
            example_separator="\n--\n",
            suffix="{text}=",
            input_variables=["text"],
        ),
    ],
)
def test_prompts_render_alike_after_loading(make_model, tmp_path, prompt):
    chain = LLMChain(llm=LocalLLM(model=make_model(lora=True)), prompt=prompt)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.render({"text": "no"}) == chain.render({"text": "no"})
    assert loaded.render("a {b}") == chain.render("a {b}")


def test_options_keywords_and_parser_come_back(tmp_path):
    llm = LocalLLM(model=taught_model("causal", lora=True), max_new_tokens=9, stop=["xyz"], num_beams=2, batch_size=3)
    chain = LLMChain(
        llm=llm.bind(repetition_penalty=1.1),
        prompt=TEMPLATE,
        output_parser=CommaSeparatedListOutputParser(),
        llm_kwargs={"stop": ["rou"]},
    )
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.generation_options() == chain.generation_options()
    assert loaded.face.batch_size == 3
    assert loaded.invoke(INPUTS[0]) == chain.invoke(INPUTS[0]) == ["page ver"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_comes_back(tokenizer, tmp_path, dtype):
    model = LocalModel(tiny_module("causal", len(tokenizer)).to(dtype), tokenizer, name="tiny")
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain").model
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.weights_hash == model.weights_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["down_proj"]},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "r": 2, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_every_kind_of_lora_comes_back(tokenizer, tmp_path, changes):
    model = LocalModel(with_lora(tiny_module("causal", len(tokenizer)), lora_config(**changes)), tokenizer)
    shift(model)
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=4), prompt=TEMPLATE)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model.trainable_state().keys() == model.trainable_state().keys()
    again = LLMChain.load(tmp_path / "chain", model=LocalModel(tiny_module("causal", len(tokenizer)), tokenizer))
    assert torch.equal(logits(again.model), logits(model))


def test_the_saved_base_contains_no_part_of_the_adapter(tokenizer, tmp_path):
    plain = tiny_module("causal", len(tokenizer))
    names = set(plain.state_dict()) - {"lm_head.weight"}  # tied
    model = LocalModel(with_lora(plain, lora_config(modules_to_save=["down_proj"], use_dora=True)), tokenizer)
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    assert set(load_file(tmp_path / "chain" / "base" / "model.safetensors")) == names


def test_an_adapter_over_a_named_base_is_saved_without_the_base(tokenizer, tmp_path, monkeypatch):
    """And without asking a hub: the base's name is only a name."""
    model = taught_model("causal", lora=True)
    named = LocalModel(model.module, model.tokenizer, name="some/model", reference="some/model")
    named.module.peft_config["default"].base_model_name_or_path = "some/model"
    chain = LLMChain(llm=LocalLLM(model=named, max_new_tokens=24), prompt=TEMPLATE)
    chain.save(tmp_path / "chain")
    assert sorted(p.name for p in (tmp_path / "chain").iterdir()) == ["adapter", "chain.yaml", "tokenizer"]
    asked, base = [], taught_model("causal")

    def load_base(name, *, dtype, by_name):
        assert by_name
        asked.append((name, dtype))
        return base.module

    monkeypatch.setattr(loading, "load_base", load_base)
    loaded = LLMChain.load(tmp_path / "chain")
    assert asked == [("some/model", torch.float32)]
    assert torch.equal(logits(loaded.model), logits(named))
    loaded.save(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["adapter", "chain.yaml", "tokenizer"]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_pefts_own_loader_reads_the_adapter(tmp_path, kind):
    chain = LLMChain(llm=LocalLLM(model=taught_model(kind, lora=True)), prompt=TEMPLATE)
    shift(chain.model)
    chain.save(tmp_path / "chain")
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    base = auto.from_pretrained(tmp_path / "chain" / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "chain" / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**MODULE_INPUTS[kind]).logits, logits(chain.model))


def test_nothing_on_disk_can_run_or_tells_where_it_was_made(chain, tmp_path):
    chain.save(tmp_path / "chain")
    files = [p for p in (tmp_path / "chain").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".yaml", ".json", ".safetensors", ".jinja", ".md"}
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # a pickle, a zip around one
        assert str(tmp_path).encode() not in content
        assert b"llmchain_fed." not in content
        assert b"langchain" not in content
    assert {p.name for p in tmp_path.iterdir()} == {"chain"}  # no scratch folder stays
    listed = yaml.safe_load((tmp_path / "chain" / "chain.yaml").read_text())["files"]
    assert set(listed) == {p.relative_to(tmp_path / "chain").as_posix() for p in files} - {"chain.yaml"}


def test_the_model_is_left_as_it_was(chain, tmp_path):
    before = {n: (t.clone(), t.requires_grad) for n, t in chain.model.module.named_parameters()}
    version = chain.model.weights_version
    config = repr(getattr(chain.model.module, "peft_config", None))
    chain.save(tmp_path / "chain")
    after = dict(chain.model.module.named_parameters())
    assert all(torch.equal(t, after[n]) and r == after[n].requires_grad for n, (t, r) in before.items())
    assert chain.model.weights_version == version
    assert repr(getattr(chain.model.module, "peft_config", None)) == config


# --- where it is written --------------------------------------------------------------------------------------------


def test_a_chains_directory_is_replaced_whole(tmp_path):
    full = LLMChain(llm=LocalLLM(model=taught_model("causal"), max_new_tokens=24), prompt=TEMPLATE)
    lora = LLMChain(llm=LocalLLM(model=taught_model("causal", lora=True), max_new_tokens=24), prompt="{text}")
    lora.save(tmp_path / "chain")
    full.save(tmp_path / "chain")
    assert not (tmp_path / "chain" / "adapter").exists()
    assert LLMChain.load(tmp_path / "chain").batch(INPUTS) == ANSWERS
    assert {p.name for p in tmp_path.iterdir()} == {"chain"}


@pytest.mark.parametrize("name", ["notes.txt", "chain.yaml"])
def test_a_directory_that_contains_something_else_is_left_alone(saved, tmp_path, name):
    chain = LLMChain.load(saved)
    other = tmp_path / "mine"
    other.mkdir()
    (other / name).write_text("precious")
    with pytest.raises(ChainFileError, match="not overwritten"):
        chain.save(other)
    assert (other / name).read_text() == "precious"
    (saved / "notes.txt").write_text("precious")  # something of the user's beside a chain
    with pytest.raises(ChainFileError, match="not overwritten"):
        chain.save(saved)
    assert (saved / "notes.txt").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"chain", "mine"}


def test_a_file_in_the_way_is_left_alone(saved, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ChainFileError, match="not overwritten"):
        LLMChain.load(saved).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_empty_directory_is_used(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    LLMChain.load(saved).save(tmp_path / "empty")
    assert LLMChain.load(tmp_path / "empty").batch(INPUTS) == LLMChain.load(saved).batch(INPUTS)


class Answer(BaseModel):
    text: str


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"prompt": PromptTemplate.from_template("{{ text }}", template_format="mustache")}, RecipeError),
        ({"output_parser": PydanticOutputParser(pydantic_object=Answer)}, RecipeError),
        ({"llm_kwargs": {"stop": [object()]}}, ChainFileError),
        ({"llm_kwargs": {"callbacks": print}}, ChainFileError),
    ],
)
def test_what_cannot_be_written_as_data_is_refused_and_the_old_chain_stays(saved, parts, error):
    llm = LLMChain.load(saved).llm
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    with pytest.raises(error):
        LLMChain(llm=llm, **({"prompt": TEMPLATE} | parts)).save(saved)
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
    assert {p.name for p in saved.parent.iterdir()} == {saved.name}


# --- tampering ------------------------------------------------------------------------------------------------------

TAMPERINGS = {
    "no chain.yaml": lambda d: (d / "chain.yaml").unlink(),
    "not yaml": lambda d: (d / "chain.yaml").write_text("a: [1"),
    "not utf-8": lambda d: (d / "chain.yaml").write_bytes(b"\xff\xfe\x00"),
    "not a mapping": lambda d: (d / "chain.yaml").write_text("- a"),
    "python object": lambda d: (d / "chain.yaml").write_text("!!python/object/apply:os.system ['true']"),
    "unknown key": lambda d: edit(d, lambda data: data.update(callbacks=[])),
    "class path": lambda d: edit(d, lambda data: data.update(class_path="os.system")),
    "class path in the prompt": lambda d: edit(d, lambda data: data["prompt"].update(_type="few_shot")),
    "class path in the model": lambda d: edit(d, lambda data: data["model"].update(auto_map="x.py")),
    "another format": lambda d: edit(d, lambda data: data.update(format=2)),
    "another face": lambda d: edit(d, lambda data: data.update(face="os")),
    "a missing key": lambda d: edit(d, lambda data: data.pop("prompt")),
    "an unknown option": lambda d: edit(d, lambda data: data["options"].update(callbacks=["x"])),
    "an option out of range": lambda d: edit(d, lambda data: data["options"].update(temperature=-1)),
    "an option that is the model": lambda d: edit(d, lambda data: data["options"].update(model="x")),
    "an unknown keyword": lambda d: edit(d, lambda data: data["llm_kwargs"].update(bogus=1)),
    "an unknown parser": lambda d: edit(d, lambda data: data.update(parser="os.system")),
    "an unknown type": lambda d: edit(d, lambda data: data["model"].update(dtype="load")),
    "jinja": lambda d: edit(d, lambda data: data["prompt"].update(template_format="jinja2")),
    "attribute access": lambda d: edit(d, lambda data: data["prompt"].update(template="{text.__class__}")),
    "text that is a bool": lambda d: edit(d, lambda data: data["prompt"].update(template=False)),
    "weights changed": lambda d: _flip_a_byte(d / "adapter" / "adapter_model.safetensors"),
    "base changed": lambda d: _flip_a_byte(d / "base" / "model.safetensors"),
    "config changed": lambda d: _flip_a_byte(d / "base" / "config.json"),
    "weights cut": lambda d: _cut(d / "adapter" / "adapter_model.safetensors"),
    "weights deleted": lambda d: (d / "adapter" / "adapter_model.safetensors").unlink(),
    "base deleted": lambda d: shutil.rmtree(d / "base"),
    "a pickle instead of the weights": lambda d: _as_pickle(d / "adapter"),
    "a pickle added": lambda d: torch.save({"x": torch.zeros(1)}, d / "base" / "pytorch_model.bin"),
    "code added": lambda d: (d / "base" / "modeling_x.py").write_text("import os"),
    "a file no longer listed": lambda d: edit(d, lambda data: data["files"].pop("adapter/adapter_config.json")),
    "nothing listed": lambda d: edit(d, lambda data: data.update(files={})),
    "a path upwards": lambda d: _listed(d, "../outside.json"),
    "an absolute path": lambda d: _listed(d, str(d.parent / "outside.json")),
}


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def _as_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _listed(directory, name):
    (directory.parent / "outside.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    edit(directory, lambda data: data["files"].update({name: digest}))


@pytest.mark.parametrize("how", TAMPERINGS)
def test_a_tampered_directory_is_refused_before_anything_is_loaded(saved, nothing_is_loaded, how):
    TAMPERINGS[how](saved)
    with pytest.raises((ChainFileError, RecipeError)) as error:
        LLMChain.load(saved)
    assert len(str(error.value)) > 30


def test_the_untampered_directory_would_have_been_loaded(saved, nothing_is_loaded):
    """Else the test above would pass for any reason at all."""
    with pytest.raises(AssertionError, match="weights were read"):
        LLMChain.load(saved)


@pytest.mark.parametrize("how", ["other names", "other shape", "not safetensors", "nan"])
def test_an_adapter_that_does_not_fit_is_refused_even_with_the_right_digest(saved, how):
    path = saved / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = min(state)
    match how:
        case "other names":
            state["x." + name] = state.pop(name)
        case "other shape":
            state[name] = state[name][:-1].clone()
        case "nan":
            state[name][0, 0] = float("nan")
    save_file(state, path)
    if how == "not safetensors":
        path.write_bytes(b"\x80\x04K\x01.")
    rehash(saved)
    given = taught_model("causal", lora=True)
    version = given.weights_version
    for model in (None, given):
        with pytest.raises(ChainFileError):
            LLMChain.load(saved, model=model)
    assert given.weights_version == version


def test_another_base_is_refused(saved, tokenizer):
    other = LocalModel(tiny_module("causal", len(tokenizer), seed=9), tokenizer)
    with pytest.raises(ChainFileError, match="base weights differ"):
        LLMChain.load(saved, model=other)
    assert not hasattr(other.module, "peft_config")


def test_a_changed_base_is_refused_even_with_the_right_digest(saved):
    path = saved / "base" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    rehash(saved)
    with pytest.raises(ChainFileError, match="base weights differ"):
        LLMChain.load(saved)


def test_a_given_base_is_used(saved):
    base = taught_model("causal")
    loaded = LLMChain.load(saved, model=base)
    assert loaded.model.module.get_base_model() is base.module
    assert loaded.batch(INPUTS) == LLMChain.load(saved).batch(INPUTS)
    with_adapter = taught_model("causal", lora=True)
    with_adapter.load_state({n: torch.zeros_like(t) for n, t in with_adapter.trainable_state().items()})
    version = with_adapter.weights_version
    again = LLMChain.load(saved, model=with_adapter)
    assert again.model is with_adapter
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert with_adapter.weights_version != version


def test_a_given_model_that_would_answer_otherwise_is_refused(tmp_path):
    model = taught_model("causal")
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    assert LLMChain.load(tmp_path / "chain", model=model).model is model
    with pytest.raises(ChainFileError, match="without an adapter"):
        LLMChain.load(tmp_path / "chain", model=taught_model("causal", lora=True))
    shift(model)  # it has learnt since
    with pytest.raises(ChainFileError, match="base weights differ"):
        LLMChain.load(tmp_path / "chain", model=model)


def test_no_directory_is_no_chain(tmp_path):
    with pytest.raises(ChainFileError, match=r"no chain\.yaml"):
        LLMChain.load(tmp_path / "nowhere")


def test_a_module_that_cannot_be_saved_is_refused(tokenizer, tmp_path):
    model = LocalModel(tiny_module("causal", len(tokenizer)), tokenizer)
    model.tokenizer = None
    with pytest.raises(ChainFileError, match="no tokenizer"):
        LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    assert list(tmp_path.iterdir()) == []


def test_several_adapters_are_refused(tmp_path):
    model = taught_model("causal", lora=True)
    model.module.add_adapter("second", lora_config())
    model.module.base_model.set_adapter(["default", "second"])
    model = LocalModel(model.module, model.tokenizer)
    with pytest.raises(ChainFileError, match="exactly one"):
        LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
