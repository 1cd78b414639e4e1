"""Stderr: lines for whoever watches. One that cannot be written costs that line, and never what the process is at.

Knows stderr, stdout and progress bars. Knows nothing of what is said.
"""

from __future__ import annotations

import sys
from contextlib import suppress


def write(line: str) -> None:
    """A line on stderr, above a progress bar where there is one.

    A log on a full disk, a terminal that has gone, a pipe that nobody reads: in the middle of a round, or in a thread
    that has other work, none of them is a reason to end.
    """
    with suppress(OSError, ValueError):  # ValueError: it was closed
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """What was asked for, on stdout, as far as that can be written."""
    with suppress(OSError, ValueError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
