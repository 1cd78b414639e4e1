"""CodeDigest: whether a function is still the one whose results were kept.

Knows Python's functions. Knows nothing about arms or metrics.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

_DEPTH = 8


def code_digest(fn: Any) -> str:
    """16 hex digits over a function's code, its defaults and what it closes over, of plain values.

    Other functions of the same module that it calls, what it reads from files and values of other types do not count:
    who changes those names the results anew. Another version of Python compiles otherwise, and so has other digests.

    >>> code_digest(lambda: 1) == code_digest(lambda: 1), code_digest(lambda: 1) == code_digest(lambda: 2)
    (True, False)
    """
    return hashlib.sha256("\0".join(_parts(fn, _DEPTH)).encode()).hexdigest()[:16]


def _parts(value: Any, depth: int) -> Iterator[str]:
    """What of a value decides, as texts; of what is no code and no plain value the type alone."""
    if depth == 0:
        yield "…"
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
        yield from _parts(value.__func__, depth - 1)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _parts(part, depth - 1)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}"
        for each in value:
            yield from _parts(each, depth - 1)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _parts(value[key], depth - 1)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, frozenset)):
        yield repr(value) if not isinstance(value, frozenset) else repr(sorted(map(repr, value)))
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        call = vars(type(value)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield from _parts(call, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (whether it can be read)
    except ValueError:
        return False
    return True
