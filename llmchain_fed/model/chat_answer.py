"""An answer as a chat template writes it, and an answer's text taken apart again: what was thought, what is said.

Knows chat templates as functions, and the tags of reasoning models. Knows nothing of LangChain, examples or training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from llmchain_fed.errors import ChatTemplateError
from llmchain_fed.model.chat_template import (
    Message,
    applied,
    changed,
    check_tools,
    facts_of,
    template_of,
    with_content,
)
from llmchain_fed.model.control_tokens import MASK, Rendered, mark_foreign, occurrences

OPEN, CLOSE = "<think>", "</think>"
"""around what a model thinks before it speaks: Qwen's and DeepSeek's tags, which others have taken over"""
_ASKED: list[Message] = [{"role": "user", "content": "a"}]
"""what the answer is put behind, to see how the template writes it"""
_TEXTS = ("reasoning_content", "content")
_frames: WeakKeyDictionary[Any, dict[tuple[str, str], Frame]] = WeakKeyDictionary()

_MOST_KEPT = 64  # of one tokenizer: each row of data may have tools of its own

Kind = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer."""

    begun: str
    """all before it, up to the end of the generation prompt"""
    opened: bool
    """whether that opens the reasoning, so that the answer begins within it"""
    tail: str = ""
    """what stands behind any answer of text"""


def answer_text(
    tokenizer: Any,
    answer: Message,
    given: Mapping[str, Any],
    *,
    controls: frozenset[str],
    name: str,
    tools: Sequence[Message] = (),
) -> str | None:
    r"""An answer → the text between the generation prompt and the end token, as the model's own template writes it.

    The template is rendered with the answer and without it; what is new is the answer's. Where the template drops what
    was thought, that is put before in Qwen's tags. Where the answer's own texts spell a control token, the result is a
    `Rendered`; the tags that the template writes around calls are its own.

    Args:
        tokenizer: Its chat template writes the text.
        answer: A message of the assistant's in transformers' form.
        given: The template's switches.
        controls: The model's control tokens.
        name: The model's, for messages of errors.
        tools: JSON schemas of the tools that the model may call.

    Returns:
        None where the template does not show all of the answer: its content, its calls or their arguments.

    Raises:
        ChatTemplateError: A text of the answer spells a control token, and where it stands cannot be told.
        UnsupportedModelError: The tokenizer has no chat template.
    """
    facts = facts_of(tokenizer, template_of(tokenizer, name), given)
    known = controls | facts.written
    check_tools(tools, known)
    try:
        frame = _frame(tokenizer, given, name=name, tools=tools)

        def behind(some: Message) -> str:
            asked = [with_content(m, facts.content) for m in (*_ASKED, some)]
            return _behind(applied(tokenizer, asked, given, finished=True, tools=tools), frame)

        text = behind(answer)
        if not _shows(answer, text, behind, ("content",)):
            return None
        thought = answer.get("reasoning_content") or ""
        dropped = bool(thought) and not _shows({"reasoning_content": thought}, text, lambda m: behind({**answer, **m}))
    except ChatTemplateError:
        return None
    marked = mark_foreign(text, known, [lambda change: behind(changed(answer, change))])
    if not isinstance(marked, Rendered):  # what it spells is the template's own, which no other text's would be
        marked = Rendered(marked, (), known)
    end = _end(marked, frame.tail, controls)
    start = len(text) - len(parted(text, opened=frame.opened)[1]) if dropped else 0
    before = own_text("", thought, opened=frame.opened) if dropped else ""
    return _cut(marked, start, end, before, thought)


def _frame(tokenizer: Any, given: Mapping[str, Any], *, name: str, tools: Sequence[Message] = ()) -> Frame:
    """What the template writes around any answer; tried out once for these switches and tools.

    Raises:
        ChatTemplateError: The template refuses a question, or an answer to it.
    """
    template = template_of(tokenizer, name)
    key = template, json.dumps([sorted(given.items()), list(tools)], default=repr)
    kept = _frames.setdefault(tokenizer, {})
    if key not in kept:
        form = facts_of(tokenizer, template, given).content
        asked = [with_content(m, form) for m in _ASKED]
        begun = applied(tokenizer, asked, given, tools=tools)
        frame = Frame(begun, begun.rstrip().endswith(OPEN))
        answers = [with_content({"role": "assistant", "content": letter}, form) for letter in "xy"]
        whole = [applied(tokenizer, [*asked, a], given, finished=True, tools=tools) for a in answers]
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        kept[key] = replace(frame, tail=_common_end(*(_behind(text, frame) for text in whole)))
    return kept[key]


def _behind(whole: str, frame: Frame) -> str:
    """What stands behind the generation prompt in a conversation of one answer.

    Raises:
        ChatTemplateError: Another text stands in the prompt's place.
    """
    if whole.startswith(frame.begun):
        return whole[len(frame.begun) :]
    stem = frame.begun.rstrip().removesuffix(OPEN)
    if not frame.opened or not whole.startswith(stem):
        msg = "the template writes a finished answer otherwise than it begins one."
        raise ChatTemplateError(msg)
    rest = whole[len(stem) :]  # of a finished answer, the template drops what was thought, or its tags' line breaks
    return rest.removeprefix(OPEN).lstrip("\n") if rest.startswith(OPEN) else f"{CLOSE}\n\n{rest}"


def _shows(answer: Message, text: str, behind: Callable[[Message], str], keys: Sequence[str] = _TEXTS) -> bool:
    """Whether the template writes all of an answer: what it drops makes no difference when it is another."""

    def other(value: str) -> str:
        return MASK * len(value)

    for key in keys:
        value = answer.get(key)
        if isinstance(value, str) and value.strip() and behind({**answer, key: other(value)}) == text:
            return False
    for at, call in enumerate(answer.get("tool_calls") or ()):
        function = call["function"]
        given = function["arguments"]
        arguments = {**given, MASK: MASK} if isinstance(given, Mapping) else other(str(given))
        for changes in ({"name": other(function["name"])}, {"arguments": arguments}):
            calls = list(answer["tool_calls"])
            calls[at] = {**call, "function": {**function, **changes}}
            if behind({**answer, "tool_calls": calls}) == text:
                return False
    return True


