"""Dialogues: rows that are conversations, of which every answer of the assistant's, or those from one on, are learnt.

Knows the rows of OpenAI's and TRL's data sets and the order that messages must have. Knows nothing of LangChain,
templates or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmchain_fed.data.messages import (
    are_messages,
    calls_of_tools,
    content_of,
    id_answered,
    id_of_call,
    is_learnt,
    is_message,
    role_of,
    thought_in,
)
from llmchain_fed.data.sources.missing import is_blank
from llmchain_fed.errors import DataError, DialogueError
from llmchain_fed.untrusted import shown

_OWN = frozenset({"messages", "prompt", "completion", "tools"})


@dataclass(frozen=True)
class Dialogue:
    """A conversation, and which of its answers are learnt."""

    messages: Sequence[Any]
    first: int = 0
    """answers from this message on are learnt; those before are read"""
    tools: Sequence[Any] = ()
    """JSON schemas of the tools that the model may call"""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """values for a prompt that the messages stand in"""

    @property
    def answers(self) -> list[int]:
        """The positions of the answers to learn."""
        given = enumerate(self.messages)
        return [i for i, m in given if i >= self.first and role_of(m) == "assistant" and is_learnt(m)]

    @property
    def exchanges(self) -> list[tuple[int, list[int]]]:
        """Where each message of the user's stands that is answered, with the answers to it that are learnt."""
        found: list[tuple[int, list[int]]] = []
        for at in self.answers:
            asked = max((i for i in range(at) if role_of(self.messages[i]) == "user"), default=at - 1)
            if found and found[-1][0] == asked:
                found[-1][1].append(at)
            else:
                found.append((asked, [at]))
        return found

    @property
    def empty(self) -> bool:
        """Whether some answer, or some message of the user's, says nothing."""
        said = [m for i, m in enumerate(self.messages) if i in self.answers or role_of(m) == "user"]
        if not self.messages:
            return True
        blank = any(is_blank(content_of(m)) and not calls_of_tools(m) and not thought_in(m) for m in said)
        return blank or any(is_blank(value) for value in self.variables.values())


def dialogue_in(row: Mapping[Any, Any], variables: Collection[str]) -> Dialogue | None:
    """The dialogue that a row is; None where it is something else.

    The forms are `{"messages": […]}`, of which every answer is learnt, and TRL's `{"prompt": […], "completion": […]}`,
    both lists of messages, of which the completion's answers are. A key `tools` has JSON schemas, or their JSON text.

    Args:
        row: One row of the data.
        variables: Those of the prompt, which keys of the row may be.

    Raises:
        DialogueError: The messages are out of order, or none is an answer to learn.
        DataError: The tools are none.
    """
    if "completion" not in row:
        if "messages" not in row:
            return None
        messages, first = _listed(row["messages"]), 0
        if is_blank(messages):  # missing: an example without anything
            return Dialogue(())
        if not isinstance(messages, (list, tuple)):
            _refuse(f"`messages` is {type(messages).__name__}, not a list")
    else:
        asked, said = _listed(row.get("prompt")), _listed(row["completion"])
        if "prompt" in variables or not are_messages(asked):
            return None
        if isinstance(said, str) and row.get("tools"):
            said = [{"role": "assistant", "content": said}]
        elif is_message(said):
            said = [said]
        if not are_messages(said):
            return None
        messages, first = [*asked, *said], len(asked)
    tools = _tools(row.get("tools")) if "tools" not in variables else ()
    rest = {k: v for k, v in row.items() if k not in _OWN or (k in variables and k != "messages")}
    found = Dialogue(tuple(messages), first, tools, rest)
    _check_order(found)
    return found


def _listed(value: Any) -> Any:
    """Messages as a list where a frame has them as an array."""
    return value.tolist() if hasattr(value, "__array__") and hasattr(value, "tolist") else value


def _tools(given: Any) -> Sequence[Any]:
    given = _listed(given)
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            msg = f"`tools` is text and no JSON: {error!s:.200}. Write a list of the tools' JSON schemas."
            raise DataError(msg) from None
    if not given:
        return ()
    if not isinstance(given, (list, tuple)):
        msg = f"`tools` is a list of the tools' JSON schemas, got {type(given).__name__}."
        raise DataError(msg)
    return tuple(given)


def _refuse(what: str, remedy: str = "Write a list of {'role': …, 'content': …} in the order they were said") -> Any:
    msg = f"{what}. {remedy}."
    raise DialogueError(msg)


def _check_order(dialogue: Dialogue) -> None:
    """Makes sure that every result has a call, every answer a question, and that there is an answer to learn.

    What else a model's template refuses, a system message in the middle say, it refuses itself.
    """
    waiting: list[str | None] = []
    before = ""
    for at, message in enumerate(dialogue.messages):
        if not is_message(message):
            _refuse(f"message {at} is {shown(repr(message), 80)}, which is no message")
        role = role_of(message)
        if role == "assistant":
            if before in ("", "assistant"):
                where = "stands right behind another" if before else "answers nothing: no message stands before it"
                _refuse(f"message {at} is an answer that {where}", "Join the two, or give what was said in between")
            waiting = [id_of_call(call) for call in calls_of_tools(message)]
            named = [call for call in waiting if call is not None]
            if len(set(named)) < len(named):
                _refuse(f"message {at} has two calls of one id", "Give each call an id of its own, or none at all")
        elif role == "tool":
            _take(waiting, id_answered(message), at)
        elif waiting and role == "user":
            waiting = []  # the user went on without the result; a template that minds refuses it
        before = role
    if not dialogue.answers:
        _refuse(
            "no message is an answer to learn, of the role 'assistant' and not of the weight 0",
            "Give the whole conversation, or (messages before the answer, the answer)",
        )


def _take(waiting: list[str | None], wanted: str | None, at: int) -> None:
    """Takes the call off that a result belongs to."""
    if not waiting:
        _refuse(
            f"message {at} is a tool's result, and no call waits for one",
            "Put the assistant's message with its `tool_calls` before it, or leave the result out",
        )
    if wanted in waiting:
        waiting.remove(wanted)
    elif wanted is None or None in waiting:
        waiting.pop(0 if wanted is None else waiting.index(None))
    else:
        _refuse(
            f"message {at} is the result of the call {shown(wanted, 60)!r}, and the calls that wait are "
            f"{shown(waiting, 200)}",
            "Give the result the `tool_call_id` of its call",
        )
