"""YAML from elsewhere as plain data.

Knows PyYAML, and what of YAML a file of options needs. Knows nothing of options.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmchain_fed.untrusted.json_text import MAX_DEPTH
from llmchain_fed.untrusted.text import MAX_INTEGER, ErrorType, read_file, refusal, shown

MAX_YAML = 2**20
"""bytes"""
_MOST_EVENTS = 2**17  # values, and beginnings and ends of lists and mappings; so many take a second
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


def parse_yaml(
    data: bytes | str, *, what: str, error: ErrorType, most: int = MAX_YAML, remedy: str = "Correct the file."
) -> Any:
    """YAML as plain data: strings, booleans, null, integers below 2⁶³, finite numbers, lists, mappings by string.

    Numbers may be written as 1e-2. Refused are aliases and anchors, merge keys, tags, unquoted dates, a key given
    twice, keys that are no strings (an unquoted `on` is a boolean), several documents, and more than 32 levels.
    """
    if len(data) > most:
        raise refusal(error, f"{what} has more than the {most:,} bytes that make sense", remedy)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_events(text)
        return _Plain(text).get_single_data()
    except Exception as found:  # PyYAML raises many kinds over values that are none
        line = getattr(getattr(found, "problem_mark", None), "line", None)
        where = "" if line is None or isinstance(found, _Refused) else f" in line {line + 1}"
        problem = getattr(found, "problem", None) or found
        raise refusal(error, f"{what} is no plain YAML: {shown(str(problem), 300)}{where}", remedy) from None


_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|[-+]?0[xX][0-9a-fA-F]+|[-+]?0b[01]+")


class _Refused(yaml.YAMLError):
    """What plain YAML may not contain."""


def _check_events(text: str) -> None:
    """One pass without recursion: nothing is constructed before the whole is known to be flat and short enough."""
    depth, documents = 0, 0
    for number, event in enumerate(yaml.parse(text, Loader=_Base)):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            msg = f"anchors and aliases (& and *) are not read, line {line}; write the value out"
            raise _Refused(msg)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS and tag != "!":
            msg = f"the tag {shown(tag)} is not read, line {line}"
            raise _Refused(msg)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if number > _MOST_EVENTS:
            msg = f"more than {_MOST_EVENTS:,} values, line {line}"
            raise _Refused(msg)
        if depth > MAX_DEPTH:
            msg = f"more than {MAX_DEPTH} levels, line {line}"
            raise _Refused(msg)
        if documents > 1:
            msg = f"a second document begins in line {line}"
            raise _Refused(msg)


# libyaml's parser where PyYAML was built with it: the one in Python takes seconds for a megabyte
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Plain(_Base):  # type: ignore[misc]
    """A safe loader of plain data alone."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002 (PyYAML's)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                hint = " (an unquoted yes, no, on or off is a boolean)" if isinstance(key, bool) else ""
                msg = f"{shown(key)} in line {line} is no name of an option{hint}; put it in quotes"
                raise _Refused(msg)
            if key in found:
                msg = f"`{shown(key)}` is given twice, again in line {line}; keep one"
                raise _Refused(msg)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys are not read: a file that needs none is easier to check."""


def _construct_map(loader: Any, node: Any) -> dict[str, Any]:
    found: dict[str, Any] = loader.construct_mapping(node, deep=True)
    return found


def _construct_int(loader: Any, node: Any) -> int:
    line = node.start_mark.line + 1
    if len(node.value) > 80:
        msg = f"an integer of {len(node.value)} characters in line {line}"
        raise _Refused(msg)
    if not _PLAIN_INT.fullmatch(node.value):
        msg = (
            f"{shown(node.value)} in line {line} is an integer to YAML, but not the one it looks like (0 in front, a "
            "colon or _); write it as 123, or in quotes if it is text"
        )
        raise _Refused(msg)
    found: int = yaml.constructor.SafeConstructor.construct_yaml_int(loader, node)
    if not -MAX_INTEGER <= found < MAX_INTEGER:
        msg = f"an integer of {found.bit_length()} bits in line {line}"
        raise _Refused(msg)
    return found


def _construct_float(loader: Any, node: Any) -> float:
    line = node.start_mark.line + 1
    if ":" in node.value or "_" in node.value:
        msg = f"{shown(node.value)} in line {line} is a number to YAML, but not the one it looks like; put it in quotes"
        raise _Refused(msg)
    found: float = yaml.constructor.SafeConstructor.construct_yaml_float(loader, node)
    if not math.isfinite(found):
        msg = f"{shown(node.value)} in line {node.start_mark.line + 1} is not finite"
        raise _Refused(msg)
    return found


def _no_date(loader: Any, node: Any) -> NoReturn:  # noqa: ARG001 (PyYAML's)
    msg = f"{shown(node.value)} in line {node.start_mark.line + 1} is a date to YAML; put it in quotes"
    raise _Refused(msg)


def _no_merge(loader: Any, node: Any) -> NoReturn:  # noqa: ARG001 (PyYAML's)
    msg = f"the key {shown(node.value)} in line {node.start_mark.line + 1} has a meaning of its own to YAML; quote it"
    raise _Refused(msg)


def _construct_seq(loader: Any, node: Any) -> list[Any]:
    found: list[Any] = loader.construct_sequence(node, deep=True)
    return found


_CONSTRUCTORS: dict[str, Callable[[Any, Any], Any]] = {
    "map": _construct_map,
    "seq": _construct_seq,
    "int": _construct_int,
    "float": _construct_float,
    "timestamp": _no_date,
    "merge": _no_merge,
    "value": _no_merge,
}
for _name, _constructor in _CONSTRUCTORS.items():
    _Plain.add_constructor(f"tag:yaml.org,2002:{_name}", _constructor)


def read_yaml(path: str | Path, *, what: str, error: ErrorType, remedy: str = "Correct the file.") -> Any:
    """A YAML file as plain data; see `parse_yaml`, and `read_file` for what is no file."""
    data = read_file(path, most=MAX_YAML, what=what, error=error)
    return parse_yaml(data, what=f"{what} {shown(str(path), 300)}", error=error, remedy=remedy)


def key_lines(data: bytes | str, *, most: int = MAX_YAML) -> dict[str, int]:
    """Option → the line it stands in, of YAML that `parse_yaml` has read as a mapping; counted from 1."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    node = yaml.compose(text[:most], Loader=_Base)
    return {key.value: key.start_mark.line + 1 for key, _ in node.value} if isinstance(node, yaml.MappingNode) else {}


