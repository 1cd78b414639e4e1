"""Stopping: SIGTERM and Ctrl-C end a command within seconds, with a line, and not in the middle of a write.

Knows signals and the clock. Knows nothing of what is stopped.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 8.0  # for all that is to be told and closed; whatever hangs then is cut off
LONGEST = 15.0  # and with what is being written before: a supervisor kills after 20
_TICK = 0.1


class Stopped(KeyboardInterrupt):
    """This process was told to stop; raised once, however often it is told."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
        """what a command ends with, as a shell has it"""


class _State:
    """Of the one command that a process runs."""

    def __init__(self) -> None:
        self.told: int | None = None
        self.raised = False
        self.writing = 0

    def hear(self, number: int, _frame: FrameType | None) -> None:
        self.told = self.told or number
        if not self.writing:
            self.raise_once()

    def raise_once(self) -> None:
        if self.told is not None and not self.raised:
            self.raised = True
            raise Stopped(self.told)


_state: _State | None = None


@contextmanager
def stopping(say: Callable[[], object]) -> Iterator[None]:
    """Within, a signal to stop is said at once, raises `Stopped`, and ends the process if that takes too long.

    A thread hears of it even while the main one is in a library that returns to Python much later.

    Args:
        say: Tells the operator, in that thread.

    Raises:
        Stopped: In the main thread, the first time; nothing further is.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever runs a command in a thread of its own stops it in its own way
        return
    ours = _State()
    former_state, _state = _state, ours
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(read, say, over, ours), name="stopping", daemon=True)
    watch.start()
    former_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    heard = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # nohup's stay
    former = {number: signal.signal(number, ours.hear) for number in heard}
    try:
        yield
    finally:
        if ours.told is None:  # else nothing further is heard until the process has ended
            for number, handler in former.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        over.set()
        os.close(write)
        watch.join(1.0)
        os.close(read)
        _state = former_state


@contextmanager
def whole() -> Iterator[None]:
    """What is written within is written to its end: a signal to stop counts once it is done.

    What takes longer than `LONGEST` after the signal is cut off: a supervisor would kill it soon after. Files that are
    written whole are then the former ones, and the round is done again.
    """
    state = _state if threading.current_thread() is threading.main_thread() else None
    if state is None:
        yield
        return
    state.writing += 1
    try:
        yield
    finally:
        state.writing -= 1
        if not state.writing:
            state.raise_once()


def _watch(read: int, say: Callable[[], object], over: threading.Event, state: _State) -> None:
    while found := os.read(read, 1):
        if found[0] in _SIGNALS:
            # before it is said: a full pipe may delay that
            threading.Thread(target=_cut_off, args=(128 + found[0], over, state), name="the end", daemon=True).start()
            with suppress(Exception):
                say()
            over.wait()
            return


def _cut_off(status: int, over: threading.Event, state: _State) -> None:
    """Ends the process that has not ended by itself: so long after the signal, or after what was written to its end."""
    began = idle = time.monotonic()
    while not over.wait(_TICK):
        now = time.monotonic()
        idle = now if state.writing else idle
        if now - idle > SECONDS or now - began > LONGEST:
            os._exit(status)
