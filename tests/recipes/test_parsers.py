"""The parsers recipes can name.

Belongs here: what a parser makes of text and of a stream. Does not: which chain uses which (test_library).
"""

import asyncio

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from pydantic import BaseModel

from llmchain_fed.errors import RecipeError
from llmchain_fed.recipes.parsers import StripOutputParser, make_parser, parser_name


def test_parsers_parse():
    assert make_parser("text").parse(" a\n") == " a\n"
    assert make_parser("strip").parse(" a b\n") == "a b"
    assert make_parser("json").parse('{"a": [1]}') == {"a": [1]}
    assert make_parser("comma_list").parse("a, b,c") == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["text", "strip", "json", "comma_list"])
def test_parser_names_go_there_and_back(name):
    assert parser_name(make_parser(name)) == name
    assert make_parser(name) is not make_parser(name)


def test_an_unknown_parser_is_refused():
    with pytest.raises(RecipeError, match=r"no parser is called 'xml'.*Use one of"):
        make_parser("xml")


def test_a_parser_without_a_name_is_refused():
    class Answer(BaseModel):
        label: str

    class Mine(StrOutputParser):
        pass

    for parser in [Mine(), JsonOutputParser(pydantic_object=Answer), JsonOutputParser(diff=True)]:
        with pytest.raises(RecipeError, match="has no name in recipes"):
            parser_name(parser)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([" ", "\n a", " ", "b ", " \n", "c", " ", "\n"], ["a", " b", "  \nc"]),
        (["abc"], ["abc"]),
        ([" ", "\n"], []),
        ([], []),
        (["", "a", "", " ", ""], ["a"]),
    ],
)
def test_a_stripped_stream_equals_the_stripped_whole(pieces, shown):
    async def collect():
        async def source():
            for piece in pieces:
                yield piece

        return [piece async for piece in StripOutputParser().atransform(source())]

    assert list(StripOutputParser().transform(iter(pieces))) == shown
    assert list(StripOutputParser().transform(AIMessageChunk(content=p) for p in pieces)) == shown
    assert asyncio.run(collect()) == shown
    assert "".join(shown) == "".join(pieces).strip()
