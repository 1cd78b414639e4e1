"""The forms an example may have, and the checks it must pass before anything is made of it.

Knows mappings and the prompt's variables (a prompt is anything that renders inputs to text). Knows nothing about
tokens, models or training; files are read in `readers`, and what counts as a missing value stands in `missing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from llmchain_fed.data.missing import filled, is_blank, is_empty, is_missing
from llmchain_fed.data.prompt import Call, Prompt, plain_text
from llmchain_fed.data.readers import numbered
from llmchain_fed.errors import DataError, PromptVariablesError, TemplatedTwiceError
from llmchain_fed.untrusted import shown

_LARGEST = 10**4300  # Python refuses to write longer numbers, and would do so in the middle of rendering
Examples = Any
"""What is accepted as examples: an iterable of the forms of `read_examples`, a JSONL or CSV path, a DataLoader."""


@dataclass(frozen=True)
class Example:
    """What you would pass to `invoke`, and what you want back.

    >>> Example(inputs={"text": "Page locked"}, completion="Page verrouillée")
    Example(inputs={'text': 'Page locked'}, completion='Page verrouillée')

    Args:
        inputs: A mapping of the prompt's variables, or a string where the prompt has one; what a bare model takes.
        completion: The wanted answer: its text, or what the chain's model writes as one (a message, an object).
    """

    inputs: Any
    completion: Any

    def __post_init__(self) -> None:
        if not isinstance(self.completion, str) and is_missing(self.completion):  # as everywhere: counted as empty
            object.__setattr__(self, "completion", "")
        refused = isinstance(self.completion, (int, float, complex, bytes, bytearray, type))
        if refused or (hasattr(self.completion, "__array__") and not isinstance(self.completion, str)):
            plain_text(self.completion)
        _check_unicode(self.completion, self.inputs)

    @property
    def empty(self) -> bool:
        """Whether a value is missing or blank, so that there is nothing to learn: counted, and not trained on."""
        return is_empty(self.inputs, self.completion)


class PromptRow(Example):
    """An example out of a row of `prompt` and `completion`, whose prompt was taken for the input."""


@dataclass(frozen=True)
class RawText:
    r"""A prompt that is final text, used as it is: no template, no chat template; its author is you.

    >>> RawText(prompt="Translate to French: Page locked\n", completion="Page verrouillée").completion
    'Page verrouillée'

    Args:
        prompt: All of the text before the answer, special tokens included.
        completion: The wanted answer.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("completion", self.completion)):
            if not isinstance(value, str) and is_missing(value):  # as everywhere: counted as empty
                object.__setattr__(self, name, "")
            elif not isinstance(value, str):
                msg = (
                    f"RawText is final text, got {type(value).__name__} as `{name}`. What a template is to render "
                    "goes into (inputs, completion)."
                )
                raise DataError(msg)
        _check_unicode(self.completion, self.prompt)

    @property
    def empty(self) -> bool:
        """Whether the prompt or the completion is missing or blank: counted, and not trained on."""
        return is_empty(self.prompt, self.completion)


def _check_unicode(*texts: Any) -> None:
    for text in texts:
        if isinstance(text, str) and not _is_unicode(text):
            msg = f"the text {text!r:.60} has half a surrogate pair, which is no character. Decode the source anew."
            raise DataError(msg)


def calls_of(example: Example | RawText, prompt: Prompt | None) -> Sequence[Call]:
    """What the model reads for an example and what it should answer, call by call.

    Raises:
        DataError: The example has variables, and there is nothing to render them; or its completion is no answer.
    """
    if isinstance(example, RawText):
        return (Call(example.prompt, example.completion),)
    if prompt is None:
        msg = (
            f"{example.inputs!r:.80} needs a prompt to become text. Pass the chain, or final text as "
            "RawText(prompt, completion)."
        )
        raise DataError(msg)
    return prompt.calls(example.inputs, example.completion)


def prompt_text(example: Example | RawText, prompt: Prompt | None) -> str:
    """The text that the model sees before its first answer.

    Raises:
        DataError: As `calls_of`.
    """
    return calls_of(example, prompt)[0].text


