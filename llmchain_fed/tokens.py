"""Tokens: text to token ids and back, the way one model wants it.

Knows tokenizers and special tokens. Knows nothing about generation, examples or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmchain_fed import vocabulary
from llmchain_fed.errors import UnsupportedModelError


class Tokens:
    """A tokenizer together with what its module says about special tokens.

    Args:
        tokenizer: A Hugging Face tokenizer, or None where only ready tensors are used.
        module: The module it belongs to.
    """

    def __init__(self, tokenizer: Any, module: nn.Module) -> None:
        self.tokenizer = tokenizer
        self._module = module

    @property
    def seq2seq(self) -> bool:
        """Whether the prompt goes into an encoder."""
        return bool(getattr(getattr(self._module, "config", None), "is_encoder_decoder", False))

    @property
    def pad_id(self) -> int:
        """The padding token's id, else the end token's; one that the model can look up, for padding is computed too."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        wanted = ([int(pad)] if pad is not None else []) + list(self.eos_ids)
        return vocabulary.usable_pad(self._module, wanted)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, the tokenizer's own first."""
        configured = getattr(getattr(self._module, "generation_config", None), "eos_token_id", None)
        ids = [getattr(self.tokenizer, "eos_token_id", None)]
        ids += configured if isinstance(configured, list) else [configured]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Prompts → ids; a causal prompt never ends in an end token that the tokenizer appended."""
        rows = self._tokenize(list(texts), add_special_tokens=add_special_tokens)
        if self.seq2seq or not add_special_tokens:
            return rows
        eos, ends = str(getattr(self.tokenizer, "eos_token", None)), self.eos_ids[:1]
        return [r[:-1] if r and r[-1] in ends and not t.endswith(eos) else r for r, t in zip(rows, texts, strict=True)]

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Completions → ids with the end token behind each."""
        eos = list(self.eos_ids[:1])
        if not self.seq2seq:
            return [row + eos for row in self._tokenize(list(texts), add_special_tokens=False)]
        rows = self._tokenize(None, text_target=list(texts), add_special_tokens=True)
        return [row if eos and row[-1:] == eos else row + eos for row in rows]

    def until_end(self, ids: list[int]) -> list[int]:
        """Without the end token and the padding behind it; a row cut at a stop string has padding alone."""
        eos, pad = self.eos_ids, self.pad_id
        end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
        known = pad in (
            getattr(self.tokenizer, "pad_token_id", None),
            *eos,
        )  # else it is some token, maybe the answer's
        while known and end and ids[end - 1] == pad:
            end -= 1
        return ids[:end]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids → text without special tokens."""
        # the clean-up of spaces would change earlier text while a stream is under way
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_rows(self, rows: Tensor) -> list[str]:
        """(B, T) ids → B texts."""
        return [self.decode(row) for row in rows.tolist()]

    def _tokenize(self, texts: list[str] | None, **options: Any) -> list[list[int]]:
        if self.tokenizer is None:
            msg = (
                f"this {type(self._module).__name__} has no tokenizer, so text cannot become tokens. Pass "
                "LocalModel(module, tokenizer) or ready tensors."
            )
            raise UnsupportedModelError(msg)
        if not (texts or options.get("text_target")):
            return []
        # verbose=False: the tokenizer's own warning about length; ours is an error or a count in a report
        ids: list[list[int]] = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
        return ids
