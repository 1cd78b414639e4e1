"""LLMChain: a prompt, a local model and a parser as one Runnable that a federation can train.

Knows LangChain's prompts, parsers and Runnables. Knows nothing about examples, training or participants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from langchain_core.language_models import BaseLanguageModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.runnables.base import RunnableBindingBase
from pydantic import SkipValidation
from typing_extensions import override

from llmchain_fed._config import unknown_option
from llmchain_fed.chain.bare import shared_keywords
from llmchain_fed.chain.batching.inputs import listed
from llmchain_fed.chain.bindings import (
    ChainInput,
    RunnableWithCallKwargs,
    apart,
    below_bindings,
    bound_kwargs,
    with_face_fields,
)
from llmchain_fed.chain.chat import LocalChatModel
from llmchain_fed.chain.labels import Classifies
from llmchain_fed.chain.llm import LocalLLM
from llmchain_fed.chain.messages import dialogue_calls, placeholder, tools_of
from llmchain_fed.chain.prompt_step import PromptStep, checked_llm, mark_values, template_of
from llmchain_fed.chain.saving.savable import Savable
from llmchain_fed.chain.sources import Previews
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import ConfigError, PromptVariablesError, UnsupportedModelError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.recipes.parsers import StripOutputParser

_PARTS = frozenset({"prompt", "llm", "output_parser", "llm_kwargs", "bound"})


class LLMChain(RunnableWithCallKwargs, Savable, Classifies, Previews):
    r"""`prompt | llm | parser`, and the same object after a federation has trained its model.

    Every Runnable verb works, sync and async, and call-time keywords (`stop`, `max_new_tokens` …) reach the model;
    in a plain `prompt | llm` they would be dropped by the prompt.

    Args:
        llm: `LocalLLM`, `LocalChatModel`, or any other LangChain language model (then invoke only).
        prompt: A template string (f-string), a prompt template, or a `ChatPromptTemplate`.
        output_parser: What makes the answer out of the model's text; the text itself by default.
        llm_kwargs: Keywords that go along with every call to the model.
    """

    prompt: SkipValidation[BasePromptTemplate[Any]]
    llm: SkipValidation[Runnable[Any, Any]]
    output_parser: SkipValidation[Runnable[Any, Any]]
    llm_kwargs: dict[str, Any]

    def __init__(
        self,
        *,
        llm: BaseLanguageModel[Any] | Runnable[Any, Any],
        prompt: str | BasePromptTemplate[Any],
        output_parser: Runnable[Any, Any] | None = None,
        llm_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        llm, output_parser = apart(checked_llm(llm), output_parser)
        prompt = template_of(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(prompt, BasePromptTemplate):
            msg = f"prompt is an f-string template or a LangChain prompt, got {type(prompt).__name__}."
            raise ConfigError(msg)
        parser: Runnable[Any, Any] = output_parser if output_parser is not None else StrOutputParser()
        kwargs = dict(llm_kwargs or {})
        if output_parser is None and {**bound_kwargs(llm), **kwargs}.get("tools"):
            msg = (
                "the model's answers may be calls of tools, and a chain's answers are text unless it has another "
                "parser: calls would be lost. Pass output_parser=JsonOutputToolsParser(), or use prompt | llm."
            )
            raise ConfigError(msg)
        for name in options.keys() - RunnableBindingBase.model_fields.keys():
            known = LLMChain.model_fields.keys() - {"bound", "kwargs"}
            raise ConfigError(f"LLMChain: {unknown_option(name, known)}")  # noqa: EM102
        if options.get("kwargs"):
            msg = f"LLMChain: `kwargs` {options['kwargs']!r} would never reach the model. Pass them as llm_kwargs."
            raise ConfigError(msg)
        options |= {"prompt": prompt, "llm": llm, "output_parser": parser, "llm_kwargs": kwargs}
        options["bound"] = _steps(prompt, llm, kwargs, parser)
        super().__init__(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses another prompt, model or parser: whoever renders, answers and trains would not agree on it."""
        if name in _PARTS:
            msg = f"a chain's {name} stays what it is. Make another: LLMChain(llm=chain.llm, prompt=chain.prompt, …)."
            raise ConfigError(msg)
        super().__setattr__(name, value)

    # --- its parts --------------------------------------------------------------------------------------------------

    @property
    def face(self) -> LocalLLM | LocalChatModel:
        """The local model's LangChain face, below any `bind` or `with_config`.

        Raises:
            UnsupportedModelError: The chain's model is not a local one.
        """
        found = below_bindings(self.llm)
        if not isinstance(found, (LocalLLM, LocalChatModel)):
            msg = (
                f"the chain's model is {type(found).__name__}, which has no weights here to train. Use "
                "LocalLLM or LocalChatModel."
            )
            raise UnsupportedModelError(msg)
        return found

    @property
    def model(self) -> LocalModel:
        """The `LocalModel` that answers and that a federation trains."""
        return self.face.model

    @property
    def adapters(self) -> list[str]:
        """The adapters that can answer: `"global"`, the federation's own, and the residents; none without LoRA."""
        return self.model.adapters

    def with_adapter(self, name: str) -> Self:
        """The same chain over the same memory, answering with this adapter; `"global"` is the federation's own.

        Raises:
            ConfigError: There is no adapter of this name.
            UnsupportedModelError: The model has no LoRA adapter, or one is merged into the base.
        """
        return self._over(self.model.with_adapter(name))

    def without_adapter(self) -> Self:
        """The same chain over the same memory, answering as the bare base.

        Raises:
            UnsupportedModelError: The model has no LoRA adapter.
        """
        return self._over(self.model.without_adapter())

    def _over(self, model: LocalModel) -> Self:
        return self._rebound(with_face_fields(self.llm, model=model), self.llm_kwargs)

    @property
    def input_variables(self) -> Sequence[str]:
        """The variables that must be given."""
        return list(self.prompt.input_variables)

    @property
    def optional_variables(self) -> Sequence[str]:
        """The variables that may be given, because the prompt has a default for them."""
        return [*self.prompt.partial_variables, *self.prompt.optional_variables]

    @property
    def any_input(self) -> bool:
        """False: an input gives the prompt's variables."""
        return False

    @property
    def adds_special_tokens(self) -> bool:
        """False over a chat model: a chat template writes its special tokens itself."""
        return self.face.adds_special_tokens

    @property
    def completion_controls(self) -> frozenset[str]:
        """Control tokens, beside the model's own, that a completion cannot write: those of a chat template."""
        return self.face.own_controls

    def as_prompt(self) -> Self:
        """What makes text of an example's input: the chain itself."""
        return self

    def call_options(self) -> dict[str, Any]:
        """The keywords that go along with every call to the model."""
        return self._all_llm_kwargs()

    def calls(self, inputs: Any, completion: Any) -> Sequence[Call]:
        """What the model reads for an example and what it should answer.

        Raises:
            DataError: Nothing that the model could answer.
            PromptVariablesError: Other variables than the prompt's.
        """
        return (Call(self.render(inputs), self.face.written(completion, self._all_llm_kwargs())),)

    def dialogue_calls(self, dialogue: Dialogue) -> Sequence[Call]:
        """What the model reads before each answer of a conversation that stands in the prompt, and that answer.

        Raises:
            DataError: The prompt has no place for the messages, or the chat template refuses these.
        """
        face = self.face
        if not isinstance(face, LocalChatModel):
            return face.dialogue_calls(dialogue, {})
        name = placeholder(self.prompt, dialogue.variables)
        tools = tools_of(dialogue, self._all_llm_kwargs().get("tools"))
        chain = self._with({"tools": tools} if tools else {})
        return dialogue_calls(
            dialogue,
            tools,
            lambda messages: chain.render({**dialogue.variables, name: messages}),
            lambda answer: face.written(answer, chain._all_llm_kwargs()),
        )

    def parsed(self, text: str) -> str:
        """What the parser leaves of an answer's text, as far as it only drops the white space around it."""
        return text.strip() if isinstance(self.output_parser, StripOutputParser) else text

    @property
    def literals(self) -> Sequence[str]:
        """The template's fixed texts around the variables, in order; none where they cannot be told."""
        marks = {name: f"\ue000{i}\ue001" for i, name in enumerate(self.input_variables)}
        marks |= {name: f"\ue000{name}\ue001" for name in self.prompt.partial_variables}
        try:
            value = self.prompt.format_prompt(**marks)
        except (TypeError, ValueError, KeyError):  # a placeholder of messages, a format specification
            return []
        texts = [str(m.content) for m in value.to_messages()]
        return [literal for text in texts for literal in re.split("\ue000.*?\ue001", text)]

    def prompt_identity(self) -> list[Any]:
        """What two sides of a federation must share: fixed texts, variables, defaults, chat template, schema, tools."""
        defaults = [f"{k}={v}" for k, v in sorted(self.prompt.partial_variables.items()) if isinstance(v, str)]
        texts = [type(self.prompt).__name__, *self.literals, *sorted(self.input_variables), *defaults]
        return [texts, self.face.path_identity(), shared_keywords(self.face, self._all_llm_kwargs())]

    def render(self, inputs: Mapping[str, Any] | str) -> str:
        """The text that the model sees for `inputs`: byte for byte what invoke sends it, and what training uses.

        Fires no callbacks, so that examples never reach a tracer.

        Raises:
            PromptVariablesError: A variable is missing, or of a kind that the prompt refuses.
        """
        if not isinstance(inputs, Mapping):
            variables = self.input_variables
            if len(variables) != 1:
                msg = (
                    f"the prompt has the variables {sorted(variables)}, so one value is not enough. Pass "
                    "a mapping of them."
                )
                raise PromptVariablesError(msg)
            inputs = {variables[0]: inputs}
        missing = sorted(set(self.input_variables) - inputs.keys())
        if missing:
            msg = (
                f"the prompt takes {sorted(self.input_variables)}, {missing} is missing from "
                f"{sorted(map(str, inputs))}."
            )
            raise PromptVariablesError(msg)
        try:
            value: PromptValue = self.prompt.format_prompt(**inputs)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            msg = f"the prompt refuses these values ({type(error).__name__}: {error!s:.200}). Give it what it takes."
            raise PromptVariablesError(msg) from error
        face = self.face
        if isinstance(face, LocalChatModel):
            return face.render(value.to_messages(), **self._rendering_kwargs())
        if face.control_tokens == "template":
            return value.to_string()
        return mark_values(self.prompt, inputs, value.to_string(), face.all_controls)

    def generation_options(self) -> dict[str, Any]:
        """Keywords for `model.generate` that give the answers this chain gives."""
        kwargs = {k: v for k, v in self._all_llm_kwargs().items() if k not in self.face.form_options}
        return self.face.all_options(kwargs.pop("stop", None), kwargs)

    def _rendering_kwargs(self) -> dict[str, Any]:
        """The keywords of a call to the model that decide the prompt's text: the switches of a chat template."""
        return {k: v for k, v in self._all_llm_kwargs().items() if k in self.face.rendering_options}

    # --- Runnable ---------------------------------------------------------------------------------------------------

    @override
    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        base = name or self.name or type(self).__name__
        return f"{base}{suffix.title()}" if suffix else base

    @classmethod
    @override
    def is_lc_serializable(cls) -> bool:
        """False: a LangChain dump cannot contain weights; `save` does."""
        return False

    def __repr__(self) -> str:
        return f"LLMChain(prompt={self.prompt!r}, llm={self.llm!r}, output_parser={self.output_parser!r})"

    __str__ = __repr__

    @override
    def _with(self, kwargs: dict[str, Any]) -> Self:
        return self._rebound(self.llm, self.llm_kwargs | kwargs) if kwargs else self

    def _rebound(self, llm: Runnable[Any, Any], llm_kwargs: dict[str, Any]) -> Self:
        """The same prompt, parser and configuration around this model and these keywords."""
        bound = _steps(self.prompt, llm, llm_kwargs, self.output_parser)
        return self.model_copy(update={"llm": llm, "llm_kwargs": llm_kwargs, "bound": bound})

    # --- the verbs people know from the legacy class ----------------------------------------------------------------

    def predict(self, **variables: Any) -> Any:
        """`chain.predict(text="Page locked")`: invoke with the variables as keywords."""
        return self.invoke(variables)

    def apply(self, inputs: Sequence[ChainInput]) -> list[Any]:
        """The answers to a list of inputs, computed as one batch."""
        return self.batch(listed(inputs, "apply"))


def _steps(
    prompt: BasePromptTemplate[Any], llm: Any, llm_kwargs: Mapping[str, Any], parser: Runnable[Any, Any]
) -> Runnable[Any, Any]:
    """`prompt | llm | parser`; a local string model is told which of the text came from the variables."""
    face = below_bindings(llm)
    first: Runnable[Any, Any] = prompt
    if isinstance(face, LocalLLM) and face.control_tokens == "text":
        first = PromptStep(prompt=prompt, controls=face.all_controls)
    steps: Runnable[Any, Any] = first | (llm.bind(**llm_kwargs) if llm_kwargs else llm) | parser
    return steps
