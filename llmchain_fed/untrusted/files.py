"""Files from elsewhere: regular ones, up to a size.

Knows the file system. Knows nothing of what a file contains.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmchain_fed.untrusted.text import ErrorType, reason, refusal, shown


def machine_memory() -> int:
    """This machine's, in bytes: what nothing that is read exceeds."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # pragma: no cover (not every system tells)
        return 2**36


def read_file(path: str | Path, *, most: int, what: str, error: ErrorType, follow: bool = True) -> bytes:
    """A regular file's content; a pipe or a device is refused rather than waited for.

    Args:
        path: Of the file.
        most: bytes that make sense; of a file with more nothing is read.
        what: Is read, for the message.
        error: Raised.
        follow: Whether the last part of the path may be a symbolic link.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise refusal(error, f"{what} {shown(str(path), 300)} is no regular file")
            # its size is looked at first: a reader makes room for all that it is told to read
            data = file.read(min(most, found.st_size) + 1) if found.st_size <= most else None
    except (OSError, ValueError) as failed:
        raise refusal(error, f"{what} {shown(str(path), 300)} cannot be read ({reason(failed)})") from None
    if data is None or len(data) > most:
        raise refusal(error, f"{what} {shown(str(path), 300)} has more than the {most:,} bytes that make sense")
    return data
