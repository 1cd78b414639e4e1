"""Every LoraConfig that PEFT accepts is either right here or refused at once by name.

Belongs here: the table over PEFT's fields, and for each accepted value training, saving, loading, switching, resuming
and the contract, against plain transformers and PEFT. Does not: chain.yaml and tampering (test_saving).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings

import pytest
import torch
from lora_outcomes import outcome, trained
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import config as options_of_peft
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.torch import load_file
from tiny import PAIRS, TEMPLATE, tiny_module, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel
from llmchain_fed.errors import ChainFileError, ConfigError, NotTrainableError, UnsupportedModelError
from llmchain_fed.federated.target import Target
from llmchain_fed.model.adapters.lora_config import TREATMENT, refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:.*will be ignored when"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:.*is 'eva' but"),
    pytest.mark.filterwarnings("ignore:aLoRA"),
    pytest.mark.filterwarnings("ignore:.*is 'corda' but"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]

Q = {"target_modules": ["q_proj", "v_proj"]}

KasaConfig = getattr(options_of_peft, "KasaConfig", None)
"""None before PEFT 0.21, whose LoraConfig has no field of it either"""

# PEFT's field → values that are right, as the whole of what is passed to LoraConfig
RIGHT = {
    "task_type": [{"task_type": "CAUSAL_LM"}, {"task_type": TaskType.CAUSAL_LM}, {"task_type": None}],
    "peft_type": [{}],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "X", "parent_library": "y"}}],
    "peft_version": [{"peft_version": "0.1"}],
    "base_model_name_or_path": [{"base_model_name_or_path": "some/model"}],
    "revision": [{"revision": "main"}],
    "inference_mode": [{"inference_mode": False}],
    "r": [{"r": 1}, {"r": 5}],
    "target_modules": [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["layers.1.mlp.up_proj", "v_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    "exclude_modules": [
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"},
    ],
    "lora_alpha": [{"lora_alpha": 3}, {"lora_alpha": 2.5}],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "fan_in_fan_out": [{"fan_in_fan_out": False}],
    "bias": [{"bias": "none"}],
    "use_rslora": [{"use_rslora": True}, {"use_rslora": True, "r": 3, "rank_pattern": {"v_proj": 2}}],
    "modules_to_save": [
        {"modules_to_save": ["down_proj"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    "init_lora_weights": [
        {"init_lora_weights": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
    ],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {r"^model\.layers\.1\..*v_proj": 7}}],
    "alpha_pattern": [{"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {r".*layers\.[0]\..*": 1}, "r": 3}],
    "megatron_config": [{"megatron_config": None}],
    "megatron_core": [{"megatron_core": "megatron.core"}],
    "trainable_token_indices": [
        {"trainable_token_indices": [10, 11]},
        {"trainable_token_indices": {"embed_tokens": [3, 12]}},
        {"trainable_token_indices": {"lm_head": [3, 12]}},
        {"trainable_token_indices": {"embed_tokens": [3, 12], "lm_head": [3, 12]}},
        {"trainable_token_indices": {"embed_tokens": [3, 12], "lm_head": [4]}},
    ],
    "loftq_config": [{"loftq_config": {}}],
    "eva_config": [{"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}],
    "corda_config": [{"corda_config": None}],
    "lora_ga_config": [{"lora_ga_config": None}],
    "use_dora": [{"use_dora": True}, {"use_dora": True, "target_modules": "all-linear", "r": 2}],
    "velora_config": [{"velora_config": None}],
    "alora_invocation_tokens": [{"alora_invocation_tokens": None}],
    "use_qalora": [{"use_qalora": False}],
    "qalora_group_size": [{"qalora_group_size": 8}],
    "monteclora_config": [{"monteclora_config": None}],
    "layer_replication": [{"layer_replication": None}],
    "runtime_config": [{"runtime_config": LoraRuntimeConfig()}],
    "lora_bias": [{"lora_bias": True}],
    "target_parameters": [{"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}],
    "use_bdlora": [{"use_bdlora": None}],
    "arrow_config": [{"arrow_config": None}],
    "kasa_config": [{"kasa_config": None}] if KasaConfig else [],
    "ensure_weight_tying": [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [10, 11], "ensure_weight_tying": True},
    ],
}

REFUSED = {
    "task_type": [{"task_type": "SEQ_CLS"}, {"task_type": "FEATURE_EXTRACTION"}, {"task_type": "TOKEN_CLS"}],
    "r": [{"r": 0}, {"r": True}, {"r": 2.0}],
    "lora_alpha": [{"lora_alpha": 0}, {"lora_alpha": float("nan")}],
    "lora_dropout": [{"lora_dropout": 1.0}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 0}}],
    "alpha_pattern": [{"alpha_pattern": {"q_proj": 0}}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "init_lora_weights": [
        {"init_lora_weights": name}
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "mica", "unheard of")
    ],
    "layer_replication": [{"layer_replication": [[0, 2], [0, 2]]}],
    "megatron_config": [{"megatron_config": {"x": 1}}],
    "megatron_core": [{"megatron_core": "os"}],
    "alora_invocation_tokens": [{"alora_invocation_tokens": [1, 2]}],
    "use_qalora": [{"use_qalora": True}],
    "arrow_config": [{"arrow_config": ArrowConfig()}],
    "use_bdlora": [{"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}],
    "velora_config": [{"velora_config": VeloraConfig()}],
    "kasa_config": [{"kasa_config": KasaConfig()}] if KasaConfig else [],
    "monteclora_config": [{"monteclora_config": MontecloraConfig()}],
    "runtime_config": [{"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}],
    "ensure_weight_tying": [{"target_modules": ["embed_tokens"], "ensure_weight_tying": True}],
}
_SEEN: list[LoraConfig] = []


def _is_new(options):
    """Not the same configuration as one before: many fields have one value that is right, their default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**(Q | options))
    known = config in _SEEN
    _SEEN.append(config)
    return not known


