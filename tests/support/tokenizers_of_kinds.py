"""Small tokenizers of the four kinds that models come with, and a tiny causal model for each."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CORPUS = [
    "Translate to German: guten morgen welt", "save the page, open the file", "erde mond licht hell dunkel",
    "the quick brown fox jumps over the lazy dog 0123456789", "{\"a\": [1, 2]} <b>x</b> user system assistant",
]  # fmt: skip
CONTROLS = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=360, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False),
    )
    return raw


def llama_like() -> Tokenizer:
    """SentencePiece BPE with byte fallback: a space is put in front of a text, and taken away when it is decoded."""
    pieces = [*CONTROLS, "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=440, special_tokens=pieces, show_progress=False))
    raw = _without_added(raw, pieces[len(CONTROLS) :])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))]
    )
    return raw


def t5_like() -> Tokenizer:
    """Unigram with Metaspace, whose vocabulary contains the control tokens as ordinary pieces of score 0."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=[*CONTROLS, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", raw.token_to_id("<eos>"))]
    )
    return raw


def word_piece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*CONTROLS, "<unk>"], show_progress=False)
    )
    raw.decoder = decoders.WordPiece()
    return raw


def _without_added(raw: Tokenizer, pieces: list[str]) -> Tokenizer:
    """The trainer makes added tokens of its special pieces; bytes and the space's sign are ordinary ones."""
    import json

    data = json.loads(raw.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in pieces]
    return Tokenizer.from_str(json.dumps(data))


KINDS = {"byte-level": byte_level, "Llama-like": llama_like, "T5-like": t5_like, "WordPiece": word_piece}


def make_tokenizer(kind: str, *, labels: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ) if kind != "byte-level" else PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )  # fmt: skip
    if labels:
        tokenizer.add_tokens([AddedToken(label, special=True, normalized=False) for label in labels])
    tokenizer.chat_template = CHAT
    return tokenizer


def make_module(tokenizer: Any, *, seed: int = 0) -> torch.nn.Module:
    """A random Qwen3 of some 20,000 parameters, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
        )  # fmt: skip
        return Qwen3ForCausalLM(config).eval()