def read_examples(source: Examples, prompt: Prompt | None = None) -> Iterator[Example | RawText]:
    """Every example of a source, checked.

    Accepted forms: `(x, completion)` with x what `invoke` takes; a mapping of the prompt's variables plus
    `"completion"`; `{"prompt": x, "completion": text}` (the TRL format), where x is the input of a bare model, or the
    one variable of a prompt; `Example`; `RawText`. The source is any iterable of these (a `datasets.Dataset` is one), a
    frame of pandas or polars, or the path of a JSONL or CSV file.

    A missing value (None, NaN, NaT, `pandas.NA` …) or a blank text makes an example `empty`, in every form alike; in a
    CSV file so do the words that programs write for it, such as NaN, NA or NULL, unless they stand in quotes.

    Without a prompt a string is the final prompt itself.

    Raises:
        DataError: It is no source of examples, or an entry has none of these forms; its position is named.
        PromptVariablesError: An example has other variables than the prompt.
        TemplatedTwiceError: A value already carries the template's text.
    """
    for place, item in numbered(source):
        try:
            item = filled(item)
            _check_no_header(item, prompt)
            example = _parse(item, prompt)
            if prompt is not None and isinstance(example, Example) and prompt.input_variables is not None:
                _check_inputs(example.inputs, prompt)
        except DataError as error:
            raise type(error)(f"{place}: {error}") from None  # noqa: EM102
        yield example


def _check_no_header(item: Any, prompt: Prompt | None) -> None:
    """Makes sure that a row is not the names of the columns, which a reader of lists, or two joined files, leave."""
    variables = (prompt.input_variables if prompt is not None else None) or ()
    texts = isinstance(item, tuple) and all(isinstance(part, str) for part in item)
    pair = texts and item[0] in variables and item[1] == "completion"
    if pair or (
        isinstance(item, Mapping) and len(item) > 1 and all(isinstance(v, str) and k == v for k, v in item.items())
    ):
        msg = f"{item!r:.80} are the names of the columns, not an example. Leave the header out."
        raise DataError(msg)


def _parse(item: Any, prompt: Prompt | None) -> Example | RawText:
    if isinstance(item, RawText):
        return item
    if isinstance(item, Example):
        example = item
    elif isinstance(item, Mapping):
        example = _parse_mapping(item, prompt)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        example = Example(inputs=item[0], completion=item[1])
    else:
        msg = (
            f"cannot read {item!r:.80}. Write (inputs, completion), a mapping with the prompt's variables and "
            "'completion', or {'prompt': …, 'completion': …}."
        )
        raise DataError(msg)
    if prompt is None and isinstance(example.inputs, str):  # a LocalModel takes final text
        return RawText(example.inputs, example.completion)
    return example


def _parse_mapping(item: Mapping[Any, Any], prompt: Prompt | None) -> Example:
    if "completion" not in item:
        msg = f"no 'completion' among the keys {shown(sorted(map(str, item)), 300)}: nothing to learn."
        if "messages" in item:
            msg += " Of a conversation, pass (all messages before the answer, the answer's text) to a chat model."
        raise DataError(msg)
    rest = {k: v for k, v in item.items() if k != "completion"}
    if prompt is not None and prompt.any_input:
        return Example(inputs=rest, completion=item["completion"])
    bare = prompt is None or prompt.input_variables is None
    variables = [] if prompt is None or prompt.input_variables is None else list(prompt.input_variables)
    optional = [] if prompt is None else list(prompt.optional_variables)
    if set(rest) != {"prompt"} or "prompt" in (*variables, *optional):
        if bare:
            msg = (
                f"the keys {shown(sorted(map(str, item)), 300)} name variables, and there is no template to put them "
                "into. Write {'prompt': …, 'completion': …}, (text, completion), or pass a chain."
            )
            raise DataError(msg)
        return Example(inputs=rest, completion=item["completion"])
    if bare:
        return PromptRow(inputs=rest["prompt"], completion=item["completion"])
    if len(variables) != 1:
        msg = (
            f"a row of 'prompt' and 'completion' does not say which of the variables {sorted(variables)} its prompt "
            "is. Name them as the template does, or pass final text as RawText(prompt, completion)."
        )
        raise PromptVariablesError(msg)
    return PromptRow(inputs={variables[0]: rest["prompt"]}, completion=item["completion"])


def _check_inputs(inputs: Mapping[str, Any] | str, prompt: Prompt) -> None:
    needed = set(prompt.input_variables or ())
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
        if isinstance(value, str) and not _is_unicode(value):
            msg = f"`{name}` has half a surrogate pair, which is no character. Decode the source anew."
            raise DataError(msg)
        if isinstance(value, str) and carries(value, prompt.literals):
            msg = (
                f"`{name}` already carries the template's text ({value!r:.80}): it would be templated "
                "twice. Pass the bare value, or final text as RawText(prompt, completion)."
            )
            raise TemplatedTwiceError(msg)


def _is_unicode(text: str) -> bool:
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


def is_ready_tensors(source: Examples) -> bool:
    """Whether the source is a torch DataLoader, whose batches are used as they are."""
    return isinstance(source, DataLoader)
