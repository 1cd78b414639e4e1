"""Grammars: answers that keep to one, and end within their budget.

At every step llguidance says which tokens may come next. Near the end of the budget a token may come only where a way
to end the answer behind it still fits; the shortest one always does. Knows nodes, tokens and transformers' processors.
Knows nothing about JSON, tools or LangChain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmchain_fed.errors import ConfigError, SchemaError
from llmchain_fed.model.generation.lark import lark
from llmchain_fed.model.generation.nodes import Node
from llmchain_fed.model.generation.vocabulary import Vocabulary

_LOOKED_AT = 32  # of the tokens that may come, by probability, where each must be tried out
_SLACK = 6  # tokens: an unfinished character, the end token, and the token that is chosen before the next look


class Grammar:
    """What an answer may be.

    Args:
        node: The texts.
        key: What decides them, for caches: equal keys mean equal grammars.
        control_ids: Ids of the control tokens that the node names, by text.
    """

    def __init__(self, node: Node, key: str, control_ids: dict[str, int] | None = None) -> None:
        self.node, self.key, self.control_ids = node, key, dict(control_ids or {})

    @cached_property
    def text(self) -> str:
        """The grammar as llguidance reads it."""
        return lark(self.node, self.control_ids)

    @cached_property
    def reach(self) -> int:
        """tokens: with so many left, an answer can be ended wherever it stands."""
        plain = self.text.isascii() and "\\u{" not in self.text
        return self.node.longest_rest * (1 if plain else 4) + _SLACK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grammar) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Grammar({self.key})"

    def check_budget(self, vocabulary: Vocabulary, budget: int) -> None:
        """Makes sure that the shortest answer fits.

        Raises:
            SchemaError: It does not; the message has the number of tokens that it needs.
        """
        shortest = self.shortest(vocabulary)
        if vocabulary.inner.decode_bytes(shortest) != self.node.shortest.encode():
            msg = f"the model's tokens cannot spell {self.node.shortest!r:.120}, so no answer can keep to the schema."
            raise SchemaError(msg)
        needed = len(shortest) + 1
        if needed > budget:
            msg = (
                f"the shortest answer that keeps to the schema ({self.node.shortest!r:.120}) takes {needed} tokens "
                f"with the end token, and there is room for {budget}. Set max_new_tokens={needed} or more, and keep "
                "the prompt short enough for them."
            )
            raise SchemaError(msg)

    def shortest(self, vocabulary: Vocabulary) -> list[int]:
        """The tokens of the shortest answer, without the end token."""
        return vocabulary.ids(self.node.shortest.encode(), controls=bool(self.control_ids))


def check_beams(beams: int) -> None:
    """Makes sure that one answer is followed, not several.

    Raises:
        ConfigError: Beams are searched.
    """
    if beams > 1:
        msg = f"num_beams={beams} does not go together with a schema or tools: beams change places. Leave it at 1."
        raise ConfigError(msg)


class _Row:
    """One answer on its way through the grammar."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, pad: int | None) -> None:
        self._grammar, self._vocabulary, self._pad = grammar, vocabulary, pad
        self._matcher = vocabulary.matcher(grammar.text)
        self._said = b""
        self.count, self.done = 0, False
        self.cut = False
        """whether it ended only because of its budget, where the model would have gone on"""

    def take(self, tokens: Sequence[int]) -> None:
        """Goes on by the tokens that were chosen."""
        for token in tokens:
            self.count += 1
            self.done = self.done or token in self._vocabulary.ends
            if self.done:
                continue
            if not self._matcher.consume_token(token):
                if token == self._pad:  # a stop string ended it, and `generate` fills it up beside the others
                    self.done = True
                    continue
                msg = f"llguidance gave up on an answer: {self._matcher.get_error()[:300]}. Make the schema smaller."
                raise SchemaError(msg)
            self._said += self._vocabulary.inner.decode_bytes([token])

    def allowed(self, scores: Tensor, left: int, *, greedy: bool) -> Any:
        """(vocabulary,) which tokens may be next.

        Args:
            scores: (vocabulary,) what the model thinks of them.
            left: tokens: The next one included, so many may come.
            greedy: Whether the likeliest will be taken.
        """
        mask = self._vocabulary.allowed(self._matcher)
        if self._matcher.is_error():
            msg = f"llguidance gave up on an answer: {self._matcher.get_error()[:300]}. Make the schema smaller."
            raise SchemaError(msg)
        if left > self._grammar.reach:
            return mask
        ending = self._ending(b"")
        if ending is None:  # within a character that only the engine knows how to end
            return mask
        fits = torch.zeros(self._vocabulary.size, dtype=torch.bool).numpy()
        fits[ending[0] if ending else min(self._vocabulary.ends)] = True
        width = min(self._vocabulary.size, scores.shape[0])
        kept = scores[:width].masked_fill(~torch.from_numpy(mask[:width]).to(scores.device), -torch.inf)
        likeliest = kept.topk(min(_LOOKED_AT, width)).indices.tolist()
        for token in likeliest:
            if not mask[token]:
                break
            if token in self._vocabulary.ends or self._fits(token, left - 1):
                fits[token] = True
                if greedy:
                    break
        ends = list(self._vocabulary.ends)
        self.cut = not ending and fits.sum() == fits[ends].sum() and likeliest[0] not in self._vocabulary.ends
        return fits

    def _fits(self, token: int, left: int) -> bool:
        end = self._end(self._vocabulary.inner.decode_bytes([token]))
        if end is None or len(end) + 1 <= left:  # no token is less than a byte
            return end is not None
        return len(self._spelled(end)) + 1 <= left

    def _ending(self, more: bytes) -> list[int] | None:
        """The tokens of the shortest end behind what is said and `more`; None where none is known."""
        end = self._end(more)
        return None if end is None else self._spelled(end)

    def _end(self, more: bytes) -> bytes | None:
        whole, open_ = _characters(self._said + more)
        rest = self._grammar.node.read(whole, 0).rest
        return None if rest is None else open_ + rest.encode()

    def _spelled(self, end: bytes) -> list[int]:
        return self._vocabulary.ids(end, controls=bool(self._grammar.control_ids))


