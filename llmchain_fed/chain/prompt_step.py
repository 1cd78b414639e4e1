"""The prompt as a chain's first step, which tells the model where values stand in the text; what a chain is made of.

Knows LangChain's prompts. Knows nothing about tokens: which texts are control tokens it is told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBindingBase
from pydantic import PrivateAttr
from torch.nn import Module
from typing_extensions import override

from llmchain_fed.errors import ConfigError, UnsupportedModelError
from llmchain_fed.model.control_tokens import MASK, Change, Rendered, map_texts, mark_foreign, may_spell, texts_of
from llmchain_fed.model.local_model import LocalModel

Controls = Callable[[], tuple[frozenset[str], frozenset[str]]]
"""control tokens of any text, and all added tokens, of which those that a template's fixed texts spell are, too"""


def mark_values(prompt: BasePromptTemplate[Any], inputs: Mapping[str, Any], text: str, controls: Controls) -> str:
    """The prompt's text, as `Rendered` where a variable's value spells a control token.

    Raises:
        ChatTemplateError: Where the values stand cannot be told.
    """
    own, added = controls()
    texts = [found for name in inputs for found in _texts_of(inputs[name])]
    spelled = {token for token in added - own if any(token in t for t in texts)}
    if not spelled and not any(may_spell(t, own) for t in texts):
        return text

    def render(change: Change) -> str:
        return prompt.format_prompt(**{name: _changed(v, change) for name, v in inputs.items()}).to_string()

    written = _spelled_by_template(render, spelled)
    return mark_foreign(text, own | written, [render])


def _spelled_by_template(render: Callable[[Change], str], tokens: set[str]) -> set[str]:
    if not tokens:
        return set()
    try:
        fixed = render(lambda t: MASK * len(t))
    except Exception:  # a template that needs something of its values: `mark_foreign` tries it in other ways
        fixed = render(lambda t: _blank(t, tokens))
    return {token for token in tokens if token in fixed}


def _blank(text: str, tokens: set[str]) -> str:
    for token in tokens:
        text = text.replace(token, "x" * len(token))
    return text


def _texts_of(value: Any) -> list[str]:
    if isinstance(value, BaseMessage):
        return texts_of(value.content)
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in _texts_of(part)]
    return texts_of(value)


def _changed(value: Any, change: Change) -> Any:
    if isinstance(value, BaseMessage):
        return value.model_copy(update={"content": map_texts(value.content, change)})
    if type(value) in (list, tuple):
        return type(value)(_changed(part, change) for part in value)
    return map_texts(value, change)


class MarkedPrompt(PromptValue):
    """A prompt's value whose text says where foreign text spells control tokens."""

    value: PromptValue
    _rendered: str = PrivateAttr("")

    @classmethod
    def of(cls, value: PromptValue, rendered: Rendered) -> MarkedPrompt:
        """`value`, with its text as `rendered` (a pydantic field would make a plain `str` of it)."""
        made = cls(value=value)
        made._rendered = rendered
        return made

    @override
    def to_string(self) -> str:
        return self._rendered

    @override
    def to_messages(self) -> list[BaseMessage]:
        return self.value.to_messages()


class PromptStep(RunnableBindingBase[Any, PromptValue]):
    """A prompt template that marks its values; where they spell no control token, its value is the template's own."""

    _controls: Controls = PrivateAttr()

    def __init__(self, *, prompt: BasePromptTemplate[Any], controls: Controls, **options: Any) -> None:
        super().__init__(bound=prompt, **options)
        self._controls = controls

    def _marked(self, given: Any, value: PromptValue) -> PromptValue:
        prompt: Any = self.bound
        inputs = given if isinstance(given, Mapping) else dict.fromkeys(prompt.input_variables, given)
        rendered = mark_values(prompt, inputs, value.to_string(), self._controls)
        return MarkedPrompt.of(value, rendered) if isinstance(rendered, Rendered) else value

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        return self._marked(input, super().invoke(input, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        return self._marked(input, await super().ainvoke(input, config, **kwargs))

    @override
    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        values = super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return [self._tried(i, v, return_exceptions) for i, v in zip(inputs, values, strict=True)]

    @override
    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        values = await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return [self._tried(i, v, return_exceptions) for i, v in zip(inputs, values, strict=True)]

    def _tried(self, given: Any, value: Any, kept: bool) -> Any:  # noqa: FBT001 (LangChain's flag)
        if isinstance(value, Exception):
            return value
        try:
            return self._marked(given, value)
        except Exception as error:
            if not kept:
                raise
            return error

    # a binding would hand these to the template, past the marking
    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[PromptValue]:
        yield self.invoke(input, config, **kwargs)

    @override
    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[PromptValue]:
        yield await self.ainvoke(input, config, **kwargs)

    @override
    def transform(self, input: Iterator[Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        yield from Runnable.transform(self, input, config, **kwargs)

    @override
    async def atransform(
        self, input: AsyncIterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        async for value in Runnable.atransform(self, input, config, **kwargs):
            yield value


def template_of(text: str) -> PromptTemplate:
    """The prompt of an f-string template.

    Raises:
        ConfigError: A variable's name is none, as of JSON whose braces are not doubled; or the template makes no sense.
    """
    try:
        found = PromptTemplate.from_template(text)
    except ValueError as error:
        msg = f"the prompt {text!r:.80} is no f-string template: {error}. Braces that are text are doubled: {{{{ }}}}."
        raise ConfigError(msg) from None
    if odd := [name for name in found.input_variables if not name.strip() or set(name) & set("'\"\n")]:
        msg = (
            f"the prompt has a variable {odd[0]!r:.80}, which looks like JSON: in a template braces stand around a "
            "variable's name. Double those that are text: {{ }}."
        )
        raise ConfigError(msg)
    return found


def checked_llm(llm: Any) -> Any:
    """What can stand between a prompt and a parser.

    Raises:
        UnsupportedModelError: It takes no prompt; the message says what to make of it.
    """
    if isinstance(llm, Module):
        what, remedy = "a torch module", "LocalLLM(model=LocalModel(module, tokenizer))"
    elif isinstance(llm, LocalModel):
        what, remedy = "a LocalModel", "LocalLLM(model=model), or LocalChatModel(model=model) where it chats"
    elif isinstance(llm, str):
        what, remedy = f"the text {llm!r:.80}", f"LocalLLM.from_pretrained({llm!r:.80})"
    elif isinstance(llm, Runnable) or callable(llm):
        return llm
    else:
        what, remedy = f"{type(llm).__name__}", 'LocalLLM.from_pretrained("smollm2-135m-instruct")'
    msg = f"LLMChain(llm=…) takes a LangChain model, got {what}. Pass {remedy}."
    raise UnsupportedModelError(msg)
