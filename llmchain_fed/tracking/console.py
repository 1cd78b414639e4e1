"""ConsoleTable: a federation's rounds as text, for a terminal, a log file or a notebook.

Knows rich. Knows nothing of how rounds come about.
"""

from __future__ import annotations

from contextlib import suppress
from typing import IO, TYPE_CHECKING

from llmchain_fed.errors import MissingExtraError, install
from llmchain_fed.federated.callbacks import Callback, RunInfo, notes_of
from llmchain_fed.federated.reporting import lines
from llmchain_fed.untrusted import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llmchain_fed.federated.history import History, RoundRecord
    from llmchain_fed.federated.server.attendance import AttendanceChange

_HEADINGS = ("round", "trained", "train loss", "held-out loss", "metrics", "up / down", "seconds", "gap", "notes")
_LONGEST = 20_000  # characters of a line
_WIDTH = 140  # columns where there is no terminal to ask: a log file's lines are not wrapped at 80


class ConsoleTable(Callback):
    """Prints a line per round, one when somebody goes out or is back, and when fit ends or fails the table of rounds.

    Lines are only ever appended, so they read the same in a log file, and beside a progress bar.

    Args:
        file: Where to; None is standard output (in a notebook, the cell's).
        console: A rich console of your own instead.

    Raises:
        MissingExtraError: rich is not installed.
    """

    def __init__(self, file: IO[str] | None = None, *, console: Console | None = None) -> None:
        try:
            from rich.console import Console
        except ImportError as error:
            msg = f"ConsoleTable needs rich, which is not installed: {install('rich', 'rich')}"
            raise MissingExtraError(msg) from error
        if console is None:
            console = Console(file=file)
            if not console.is_terminal and not console.is_jupyter:
                console = Console(file=file, width=_WIDTH)
        self._console = console
        self._history: History | None = None

    def on_fit_begin(self, run: RunInfo) -> None:
        """Prints what is about to run."""
        first, last = run.start_round + 1, run.start_round + run.rounds
        self._print(f"rounds {first} to {last} with {len(run.participants)} participants")

    def on_attendance(self, change: AttendanceChange) -> None:
        """Prints who is out and why, and who is back; who is there from the beginning is not listed."""
        if change.was != "expected" or change.state != "in":
            self._print(lines.stamped(lines.change_of(change), change.at))

    def on_round_end(self, record: RoundRecord, history: History) -> None:
        """Prints the round as one line."""
        self._history = history
        named = zip(_HEADINGS, _cells(record), strict=True)
        self._print(" · ".join(f"{heading} {cell}" for heading, cell in named if cell))

    def on_fit_end(self, history: History) -> None:
        """Prints the table, earlier fits' rounds included."""
        self._show(_table(history))
        for line in history.endings():
            self._print(line)

    def on_error(self, error: BaseException) -> None:
        """Prints the table of the completed rounds, and the error."""
        if self._history is not None:
            self._show(_table(self._history))
        self._print(f"ended by {type(error).__name__}: {error}")

    def _print(self, line: str) -> None:
        self._show(printable(line, _LONGEST), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _show(self, what: Table | str, **how: bool) -> None:
        with suppress(OSError):  # a full disk, or a pipe that nobody reads any more, is no reason to end a round
            self._console.print(what, **how)  # type: ignore[arg-type]


def _table(history: History) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    rows = [_cells(record) for record in history]
    shown = [at for at, heading in enumerate(_HEADINGS) if heading != "metrics" or any(row[at] for row in rows)]
    for heading in (_HEADINGS[at] for at in shown):
        table.add_column(heading, justify="left" if heading in ("metrics", "notes") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[at]) for at in shown))  # Text: a name like [red] is no markup
    return table


def _cells(record: RoundRecord) -> tuple[str, ...]:
    from rich.filesize import decimal

    held_out = record.held_out_before, record.held_out_after
    return (
        str(record.round),
        f"{len(record.trained)} of {record.asked}",
        _number(record.train_loss),
        " → ".join(map(_number, held_out)) if any(value is not None for value in held_out) else "–",
        ", ".join(f"{one_line(key)} {_number(value)}" for key, value in record.metrics.items()),
        f"{decimal(record.bytes_up)} / {decimal(record.bytes_down + record.evaluation_bytes)}",
        f"{record.seconds:.1f}",
        _number(getattr(record, "aggregation_gap", None)),
        "; ".join(notes_of(record)),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
