"""What is refused before training, with its remedy: later tokens seen, running state, adapters that do not fit.

Belongs here: hand-made modules that do such things, and the remedies. Does not: transformers' own (test_architectures).
"""

import copy

import pytest
import torch
from peft import LoraConfig
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, with_lora
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmchain_fed import (
    FederatedAveraging,
    LLMChain,
    LocalLLM,
    LocalModel,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)
from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.generation import answers
from llmchain_fed.model.wrapping import wrap

STEP = TrainingConfig(learning_rate=0.1, optimizer="sgd", batch_size=4, epochs=1)


class Counting(torch.nn.Module):
    """Counts the training passes, in a buffer that a file stores or not."""

    def __init__(self, *, persistent):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.passes += 1
        return x


class RouterBias(torch.nn.Module):
    """A bias that the load moves and no gradient (DeepSeek-V3's way of balancing experts)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(32))

    def forward(self, x):
        if self.training:
            self.e_score_correction_bias += 0.01 * x.detach().mean((0, 1)).sign()
        return x


class Cache(torch.nn.Module):
    """Keeps what it has computed for a length, as masks and rotary frequencies are kept: no state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4), persistent=False)

    def forward(self, x):
        self.table.copy_(torch.arange(4.0) * x.shape[1])
        return x


class OverFeatures(torch.nn.Module):
    """A batch norm over the last dimension of (B, T, H)."""

    def __init__(self, **options):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(32, **options)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Normed(torch.nn.Module):
    def __init__(self, inner, part):
        super().__init__()
        self.inner, self.part = inner, part

    def forward(self, *args, **options):
        return self.part(self.inner(*args, **options))


PARTS = {
    "batch norm": OverFeatures,
    "batch norm without parameters": lambda: OverFeatures(affine=False),
    "counter in the file": lambda: Counting(persistent=True),
    "counter in no file": lambda: Counting(persistent=False),
    "router bias": RouterBias,
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(32, 32)),
}


def with_part(part, tokenizer):
    """A tiny Llama with this part behind its first layer's MLP, in training mode as torch makes it."""
    module = tiny_module("causal", len(tokenizer))
    module.model.layers[0].mlp = Normed(module.model.layers[0].mlp, part)
    return module


def chain_of(module, tokenizer):
    return LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer, name="tiny"), max_new_tokens=4), prompt=TEMPLATE)


