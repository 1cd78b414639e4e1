"""Tokens without a row in the model: refused by name where they stand for text, harmless where they pad.

Belongs here: tokenizer and embedding of different sizes. Does not: what is encoded otherwise (test_encoding).
"""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer
from transformers import PreTrainedTokenizerFast

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, RawText, evaluate_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.tokens import input_rows, output_rows


def padded_later(module_kind="causal", *, lora=False, pad="[PAD]", tokens=()):
    """A model whose tokenizer has got a padding token and further tokens after the model was made, without resizing."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(train_tokenizer().backend_tokenizer), eos_token="</s>"
    )
    module = tiny_module(module_kind, len(tokenizer))
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.add_tokens(list(tokens))
    if lora:
        module = get_peft_model(module, lora_config(module_kind)).eval()
    return LocalModel(module, tokenizer, name="tiny")


def chain_over(model, **options):
    return LLMChain(llm=LocalLLM(model=model, **({"max_new_tokens": 8} | options)), prompt=TEMPLATE)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_padding_token_without_a_row_is_harmless_in_batches(kind, lora):
    model = padded_later(kind, lora=lora)
    assert model.tokenizer.pad_token_id >= input_rows(model.module)
    chain = chain_over(model)
    texts = [{"text": t} for t, _ in PAIRS[:5]]
    assert chain.batch(texts) == [chain.invoke(t) for t in texts]
    assert "".join(chain.stream(texts[0])) == chain.invoke(texts[0])
    assert chain.batch(texts, stop=["a"]) == [chain.invoke(t, stop=["a"]) for t in texts]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_padding_token_without_a_row_is_harmless_in_training(kind):
    """A batch's loss is the token-weighted mean of its examples' losses, each computed without any padding."""
    model = padded_later(kind)
    chain = chain_over(model)
    encoded = encode_examples(PAIRS, model, chain)
    total, tokens = 0.0, 0
    for i in range(len(encoded)):
        single = collate([encoded[i]], model)
        assert single["attention_mask"].all()
        count = int((single["labels"] != -100).sum())
        total, tokens = total + float(model.module(**single).loss.detach()) * count, tokens + count
    assert evaluate_locally(chain, PAIRS, batch_size=5).loss == pytest.approx(total / tokens, rel=1e-5)
    fed = FederatedAveraging(
        chain, participants={"a": PAIRS[:7], "b": PAIRS[7:]}, lr=1e-3, batch_size=4, progress=False
    )
    assert [r.status for r in fed.fit(rounds=1)[-1].participants.values()] == ["trained"] * 2


@pytest.mark.parametrize("eos", [True, False])
def test_an_answer_that_ends_in_the_id_that_pads_keeps_it(eos):
    """Id 0 is a token of its own here, as `!` is for GPT-2: an answer cut by its length keeps it at the end."""
    model = padded_later()
    if not eos:
        model.tokenizer.eos_token = None
        model.module.generation_config.eos_token_id = None
    assert 0 <= model.pad_id < input_rows(model.module)
    assert model._until_end([5, 6, 0, 0]) == [5, 6, 0, 0]
    if eos:
        assert model._until_end([5, 1, 1, 1]) == [5]


REFUSED = {
    "prompt": [("save [NEW] page", "x")],
    "completion": [("save", "[NEW]")],
    "padding in a text": [RawText("save [PAD]", "x")],  # a value's would be encoded as text
}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_text_with_a_token_without_a_row_stops_fit_at_the_door(case, kind):
    model = padded_later(kind, tokens=["[NEW]"])
    token = "[PAD]" if case == "padding in a text" else "[NEW]"
    number, rows = model.tokenizer.convert_tokens_to_ids(token), input_rows(model.module)
    chain = chain_over(model)
    before = model.trainable_state()
    fed = FederatedAveraging(chain, participants={"a": PAIRS, "b": REFUSED[case]}, progress=False)
    where = "completion" if case == "completion" else "prompt"
    reason = rf"a {where} contains the token '\[{token[1:-1]}\]' with id {number}, .* {rows} rows"
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        fed.fit(rounds=1)
    assert "module.resize_token_embeddings(len(tokenizer))" in str(error.value)
    assert fed.round == 0
    assert all(torch.equal(v, before[n]) for n, v in model.trainable_state().items())


def test_asking_with_such_a_token_is_refused_alike_in_every_way():
    chain = chain_over(padded_later(tokens=["[NEW]"]))
    ways = {
        "invoke": lambda: chain.invoke({"text": "[NEW]"}),
        "batch": lambda: chain.batch([{"text": "a"}, {"text": "[NEW]"}]),
        "stream": lambda: list(chain.stream({"text": "[NEW]"})),
        "generate": lambda: chain.model.generate(["a [NEW]"]),
        "streamed text": lambda: chain.model.stream("a [NEW]"),  # at once, not at the first piece
    }
    for ask in ways.values():
        with pytest.raises(UnsupportedModelError, match=r"a prompt contains the token '\[NEW\]'"):
            ask()


def test_an_end_token_without_a_row_is_said_to_be_one():
    model = padded_later(tokens=["[END]"])
    model.tokenizer.eos_token = "[END]"
    with pytest.raises(UnsupportedModelError, match=r"'\[END\]'.*It is the end token, which stands behind every"):
        encode_examples([("a", "b")], model, chain_over(model))


@pytest.mark.parametrize("name", ["pad_token_id", "decoder_start_token_id"])
def test_what_a_decoder_reads_by_itself_needs_a_row(name):
    """T5 puts its configured padding where labels are masked, and its start before them: no mask is over these."""
    model = padded_later("seq2seq")
    setattr(model.module.config, name, model.tokenizer.pad_token_id)
    with pytest.raises(UnsupportedModelError, match=rf"{name} in the configuration.*Set module\.config\.{name}"):
        FederatedAveraging(chain_over(model), participants={"a": PAIRS}, progress=False)


def test_the_remedy_mends_it():
    model = padded_later(tokens=["[NEW]"])
    model.module.resize_token_embeddings(len(model.tokenizer))
    chain = chain_over(model)
    assert model.pad_id == model.tokenizer.pad_token_id
    encode_examples([("[NEW]", "[NEW] [PAD]")], model, chain)
    chain.invoke({"text": "[NEW]"})


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]},
    ],
)  # fmt: skip
def test_rows_are_counted_through_adapters(kind, changes):
    size = 419
    module = tiny_module(kind, size)
    if kind == "seq2seq" and "trainable_token_indices" in changes:
        changes = {"trainable_token_indices": {"shared": [3, 4]}}
    if "trainable_token_indices" not in changes:
        module.config.tie_word_embeddings = False  # PEFT warns of tied layers, which is another test's matter
    assert (input_rows(module), output_rows(module)) == (size, size)
    wrapped = get_peft_model(module, lora_config(kind, **changes))
    assert (input_rows(wrapped), output_rows(wrapped)) == (size, size)


def test_a_module_that_says_nothing_of_its_embedding_is_not_refused():
    module = torch.nn.Linear(2, 3)
    assert input_rows(module) is None
    assert output_rows(module) is None


def test_a_vocabulary_padded_beyond_the_tokenizer_is_as_before(make_chain, tokenizer):
    model = LocalModel(tiny_module("causal", len(tokenizer) + 64), tokenizer)
    assert model.pad_id == tokenizer.pad_token_id
    assert encode_examples(PAIRS, model, chain_over(model)).report.used == len(PAIRS)
