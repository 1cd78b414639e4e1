"""CodeDigest: whether a function is still the one whose results were kept.

Knows Python's functions. Knows nothing about arms or metrics.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
import types
from collections.abc import Iterator, Mapping
from typing import Any

_DEPTH = 16
_UNKNOWN = secrets.token_hex(16)  # another in every process


def code_digest(fn: Any) -> str:
    """16 hex digits over a function's code, its defaults, what it closes over and what its object has.

    What cannot be looked into, such as an open file, is another in every process: its results are measured anew. Other
    functions of a module that it calls, and what it reads from files, do not count: who changes those names the results
    anew. Another version of Python compiles otherwise, and so has other digests.

    >>> code_digest(lambda: 1) == code_digest(lambda: 1), code_digest(lambda: 1) == code_digest(lambda: 2)
    (True, False)
    """
    return hashlib.sha256("\0".join(_parts(fn, _DEPTH)).encode()).hexdigest()[:16]


def _parts(value: Any, depth: int) -> Iterator[str]:
    """What of a value decides, as texts; an object by its class and what it has."""
    if depth == 0:
        yield _UNKNOWN
    elif isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield repr(value.co_names)
        for constant in value.co_consts:
            yield from _parts(constant, depth - 1)
    elif isinstance(value, types.FunctionType):
        yield from _parts(value.__code__, depth - 1)
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        for each in (value.__defaults__, value.__kwdefaults__, cells):
            yield from _parts(each, depth - 1)
    elif isinstance(value, types.MethodType):
        for of in (value.__func__, value.__self__):
            yield from _parts(of, depth - 1)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _parts(part, depth - 1)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}"
        for each in value:
            yield from _parts(each, depth - 1)
    elif isinstance(value, (set, frozenset)):
        yield f"{type(value).__name__} {len(value)}"
        yield from sorted("\0".join(_parts(each, depth - 1)) for each in value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _parts(value[key], depth - 1)
    elif value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield repr(value)
    else:
        yield from _parts_of_object(value, depth)


def _parts_of_object(value: Any, depth: int) -> Iterator[str]:
    """What decides of an object of any class."""
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    elif hasattr(value, "dtype") and hasattr(value, "tolist"):  # a tensor or an array
        yield f"{value.dtype} {tuple(value.shape)}"
        yield repr(value.tolist())
    elif hasattr(value, "__dict__"):
        call = vars(kind).get("__call__")
        if isinstance(call, types.FunctionType):
            yield from _parts(call, depth - 1)
        yield from _parts(vars(value), depth - 1)
    else:
        yield _UNKNOWN


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (whether it can be read)
    except ValueError:
        return False
    return True
