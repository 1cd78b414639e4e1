"""Heartbeat: each rank of a job shows every second that its process runs, and sees for how long another's has not.

Knows a job's key-value store and for how long this process itself was awake. Knows nothing of messages or participants,
nor of what a rank does: one that trains for an hour is busy, not silent, because its heartbeat has a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from llmchain_fed.runtimes.aside import Aside, within
from llmchain_fed.untrusted import one_line

EVERY = 1.0  # seconds between two signs of life
_TICK = 0.25  # seconds
_LONGEST_TICK = 1.0  # seconds: a process that was stopped itself did not see who else was silent meanwhile
_ASKING = 2.0  # seconds to say something to the store, or to read it
_MOST_TEXT = 2000  # characters
_T = TypeVar("_T")


class Heartbeat:
    """Beats in the store, and watches others beat.

    All times are seconds during which this process was awake: one that was stopped for an hour, with its machine
    perhaps, gives the others time to be heard again before it calls anybody silent.

    Args:
        store: A connection of its own: another's may be in a wait that takes long.
        rank: The rank of this process.
        watched: The ranks whose signs of life are looked for.
        gone: Whether the store's host has gone, as at a job's end: to ask it then makes torch write a traceback.
        failed: Is told of the store's error, if there is one though its host is there: nobody is watched from then on.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        watched: Iterable[int],
        gone: Callable[[], bool] = lambda: False,
        failed: Callable[[Exception], object] = lambda _: None,
    ) -> None:
        self._store, self._rank, self._gone, self._failed = store, rank, gone, failed
        self._awake, self._answered = 0.0, 0.0
        self._beats: dict[int, int] = {}
        self._seen = dict.fromkeys(watched, 0.0)
        self._stopped: tuple[str, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._tick, name="awake", daemon=True).start()
        self._beating = Aside(self._beat)

    def silent(self, rank: int) -> float:
        """For how many seconds a rank has given no sign of life; 0 for one that is not watched, or no longer."""
        return self._awake - self._seen[rank] if rank in self._seen and not self._closed.is_set() else 0.0

    @property
    def unanswered(self) -> float:
        """For how many seconds the store has not answered."""
        return 0.0 if self._closed.is_set() else self._awake - self._answered

    @property
    def stopped(self) -> tuple[str, float] | None:
        """Why the leader said that the job is over, and how many seconds ago this was read; None while it goes on."""
        return None if self._stopped is None else (self._stopped[0], self._awake - self._stopped[1])

    def stop(self, why: str) -> None:
        """Says to all ranks that the job is over; where the store does not take it, they find out by themselves."""
        self._ask(lambda: self._store.set("stopped", why[:_MOST_TEXT]))

    def leave_word(self, why: str) -> None:
        """Says why this rank ends, for who misses it."""
        self._ask(lambda: self._store.set(f"word/{self._rank}", why[:_MOST_TEXT]))

    def word_of(self, rank: int) -> str | None:
        """Why a rank ended, if it could say so."""
        return self._ask(lambda: self._read(f"word/{rank}"))

    def close(self) -> None:
        """Beats and watches no more."""
        self._closed.set()
        self._beating.over(_ASKING / 4)

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            self._awake += min(now - last, _LONGEST_TICK)
            last = now

    def _beat(self) -> None:
        try:
            while not self._closed.is_set() and not self._gone():
                self._look()
                self._closed.wait(EVERY)
        except Exception as error:
            # at the end of a job the store goes, or its host does, whom its connections name
            if not self._closed.is_set() and not self._gone():
                self._failed(error)
        self._closed.set()

    def _look(self) -> None:
        """Beats once, and sees who else has."""
        self._store.add(f"beat/{self._rank}", 1)
        for rank in self._seen:
            found = self._store.add(f"beat/{rank}", 0)
            if found != self._beats.get(rank):
                self._beats[rank], self._seen[rank] = found, self._awake
        if self._stopped is None and (why := self._read("stopped")) is not None:
            self._stopped = why, self._awake
        self._answered = self._awake

    def _read(self, key: str) -> str | None:
        """A key's value, if there is one; never waits for it."""
        return one_line(self._store.get(key).decode(errors="replace"), _MOST_TEXT) if self._store.check([key]) else None

    def _ask(self, call: Callable[[], _T]) -> _T | None:
        if self._closed.is_set() or self._gone():
            return None
        with suppress(Exception):
            return within(_ASKING, call)
        return None
