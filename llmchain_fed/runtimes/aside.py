"""Aside: a bound for a call that has none of its own: a look-up of a name, a call of gloo or of an engine's library.

Knows threads. Knows nothing of what is done; what is not done in time is left behind in a thread that dies with this
process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

_T = TypeVar("_T")


class Aside(Generic[_T]):
    """A call that blocks, in a thread of its own: who waits for it can look around, and can stop waiting.

    The call itself cannot be stopped. One that is left behind must have come to its end before the interpreter has:
    there, whatever a library in C++ returns from ends the whole process ("terminate called"); see `left_behind`.
    """

    _running: ClassVar[set[threading.Thread]] = set()

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call, self._over = call, threading.Event()
        self._found: _T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="aside", daemon=True).start()

    @classmethod
    def left_behind(cls) -> list[threading.Thread]:
        """Those that still run."""
        return [thread for thread in list(cls._running) if thread.is_alive()]

    def _run(self) -> None:
        self._running.add(threading.current_thread())
        try:
            self._found = self._call()
        except BaseException as error:  # raised where it is waited for
            self._error = error
        self._running.discard(threading.current_thread())
        self._over.set()

    def over(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        return self._over.wait(seconds)

    def result(self) -> _T:
        """What it returned; what it raised is raised."""
        if self._error is not None:
            raise self._error
        return self._found  # type: ignore[return-value]


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """What `call` returns or raises.

    Raises:
        TimeoutError: It has not come to its end within so many seconds.
    """
    asked = Aside(call)
    if not asked.over(max(seconds, 0.0)):
        msg = f"not done within {seconds:.0f} s"
        raise TimeoutError(msg)
    return asked.result()
