"""Faces by themselves: one as the `Prompt` of its examples, and one with keywords bound to all its calls.

Knows what a face renders and answers. Knows nothing about templates or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableBinding
from typing_extensions import override

from llmchain_fed.chain.bindings import below_bindings, bound_kwargs
from llmchain_fed.chain.labels import Classifies
from llmchain_fed.chain.messages import read_tools
from llmchain_fed.chain.sources import Previews
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import DataError

if TYPE_CHECKING:
    from llmchain_fed.chain.base_llm import LocalLanguageModel
    from llmchain_fed.model.local_model import LocalModel


@dataclass(frozen=True)
class Bare:
    """A face by itself as the `Prompt` of its examples: an example's input is what the face's `invoke` takes."""

    face: LocalLanguageModel
    call: Mapping[str, Any]
    """keywords that go along with every call"""
    strips: bool = False
    """whether a parser behind the face drops the white space around an answer"""

    input_variables: ClassVar[None] = None
    any_input: ClassVar[bool] = False
    optional_variables: ClassVar[tuple[str, ...]] = ()
    literals: ClassVar[tuple[str, ...]] = ()

    @property
    def model(self) -> LocalModel:
        """The `LocalModel` that answers and that a federation trains."""
        return self.face.model

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens to the rendered text."""
        return self.face.adds_special_tokens

    @property
    def completion_controls(self) -> frozenset[str]:
        """Control tokens, beside the model's own, that a completion cannot write."""
        return self.face.own_controls

    def render(self, inputs: Any) -> str:
        """An input of the face's `invoke` → the text that the model sees.

        Raises:
            DataError: No input that `invoke` takes.
        """
        return self.face.text_of(inputs, self.call)

    def calls(self, inputs: Any, completion: Any) -> Sequence[Call]:
        """What the model reads for an example and what it should answer.

        Raises:
            DataError: No input that `invoke` takes, or nothing that the face could answer.
        """
        return (Call(self.render(inputs), self.face.written(completion, self.call)),)

    def dialogue_calls(self, dialogue: Dialogue) -> Sequence[Call]:
        """What the model reads before each answer of a conversation, and that answer.

        Raises:
            DataError: The face takes no messages, or its template refuses these.
        """
        if dialogue.variables:
            msg = (
                f"the keys {sorted(map(str, dialogue.variables))} of a row of messages name variables, and there is no "
                "template to put them into. Drop them, or pass a chain."
            )
            raise DataError(msg)
        return self.face.dialogue_calls(dialogue, self.call)

    def call_options(self) -> Mapping[str, Any]:
        """The keywords that go along with every call."""
        return self.call

    def generation_options(self) -> dict[str, Any]:
        """Keywords for `model.generate` that give the answers the face gives."""
        call = {k: v for k, v in self.call.items() if k not in self.face.form_options}
        return self.face.all_options(call.pop("stop", None), call)

    def parsed(self, text: str) -> str:
        """What is left of an answer's text, for the white space around it."""
        return text.strip() if self.strips else text

    def prompt_identity(self) -> list[Any]:
        """What two sides of a federation must share of the way from input to tokens."""
        return [self.face.path_identity(), shared_keywords(self.face, self.call)]


def shared_keywords(face: LocalLanguageModel, call: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keywords of a call that decide what is read or what an answer may be, as text that is alike everywhere."""
    shared = face.rendering_options | face.answer_options  # a schema decides what is learnt, too
    given = {k: read_tools(v) if k == "tools" else v for k, v in call.items() if k in shared and v is not None}
    return sorted((name, repr(value)) for name, value in given.items())


class BoundFace(RunnableBinding[Any, Any], Classifies, Previews):
    """A face with keywords bound to all its calls: what trains, scores, previews or counts with it has them, too.

    LangChain's own binding hands on whatever else is asked of it to the model within, which knows of no keywords.
    """

    @classmethod
    @override
    def lc_id(cls) -> list[str]:
        return [*cls.get_lc_namespace(), "RunnableBinding"]

    def as_prompt(self) -> Bare:
        """What makes text of the model's own input, with the keywords."""
        return Bare(below_bindings(self), bound_kwargs(self))

    def render(self, value: Any, **kwargs: Any) -> str:
        """What `invoke` takes → the text that the model sees.

        Raises:
            DataError: No input that `invoke` takes.
        """
        prompt = self.as_prompt()
        return Bare(prompt.face, {**prompt.call, **kwargs}).render(value)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """tokens: what `invoke` would send for these messages."""
        prompt = self.as_prompt()
        face: Any = prompt.face
        own = {name: value for name, value in prompt.call.items() if name in face.path_fields}
        face = face.model_copy(update={name: {**getattr(face, name), **(value or {})} for name, value in own.items()})
        tools = prompt.call.get("tools") if tools is None else tools
        return int(face.get_num_tokens_from_messages(messages, tools=tools))
