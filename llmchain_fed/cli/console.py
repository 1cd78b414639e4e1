"""Console: lines for an operator's screen, and the exit statuses of commands.

Knows which errors may pass. Knows nothing of what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from llmchain_fed.errors import DeadlineError, QuorumError, TransportError
from llmchain_fed.federated.reporting import lines
from llmchain_fed.stopping import Stopped, stopping

DONE = 0
"""all as asked"""
FAILED = 2
"""it cannot be done as asked: mend what the line says; starting it again without that ends the same"""
INCOMPLETE = 3
"""a site was refused, or missing throughout; of the others the rounds are done, if they are enough"""
AGAIN = 4
"""out of reach or too few: the same command may succeed later, and goes on where this one was"""
INTERRUPTED, TERMINATED = 130, 143
"""stopped by Ctrl-C, by SIGTERM: the same command goes on"""


def say(text: str) -> None:
    """One line on stderr that begins with the local time; what comes from elsewhere can write no further lines."""
    lines.write(lines.stamped(text))


def error_line(error: BaseException) -> None:
    """How a command ends that could not do what it was asked."""
    lines.write(f"error: {type(error).__name__}: {error}")


def status_of(error: BaseException) -> int:
    """What a command ends with that an error ended."""
    return AGAIN if isinstance(error, (QuorumError, TransportError, DeadlineError)) else FAILED


@contextmanager
def stoppable(said: Callable[[], str]) -> Iterator[None]:
    """Within, a signal to stop is answered with a line, and ends the command with the status that goes with it."""
    try:
        with stopping(lambda: say(said())):
            yield
    except Stopped as stopped:
        raise typer.Exit(stopped.status) from None