ACCEPTED = [
    pytest.param(v, base, id=f"{name}-{i}-{base}")
    for name, values in RIGHT.items()
    for i, v in enumerate(values)
    if _is_new(v)
    for base in ("tied", "untied")
    if base == "tied" or any(part in repr(v) for part in ("embed", "lm_head", "token"))
]
DENIED = [pytest.param(n, v, id=f"{n}-{i}") for n, values in REFUSED.items() for i, v in enumerate(values)]
BASES = ["tied", "untied"]


def test_every_field_of_pefts_class_is_in_the_tables():
    """A field that a later PEFT adds fails here until somebody has decided what it means."""
    fields = {f.name for f in dataclasses.fields(LoraConfig)} | (set() if KasaConfig else {"kasa_config"})
    assert fields == TREATMENT.keys()
    assert fields == RIGHT.keys()
    documented = next(f for f in dataclasses.fields(LoraConfig) if f.name == "init_lora_weights").type
    tried = {str(v.get("init_lora_weights")) for v in [*RIGHT["init_lora_weights"], *REFUSED["init_lora_weights"]]}
    for name in ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica"):
        assert name in str(documented)
        assert name in tried | {"loftq"}


def test_every_value_in_the_table_is_accepted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values in RIGHT.values():
            for options in values:
                assert refusal(LoraConfig(**(Q | options))) is None, options


def config_of(options, kind="causal"):
    if kind == "seq2seq":
        return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]} | options))
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | Q | options))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """`folder("tied")`: a base on disk that any loader can read."""
    made = {}

    def make(what):
        if what not in made:
            made[what] = tmp_path_factory.mktemp(what)
            module = tiny_module("seq2seq" if what == "seq2seq" else "causal", len(tokenizer))
            if what == "untied":
                module.config.tie_word_embeddings = False
                module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() * 1.5)
            module.save_pretrained(made[what])
            tokenizer.save_pretrained(made[what])
        return made[what]

    return make


@functools.cache
def _loaded(path, kind):
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def plain(path, kind="causal"):
    """The base as transformers loads it."""
    return copy.deepcopy(_loaded(path, kind))


def chain_of(path, config):
    return LLMChain(llm=LocalLLM.from_pretrained(str(path), lora=config, max_new_tokens=6), prompt=TEMPLATE)


def check_there_and_back(chain, base_logits, directory, kind="causal"):
    """Everything that is promised of a trained, saved and loaded adapter; gives the loaded chain."""
    model = chain.model
    with model.without_adapter().exclusive():
        torch.testing.assert_close(outcome(model.module, kind)[1], base_logits, rtol=0, atol=1e-6)
    loss, logits = outcome(model.module, kind)
    chain.save(directory)
    loaded = LLMChain.load(directory)
    again_loss, again = outcome(loaded.model.module, kind)
    assert abs(float(again_loss) - float(loss)) < 1e-5
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-6)
    with loaded.model.without_adapter().exclusive():
        torch.testing.assert_close(outcome(loaded.model.module, kind)[1], base_logits, rtol=0, atol=1e-6)
    inputs = [{"text": text} for text, _ in PAIRS[:3]]
    assert loaded.batch(inputs) == chain.batch(inputs)
    assert [loaded.render(x) for x in inputs] == [chain.render(x) for x in inputs]
    texts = [chain.render(x) for x in inputs]
    assert loaded.model.encode(texts) == model.encode(texts)
    before, after = model.trainable_state(), loaded.model.trainable_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert Target.of(loaded).contract() == Target.of(chain).contract()
    assert loaded.model.fingerprint() == model.fingerprint()
    return loaded


