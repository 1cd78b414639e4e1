"""The forms an example may have, and the checks it must pass before anything is made of it.

Knows mappings and the prompt's variables (a prompt is anything that renders inputs to text). Knows nothing about
tokens, models or training; files are read in `readers`, and what counts as a missing value stands in `missing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from llmchain_fed.data.dialogues import Dialogue, dialogue_in
from llmchain_fed.data.prompt import Call, Converses, Prompt, plain_text
from llmchain_fed.data.sources.columns import Fitting, Mapped
from llmchain_fed.data.sources.missing import completion_in, filled, is_empty, is_missing
from llmchain_fed.data.sources.readers import is_table, numbered
from llmchain_fed.data.variables import check_inputs, is_unicode
from llmchain_fed.errors import DataError, PromptVariablesError
from llmchain_fed.model.control_tokens import texts_of
from llmchain_fed.untrusted import shown

Examples = Any
"""What is accepted as examples: a source of the forms of `read_examples`, or a DataLoader."""


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
        object.__setattr__(self, "completion", completion_in(self.completion))  # as everywhere: counted as empty
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
class DialogueRow(Example):
    """An example out of a row of messages: what stands before the first answer that is learnt, and that answer.

    Args:
        inputs: The messages before it.
        completion: It.
        dialogue: All of the conversation; every further answer is learnt, too.
    """

    dialogue: Dialogue

    @property
    def empty(self) -> bool:
        """Whether an answer to learn, or a message of the user's, says nothing: counted, and not trained on."""
        return self.dialogue.empty


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
        if isinstance(text, str) and not is_unicode(text):
            msg = f"the text {text!r:.60} has half a surrogate pair, which is no character. Decode the source anew."
            raise DataError(msg)


def _texts(message: Any) -> list[str]:
    return texts_of(message if isinstance(message, (Mapping, tuple)) else message.content)


def calls_of(example: Example | RawText, prompt: Prompt | None) -> Sequence[Call]:
    """What the model reads for an example and what it should answer, call by call.

    Raises:
        DataError: The example has variables, and there is nothing to render them; or its completion is no answer.
    """
    if isinstance(example, RawText):
        return (Call(example.prompt, example.completion),)
    if prompt is None:
        chat = isinstance(example, DialogueRow)
        how = "LocalChatModel(model=…) over this model" if chat else "the chain, or final text as RawText(…, …)"
        msg = f"{example.inputs!r:.80} needs a prompt to become text. Pass {how}."
        raise DataError(msg)
    if isinstance(example, DialogueRow):
        if not isinstance(prompt, Converses):
            msg = (
                f"a row of messages is a dialogue, and {type(prompt).__name__} does not hold one. Pass (inputs, "
                "completion), or train a LocalChatModel or a chain whose prompt ends in a MessagesPlaceholder."
            )
            raise DataError(msg)
        return prompt.dialogue_calls(example.dialogue)
    return prompt.calls(example.inputs, example.completion)


def prompt_text(example: Example | RawText, prompt: Prompt | None) -> str:
    """The text that the model sees before its first answer.

    Raises:
        DataError: As `calls_of`.
    """
    return calls_of(example, prompt)[0].text


def wanted_text(example: Example | RawText, prompt: Prompt | None) -> str:
    """The answer to that text: of a conversation the first that is learnt, of a program what it ends in.

    Raises:
        DataError: As `calls_of`.
    """
    calls = calls_of(example, prompt)
    return str(calls[0 if isinstance(example, DialogueRow) else -1].completion)


def read_examples(
    source: Examples, prompt: Prompt | None = None, *, columns: Mapping[str, str | int] | None = None
) -> Iterator[Example | RawText]:
    """Every example of a source, checked.

    Accepted forms: `(x, completion)` with x what `invoke` takes; a mapping of the prompt's variables plus
    `"completion"`; `{"prompt": x, "completion": text}` (the TRL format), where x is the input of a bare model, or the
    one variable of a prompt; `{"messages": […]}`, a conversation, of which every answer of the assistant's is learnt,
    and `{"prompt": […], "completion": […]}` with lists of messages, both with `tools` where there are some; `Example`;
    `RawText`. The source is any iterable of these, a table, or torch's kind of data set.

    Tables are the paths of CSV (separated by commas, semicolons, tabs or bars), TSV, JSON, JSONL and Parquet files, all
    but the last also as `.gz`; frames of pandas and polars, pyarrow tables, and data sets of `datasets`. Columns of a
    table that nobody reads are left aside.

    A missing value (None, NaN, NaT, `pandas.NA` …) or a blank text makes an example `empty`, in every form alike. In a
    CSV file that is the empty cell alone: None, NA or NULL is that word, which may be a label.

    Without a prompt a string is the final prompt itself.

    Args:
        source: Where the examples are.
        prompt: What renders them; None for a bare model.
        columns: Variable of the prompt, or "completion" → column of the source, where the two are called otherwise.

    Raises:
        ConfigError: `columns` is no such mapping.
        DataError: It is no source of examples, or an entry has none of these forms; its position is named.
        DialogueError: The messages of a conversation are out of order, or none is an answer to learn.
        MissingExtraError: It is a Parquet file, and pyarrow is not installed.
        PromptVariablesError: An example has other variables than the prompt.
        TemplatedTwiceError: A value already carries the template's text.
    """
    return (example for _, _, example in placed_examples(Mapped.of(source, columns), prompt))


