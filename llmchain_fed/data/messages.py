"""Messages as they stand in data: OpenAI's and TRL's mappings, LangChain's objects, pairs of a role and a text.

Knows the forms by their shape. Knows nothing of LangChain, templates or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmchain_fed.errors import DialogueError
from llmchain_fed.untrusted import shown

_PAIRED = ("system", "human", "user", "ai", "assistant", "tool", "placeholder")
_NAMES = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant", "HumanMessageChunk": "user"}
"""LangChain's name of a role → transformers'"""


def is_message(value: Any) -> bool:
    """Whether this is a message, in whichever form.

    >>> [is_message(v) for v in ({"role": "user", "content": "a"}, ("human", "a"), {"text": "a"}, "a")]
    [True, True, False, False]
    """
    if isinstance(value, Mapping):
        return "role" in value or ("type" in value and "content" in value)
    return (hasattr(value, "content") and hasattr(value, "type")) or (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0] in _PAIRED
    )


def are_messages(value: Any) -> bool:
    """Whether this is a list of messages, and of at least one."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_message, value))


def role_of(message: Any) -> str:
    """Who speaks, by transformers' names.

    >>> role_of(("human", "a")), role_of({"role": "assistant", "content": "b"})
    ('user', 'assistant')
    """
    if isinstance(message, tuple):
        role = message[0]
    elif isinstance(message, Mapping):
        role = str(message.get("role", message.get("type"))).replace("function", "tool")  # OpenAI's older name
    else:
        role = str(getattr(message, "role", message.type))
    return _NAMES.get(str(role), str(role))


def content_of(message: Any) -> Any:
    """What is said: a text, a list of parts, or None."""
    if isinstance(message, tuple):
        return message[1]
    return message.get("content") if isinstance(message, Mapping) else message.content


def calls_of_tools(message: Any) -> Sequence[Any]:
    """The calls of tools that a message makes."""
    if isinstance(message, tuple):
        return ()
    if isinstance(message, Mapping):
        older = message.get("function_call")
        return message.get("tool_calls") or ([older] if older else ())
    return [*(getattr(message, "tool_calls", None) or ()), *(getattr(message, "invalid_tool_calls", None) or ())]


def thought_in(message: Any) -> str:
    """The reasoning that a mapping or an object has beside its content."""
    if isinstance(message, tuple):
        return ""
    if isinstance(message, Mapping):
        keys = ("reasoning_content", "reasoning", "thinking")
        return next((message[key] for key in keys if isinstance(message.get(key), str)), "")
    kept = getattr(message, "additional_kwargs", {}).get("reasoning_content")
    return kept if isinstance(kept, str) else ""


def is_learnt(message: Any) -> bool:
    """Whether an answer is one to learn: OpenAI's rows have `"weight": 0` where it is only read.

    Raises:
        DialogueError: The weight is neither 0 nor 1.
    """
    weight = message.get("weight") if isinstance(message, Mapping) else None
    if weight is not None and weight not in (0, 1):
        msg = f"an answer has the weight {shown(repr(weight), 40)}. It is 1 (learnt) or 0 (only read)."
        raise DialogueError(msg)
    return bool(weight is None or weight)


def id_answered(message: Any) -> str | None:
    """The id of the call that a tool's result belongs to; None where it does not say."""
    found = message.get("tool_call_id") if isinstance(message, Mapping) else getattr(message, "tool_call_id", None)
    return found or None


def id_of_call(call: Any) -> str | None:
    """The id of a call; None where it has none."""
    return (call.get("id") if isinstance(call, Mapping) else getattr(call, "id", None)) or None
