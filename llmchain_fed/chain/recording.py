"""Recording: while it is on, a face hands what its model would read to a recorder, and answers what that returns.

It follows the running code, threads and tasks that LangChain starts for it included, for it is made of context
variables; no object is patched or copied. Knows nothing about chains, examples or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from uuid import UUID, uuid4

from llmchain_fed.model.generation.answers import Completion


class Recorder(Protocol):
    """What answers in place of a model."""

    def answer(self, face: Any, text: str, run: UUID, options: Mapping[str, Any], /) -> Completion | None:
        """The answer to `text`, which a face was about to give to its model; None lets the model answer.

        Args:
            face: Which one asks.
            text: What the model would see.
            run: In which of LangChain's runs.
            options: With which ones it would answer.
        """


_recorder: ContextVar[Recorder | None] = ContextVar("llmchain_fed_recorder", default=None)
_asking: ContextVar[Sequence[UUID]] = ContextVar("llmchain_fed_asking", default=())
_earlier: ContextVar[tuple[UUID, ...]] = ContextVar("llmchain_fed_earlier", default=())


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """The faces' calls within go to `recorder`."""
    tokens = _recorder.set(recorder), _earlier.set(())
    try:
        yield
    finally:
        _recorder.reset(tokens[0])
        _earlier.reset(tokens[1])


def is_recording() -> bool:
    """Whether a recorder answers: what it says is nobody's answer, and belongs into no cache."""
    return _recorder.get() is not None


@contextmanager
def asking(managers: Sequence[Any]) -> Iterator[None]:
    """What a face asks its model within is asked in these runs of LangChain's, text by text."""
    if not is_recording():
        yield
        return
    runs = [manager.run_id if manager is not None else uuid4() for manager in managers]
    token = _asking.set(runs)
    try:
        yield
    finally:
        _asking.reset(token)
        passed(*runs)


def recorded(face: Any, text: str, options: Mapping[str, Any], position: int = 0) -> Completion | None:
    """What the recorder answers to `text`, the so manieth that is asked; None where the model is to answer."""
    recorder = _recorder.get()
    if recorder is None:
        return None
    runs = _asking.get() or [uuid4()]
    return recorder.answer(face, text, runs[min(position, len(runs) - 1)], options)


def passed(*runs: UUID) -> None:
    """Whatever the running code does from now on comes after these runs; what runs beside it does not hear of them."""
    _earlier.set((*_earlier.get(), *runs))


def earlier() -> tuple[UUID, ...]:
    """The runs that began, in the running code or where it was started from, before now."""
    return _earlier.get()
