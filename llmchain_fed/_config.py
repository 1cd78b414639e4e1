"""The base of every configuration object: frozen, strict, and readable when it fails.

Knows pydantic. Knows nothing of what the options mean.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import MAX_YAML, parse_yaml, read_file, shown

_MOST_SENTENCES = 10
_F = TypeVar("_F", bound=Callable[..., Any])


class FrozenConfig(BaseModel):
    """A frozen pydantic model whose failures are `ConfigError`s that name the option and the remedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    @classmethod
    def meant(cls, name: str) -> str | None:  # noqa: ARG003 (for subclasses)
        """Where an option is that others have by this name; None where nobody is known to."""
        return None

    def __new__(cls, /, *values: Any, **options: Any) -> Self:
        """Refuses values without a name, which pydantic would with a TypeError."""
        check_by_name(cls, cls.model_fields, values, options)
        return super().__new__(cls)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**{name: plain_number(value) for name, value in options.items()})
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        fields = type(self).model_fields
        shown = {name: getattr(self, name) for name in fields}
        changed = [f"{k}={v!r}" for k, v in shown.items() if v != fields[k].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    __str__ = __repr__

    def replace(self, **changes: Any) -> Any:
        """A copy with some options changed, validated like a new one.

        Raises:
            ConfigError: An unknown option or a value out of range.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(kept | changes))


def plain_number(value: Any) -> Any:
    """A number as Python has it where it is one of another library's, such as numpy's."""
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, int) else int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence per failed option, for the first ten: which, what was passed, what is allowed."""
    wrong = error.errors(include_url=False)
    told = [_sentence(item, model) for item in wrong[:_MOST_SENTENCES]]
    more = [f"and {len(wrong) - len(told)} more"] if len(wrong) > len(told) else []
    return f"{model.__name__}: " + "; ".join([*told, *more])


def _sentence(item: Any, model: type[BaseModel]) -> str:
    where = ".".join(shown(str(part), 100) for part in item["loc"]) or "the options together"
    if item["type"] == "extra_forbidden":
        meant = model.meant(where) if issubclass(model, FrozenConfig) else None
        return unknown_option(where, model.model_fields, meant)
    given = item["input"]
    given = repr(given[:200]) if isinstance(given, str) else shown(given, 200)
    value = "" if item["type"] == "missing" else f" (got {given})" if item["loc"] else ""
    if item["type"] == "tuple_type":
        return f"`{where}`: a list is wanted, such as [{shown(item['input'], 60)}]{value}"
    return f"`{where}`: {item['msg'].removeprefix('Value error, ')}{value}"


def check_by_name(kind: Any, known: Iterable[str], values: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Makes sure that what an object is made with are options it knows, by name.

    Raises:
        ConfigError: An unknown name, or a value without one; the valid ones are listed.
    """
    try:
        inspect.signature(kind.__init__).bind(None, *values, **options)  # a subclass may take others
    except TypeError:
        known = sorted(known)
        if strange := [name for name in options if name not in known]:
            raise ConfigError(f"{kind.__name__}: {unknown_option(strange[0], known)}") from None  # noqa: EM102
        if values:
            msg = f"{kind.__name__} takes options by name, got {values[0]!r:.80} without. Valid: {', '.join(known)}"
            raise ConfigError(msg) from None


def unknown_option(name: str, known: Any, meant: str | None = None) -> str:
    """The sentence for an option nobody knows, with the nearest one that exists, or with what was `meant`.

    >>> unknown_option("batchsize", ["batch_size", "epochs"])
    'unknown option `batchsize`; did you mean `batch_size`? Valid: batch_size, epochs'
    """
    name = shown(name)
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"{meant}. " if meant is not None else f"did you mean `{near[0]}`? " if near else ""
    return f"unknown option `{name}`; {hint}Valid: {', '.join(sorted(known))}"


def refusing_unknown(meant: Callable[[str], str | None]) -> Callable[[_F], _F]:
    """Lets a method refuse keywords that it does not have as options are refused, where Python has a TypeError.

    `meant` says where an option is that others have by a name.
    """

    def decorate(method: _F) -> _F:
        known = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]

        @functools.wraps(method)
        def checked(*values: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    msg = f"{method.__name__}: {unknown_option(name, known, meant(name))}"
                    raise ConfigError(msg)
            return method(*values, **options)

        return cast("_F", checked)

    return decorate


def read_options(path: str | Path, what: str) -> dict[str, Any]:
    """A YAML file's options: plain data by name, in a file of at most a megabyte.

    Raises:
        ConfigError: No such file, no plain YAML, no mapping.
    """
    return parse_options(read_file(path, most=MAX_YAML, what=f"the {what} file", error=ConfigError), path, what)


def parse_options(data: bytes, path: str | Path, what: str) -> dict[str, Any]:
    """The options in what a YAML file contained; see `read_options`."""
    where = f"the {what} file {shown(str(path), 300)}"
    found = parse_yaml(data, what=where, error=ConfigError)
    if found is None:
        return {}
    if not isinstance(found, dict):
        msg = f"{where} is no mapping of options to values, but {shown(found)}."
        raise ConfigError(msg)
    return found
