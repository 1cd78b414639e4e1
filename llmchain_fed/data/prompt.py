"""What training needs of a prompt, and the calls of the model that it makes of an example.

Knows nothing about tokens, models, LangChain or how examples are written down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmchain_fed.errors import DataError

if TYPE_CHECKING:
    from llmchain_fed.data.dialogues import Dialogue


@dataclass(frozen=True)
class Call:
    """One call of the model: the text it reads, and the text it should answer with.

    Calls of one example of which each reads all of the former and its answer become one row of tokens.
    """

    text: str
    """what the model sees, up to where its answer begins; a `Rendered` where foreign text spells control tokens"""
    completion: str
    step: str = ""
    """the step of a composed chain that called; stays at the participant"""
    options: Mapping[str, Any] | None = field(default=None, compare=False)
    """how this call's answer is generated; None: as all of its prompt's are"""


class Prompt(Protocol):
    """What training needs of a prompt: the same rendering that inference uses."""

    @property
    def input_variables(self) -> Sequence[str] | None:
        """The variables an example must give; None where an input is no mapping of variables (a bare model)."""

    @property
    def optional_variables(self) -> Sequence[str]:
        """The variables an example may give, because the prompt has a default for them."""

    @property
    def any_input(self) -> bool:
        """Whether an input may be anything, a mapping too, for nothing is known of it: a composed chain's."""

    @property
    def literals(self) -> Sequence[str]:
        """The template's fixed texts, in order."""

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens to the rendered text."""

    @property
    def completion_controls(self) -> Collection[str]:
        """Control tokens, beside the model's own, that a completion cannot write."""

    def render(self, inputs: Any) -> str:
        """Inputs → the text that the model sees."""

    def calls(self, inputs: Any, completion: Any) -> Sequence[Call]:
        """What the model reads for an example and what it should answer; several calls of a conversation or program.

        Raises:
            DataError: The completion is nothing that the model could answer.
        """

    def generation_options(self) -> Mapping[str, Any]:
        """How answers are generated; `stop` ends them."""

    def parsed(self, text: str) -> str:
        """What is left of an answer's text, for the white space around it."""


@runtime_checkable
class Converses(Protocol):
    """A prompt that holds a conversation, too."""

    def dialogue_calls(self, dialogue: Dialogue) -> Sequence[Call]:
        """What the model reads before each answer to learn, and that answer.

        Raises:
            DataError: The prompt has no place for the messages, or the model could not answer so.
        """


def plain_text(completion: Any) -> str:
    """The text of a completion that is text.

    Raises:
        DataError: It is something else.
    """
    if isinstance(completion, str):
        return completion
    msg = (
        f"a completion is text, got {type(completion).__name__} ({completion!r:.60}). "
        "Convert it to the words the model should write."
    )
    raise DataError(msg)
