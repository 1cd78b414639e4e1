"""What a call wants of its answer: tools that it may call, a schema that it keeps to, and the grammar of both.

Knows tools' schemas, how calls are written, and grammars. Knows nothing of LangChain, tokens or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llmchain_fed.errors import ConfigError, SchemaError
from llmchain_fed.model import chat_answer, tool_format
from llmchain_fed.model.generation.grammar import Grammar
from llmchain_fed.model.generation.json_schema import shape_of
from llmchain_fed.model.generation.json_shapes import Shape
from llmchain_fed.model.generation.nodes import Node, Repeat, Series
from llmchain_fed.model.generation.text_nodes import Text

_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, eq=False)
class AnswerPlan:
    """What a call wants of its answer."""

    form: tool_format.ToolFormat
    tools: tuple[dict[str, Any], ...]
    choice: Literal["auto", "none", "any"]
    chosen: tuple[str, ...]
    """the names of the tools that may be called"""
    several: bool
    strict: bool
    response: Shape | None
    """what the answer's JSON is, where it is to be JSON"""
    opened: bool
    """whether the prompt has opened the model's reasoning"""
    thinks: bool
    """whether the template itself writes reasoning before an answer"""
    key: str
    control_ids: dict[str, int]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """What the arguments of each tool that may be called are."""
        chosen = [tool for tool in self.tools if tool["function"]["name"] in self.chosen]
        return tool_format.shapes_of(chosen, self.form.style)

    @cached_property
    def node(self) -> Node | None:
        """The texts that answers may be; None where they may be any."""
        node: Node | None = None
        if self.response is not None:
            node = self.response.node
        elif self.tools and self.strict:
            node = Text(self.form.marker)
            if self.choice != "none" and self.shapes:
                node = tool_format.calls_node(
                    self.form, self.shapes, text=self.choice == "auto", several=self.several, controls=self.control_ids
                )
        if node is None:
            return None
        thought = Series(Text(chat_answer.CLOSE, marked=True), "\n\n")
        if self.opened:
            return Series(thought, node)
        # of a template that writes thoughts before an answer, those of the model may stand there
        return Series(Repeat(Series(chat_answer.OPEN, thought), most=1), node) if self.thinks else node

    @cached_property
    def grammar(self) -> Grammar | None:
        """The same for the model."""
        return Grammar(self.node, self.key, self.control_ids) if self.node is not None else None

    def checked(self, name: str, arguments: Any) -> str:
        """The arguments of a call as JSON.

        Raises:
            SchemaError: No such tool, or arguments that do not fit it.
        """
        if name not in self.shapes:
            known = ", ".join(map(repr, self.shapes)) or "none"
            msg = f"the call names the tool {name!r:.80}, and those that may be called are {known}."
            raise SchemaError(msg)
        try:
            return self.shapes[name].write(arguments)
        except SchemaError as error:
            msg = f"the arguments of the call of {name!r} do not fit: {error}"
            raise SchemaError(msg) from None

    def kept(self, text: str) -> str:
        """The text itself, if it is one that the model can answer.

        Raises:
            SchemaError: The grammar of such answers does not allow it.
        """
        if self.node is None or self.node.whole(text):
            return text
        wanted = _WANTED[self.choice] if self.tools else "JSON of its schema"
        msg = (
            f"the completion {text!r:.120} is none that the chain could answer: with what is bound to its model an "
            f"answer is {wanted}{'' if self.several else ', one at most'}. Give such a one, or bind otherwise."
        )
        raise SchemaError(msg)


_WANTED = {"none": "text without a call", "any": "a call of a tool", "auto": "text, or calls of tools"}


def chosen_tools(given: Any, names: Sequence[str]) -> tuple[Literal["auto", "none", "any"], tuple[str, ...]]:
    """What `tool_choice` says: whether tools are called, and which may be.

    Raises:
        ConfigError: It names no tool.
    """
    if isinstance(given, Mapping):
        inner = given.get("function", given)
        given = inner.get("name") or given if isinstance(inner, Mapping) else given
    if given in (None, "auto"):
        return "auto", tuple(names)
    if given in ("none", False):
        return "none", ()
    if given in ("any", "required", True) and names:
        return "any", tuple(names)
    if given in names:
        return "any", (str(given),)
    msg = (
        "tool_choice is 'auto', 'none', 'any', 'required' or the name of a tool "
        f"({', '.join(map(repr, names)) or 'none'} given), got {given!r:.80}."
    )
    raise ConfigError(msg)


def response_shape(given: Any) -> Shape | None:
    """What `response_format`, in OpenAI's form, says of the answer; None where it may be any text.

    Raises:
        ConfigError: It is of no known form.
        SchemaError: No text keeps to its schema, or something in it is not known here.
    """
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return shape_of(_ANY_OBJECT)
    schema = given.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, Mapping) and "schema" in schema:
        return shape_of(schema["schema"])
    msg = (
        "response_format is {'type': 'json_schema', 'json_schema': {'name': …, 'schema': …}}, {'type': 'json_object'} "
        f"or {{'type': 'text'}}, got {given!r:.120}. with_structured_output writes it."
    )
    raise ConfigError(msg)
