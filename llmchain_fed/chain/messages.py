"""Messages between LangChain's form, that of data sets, and transformers', which chat templates are written for.

Knows these forms, the calls of a conversation, and objects as data. Knows nothing about models, templates or training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from decimal import Decimal
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_instance
from pydantic import AliasChoices, BaseModel, RootModel, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.messages import calls_of_tools, content_of, id_answered, id_of_call, role_of, thought_in
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import DataError, DialogueError, SchemaError, UnsupportedModelError
from llmchain_fed.untrusted import shown

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "function"}
_CALLS = ("tool_call", "tool_use", "function_call", "invalid_tool_call", "tool_call_chunk")
_REASONING = {"reasoning": "reasoning", "thinking": "thinking"}  # kind of block → the key of its text


def converted(message: BaseMessage, name: str) -> dict[str, Any]:
    """A message as transformers has it (https://huggingface.co/docs/transformers/main/en/chat_extras).

    A call's arguments are a mapping, not the OpenAI wire form's string. Content is a text, or a list of
    `{"type": "text", "text": …}` where the message has blocks; a message of more than text is refused.
    """
    role = _role(message)
    content, reasoning = _content(message, role, name)
    found: dict[str, Any] = {"role": role, "content": content}
    if message.name:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage):
        broken = [call for call in message.invalid_tool_calls if call.get("name")]
        if calls := [*map(_call, message.tool_calls), *map(_call, broken)]:
            found["tool_calls"] = calls
        # no template writes a call of nothing: what was written stays as the text that it was
        if said := "".join(str(c.get("args") or "") for c in message.invalid_tool_calls if not c.get("name")):
            found["content"] = (
                content + said if isinstance(content, str) else [*content, {"type": "text", "text": said}]
            )
        kept = message.additional_kwargs.get("reasoning_content")
        if reasoning or isinstance(kept, str):
            found["reasoning_content"] = reasoning or kept
    return found


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    if isinstance(message, SystemMessage):
        return str(message.additional_kwargs.get("__openai_role__", "system"))
    if isinstance(message, FunctionMessage):
        return "function"
    kind = message.type.removesuffix("MessageChunk").lower()
    return _ROLES.get(kind, kind)


def _call(call: Any) -> dict[str, Any]:
    arguments = call.get("args")
    return {
        "type": "function",
        "id": call.get("id"),
        "function": {"name": call.get("name"), "arguments": {} if arguments is None else arguments},
    }


def _content(message: BaseMessage, role: str, name: str) -> tuple[str | list[dict[str, Any]], str]:
    """The content, and the reasoning that stood among its blocks."""
    if isinstance(message.content, str):
        return message.content, ""
    parts: list[dict[str, Any]] = []
    reasoning: list[str] = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str):
            parts.append({"type": "text", "text": block})
        elif kind == "text" and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        elif role == "assistant" and kind in _REASONING:
            reasoning.append(str(block.get(_REASONING[kind], "")))
        elif role != "assistant" or kind not in _CALLS:  # calls stand in `tool_calls`, too
            msg = (
                f"a {role} message contains more than text (a block of type {kind!r}), which {name!r} cannot read. "
                "Send text only."
            )
            raise UnsupportedModelError(msg)
    return parts, "\n".join(reasoning)


# --- messages of data sets -------------------------------------------------------------------------------------------


def read(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] = ()) -> list[BaseMessage]:
    """Messages in any form, in their order → LangChain's.

    Beside what LangChain itself reads, this takes what data sets have: arguments as mappings, calls and results without
    ids (each result belongs to the first call that waits, by name where it has one), keys that are null, and null
    arguments that a table has put where a tool has none of that name.

    Raises:
        DialogueError: A message, or a call within, that cannot be read.
    """
    found: list[BaseMessage] = []
    waiting: list[tuple[str, str]] = []
    known = {t["function"]["name"]: _properties(t["function"].get("parameters")) for t in tools}
    for at, message in enumerate(messages):
        try:
            made = message if isinstance(message, BaseMessage) else _read(message, at, waiting, known)
        # what LangChain's readers raise of a message that is none
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            msg = f"message {at} cannot be read ({type(error).__name__}: {error!s:.200}). Write it as OpenAI does."
            raise DialogueError(msg) from None
        if isinstance(made, AIMessage):
            waiting = [(str(call["id"]), str(call["name"])) for call in made.tool_calls]
        elif isinstance(made, ToolMessage):
            answered = next((call for call in waiting if call[0] == made.tool_call_id), None)
            waiting = [call for call in waiting if call is not answered]
        found.append(made)
    return found


def _read(message: Any, at: int, waiting: Sequence[tuple[str, str]], known: Mapping[str, Any]) -> BaseMessage:
    role = role_of(message)
    if role == "assistant":
        calls = [_read_call(call, f"call{at:03}{n:02}", known) for n, call in enumerate(calls_of_tools(message))]
        thought = thought_in(message)
        kept = {"reasoning_content": thought} if thought else {}
        content = content_of(message)
        name = message.get("name") if isinstance(message, Mapping) else None
        return AIMessage("" if content is None else content, tool_calls=calls, additional_kwargs=kept, name=name)
    if role == "tool" and isinstance(message, Mapping):
        name, content = message.get("name"), message.get("content")
        text = content if isinstance(content, (str, list)) else json.dumps(content, ensure_ascii=False)
        first = waiting[0][0] if waiting else None
        mine = id_answered(message) or next((i for i, called in waiting if name in (None, called)), first)
        if mine is None:
            raise ValueError("it is a tool's result, and no call waits for one")  # noqa: EM101 (told below)
        return ToolMessage("" if content is None else text, tool_call_id=mine, name=name)
    if isinstance(message, Mapping):
        message = {key: value for key, value in message.items() if value is not None}
    return convert_to_messages([message])[0]


def _read_call(call: Mapping[str, Any], made_id: str, known: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", function.get("args"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    arguments = {} if arguments is None and "arguments" not in function else arguments
    if not isinstance(arguments, Mapping) or not isinstance(name, str):
        msg = f"the call {shown(repr(call), 120)} has no name, or arguments that are no JSON object"
        raise ValueError(msg)
    if name in known:
        arguments = {key: value for key, value in arguments.items() if value is not None or key in known[name]}
    return {"name": name, "args": dict(arguments), "id": id_of_call(call) or made_id, "type": "tool_call"}


def read_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools in any form that LangChain takes → JSON schemas, as templates take them.

    Raises:
        DataError: Something is no tool.
    """
    try:
        found = [convert_to_openai_tool(tool) for tool in tools]
        if strange := next((tool for tool in found if not isinstance(tool.get("function"), Mapping)), None):
            raise ValueError(f"{shown(repr(strange), 120)} is a tool of a provider's own")  # noqa: EM102 (told below)
        json.dumps(found)  # what is nested too deep, or no JSON, fails here
        return [{**tool, "function": _checked_function(tool["function"])} for tool in found]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, NameError) as error:
        msg = f"`tools` has something that is no tool ({error!s:.200}). Write the JSON schema of a function."
        raise DataError(msg) from None