# --- accepted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "base"), ACCEPTED)
def test_what_is_accepted_is_saved_as_it_was_trained(options, base, folder, tmp_path):
    start = plain(folder(base))
    base_logits = outcome(start)[1]
    chain = chain_of(folder(base), config_of(options))
    trained(chain)
    assert not torch.allclose(outcome(chain.model.module)[1], base_logits, atol=1e-4)  # else nothing were compared
    check_there_and_back(chain, base_logits, tmp_path / "chain")
    alone = PeftModel.from_pretrained(plain(folder(base)), str(tmp_path / "chain/adapter")).eval()
    torch.testing.assert_close(outcome(alone)[1], outcome(chain.model.module)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_dora": True},
        {"modules_to_save": ["wo"]},
        {"modules_to_save": ["shared"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [10, 11]},
        {"rank_pattern": {".*decoder.*q": 2}},
    ],
    ids=str,
)
def test_an_encoder_decoder_likewise(options, folder, tmp_path):
    base_logits = outcome(plain(folder("seq2seq"), "seq2seq"), "seq2seq")[1]
    chain = trained(chain_of(folder("seq2seq"), config_of(options, "seq2seq")))
    check_there_and_back(chain, base_logits, tmp_path / "chain", "seq2seq")
    alone = PeftModel.from_pretrained(plain(folder("seq2seq"), "seq2seq"), str(tmp_path / "chain/adapter")).eval()
    torch.testing.assert_close(outcome(alone, "seq2seq")[1], outcome(chain.model.module, "seq2seq")[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable_token_indices": [400, 401, 7]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", BASES)
def test_a_resized_vocabulary_comes_along(options, base, folder, tmp_path):
    tokens = train_tokenizer()
    tokens.add_tokens(["<SYM1>", "<SYM2>", "<SYM3>"])
    module = plain(folder(base))
    module.resize_token_embeddings(len(tokens), mean_resizing=False)
    base_logits = outcome(module)[1]
    model = LocalModel(get_peft_model(module, config_of({"task_type": "CAUSAL_LM"} | options)).eval(), tokens)
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=6), prompt=TEMPLATE)
    loaded = check_there_and_back(trained(chain), base_logits, tmp_path / "chain")
    assert loaded.model.encode(["<SYM1>"]) == [[400]] == model.encode(["<SYM1>"])


SPECIAL = [
    {},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [10, 11]},
    {"trainable_token_indices": {"embed_tokens": [3, 12], "lm_head": [4]}},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "k_proj.weight"]},
    {"lora_bias": True},
]


@pytest.mark.parametrize("options", SPECIAL, ids=str)
def test_a_federation_compares_checkpoints_and_resumes(options, folder, tmp_path):
    def federation(chain):
        people = {"a": PAIRS[:4], "b": PAIRS[4:8]}
        return FederatedAveraging(
            chain, participants=people, evaluation={"a": PAIRS[8:10]}, lr=0.05, batch_size=4, progress=False,
            checkpoint_dir=tmp_path / "run",
        )  # fmt: skip

    chain = chain_of(folder("tied"), config_of(options))
    fingerprint = chain.model.fingerprint()
    fed = federation(chain)
    fed.fit(1)
    first = LLMChain.load(save_to(chain, tmp_path / "first"))
    fed.fit(1)
    assert chain.model.fingerprint() == fingerprint
    bare = LLMChain(llm=LocalLLM(model=LocalModel(plain(folder("tied")), train_tokenizer())), prompt=TEMPLATE)
    from llmchain_fed import evaluate_locally

    wanted = evaluate_locally(bare, PAIRS[8:10]).loss
    assert abs(evaluate_locally(chain.without_adapter(), PAIRS[8:10]).loss - wanted) < 1e-5
    people = {"a": PAIRS[:4], "b": PAIRS[4:8]}
    resumed = FederatedAveraging.resume(
        tmp_path / "run", first, participants=people, evaluation={"a": PAIRS[8:10]}, round=1, progress=False
    )
    resumed.fit(1)
    state, again = chain.model.trainable_state(), first.model.trainable_state()
    assert all(torch.equal(state[n], again[n]) for n in state)


