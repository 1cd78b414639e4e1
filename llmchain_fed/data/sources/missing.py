"""Missing values: what stands where a value should be and is none, and what follows for an example.

Knows the markers of Python, numpy, pandas, pyarrow and JSON, by their value or their type's name, and imports none of
these. Knows nothing about files, prompts or tokens.
"""

from __future__ import annotations

import numbers
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

_MARKERS = {("pandas", "NAType"), ("pandas", "NaTType"), ("numpy", "MaskedConstant")}
"""(package, type): values that are nothing but markers, and refuse to be compared"""
_NUMPY_WORDS = ("nan", "NaT", "<NA>")
"""what numpy makes of a marker that it is given among texts: `np.array(["a", nan])` contains two strings"""
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Unicode categories without ink: spaces, line breaks, controls, byte order marks, zero-width joiners"""


def is_missing(value: Any) -> bool:
    """Whether this is the marker of a value that is not there; a collection that contains one is as good as missing.

    The word "nan" that somebody wrote is text, and so are the other words that readers take for markers.

    >>> [is_missing(v) for v in (None, float("nan"), "nan", "", 0, ["a", None], [])]
    [True, True, False, False, False, True, False]
    """
    if value is None:
        return True
    if calls := getattr(value, "tool_calls", None):  # a message: its calls' arguments reach the template as they are
        return isinstance(calls, list) and any(_is_missing_within(call.get("args")) for call in calls)
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if isinstance(value, str):
        return package == "numpy" and str(value) in _NUMPY_WORDS
    if (package, kind.__name__) in _MARKERS:
        return True
    if isinstance(value, Decimal):  # a signalling NaN raises where it is compared
        return value.is_nan()
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(is_missing(part) for part in value)
    if isinstance(value, Mapping):  # null says something there: a message may have a role, tool calls and no content
        return any(part is not None and is_missing(part) for part in value.values())
    if package == "pyarrow" and hasattr(value, "as_py"):
        return is_missing(value.as_py())
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # of numpy, pandas and torch alike
        plain = value.tolist()
        return is_missing(plain) if plain is None or isinstance(plain, (float, list)) else _unlike_itself(value)
    return isinstance(value, numbers.Number) and _unlike_itself(value)


def _is_missing_within(value: Any) -> bool:
    """Whether data contain a marker other than None, which says something there."""
    if isinstance(value, Mapping):
        return any(_is_missing_within(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_missing_within(part) for part in value)
    return value is not None and is_missing(value)


def _unlike_itself(value: Any) -> bool:
    """NaN and NaT are the only values that differ from themselves."""
    try:
        return bool(value != value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return False


def is_blank(value: Any) -> bool:
    r"""Whether nothing can be read in it: missing, or text without a visible character.

    Messages are blank where every one is. An empty list is not: a conversation without history is one.

    >>> [is_blank(v) for v in (" \n", "\ufeff\u200b", "a", 0, [])]
    [True, True, False, False, False]
    """
    if isinstance(value, str):
        return is_missing(value) or all(unicodedata.category(c) in _INVISIBLE for c in value)
    if isinstance(value, (list, tuple)) and value and (said := _said_by(value)):
        return all(said_nothing for _, said_nothing in said) or any(nothing for role, nothing in said if role == "user")
    return is_missing(value)


def _said_by(messages: Sequence[Any]) -> list[tuple[str, bool]]:
    """The role of each message, and whether it says nothing: no text, and no call of a tool; empty for no messages."""
    from llmchain_fed.data import messages as form  # here, so that telling a missing value needs nothing else

    if not form.are_messages(messages):
        return []
    found = []
    for message in messages:
        content = form.content_of(message)
        parts = content if isinstance(content, (list, tuple)) else [content]
        texts = [part.get("text", part) if isinstance(part, Mapping) else part for part in parts]
        nothing = not form.calls_of_tools(message) and all(is_blank(text) for text in texts)
        found.append((form.role_of(message), nothing))
    return found


def _answers_nothing(completion: Any) -> bool:
    """Whether this is an assistant's message without text, thoughts or calls."""
    from llmchain_fed.data import messages as form

    if not form.is_message(completion) or form.role_of(completion) != "assistant" or form.thought_in(completion):
        return False
    return all(nothing for _, nothing in _said_by([completion]))


def filled(item: Any) -> Any:
    """A row as given, with the empty text for every missing value, so that all forms of a row are treated alike.

    A named tuple with a field `completion` becomes a mapping: its fields say more than their order.

    >>> filled({"text": None, "completion": "b"})
    {'text': '', 'completion': 'b'}
    >>> filled((float("nan"), "b"))
    ('', 'b')
    """
    if "completion" in getattr(item, "_fields", ()) and hasattr(item, "_asdict"):
        item = item._asdict()
    if isinstance(item, Mapping):
        return _filled(item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, completion = item
        return (_filled(inputs) if isinstance(inputs, Mapping) else _text_for(inputs)), completion_in(completion)
    inputs = getattr(item, "inputs", None)
    if isinstance(inputs, Mapping) and (found := _filled(inputs)) is not inputs:
        return replace(item, inputs=found)
    if inputs is not None and not isinstance(inputs, Mapping) and is_missing(inputs):
        return replace(item, inputs="")
    return item


def completion_in(value: Any) -> Any:
    """A completion as given, or the empty text where it is missing; within an object, null is a value of its own.

    >>> completion_in({"grade": None, "sizes": [1, None]}), completion_in({"size": float("nan")})
    ({'grade': None, 'sizes': [1, None]}, '')
    """
    return "" if _is_no_completion(value) else value


def _is_no_completion(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_missing_within(value)
    return is_missing(value)


def _filled(row: Mapping[Any, Any]) -> Mapping[Any, Any]:
    def found(key: Any, value: Any) -> Any:
        return completion_in(value) if key == "completion" and isinstance(value, Mapping) else _text_for(value)

    made = {key: found(key, value) for key, value in row.items()}
    return made if any(made[key] is not value for key, value in row.items()) else row


def _text_for(value: Any) -> Any:
    return "" if is_missing(value) else value


def is_empty(inputs: Any, completion: Any) -> bool:
    """Whether an example has nothing to teach: no completion, or not all of what it should be answered to.

    One blank variable among several counts too: a CSV file and a frame know no difference between a text that is
    empty and one that is missing. That is so for variables with a default as well, for a row that names one and gives
    nothing does not say that it wants the default.
    """
    nothing = _is_no_completion(completion) if isinstance(completion, Mapping) else is_blank(completion)
    if nothing or _answers_nothing(completion):
        return True
    if isinstance(inputs, Mapping):
        return any(is_blank(value) for value in inputs.values())
    return is_blank(inputs)
