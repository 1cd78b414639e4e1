"""Every architecture equals plain transformers, or is refused by name before anything is trained.

Belongs here: one tiny random model per model type, against transformers, PEFT and torch used as their users do. Does
not: how the door finds out (test_trainable). The usual types run in `make test`, all others in `make test-
architectures`.
"""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig
from tiny import PAIRS, TEMPLATE
from tiny_architectures import CAUSAL, SEQ2SEQ, tiny_architecture
from transformers.pytorch_utils import Conv1D

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, TrainingConfig, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.wrapping import wrap
from llmchain_fed.training.loss import summed_loss

USUAL = """bart bert biogpt bloom codegen cohere ctrl deepseek_v3 falcon falcon_mamba gemma2 gemma3_text glm4 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite jamba llama mamba2 mistral mixtral mpt olmo2 openai-gpt opt phi3
    qwen2 qwen3_moe recurrent_gemma rembert rwkv stablelm starcoder2 whisper xglm xlnet""".split()  # noqa: SIM905
USUAL_SEQ2SEQ = """bart encoder-decoder fsmt longt5 m2m_100 marian mt5 pegasus prophetnet switch_transformers
    t5""".split()  # noqa: SIM905
# not made by `tiny_architecture`, or beyond some million parameters, or another name of one that is tested
NOT_MADE = """cohere_compass_text dbrx dots3_note dots3_note_text gemma3n gemma3n_text gemma4 gemma4_assistant
    gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text musicgen musicgen_melody qwen4_exp
    qwen4_exp_text reformer zamba zamba2 nemo_speechlm blt vibevoice_asr exaone gpt-sw3 internlm3 iquestcoder sarvam_mla
    sarvam_moe""".split()  # noqa: SIM905
# what cannot be trained here as its own answers need it, and what the refusal says
REFUSED = {
    ("xlm", False): "depend on later tokens",
    ("xlnet", False): "depend on later tokens",
    ("prophetnet", True): "micro_batch_size=1",
}
# PEFT refuses these layers of recurrent models
NO_ADAPTER = ("out_proj", "conv1d")
# where "all-linear" meets recurrent kernels, fused experts, Conv1D
ALL_LINEAR = [("gpt2", False), ("jamba", False), ("mamba2", False), ("mixtral", False), ("t5", True)]


def _families():
    usual = [(t, False) for t in USUAL] + [(t, True) for t in USUAL_SEQ2SEQ]
    every = [(t, False) for t in CAUSAL if t not in NOT_MADE] + [(t, True) for t in SEQ2SEQ if t not in NOT_MADE]
    for t in dict.fromkeys(usual + every):
        marks = () if t in usual else pytest.mark.architectures
        yield pytest.param(t, id=f"{t[0]}{'-seq2seq' if t[1] else ''}", marks=marks)


def _later(family):
    return pytest.param(*family.values, id=family.id, marks=pytest.mark.architectures)


FAMILIES = list(_families())
FEW, TOKENS = PAIRS[:5], 4


@pytest.fixture(params=FAMILIES)
def family(request, tokenizer):
    """`family.make()`: equal modules of one type; `family.refused`: what training it is refused with, or None."""
    return Family(*request.param, tokenizer)


@pytest.fixture(params=[p if p.values[0] in ALL_LINEAR else _later(p) for p in FAMILIES])
def family_all_linear(request, tokenizer):
    return Family(*request.param, tokenizer)


class Family:
    def __init__(self, model_type, seq2seq, tokenizer):
        self.type, self.seq2seq, self.tokenizer = model_type, seq2seq, tokenizer
        self.usual = model_type in (USUAL_SEQ2SEQ if seq2seq else USUAL)
        # of the long tail it is only asked that a refusal is this package's
        self.refused = REFUSED.get((model_type, seq2seq), None if self.usual else "")

    def make(self):
        return tiny_architecture(self.type, len(self.tokenizer), seq2seq=self.seq2seq)

    def chain(self, module):
        model = LocalModel(module, self.tokenizer, name="tiny")
        return LLMChain(llm=LocalLLM(model=model, max_new_tokens=TOKENS), prompt=TEMPLATE)


def batch_of(chain, pairs=FEW):
    encoded = encode_examples(pairs, chain.model, chain)
    return collate([encoded[i] for i in range(len(encoded))], chain.model)


def cross_entropy(module, batch):
    """The mean over the completion's tokens, from its own logits; a decoder's input as it shifts it."""
    base = module.get_base_model() if hasattr(module, "peft_config") else module
    inputs, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False  # with one, FSMT's decoder has no causal mask
    if base.config.is_encoder_decoder:
        if hasattr(base, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        else:
            inputs["labels"] = labels.clone()
        logits = module(**inputs).logits
    else:
        logits, labels = module(**inputs).logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.float()[labels != -100], labels[labels != -100])


