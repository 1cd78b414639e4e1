"""Calls of tools read out of an answer, whole or while it comes.

Knows how a model writes calls. Knows nothing about tools, their schemas or LangChain.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmchain_fed.model.tool_format import ToolFormat


@dataclass(frozen=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class Called:
    """A piece of a call: its name, which comes first, or some of its arguments' JSON."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Broken:
    """What begins as a call and is none."""

    text: str


class CallReader:
    """Reads an answer piece by piece; the white space before calls belongs to them.

    What is not written exactly as the model writes calls is kept until the answer ends, and then read as JSON with a
    name and arguments, whatever stands around it.

    Args:
        form: How the model writes calls.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form, self._marker = form, form.marker
        behind = form.begin.index(self._marker) + len(self._marker)
        self._behind = form.begin[behind:]
        self._kept, self._state, self._count = "", "text", 0
        self._named = False
        """whether the call that is being read has given its name on"""

    def feed(self, piece: str) -> Iterator[Said | Called]:
        """What can be told now."""
        self._kept += piece
        while (step := self._step()) is not None:
            yield from step

    def _step(self) -> list[Said | Called] | None:
        """What the kept text gives; None where more must come."""
        if self._state == "text":
            return self._in_text()
        if self._state == "begun":
            return self._past(self._behind, "name")
        if self._state == "name":
            return self._in_name()
        if self._state == "arguments":
            return self._in_arguments()
        if self._state == "behind":
            return self._behind_arguments()
        return None

    def _in_text(self) -> list[Said | Called] | None:
        at = self._kept.find(self._marker)
        if at >= 0:
            said, self._kept = self._kept[:at].rstrip(), self._kept[at + len(self._marker) :]
            self._state = "begun"
            return [Said(said)] if said else []
        begun = next((n for n in range(len(self._marker) - 1, 0, -1) if self._kept.endswith(self._marker[:n])), 0)
        ready = self._kept[: len(self._kept) - begun].rstrip()
        self._kept = self._kept[len(ready) :]
        return [Said(ready)] if ready else None

    def _past(self, text: str, state: str) -> list[Said | Called] | None:
        """Goes on behind a text of the form."""
        if self._kept.startswith(text):
            self._kept, self._state = self._kept[len(text) :], state
            return []
        if not text.startswith(self._kept):
            self._state = "free"
        return None

    def _in_name(self) -> list[Said | Called] | None:
        name, found, rest = self._kept.partition(self._form.middle)
        if not found:
            return None
        self._kept, self._state, self._named = rest, "arguments", True
        self._scan = _Scan()
        return [Called(self._count, name, "")]

    def _in_arguments(self) -> list[Said | Called] | None:
        if not self._kept:
            return None
        end = self._scan.feed(self._kept)
        piece = self._kept if end is None else self._kept[:end]
        self._kept = self._kept[len(piece) :]
        if end is not None:
            self._state, self._named, self._count = "behind", False, self._count + 1
        return [Called(self._count - (end is not None), None, piece)]

    def _behind_arguments(self) -> list[Said | Called] | None:
        again, end = self._form.again, self._form.end
        if again is not None and self._kept.startswith(again):
            self._kept, self._state = self._kept[len(again) :], "name"
            return []
        if self._kept.startswith(end) and (again is None or not again.startswith(self._kept)):
            rest = self._kept[len(end) :]
            if rest.strip():
                self._kept, self._state = rest, "text"
                return []
            return None
        if not end.startswith(self._kept) and not (again or "").startswith(self._kept):
            self._state = "text"  # what else follows is text, or another call
            self._kept = self._kept.lstrip("}")
            return []
        return None

    def end(self) -> Iterator[Said | Called | Broken]:
        """What was held back, once the answer has ended."""
        kept, self._kept = self._kept, ""
        if self._state == "text" and (kept.strip() or not self._count):
            yield Said(kept)
        elif self._state in ("begun", "name", "free"):
            for part in kept.split(self._marker):
                call = _json_call(part)
                if call is None:
                    yield Broken(self._marker + part)
                else:
                    yield Called(self._count, call[0], call[1])
                    self._count += 1


class _Scan:
    """Where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, piece: str) -> int | None:
        """The place in the piece behind its end; None where it has not ended."""
        for at, char in enumerate(piece):
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def _json_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments of a call that is JSON somewhere in a text."""
    start = text.find("{")
    try:
        found: Any = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    found = found.get("function", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def read_calls(text: str, form: ToolFormat) -> tuple[str, list[tuple[str, str]], list[str]]:
    r"""An answer → its text, the name and the arguments of each call, and what begins as a call and is none.

    >>> from llmchain_fed.model.tool_format import OURS
    >>> read_calls("Well.\n" + OURS.written([("add", '{"a": 1}')]), OURS)
    ('Well.', [('add', '{"a": 1}')], [])
    """
    reader = CallReader(form)
    said, broken = "", []
    calls: dict[int, list[str]] = {}
    for part in [*reader.feed(text), *reader.end()]:
        if isinstance(part, Said):
            said += part.text
        elif isinstance(part, Broken):
            broken.append(part.text)
        else:
            name, arguments = calls.setdefault(part.index, ["", ""])
            calls[part.index] = [name + (part.name or ""), arguments + part.arguments]
    return said, [(name, arguments) for name, arguments in calls.values()], broken
