"""A tokenizer as llguidance sees it: every token as the bytes that it stands for.

Knows llguidance, an optional dependency, and tokenizers. Knows nothing about grammars, schemas or modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from llmchain_fed.errors import MissingExtraError, UnsupportedModelError, install

_known: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Vocabulary]] = WeakKeyDictionary()


class Vocabulary:
    """The tokens of a tokenizer, for grammars; made once per tokenizer, which takes half a second.

    Args:
        tokenizer: A fast tokenizer.
        eos: The ids that end an answer.
        name: The model's, for messages of errors.

    Raises:
        MissingExtraError: llguidance is not installed.
        UnsupportedModelError: No end token, or no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int], name: str) -> None:
        engine = _engine()
        count = len(tokenizer)
        ends = [token for token in eos if token < count]
        if not ends:
            msg = f"{name!r} has no end token, so an answer kept to a schema could not end. Set tokenizer.eos_token."
            raise UnsupportedModelError(msg)
        try:
            self.inner: Any = engine.hf.from_tokenizer(tokenizer, n_vocab=count, eos_token=ends)
        except Exception as error:  # it raises whatever its Rust part or an unknown tokenizer makes of it
            msg = (
                f"the tokenizer of {name!r} ({type(tokenizer).__name__}) is none that grammars can be kept to with "
                f"({error!s:.200}). Use a model with a fast tokenizer whose tokens are bytes, as chat models have."
            )
            raise UnsupportedModelError(msg) from error
        self.size, self.ends = count, frozenset(ends)

    def ids(self, text: bytes, *, controls: bool) -> list[int]:
        """Tokens that spell these bytes.

        Args:
            text: What they spell.
            controls: Whether the texts of control tokens in it are those tokens.
        """
        found: list[int] = self.inner.tokenize_bytes(text, parse_special=controls)
        if self.inner.decode_bytes(found) == text:
            return found
        spelled: list[int] = self.inner.greedy_tokenize(text.decode("utf-8", "replace"))  # no space put before
        return spelled

    def matcher(self, grammar: str) -> Any:
        """What follows an answer through a grammar, token by token.

        Raises:
            UnsupportedModelError: The engine does not take the grammar.
        """
        made = _engine().LLMatcher(self.inner, grammar)
        if made.is_error():
            msg = f"llguidance does not take the grammar: {made.get_error()[:300]}. Make the schema smaller."
            raise UnsupportedModelError(msg)
        return made

    def allowed(self, matcher: Any) -> Any:
        """(vocabulary,) of booleans: which tokens may be next; a numpy array."""
        import numpy

        bits = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
        return numpy.unpackbits(bits, bitorder="little")[: self.size].astype(bool)


def vocabulary_of(tokenizer: Any, eos: Sequence[int], name: str) -> Vocabulary:
    """The vocabulary of a tokenizer, kept until tokens are added.

    Raises:
        MissingExtraError: llguidance is not installed.
        UnsupportedModelError: No tokenizer, no end token, or no fast tokenizer.
    """
    if tokenizer is None:
        msg = f"{name!r} has no tokenizer, so no answer can be kept to a schema. Pass LocalModel(module, tokenizer)."
        raise UnsupportedModelError(msg)
    key = len(tokenizer), tuple(eos)
    kept = _known.setdefault(tokenizer, {})
    if key not in kept:
        kept[key] = Vocabulary(tokenizer, eos, name)
    return kept[key]


def _engine() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError:
        msg = (
            "answers that keep to a schema, and calls of tools, need llguidance, which is not installed: "
            f"{install('structured', 'llguidance')}. bind_tools(…, strict=False) does without it."
        )
        raise MissingExtraError(msg) from None
    return llguidance
