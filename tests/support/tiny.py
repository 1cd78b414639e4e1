"""Tiny random models and a tokenizer trained in memory: no downloads, milliseconds per call."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

TEMPLATE = "Translate to French: {text}\n"
PAIRS = [
    ("page locked", "page verrouillée"),
    ("save the page", "enregistrer la page"),
    ("open the file", "ouvrir le fichier"),
    ("close the window", "fermer la fenêtre"),
    ("delete this image", "supprimer cette image"),
    ("new folder", "nouveau dossier"),
    ("user name", "nom d’utilisateur"),
    ("change password", "changer le mot de passe"),
    ("the page is empty", "la page est vide"),
    ("send a message", "envoyer un message"),
    ("unknown error", "erreur inconnue"),
    ("sign in", "se connecter"),
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEMPLATE] + [text for pair in PAIRS for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_module(kind: str, vocab: int, seed: int = 0) -> torch.nn.Module:
    """A random Llama or T5 of some 50,000 parameters, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "causal":
            config = LlamaConfig(
                vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                tie_word_embeddings=True,
            )  # fmt: skip
            return LlamaForCausalLM(config).eval()
        config = T5Config(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()


def lora_config(kind: str = "causal", **changes: Any) -> LoraConfig:
    modules = ["q_proj", "v_proj", "up_proj"] if kind == "causal" else ["q", "v", "wi"]
    task = TaskType.CAUSAL_LM if kind == "causal" else TaskType.SEQ_2_SEQ_LM
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": modules, "task_type": task} | changes))


def with_lora(module: torch.nn.Module, config: LoraConfig, seed: int = 0) -> torch.nn.Module:
    """PEFT's own wrapping with a fixed random start; B is not zero, so that every gradient flows at once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(module, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return wrapped.eval()