@torch.no_grad()
def runs(module, batch):
    """Whether the module takes text alone."""
    try:
        cross_entropy(module, batch)
    except Exception:
        return False
    return True


def plain_step(module, batch, lr):
    """Parameter → its value after one step of torch's SGD in training mode."""
    module.train()
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=lr)
    cross_entropy(module, batch).backward()
    optimizer.step()
    return {n: p.detach().clone() for n, p in parameters.items()}


def assert_equal_weights(module, expected, start):
    """To a thousandth of the largest change."""
    got = dict(module.named_parameters())
    largest = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(got[name].detach(), value, rtol=0, atol=1e-3 * largest + 1e-7, msg=name)


def test_loss_answers_and_file(family, tmp_path):
    """Loss, answers alone, in a batch and streamed, and all of it again after save and load."""
    module = family.make()
    chain = family.chain(module)
    batch = batch_of(chain)
    if not family.usual and not runs(module, batch):
        with pytest.raises(UnsupportedModelError):
            FederatedAveraging(chain, participants={"a": FEW}, progress=False)
        return
    loss, count = summed_loss(module, batch)
    mean = float(loss.detach()) / count
    with torch.no_grad():
        assert mean == pytest.approx(float(cross_entropy(module, batch)), rel=1e-4)

    inputs = [{"text": text} for text, _ in FEW]
    prompts = [chain.render(x) for x in inputs]
    assert len({len(row) for row in chain.model.encode(prompts)}) > 1
    alone = []
    for prompt in prompts:
        ids = torch.tensor(chain.model.encode([prompt]))
        output = module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, num_beams=1,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        new = output[0, 1:] if module.config.is_encoder_decoder else output[0, ids.shape[1] :]
        alone.append(family.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert [chain.invoke(x) for x in inputs] == alone
    assert chain.batch(inputs) == alone
    assert "".join(chain.stream(inputs[0])) == alone[0]

    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    again, count = summed_loss(loaded.model.module, batch)
    assert float(again.detach()) / count == pytest.approx(mean, rel=1e-5)
    assert loaded.batch(inputs) == alone


def test_one_step_of_full_weights(family):
    module = family.make()
    chain, config = family.chain(module), TrainingConfig(learning_rate=0.01, optimizer="sgd", batch_size=8, epochs=1)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    refusal = None
    try:
        FederatedAveraging(chain, participants={"a": FEW}, training=config, progress=False)
    except UnsupportedModelError as error:
        refusal = str(error)
    if refusal is not None:
        assert family.refused is not None, refusal
        assert family.refused in refusal
        with pytest.raises(UnsupportedModelError):
            train_locally(chain, FEW, config)
        assert all(torch.equal(p, start[n]) for n, p in module.named_parameters())
        return
    assert not family.refused
    expected = plain_step(copy.deepcopy(module), batch_of(chain), 0.01)
    train_locally(chain, FEW, config)
    assert_equal_weights(module, expected, start)


def linear_names(module):
    """Last names of the linear layers that stand alone: no head, no recurrent kernel's, none fused into experts."""
    names = [
        n.rpartition(".")[2]
        for n, part in module.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D)) and part is not module.get_output_embeddings()
    ]
    fused = any("experts" in n for n, _ in module.named_parameters())
    left_out = {*NO_ADAPTER, *(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3") if fused else ())}
    usable = sorted({n for n in names if not n.isdigit()} - left_out, key=lambda n: (-names.count(n), n))
    return usable[:2]


def test_one_federated_round_of_adapters(family):
    """Σ n_k/n · w_k over two participants' plain steps of PEFT's module."""
    base = family.make()
    one_round(family, base, linear_names(base), may_be_refused=family.refused is not None)


def test_one_federated_round_of_all_linear(family_all_linear):
    """The same, or refused as this package's error where PEFT cannot (recurrent kernels) or its names collide."""
    one_round(family_all_linear, family_all_linear.make(), "all-linear", may_be_refused=True)


def one_round(family, base, targets, *, may_be_refused):
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=task)
    participants = {"a": FEW[:2], "b": FEW[2:]}
    training = TrainingConfig(learning_rate=0.05, optimizer="sgd", batch_size=8, epochs=1)
    try:
        module = wrap(base, config).eval()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        plain, chain = copy.deepcopy(module), family.chain(module)
        fed = FederatedAveraging(chain, participants=participants, training=training, progress=False, samples=0)
    except UnsupportedModelError as error:
        if may_be_refused:
            return
        raise AssertionError from error
    assert not family.refused
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    trained = [plain_step(copy.deepcopy(plain), batch_of(chain, rows), 0.05) for rows in participants.values()]
    expected = {n: (2 * trained[0][n] + 3 * trained[1][n]) / 5 for n in trained[0]}
    fed.fit(1)
    assert_equal_weights(module, expected, start)
