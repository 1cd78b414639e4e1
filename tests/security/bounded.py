"""Runs a function in a child process that may use so much memory and time and no more.

`bounded(seconds=…, megabytes=…)` decorates a test: its body, hypothesis' whole search included, runs in a forked child
under RLIMIT_AS, and every call of `within(seconds)` inside it is timed by an alarm. What the child raises is raised in
the test. A hang or a swollen memory is therefore a failure that names the input, not a stuck CI.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _Alarm(BaseException):
    """No Exception: what is tested may turn those into errors of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the block once it has computed so long, or waited five times as long, with a TimeoutError behind it.

    Computing is counted in this process's own time, which a busy machine does not stretch. Only in a main thread.
    """
    msg, rang = f"not done within {seconds} s", False

    def ring(*_: object) -> None:
        nonlocal rang
        rang = True
        raise _Alarm(msg)

    former = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 5 * seconds)
    try:
        yield
    except _Alarm:
        raise TimeoutError(msg) from None
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in former.items():
            signal.signal(number, handler)
    if rang:
        raise TimeoutError(msg)


def address_space() -> int:
    """bytes of this process's address space now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bounded(*, seconds: float = 120.0, megabytes: int = 256) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a test: its body runs in a child, with `megabytes` beyond what the process has mapped already.

    Args:
        seconds: For the whole body.
        megabytes: Of address space, which is never less than the memory that is used.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            receiving, sending = multiprocessing.Pipe(duplex=False)

            def child() -> None:
                limit = address_space() + megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                try:
                    with within(seconds):
                        test(*args, **kwargs)
                except BaseException as error:  # all of it is the parent's to know
                    sending.send("".join(traceback.format_exception(error))[-6000:])
                else:
                    sending.send(None)

            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            sending.close()
            try:
                failed = receiving.recv() if receiving.poll(seconds + 30) else f"silent for {seconds + 30} s"
            except EOFError:
                process.join()
                failed = f"the child died with exit code {process.exitcode}"
            if process.is_alive():
                process.kill()
            process.join()
            assert failed is None, failed

        return run

    return decorate
