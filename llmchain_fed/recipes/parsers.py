"""Output parsers by the names that recipes and saved chains have for them.

Knows LangChain's parsers. Knows nothing about prompts, files or models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    CommaSeparatedListOutputParser,
    JsonOutputParser,
    StrOutputParser,
)

from llmchain_fed.errors import LabelError, RecipeError
from llmchain_fed.recipes.labels import checked_labels
from llmchain_fed.recipes.schema import LabelsData, ParserData, ParserName


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
        kept: str | None = None
        for piece in StrOutputParser()._transform(input):
            body, kept = _keep_back(kept, piece)
            if body:
                yield body

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[str]:  # noqa: A002
        kept: str | None = None
        async for piece in StrOutputParser()._atransform(input):
            body, kept = _keep_back(kept, piece)
            if body:
                yield body


class LabelParser(BaseOutputParser[str]):
    r"""One of the labels, out of an answer that is it but for the white space around it and its case.

    >>> LabelParser(labels=["minor", "major"]).parse(" Major\n")
    'major'

    Args:
        labels: Two or more different texts; where two differ in case alone, case counts.

    Raises:
        LabelError: A label is empty, given twice or no text.
    """

    labels: tuple[str, ...]

    def __init__(self, *, labels: Any, **options: Any) -> None:
        super().__init__(**options, labels=checked_labels(labels))  # type: ignore[call-arg] # a field of this class

    @property
    def _type(self) -> str:
        return "labels"

    def parse(self, text: str) -> str:
        """The label that the text is.

        Raises:
            OutputParserException: It is none of them.
        """
        for same in (str.strip, lambda t: t.strip().casefold()):
            found = [label for label in self.labels if same(label) == same(text)]
            if len(found) == 1:
                return found[0]
        msg = (
            f"the answer {text!r:.80} is none of the labels {list(self.labels)!r:.200}. Train the chain on them, or "
            "ask chain.classify(x, labels=…), which always gives one."
        )
        raise OutputParserException(msg, llm_output=text)


_PARSERS: dict[ParserName, type[BaseOutputParser[Any]]] = {
    "text": StrOutputParser,
    "strip": StripOutputParser,
    "json": JsonOutputParser,
    "comma_list": CommaSeparatedListOutputParser,
}


def make_parser(name: ParserData) -> BaseOutputParser[Any]:
    """A new output parser, by the name recipes use; of labels, by the labels.

    Raises:
        RecipeError: No parser of that name, or labels that are no set of different texts.

    >>> make_parser("comma_list").parse("bus, tram")
    ['bus', 'tram']
    """
    if isinstance(name, LabelsData):
        try:
            return LabelParser(labels=name.labels)
        except LabelError as error:
            raise RecipeError(str(error)) from None
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
        f"{parser!r} has no name in recipes, which contain no class paths and no parser settings. Use one "
        f"of {list(_PARSERS)}, or put this parser behind the chain: chain | parser."
    )
    raise RecipeError(msg)


def parser_to_data(parser: BaseOutputParser[Any]) -> ParserName | dict[str, list[str]]:
    """What a recipe or a saved chain has of a parser: its name, or its labels.

    Raises:
        RecipeError: A parser of another class, or with settings of its own.

    >>> parser_to_data(LabelParser(labels=["no", "yes"]))
    {'labels': ['no', 'yes']}
    """
    if type(parser) is LabelParser and parser == LabelParser(labels=parser.labels):
        return {"labels": list(parser.labels)}
    return parser_name(parser)


def _keep_back(kept: str | None, piece: str) -> tuple[str, str | None]:
    """What may be shown now, and the whitespace to keep for later; kept is None until something was shown."""
    text = piece.lstrip() if kept is None else kept + piece
    body = text.rstrip()
    return body, text[len(body) :] if body or kept is not None else None