def save_to(chain, directory):
    chain.save(directory)
    return directory


def test_fan_in_fan_out_of_gpt2(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, bos_token_id=1
    )
    module = GPT2LMHeadModel(config).eval()
    base_logits = outcome(module)[1]
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = LocalModel(get_peft_model(module, lora).eval(), tokenizer)
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=4), prompt=TEMPLATE)
    check_there_and_back(trained(chain), base_logits, tmp_path / "chain")


def test_the_experts_of_a_mixture_are_adapted_by_parameter(tokenizer, tmp_path):
    """Two parameters of one module: PEFT puts one layer within another, and their factors keep apart."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    module = MixtralForCausalLM(config).eval()
    base_logits = outcome(module)[1]
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = LocalModel(get_peft_model(module, lora).eval(), tokenizer)
    assert len(model.trainable_state()) == 2 * 2 * 3
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=4), prompt=TEMPLATE)
    check_there_and_back(trained(chain), base_logits, tmp_path / "chain")


def test_eva_after_it_has_given_out_the_ranks(folder, tmp_path):
    """EVA changes ranks and layers after the adapter was made: what is saved is what the module has."""
    from peft import initialize_lora_eva_weights

    base_logits = outcome(plain(folder("tied")))[1]
    lora = config_of({"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0), "task_type": "CAUSAL_LM"})
    module = get_peft_model(plain(folder("tied")), lora)
    initialize_lora_eva_weights(
        module, [{"input_ids": torch.randint(2, 300, (4, 16))} for _ in range(4)], show_progress_bar=False
    )
    model = LocalModel(module.eval(), train_tokenizer())
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=4), prompt=TEMPLATE)
    check_there_and_back(trained(chain), base_logits, tmp_path / "chain")


@pytest.mark.parametrize("how", ["module.to", "no autocast", "float32 adapter"])
def test_the_adapters_own_type_comes_back(how, folder, tokenizer, tmp_path):
    base = plain(folder("tied")).to(torch.bfloat16)
    base_logits = outcome(base)[1]
    config = config_of({"task_type": "CAUSAL_LM", "init_lora_weights": False, "modules_to_save": ["norm"]})
    module = get_peft_model(base, config, autocast_adapter_dtype=how == "float32 adapter").eval()
    module = module.to(torch.bfloat16) if how == "module.to" else module
    chain = LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer), max_new_tokens=4), prompt=TEMPLATE)
    loaded = check_there_and_back(chain, base_logits, tmp_path / "chain")
    before, after = chain.model.trainable_state(), loaded.model.trainable_state()
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert torch.equal(outcome(loaded.model.module)[1], outcome(module)[1])


@pytest.mark.parametrize("rslora", [False, True])
def test_scalings_set_by_hand_come_back(rslora, folder, tokenizer, tmp_path):
    """PEFT's `set_scale` and `scale_layer` change a layer and no configuration."""
    base_logits = outcome(plain(folder("tied")))[1]
    config = config_of({"task_type": "CAUSAL_LM", "init_lora_weights": False, "use_rslora": rslora, "r": 3})
    module = get_peft_model(plain(folder("tied")), config).eval()
    attention = module.base_model.model.model.layers[0].self_attn
    attention.q_proj.set_scale("default", 0.3)
    attention.v_proj.scale_layer(1.7)
    chain = LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer), max_new_tokens=4), prompt=TEMPLATE)
    check_there_and_back(chain, base_logits, tmp_path / "chain")


def test_an_adapter_in_inference_mode_has_nothing_to_train(folder, tmp_path):
    chain = chain_of(folder("tied"), config_of({"inference_mode": True}))
    with pytest.raises(NotTrainableError, match="requires a gradient"):
        trained(chain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.(q|v)_proj"}),
        ({"r": 2, "lora_alpha": 4}, {"r": 8, "lora_alpha": 4, "rank_pattern": {".*": 2}}),
        ({"layers_to_transform": [1]}, {"target_modules": ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]}),
        ({"init_lora_weights": "gaussian"}, {"init_lora_weights": True}),
    ],
    ids=str,
)
def test_two_ways_of_saying_the_same_share_a_contract(one, other, folder):
    first, second = (Target.of(chain_of(folder("tied"), config_of(c))).contract() for c in (one, other))
    assert first == second


