"""The forms an example may have, and the checks it must pass before anything is made of it.

Knows files, mappings and the prompt's variables (a prompt is anything that renders inputs to text). Knows nothing about
tokens, models or training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import DataLoader

from llmchain_fed.errors import DataError, PromptVariablesError, TemplatedTwiceError

Examples = Any
"""What is accepted as examples: an iterable of the forms of `read_examples`, a JSONL or CSV path, a DataLoader."""


class Prompt(Protocol):
    """What training needs of a prompt: the same rendering that inference uses."""

    @property
    def input_variables(self) -> Sequence[str]:
        """The variables an example must give."""

    @property
    def optional_variables(self) -> Sequence[str]:
        """The variables an example may give, because the prompt has a default for them."""

    @property
    def literals(self) -> Sequence[str]:
        """The template's fixed texts, in order."""

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens to the rendered text."""

    def render(self, inputs: Mapping[str, Any] | str) -> str:
        """Inputs → the text that the model sees."""


@dataclass(frozen=True)
class Example:
    """What you would pass to `chain.invoke`, and what you want back.

    >>> Example(inputs={"text": "Page locked"}, completion="Page verrouillée")
    Example(inputs={'text': 'Page locked'}, completion='Page verrouillée', prompt=None)

    Args:
        inputs: A mapping of the prompt's variables, or a string where the prompt has one.
        completion: The wanted answer.
        prompt: Instead of `inputs`: the prompt as final text, used as it is.
    """

    inputs: Mapping[str, Any] | str | None = None
    completion: str = ""
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.completion, str):
            msg = (
                f"a completion is text, got {type(self.completion).__name__} ({self.completion!r:.60}). "
                "Convert it to the words the model should write."
            )
            raise DataError(msg)
        if (self.inputs is None) == (self.prompt is None):
            msg = (
                "an Example has either `inputs` (templated by the chain) or `prompt` (final text), not both or neither."
            )
            raise DataError(msg)
        for text in (self.completion, self.prompt, self.inputs):
            if isinstance(text, str) and not _is_unicode(text):
                msg = (
                    f"the text {text!r:.60} holds half a surrogate pair, which is no character. Decode the source anew."
                )
                raise DataError(msg)
        if self.prompt is not None and not isinstance(self.prompt, str):
            msg = f"`prompt` is final text, got {type(self.prompt).__name__}. Pass variables as `inputs`."
            raise DataError(msg)


def read_examples(source: Examples, prompt: Prompt | None = None) -> Iterator[Example]:
    """Every example of a source, checked.

    Accepted forms: `(x, completion)` with x what `chain.invoke` takes; a mapping of the prompt's variables plus
    `"completion"`; `{"prompt": text, "completion": text}`, used as it is (the TRL format); `Example`. The source is any
    iterable of these (a `datasets.Dataset` is one) or the path of a JSONL or CSV file.

    Args:
        source: Where they come from.
        prompt: What renders inputs; without one a string is the final prompt itself.

    Raises:
        DataError: Not a source of examples, or an entry of none of these forms; its position is named.
        PromptVariablesError: Variables other than the prompt's.
        TemplatedTwiceError: A value that already carries the template's text.
    """
    for number, item in enumerate(_items(source)):
        try:
            example = _parse(item, prompt)
            if prompt is not None and example.inputs is not None:
                _check_inputs(example.inputs, prompt)
        except DataError as error:
            raise type(error)(f"example {number}: {error}") from None  # noqa: EM102
        yield example


def _items(source: Examples) -> Iterable[Any]:
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        msg = (
            "examples are a list of (inputs, completion), a JSONL or CSV path or a dataset, got "
            f"{type(source).__name__}."
        )
        raise DataError(msg)
    return source


def _read_file(path: Path) -> Iterator[Any]:
    if not path.is_file():
        msg = f"there is no file {str(path)!r}. Give the path of a .jsonl or .csv file."
        raise DataError(msg)
    if path.suffix not in (".jsonl", ".csv"):
        msg = (
            f"{path.name}: examples are read from .jsonl or .csv files, not {path.suffix or 'files without a suffix'}."
        )
        raise DataError(msg)
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
    with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        try:
            yield from csv.DictReader(file, strict=True) if path.suffix == ".csv" else _read_lines(file, path.name)
        except UnicodeDecodeError as error:
            msg = f"{path.name} is not UTF-8 text: {error}. Save it as UTF-8."
            raise DataError(msg) from None
        except csv.Error as error:
            msg = f"{path.name} is not CSV: {error}. Quote values that hold commas, quotes or line breaks."
            raise DataError(msg) from None


def _read_lines(file: Iterable[str], name: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                msg = f"{name}, line {number} is not JSON: {error}."
                raise DataError(msg) from None


def _parse(item: Any, prompt: Prompt | None) -> Example:
    if isinstance(item, Example):
        example = item
    elif isinstance(item, Mapping):
        example = _parse_mapping(item, prompt)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        example = Example(inputs=item[0], completion=item[1])
    else:
        msg = (
            f"cannot read {item!r:.80}. Write (inputs, completion), a mapping with the prompt's "
            "variables and 'completion', "
            "or {'prompt': …, 'completion': …}."
        )
        raise DataError(msg)
    if prompt is None and isinstance(example.inputs, str):
        return Example(prompt=example.inputs, completion=example.completion)
    return example


def _parse_mapping(item: Mapping[Any, Any], prompt: Prompt | None) -> Example:
    if "completion" not in item:
        msg = f"no 'completion' among the keys {sorted(map(str, item))}: nothing to learn."
        raise DataError(msg)
    rest = {k: v for k, v in item.items() if k != "completion"}
    variables = set(prompt.input_variables) if prompt is not None else set()
    if set(rest) == {"prompt"} and "prompt" not in variables:
        return Example(prompt=rest["prompt"], completion=item["completion"])
    return Example(inputs=rest, completion=item["completion"])


def _check_inputs(inputs: Mapping[str, Any] | str, prompt: Prompt) -> None:
    needed, allowed = set(prompt.input_variables), {*prompt.input_variables, *prompt.optional_variables}
    if isinstance(inputs, str):
        if len(needed) != 1:
            msg = f"the prompt has the variables {sorted(needed)}, so one string is not enough. Pass a mapping of them."
            raise PromptVariablesError(msg)
        inputs = {next(iter(needed)): inputs}
    if not isinstance(inputs, Mapping):
        msg = f"inputs are a mapping of the variables {sorted(needed)} or a string, got {type(inputs).__name__}."
        raise PromptVariablesError(msg)
    missing, extra = sorted(needed - inputs.keys()), sorted(map(str, inputs.keys() - allowed))
    if missing or extra:
        msg = (
            f"the prompt takes {sorted(needed)}"
            + (f", {missing} is missing" if missing else "")
            + (f", {extra} is unknown" if extra else "")
            + ". Rename or drop keys; final prompt text goes under 'prompt'."
        )
        raise PromptVariablesError(msg)
    for name, value in inputs.items():
        if value is None:
            msg = f"`{name}` is None, which would be templated as the word. Fill it in or leave the example out."
            raise PromptVariablesError(msg)
        if isinstance(value, str) and not _is_unicode(value):
            msg = f"`{name}` holds half a surrogate pair, which is no character. Decode the source anew."
            raise DataError(msg)
        if isinstance(value, str) and carries(value, prompt.literals):
            msg = (
                f"`{name}` already carries the template's text ({value!r:.80}): it would be templated "
                "twice. Pass the bare "
                "value, or final text as {'prompt': …, 'completion': …}."
            )
            raise TemplatedTwiceError(msg)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def carries(value: str, literals: Sequence[str]) -> bool:
    """Whether `value` holds all of a template's fixed texts in order, beginning or ending with one.

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
