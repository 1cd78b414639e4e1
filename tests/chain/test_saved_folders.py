"""What `save` writes is what `load` takes: modes, letters, sizes, and nothing of where a model came from.

Belongs here: the folder as files. Does not: answers (test_saving), a hostile author's folders (tests/security).
"""

import ast
import json
import os
import re
from pathlib import Path

import pytest
import torch
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, PromptTemplate
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from taught import taught_model
from tiny import TEMPLATE
from tiny_architectures import CAUSAL, SEQ2SEQ, tiny_architecture
from transformers import CONFIG_MAPPING, LlamaConfig

import llmchain_fed
from llmchain_fed import (
    FederatedAveraging,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    TrainingConfig,
)
from llmchain_fed.chain.saving import fields, tokenizer
from llmchain_fed.errors import ChainFileError, DataError, RecipeError, UnsupportedModelError
from llmchain_fed.model import loading
from llmchain_fed.model.folder import settings

TROUBLE = "a\x85b\u2028c\u2029d\ufeffe\u202ef\tg\r\nh\x7fi\xa0j\U0001f600k'\"\\ #:- l\x0bm\x00n"


@pytest.fixture(scope="module")
def model():
    return taught_model("causal", lora=True)


def chain_with(model, prompt=TEMPLATE, **options):
    return LLMChain(llm=LocalLLM(model=model, max_new_tokens=4, **options), prompt=prompt)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_a_saved_chain_follows_the_users_umask(model, tmp_path, umask):
    """The adapter's weights too, which safetensors writes for their owner alone."""
    former = os.umask(umask)
    try:
        chain_with(model).save(tmp_path / "chain")
    finally:
        os.umask(former)
    for path in [tmp_path / "chain", *(tmp_path / "chain").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_texts_of_any_letters_come_back(model, tmp_path):
    prompt = PromptTemplate.from_template(TROUBLE + "{text}").partial()
    chain = chain_with(model, prompt, stop=[TROUBLE])
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.render("x") == chain.render("x")
    assert list(loaded.llm.stop) == [TROUBLE]
    spoken = ChatPromptTemplate([("system", TROUBLE), ("human", TROUBLE + "{text}")])
    chat = LLMChain(llm=LocalChatModel(model=model), prompt=spoken)
    chat.save(tmp_path / "chat")
    assert LLMChain.load(tmp_path / "chat").render({"text": "x"}) == chat.render({"text": "x"})


def few_shot(**parts):
    defaults = {"prefix": "", "examples": [{"a": "b"}], "suffix": "{text}", "input_variables": ["text"]}
    return FewShotPromptTemplate(example_prompt=PromptTemplate.from_template("{a}"), **(defaults | parts))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (PromptTemplate.from_template("{text:>1000000000}"), r"\{text:>1000000000\} is not a plain \{variable\}"),
        (PromptTemplate.from_template("{text:.100f}"), r"\{text:\.100f\} is not a plain"),
        (PromptTemplate.from_template("{text:%1000d}"), r"\{text:%1000d\} is not a plain"),
        (few_shot(examples=[{"a": "{text:>1000}"}]), r"\{text:>1000\} is not a plain"),
        (few_shot(suffix="{text:1000}"), r"\{text:1000\} is not a plain"),
        (ChatPromptTemplate([("human", "{text:01000d}")]), r"\{text:01000d\} is not a plain"),
        (few_shot(examples=[{"a": "\ud800"}]), "the chain's chain.yaml"),
        (few_shot(examples=[{"a": "x" * 1000}] * 1100), "more than the 1,048,576 bytes.*examples beyond a megabyte"),
    ],
)
def test_a_prompt_that_load_would_refuse_is_refused_before_training(model, prompt, wanted):
    with pytest.raises((ChainFileError, RecipeError), match=wanted) as error:
        chain_with(model, prompt).check_savable()
    assert len(str(error.value)) < 800


def test_a_prompt_with_short_formats_trains_and_comes_back(tmp_path):
    template = "Price {price:.2f} of {n:,} {text:>12} {text!r}\n"
    chain = chain_with(taught_model("causal", lora=True), template)
    rows = [({"price": 1.5 + i, "n": 1000 * i, "text": f"page {i}"}, "locked") for i in range(4)]
    config = TrainingConfig(batch_size=2)
    federation = FederatedAveraging(chain, participants={"a": rows[:2], "b": rows[2:]}, training=config, progress=False)
    assert len(federation.fit(rounds=1).rounds) == 1
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert loaded.render(rows[1][0]) == chain.render(rows[1][0]) == "Price 2.50 of 1,000       page 1 'page 1'\n"
    assert loaded.invoke(rows[1][0]) == chain.invoke(rows[1][0])


@pytest.mark.parametrize("name", sorted({*CAUSAL, *SEQ2SEQ}))
def test_every_default_configuration_of_a_text_model_may_be_saved(name):
    try:
        config = CONFIG_MAPPING[name]()
    except Exception:  # made of other parts, or of packages that are not here
        pytest.skip("it has no default")
    settings.check_writable(config, error=ChainFileError)


