"""Running a composed chain over an example's input, for its own process alone.

No LangSmith trace, no cache and no conversation is left behind; a chain that is only async runs in a loop of its own.
Knows LangChain's way to invoke. Knows nothing about completions.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.history import RunnableWithMessageHistory
from langsmith.run_helpers import tracing_context

from llmchain_fed.chain.tracing.contents import walk

_ASYNC_ONLY = ("Cannot invoke a coroutine function synchronously", "No synchronous function provided")


def sessions_of(runnable: Any) -> list[str]:
    """The keys of a call's configuration that name a conversation: each example is one of its own."""
    keys = {"thread_id"}
    for place in walk(runnable):
        if isinstance(place.found, RunnableWithMessageHistory):
            keys |= {spec.id for spec in place.found.history_factory_config}
    return sorted(keys)


def _unwatched() -> AbstractContextManager[Sequence[Any]]:
    return nullcontext(())


def run(
    runnable: Runnable[Any, Any],
    inputs: Any,
    sessions: Sequence[str],
    begin: Callable[[], AbstractContextManager[Sequence[Any]]] = _unwatched,
) -> Any:
    """What the chain makes of `inputs`.

    Args:
        runnable: The chain.
        inputs: What it is given.
        sessions: As `sessions_of` gives them.
        begin: Is entered for each attempt, and gives the callbacks of its run: a chain that turns out to be async only
            is run again from its beginning.

    Raises:
        Exception: Whatever the chain raises.
    """

    def config(callbacks: Sequence[Any]) -> RunnableConfig:
        return {"configurable": {key: uuid.uuid4().hex for key in sessions}, "callbacks": list(callbacks)}

    with tracing_context(enabled=False):
        try:
            with begin() as callbacks:
                return runnable.invoke(inputs, config(callbacks))
        except (TypeError, NotImplementedError) as error:
            if not any(text in str(error) for text in _ASYNC_ONLY):
                raise
        with begin() as callbacks:
            return _in_a_loop(runnable, inputs, config(callbacks))


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
