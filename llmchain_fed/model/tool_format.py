"""How calls of tools are written: a chat template's own way where it has one that can be read back, else ours.

Ours is that of Hermes and Qwen: `<tool_call>` around a name and arguments as JSON, tools told in the system message.
Knows chat templates as functions, and calls as text. Knows nothing of LangChain, examples or training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from llmchain_fed.errors import ChatTemplateError, SchemaError
from llmchain_fed.model.chat_answer import answer_text, opens_reasoning, parted
from llmchain_fed.model.chat_template import Message, applied, takes_tools, template_of, with_content
from llmchain_fed.model.control_tokens import added_tokens
from llmchain_fed.model.generation.json_schema import shape_of
from llmchain_fed.model.generation.json_shapes import Shape, Style
from llmchain_fed.model.generation.json_shapes import told as told_of
from llmchain_fed.model.generation.lark import lark
from llmchain_fed.model.generation.nodes import Choice, Control, Fixed, Node, Repeat, Series
from llmchain_fed.model.generation.text_nodes import Text

_NAMES, _KEYS = ("zqonez", "zqtwoz"), ("zqkeyz", "zqvaluez")
_TOLD = """# Tools

You may call one or more of these functions to help with what the user asks, whose JSON schemas are:
<tools>
{tools}
</tools>

To call functions, answer with the name and the arguments of each as JSON, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""
_STYLE = Style()
_TAG = re.compile(r"\s*(<\|?[^<>\s|]+\|?>|\[[A-Z_]+\])")