@pytest.mark.parametrize("training", [True, False], ids=["training mode", "evaluation mode"])
@pytest.mark.parametrize("part", PARTS)
def test_state_that_training_changes_is_refused_by_name(part, training, tokenizer):
    module = with_part(PARTS[part](), tokenizer).train(training)
    chain = chain_of(module, tokenizer)
    before = {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    modes = [m.training for m in module.modules()]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.part.*\.eval\(\)"):
        FederatedAveraging(chain, participants={"a": PAIRS[:4]}, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.part"):
        train_locally(chain, PAIRS[:4], STEP)
    now = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(torch.equal(t, now[n]) for n, t in before.items())
    assert modes == [m.training for m in module.modules()]


@pytest.mark.parametrize("part", PARTS)
def test_frozen_in_evaluation_mode_it_is_accepted_and_stays_so(part, tokenizer):
    module = with_part(PARTS[part](), tokenizer)
    module.train()
    module.model.layers[0].mlp.part.eval()
    face = chain_of(module, tokenizer).llm  # no chain: its configuration could not make the part again
    before = {n: b.clone() for n, b in module.named_buffers()}
    start = module.model.embed_tokens.weight.detach().clone()
    fed = FederatedAveraging(face, participants={"a": PAIRS[:3], "b": PAIRS[3:8]}, training=STEP, progress=False)
    fed.fit(2)
    assert not torch.equal(module.model.embed_tokens.weight, start)
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())


def test_training_beside_a_frozen_norm_equals_plain_torch(tokenizer):
    """Also where the module arrived in evaluation mode and the norm is part of the frozen base under an adapter."""
    base = with_part(OverFeatures(), tokenizer)
    with torch.no_grad():
        base.model.layers[0].mlp.part.norm.running_mean.normal_()
        base.model.layers[0].mlp.part.norm.running_var.uniform_(0.5, 2)
    module = with_lora(base.eval(), lora_config(target_modules=["q_proj", "v_proj"]))
    plain, chain = copy.deepcopy(module), chain_of(module, tokenizer)
    train_locally(chain, PAIRS[:4], STEP)
    plain.train()
    plain.get_base_model().model.layers[0].mlp.part.eval()
    from llmchain_fed.data.encoding import collate, encode_examples

    encoded = encode_examples(PAIRS[:4], chain.model, chain)
    plain(**collate([encoded[i] for i in range(4)], chain.model)).loss.backward()
    now = dict(module.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(now[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)
    assert not any(part.training for part in module.modules())


def test_caches_and_dropout_are_no_state(tokenizer):
    for part in (Cache(), torch.nn.Dropout(0.5)):
        train_locally(chain_of(with_part(part, tokenizer), tokenizer), PAIRS[:4], STEP)


class NormedConfig(LlamaConfig):
    model_type = "normed_llama_for_tests"


class NormedLlama(LlamaForCausalLM):
    config_class = NormedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Normed(self.model.layers[0].mlp, OverFeatures())


def test_frozen_statistics_are_in_the_saved_chain(tokenizer, tmp_path):
    AutoConfig.register(NormedConfig.model_type, NormedConfig, exist_ok=True)
    AutoModelForCausalLM.register(NormedConfig, NormedLlama, exist_ok=True)
    sizes = tiny_module("causal", len(tokenizer)).config.to_dict()
    module = NormedLlama(NormedConfig(**{k: v for k, v in sizes.items() if k not in ("model_type", "architectures")}))
    norm = module.model.layers[0].mlp.part.norm
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    module.train()
    norm.eval()
    chain = chain_of(module, tokenizer)
    train_locally(chain, PAIRS[:4], STEP)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    theirs = loaded.model.module.model.layers[0].mlp.part.norm
    assert torch.equal(theirs.running_mean, norm.running_mean)
    assert torch.equal(theirs.running_var, norm.running_var)
    assert evaluate_locally(loaded, PAIRS).loss == pytest.approx(evaluate_locally(chain, PAIRS).loss, rel=1e-5)


def test_a_model_that_sees_later_tokens_is_refused(tokenizer):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}
    for is_decoder in (False, True):
        module = BertLMHeadModel(BertConfig(**sizes, is_decoder=is_decoder)).eval()
        chain = chain_of(module, tokenizer)
        if is_decoder:
            FederatedAveraging(chain, participants={"a": PAIRS[:4]}, progress=False)
            continue
        compiled = LocalModel(torch.compile(module, backend="eager"), tokenizer)
        for given in (chain, compiled):
            with pytest.raises(UnsupportedModelError, match=r"depend on later tokens.*is_decoder=True"):
                FederatedAveraging(given, participants={"a": PAIRS[:4]}, progress=False)


def test_a_decoder_without_a_beginning_is_refused(tokenizer):
    module = tiny_module("seq2seq", len(tokenizer))
    module.config.decoder_start_token_id = None
    with pytest.raises(UnsupportedModelError, match="decoder_start_token_id"):
        FederatedAveraging(chain_of(module, tokenizer), participants={"a": PAIRS[:4]}, progress=False)


@pytest.mark.parametrize("targets", [["no_such_layer"], ["norm"]])
def test_an_adapter_that_does_not_fit_is_refused_with_what_there_is(targets, tokenizer):
    module = tiny_module("causal", len(tokenizer))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*'q_proj'"):
        wrap(module, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def test_half_precision_does_not_keep_prompts_apart(tokenizer):
    """The rounding of another shape of batch is no sign of positions counted wrongly."""
    module = tiny_module("causal", len(tokenizer)).to(torch.bfloat16)
    rows = [tokenizer("save the page and open the file")["input_ids"], tokenizer("page")["input_ids"]]
    assert answers.sharing(module, rows, pad=0, left=True) == "any"
