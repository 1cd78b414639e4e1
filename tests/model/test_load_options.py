"""What from_pretrained is asked for: handed over to transformers, or refused with one typed error before any weights.

Belongs here: options of loading. Does not: what files may be loaded (security/test_chain_folder), LoRA's own options.
"""

import importlib.util

import pytest
import torch
from tiny import lora_config, tiny_module, train_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmchain_fed import (
    ConfigError,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    MissingExtraError,
    UnsupportedModelError,
)
from llmchain_fed.errors import install
from llmchain_fed.model import loading
from llmchain_fed.model.folder import load_options

EMBEDDED, HUB_ID = load_options.EMBEDDED, load_options.HUB_ID


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found, tokenizer = tmp_path_factory.mktemp("model"), train_tokenizer()
    tiny_module("causal", len(tokenizer)).to(torch.bfloat16).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return str(found)


@pytest.fixture
def handed(monkeypatch):
    """What transformers' loader is called with."""
    seen, real = [], AutoModelForCausalLM.from_pretrained

    def noting(path, **options):
        seen.append({"path": path, **options})
        options.pop("quantization_config", None)
        options.pop("device_map", None)
        options.pop("revision", None)
        return real(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    return seen


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, torch.float32), ("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("float32", torch.float32),
     (torch.float16, torch.float16), ("torch.float16", torch.float16)],
)  # fmt: skip
def test_the_base_has_the_type_that_was_asked_for(given, wanted, folder):
    assert next(LocalModel.from_pretrained(folder, dtype=given).parameters()).dtype == wanted


def test_an_adapter_stays_in_float32_over_auto(folder):
    model = LocalModel.from_pretrained(folder, dtype="auto", lora=lora_config())
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}


def test_a_quantisation_is_handed_over_with_the_device_and_the_base_is_not_named(folder, handed, monkeypatch):
    monkeypatch.setattr(load_options, "_is_there", lambda package: True)
    config = BitsAndBytesConfig(load_in_4bit=True)
    llm = LocalLLM.from_pretrained(folder, quantization_config=config, dtype="auto", device="cpu", max_new_tokens=3)
    (call,) = handed
    assert call["quantization_config"] is config
    assert call["dtype"] == "auto"
    assert call["device_map"] == {"": torch.device("cpu")}
    assert llm.model.reference is None
    assert llm.max_new_tokens == 3


def test_a_revision_is_handed_over_to_every_loader(folder, handed, monkeypatch):
    seen = {}

    def here(what):
        real = what.from_pretrained

        def noting(path, **options):
            seen.setdefault(what, set()).add(options.pop("revision", None))
            return real(path, **options)

        monkeypatch.setattr(what, "from_pretrained", noting)

    here(loading.AutoConfig)
    here(loading.AutoTokenizer)
    monkeypatch.setattr(loading, "resolve", lambda name: folder)
    model = LocalModel.from_pretrained("org/model", revision="v1")
    assert all("v1" in revisions for revisions in seen.values())  # some read what has been fetched already
    assert seen.keys() == {loading.AutoConfig, loading.AutoTokenizer}
    assert handed[0]["revision"] == "v1"
    assert model.reference is None  # by its name alone another version would be loaded: a saved chain brings it along
    assert LocalModel.from_pretrained("org/model").reference == "org/model"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_a_quantisation_without_its_library_names_it(folder):
    with pytest.raises(MissingExtraError, match=r"needs the package bitsandbytes.*pip install bitsandbytes"):
        LocalModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


WRONG = {
    "device=gpu": ({"device": "gpu"}, r"device='gpu' cannot be used.*'cuda'\. Here there is cpu"),
    "device=cuda:99": ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
    "device=3.5": ({"device": 3.5}, "device=3.5 cannot be used"),
    "dtype=int8": ({"dtype": "int8"}, "no type that weights are computed in.*quantization_config"),
    "dtype=torch.int8": ({"dtype": torch.int8}, "no type that weights are computed in"),
    "dtype=half": ({"dtype": 16}, "no type that weights are computed in"),
    "lora=dict": ({"lora": {"r": 8}}, r"lora takes a peft.LoraConfig, got dict"),
    "lora=True": ({"lora": True}, r"lora takes a peft.LoraConfig, got bool"),
    "quantization=True": ({"quantization_config": True}, "such as BitsAndBytesConfig"),
    "quantization=dict": ({"quantization_config": {"load_in_4bit": True}}, "such as BitsAndBytesConfig"),
    "revision of a folder": ({"revision": "main"}, "is read from this machine"),
    "revision=3": ({"revision": 3}, "a branch, a tag or a commit"),
    "4 bits": ({"load_in_4bit": True}, r"here it is quantization_config=BitsAndBytesConfig\(load_in_4bit=True\)"),
    "torch_dtype": ({"torch_dtype": "auto"}, "here it is dtype="),
    "trust_remote_code": ({"trust_remote_code": True}, "code out of a model's folder is never run"),
    "devise": ({"devise": "cpu"}, "did you mean `device`"),
}


