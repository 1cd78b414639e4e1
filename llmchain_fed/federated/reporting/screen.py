"""Screen: what `progress=True` shows on stderr. A bar where there is a terminal, and lines that stay.

Knows tqdm and stderr. Knows nothing of how rounds come about.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from llmchain_fed.federated.callbacks import Callback, RunInfo
from llmchain_fed.federated.reporting import lines
from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.data.report import DataReport
    from llmchain_fed.federated.history import History, RoundRecord
    from llmchain_fed.federated.server.attendance import Attendance, AttendanceChange

_POSTFIX = 60  # characters
_SELDOM = 0.1  # seconds between two drawings of the bar, as tqdm has it


class Screen(Callback):
    """Lines with the time: who takes part, who is out and why, each round. The bar counts all of a federation's rounds.

    Within a round it moves by the steps of those who train in this process, each of whom is an equal part of it.
    Participants `elsewhere`, in other processes, may have to be waited for.
    """

    def __init__(self, attendance: Attendance, *, elsewhere: bool) -> None:
        self._attendance, self._elsewhere = attendance, elsewhere
        self._bar: tqdm[Any] | None = None
        self._total = 0
        self._greeted = False
        self._reports: dict[str, str] = {}
        self._asked: tuple[str, ...] = ()
        self._shares: dict[str, float] = {}
        self._round, self._drawn, self._step = 0, 0.0, ("", "")
        attendance.follow(self._refresh)

    def on_fit_begin(self, run: RunInfo) -> None:
        """The bar stands where earlier fits left it."""
        if self._elsewhere and not self._greeted:
            self._say(f"asking {lines.names_of(list(run.participants))} to take part")
        end = run.start_round + run.rounds
        self._total = max(run.total or 0, end)
        with suppress(OSError):  # as with lines: a terminal that has gone ends no federation
            self._bar = tqdm(
                desc="federating",
                total=self._total,
                initial=run.start_round,
                unit="round",
                leave=end >= self._total,
                disable=not _shows_a_bar(),
            )

    def on_attendance(self, change: AttendanceChange) -> None:
        """One line, but for those who come before the first round: they are listed when it begins."""
        if change.was != "expected" or change.state != "in" or self._greeted:
            self._say(lines.change_of(change), change.at)

    def on_round_begin(self, number: int, asked: tuple[str, ...]) -> None:
        """Before the first round: who is there."""
        self._round, self._asked, self._shares = number, asked, {}
        if not self._greeted:
            self._greeted = True
            found = self._attendance.standings.items()
            there = [name for name, standing in found if standing.state in ("in", "late")]
            self._say(lines.beginning_of(there, self._attendance.absent))

    def on_round_end(self, record: RoundRecord, history: History) -> None:  # noqa: ARG002
        """The round's line."""
        self._say(record.line(max(self._total, record.round)))
        self._asked, self._step = (), ("", "")
        if self._bar is not None:
            with suppress(OSError):
                self._bar.n = record.round  # it stood within the round
                self._bar.refresh()

    def on_fit_end(self, history: History) -> None:
        """The bar stays, or makes room for the next fit's."""
        self._close()
        for line in history.endings():
            self._say(line)

    def on_error(self, error: BaseException) -> None:  # noqa: ARG002 (whoever catches it shows it)
        """The bar stays where it was."""
        self._close()

    @property
    def shows_a_bar(self) -> bool:
        """Whether a fit that begins now has one, which steps would move."""
        return _shows_a_bar()

    def stepped(self, name: str, done: int, of: int | None) -> None:
        """Somebody in this process has taken a step of a round's training."""
        if of and name in self._asked:
            self._shares[name] = max(self._shares.get(name, 0.0), min(done / of, 1.0))
        now = time.monotonic()
        if self._bar is None or now - self._drawn < _SELDOM:
            return
        self._drawn, self._step = now, (name, f", step {done} of {of}" if of else f", step {done}")
        if self._asked:
            self._bar.n = round(self._round - 1 + sum(self._shares.values()) / len(self._asked), 2)
        self._refresh()

    def report(self, name: str, report: DataReport) -> None:
        """What became of a participant's examples, if it is worth saying and was not said before."""
        if report.worth_saying and self._reports.get(name) != (text := str(report)):
            self._reports[name] = text
            self._say(f"{one_line(name, 80)}: {text}")

    def _refresh(self) -> None:
        """Who is waited for, beside the bar."""
        if self._bar is None or self._bar.disable:
            return
        waiting = self._attendance.waiting_for
        doing = lines.DOING.get(next(iter(waiting.values()), ""), "")
        name, step = self._step
        step = step if waiting.get(name) == "train" else ""
        with suppress(OSError):
            text = one_line(f"{doing}: {', '.join(waiting)}", _POSTFIX - len(step)) + step if waiting else ""
            self._bar.set_postfix_str(text)

    def _say(self, text: str, at: float | None = None) -> None:
        lines.write(lines.stamped(text, at))

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError):
                bar.close()


def _shows_a_bar() -> bool:
    """A log file has the lines; a bar that is drawn over itself makes them unreadable there."""
    in_notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
    return in_notebook or (hasattr(sys.stderr, "isatty") and sys.stderr.isatty())
