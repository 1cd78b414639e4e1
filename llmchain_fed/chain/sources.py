"""Where each piece of a prompt's text came from: an input, the prompt template, the chat template; and `preview`.

A text is rendered a second time with marks around every value and every message of the template's; where, without
the marks, it is not the text that the model reads (a template that trims, a function over the value), the values are
looked for in it instead. Knows prompts, messages and faces. Knows nothing about training or how a preview is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import PromptValue

from llmchain_fed.data.examples import DialogueRow, Example, RawText, calls_of
from llmchain_fed.data.messages import role_of
from llmchain_fed.data.preview import Preview, joined
from llmchain_fed.data.previewing import Span, previewed
from llmchain_fed.data.prompt import Call, Prompt
from llmchain_fed.errors import LLMChainFedError

CHAT_TEMPLATE, TEMPLATE, TOOLS = "the chat template", "the prompt", "the tools"
ADDED_SYSTEM = "a system prompt that the chat template adds"
_OPEN, _CLOSE, _FIRST = "\ue000", "\ue001", 0xE100  # private-use characters, as `LLMChain.literals` has them
_MOST = 0xF8FF - _FIRST  # labels of one text
_SYSTEM = "\ue002"

Wrap = Callable[[str, str], str]
"""(text, where it came from) → the text with marks around it"""


class Previews:
    """`preview`, for what has `as_prompt()`."""

    def preview(self, example: Any) -> Preview:
        """What is learnt of one example: its text, its tokens, which of them are learnt, and where each came from.

        Nothing is trained and nothing is sent anywhere; a composed chain runs once over the example.

        Args:
            example: In any form that training takes: `(x, completion)`, a row with its keys, `{"messages": […]}` …

        Raises:
            DataError: It has none of these forms.
            UnsupportedModelError: The model's embedding has no row for some token.
        """
        prompt = self.as_prompt()  # type: ignore[attr-defined] # the other half of the class
        return preview_over(prompt, [example])


def preview_over(prompt: Prompt, source: Any, *, count: int = 1, max_length: int | None = None) -> Preview:
    """`previewed` for a chain, a composed one or a face, with all that is known of where texts came from.

    Raises:
        DataError: See `read_examples`.
        UnsupportedModelError: The model's embedding has no row for some token.
    """
    model = prompt.model  # type: ignore[attr-defined] # what is trained has one
    added = added_system(prompt)

    def sources(example: Example | RawText, calls: Sequence[Call]) -> list[list[Span]]:
        return [[*spans, *_places(call.text, added, ADDED_SYSTEM)] for call, spans in _told(prompt, example, calls)]

    found = previewed(source, model, prompt, count=count, max_length=max_length, sources=sources)
    notes = _tool_notes(prompt, source)
    seen = bool(added) and any(added in "".join(t.text for t in row) for e in found.examples for row in e.rows)
    notes += [f"the chat template adds a system prompt of its own: {added!r}"] if seen else []
    return joined([found], notes)


def _told(prompt: Any, example: Any, calls: Sequence[Call]) -> Iterator[tuple[Call, list[Span]]]:
    marks = _Marks()
    if _is_composed(prompt):
        yield from _composed(prompt, example, calls)
        return
    try:
        marked = [call.text for call in _marked_calls(prompt, example, marks)]
    except Exception:  # what takes the value itself, a template that computes with it say, refuses it with marks
        marked = []
    untold = _without_tools(prompt, example)
    whole = _outermost(prompt)
    for at, call in enumerate(calls):
        text, spans = marks.read(marked[at]) if at < len(marked) else ("", [])
        if text != call.text or any(c in call.text for c in (_OPEN, _CLOSE)):
            spans = [span for label, value in marks.values.items() for span in _places(call.text, value, label)]
        for label, value in marks.numbers.items():  # nothing can be put around them
            spans += _places(call.text, value, label) if call.text.count(value) == 1 else []
        tools = _difference(call.text, untold[at]) if at < len(untold) else []
        yield call, [Span(0, len(call.text), whole), *tools, *spans]


def _marked_calls(prompt: Any, example: Any, marks: _Marks) -> Sequence[Call]:
    """The calls of the example with marks around its values, and around the template's own messages."""
    if isinstance(example, DialogueRow):
        dialogue = example.dialogue
        said = [_wrapped(m, f"message {at} ({role_of(m)})", marks.wrap) for at, m in enumerate(dialogue.messages)]
        values = {name: _wrapped(v, f"input {name!r}", marks.wrap) for name, v in dialogue.variables.items()}
        return calls_of(replace(example, dialogue=replace(dialogue, messages=tuple(said), variables=values)), prompt)
    return [Call(_marked_text(prompt, example.inputs, marks), "")]


