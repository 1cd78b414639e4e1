"""Console: lines for an operator's screen, and the exit statuses of commands.

Knows stderr and which errors may pass. Knows nothing of what is said.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from llmchain_fed.errors import DeadlineError, QuorumError, TransportError
from llmchain_fed.tracking.lines import stamped

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
    _write(stamped(text))


def error_line(error: BaseException) -> None:
    """How a command ends that could not do what it was asked."""
    _write(f"error: {type(error).__name__}: {error}")


def status_of(error: BaseException) -> int:
    """What a command ends with that an error ended."""
    return AGAIN if isinstance(error, (QuorumError, TransportError, DeadlineError)) else FAILED


def _write(line: str) -> None:
    with suppress(OSError):  # a log on a full disk, say: it costs a line, and not what the command is at
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # above a bar, and not in the middle of it
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