def test_a_configuration_that_load_would_refuse_is_refused_before_training():
    plain = taught_model("causal")
    plain.module.config.data_origin = "org/data"
    with pytest.raises(ChainFileError, match=r"`data_origin` has no place.*remove that field of module\.config"):
        chain_with(plain).check_savable()
    plain.module.config.data_origin = "ours"
    chain_with(plain).check_savable()


def broken(folder, how):
    """A model's folder with weights that do not fill it."""
    weights = load_file(folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    if how == "a layer too many":
        data |= {"num_hidden_layers": 3} if "num_hidden_layers" in data else {"num_layers": 3}
    elif how == "a tensor left out":
        del weights[next(n for n in weights if "layer_norm" in n or "layernorm" in n)]
    else:
        data["tie_word_embeddings"] = False
        weights.pop("lm_head.weight", None)
    (folder / "config.json").write_text(json.dumps(data))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("causal", "a layer too many"),
        ("seq2seq", "a layer too many"),
        ("causal", "a tensor left out"),
        ("seq2seq", "a tensor left out"),
        ("causal", "an untied head without weights"),  # T5 ties its own whatever its settings say
    ],
)
def test_no_model_is_loaded_with_parameters_of_chance(kind, how, tmp_path):
    """Tied ones have no weights of their own and are none."""
    plain = taught_model(kind)
    plain.module.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    LocalModel.from_pretrained(str(tmp_path))
    broken(tmp_path, how)
    with pytest.raises(UnsupportedModelError, match=r"has no weights for .* would be random numbers"):
        LocalModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "marian", "mixtral", "opt", "mamba", "bart"])
def test_honest_models_of_many_kinds_are_loaded_whole(name, tmp_path):
    tiny_architecture(name, 400, seq2seq=name in ("marian", "bart")).save_pretrained(tmp_path)
    loading.load_base(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation", "kernel_config"])
def test_a_hubs_model_that_names_kernels_is_refused_before_its_weights_are_read(key, monkeypatch):
    config = LlamaConfig(**{key: "evil/kernel"})
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(loading, "_check_source", lambda _: None)
    monkeypatch.setattr(loading.wrapping, "loader_of", lambda _: pytest.fail("a model was made"))
    with pytest.raises(UnsupportedModelError, match="code of a hub's"):
        loading.load_base("some/model", dtype=torch.float32)


class PanicException(BaseException):
    """As tokenizers raises it."""


def test_a_tokenizer_that_dies_over_a_text_is_an_error_of_ours(model, monkeypatch):
    def dies(*_, **__):
        raise PanicException("Onig: Regex search error: retry-limit-in-match over")

    monkeypatch.setattr(type(model.tokenizer), "__call__", dies)
    with pytest.raises(DataError, match="the tokenizer gave up on a text"):
        chain_with(model).invoke({"text": "x"})


@pytest.mark.parametrize("error", [TimeoutError("a slow disk"), PanicException("x")])
def test_whatever_the_reading_of_a_tokenizer_raises_is_one_error(error, model, tmp_path, monkeypatch):
    chain_with(model).save(tmp_path / "chain")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ChainFileError, match="cannot be read"):
        LLMChain.load(tmp_path / "chain")


def test_as_many_layers_as_there_are_may_have_ranks_of_their_own():
    """Each rank is one pattern: PEFT compiles every pattern for every layer."""
    names = [f"layers.{i}.w" for i in range(5000)]
    ranks = TypeAdapter(fields.Ranks).validate_python(dict.fromkeys(names[:4000], 2))
    (pattern,) = fields._grouped(ranks)
    assert re.fullmatch(pattern, names[3999])
    assert not re.fullmatch(pattern, names[4000])


def test_where_a_model_came_from_and_its_code_are_not_saved(tmp_path):
    plain = taught_model("causal")
    plain.module.config.auto_map = {"AutoConfig": "configuration_x.C"}
    plain.module.config.custom_pipelines = {"x": {"impl": "y.z"}}
    plain.tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.T", None]}
    chain_with(plain).save(tmp_path / "chain")
    for name in ("base/config.json", "tokenizer/tokenizer_config.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads((tmp_path / "chain" / name).read_text()).keys()
    assert LLMChain.load(tmp_path / "chain").invoke("page locked")


def test_a_reference_that_is_no_hubs_id_is_refused_before_training(model):
    odd = LocalModel(model.module, model.tokenizer, name="x", reference="../models/x")
    with pytest.raises(ChainFileError, match="is no id of a hub"):
        chain_with(odd).check_savable()


def test_a_folder_in_the_working_directory_is_not_taken_for_the_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmchain_fed.model.loading.resolve", lambda _: llmchain_fed.model.loading.HUB_ID)
    with pytest.raises(UnsupportedModelError, match="the working directory has a file or folder of that name"):
        LocalModel.from_pretrained("smollm2-135m-instruct")


def test_every_call_into_transformers_refuses_code():
    """Of a model, a configuration, a tokenizer: none is loaded without `trust_remote_code=False`."""
    loaders = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "loader"}
    found = 0
    for path in Path(llmchain_fed.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("from_pretrained", "from_config") and ast.unparse(node.func.value) in loaders:
                found += 1
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("trust_remote_code") == "False", f"{path.name}, line {node.lineno}"
    assert found >= 8
