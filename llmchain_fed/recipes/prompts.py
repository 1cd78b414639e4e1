"""LangChain's prompts out of a recipe's data, and data out of prompts.

Knows LangChain's prompts; what a file may say stands in `schema`. Knows nothing about files, parsers or models.
"""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal, cast

from langchain_core.messages import BaseMessage
from langchain_core.prompts import (
    AIMessagePromptTemplate,
    BasePromptTemplate,
    ChatPromptTemplate,
    FewShotPromptTemplate,
    HumanMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
    StringPromptTemplate,
    SystemMessagePromptTemplate,
)
from pydantic import ValidationError

from llmchain_fed.errors import RecipeError
from llmchain_fed.recipes.schema import MessageData, PromptData, PromptSpec
from llmchain_fed.untrusted import shown


def make_prompt(spec: PromptSpec) -> StringPromptTemplate:
    """The LangChain prompt a spec describes."""
    if not spec.examples:
        return PromptTemplate(
            template=spec.template,
            input_variables=list(spec.input_variables),
            partial_variables=dict(spec.defaults),
        )
    # FewShotPromptTemplate formats each example, joins, and formats the whole again: what the first pass lets
    # out needs its braces doubled (https://github.com/langchain-ai/langchain/issues/3382).
    return FewShotPromptTemplate(
        prefix=spec.prefix,
        examples=[{key: _doubled(value) for key, value in example.items()} for example in spec.examples],
        example_prompt=PromptTemplate.from_template(_literals_doubled(spec.example_template)),
        example_separator=_doubled(spec.separator),
        suffix=spec.template,
        input_variables=list(spec.input_variables),
        partial_variables=dict(spec.defaults),
    )


def prompt_to_data(prompt: BasePromptTemplate[Any]) -> PromptData:
    """A prompt as plain data for `chain.yaml`.

    Raises:
        RecipeError: A prompt of another kind, a template language other than f-strings, defaults that are no text, or
            a template with more than plain variables in it.
    """
    try:
        return _prompt_to_data(prompt)
    except ValidationError as error:
        why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        msg = f"the prompt cannot be saved as it is: {shown(why, 500)}."
        raise RecipeError(msg) from None


def _prompt_to_data(prompt: BasePromptTemplate[Any]) -> PromptData:
    defaults = dict(prompt.partial_variables)
    if isinstance(prompt, ChatPromptTemplate):  # LangChain's own default for an optional placeholder
        defaults = {name: v for name, v in defaults.items() if not (v == [] and name in prompt.optional_variables)}
    if all(isinstance(v, str) for v in defaults.values()):
        match prompt:
            case PromptTemplate(template_format="f-string") if type(prompt) is PromptTemplate:
                return PromptData(kind="template", template=prompt.template, defaults=defaults)
            case FewShotPromptTemplate(
                template_format="f-string",
                example_selector=None,
                examples=list() as examples,
                example_prompt=PromptTemplate(template_format="f-string", partial_variables={}),
            ):
                if all(isinstance(v, str) for example in examples for v in example.values()):
                    return PromptData(
                        kind="few_shot",
                        template=prompt.suffix,
                        prefix=prompt.prefix,
                        examples=examples,
                        example_template=prompt.example_prompt.template,
                        separator=prompt.example_separator,
                        defaults=defaults,
                    )
            case ChatPromptTemplate():
                messages = [_message_to_data(message) for message in prompt.messages]
                return PromptData(kind="chat", messages=messages, defaults=defaults)
    msg = (
        f"{type(prompt).__name__} cannot be written as data, so the chain could not be loaded again. Use an f-string "
        "PromptTemplate, a FewShotPromptTemplate with fixed examples, or a ChatPromptTemplate of text messages."
    )
    raise RecipeError(msg)


_Role = Literal["system", "human", "ai"]
_ROLES = {"system": SystemMessagePromptTemplate, "human": HumanMessagePromptTemplate, "ai": AIMessagePromptTemplate}


def _message_to_data(message: Any) -> MessageData:
    if isinstance(message, MessagesPlaceholder):
        return MessageData(role="placeholder", template=message.variable_name, optional=message.optional)
    if isinstance(message, BaseMessage) and message.type in _ROLES and isinstance(message.content, str):
        return MessageData(role=cast(_Role, message.type), template=_doubled(message.content))
    for role, kind in _ROLES.items():
        prompt = getattr(message, "prompt", None)
        if type(message) is kind and isinstance(prompt, PromptTemplate) and prompt.template_format == "f-string":
            return MessageData(role=cast(_Role, role), template=prompt.template)
    msg = f"the message {message!r:.80} cannot be written as data. Use system, human or ai messages of f-string text."
    raise RecipeError(msg)


def prompt_from_data(data: PromptData) -> BasePromptTemplate[Any]:
    """The reverse of `prompt_to_data`.

    Raises:
        RecipeError: A template that LangChain refuses, such as one that reads attributes.
    """
    try:
        if data.kind == "chat":
            messages = [_message_from_data(message) for message in data.messages]
            return ChatPromptTemplate(messages).partial(**data.defaults)
        if data.kind == "few_shot":
            return FewShotPromptTemplate(
                prefix=data.prefix,
                examples=data.examples,
                example_prompt=PromptTemplate.from_template(data.example_template),
                example_separator=data.separator,
                suffix=data.template,
                input_variables=[],
            ).partial(**data.defaults)
        return PromptTemplate.from_template(data.template).partial(**data.defaults)
    except ValueError as error:
        msg = f"the saved prompt is refused: {shown(str(error), 500)}"
        raise RecipeError(msg) from None


def _message_from_data(message: MessageData) -> Any:
    if message.role == "placeholder":
        return MessagesPlaceholder(message.template, optional=message.optional)
    return _ROLES[message.role].from_template(message.template)


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _literals_doubled(template: str) -> str:
    """The template with its literal braces doubled twice, so that one formatting leaves them doubled once."""
    parts = [(_doubled(_doubled(literal)), field) for literal, field, _, _ in Formatter().parse(template)]
    return "".join(literal if field is None else f"{literal}{{{field}}}" for literal, field in parts)