class Placed(ABC):
    """A source that knows by itself where each of its examples stands: a part of another source."""

    @abstractmethod
    def placed(
        self, prompt: Prompt | None, ignored: dict[str, None] | None = None
    ) -> Iterator[tuple[str, Any, Example | RawText]]:
        """What `placed_examples` gives."""

    @abstractmethod
    def described(self) -> tuple[Mapped, str] | None:
        """The source that it is a part of, and which part; None where no text can say it."""

    def __iter__(self) -> NoReturn:
        """Refused: examples need a prompt to be read."""
        msg = "these are not rows: read them with read_examples(source, prompt)."
        raise DataError(msg)


def placed_examples(
    source: Examples, prompt: Prompt | None, *, beside: Collection[str] = (), ignored: dict[str, None] | None = None
) -> Iterator[tuple[str, Any, Example | RawText]]:
    """(place, row as it stands in the source, example) by turns; see `read_examples`.

    Args:
        source: As there; what has columns of its own is a `Mapped`.
        prompt: As there.
        beside: Columns that something else reads, which are never an error.
        ignored: Where the names of columns go that nobody reads.

    Raises:
        DataError: As there.
    """
    mapped = Mapped.of(source)
    if isinstance(mapped.source, Placed):
        yield from mapped.source.placed(prompt, ignored)
        return
    fitting = Fitting(prompt, mapped.columns, table=is_table(mapped.source), beside=beside)
    fitting.ignored = ignored if ignored is not None else {}
    for place, row in numbered(mapped.source):
        try:
            _check_no_header(row, prompt)
            example = _parse(filled(fitting.fit(row)), prompt)
            if prompt is not None and not isinstance(example, (RawText, DialogueRow)):
                check_inputs(example.inputs, prompt)
        except DataError as error:
            raise type(error)(f"{place}: {fitting.explain(error)}") from None  # noqa: EM102
        except RecursionError:
            msg = f"{place}: it is nested too deep to be read. Make it flatter."
            raise DataError(msg) from None
        yield place, row, example


def _check_no_header(item: Any, prompt: Prompt | None) -> None:
    """Makes sure that a row is not the names of the columns, which a reader of lists, or two joined files, leave."""
    variables = (prompt.input_variables if prompt is not None else None) or ()
    texts = isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(part, str) for part in item)
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
    variables = [] if prompt is None or prompt.input_variables is None else list(prompt.input_variables)
    optional = [] if prompt is None else list(prompt.optional_variables)
    if dialogue := dialogue_in(item, (*variables, *optional)):
        first = next(iter(dialogue.answers), 0)
        for message in dialogue.messages:
            _check_unicode(*_texts(message))
        answer = dialogue.messages[first] if dialogue.messages else ""
        return DialogueRow(list(dialogue.messages[:first]), answer, dialogue)
    if "completion" not in item:
        msg = f"no 'completion' among the keys {shown(sorted(map(str, item)), 300)}: nothing to learn."
        if set(item) == {"text"}:
            msg += (
                " A text alone does not say which part is the answer: write {'prompt': …, 'completion': …}, "
                "{'messages': […]}, or (inputs, completion); text as it is by RawText(prompt, completion)."
            )
        elif "conversations" in item:
            msg += " Write a conversation as {'messages': [{'role': 'user', 'content': …}, …]}."
        else:
            missing = ["completion", *sorted(set(variables or ["prompt"]) - set(item))]
            msg += f" Say which columns they are: columns={{{', '.join(f'{name!r}: …' for name in missing[:3])}}}."
        raise DataError(msg)
    rest = {k: v for k, v in item.items() if k != "completion"}
    if prompt is not None and prompt.any_input:
        if set(rest) == {"prompt"}:
            msg = (
                "a row of 'prompt' and 'completion' does not say whether the chain takes the prompt itself or a "
                "mapping with that key. Write (x, completion) with x what its invoke takes."
            )
            raise DataError(msg)
        return Example(inputs=rest, completion=item["completion"])
    bare = prompt is None or prompt.input_variables is None
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


def with_columns(examples: Examples, columns: Mapping[str, str | int] | None) -> Examples:
    """The examples with what their columns are called; a DataLoader, whose batches have none, stays as it is."""
    return (
        examples if columns is None or examples is None or is_ready_tensors(examples) else Mapped.of(examples, columns)
    )


def is_ready_tensors(source: Examples) -> bool:
    """Whether the source is a torch DataLoader, whose batches are used as they are."""
    return isinstance(source, DataLoader)