@pytest.mark.parametrize("kind", [LocalModel, LocalLLM, LocalChatModel])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_before_any_weights_are_read(case, kind, folder, handed):
    options, why = WRONG[case]
    with pytest.raises(ConfigError, match=why):
        kind.from_pretrained(folder, **options)
    assert handed == []


def test_an_unknown_option_lists_those_of_loading_too(folder):
    for kind in (LocalModel, LocalLLM):
        with pytest.raises(ConfigError) as found:
            kind.from_pretrained(folder, nonsense=1)
        assert all(f" {name}" in str(found.value) for name in load_options.OPTIONS)


def test_a_face_over_a_model_says_that_loading_is_somewhere_else(make_model):
    with pytest.raises(ConfigError, match=r"`dtype` is how a model is loaded: LocalLLM.from_pretrained\(…, dtype=…\)"):
        LocalLLM(model=make_model(), dtype="auto")


@pytest.mark.parametrize(
    "name", ["smolm2-135m-instruct", "SmolLM2-135M-Instruct", "smollm2-135m", "smollm-135m-instruct"]
)
def test_the_embedded_models_name_misspelt_is_found(name):
    with pytest.raises(UnsupportedModelError, match="did you mean 'smollm2-135m-instruct'"):
        LocalModel.from_pretrained(name)


@pytest.mark.parametrize("name", [None, 3, "", ["a"], torch.nn.Linear(1, 1)])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"loaded by its hub id, its folder or the name"):
        LocalModel.from_pretrained(name)


def test_the_embedded_models_hub_id_is_the_embedded_one_where_the_wheel_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "resolve", lambda name: "/somewhere" if name == EMBEDDED else name)
    assert loading.embedded_name(HUB_ID, None) == EMBEDDED
    assert loading.embedded_name(HUB_ID, "main") == HUB_ID
    assert loading.embedded_name("HuggingFaceTB/SmolLM2-360M-Instruct", None) == "HuggingFaceTB/SmolLM2-360M-Instruct"
    monkeypatch.setattr(loading, "resolve", lambda name: HUB_ID)
    assert loading.embedded_name(HUB_ID, None) == HUB_ID
    monkeypatch.setattr(loading, "resolve", lambda name: "/somewhere" if name == EMBEDDED else name)
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert loading.embedded_name(HUB_ID, None) == HUB_ID  # a folder of that name is what is meant


@pytest.mark.parametrize(
    ("llm", "why"),
    [
        (torch.nn.Linear(1, 1), r"got a torch module\. Pass LocalLLM\(model=LocalModel\(module, tokenizer\)\)"),
        ("gpt-4", r"got the text 'gpt-4'\. Pass LocalLLM.from_pretrained"), (3, "got int"), (None, "got NoneType"),
    ],
)  # fmt: skip
def test_a_chain_over_what_is_no_language_model_is_refused_when_it_is_made(llm, why):
    with pytest.raises(UnsupportedModelError, match=why):
        LLMChain(llm=llm, prompt="{text}")


def test_a_chain_over_a_bare_local_model_says_which_faces_there_are(make_model):
    with pytest.raises(UnsupportedModelError, match=r"got a LocalModel\. Pass LocalLLM\(model=model\)"):
        LLMChain(llm=make_model(), prompt="{text}")


@pytest.mark.parametrize(
    "text", ['Answer as {"label": "x"}: {text}', "Answer as {'label'}: {text}", "{text", "{}: {text}"]
)
def test_a_template_with_braces_of_json_is_refused(text, tiny_llm):
    with pytest.raises(ConfigError, match=r"[Dd]ouble"):
        LLMChain(llm=tiny_llm, prompt=text)
    assert LLMChain(llm=tiny_llm, prompt='Answer as {{"label": "x"}}: {text}').prompt.input_variables == ["text"]


def test_advice_to_install_names_what_there_is_on_an_index():
    assert (
        install("mlflow", "mlflow") == "pip install mlflow; in a checkout of this project: pip install -e '.[mlflow]'"
    )


def test_plain_text_over_the_embedded_model_ends_after_64_tokens_unless_told_otherwise(monkeypatch, make_model):
    monkeypatch.setattr(LocalModel, "from_pretrained", lambda *_, **__: make_model())
    for name in (EMBEDDED, HUB_ID):
        assert LocalLLM.from_pretrained(name).max_new_tokens == 64
        assert LocalLLM.from_pretrained(name, max_new_tokens=300).max_new_tokens == 300
        assert LocalLLM.from_pretrained(name, max_tokens=300).max_new_tokens == 300
        assert LocalChatModel.from_pretrained(name).max_new_tokens == 256  # its template's end token ends it
    assert LocalLLM.from_pretrained("org/model").max_new_tokens == 256