@pytest.mark.parametrize(
    "change",
    [
        {"r": 3},
        {"lora_alpha": 9},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [4]},
        {"trainable_token_indices": [5]},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_what_means_something_else_has_another_contract(change, folder):
    reference = {"trainable_token_indices": [5, 6]} if "trainable_token_indices" in change else {}
    first, second = (Target.of(chain_of(folder("tied"), config_of(c))).contract() for c in (reference, change))
    assert first["adapter"] != second["adapter"]
    assert first["base"] == second["base"]


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_settings_on_disk_are_resolved(folder, tmp_path):
    import json

    options = {
        "target_modules": "all-linear", "exclude_modules": ["down_proj"], "init_lora_weights": "gaussian",
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*layers\.1.*v_proj": 3}, "layers_to_transform": None,
    }  # fmt: skip
    chain = chain_of(folder("tied"), config_of(options))
    chain.save(tmp_path / "chain")
    found = json.loads((tmp_path / "chain/adapter/adapter_config.json").read_text())
    names = {n for n, m in plain(folder("tied")).named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(found["target_modules"]) == {n for n in names if not n.endswith(("down_proj", "lm_head"))}
    assert found["init_lora_weights"] is True
    assert found["rank_pattern"] == {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)}
    assert found["alpha_pattern"] == {"model.layers.1.self_attn.v_proj": 3}
    assert found["task_type"] == "CAUSAL_LM"
    assert not found.keys() & {"layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping"}


def test_every_file_can_be_read_by_everybody(folder, tmp_path):
    chain = chain_of(folder("tied"), config_of({}))
    chain.save(tmp_path / "chain")
    for path in (tmp_path / "chain").rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"megatron_core": "os"},
        {"layer_replication": [[0, 1]]},
        {"bias": "all"},
        {"r": "4"},
        {"lora_alpha": float("nan")},
        {"target_modules": ["q_proj("]},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"(a+)+$": 4}},
        {"trainable_token_indices": [1]},
        {"trainable_token_indices": {"embed_tokens": [-1]}},
        {"auto_mapping": {"parent_library": "os"}},
        {"task_type": "SEQ_CLS"},
        {"peft_type": "IA3"},
        {"runtime_config": {}},
    ],
    ids=str,
)
def test_only_what_save_writes_is_read(change, folder, tmp_path):
    import json

    from saved_chains import rehash

    chain = chain_of(folder("tied"), config_of({}))
    chain.save(tmp_path / "chain")
    path = tmp_path / "chain/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rehash(tmp_path / "chain")
    with pytest.raises(ChainFileError):
        LLMChain.load(tmp_path / "chain")


@pytest.mark.parametrize("rule", ["fedex", "flora"])
@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 7}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_the_adapter_of_fedex_and_flora_is_the_trained_model_in_plain_peft(rule, options, folder, tmp_path):
    chain = chain_of(folder("tied"), config_of(options))
    people = {"a": PAIRS[:4], "b": PAIRS[4:8], "c": PAIRS[8:]}
    fed = FederatedAveraging(chain, participants=people, aggregation=rule, lr=0.05, batch_size=4, progress=False)
    fed.fit(3)
    assert chain.model.remainder()
    chain.save(tmp_path / "chain")
    wanted = outcome(chain.model.module)[1]
    with torch.no_grad():
        alone = PeftModel.from_pretrained(plain(folder("tied")), str(tmp_path / "chain/adapter")).eval()
        torch.testing.assert_close(outcome(alone)[1], wanted, rtol=0, atol=1e-4)
    state = load_file(tmp_path / "chain/adapter/adapter_model.safetensors")
    for name, tensor in state.items():
        if "lora_A" in name:
            rank, n = tensor.shape
            m = state[name.replace("lora_A", "lora_B")].shape[0]
            assert rank <= chain.model.trainable_state()[name.removeprefix("base_model.model.")].shape[0] + min(m, n)
    loaded = LLMChain.load(tmp_path / "chain")
    torch.testing.assert_close(outcome(loaded.model.module)[1], wanted, rtol=0, atol=1e-5)
    assert Target.of(loaded).contract() == Target.of(chain).contract()
    before, after = chain.model.trainable_state(), loaded.model.trainable_state()
    assert all(torch.equal(before[n], after[n]) for n in before)
    here, there = chain.model.remainder(), loaded.model.remainder()
    assert here.keys() == there.keys()
    for name, (b, a) in here.items():
        torch.testing.assert_close(there[name][0] @ there[name][1], b @ a, rtol=1e-5, atol=1e-6)
    loaded.save(tmp_path / "again")
    torch.testing.assert_close(outcome(LLMChain.load(tmp_path / "again").model.module)[1], wanted, rtol=0, atol=1e-5)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), DENIED)
