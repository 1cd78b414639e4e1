"""A tiny model that learns within seconds: a random Llama of some 100,000 parameters and a tokenizer of your own texts.

For notebooks and tests: nothing is downloaded, and what it answers it has learnt here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmchain_fed import LocalModel
from llmchain_fed.model.wrapping import wrap


def train_tokenizer(texts: Iterable[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with a padding and an end token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")  # noqa: S106 (a token's text)


def tiny_model(texts: Iterable[str], *, lora: LoraConfig | None = None, seed: int = 0) -> LocalModel:
    """A random model whose tokenizer knows `texts`, with an untrained adapter; equal arguments give equal weights."""
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
        return LocalModel((wrap(module, lora) if lora else module).eval(), tokenizer, name="tiny")
