"""The loss and its gradients against cross entropy over the full forward's logits, written out here.

Belongs here: one batch's loss. Does not: what optimizers make of it (test_loop).
"""

import math

import pytest
import torch
from tiny import PAIRS
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from llmchain_fed import LocalModel, TrainingConfig, evaluate_locally, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import DataError
from llmchain_fed.training.loss import computing_in, summed_loss


def batch_of(chain, pairs=PAIRS[:5]):
    encoded = encode_examples(pairs, chain.model, chain)
    return collate([encoded[i] for i in range(len(encoded))], chain.model)


def naive(module, batch, *, seq2seq=False):
    """Σ log Σ exp(logits) − logits[token] over the labelled tokens, in float64; and their number."""
    logits, labels = module(**batch).logits.double(), batch["labels"]  # (B, T, V), (B, T)
    if not seq2seq:  # seq2seq models shift the decoder's input themselves
        logits, labels = logits[:, :-1], labels[:, 1:]
    places = (labels != -100).nonzero().tolist()
    rows = torch.stack([logits[b, t] for b, t in places])
    chosen = torch.stack([logits[b, t, labels[b, t]] for b, t in places])
    return (torch.logsumexp(rows, 1) - chosen).sum(), len(places)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_matches(module, batch, *, seq2seq=False):
    expected, count = naive(module, batch, seq2seq=seq2seq)
    wanted = gradients(module, expected)
    loss, tokens = summed_loss(module, batch)
    got = gradients(module, loss)
    assert tokens == count
    assert math.isclose(float(loss.detach()), float(expected.detach()), rel_tol=1e-5)
    assert got.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_loss_and_gradients_equal_the_full_forwards(battery):
    chain = battery()
    batch = batch_of(chain)
    assert int((batch["labels"] == -100).sum()) > 0
    assert_matches(chain.model.module, batch, seq2seq=battery.kind == "seq2seq")


def test_only_completion_positions_go_through_the_head(battery):
    """The reason for the fast path: fewer rows through the head; seq2seq has completions alone as it is."""
    chain = battery()
    batch = batch_of(chain)
    module = chain.model.module
    summed_loss(module, batch)  # the comparison with the full forward happens here, once
    rows = []
    head = module.get_output_embeddings()
    with_hook = head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[:-1].numel()))
    summed_loss(module, batch)
    with_hook.remove()
    labelled = int((batch["labels"] != -100).sum())
    assert rows == [labelled if battery.kind == "causal" else batch["labels"].numel()]


def small(config_class, model_class, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        return model_class(config_class(**(common | options))).eval()


LLAMA_LIKE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {
    "logits scaled (Cohere)": lambda: small(CohereConfig, CohereForCausalLM, logit_scale=0.0625, **LLAMA_LIKE),
    "logits capped (Gemma 2)": lambda: small(
        Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=0.05, **LLAMA_LIKE
    ),
    "projection before the head (OPT)": lambda: small(
        OPTConfig, OPTForCausalLM, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16,
    ),
    "plain, another family (GPT-2)": lambda: small(
        GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=1, n_head=2, n_positions=64
    ),
}  # fmt: skip

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 1, 0], [9, 10, 11, 12, 13, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6]),
    "labels": torch.tensor([[-100, -100, 7, 8, 1, -100], [-100, 10, 11, 12, 13, 1]]),
}


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_are_right_too(head):
    assert_matches(HEADS[head](), BATCH)


def test_a_cap_on_logits_counts_also_when_the_first_logits_were_small():
    """Near zero a soft cap is the identity: at the start nothing shows, after training much does."""
    module = small(Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=30.0, **LLAMA_LIKE)
    assert_matches(module, BATCH)
    with torch.no_grad():
        module.model.norm.weight.fill_(200.0)  # logits of some ±50
    assert float(module(**BATCH).logits.detach().abs().max()) > 20
    assert_matches(module, BATCH)


def test_a_forward_that_scales_is_noticed(make_model):
    """The check is against what the module does, not against a list of names."""
    model = make_model()
    kind = type(model.module)

    class Halved(kind):
        def forward(self, *args, labels=None, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits / 2
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, vocab_size=self.config.vocab_size)
            return output

    model.module.__class__ = Halved
    assert_matches(model.module, {k: v.clone() for k, v in BATCH.items()})