def _characters(said: bytes) -> tuple[str, bytes]:
    r"""Bytes → the text of them, an unfinished character finished, and the bytes that finish it.

    >>> _characters("é".encode()[:1])
    ('À', b'\x80')
    """
    for cut in range(4):
        try:
            text = said[: len(said) - cut].decode()
        except UnicodeDecodeError:
            continue
        if not cut:
            return text, b""
        begun = said[len(said) - cut :]
        for second in (b"", b"\x80", b"\xa0", b"\x90"):  # some first bytes ask for a higher second one
            tail = (second if len(begun) == 1 else b"") + b"\x80" * 3
            size = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
            try:
                return text + (begun + tail)[:size].decode(), (begun + tail)[len(begun) : size]
            except UnicodeDecodeError:
                continue
    return said.decode("utf-8", "replace"), b""


class KeepsTo(LogitsProcessor):  # type: ignore[misc]
    """Leaves to a batch of answers the tokens that their grammar allows.

    Args:
        grammar: What an answer may be.
        vocabulary: The model's tokens.
        prompt_width: tokens: An answer begins behind so many.
        budget: tokens: It may have so many, the end token included.
        greedy: Whether the likeliest token is always taken.
        pad: The id that `generate` fills up ended answers with.
    """

    def __init__(
        self,
        grammar: Grammar,
        vocabulary: Vocabulary,
        *,
        prompt_width: int,
        budget: int,
        greedy: bool,
        pad: int | None = None,
    ) -> None:
        self._grammar, self._vocabulary = grammar, vocabulary
        self._width, self._budget, self._greedy = prompt_width, budget, greedy
        self._pad = pad
        self._rows: list[_Row] = []

    def cut(self) -> list[bool]:
        """For each answer, whether its budget ended it, where the model would have gone on and might have."""
        return [row.cut for row in self._rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, T) tokens so far and (rows, V) scores → the scores, −∞ where a token may not be."""
        said = input_ids[:, self._width :].tolist()
        if not self._rows:
            self._rows = [_Row(self._grammar, self._vocabulary, self._pad) for _ in said]
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for i, (row, tokens) in enumerate(zip(self._rows, said, strict=True)):
            row.take(tokens[row.count :])
            if row.done:
                allowed[i] = True
                continue
            mask = torch.from_numpy(row.allowed(scores[i], self._budget - row.count, greedy=self._greedy))
            width = min(len(mask), scores.shape[1])
            allowed[i, :width] = mask[:width]
        allowed = allowed.to(scores.device)
        kept = scores.masked_fill(~allowed, -torch.inf)
        # what else a model ships may forbid all that the grammar allows, the end say: then the grammar's word counts
        stuck = kept.isneginf().all(dim=1, keepdim=True)
        return torch.where(stuck & allowed, torch.zeros_like(kept), kept)
