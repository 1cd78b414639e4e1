"""Step names: which step of a composed chain calls its model, told by LangChain's own runs.

A step is the innermost run on the way to the call that somebody has named (a `run_name`, a function, a node of a
graph); where nobody has, it is the path of keys and numbers that lead there. A step that is skipped or repeated keeps
its name. Knows LangChain's callbacks. Knows nothing about examples; what a run is given is not looked at.
"""

from __future__ import annotations

import re
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config
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
        """Whether `name` means this step and no other."""
        return name in (self.name, self.path)

    def stands_under(self, name: object) -> bool:
        """Whether `name` is a key on the way to it: of a parallel, of `assign`."""
        return isinstance(name, str) and not name.isdigit() and name in self.path.split("/")


UNKNOWN = Step("model")
_begun: ContextVar[deque[Step] | None] = ContextVar("llmchain_fed_steps", default=None)
"""steps whose calls have begun in the running context and not yet reached their model; a thread that takes the context
over has the very same"""


class _Run(NamedTuple):
    """One of LangChain's runs."""

    parent: UUID | None
    name: str
    tag: str
    """the key or number under which its parent runs it"""
    parallel: bool


class StepNames(BaseCallbackHandler):
    """Follows the runs of one invocation, and says before each call of a model which step that is."""

    run_inline = True  # in the very context in which the model is called

    def __init__(self) -> None:
        self._runs: dict[UUID, _Run] = {}

    def _begins(self, run_id: UUID, parent: UUID | None, tags: list[str] | None, name: str | None) -> None:
        found = [match.group(1) for tag in tags or () if (match := _TAG.fullmatch(tag))]
        parallel = any(tag.startswith("map:key:") for tag in tags or ())
        self._runs[run_id] = _Run(parent, name or "", found[-1] if found else "", parallel)

    def _calls(self, run_id: UUID, parent: UUID | None, tags: list[str] | None) -> None:
        self._begins(run_id, parent, tags, None)
        step = self._step(run_id)
        if begun := _begun.get():
            begun.append(step)
        else:  # its own: steps that run beside one another began in one context
            _begun.set(deque([step]))

    def current(self) -> Step:
        """The step whose model call has begun and was not asked for yet; of a batch of prompts each has its own."""
        if begun := _begun.get():
            return begun.popleft()
        # LangChain's async string models begin a call in a task of its own, whose context ends with it: then the run
        # within which the call stands, under its tags
        config: Any = var_child_runnable_config.get() or {}
        manager = config.get("callbacks")
        run_id, parent = uuid4(), getattr(manager, "parent_run_id", None)
        if parent is None:
            return UNKNOWN
        self._begins(run_id, parent, getattr(manager, "tags", None), None)
        return self._step(run_id)

    def _step(self, run_id: UUID) -> Step:
        way: list[_Run] = []
        at: UUID | None = run_id
        while at is not None and at in self._runs:
            way.append(self._runs[at])
            at = way[-1].parent
        named = next((run.name for run in way[1:] if run.name and not _UNNAMED.fullmatch(run.name)), "")
        path = "/".join(run.tag for run in reversed(way) if run.tag)
        return Step(named or path or UNKNOWN.name, path, any(run.parallel for run in way))

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