def test_a_module_of_ones_own_returns_its_loss():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)

        def forward(self, x, labels):
            logits = self.table[x]  # (B, V)
            return type("Output", (), {"loss": torch.nn.functional.cross_entropy(logits, labels)})

    module = Own()
    batch = {"x": torch.tensor([0, 2, 1]), "labels": torch.tensor([1, 3, 0])}
    loss, tokens = summed_loss(module, batch)
    rows = module.table.detach().double()[batch["x"]]
    by_hand = sum(float(torch.logsumexp(r, 0) - r[y]) for r, y in zip(rows, batch["labels"], strict=True))
    assert tokens == 3
    assert math.isclose(float(loss.detach()), by_hand, rel_tol=1e-6)


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(1, 2)}, [torch.ones(1, 2)], torch.ones(2)])
def test_a_batch_without_labels_is_refused(batch, make_model):
    with pytest.raises(DataError, match="labels"):
        summed_loss(make_model().module, batch)


def test_a_module_without_loss_is_refused():
    class Mute(torch.nn.Linear):
        def forward(self, x, labels):
            return super().forward(x)

    with pytest.raises(DataError, match="Mute returned no"):
        summed_loss(Mute(2, 2), {"x": torch.ones(1, 2), "labels": torch.tensor([1])})


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_batch_of_nothing_but_prompt_carries_no_loss(kind, make_chain):
    """The mean over no token is NaN; Σ over no token is zero."""
    chain = make_chain(kind)
    batch = batch_of(chain)
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss, tokens = summed_loss(chain.model.module, silent)
    assert (float(loss.detach()), tokens) == (0.0, 0)
    loss.backward()  # and it can be asked for gradients, which are zero
    assert all(not p.grad.abs().max() for p in chain.model.parameters() if p.grad is not None)


# --- bf16 -----------------------------------------------------------------------------------------------------------


def test_bf16_leaves_every_weight_bit_identical(battery):
    chain = battery()
    model = chain.model
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    pointers = {n: p.data_ptr() for n, p in model.module.named_parameters()}
    batch = batch_of(chain)
    plain = float(summed_loss(model.module, batch)[0].detach())
    with computing_in("bf16", model.module):
        rounded = float(summed_loss(model.module, batch)[0].detach())
    assert rounded != plain  # bfloat16 was really used
    assert math.isclose(rounded, plain, rel_tol=0.02)
    for name, parameter in model.module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name
        assert parameter.data_ptr() == pointers[name], name


def test_bf16_leaves_the_weights_even_when_the_work_fails(make_model):
    model = make_model(lora=True)
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    with pytest.raises(ZeroDivisionError), computing_in("bf16", model.module):
        1 / 0  # noqa: B018
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


def test_training_in_bf16_follows_a_plain_autocast_loop(battery):
    """One autocast per step: under a single one for all steps, torch would go on with the first step's weights."""
    ours, theirs = battery(), battery()
    model = ours.model
    frozen = {n: p.detach().clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    config = TrainingConfig(learning_rate=0.3, optimizer="sgd", epochs=4, batch_size=5, precision="bf16")
    result = train_locally(model, PAIRS[:5], config, prompt=ours)
    batch, losses = batch_of(theirs), []
    optimizer = torch.optim.SGD([p for p in theirs.model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = theirs.model.module(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    drop = losses[0] - losses[-1]
    assert drop > (0.004 if battery.lora else 0.1)
    assert result.losses == pytest.approx(losses, abs=0.15 * drop)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in model.module.named_parameters() if n in frozen)


def test_evaluation_in_bf16(battery):
    chain = battery()
    fp32 = evaluate_locally(chain.model, PAIRS, prompt=chain)
    bf16 = evaluate_locally(chain.model, PAIRS, prompt=chain, precision="bf16")
    assert fp32.loss != bf16.loss
    assert fp32.loss == pytest.approx(bf16.loss, rel=0.02)
    assert (fp32.tokens, fp32.examples) == (bf16.tokens, bf16.examples)


def test_the_check_of_the_head_also_applies_to_an_adapter_over_a_scaling_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    base = HEADS["logits scaled (Cohere)"]()
    module = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    model = LocalModel(module, tokenizer)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(std=0.1)
    assert_matches(module, BATCH)
