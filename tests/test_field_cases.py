"""Thirteen kinds of failure that users of other tools report, on inputs of our own, with the right values.

Belongs here: one test a kind, end to end, as its reporter would meet it; details of a mechanism are tested elsewhere.
Where a value is computed, transformers and PEFT compute it.
"""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from llmchain_fed import (
    ChatTemplateError,
    CheckpointError,
    DataError,
    FederatedAveraging,
    LLMChain,
    LLMChainFedError,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    UnsupportedModelError,
    evaluate_locally,
)
from llmchain_fed.data.encoding import encode_examples

TEMPLATE = "Translate to German: {text}\n"
PAIRS = {
    "a": [("guten morgen", "hallo"), ("welt", "erde")],
    "b": [("hell", "dunkel"), ("alt", "neu"), ("nein", "doch")],
}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, pad=True):
    names = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = names + sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(names)
    padding = {"pad_token": "<pad>"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", **padding)
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen(tokenizer, *, tied=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
            tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )  # fmt: skip
        return Qwen3ForCausalLM(config).eval()


def chain_of(module, tokenizer, **options):
    return LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer), **options), prompt=TEMPLATE)


def fit(chain, pairs=PAIRS, rounds=2, lr=1e-2):
    federation = FederatedAveraging(chain, participants=pairs, lr=lr, batch_size=4, progress=False)
    federation.fit(rounds)
    return federation


def saved(chain, tmp_path):
    chain.save(tmp_path / "chain")
    return LLMChain.load(tmp_path / "chain")


def with_lora(module, **options):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    return get_peft_model(module, LoraConfig(**options)).eval()


@torch.no_grad()
def own_loss(module, tokenizer, pairs=PAIRS["b"]):
    """nats per completion token, by the module's own forward."""
    total, count = 0.0, 0
    for text, completion in pairs:
        prompt = tokenizer(TEMPLATE.format(text=text))["input_ids"]
        answer = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        logits = module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_1_a_lora_whose_start_rewrites_the_base(start):
    tokenizer = make_tokenizer()
    module = with_lora(qwen(tokenizer), init_lora_weights=start, target_modules=["q_proj", "v_proj"])
    with pytest.raises(LLMChainFedError, match=start.partition("_")[0]):
        LocalModel(module, tokenizer)


def _merged(module):
    module.merge_adapter()


def _switched_off(module):
    module.base_model.disable_adapter_layers()


def _beside(module):
    module.get_base_model().model.norm.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "reason"), [(_merged, "merged"), (_switched_off, "switched off"), (_beside, "beside")]
)
def test_1_an_adapter_that_is_not_beside_an_untouched_base(change, reason, tmp_path):
    tokenizer = make_tokenizer()
    module = with_lora(qwen(tokenizer), init_lora_weights=False)
    change(module)
    chain = chain_of(module, tokenizer)
    for call in (lambda: chain.save(tmp_path / "chain"), chain.check_savable, lambda: fit(chain)):
        with pytest.raises(LLMChainFedError, match=reason):
            call()


def test_2_one_row_of_the_base_makes_another_federation(tmp_path):
    tokenizer = make_tokenizer()

    def chain_with(row=None):
        module = qwen(tokenizer)
        if row is not None:
            module.get_input_embeddings().weight.data[row] *= 3
        return chain_of(with_lora(module), tokenizer)

    for row in (10, 44, 200):
        directory = tmp_path / str(row)
        FederatedAveraging(chain_with(row), participants=PAIRS, progress=False, checkpoint_dir=directory).fit(1)
        with pytest.raises(CheckpointError, match="base weights"):
            FederatedAveraging.resume(directory, chain_with(), participants=PAIRS, progress=False)


@pytest.mark.real_model
def test_2_what_was_changed_after_loading_a_base_by_name(tmp_path):
    chat = LocalChatModel.from_pretrained("smollm2-135m-instruct", lora=LoraConfig(r=2, target_modules=["q_proj"]))
    chat.model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    chat.model.tokenizer.add_tokens(["<SYM1>"])
    chain = LLMChain(llm=chat, prompt=ChatPromptTemplate.from_messages([("human", "{text}")]))
    loaded = saved(chain, tmp_path)
    assert loaded.render("hi") == chain.render("hi") == "[user] hi\n[assistant] "
    assert loaded.model.encode(["<SYM1>"], add_special_tokens=False) == [[49152]]
    assert not (tmp_path / "chain" / "base").exists()


def test_3_labels_that_are_special_tokens_and_text_that_spells_one():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[POS]", "[NEG]"], special_tokens=True)
    chain = chain_of(qwen(tokenizer), tokenizer, max_new_tokens=12)
    pairs = [("gut", "[POS]"), ("alt", "a<eos>b")]
    federation = fit(chain, {"a": pairs}, 100, 4e-3)
    assert [chain.invoke(text) for text, _ in pairs] == ["[POS]", "a<eos>b"]
    assert federation.data_reports["a"].used == 2


