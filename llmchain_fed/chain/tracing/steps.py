"""Step names: which step of a composed chain calls its model, and which of two comes first, by LangChain's own runs.

A step is the innermost run on the way to the call that somebody has named (a `run_name`, a function, a node of a
graph); where nobody has, it is the path of keys and numbers that lead there. A step that is skipped or repeated keeps
its name. Knows LangChain's callbacks. Knows nothing about examples; what a run is given is not looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from typing_extensions import override

from llmchain_fed.chain.recording import earlier, passed

_UNNAMED = re.compile(
    r"(Runnable\w*|DynamicRunnable|LangGraph|CompiledStateGraph|LLMChain|PipedChain|ChannelWrite|ChannelRead|lambda"
    r"|_?(call_)?with_history|load_history|insert_history|check_sync_or_async)(<.*>)?"
)
_TAG = re.compile(r"(?:seq:step|map:key|branch|condition):(.*)", re.DOTALL)
_NUMBERED = re.compile(r"((?:seq|graph):step):(\d+)")


@dataclass(frozen=True)
class Step:
    """Where a model is called: a name, and the whole way to it."""

    name: str
    path: str = ""

    def is_called(self, name: object) -> bool:
        """Whether `name` means this step and no other."""
        return name in (self.name, self.path)

    def stands_under(self, name: object) -> bool:
        """Whether `name` is a key on the way to it: of a parallel, of `assign`."""
        return isinstance(name, str) and not name.isdigit() and name in self.path.split("/")


UNKNOWN = Step("model")


class _Run(NamedTuple):
    """One of LangChain's runs."""

    parent: UUID | None
    name: str
    tags: tuple[str, ...]
    earlier: tuple[UUID, ...]
    """the runs that the code which began it had begun before"""

    @property
    def key(self) -> str:
        """The key or number under which its parent runs it."""
        found = [match.group(1) for tag in self.tags if (match := _TAG.fullmatch(tag))]
        return found[-1] if found else ""

    @property
    def numbers(self) -> dict[str, int]:
        """Its place among what its parent runs one after the other: steps of a sequence, of a graph."""
        return {match.group(1): int(match.group(2)) for tag in self.tags if (match := _NUMBERED.fullmatch(tag))}


class StepNames(BaseCallbackHandler):
    """Follows the runs of one invocation: the step that a model's run belongs to, and which of two comes first."""

    run_inline = True  # in the very context in which a run begins

    def __init__(self) -> None:
        self._runs: dict[UUID, _Run] = {}

    def _begins(self, run_id: UUID, parent: UUID | None, tags: list[str] | None, name: str | None) -> None:
        self._runs[run_id] = _Run(parent, name or "", tuple(tags or ()), earlier())
        passed(run_id)

    def step(self, run_id: UUID) -> Step:
        """The step that a model's run belongs to; `UNKNOWN` for one that was not followed."""
        way = [self._runs[at] for at in self._way(run_id)]
        named = next((run.name for run in way if run.name and not _UNNAMED.fullmatch(run.name)), "")
        path = "/".join(run.key for run in reversed(way) if run.key)
        return Step(named or path or UNKNOWN.name, path)

    def follows(self, run_id: UUID, former: UUID) -> bool:
        """Whether a model's run, the one that is asked now, comes after a former one whatever the threads do.

        It does where the same code began the one and then the other, or where these are steps with numbers. Of what
        runs beside one another nobody knows which comes first.
        """
        if former in earlier():
            return True
        ours, theirs = self._way(run_id), self._way(former)
        while ours and theirs and ours[-1] == theirs[-1]:
            ours.pop()
            theirs.pop()
        if not ours or not theirs:
            return False
        later, sooner = self._runs[ours[-1]], self._runs[theirs[-1]]
        numbers = sooner.numbers
        return theirs[-1] in later.earlier or any(numbers.get(k, n) < n for k, n in later.numbers.items())

    def _way(self, run_id: UUID) -> list[UUID]:
        """A run, and those within which it stands, itself first."""
        found: list[UUID] = []
        at: UUID | None = run_id
        while at is not None and at in self._runs:
            found.append(at)
            at = self._runs[at].parent
        return found

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
        self._begins(run_id, parent_run_id, tags, kwargs.get("name"))

    @override
    def on_llm_start(
        self, serialized: Any, prompts: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, metadata: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._begins(run_id, parent_run_id, tags, kwargs.get("name"))