def _marked_text(prompt: Any, inputs: Any, marks: _Marks, *, tools: bool = True) -> str:
    template = getattr(prompt, "prompt", None)
    call = {name: value for name, value in prompt.call_options().items() if tools or name != "tools"}
    if template is None:  # a face by itself
        return str(prompt.face.text_of(_given(inputs, marks), call))
    names = list(prompt.input_variables)
    given = inputs if isinstance(inputs, Mapping) else dict.fromkeys(names, inputs)
    defaults = {name: value for name, value in template.partial_variables.items() if isinstance(value, str)}
    values = {name: _wrapped(value, f"input {name!r}", marks.wrap) for name, value in given.items()}
    marks.numbers |= {f"input {n!r}": str(v) for n, v in given.items() if isinstance(v, (int, float))}
    values |= {n: marks.wrap(v, f"the prompt's default {n!r}") for n, v in defaults.items() if n not in values}
    value = template.format_prompt(**values)
    if prompt.adds_special_tokens:  # a string face
        return str(value.to_string())
    messages = [_wrapped(message, TEMPLATE, marks.wrap) for message in value.to_messages()]
    return str(prompt.face.text_of(messages, call))


def _given(inputs: Any, marks: _Marks) -> Any:
    """The input of a face with marks: text, messages in any form, or a prompt's value."""
    if isinstance(inputs, PromptValue):
        inputs = inputs.to_messages()
    if not isinstance(inputs, (list, tuple)):
        return _wrapped(inputs, "the input", marks.wrap)
    return [_wrapped(m, f"message {at} of the input", marks.wrap) for at, m in enumerate(inputs)]


