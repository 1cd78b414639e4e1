"""Step names: which step of a composed chain calls its model, told by LangChain's own runs.

A step is the innermost run on the way to the call that somebody has named (a `run_name`, a function, a node of a
graph); where nobody has, it is the path of keys and numbers that lead there. A step that is skipped or repeated keeps
its name. Knows LangChain's callbacks. Knows nothing about examples; what a run is given is not looked at.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from typing_extensions import override

_UNNAMED = re.compile(
    r"(Runnable\w*|DynamicRunnable|LangGraph|CompiledStateGraph|LLMChain|PipedChain|ChannelWrite|ChannelRead|lambda"
    r"|_?(call_)?with_history|load_history|insert_history)(<.*>)?"
)
_TAG = re.compile(r"(?:seq:step|map:key|branch|condition):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """Where a model is called: a name, and the whole way to it."""

    name: str
    path: str = ""
    parallel: bool = False
    """whether it runs beside other steps, in an order that nobody sets"""

    def is_called(self, name: object) -> bool:
        """Whether `name` means this step."""
        return name in (self.name, self.path)


UNKNOWN = Step("model")
_current: ContextVar[Step | None] = ContextVar("llmchain_fed_step", default=None)


def current_step() -> Step:
    """The step whose model call has begun last in the running context; asked once per call."""
    step = _current.get()
    _current.set(None)
    return step or UNKNOWN


class StepNames(BaseCallbackHandler):
    """Follows the runs of one invocation, and says before each call of a model which step that is."""

    run_inline = True  # in the very context in which the model is called

    def __init__(self) -> None:
        self._runs: dict[UUID, tuple[UUID | None, str, str]] = {}  # run → its parent, its name, its tag

    def _begins(self, run_id: UUID, parent: UUID | None, tags: list[str] | None, name: str | None) -> None:
        found = [match.group(1) for tag in tags or () if (match := _TAG.fullmatch(tag))]
        parallel = any(tag.startswith("map:key:") for tag in tags or ())
        self._runs[run_id] = (parent, name or "", ("=" if parallel else "") + found[-1] if found else "")

    def _calls(self, run_id: UUID, parent: UUID | None, tags: list[str] | None) -> None:
        self._begins(run_id, parent, tags, None)
        way: list[tuple[str, str]] = []
        at: UUID | None = run_id
        while at is not None and at in self._runs:
            at, name, tag = self._runs[at]
            way.append((name, tag))
        named = next((name for name, _ in way[1:] if name and not _UNNAMED.fullmatch(name)), "")
        path = "/".join(tag.removeprefix("=") for _, tag in reversed(way) if tag)
        parallel = any(tag.startswith("=") for _, tag in way)
        _current.set(Step(named or path or UNKNOWN.name, path, parallel))

    @override
    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, metadata: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._begins(run_id, parent_run_id, tags, kwargs.get("name"))

    @override
    def on_tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, metadata: Any = None, inputs: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._begins(run_id, parent_run_id, tags, kwargs.get("name"))

    @override
    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, metadata: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._calls(run_id, parent_run_id, tags)

    @override
    def on_llm_start(
        self, serialized: Any, prompts: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, metadata: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._calls(run_id, parent_run_id, tags)