def test_what_is_refused_is_refused_by_name_before_any_weights_are_read(name, options, monkeypatch):
    from llmchain_fed.model import loading

    def loaded(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_base", loaded)
    with pytest.raises(ConfigError, match=name):
        LocalModel.from_pretrained("nowhere", lora=config_of(options))


def test_loftq_is_refused_too():
    config = config_of({})
    config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4}  # its own constructor wants scipy
    with pytest.raises(ConfigError, match="init_lora_weights='loftq'"):
        LocalModel.from_pretrained("nowhere", lora=config)


@pytest.mark.parametrize("lora", [True, {"r": 8}, "lora", 8], ids=str)
def test_lora_is_a_configuration(lora):
    with pytest.raises(ConfigError, match="LoraConfig"):
        LocalModel.from_pretrained("nowhere", lora=lora)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"bias": "lora_only"},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=str,
)
def test_a_peft_model_that_arrives_is_asked_the_same(options, tokenizer):
    module = get_peft_model(tiny_module("causal", len(tokenizer)), config_of({"task_type": "CAUSAL_LM"} | options))
    with pytest.raises(UnsupportedModelError, match=next(iter(options))):
        LocalModel(module, tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10),
    ],
    ids=lambda c: type(c).__name__,
)
def test_other_kinds_of_adapters_are_refused_by_name(config, tokenizer):
    with pytest.raises(ConfigError, match=type(config).__name__):
        LocalModel.from_pretrained("nowhere", lora=copy.deepcopy(config))
    module = get_peft_model(tiny_module("causal", len(tokenizer)), config)
    with pytest.raises(UnsupportedModelError, match=type(config).__name__):
        LocalModel(module, tokenizer)


def test_a_task_of_the_other_kind_is_refused(tokenizer):
    for kind, task in (("causal", "SEQ_2_SEQ_LM"), ("seq2seq", "CAUSAL_LM")):
        config = config_of({"task_type": task}, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = get_peft_model(tiny_module(kind, len(tokenizer)), config)
        with pytest.raises(UnsupportedModelError, match="task type"):
            LocalModel(module, tokenizer)


def injected(module, config):
    get_peft_model(module, config)
    return module


class Within(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


CARRIERS = {
    "changed in place": injected,
    "the base of a PeftModel": lambda m, c: get_peft_model(m, c).get_base_model(),
    "injected": lambda m, c: inject_adapter_in_model(c, m),
    "a LoraModel": lambda m, c: get_peft_model(m, c).base_model,
    "compiled": lambda m, c: torch.compile(get_peft_model(m, c).get_base_model(), backend="eager"),
    "within another module": lambda m, c: Within(get_peft_model(m, c)),
    "trained tokens alone": lambda m, c: get_peft_model(
        m, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    ).get_base_model(),
}


@pytest.mark.parametrize("how", CARRIERS)
def test_lora_layers_without_a_peft_model_are_refused(how, tokenizer):
    module = CARRIERS[how](tiny_module("causal", len(tokenizer)), config_of({"task_type": "CAUSAL_LM"}))
    with pytest.raises(UnsupportedModelError, match="Pass the PeftModel itself, or merge_and_unload"):
        LocalModel(module, tokenizer)


def test_merged_and_unloaded_is_a_plain_model(tokenizer, tmp_path):
    module = get_peft_model(tiny_module("causal", len(tokenizer)), config_of({"init_lora_weights": False}))
    merged = module.merge_and_unload().eval()
    wanted = outcome(merged)[1]
    model = LocalModel(merged, tokenizer)
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    torch.testing.assert_close(outcome(LLMChain.load(tmp_path / "chain").model.module)[1], wanted)


def test_a_compiled_peft_model_is_saved_like_any(tokenizer, tmp_path):
    module = get_peft_model(tiny_module("causal", len(tokenizer)), config_of({"init_lora_weights": False})).eval()
    wanted = outcome(module)[1]
    chain = LLMChain(llm=LocalLLM(model=LocalModel(torch.compile(module, backend="eager"), tokenizer)), prompt=TEMPLATE)
    chain.save(tmp_path / "chain")
    torch.testing.assert_close(outcome(LLMChain.load(tmp_path / "chain").model.module)[1], wanted)
