"""Within: a bound for what has none of its own, such as a look-up of a name or a call of the engine's library.

Knows threads. Knows nothing of what is done; what is not done in time is left behind in a thread that dies with this
process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def within(seconds: float, do: Callable[[], _T]) -> _T:
    """What `do` returns or raises.

    Raises:
        TimeoutError: It has not come to its end within so many seconds.
    """
    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(do())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if failed:
        raise failed[0]
    if not found:
        msg = f"not done within {seconds:.0f} s"
        raise TimeoutError(msg)
    return found[0]
