"""Loads recipes by name: `prompts/*.yaml` become LangChain prompts, `chains/*.yaml` become chains.

Knows LangChain's prompts and parsers; what a file may say stands in `recipes`, where it lies in `recipe_files`.
Knows nothing about training or federation. The model's code is imported only once a chain is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, cast

from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    CommaSeparatedListOutputParser,
    JsonOutputParser,
    StrOutputParser,
)
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
from llmchain_fed.recipes.files import read_spec, recipe_folder, recipe_names
from llmchain_fed.recipes.schema import ChainSpec, MessageData, ParserName, PromptData, PromptSpec
from llmchain_fed.untrusted import shown

if TYPE_CHECKING:
    from langchain_core.language_models import BaseLanguageModel

    from llmchain_fed.chain.llm_chain import LLMChain

__all__ = [
    "ChainSpec",
    "PromptSpec",
    "StripOutputParser",
    "list_chains",
    "list_prompts",
    "load_chain",
    "load_prompt",
    "make_parser",
    "make_prompt",
    "parser_name",
    "prompt_from_data",
    "prompt_to_data",
]


def load_prompt(name: str) -> StringPromptTemplate:
    r"""The prompt recipe `name` as a LangChain prompt: few-shot where the recipe has examples.

    Raises:
        RecipeError: No recipe of that name, or one that is not allowed.

    >>> load_prompt("translate").format(text="Page locked")
    'Translate the following text to French: Page locked\n'
    >>> load_prompt("translate").format(text="Page locked", language="German")
    'Translate the following text to German: Page locked\n'
    """
    return make_prompt(read_spec(PromptSpec, name, recipe_folder("prompts")))


def load_chain(name: str, *, llm: BaseLanguageModel[Any] | None = None) -> LLMChain:
    """The chain recipe `name`, ready to invoke.

    Args:
        name: One of `list_chains()`.
        llm: The model to use as it is, whatever adapter it has. None loads the recipe's model and puts the
            recipe's LoRA adapter on it. Either way the recipe's generation defaults and stop strings go along
            with every call, so a model from elsewhere must understand them.

    Raises:
        RecipeError: No recipe of that name, or one that is not allowed.
    """
    spec = read_spec(ChainSpec, name, recipe_folder("chains"))
    prompt = load_prompt(spec.prompt)

    from llmchain_fed.chain.llm_chain import LLMChain

    if llm is None:
        from llmchain_fed.chain.chat import LocalChatModel
        from llmchain_fed.chain.llm import LocalLLM

        face = LocalChatModel if spec.chat_template_kwargs else LocalLLM
        llm = face.from_pretrained(spec.model, lora=spec.adapter.to_lora() if spec.adapter else None)
    return LLMChain(llm=llm, prompt=prompt, output_parser=make_parser(spec.parser), llm_kwargs=spec.llm_kwargs())


def list_prompts() -> list[str]:
    """Names of the prompt recipes, sorted.

    >>> "translate" in list_prompts()
    True
    """
    return recipe_names(recipe_folder("prompts"))


def list_chains() -> list[str]:
    """Names of the chain recipes, sorted.

    >>> "translate" in list_chains()
    True
    """
    return recipe_names(recipe_folder("chains"))


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


class StripOutputParser(StrOutputParser):
    r"""The text without whitespace around it; a stream joined equals the whole parsed at once.

    >>> StripOutputParser().parse(" Page verrouillée\n")
    'Page verrouillée'
    """

    @property
    def _type(self) -> str:
        return "strip"

    def parse(self, text: str) -> str:
        """`text` without outer whitespace."""
        return text.strip()

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[str]:  # noqa: A002 (LangChain's name)
        held: str | None = None
        for piece in StrOutputParser()._transform(input):
            body, held = _hold_back(held, piece)
            if body:
                yield body

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[str]:  # noqa: A002
        held: str | None = None
        async for piece in StrOutputParser()._atransform(input):
            body, held = _hold_back(held, piece)
            if body:
                yield body


_PARSERS: dict[ParserName, type[BaseOutputParser[Any]]] = {
    "text": StrOutputParser,
    "strip": StripOutputParser,
    "json": JsonOutputParser,
    "comma_list": CommaSeparatedListOutputParser,
}


def make_parser(name: ParserName) -> BaseOutputParser[Any]:
    """A new output parser, by the name recipes use.

    Raises:
        RecipeError: No parser of that name.

    >>> make_parser("comma_list").parse("bus, tram")
    ['bus', 'tram']
    """
    if name not in _PARSERS:
        msg = f"no parser is called {name!r}, so an answer could not be read. Use one of {list(_PARSERS)}."
        raise RecipeError(msg)
    return _PARSERS[name]()


def parser_name(parser: BaseOutputParser[Any]) -> ParserName:
    """The name of a parser in recipes: the reverse of `make_parser`.

    Raises:
        RecipeError: A parser of another class, or with settings of its own.

    >>> parser_name(make_parser("strip"))
    'strip'
    """
    for name, kind in _PARSERS.items():
        if type(parser) is kind and parser == kind():
            return name
    msg = (
        f"{parser!r} has no name in recipes, which hold no class paths and no parser settings. Use one "
        f"of {list(_PARSERS)}, or put this parser behind the chain: chain | parser."
    )
    raise RecipeError(msg)


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


def _hold_back(held: str | None, piece: str) -> tuple[str, str | None]:
    """What may be shown now, and the whitespace to keep for later; held is None until something was shown."""
    text = piece.lstrip() if held is None else held + piece
    body = text.rstrip()
    return body, text[len(body) :] if body or held is not None else None


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _literals_doubled(template: str) -> str:
    """The template with its literal braces doubled twice, so that one formatting leaves them doubled once."""
    parts = [(_doubled(_doubled(literal)), field) for literal, field, _, _ in Formatter().parse(template)]
    return "".join(literal if field is None else f"{literal}{{{field}}}" for literal, field in parts)
