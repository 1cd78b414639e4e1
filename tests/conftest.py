"""Fixtures over the tiny models of `tiny.py`; `battery` runs a test over {causal, seq2seq} × {full weights, LoRA}."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LANGSMITH_TRACING", "false")
# tiny models: a second thread costs more than it helps, and far more on a busy machine; for every process and thread
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora
from transformers import PreTrainedTokenizerFast

from llmchain_fed import LLMChain, LocalLLM, LocalModel

# Whoever starts pytest in the background of a script hands down an ignored Ctrl-C, which our commands respect as
# nohup's; the tests that send one mean a command at a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LocalModel]:
    """`make_model(kind="causal", lora=False, seed=0)`: a fresh LocalModel each time; equal arguments, equal weights."""

    def make(kind: str = "causal", *, lora: bool | LoraConfig = False, seed: int = 0) -> LocalModel:
        module = tiny_module(kind, len(tokenizer), seed)
        if lora:
            module = with_lora(module, lora if isinstance(lora, LoraConfig) else lora_config(kind), seed)
        return LocalModel(module, tokenizer, name="tiny")

    return make


@pytest.fixture
def make_chain(make_model: Callable[..., LocalModel]) -> Callable[..., LLMChain]:
    """`make_chain(kind="causal", lora=False, prompt=TEMPLATE, **options)`: a fresh chain over a fresh tiny model."""

    def make(
        kind: str = "causal", *, lora: bool | LoraConfig = False, prompt: Any = TEMPLATE, seed: int = 0, **options: Any
    ) -> LLMChain:
        options = {"max_new_tokens": 12} | options
        return LLMChain(llm=LocalLLM(model=make_model(kind, lora=lora, seed=seed), **options), prompt=prompt)

    return make


@pytest.fixture(params=["causal-full", "causal-lora", "seq2seq-full", "seq2seq-lora"])
def battery(request: pytest.FixtureRequest, make_chain: Callable[..., LLMChain]) -> Callable[..., LLMChain]:
    """A function that makes a fresh chain of this kind; the test runs over all four."""
    kind, weights = request.param.split("-")

    def make(**options: Any) -> LLMChain:
        return make_chain(kind, lora=weights == "lora", **options)

    make.kind, make.lora = kind, weights == "lora"  # type: ignore[attr-defined]
    return make


@pytest.fixture
def tiny_llm(make_model: Callable[..., LocalModel]) -> LocalLLM:
    return LocalLLM(model=make_model(), max_new_tokens=8)