@pytest.mark.parametrize(
    ("shipped", "options", "completion"),
    [
        ({"suppress_tokens": ["h"]}, {}, "hallo"),
        ({"begin_suppress_tokens": ["h"]}, {}, "hallo"),
        ({"bad_words_ids": ["al"]}, {}, "hallo"),
        ({}, {"no_repeat_ngram_size": 1}, "hallo"),
    ],
)
def test_3_generation_settings_that_forbid_a_completion(shipped, options, completion):
    tokenizer = make_tokenizer()
    module = qwen(tokenizer)
    for name, value in shipped.items():
        words = [tokenizer(text)["input_ids"] for text in value]
        setattr(module.generation_config, name, words if name == "bad_words_ids" else words[0])
    chain = chain_of(module, tokenizer, **options)
    report = encode_examples([("x", completion), ("x", "12")], chain.model, chain).report
    assert (report.forbidden, report.used) == (1, 1)


@pytest.mark.parametrize("options", [{"max_new_tokens": 3}, {"min_new_tokens": 4}])
def test_3_an_answer_of_another_length_is_noted(options):
    tokenizer = make_tokenizer()
    chain = chain_of(qwen(tokenizer), tokenizer, **options)
    report = encode_examples([("x", "hallo"), ("x", "12")], chain.model, chain).report
    assert (report.used, report.length_out_of_range) == (2, 1)


def test_4a_a_generation_config_that_transformers_would_not_write(tmp_path):
    tokenizer = make_tokenizer()
    chain = chain_of(qwen(tokenizer), tokenizer, max_new_tokens=8)
    chain.model.module.generation_config.temperature = 0.6
    fit(chain)
    loaded = saved(chain, tmp_path)
    assert loaded.model.module.generation_config.temperature == 0.6
    assert loaded.invoke("hell") == chain.invoke("hell")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"trainable_token_indices": [10, 11]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
)  # fmt: skip
def test_4b_rows_and_embeddings_trained_by_lora(options, tied, tmp_path):
    tokenizer = make_tokenizer()
    plain = own_loss(qwen(tokenizer, tied=tied), tokenizer)
    if not tied:
        options = {k: v for k, v in options.items() if k != "ensure_weight_tying"}
    chain = chain_of(with_lora(qwen(tokenizer, tied=tied), **options), tokenizer)
    held_out = {"a": PAIRS["b"], "b": PAIRS["b"]}
    federation = FederatedAveraging(
        chain, participants=PAIRS, lr=1e-2, batch_size=4, evaluation=held_out, progress=False
    )
    federation.fit(2)
    assert federation.side_by_side()["a"]["base"] == pytest.approx(plain, abs=1e-5)
    loaded = saved(chain, tmp_path)
    assert own_loss(loaded.model.module, tokenizer) == pytest.approx(own_loss(chain.model.module, tokenizer), abs=1e-5)
    assert own_loss(chain.model.module, tokenizer) < plain
    assert evaluate_locally(chain.without_adapter(), PAIRS["b"]).loss == pytest.approx(plain, abs=1e-5)
    assert evaluate_locally(loaded.without_adapter(), PAIRS["b"]).loss == pytest.approx(plain, abs=1e-5)


def test_5_a_missing_cell_is_not_the_word_nan(tmp_path):
    tokenizer = make_tokenizer()
    chain = chain_of(qwen(tokenizer), tokenizer)
    rows = pd.read_csv(io.StringIO("text,completion\nwelt,erde\n,mond\n")).to_dict("records")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "welt", "completion": "erde"}\n{"text": null, "completion": "mond"}\n')
    for source in (rows, path, [("welt", "erde"), (None, "mond")], [("welt", "erde"), ("  ", "mond")]):
        encoded = encode_examples(source, chain.model, chain)
        assert [tokenizer.decode(encoded[i][0]) for i in range(len(encoded))] == [TEMPLATE.format(text="welt")]
        assert (encoded.report.used, encoded.report.empty) == (1, 1)


def test_5_an_empty_turn_is_an_empty_example_in_every_spelling():
    tokenizer = make_tokenizer()
    chat = LocalChatModel(model=LocalModel(qwen(tokenizer), tokenizer))
    call = {"name": "f", "args": {"a": float("nan")}, "id": "1"}
    for empty in (
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ""}],
        [("system", "s"), ("human", "")],
        [HumanMessage([{"type": "text", "text": " "}])],
        [HumanMessage("a"), AIMessage("b"), HumanMessage("")],
        [HumanMessage("a"), AIMessage("", tool_calls=[call]), HumanMessage("b")],
    ):
        report = encode_examples([(empty, "a"), ("b", "c")], chat.model, chat.as_prompt()).report
        assert (report.used, report.empty) == (1, 1), empty
    full = [
        HumanMessage("a"),
        AIMessage("", tool_calls=[call | {"args": {"a": None}}]),
        ToolMessage("", tool_call_id="1"),
    ]
    assert encode_examples([(full, "a")], chat.model, chat.as_prompt()).report.used == 1


