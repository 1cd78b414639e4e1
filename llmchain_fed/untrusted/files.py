"""Files from elsewhere: regular ones, up to a size.

Knows the file system. Knows nothing of what a file holds.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmchain_fed.untrusted.text import ErrorType, refusal, shown


def read_file(path: str | Path, *, most: int, what: str, error: ErrorType) -> bytes:
    """A regular file's content; a pipe or a device is refused rather than waited for.

    Args:
        path: Symbolic links are followed.
        most: bytes that make sense.
        what: Is read, for the message.
        error: Raised.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise refusal(error, f"{what} {shown(str(path), 300)} is no regular file")
            data = file.read(most + 1)
    except (OSError, ValueError) as failed:
        raise refusal(error, f"{what} {shown(str(path), 300)} cannot be read ({shown(str(failed), 200)})") from None
    if len(data) > most:
        raise refusal(error, f"{what} {shown(str(path), 300)} has more than the {most:,} bytes that make sense")
    return data
