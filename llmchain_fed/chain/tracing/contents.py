"""What an object holds: Runnables' parts, graphs' nodes, functions' closures, and the local models' faces among them.

Knows Python's objects and the faces. Knows nothing about prompts, examples or running anything; nothing is changed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.documents import Document
from langchain_core.runnables import RunnableSequence
from torch import Tensor, nn

from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.model.local_model import LocalModel

_MOST_OBJECTS = 100_000  # looked at in one chain; behind a vector store millions may stand
_MOST_ITEMS = 1_000  # of one list or mapping
_NOT_WITHIN = (
    str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, Tensor, nn.Module, LocalModel,
    Document, BaseCallbackHandler, BaseCallbackManager,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where an object was found: the names on the way to it, and what holds it."""

    path: tuple[str, ...]
    found: Any

    @property
    def name(self) -> str:
        """The names on the way, as one."""
        return "/".join(self.path)


def walk(root: Any) -> Iterator[Found]:
    """Every object that `root` holds, itself first, each once; what a face or a model is made of is not looked into."""
    return _walk(root, LocalLanguageModel, again=False)


def places_of(kinds: type | tuple[type, ...], root: Any) -> list[Found]:
    """Every way to an object of these kinds, which are not looked into; an object that two others hold is met twice."""
    return [place for place in _walk(root, kinds, again=True) if isinstance(place.found, kinds)]


def _walk(root: Any, leaves: type | tuple[type, ...], *, again: bool) -> Iterator[Found]:
    seen: set[int] = set()
    open_ = [Found((), root)]
    kept = []  # objects made on the way stay alive, or another would have their number
    while open_ and len(seen) < _MOST_OBJECTS:
        place = open_.pop()
        leaf = isinstance(place.found, leaves)
        if isinstance(place.found, _NOT_WITHIN) or (id(place.found) in seen and not (leaf and again)):
            continue
        seen.add(id(place.found))
        kept.append(place.found)
        yield place
        if not leaf:
            open_ += [Found((*place.path, *name), part) for name, part in reversed(list(_parts(place.found)))]


def faces_in(root: Any) -> list[LocalLanguageModel]:
    """The faces of local models that `root` holds, in the order in which they are found."""
    return [place.found for place in walk(root) if isinstance(place.found, LocalLanguageModel)]


def _parts(whole: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What an object holds, with what it is called there; names that say nothing are left out."""
    if isinstance(whole, Mapping):
        for key, part in _first(whole.items()):
            yield (str(key),), part
    elif isinstance(whole, (list, tuple, set, frozenset)):
        for number, part in enumerate(_first(whole), start=1):
            yield (str(number),), part
    elif isinstance(whole, functools.partial):
        yield from (((), part) for part in (whole.func, *whole.args, *whole.keywords.values()))
    elif isinstance(whole, types.MethodType):
        yield from (((), part) for part in (whole.__self__, whole.__func__))
    elif isinstance(whole, types.FunctionType):
        yield from (((), part) for part in _used_by(whole))
    else:
        yield from _fields(whole)


def _first(items: Any) -> Iterator[Any]:
    yield from list(itertools.islice(items, _MOST_ITEMS))


def _fields(whole: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(whole, RunnableSequence):  # its fields say the same in another way
        for number, part in enumerate(whole.steps, start=1):
            yield (str(number),), part
        return
    private = getattr(whole, "__pydantic_private__", None) or {}
    slots = {name: getattr(whole, name, None) for kind in type(whole).__mro__ for name in _slots(kind)}
    for name, part in {**slots, **getattr(whole, "__dict__", {}), **private}.items():
        yield ((name.strip("_"),) if name in _SAYING else ()), part


_SAYING = frozenset({"branches", "default", "fallbacks", "alternatives", "nodes", "tools", "condition"})


def _slots(kind: type) -> tuple[str, ...]:
    found = kind.__dict__.get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(name for name in found if not name.startswith("__"))


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    """What a function's code can reach by itself: its closure, its defaults, and the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    names = set(_names(function.__code__))
    yield from (function.__globals__[name] for name in sorted(names & function.__globals__.keys()))
    wrapped = inspect.unwrap(function)
    if wrapped is not function:
        yield wrapped


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
