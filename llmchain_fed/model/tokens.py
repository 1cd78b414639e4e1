"""Tokens: text to token ids and back, the way one model wants it, for training and for answering alike.

Knows tokenizers, special tokens, and for which ids a module has a row of embedding: one beyond them is an IndexError
on the CPU, and on CUDA an assertion that ends the process, in the middle of a round. Knows nothing about generation,
examples or weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmchain_fed.errors import DataError, UnsupportedModelError
from llmchain_fed.model import control_tokens
from llmchain_fed.model.control_tokens import Rendered, foreign_text
from llmchain_fed.untrusted import PanicError, no_panic, shown

Kind = Literal["causal", "seq2seq"]


class Tokens:
    """What `LocalModel` can do with token ids: its tokenizer, together with what its module says of special tokens."""

    module: nn.Module
    name: str
    tokenizer: Any
    """a Hugging Face tokenizer, or None where only ready tensors are used"""

    @property
    def kind(self) -> Kind:
        """`"seq2seq"` for an encoder-decoder, else `"causal"`."""
        return "seq2seq" if getattr(getattr(self.module, "config", None), "is_encoder_decoder", False) else "causal"

    @property
    def pad_id(self) -> int:
        """The padding token's id, else the end token's; one that the model can look up, for padding is computed too."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        wanted = ([int(pad)] if pad is not None else []) + list(self.eos_ids)
        rows = input_rows(self.module)  # behind the mask, padding is looked up all the same
        return next((i for i in wanted if rows is None or 0 <= i < rows), 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; the tokenizer's own, which training appends, comes first."""
        ids = [getattr(self.tokenizer, "eos_token_id", None), *self._configured("eos_token_id")]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def _configured(self, name: str) -> list[int]:
        """The ids that the module's generation configuration has under a name: one, several or none."""
        value = getattr(getattr(self.module, "generation_config", None), name, None)
        return [int(i) for i in (value if isinstance(value, (list, tuple)) else [value]) if i is not None]

    def control_tokens(self) -> frozenset[str]:
        """The texts of the begin, end and padding tokens, which no foreign text can write."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return frozenset()
        silent, begins = self._silent_ids()
        known = control_tokens.added_tokens(tokenizer)  # an end id may be an ordinary word, which anybody may write
        return frozenset(known[i] for i in silent | begins if i in known)

    # --- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Prompt texts → token ids, the one way for training and for generation.

        A causal prompt never ends in an end token, which some tokenizers append: the answer has yet to come.

        Args:
            texts: The prompts as text.
            add_special_tokens: False for text that carries its special tokens already (a rendered chat template).

        Raises:
            UnsupportedModelError: There is no tokenizer.
        """
        rows = self._tokenize(list(texts), add_special_tokens=add_special_tokens)
        if self.kind == "seq2seq" or not add_special_tokens:
            return rows
        ends = self.eos_ids[:1] if self._appends_end() else ()
        return [row[:-1] if row[-1:] == list(ends) else row for row in rows]

    def _appends_end(self) -> bool:
        """Whether the tokenizer puts an end token behind every text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            alone, dressed = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        else:
            alone = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize("a"))
            dressed = list(self.tokenizer.build_inputs_with_special_tokens(alone))
        return bool(dressed) and dressed[-1:] == list(self.eos_ids[:1]) and alone[-1:] != dressed[-1:]

    def encode_completions(self, texts: Sequence[str], *, controls: Collection[str] = ()) -> list[list[int]]:
        """Completions → token ids with the end token behind each, so that the model learns to stop.

        Args:
            texts: The completions. What in them spells a control token is encoded as text, but for what a `Rendered`
                has of its author's.
            controls: These are control tokens beside `control_tokens()`: those that a chat template writes.
        """
        known = {*self.control_tokens(), *controls}
        texts = [text if isinstance(text, Rendered) else foreign_text(text, known) for text in texts]
        eos = list(self.eos_ids[:1])
        if self.kind == "causal":
            return [row + eos for row in self._tokenize(texts, add_special_tokens=False)]
        rows = self._tokenize(texts, text_target=True, add_special_tokens=True)
        return [row if eos and eos[0] in row else row + eos for row in rows]  # mBART's language stands behind the end

    def _tokenize(self, texts: list[str], *, text_target: bool = False, add_special_tokens: bool) -> list[list[int]]:
        if self.tokenizer is None:
            msg = (
                f"this {type(self.module).__name__} has no tokenizer, so text cannot become tokens. Pass "
                "LocalModel(module, tokenizer) or ready tensors."
            )
            raise UnsupportedModelError(msg)
        if not texts:
            return []
        # verbose=False: the tokenizer's own warning about length; ours is an error or a count in a report
        options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
        given = {"text_target": texts} if text_target else {"text": texts}
        try:
            with no_panic():
                ids: list[list[int]] = self.tokenizer(**given, **options)["input_ids"]
                for i, text in enumerate(texts):
                    if isinstance(text, Rendered):
                        ids[i] = control_tokens.encode(
                            self.tokenizer, text, text_target=text_target, add_special_tokens=add_special_tokens
                        )
        except PanicError as error:
            msg = (
                f"the tokenizer gave up on a text of up to {max(map(len, texts)):,} characters "
                f"({shown(str(error), 200)}): its tokenizer.json has a pattern that such texts are too much for. "
                "Shorten the text, or use another model."
            )
            raise DataError(msg) from None
        return ids

    # --- ids to text ------------------------------------------------------------------------------------------------

    def _until_end(self, ids: list[int]) -> list[int]:
        """Without the end token and the padding behind it; a row cut at a stop string has padding alone."""
        eos, pad = self.eos_ids, self.pad_id
        end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
        # else it is some token, maybe the answer's
        known = pad in (getattr(self.tokenizer, "pad_token_id", None), *eos)
        while known and end and ids[end - 1] == pad:
            end -= 1
        return ids[:end]

    def _decode(self, ids: Sequence[int]) -> str:
        """Ids → text, without end and padding tokens and without the tokens that only begin an answer.

        Other special tokens are kept: they are what a completion taught, a label perhaps.
        """
        silent, begins = self._silent_ids()
        start = 0
        while start < len(ids) and (ids[start] in begins or ids[start] in silent):
            start += 1
        if self.kind == "seq2seq" and start < len(ids) and ids[start] in self._configured("forced_bos_token_id"):
            start += 1  # `generate` writes it: the language of a translation, say
        kept = [i for i in ids[start:] if i not in silent]
        # the clean-up of spaces would change earlier text while a stream is under way
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _silent_ids(self) -> tuple[frozenset[int], frozenset[int]]:
        """Ids that are never part of an answer's text, and those that are not where an answer begins."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        silent = {*self.eos_ids, *self._configured("pad_token_id"), *([int(pad)] if pad is not None else [])}
        bos = getattr(self.tokenizer, "bos_token_id", None)
        begins = {*self._configured("bos_token_id"), *([int(bos)] if bos is not None else [])}
        if self.kind == "seq2seq":
            begins |= set(self._configured("decoder_start_token_id"))
        return frozenset(silent), frozenset(begins)


def pad_rows(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids → (B, T) ids and attention mask.

    >>> pad_rows([[5, 6], [7]], 0, left=True)[0]
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


# --- which ids have a row --------------------------------------------------------------------------------------------


def check_rows(model: Tokens, prompts: Iterable[Sequence[int]], completions: Iterable[Sequence[int]] = ()) -> None:
    """Makes sure that the model can look up every token of these rows, and be taught those of the completions.

    Raises:
        UnsupportedModelError: A token has no row; the message names it.
    """
    _check_decoder(model)
    for rows, limit, where in (
        (prompts, input_rows(model.module), "prompt"),
        (completions, output_rows(model.module), "completion"),
    ):
        highest = max((max(row) for row in rows if row), default=-1)
        if limit is not None and highest >= limit:
            _refuse(model, highest, limit, where)


def _check_decoder(model: Tokens) -> None:
    """Makes sure that what an encoder-decoder puts before and behind labels by itself has a row."""
    config, limit = getattr(model.module, "config", None), output_rows(model.module)
    if not getattr(config, "is_encoder_decoder", False) or limit is None:
        return
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= limit:
            msg = (
                f"{name} in the configuration of {model.name!r} is {token}, and its decoder has {limit} rows of "
                f"embedding: it would read that id in every batch. Set module.config.{name} to one below {limit}, or "
                "call module.resize_token_embeddings(len(tokenizer)) before any adapter is added."
            )
            raise UnsupportedModelError(msg)


def _refuse(model: Tokens, token: int, rows: int, where: str) -> None:
    text = model.tokenizer.convert_ids_to_tokens(token)
    end = " It is the end token, which stands behind every completion." if token in model.eos_ids else ""
    msg = (
        f"a {where} contains the token {text!r} with id {token}, and the model {model.name!r} has {rows} rows of "
        f"embedding, for the ids below {rows}.{end} Make rows for the tokens that were added, before any adapter: "
        "module.resize_token_embeddings(len(tokenizer)), and train them (modules_to_save=['embed_tokens'] in "
        "LoraConfig, or all weights), for they are random."
    )
    raise UnsupportedModelError(msg)


def input_rows(module: nn.Module) -> int | None:
    """Ids below this can be in a prompt; None where the module does not say."""
    return _rows(_ask(module, "get_input_embeddings"))


def output_rows(module: nn.Module) -> int | None:
    """Ids below this can be in a completion: it has a logit for them and, read again, a row of embedding."""
    found = [_rows(_ask(module, "get_output_embeddings"))]
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        decoder = _ask(module, "get_decoder")
        found.append(_rows(_ask(decoder, "get_input_embeddings")) if decoder is not None else None)
    else:
        found.append(input_rows(module))
    return min((rows for rows in found if rows is not None), default=None)


def _ask(module: Any, what: str) -> Any:
    """What a module answers, or None: not every one has embeddings, or a decoder of its own."""
    try:
        return getattr(module, what)()
    except (AttributeError, NotImplementedError, TypeError, KeyError):
        return None


def _rows(embedding: Any) -> int | None:
    for inner in ("base_layer", "original_module"):  # PEFT's wrappers around the layer itself
        embedding = getattr(embedding, inner, embedding)
    count = getattr(embedding, "num_embeddings", None) or getattr(embedding, "out_features", None)
    if isinstance(count, int):
        return count
    shape: Sequence[int] = getattr(getattr(embedding, "weight", None), "shape", ())
    return int(shape[0]) if len(shape) == 2 else None
