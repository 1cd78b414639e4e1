"""Which column of a table gives which variable of a prompt, and what of a row is left aside.

Knows rows as mappings and the names that a prompt takes. Knows nothing of files, values or tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmchain_fed.data.prompt import Prompt
from llmchain_fed.errors import ConfigError, DataError, PromptVariablesError
from llmchain_fed.untrusted import shown

_FORMS = ("prompt", "completion", "messages", "tools")
MOST_NAMES = 4096
"""names of unused columns that are kept; a JSONL file may have others in every row"""


def checked_columns(given: Any) -> dict[str, str | int] | None:
    """A mapping of names to columns, as a plain one; None stays None.

    Raises:
        ConfigError: It is something else.
    """
    if given is None:
        return None
    plain = isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given)
    if not plain or not all(isinstance(c, (str, int)) and not isinstance(c, bool) for c in given.values()):
        msg = (
            'columns is a mapping of the prompt\'s variables, and "completion", to columns of the source, such as '
            f'{{"text": "english", "completion": "french"}}, got {given!r:.80}.'
        )
        raise ConfigError(msg)
    return dict(given)


@dataclass(frozen=True)
class Mapped:
    """A source of examples with what its columns are called."""

    source: Any
    columns: Mapping[str, str | int] | None = None

    @classmethod
    def of(cls, source: Any, columns: Any = None) -> Mapped:
        """The source with these columns; one that has columns of its own keeps them. A path may begin with ~."""
        if isinstance(source, Mapped):
            return source if source.columns is not None else cls(source.source, checked_columns(columns))
        if isinstance(source, (str, Path)) and str(source).startswith("~"):
            with suppress(RuntimeError):  # nobody knows where home is: there will be no such file
                source = Path(source).expanduser()
        return cls(source, checked_columns(columns))


class Fitting:
    """Makes of a source's rows what the forms of examples are, and remembers which columns nobody reads.

    Rows of a table (a file, a frame, a data set) may have any other columns beside those that are read; rows of a list
    only where `columns` says which are.

    Args:
        prompt: It says which variables there are; None for a bare model.
        columns: Name → column, as the user gave it.
        table: Whether the source is one.
        beside: Columns that something else reads, such as a split's groups: never an error.

    Raises:
        PromptVariablesError: `columns` names what is no variable of the prompt.
    """

    def __init__(
        self,
        prompt: Prompt | None,
        columns: Mapping[str, str | int] | None,
        *,
        table: bool,
        beside: Collection[str] = (),
    ) -> None:
        self._columns, self._table, self._beside = columns or {}, table, set(beside)
        self._any = prompt is not None and prompt.any_input
        self._bare = prompt is None or (prompt.input_variables is None and not self._any)
        self._needed = set(prompt.input_variables or ()) if prompt is not None else set()
        self._allowed = self._needed | (set(prompt.optional_variables) if prompt is not None else set())
        self.ignored: dict[str, None] = {}
        strange = sorted(self._columns.keys() - self._allowed - set(_FORMS))
        if strange and not self._any:
            msg = (
                f"columns names {shown(strange, 200)}, and the prompt takes {sorted(self._allowed) or ['prompt']} and "
                "'completion'. Map those to the columns of the source."
            )
            raise PromptVariablesError(msg)

    def fit(self, item: Any) -> Any:
        """A row with the names that examples have; what is no row with names is given back as it is.

        Raises:
            DataError: A column is missing; those that are there are named.
        """
        if self._columns and hasattr(item, "_asdict"):
            item = item._asdict()
        if not isinstance(item, Mapping):
            return item
        if not self._columns and not self._table:
            beside = self._beside - self._allowed - set(_FORMS)
            return item if beside.isdisjoint(item) else {k: v for k, v in item.items() if k not in beside}
        row = self._renamed(item)
        names = self._names(row, item)
        if names is not None and not row.keys() <= names:
            row = {name: value for name, value in row.items() if name in names}
        if len(row) < len(item) or self._columns:
            self._count(item, row)
        return row

    def explain(self, error: DataError) -> str:
        """What an error about variables says, with the columns that they stand in."""
        text = str(error)
        named = {n: c for n, c in self._columns.items() if n != c and (f"`{n}`" in text or f"a {n} is" in text)}
        return text + "".join(f" `{name}` is the column {column!r:.80}." for name, column in named.items())

    def _renamed(self, item: Mapping[Any, Any]) -> dict[Any, Any]:
        if not self._columns:
            return dict(item)
        if missing := [column for column in self._columns.values() if column not in item]:
            msg = (
                f"there is no column {missing[0]!r:.80}; there are {_listed(item)}. Give columns= the names that the "
                "source has."
            )
            raise DataError(msg)
        taken = set(self._columns.values())
        rest = {name: value for name, value in item.items() if name not in taken}
        return rest | {name: item[column] for name, column in self._columns.items()}

    def _names(self, row: Mapping[Any, Any], item: Mapping[Any, Any]) -> set[str] | None:
        """The names that are read of a row; None is all."""
        if self._any:
            mapped = set(self._columns)
            return mapped | {"completion"} if mapped - {"completion"} else None
        if "completion" in row and not self._bare and self._needed <= row.keys():
            return self._allowed | {"completion"}
        if "completion" in row and "prompt" in row:
            tools = set() if isinstance(row["prompt"], str) else {"tools"}
            return self._allowed | tools | {"prompt", "completion"}
        if "messages" in row and "completion" not in row:
            return self._allowed | {"messages", "tools"}
        if "completion" not in row and (set(row) == {"text"} or "conversations" in row):
            return None  # whoever reads it knows a remedy
        needed = {"completion", *(["prompt"] if self._bare else self._needed)}
        missing = sorted(needed - row.keys())
        example = ", ".join(f"{name!r}: …" for name in missing[:3])
        msg = (
            f"there are the columns {_listed(item)}, and {missing} is missing. Say which columns they are: "
            f"columns={{{example}}}."
        )
        raise (DataError if "completion" in missing else PromptVariablesError)(msg)

    def _count(self, item: Mapping[Any, Any], row: Mapping[Any, Any]) -> None:
        taken = set(self._columns.values())
        for name in item:
            used = name in taken or (name in row and name not in self._columns) or name in self._beside
            if not used and len(self.ignored) < MOST_NAMES:
                self.ignored[shown(str(name), 80)] = None


def _listed(item: Mapping[Any, Any]) -> str:
    return shown(sorted(map(str, item)), 300)
