"""Messages between LangChain's form and transformers', which chat templates are written for.

Knows both forms. Knows nothing about models, prompts or training.
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, SystemMessage, ToolMessage

from llmchain_fed.errors import UnsupportedModelError

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
        if calls := [*map(_call, message.tool_calls), *map(_call, message.invalid_tool_calls)]:
            found["tool_calls"] = calls
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
