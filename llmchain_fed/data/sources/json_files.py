"""Rows out of JSON text: an object a line, or one list of objects, each with the line in which it begins.

Knows both formats; a list is read object by object, so that memory is taken for one of them. Knows nothing of what a
row must have, or how a file is opened.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from llmchain_fed.data.sources.text_files import LONGEST, NUL, checked_lines, refuse
from llmchain_fed.errors import EmptyParticipantError
from llmchain_fed.untrusted import shown

_DEEPEST = 64
"""levels of lists and objects in an object; Python's own limit depends on who calls"""
_CHUNK = 2**16  # characters
_SPACES = re.compile("[ \\t\\n\\r]*")
_KEY = "data"
"""under which an object may have the list"""


def read_jsonl(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """Every object with its line; a blank line is passed over.

    Raises:
        DataError: A line cannot be read, or is no object, or there is none (EmptyParticipantError).
    """
    number, found = 0, 0
    for number, line in enumerate(checked_lines(file, name), start=1):
        if line.strip():
            found += 1
            yield number, _object(line, name, number)
    if not found:
        _refuse_empty(name, number)


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    """The object in a line of JSON; NaN is a missing value, as Python's and pandas' writers have it."""
    if line.count("[") + line.count("{") > _DEEPEST and _depth(line) > _DEEPEST:
        refuse(name, number, f"is nested more than {_DEEPEST} levels deep: no example needs that")
    try:
        row: Any = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        hint = " It begins like a JSON list: write one object a line" if line.lstrip()[:1] == "[" else ""
        refuse(name, number, f"is not JSON: {error}.{hint}".rstrip("."))
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, for one
        refuse(name, number, f"cannot be read: {str(error)[:200].rstrip('.')}")
    return _checked(row, name, number)


def _checked(row: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        refuse(name, number, f"is {kind}, not an object such as {{'text': …, 'completion': …}}")
    return row


def _depth(line: str) -> int:
    """Levels of lists and objects, brackets within texts left out."""
    deepest = level = 0
    inside = escaped = False
    for c in line:
        if inside:
            inside, escaped = escaped or c != '"', c == "\\" and not escaped
        elif c == '"':
            inside = True
        elif c in "[{":
            level += 1
            deepest = max(deepest, level)
        elif c in "]}":
            level -= 1
    return deepest


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        msg = f"it has the key {twice!r:.80} twice, and only one value can count"
        raise ValueError(msg)
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        return math.nan
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


def _number(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):
        msg = f"the number {digits[:40]} is larger than any float; as a text in quotes it would stay as it is"
        raise ValueError(msg)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_twins, parse_constant=_constant, parse_float=_number)


def _refuse_empty(name: str, number: int) -> NoReturn:
    msg = f"the participant has no usable example: {shown(name, 255)} ends at line {max(number, 1)} without one."
    raise EmptyParticipantError(msg)


# --- one list ---------------------------------------------------------------------------------------------------------


def read_json(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """Every object of a list with the line in which it begins; the list may stand under the key "data" of an object.

    Raises:
        DataError: The text is neither, or no JSON, or an entry is no object; or there is none (EmptyParticipantError).
    """
    text = _Text(file, name)
    first = text.next()
    if first == "{":
        _go_to_list(text)
    elif first != "[":
        what = "is the end of an empty file" if not first else f"begins with {first!r}"
        text.refuse(f'{what}: a .json file is a list of objects, [{{…}}, {{…}}], or {{"data": [{{…}}, …]}}')
    text.skip()
    found = 0
    while text.next() != "]":
        if found:
            text.expect(",", "after an entry of the list")
            text.next()
        line = text.line
        yield line, _checked(text.value(), name, line)
        found += 1
    text.skip()
    if first == "{":
        while text.next() == ",":
            text.skip()
            if _key(text) == _KEY:
                _refuse_second(text)
            text.next()
            text.value()
        text.expect("}", "after the list")
    if left := text.next():
        text.refuse(f"goes on with {left!r} behind the end. One list is read; an object a line goes into a .jsonl file")
    if not found:
        _refuse_empty(name, text.line)


def is_object(line: str) -> bool:
    """Whether a line is an object by itself that has no list of rows: one row, then, of a file of one a line."""
    if not line.lstrip().startswith("{") or line.count("[") + line.count("{") > 1000:
        return False
    try:
        return not isinstance(_DECODER.decode(line).get(_KEY), list)
    except (ValueError, RecursionError):
        return False


def _go_to_list(text: _Text) -> None:
    """To the list of an object that has one."""
    keys: list[str] = []
    before = False
    text.skip()
    while text.next() != "}":
        if keys:
            text.expect(",", "after a value")
        key = _key(text)
        if key == _KEY and before:
            _refuse_second(text)
        if text.next() == "[" and key == _KEY:
            return
        keys, before = [*keys[-20:], key], before or key == _KEY
        text.value()
    text.refuse(
        f"ends an object with the keys {shown(keys, 200)}, none of which is {_KEY!r} with a list of objects. Write "
        "[{…}, {…}], or an object a line in a .jsonl file"
    )


def _refuse_second(text: _Text) -> NoReturn:
    text.refuse(f"has the key {_KEY!r} a second time, and only one list can count. Join the two, or rename one")


def _key(text: _Text) -> str:
    if text.next() != '"':
        text.refuse("is not JSON: a key in double quotes should stand here")
    key = text.value()
    text.next()
    text.expect(":", "after a key")
    return str(key)


class _Text:
    """Text that is read on as it is needed: where one stands in it, and in which line."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._buffer, self._at, self._whole = "", 0, False
        self._before = 0  # characters of the line that the buffer begins in
        self.line = 1

    def next(self) -> str:
        """The next character that is no space, which is not passed; "" at the end."""
        while True:
            self._advance(_SPACES.match(self._buffer, self._at).end())  # type: ignore[union-attr] # it always matches
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read_on():
                return ""

    def skip(self) -> None:
        """Passes that character."""
        self._advance(self._at + 1)

    def expect(self, wanted: str, where: str) -> None:
        """Passes the character that should stand here."""
        if (found := self.next()) != wanted:
            self.refuse(f"is not JSON: {wanted!r} should stand {where}, not {found!r}" if found else "ends too early")
        self.skip()

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                found, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                near = error.pos >= len(self._buffer.rstrip()) - 16  # cut off within a word or an escape
                behind = error.pos - self._at
                if (near or error.msg.startswith("Unterminated")) and self._read_on():
                    continue
                self._advance(self._at + behind)
                self.refuse(f"is not JSON: {error.msg} (column {self._column()})")
            except RecursionError:
                self.refuse(f"is nested more than {_DEEPEST} levels deep: no example needs that")
            except ValueError as error:  # a number of more digits than Python reads, for one
                self.refuse(f"cannot be read: {str(error)[:200].rstrip('.')}")
            size, at_end = end - self._at, end == len(self._buffer)
            if not at_end or not self._read_on():  # a number at the end may go on
                break
        text = self._buffer[self._at : self._at + size]
        if len(text) > LONGEST:
            self._refuse_longer()
        if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
            self.refuse(f"is nested more than {_DEEPEST} levels deep: no example needs that")
        self._advance(self._at + size)
        return found

    def refuse(self, what: str) -> NoReturn:
        """Raises the error of the line that one stands in."""
        refuse(self._name, self.line, what)

    def _column(self) -> int:
        start = self._buffer.rfind("\n", 0, self._at)
        return self._at - start if start >= 0 else self._before + self._at + 1

    def _advance(self, to: int) -> None:
        self.line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _read_on(self) -> bool:
        """Takes as much again into the buffer as is left in it; whether there was any."""
        if self._whole:
            return False
        self._before = self._column() - 1
        self._buffer, self._at = self._buffer[self._at :], 0
        if len(self._buffer) > LONGEST:
            self._refuse_longer()
        more = self._file.read(max(_CHUNK, len(self._buffer)))
        self._whole = not more
        if "\0" in more:
            self.line += self._buffer.count("\n") + more.count("\n", 0, more.index("\0"))
            self.refuse(NUL)
        self._buffer += more
        return bool(more)

    def _refuse_longer(self) -> NoReturn:
        self.refuse(f"begins an entry of more than the {LONGEST:,} characters of an example. Make them shorter")