def test_6_tool_calls_reach_the_template_as_mappings():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for t in m.tool_calls or [] %}"
        '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments | tojson }}}{% endfor %}'
        "{{ m.content }}<eos>{% endfor %}"
    )
    call = {"name": "weather", "args": {"city": "Bern"}, "id": "1"}
    messages = [HumanMessage("?"), AIMessage("", tool_calls=[call]), ToolMessage("sunny", tool_call_id="1")]
    assert '"arguments": {"city": "Bern"}' in LocalChatModel(model=LocalModel(qwen(tokenizer), tokenizer)).render(
        messages
    )


def test_7_a_padding_token_without_a_row():
    tokenizer = make_tokenizer(pad=False)
    module = qwen(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    chain = chain_of(module, tokenizer, max_new_tokens=3)
    texts = ["welt", "guten morgen welt"]
    assert chain.batch(texts) == [chain.invoke(text) for text in texts]
    federation = fit(chain, PAIRS | {"c": [("x", "y")]}, rounds=1)
    assert federation.history[-1].trained == ["a", "b", "c"]
    tokenizer.add_tokens(["<new>"])
    before = chain.model.weights_hash
    for call in (
        lambda: chain.invoke("<new>"),
        lambda: fit(chain, {"a": [("<new>", "b")], "b": PAIRS["b"]}, rounds=1),
        lambda: fit(chain, {"a": [("b", "<new>")], "b": PAIRS["b"]}, rounds=1),
    ):
        with pytest.raises(LLMChainFedError, match=r"resize_token_embeddings"):
            call()
    assert chain.model.weights_hash == before


def test_8_a_template_that_refuses_the_messages():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    chat = LocalChatModel(model=LocalModel(qwen(tokenizer), tokenizer), max_new_tokens=2)
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{text}")])
    chain = LLMChain(llm=chat, prompt=prompt)
    for call in (
        lambda: chain.invoke("a"),
        lambda: chain.batch(["a"]),
        lambda: list(chain.stream("a")),
        lambda: chain.render("a"),
        lambda: fit(chain),
    ):
        with pytest.raises(ChatTemplateError, match="no system role"):
            call()


def test_9_a_module_that_carries_lora_and_is_no_peft_model():
    tokenizer = make_tokenizer()
    module = qwen(tokenizer)
    wrapped = get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (module, wrapped.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"PeftModel.*merge_and_unload"):
            LocalModel(given, tokenizer)
    assert isinstance(LocalModel(wrapped, tokenizer).module, PeftModel)
    LocalModel(wrapped.merge_and_unload(), tokenizer)


def test_10_numbers_and_depth_in_jsonl(tmp_path):
    chain = chain_of(qwen(tokenizer := make_tokenizer()), tokenizer)
    good = json.dumps({"text": "a", "completion": "b"})
    for bad in ('{"text": ' + "9" * 5000 + ', "completion": "b"}', "[" * 100_000):
        path = tmp_path / "a.jsonl"
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
            encode_examples(path, chain.model, chain)


def test_11_a_cell_of_more_than_128_kib(tmp_path):
    chain = chain_of(qwen(tokenizer := make_tokenizer()), tokenizer)
    long = "x " * 100_000
    path = tmp_path / "a.csv"
    path.write_text(f'text,completion\nwelt,erde\n"{long}",mond\n')
    from_file = encode_examples(path, chain.model, chain).report
    assert from_file == encode_examples([("welt", "erde"), (long, "mond")], chain.model, chain).report
    assert (from_file.used, from_file.too_long) == (1, 1)


def test_12_a_chat_that_ends_in_a_begun_answer():
    chat = LocalChatModel(model=LocalModel(qwen(tokenizer := make_tokenizer()), tokenizer))
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure:"}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=False, continue_final_message=True)
    assert chat.render([HumanMessage("hi"), AIMessage("Sure:")]) == expected
    assert expected.endswith("Sure:")


def test_13_switches_of_a_template_and_members_that_change(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT + "{% if enable_thinking %}<think>{% endif %}"
    chat = LocalChatModel(model=LocalModel(qwen(tokenizer), tokenizer), chat_template_kwargs={"enable_thinking": True})
    assert chat.render([HumanMessage("hi")]).endswith("<think>")
    chain = chain_of(with_lora(qwen(tokenizer)), tokenizer)
    options = {"lr": 1e-2, "batch_size": 4, "progress": False}
    FederatedAveraging(chain, participants=PAIRS, checkpoint_dir=tmp_path / "run", **options).fit(2)
    others = {"b": PAIRS["b"], "c": [("x", "y")]}
    again = FederatedAveraging.resume(tmp_path / "run", chain, participants=others, members="changed", progress=False)
    again.fit(1)
    assert again.round == 3
    assert again.history[-1].trained == ["b", "c"]
    said = " ".join(again.history[-1].notes)
    assert "a" in said
    assert "c" in said