@dataclass(frozen=True)
class ToolFormat:
    """The texts around the name and the arguments of calls."""

    begin: str = '<tool_call>\n{"name": "'
    """before the first call's name"""
    middle: str = '", "arguments": '
    """between a name and its arguments"""
    again: str | None = '}\n</tool_call>\n<tool_call>\n{"name": "'
    """between a call's arguments and the next one's name; None where an answer has one call at most"""
    end: str = "}\n</tool_call>"
    """behind the last call's arguments"""
    style: Style = _STYLE
    """how the arguments are written"""
    own: bool = False
    """whether this is the chat template's own way, which also tells the model of its tools"""
    shows: bool = False
    """whether the chat template writes calls at all, in a way that can be read back or not"""

    @property
    def marker(self) -> str:
        """What tells a call from text: its tag, else all that stands before the first name."""
        tag = _TAG.match(self.begin)
        return tag.group(1) if tag else self.begin.lstrip()

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Names and arguments, these as JSON → the text of the calls.

        Raises:
            SchemaError: More calls than this way of writing has room for.
        """
        if self.again is None and len(calls) > 1:
            msg = f"the chat template writes one call an answer, got {len(calls)}. Make an answer of each."
            raise SchemaError(msg)
        return self.begin + (self.again or "").join(f"{n}{self.middle}{a}" for n, a in calls) + self.end


OURS = ToolFormat()
_MOST_KEPT = 64  # of one tokenizer: switches of templates are few
_known: WeakKeyDictionary[Any, dict[tuple[str, str], ToolFormat]] = WeakKeyDictionary()


def tool_format(tokenizer: Any, given: Mapping[str, Any], *, controls: frozenset[str], name: str) -> ToolFormat:
    """How the model of this tokenizer writes calls; found by rendering some, once for these switches.

    Args:
        tokenizer: Its chat template writes them.
        given: The template's switches.
        controls: The model's control tokens.
        name: The model's, for messages of errors.

    Raises:
        UnsupportedModelError: The tokenizer has no chat template.
    """
    template = template_of(tokenizer, name)
    key = template, repr((sorted(given.items(), key=repr), sorted(controls)))
    kept = _known.setdefault(tokenizer, {})
    if key not in kept:
        opened = opens_reasoning(tokenizer, given, name=name)

        def text(*calls: str) -> str | None:
            answer = {"role": "assistant", "content": "", "tool_calls": [_probe(call) for call in calls]}
            return answer_text(tokenizer, answer, given, controls=controls, name=name)

        one, two = (_unthought(found, opened) for found in (text(_NAMES[0]), text(*_NAMES)))
        found = _format_in(one, two) if one is not None else None
        own = found is not None and takes_tools(template)
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        kept[key] = replace(found, own=True, shows=True) if own and found else replace(OURS, shows=one is not None)
    return kept[key]


def _unthought(text: str | None, opened: bool) -> str | None:  # noqa: FBT001
    """An answer without the thoughts, mostly none, that the template puts before it."""
    return parted(str(text), opened=opened)[1] if text is not None else None


def _probe(name: str) -> Message:
    function = {"name": name, "arguments": {_KEYS[0]: _KEYS[1]}}
    return {"type": "function", "id": "call00000", "function": function}


def _format_in(one: str, two: str | None) -> ToolFormat | None:
    """The texts around one call and around two; None where they are no JSON behind a name, or have an id."""
    for style in (Style(), Style(",", ":")):
        arguments = style.text(dict([_KEYS]))
        begin, _, rest = one.partition(_NAMES[0])
        middle, found, end = rest.partition(arguments)
        if not found or not begin.strip() or "call00000" in end:
            continue
        again = None
        if two is not None:
            first = f"{begin}{_NAMES[0]}{middle}{arguments}"
            again, there, rest = two.removeprefix(first).partition(_NAMES[1])
            if not two.startswith(first) or not there or rest != f"{middle}{arguments}{end}":
                return None
        return ToolFormat(begin, middle, again, end, style)
    return None


# --- telling a model of tools, where its template does not ----------------------------------------------------------


def told(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """A conversation for a template without tools: calls and results as text, the tools in the system message."""
    found: list[Message] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and message.get("tool_calls"):
            calls = [(c["function"]["name"], _arguments(c["function"]["arguments"])) for c in message["tool_calls"]]
            before = f"{_text(content)}\n" if _text(content) else ""
            kept = {k: v for k, v in message.items() if k != "tool_calls"}
            found.append({**kept, "content": before + OURS.written(calls)})
        elif role == "tool":
            result = f"<tool_response>\n{_text(content)}\n</tool_response>"
            if found and found[-1].get("role") == "user" and found[-1].get("results"):
                found[-1]["content"] += f"\n{result}"
            else:
                found.append({"role": "user", "content": result, "results": True})
        else:
            found.append(dict(message))
    for message in found:
        message.pop("results", None)
    if tools:
        about = _TOLD.format(tools="\n".join(Style().text(tool) for tool in tools))
        if found and found[0]["role"] == "system":
            found[0]["content"] = f"{_text(found[0]['content'])}\n\n{about}"
        else:
            found.insert(0, {"role": "system", "content": about})
    return found


def told_to_user(messages: Sequence[Message]) -> list[Message]:
    """The same with the system message put before what the user says first, for templates that take none."""
    if len(messages) < 2 or messages[0].get("role") != "system" or messages[1].get("role") != "user":
        return list(messages)
    both = f"{_text(messages[0]['content'])}\n\n{_text(messages[1]['content'])}"
    return [{**messages[1], "content": both}, *messages[2:]]


def takes_system(tokenizer: Any, given: Mapping[str, Any]) -> bool:
    """Whether the template shows what a system message says."""
    probe: list[Message] = [{"role": "system", "content": "zqsystemz"}, {"role": "user", "content": "a"}]
    forms: tuple[Literal["text", "parts"], ...] = ("text", "parts")
    for form in forms:
        try:
            if "zqsystemz" in applied(tokenizer, [with_content(m, form) for m in probe], given):
                return True
        except ChatTemplateError:
            continue
    return False


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# --- what calls may be ----------------------------------------------------------------------------------------------


def shapes_of(tools: Sequence[Message], style: Style) -> dict[str, Shape]:
    """What the arguments of each tool may be, by its name.

    Raises:
        SchemaError: A tool without a name, two of one name, or parameters that are no schema that is known here.
    """
    found: dict[str, Shape] = {}
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            msg = f"a tool has no name: {told_of(tool)}. Name it."
            raise SchemaError(msg)
        given = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(given, Mapping):
            msg = f"the parameters of the tool {name!r:.80} are {told_of(given)}, and a JSON schema is a mapping."
            raise SchemaError(msg)
        parameters = dict(given)
        if not parameters.get("properties") and "additionalProperties" not in parameters:
            parameters["additionalProperties"] = False
        try:
            shape = shape_of(parameters, style)
        except SchemaError as error:
            msg = f"the parameters of the tool {name!r}: {error}"
            raise SchemaError(msg) from None
        if name in found and lark(shape.node) != lark(found[name].node):
            msg = f"two tools are called {name!r}, with parameters of their own: a call would be of either. Rename one."
            raise SchemaError(msg)
        found[name] = shape
    return found


def calls_node(
    form: ToolFormat, shapes: Mapping[str, Shape], *, text: bool, several: bool, controls: Mapping[str, int]
) -> Node:
    """The texts of answers that call tools.

    Args:
        form: How calls are written.
        shapes: What the arguments of each tool may be.
        text: Whether an answer may begin with text, or be text alone.
        several: Whether an answer may have more than one call.
        controls: Texts of control tokens to ids.
    """

    def literal(words: str) -> Node:
        return _with_controls(words, controls)

    call = Choice(*(Series(literal(name + form.middle), shape.node) for name, shape in shapes.items()))
    more = [Repeat(Series(literal(form.again), call))] if several and form.again is not None else []
    if not text:
        return Series(literal(form.begin), call, *more, literal(form.end))
    marker = form.marker
    behind = form.begin[form.begin.index(marker) + len(marker) :]
    if marker in controls:
        opened: list[Node] = [Text(marker), Control(marker)]
    else:
        opened = [Text(marker, marked=True)]
    return Choice(Text(marker), Series(*opened, literal(behind), call, *more, literal(form.end)))


def control_ids(tokenizer: Any, *texts: str | None) -> dict[str, int]:
    """The special tokens among the added ones that stand in these texts, with their ids."""
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {str(token) for token in decoder.values() if getattr(token, "special", False)}
    return {
        token: i
        for i, token in added_tokens(tokenizer).items()
        if token in special and any(token in text for text in texts if text)
    }


def _with_controls(text: str, controls: Mapping[str, int]) -> Node:
    if not controls:
        return Fixed(text)
    parts = re.split("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")", text)
    nodes = [Control(part) if part in controls else Fixed(part) for part in parts if part]
    return nodes[0] if len(nodes) == 1 else Series(*nodes)