# --- writing --------------------------------------------------------------------------------------------------------


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """What occurs twice is written twice: anchors are not read."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's)
        return True


# YAML 1.1 takes 1e-2 and 5e3 for texts, and everybody who writes them means numbers; a text is written in quotes
_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")
for _class in (_Plain, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def dump_yaml(data: Mapping[str, Any], *, what: str, error: ErrorType, remedy: str = "") -> str:
    """YAML that `parse_yaml` gives back as it is; tuples come back as lists.

    Args:
        data: Plain data.
        what: Contains it, for the message.
        error: Raised: it is more than plain data, or more than a megabyte of it.
        remedy: A sentence on what to do.
    """
    wanted = _with_lists(data, what, error, remedy)
    try:
        for readable in (True, False):  # letters as they are, where they come back so; line breaks of Unicode do not
            text: str = yaml.dump(wanted, Dumper=_Dumper, sort_keys=False, allow_unicode=readable)
            if len(text.encode("utf-8", "surrogatepass")) > MAX_YAML:
                break
            with contextlib.suppress(error):
                if parse_yaml(text, what=what, error=error) == wanted:
                    return text
        parse_yaml(text.encode(), what=what, error=error, remedy=remedy)
    except (yaml.YAMLError, RecursionError, UnicodeEncodeError, ValueError) as found:
        raise refusal(error, f"{what} contains more than plain data ({shown(str(found), 200)})", remedy) from None
    raise refusal(error, f"{what} contains what YAML does not give back", remedy)


def _with_lists(data: Any, what: str, error: ErrorType, remedy: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise refusal(error, f"{what} has more than {MAX_DEPTH} levels", remedy)
    if isinstance(data, Mapping):
        return {key: _with_lists(value, what, error, remedy, depth + 1) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_with_lists(value, what, error, remedy, depth + 1) for value in data]
    return data
