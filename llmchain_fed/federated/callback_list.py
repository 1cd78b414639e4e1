"""Telling: several callbacks as one, each of which hears of exactly one end of every fit that it saw begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.callbacks import Callback, RunInfo

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, RoundRecord
    from llmchain_fed.federated.server.attendance import AttendanceChange


class Callbacks:
    """Those given, one or several, in their order, after the `first`, which are our own.

    Raises:
        ConfigError: One of them is no `Callback`.
    """

    def __init__(self, given: Any, first: tuple[Callback, ...] = ()) -> None:
        self._all: tuple[Callback, ...] = (*first, *(given if isinstance(given, (list, tuple)) else (given,)))
        for item in self._all:
            if not isinstance(item, Callback):
                msg = f"callbacks are objects of Callback, such as ConsoleTable(), got {item!r:.80}."
                raise ConfigError(msg)

    def watch(self, run: RunInfo, history: History, fit: Callable[[], object]) -> None:
        """Tells them of the fit before and after it, or of the error that it, or one of them, ends with."""
        begun: list[Callback] = []
        try:
            for callback in self._all:
                begun.append(callback)  # before the call: one that has half begun must still be told of an error
                callback.on_fit_begin(run)
            fit()
            while begun:
                begun.pop(0).on_fit_end(history)
        except BaseException as error:
            for callback in begun:
                try:
                    callback.on_error(error)
                except Exception as second:
                    error.add_note(f"{callback!r} failed as well: {second}")
            raise

    def attendance_changed(self, change: AttendanceChange) -> None:
        """Tells them who is out, or back."""
        for callback in self._all:
            callback.on_attendance(change)

    def round_begins(self, number: int, asked: tuple[str, ...]) -> None:
        """Tells them who is asked in a round."""
        for callback in self._all:
            callback.on_round_begin(number, asked)

    def round_ended(self, record: RoundRecord, history: History) -> None:
        """Tells them of a round."""
        for callback in self._all:
            callback.on_round_end(record, history)