def _wrapped(value: Any, label: str, wrap: Wrap) -> Any:
    """A value with marks around every text of it that reaches a prompt; roles and names stay what they are."""
    if isinstance(value, str):
        return wrap(value, label) if value else value
    if isinstance(value, BaseMessage):
        content = value.content
        if isinstance(content, str):
            return value.model_copy(update={"content": _wrapped(content, label, wrap)})
        return value.model_copy(update={"content": [_wrapped(block, label, wrap) for block in content]})
    if isinstance(value, Mapping):
        texts = {"content", "text"} & value.keys()
        return {k: _wrapped(v, label, wrap) if k in texts else v for k, v in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return (value[0], _wrapped(value[1], label, wrap))  # (role, content)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(part, label, wrap) for part in value) if type(value) in (list, tuple) else value
    return value


class _Marks:
    """Marks around texts, which say where they came from; and the texts themselves, for a search."""

    def __init__(self) -> None:
        self._labels: list[str] = []
        self.values: dict[str, str] = {}
        self.numbers: dict[str, str] = {}

    def wrap(self, text: str, label: str) -> str:
        if len(self._labels) >= _MOST:
            return text
        self._labels.append(label)
        if _OPEN not in text:
            self.values.setdefault(label, text)
        return f"{_OPEN}{chr(_FIRST + len(self._labels) - 1)}{text}{_CLOSE}"

    def read(self, marked: str) -> tuple[str, list[Span]]:
        """A text with marks → without them, and what they say; what stands within comes behind what is around it."""
        plain: list[str] = []
        spans: list[Span] = []
        opened: list[int] = []
        at = size = 0
        while at < len(marked):
            letter = marked[at]
            if letter == _OPEN and at + 1 < len(marked) and ord(marked[at + 1]) - _FIRST in range(len(self._labels)):
                opened.append(len(spans))
                spans.append(Span(size, size, self._labels[ord(marked[at + 1]) - _FIRST]))
                at += 2
                continue
            if letter == _CLOSE and opened:
                last = opened.pop()
                spans[last] = replace(spans[last], end=size)
            else:
                plain.append(letter)
                size += 1
            at += 1
        return "".join(plain), spans


def _places(text: str, value: str, label: str) -> list[Span]:
    """Where a value stands in a text, as it is or without the white space around it: everywhere that it does."""
    value = value if value in text else value.strip()
    if not value.strip():
        return []
    return [Span(found.start(), found.end(), label) for found in re.finditer(re.escape(value), text)]


def _without_tools(prompt: Any, example: Any) -> list[str]:
    """The texts of the example's calls without the tools that they have; none where there are none."""
    try:
        if isinstance(example, DialogueRow):
            bare = replace(example, dialogue=replace(example.dialogue, tools=()))
            return [call.text for call in calls_of(bare, prompt)] if example.dialogue.tools else []
        if not prompt.call_options().get("tools"):
            return []
        marks = _Marks()
        return [marks.read(_marked_text(prompt, example.inputs, marks, tools=False))[0]]
    except LLMChainFedError:
        return []


def _difference(text: str, other: str) -> list[Span]:
    """What a text has, in one piece, that another one lacks."""
    begin = _alike(text, other)
    end = _alike(text[begin:][::-1], other[begin:][::-1])
    return [Span(begin, len(text) - end, TOOLS)] if begin < len(text) - end else []


def _alike(ours: str, theirs: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _tool_notes(prompt: Any, source: Any) -> list[str]:
    """What to say of a chat template that has no place for tools, where some are told."""
    faces = [prompt.face] if hasattr(prompt, "face") else prompt.faces
    rows = source if isinstance(source, list) else ()
    told = hasattr(prompt, "call_options") and prompt.call_options().get("tools")
    if not (told or any(isinstance(row, Mapping) and row.get("tools") for row in rows)):
        return []
    return [note for face in faces if hasattr(face, "tool_note") and (note := face.tool_note())][:1]


def _outermost(prompt: Any) -> str:
    """What has written of a prompt's text whatever nothing else has."""
    if not prompt.adds_special_tokens:
        return CHAT_TEMPLATE
    return TEMPLATE if getattr(prompt, "prompt", None) is not None else "the input"


# --- composed chains -------------------------------------------------------------------------------------------------


def _is_composed(prompt: Any) -> bool:
    return not hasattr(prompt, "face")


def _composed(prompt: Any, example: Any, calls: Sequence[Call]) -> Iterator[tuple[Call, list[Span]]]:
    """What is known of a text that a whole chain made: control tokens, earlier answers, and the input's own texts."""
    inputs = dict(_texts(example.inputs, "the input"))
    answers: dict[str, str] = {}
    for call in calls:
        step = f"step {call.step!r}" if call.step else "the chain"
        spans = [Span(0, len(call.text), f"{step}, what stands before it included")]
        for value, label in (inputs | answers).items():
            spans += _places(call.text, value, label)
        for control in prompt.completion_controls:
            spans += _places(call.text, control, CHAT_TEMPLATE)
        yield call, spans
        answers.setdefault(str(call.completion), f"the answer of {step}")


def _texts(value: Any, label: str) -> Iterator[tuple[str, str]]:
    """(text, where it stands) of every text in an input."""
    if isinstance(value, str):
        if value.strip():
            yield value, label
    elif isinstance(value, BaseMessage):
        yield from _texts(value.text, label)
    elif isinstance(value, Mapping):
        message = "role" in value or "type" in value
        for key, part in value.items():
            if not message:
                yield from _texts(part, f"input {str(key)!r}")
            elif key in ("content", "text"):  # not its role, which the template writes
                yield from _texts(part, label)
    elif isinstance(value, (list, tuple)):
        for at, part in enumerate(value):
            yield from _texts(part, f"{label}, message {at}" if not isinstance(part, str) else label)


# --- what a chat template adds ---------------------------------------------------------------------------------------


def added_system(prompt: Any) -> str:
    """The system prompt that a face's chat template writes on its own; "" where it writes none.

    A conversation without a system message is compared with one that has it: what stands there in its place, or
    around it where it is more than a role (Llama 3's template writes dates there).
    """
    faces = [prompt.face] if hasattr(prompt, "face") else list(prompt.faces)
    face = faces[0]
    if face.adds_special_tokens:
        return ""
    call = dict(prompt.call_options()) if hasattr(prompt, "call_options") else {}
    call.pop("tools", None)
    try:
        without = str(face.text_of([HumanMessage("x")], call))
        given = str(face.text_of([SystemMessage(_SYSTEM), HumanMessage("x")], call))
    except LLMChainFedError:  # no place for a system message, or none for a user's alone
        return ""
    before, mark, behind = given.partition(_SYSTEM)
    if not mark:
        return ""
    if without.startswith(before) and without.endswith(behind):
        instead = without[len(before) : len(without) - len(behind)].strip()
        if any(c.isalpha() for c in instead):
            return instead
    controls = sorted(face.own_controls | face.model.control_tokens(), key=len, reverse=True)
    parts = re.split("|".join(map(re.escape, controls)), before) if controls else [before]
    words = [part.strip() for part in parts if re.search(r"\S\s+\S", part.strip())]
    return max(words, key=len, default="")
