"""Recording: while it is on, a face hands what its model would read to a recorder, and answers what that returns.

It follows the running code, threads and tasks that LangChain starts for it included, for it is a context variable; no
object is patched or copied. Knows nothing about chains, examples or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from llmchain_fed.model.generation.answers import Completion


class Recorder(Protocol):
    """What answers in place of a model."""

    def answer(self, face: Any, text: str, /) -> Completion | None:
        """The answer to `text`, which a face was about to give to its model; None lets the model answer."""


_recorder: ContextVar[Recorder | None] = ContextVar("llmchain_fed_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """The faces' calls within go to `recorder`."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Whether a recorder answers: what it says is nobody's answer, and belongs into no cache."""
    return _recorder.get() is not None


def recorded(face: Any, text: str) -> Completion | None:
    """What the recorder answers to `text`; None where the model is to answer."""
    recorder = _recorder.get()
    return recorder.answer(face, text) if recorder is not None else None
