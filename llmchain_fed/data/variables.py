"""The values that an example gives to a prompt's variables, and the checks that they must pass.

Knows mappings and the prompt's variables. Knows nothing of the forms of examples, tokens or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.sources.missing import is_blank
from llmchain_fed.errors import DataError, PromptVariablesError, TemplatedTwiceError
from llmchain_fed.untrusted import shown

_LARGEST = 10**4300  # Python refuses to write longer numbers, and would do so in the middle of rendering


def check_inputs(inputs: Mapping[str, Any] | str, prompt: Prompt) -> None:
    """Makes sure that the inputs are the prompt's variables, if it has some, with values that can be put into it.

    Raises:
        DataError: A value would not be templated as what it is.
        PromptVariablesError: A variable is missing or unknown.
        TemplatedTwiceError: A value already carries the template's text.
    """
    if prompt.input_variables is None:
        return
    needed = set(prompt.input_variables)
    allowed = needed | set(prompt.optional_variables)
    if not isinstance(inputs, Mapping) and is_blank(inputs):
        return  # whatever the variables are called, there is nothing in it
    if isinstance(inputs, str):
        if len(needed) != 1:
            msg = f"the prompt has the variables {sorted(needed)}, so one string is not enough. Pass a mapping of them."
            raise PromptVariablesError(msg)
        inputs = {next(iter(needed)): inputs}
    if isinstance(inputs, (list, tuple)) and len(needed) == 1:  # messages for a placeholder
        inputs = {next(iter(needed)): list(inputs)}
    if not isinstance(inputs, Mapping):
        msg = f"inputs are a mapping of the variables {sorted(needed)} or a string, got {type(inputs).__name__}."
        raise PromptVariablesError(msg)
    missing, extra = sorted(needed - inputs.keys()), sorted(map(str, inputs.keys() - allowed))
    if missing or extra:
        msg = (
            f"the prompt takes {sorted(needed)}"
            + (f", {shown(missing, 300)} is missing" if missing else "")
            + (f", {shown(extra, 300)} is unknown" if extra else "")
            + ". Rename or drop keys; final text is passed as RawText(prompt, completion)."
        )
        raise PromptVariablesError(msg)
    for name, value in inputs.items():
        if isinstance(value, (bytes, bytearray)):
            msg = f"`{name}` is {type(value).__name__}, which would be templated as {value!r:.40}. Decode it first."
            raise DataError(msg)
        if isinstance(value, int) and abs(value) >= _LARGEST:
            msg = f"`{name}` is a number of more digits than Python writes (4300). Pass it as text."
            raise DataError(msg)
        if isinstance(value, float) and math.isinf(value):
            msg = f"`{name}` is infinite, which would be templated as {value!s}. Leave the example out, or pass a text."
            raise DataError(msg)
        if isinstance(value, str) and not is_unicode(value):
            msg = f"`{name}` has half a surrogate pair, which is no character. Decode the source anew."
            raise DataError(msg)
        if isinstance(value, str) and carries(value, prompt.literals):
            msg = (
                f"`{name}` already carries the template's text ({value!r:.80}): it would be templated "
                "twice. Pass the bare value, or final text as RawText(prompt, completion)."
            )
            raise TemplatedTwiceError(msg)


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def carries(value: str, literals: Sequence[str]) -> bool:
    """Whether `value` contains all of a template's fixed texts in order, beginning or ending with one.

    Templates with fewer than four fixed letters are never recognised: too much ordinary text looks like them.

    >>> carries("Translate to French: Page locked", ["Translate to French: ", ""])
    True
    >>> carries("Page locked", ["Translate to French: ", ""])
    False
    """
    texts = [stripped for text in literals if (stripped := text.strip())]
    if sum(c.isalpha() for c in "".join(texts)) < 4:
        return False
    at = 0
    for text in texts:
        found = value.find(text, at)
        if found < 0:
            return False
        at = found + len(text)
    stripped = value.strip()
    return stripped.startswith(texts[0]) or stripped.endswith(texts[-1])
