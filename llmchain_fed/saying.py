"""One test of every completion before it is taught: could an answer ever be this text?

Its token ids are decoded as an answer's are, ended where an answer would end, and must give the completion back: else
the model learns something that it can never say. Knows models and stop strings. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from llmchain_fed.errors import UnsayableError
from llmchain_fed.generation import checked_stops
from llmchain_fed.model import LocalModel

Reason = Literal["holds_end", "holds_stop", "stripped", "not_decodable"]
"""a count of `DataReport`: why a completion cannot be said"""

_MEANING = {
    "holds_end": "it holds an end token, where an answer would end",
    "holds_stop": "it holds a stop string, before which an answer would end",
    "stripped": "the white space around it would be taken away",
    "not_decodable": "its tokens, decoded, are another text",
}
_REMEDY = {
    "holds_end": "Take that text out of the completions, or end answers otherwise (generation_config.eos_token_id)",
    "holds_stop": "Take the stop string out of the completions, or give the chain another `stop`",
    "stripped": "Strip the completions, or use a parser that keeps white space",
    "not_decodable": "Write the completions in characters that the vocabulary has, or use a model whose vocabulary has "
    "them (byte-level ones have all)",
}


class Saying:
    """The test for one way of answering.

    Args:
        model: Whose tokens.
        prompt: A chain or face, whose stop strings and parser count; None for the model's own answers.
    """

    def __init__(self, model: LocalModel, prompt: Any) -> None:
        self._model, self._prompt = model, prompt
        self._stops = checked_stops(prompt.generation_options().get("stop")) if prompt is not None else ()

    def fails(self, completion: str, ids: Sequence[int]) -> Reason | None:
        """Why no answer can be `completion`, whose tokens with the end token are `ids`; None where one can."""
        said = self._model.said(ids, stop=self._stops)
        parsed = self._prompt.parsed(said) if self._prompt is not None else said
        if parsed == completion:
            return None
        whole = self._model.decoded(ids)
        if whole == completion and said != whole:
            return "holds_stop"
        if any(i in self._model.eos_ids for i in ids[:-1]):
            return "holds_end"
        if said != whole:
            return "holds_stop"
        return "stripped" if whole.strip() == completion.strip() else "not_decodable"

    def explain(self, completion: str, ids: Sequence[int], reason: Reason) -> str:
        """A sentence about one completion that fails, and what helps."""
        said = self._model.said(ids, stop=self._stops)
        parsed = self._prompt.parsed(said) if self._prompt is not None else said
        return f"{completion!r:.80} would be answered as {parsed!r:.80}: {_MEANING[reason]}. {_REMEDY[reason]}."


def check_tolerance(unsayable: int, used: int, first: str, tolerance: float | None) -> None:
    """Makes sure that few enough completions were left out because no answer could be theirs.

    Args:
        unsayable: How many.
        used: How many are left.
        first: `Saying.explain` of the first.
        tolerance: The share that may be; None is any.

    Raises:
        UnsayableError: More.
    """
    total = unsayable + used
    if tolerance is not None and unsayable > tolerance * total:
        msg = (
            f"{unsayable} of {total} completions could never be an answer, and up to {tolerance:.0%} are left out. "
            f"The first: {first} TrainingConfig(tolerance=…) leaves more out."
        )
        raise UnsayableError(msg)
