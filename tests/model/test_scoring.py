"""Scores of answers against a forward pass for each whole row, in float64, written out here.

Belongs here: numbers and gradients of scores. Does not: labels' texts (chain/test_labels), the loss (test_label_loss).
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from llmchain_fed import LabelError, LocalModel, PromptTooLongError
from llmchain_fed.model import scoring
from llmchain_fed.model.scoring import answer_scores

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [30, 31, 32, 33]]
ANSWERS = [[20, 1], [20, 21, 1], [20, 21, 22, 23, 1], [40, 1], [41, 42, 1]]  # three begin alike


def brute_force(model, prompts, answers):
    """One row at a time, without padding or cache: Σ log softmax(logits)[token]."""
    module, found = model.module, []
    for prompt in prompts:
        row = []
        for answer in answers:
            if model.kind == "seq2seq":
                logits = module(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])
                ).logits[0]
            else:
                logits = module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            terms = [torch.log_softmax(logits[t].double(), 0)[token] for t, token in enumerate(answer)]
            row.append(sum(terms))
        found.append(torch.stack(row))
    return torch.stack(found)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_scores_are_those_of_whole_rows(make_model, kind, lora, rows):
    model = make_model(kind, lora=lora)
    with torch.no_grad():
        found = answer_scores(model, PROMPTS, ANSWERS, rows=rows)
        torch.testing.assert_close(found.double(), brute_force(model, PROMPTS, ANSWERS), rtol=0, atol=1e-4)
    assert scoring._shares[model.module]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_gradients_are_those_of_whole_rows(make_model, kind):
    """Keys and values that answers share carry all their gradients back to the prompt."""
    model = make_model(kind, lora=True)
    pick = torch.randn(len(PROMPTS), len(ANSWERS), generator=torch.Generator().manual_seed(0))
    wanted = gradients(model.module, (brute_force(model, PROMPTS, ANSWERS) * pick).sum())
    found = gradients(model.module, (answer_scores(model, PROMPTS, ANSWERS, rows=6) * pick).sum())
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_end_token_decides_between_labels_that_begin_alike(make_model):
    """p(ab) without its end contains p(abc): with both ends, the label's alternatives are apart."""
    model = make_model()
    with torch.no_grad():
        scores = answer_scores(model, PROMPTS[:1], [[20, 1], [20, 21, 1], [20]])[0]
        assert scores[0] < scores[2]
        assert scores[:2].exp().sum() < scores[2].exp()  # disjoint continuations of the one beginning


def tiny(kind, vocab):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    if kind == "opt":
        config = OPTConfig(
            vocab_size=vocab, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        return OPTForCausalLM(config).eval()
    config = MistralConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(("kind", "shares"), [("gpt2", True), ("opt", True), ("mistral", False)])
def test_positions_by_number_or_by_mask_and_windows(tokenizer, kind, shares):
    """What a module does not share in earnest (a sliding window) is computed row by row, and right as well."""
    model = LocalModel(tiny(kind, len(tokenizer)), tokenizer, name=kind)
    with torch.no_grad():
        found = answer_scores(model, PROMPTS, ANSWERS)
        torch.testing.assert_close(found.double(), brute_force(model, PROMPTS, ANSWERS), rtol=0, atol=1e-4)
    assert scoring._shares[model.module] is shares


def test_prompts_pass_the_model_once(make_model):
    """The tokens that go through the model are those of the prompts once, and of the answers."""
    model, seen = make_model(), []
    with torch.no_grad():
        answer_scores(model, PROMPTS, ANSWERS)  # the trial
        model.module.register_forward_pre_hook(
            lambda _m, _a, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        answer_scores(model, PROMPTS, ANSWERS)
    assert seen == [len(PROMPTS) * 7, len(PROMPTS) * len(ANSWERS) * 4]


def test_nothing_to_score_and_no_room(make_model):
    model = make_model()
    with pytest.raises(LabelError, match="no token"):
        answer_scores(model, [[]], ANSWERS)
    with pytest.raises(LabelError, match="no token"):
        answer_scores(model, PROMPTS, [[], [1]])
    with pytest.raises(PromptTooLongError, match="Shorten"):
        answer_scores(model, [[5] * 126], ANSWERS)