def _common_end(one: str, other: str) -> str:
    """What both texts end in.

    >>> _common_end("x</s>", "y</s>")
    '</s>'
    """
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]


def _end(text: Rendered, tail: str, controls: frozenset[str]) -> int:
    """Where the answer ends: before what stands behind any answer, else before the last control token."""
    if tail and text.endswith(tail):
        return len(text) - len(tail)
    own = [start for start, end in occurrences(text, controls) if (start, end) not in text.foreign]
    return own[-1] if own else len(text)


def _cut(text: Rendered, start: int, end: int, before: str, thought: str) -> str:
    """A part of a text behind another in which somebody's thoughts stand; plain where it spells no control token."""
    at = before.find(thought)
    places = [(at + a, at + b) for a, b in occurrences(thought, text.controls)] if before else []
    shift = len(before) - start
    places += [(a + shift, b + shift) for a, b in text.foreign if start <= a and b <= end]
    joined = before + str(text)[start:end]
    return Rendered(joined, places, text.controls) if occurrences(joined, text.controls) else joined


def own_text(content: str, reasoning: str, *, opened: bool) -> str:
    """What this package writes where a template drops an answer's reasoning.

    Args:
        content: What is said.
        reasoning: What is thought before.
        opened: Whether the generation prompt ends in the tag that opens the reasoning.
    """
    if not reasoning:
        return f"{CLOSE}\n\n{content}" if opened else content
    return f"{'' if opened else OPEN + chr(10)}{reasoning}\n{CLOSE}\n\n{content}"


def opens_reasoning(tokenizer: Any, given: Mapping[str, Any], *, name: str) -> bool:
    """Whether the template opens the reasoning itself, so that an answer begins within it; tried out once.

    Raises:
        UnsupportedModelError: The tokenizer has no chat template.
    """
    try:
        return _frame(tokenizer, given, name=name).opened
    except ChatTemplateError:
        return False


def writes_reasoning(tokenizer: Any, given: Mapping[str, Any], *, name: str) -> bool:
    """Whether the template puts the tags of reasoning, with nothing in them, before an answer that has none.

    Raises:
        UnsupportedModelError: The tokenizer has no chat template.
    """
    plain = {"role": "assistant", "content": "a"}
    text = answer_text(tokenizer, plain, given, controls=frozenset(), name=name)
    return text is not None and text.lstrip().startswith(OPEN)


def parted(text: str, *, opened: bool = False) -> tuple[str, str]:
    r"""An answer's text → what was thought, and what is said; without the line breaks around the tags.

    Args:
        text: All of the answer.
        opened: Whether the prompt has opened the reasoning.

    >>> parted("<think>\nIt is a greeting.\n</think>\n\nHello")
    ('It is a greeting.', 'Hello')
    >>> parted("Hello")
    ('', 'Hello')
    """
    parting = Parting(opened=opened)
    parts = [*parting.feed(text), *parting.end()]
    reasoning, content = ("".join(part for kind, part in parts if kind == which) for which in ("reasoning", "content"))
    return reasoning, content


class Parting:
    """Takes an answer apart while it comes, piece by piece; the joined parts are those of `parted`.

    Args:
        opened: Whether the prompt has opened the reasoning.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._state: Literal["begins", "thinks", "has thought", "speaks"] = "thinks" if opened else "begins"
        self._kept = ""
        self._thought = False
        """whether anything of the reasoning has been given on, so that line breaks now stand within it"""

    def feed(self, piece: str) -> Iterator[tuple[Kind, str]]:
        """The parts that can be told now; the beginning of a tag, and line breaks before one, are held back."""
        self._kept += piece
        if self._state == "begins":
            begun = self._kept.lstrip()
            if begun.startswith(OPEN):
                self._state, self._kept = "thinks", begun[len(OPEN) :]
            elif not OPEN.startswith(begun):
                self._state = "speaks"
        if self._state == "thinks":
            yield from self._thinking()
        if self._state == "has thought" and (said := self._kept.lstrip("\n")):
            self._state, self._kept = "speaks", said
        if self._state == "speaks" and self._kept:
            said, self._kept = self._kept, ""
            yield "content", said

    def _thinking(self) -> Iterator[tuple[Kind, str]]:
        at = self._kept.find(CLOSE)
        if at >= 0:
            found, self._kept, self._state = self._kept[:at].rstrip("\n"), self._kept[at + len(CLOSE) :], "has thought"
        else:
            begun = next((n for n in range(len(CLOSE) - 1, 0, -1) if self._kept.endswith(CLOSE[:n])), 0)
            found = self._kept[: len(self._kept) - begun].rstrip("\n")
        found = found if self._thought else found.lstrip("\n")
        if at < 0:
            # what is held back begins behind what is given on
            start = len(self._kept) - len(self._kept.lstrip("\n")) if not self._thought else 0
            self._kept = self._kept[start + len(found) :] if found else self._kept
        if found:
            self._thought = True
            yield "reasoning", found

    def end(self) -> Iterator[tuple[Kind, str]]:
        """What was held back, once the answer has ended: half a tag is text."""
        kept, self._kept = self._kept, ""
        if self._state == "thinks":
            kept = kept.rstrip("\n") if self._thought else kept.strip("\n")
            if kept:
                yield "reasoning", kept
        elif self._state == "begins" and kept:
            yield "content", kept