def _checked_function(function: Mapping[str, Any]) -> dict[str, Any]:
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{shown(repr(function), 120)} has no name")  # noqa: EM102 (told below)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise TypeError(f"the parameters of {shown(name, 60)!r} are {shown(repr(parameters), 60)}, no mapping")  # noqa: EM102 (told below)
    return {key: value for key, value in function.items() if key != "parameters" or value is not None}


def _properties(parameters: Any) -> Mapping[str, Any]:
    found = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def tools_of(dialogue: Dialogue, bound: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The tools of a row of messages, as JSON schemas; those that are bound to the model where it names none.

    Raises:
        DataError: Something is no tool.
        DialogueError: It names others than are bound, with which the model will answer.
    """
    tools, ours = read_tools(dialogue.tools), read_tools(bound or ())
    if not (tools and ours):
        return tools or ours
    if sorted(map(repr, tools)) != sorted(map(repr, ours)):
        names, others = ([tool["function"].get("name") for tool in side] for side in (tools, ours))
        msg = (
            f"the row's `tools` ({shown(names, 200)}) are not those that are bound to the model "
            f"({shown(others, 200)}), so it would answer another prompt than it learns. Leave the row's out, or "
            "train the model without "
            "bind_tools."
        )
        raise DialogueError(msg)
    return ours


# --- answers ---------------------------------------------------------------------------------------------------------


def answer_in(completion: Any) -> AIMessage | None:
    """The assistant's message that a completion is; None where it is none.

    Raises:
        DialogueError: It is a message that is no answer, or one that cannot be read.
    """
    if isinstance(completion, (list, tuple)) and len(completion) == 1:
        completion = completion[0]
    if isinstance(completion, Mapping) and not ("role" in completion and completion.keys() & {"content", "tool_calls"}):
        return None
    if not isinstance(completion, (BaseMessage, Mapping)):
        return None
    (message,) = read([completion]) if role_of(completion) == "assistant" else (None,)
    if not isinstance(message, AIMessage):
        msg = f"a completion is what the assistant says, got a message of {role_of(completion)!r}. Give its answer."
        raise DialogueError(msg)
    if any(not call.get("name") for call in message.invalid_tool_calls):
        msg = "the completion has a broken call that names no tool, which is nothing to learn. Mend it or leave it out."
        raise DialogueError(msg)
    return message


def dialogue_calls(
    dialogue: Dialogue,
    tools: Sequence[Mapping[str, Any]],
    render: Callable[[list[BaseMessage]], str],
    written: Callable[[AIMessage], str],
) -> list[Call]:
    """What the model reads before each answer to learn, and that answer.

    Args:
        dialogue: The conversation.
        tools: The JSON schemas of its tools.
        render: Messages → the text up to where the next answer begins.
        written: An answer → its text.

    Raises:
        DialogueError: A message that cannot be read.
    """
    messages = read(dialogue.messages, tools)
    answers = ((i, messages[i]) for i in dialogue.answers)
    return [Call(render(messages[:i]), written(answer)) for i, answer in answers if isinstance(answer, AIMessage)]


def placeholder(prompt: BasePromptTemplate[Any], given: Mapping[str, Any]) -> str:
    """The variable of a prompt that takes all the messages of a dialogue.

    Raises:
        DialogueError: There is none, or other text stands behind it, or further variables have no value.
    """
    parts = prompt.messages if isinstance(prompt, ChatPromptTemplate) else []
    places = [part.variable_name for part in parts if isinstance(part, MessagesPlaceholder)]
    last = parts[-1] if parts else None
    needed = set(prompt.input_variables)
    taken = set(places[-1:])
    allowed = {*needed, *prompt.partial_variables, *prompt.optional_variables}
    if len(places) == 1 and isinstance(last, MessagesPlaceholder) and needed <= {*given, *taken} <= allowed:
        return places[0]
    msg = (
        f"a row of messages does not say what the prompt's variables {sorted(needed)} are"
        + (f" (besides {sorted(map(str, given))})" if given else "")
        + ": that is clear where a ChatPromptTemplate ends in its one MessagesPlaceholder. Write such a prompt, train "
        "the chat model itself, or pass (inputs, completion) pairs."
    )
    raise DialogueError(msg)


# --- objects --------------------------------------------------------------------------------------------------------


def as_data(value: Any) -> Any:
    """An object as JSON data: a Pydantic model's fields, a dataclass's, or the value itself.

    Raises:
        SchemaError: A secret, which its own class writes as asterisks.
    """
    if isinstance(value, BaseMessage):
        return value
    if isinstance(value, BaseModel):
        return _as_read(value, value.model_dump(mode="json", round_trip=True, warnings=False))
    if is_basemodel_instance(value):  # of Pydantic 1
        return json.loads(value.json(by_alias=True))
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


def _as_read(value: Any, dumped: Any) -> Any:
    """What a Pydantic object was dumped as, by the names by which its class reads it, and decimals as numbers."""
    if isinstance(value, (SecretStr, SecretBytes)):
        msg = "a secret is written as asterisks, which would be learnt. Give a dict with the text itself."
        raise SchemaError(msg)
    if isinstance(value, RootModel):
        return _as_read(value.root, dumped)
    if isinstance(value, BaseModel) and isinstance(dumped, Mapping):
        fields = type(value).model_fields
        names = {name: _name_read(name, fields[name]) if name in fields else name for name in dumped}
        return {names[name]: _as_read(getattr(value, name, part), part) for name, part in dumped.items()}
    if is_dataclass(value) and isinstance(dumped, Mapping):
        return {name: _as_read(getattr(value, name, part), part) for name, part in dumped.items()}
    if isinstance(value, Mapping) and isinstance(dumped, Mapping) and len(value) == len(dumped):
        pairs = zip(value.values(), dumped.items(), strict=True)
        return {name: _as_read(inner, part) for inner, (name, part) in pairs}
    if isinstance(value, (list, tuple, set, frozenset)) and isinstance(dumped, list) and len(value) == len(dumped):
        return [_as_read(inner, part) for inner, part in zip(value, dumped, strict=True)]
    return value if isinstance(value, Decimal) and isinstance(dumped, str) else dumped


def _name_read(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias or field.alias or name
    if isinstance(alias, AliasChoices):
        alias = next((choice for choice in alias.choices if isinstance(choice, str)), name)
    return alias if isinstance(alias, str) else name
