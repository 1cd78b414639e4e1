"""One test of every completion before it is taught: could an answer ever be this text?

Its token ids are decoded as an answer's are, ended where an answer would end, and must give the completion back: else
the model learns something that it can never say. Knows models and stop strings. Knows nothing about training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmchain_fed.model.generation.stop_strings import checked_stops
from llmchain_fed.model.local_model import LocalModel

Reason = Literal["contains_end", "contains_stop", "stripped", "not_decodable", "forbidden"]
"""a count of `DataReport`: why a completion cannot be said"""

_MEANING = {
    "contains_end": "it contains an end token, where an answer would end",
    "contains_stop": "it contains a stop string, before which an answer would end",
    "stripped": "the white space around it would be another",
    "not_decodable": "its tokens, decoded, are another text",
    "forbidden": "the generation settings keep an answer from it",
}
_REMEDY = {
    "contains_end": "Take that text out of the completions, or end answers otherwise (generation_config.eos_token_id)",
    "contains_stop": "Take the stop string out of the completions, or give the chain another `stop`",
    "stripped": "Strip the completions; where the tokenizer puts a space in front, use the parser `strip` "
    "(llmchain_fed.recipes.parsers.StripOutputParser); where a parser takes it away, another one",
    "not_decodable": "Write the completions in characters that the vocabulary has, or use a model whose vocabulary has "
    "them (byte-level ones have all)",
    "forbidden": "Look at suppress_tokens, begin_suppress_tokens and bad_words_ids in module.generation_config, and at "
    "no_repeat_ngram_size",
}


@dataclass(frozen=True)
class Banned:
    """What the generation settings keep out of an answer."""

    tokens: frozenset[int] = frozenset()
    first: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()
    ngram: int = 0
    """tokens: no run of this length comes twice; 0 is off"""

    @classmethod
    def of(cls, module: Any, options: Mapping[str, Any]) -> Banned:
        """Those of a module's own `generation_config` and of a call's options."""
        own = getattr(module, "generation_config", None)
        words = [tuple(ids) for ids in getattr(own, "bad_words_ids", None) or ()]
        return cls(
            frozenset(getattr(own, "suppress_tokens", None) or ()) | {ids[0] for ids in words if len(ids) == 1},
            frozenset(getattr(own, "begin_suppress_tokens", None) or ()),
            tuple(ids for ids in words if len(ids) > 1),
            int(options.get("no_repeat_ngram_size") or 0),
        )

    def keeps_from(self, ids: Sequence[int]) -> bool:
        """Whether an answer cannot be these ids, the last of which ends it."""
        if self.tokens & set(ids) or (ids and ids[0] in self.first):
            return True
        runs = [tuple(ids[i : i + self.ngram]) for i in range(len(ids) - self.ngram + 1)] if self.ngram else []
        if len(set(runs)) < len(runs):
            return True
        return any(tuple(ids[i : i + len(run)]) == run for run in self.sequences for i in range(len(ids)))


class Saying:
    """The test for one way of answering.

    Args:
        model: Its tokens and settings make the answer.
        prompt: A chain or face, whose stop strings and parser count; None is the model's own answers.
    """

    def __init__(self, model: LocalModel, prompt: Any) -> None:
        self._model, self._prompt = model, prompt
        options = dict(prompt.generation_options()) if prompt is not None else {}
        self._take(options)
        self._others: dict[str, Saying] = {}
        """for calls with options of their own"""

    def of(self, options: Mapping[str, Any] | None) -> Saying:
        """The test for a call with these options; with None for any other."""
        if options is None:
            return self
        key = repr(sorted(options.items()))
        if key not in self._others:
            self._others[key] = copy.copy(self)
            self._others[key]._take(options)
        return self._others[key]

    def _take(self, options: Mapping[str, Any]) -> None:
        model = self._model
        self._stops = checked_stops(options.get("stop"))
        self._longest = options.get("max_new_tokens")
        shortest = options.get("min_new_tokens")
        own = getattr(model.module, "generation_config", None)
        self._shortest = int((shortest if shortest is not None else getattr(own, "min_new_tokens", None)) or 0)
        self._banned = Banned.of(model.module, options)

    def fails(self, completion: str, ids: Sequence[int]) -> Reason | None:
        """Why no answer can be `completion`, whose tokens with the end token are `ids`; None where one can."""
        if self._answer(ids) == completion:
            return "forbidden" if self._banned.keeps_from(ids) else None
        said, whole = self._model.said(ids, stop=self._stops), self._model.decoded(ids)
        if whole == completion and said != whole:
            return "contains_stop"
        if any(i in self._model.eos_ids for i in ids[:-1]):
            return "contains_end"
        if said != whole:
            return "contains_stop"
        return "stripped" if whole.strip() == completion.strip() else "not_decodable"

    def _answer(self, ids: Sequence[int]) -> str:
        """What a chain or face makes of an answer of these ids, as far as its text goes."""
        said = self._model.said(ids, stop=self._stops)
        parsed: str = self._prompt.parsed(said) if self._prompt is not None else said
        return parsed

    def out_of_range(self, ids: Sequence[int]) -> bool:
        """Whether an answer would be cut before these tokens end, or could not end there yet."""
        count = len(ids) - 1  # the end token is not missed
        return count < self._shortest or (self._longest is not None and count > self._longest)

    def explain(self, completion: str, ids: Sequence[int], reason: Reason) -> str:
        """A sentence about one completion that fails, and what helps."""
        return (
            f"{completion!r:.80} would be answered as {self._answer(ids)!r:.80}: {_MEANING[reason]}. {_REMEDY[reason]}."
        )
