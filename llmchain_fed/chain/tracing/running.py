"""Running a composed chain over an example's input, for its own process alone.

No LangSmith trace, no cache and no conversation is left behind; a chain that is only async runs in a loop of its own.
Knows LangChain's way to invoke. Knows nothing about completions.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.history import RunnableWithMessageHistory
from langsmith.run_helpers import tracing_context

from llmchain_fed.chain.tracing.contents import walk

_ASYNC_ONLY = ("Cannot invoke a coroutine function synchronously", "No synchronous function provided")


class Sessions:
    """The conversations that a chain keeps by a key of its call's configuration: each example is one of its own."""

    def __init__(self, runnable: Any) -> None:
        parts = (place.found for place in walk(runnable))
        self._histories = [found for found in parts if isinstance(found, RunnableWithMessageHistory)]
        specs = (spec for history in self._histories for spec in history.history_factory_config)
        self._keys = sorted({"thread_id", *(spec.id for spec in specs)})

    def new(self) -> dict[str, str]:
        """The keys of another conversation."""
        return {key: uuid.uuid4().hex for key in self._keys}

    def forget(self, keys: Mapping[str, str]) -> None:
        """Empties what somebody's store of messages has kept of it."""
        for history in self._histories:
            mine = {spec.id: keys[spec.id] for spec in history.history_factory_config}
            with suppress(Exception):  # whatever a store of somebody's own does
                get = history.get_session_history
                (get(*mine.values()) if len(mine) == 1 else get(**mine)).clear()


def _unwatched() -> AbstractContextManager[Sequence[Any]]:
    return nullcontext(())


def run(
    runnable: Runnable[Any, Any],
    inputs: Any,
    sessions: Sessions,
    begin: Callable[[], AbstractContextManager[Sequence[Any]]] = _unwatched,
) -> Any:
    """What the chain makes of `inputs`.

    Args:
        runnable: The chain.
        inputs: What it is given.
        sessions: Its conversations.
        begin: Is entered for each attempt, and gives the callbacks of its run: a chain that turns out to be async only
            is run again from its beginning.

    Raises:
        Exception: Whatever the chain raises.
    """

    def attempt(invoke: Callable[[Any, RunnableConfig], Any]) -> Any:
        keys = sessions.new()
        try:
            with begin() as callbacks:
                return invoke(inputs, {"configurable": keys, "callbacks": list(callbacks)})
        finally:
            sessions.forget(keys)

    with tracing_context(enabled=False):
        try:
            return attempt(runnable.invoke)
        except (TypeError, NotImplementedError) as error:
            if not any(text in str(error) for text in _ASYNC_ONLY):
                raise
        return attempt(partial(_in_a_loop, runnable))


def _in_a_loop(runnable: Runnable[Any, Any], inputs: Any, config: RunnableConfig) -> Any:
    """`ainvoke`, in a thread of its own, for a notebook's has a running loop already."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(asyncio.run(runnable.ainvoke(inputs, config)))
        except BaseException as error:  # raised again below, where it belongs
            failed.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,))
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
