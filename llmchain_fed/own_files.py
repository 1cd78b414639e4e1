"""Files that a command writes for its account alone, and the few that others may read.

Knows the process's umask. Knows nothing of what the files are. The umask is the whole process's, threads included: a
command sets it once, before it starts any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

PRIVATE = 0o077
_users: list[int] = []  # the umask that the user came with, while a command runs


@contextmanager
def for_this_account_alone() -> Iterator[None]:
    """Within, no other account can read or write what is made: a history and a log can quote examples."""
    former = os.umask(PRIVATE)
    _users.append(former if not _users else _users[0])
    try:
        yield
    finally:
        _users.pop()
        os.umask(former)


@contextmanager
def as_the_user_says() -> Iterator[None]:
    """Within it, what is made has the modes that the user's own umask gives: a chain is there to be handed on."""
    former = os.umask(_users[-1]) if _users else None
    try:
        yield
    finally:
        if former is not None:
            os.umask(former)
