"""Gathering: calls that are awaited at the same time on one event loop are answered as one batch.

A local model answers one call at a time, so eight requests of a server would wait for one another. Those that come
within a window of some milliseconds share a forward pass instead. Knows asyncio and the faces' door. Knows nothing
about prompts or messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from llmchain_fed.chain.recording import is_recording
from llmchain_fed.model.generation.answers import Completion

_Key = tuple[int, bool, tuple[tuple[str, str], ...]]


@dataclass
class _Window:
    """The calls that have come so far, and what they will be told: all answers, or None where the batch failed."""

    texts: list[str] = field(default_factory=list)
    answers: asyncio.Future[list[Completion] | None] = field(default_factory=asyncio.Future)


_open: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, _Window]] = WeakKeyDictionary()


async def answers(face: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
    """What `face.complete` gives, for a coroutine beside which the loop goes on."""
    # a seed decides the draws of one call, which must not depend on who else calls
    if face.gather_ms and options.get("seed") is None and not is_recording():
        return await _gathered(face, texts, options)
    return await alone(face, texts, options)


async def alone(face: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
    """The same without others, in the caller's context."""
    work = partial(copy_context().run, face.complete, texts, options)
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _gathered(face: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
    """The answers to `texts`, computed with those of other calls of the same model with the same options.

    The first call of a window waits `face.gather_ms`; what comes meanwhile goes along, up to its batch size. Where the
    batch fails, each call is computed by itself and raises what is its own.
    """
    loop = asyncio.get_running_loop()
    windows = _open.setdefault(loop, {})
    # by the model, not its module, which the models of several adapters share; an option's repr says all of it
    key = (id(face.model), face.adds_special_tokens, tuple(sorted((k, repr(v)) for k, v in options.items())))
    window = windows.get(key)
    if window is None or len(window.texts) + len(texts) > face.batch_size:
        window = windows[key] = _Window()
        loop.call_later(face.gather_ms / 1000, _start, face, windows, key, window, dict(options))
    at = len(window.texts)
    window.texts += texts
    found = await asyncio.shield(window.answers)  # one caller who gives up does not take the others' answers along
    if found is None:
        return await alone(face, texts, options)
    return found[at : at + len(texts)]


def _start(face: Any, windows: dict[_Key, _Window], key: _Key, window: _Window, options: dict[str, Any]) -> None:
    if windows.get(key) is window:
        del windows[key]
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(None, Context().run, face.complete, window.texts, options)

    def tell(done: asyncio.Future[list[Completion]]) -> None:
        if not window.answers.cancelled():
            failed = done.cancelled() or done.exception() is not None
            window.answers.set_result(None if failed else done.result())

    work.add_done_callback(tell)
