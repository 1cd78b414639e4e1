"""StatusFile: how a federation stands now, as a small JSON file beside its results, for `llmchain-fed status`.

Knows who takes part and one file. Knows nothing of how rounds come about, and never makes one fail: where the file
cannot be written, that is said once and the federation goes on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.callbacks import Callback, RunInfo
from llmchain_fed.federated.reporting import lines
from llmchain_fed.storage.own_files import write_whole

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, RoundRecord
    from llmchain_fed.federated.server.attendance import Attendance, AttendanceChange

FILE = "status.json"
BEAT = 10.0
"""seconds after which the file is written anew though nothing has changed: a process that hangs can be told"""
_CLOCK = 600.0  # seconds by which a clock that was set meanwhile may make a process look younger than it is
_PAUSE = 1.0  # seconds between two writings
_LARGEST = 2**26  # bytes
_Text = Annotated[str, Field(max_length=2100)]
_Name = Annotated[str, Field(max_length=300)]
_Value = str | int | float | bool | None
_Phase = Literal["starting", "joining", "training", "evaluating", "between", "ended", "failed", "stopped"]


class ParticipantStatus(untrusted.Strict):
    """One participant; times are seconds since the epoch."""

    state: Literal["expected", "in", "late", "out"]
    since: float | None = None
    heard: float | None = None
    """when it last answered anything"""
    asked: _Text | None = None
    """the operation whose answer is waited for"""
    reason: _Text | None = None
    """why it is out, as it was said first"""
    latest: _Text | None = None
    """and said last, where that is of another kind"""
    took_part: bool = False
    """whether an update of it was ever accepted"""


class Status(untrusted.Strict):
    """All of the file."""

    pid: int = Field(ge=1, lt=2**31)
    host: _Text
    started: float
    written: float
    state: _Phase
    since: float
    says: _Text | None = None
    """what it waits for, in a sentence"""
    error: _Text | None = None
    """what it ended with"""
    round: int = Field(ge=0)
    """the round under way, else the last completed"""
    rounds: int | None = Field(default=None, ge=0)
    """how many there will be"""
    participants: dict[_Name, ParticipantStatus] = Field(default_factory=dict, max_length=100_000)
    last_round: _Text | None = None
    out: _Text
    """the folder"""
    free: int | None = None
    """bytes left on its disk"""
    about: dict[_Name, _Text | int | float | bool | None] = Field(default_factory=dict, max_length=100)

    @property
    def over(self) -> bool:
        """Whether the process that wrote it meant to end."""
        return self.state in ("ended", "failed", "stopped")

    @property
    def gone(self) -> bool:
        """Whether the process that wrote it is certainly not there any more, though it did not mean to end."""
        return not self.over and self.host == platform.node() and not is_running(self.pid, self.started)

    @property
    def silent(self) -> float | None:
        """For how many seconds it has not written, where that is too long for one that is at work."""
        age = time.time() - self.written
        return age if not self.over and age > 6 * BEAT else None


class StatusFile(Callback):
    """Keeps the file current, from the first fit, or from `with` on, until the federation is over.

    Used with `with`, it also says that the process starts, and how it ended if that is outside a fit. It is written at
    most once a second, by a thread of its own, with permissions for this account alone.

    Args:
        rounds: How many rounds the federation has; None takes each fit for a whole one.
        about: What else to say, name → a value, or a function that gives it at each writing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rounds: int | None = None,
        about: Mapping[str, _Value | Callable[[], _Value]] | None = None,
    ) -> None:
        self.path, self._rounds, self._about = Path(path).absolute(), rounds, dict(about or {})
        self._attendance: Attendance | None = None
        self._started = self._since = time.time()
        self._phase: str = "starting"
        self._state: str = "starting"
        self._says: str | None = None
        self._error: str | None = None
        self._round, self._completed, self._total = 0, 0, rounds
        self._last: str | None = None
        self._kept: dict[str, Any] = {}
        self._failing = False
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._begin("starting")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._phase in ("failed", "stopped"):
            self._end(self._phase)
        elif error is not None and not (self._phase == "ended" and _is_exit(error)):
            self._end_with(error)
        else:
            self._end("ended")

    def note(self, text: str | None) -> None:
        """What the process waits for, in a sentence, until the next note or round."""
        self._says = untrusted.one_line(text) if text is not None else None
        self._wake.set()

    # --- what a federation tells --------------------------------------------------------------------------------------

    def on_fit_begin(self, run: RunInfo) -> None:
        """From now on the file says who takes part."""
        self._attendance = run.attendance
        self._round = self._completed = run.start_round
        self._total = self._rounds if self._rounds is not None else run.total
        if self._total is None:
            self._total = run.start_round + run.rounds
        self._error = None
        self._begin("joining")

    def on_attendance(self, change: AttendanceChange) -> None:  # noqa: ARG002
        """Written soon."""
        self._wake.set()

    def on_round_begin(self, number: int, asked: tuple[str, ...]) -> None:  # noqa: ARG002
        """Says which round is under way."""
        self._phase, self._round, self._says = "training", number, None
        self._wake.set()

    def on_round_end(self, record: RoundRecord, history: History) -> None:  # noqa: ARG002
        """Says what came of it."""
        self._phase, self._last = "joining", record.line(self._total)
        self._round = self._completed = record.round
        self._wake.set()

    def on_fit_end(self, history: History) -> None:
        """Written at once: it is over, or the next fit will follow."""
        if history.stopped_early or self._round >= (self._total or 0):
            self._end("ended")
        else:
            self._phase = "between"
            self._write()

    def on_error(self, error: BaseException) -> None:
        """Written at once, with the error."""
        self._end_with(error)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _begin(self, phase: str) -> None:
        self._phase = phase
        self._write()
        if self._thread is None:
            self._wake.clear()
            self._thread = threading.Thread(target=self._keep, name="status file", daemon=True)
            self._thread.start()

    def _end_with(self, error: BaseException) -> None:
        self._round = self._completed
        self._error = untrusted.one_line(f"{type(error).__name__}: {error}")
        self._end("stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")

    def _end(self, phase: str) -> None:
        thread, self._thread, self._phase = self._thread, None, phase
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)
        self._write()

    def _keep(self) -> None:
        """Looks once a second whether there is something new; who asks participants need not tell it."""
        mine, written = threading.current_thread(), time.monotonic()
        while self._thread is mine:
            self._wake.wait(_PAUSE)
            self._wake.clear()
            if self._thread is mine and (self._plain() != self._kept or time.monotonic() - written > BEAT):
                self._write()
                written = time.monotonic()
                time.sleep(_PAUSE / 2)

    def _write(self) -> None:
        with self._lock:
            plain = self._plain()
            if plain["state"] != self._state:
                self._state, self._since = plain["state"], time.time()
            whole = plain | {"written": time.time(), "since": self._since, "free": _free(self.path.parent)}
            try:
                write_whole(self.path, json.dumps(whole, indent=1), mode=0o600, follow=True)
                self._kept, self._failing = plain, False
            except OSError as error:
                if not self._failing:
                    text = f"{self.path} cannot be written ({error}): `llmchain-fed status` does not see what follows"
                    lines.write(lines.stamped(text))
                self._failing = True

    def _plain(self) -> dict[str, Any]:
        """All that is written but the times of writing."""
        standings = dict(self._attendance.standings) if self._attendance is not None else {}
        operations = {standing.asked for standing in standings.values()}
        state = self._phase
        if state == "training" and operations & {"evaluate", "personal_state"}:
            state = "evaluating"
        fields = ("state", "since", "heard", "asked", "took_part")
        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": self._started,
            "state": state,
            "says": self._says,
            "error": self._error,
            "round": self._round,
            "rounds": self._total,
            "participants": {
                untrusted.one_line(name, 256): {field: getattr(found, field) for field in fields}
                | {"reason": _line(found.reason), "latest": _line(found.latest)}
                for name, found in standings.items()
            },
            "last_round": _line(self._last),
            "out": untrusted.one_line(self.path.parent),
            "about": {untrusted.one_line(name, 256): _value(given) for name, given in self._about.items()},
        }


def read(path: str | Path) -> Status:
    """What a federation wrote last.

    Raises:
        ConfigError: There is no such file, or it is none of ours.
    """
    what, remedy = "the status file", "Give the folder that a federation writes its results to."
    data = untrusted.read_file(path, most=_LARGEST, what=what, error=ConfigError)
    found = untrusted.read_json(data, most=_LARGEST, what=f"{what} {path}", error=ConfigError)
    return untrusted.checked(Status, found, what=f"{what} {path}", error=ConfigError, remedy=remedy)


def is_running(pid: int, started: float) -> bool:
    """Whether a process of this machine runs that is not younger than this (epoch seconds): numbers are given anew."""
    try:
        import psutil
    except ImportError:  # it comes with the extra `nvflare`
        with suppress(ProcessLookupError):
            with suppress(PermissionError):  # another account's
                os.kill(pid, 0)
            return True
        return False
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < started + _CLOCK)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _is_exit(error: BaseException) -> bool:
    """Whether a command ends with this on purpose: typer's own exit is an error with a status."""
    return isinstance(error, SystemExit) or hasattr(error, "exit_code")


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _line(text: str | None) -> str | None:
    return untrusted.one_line(text) if text is not None else None


def _value(given: Any) -> _Value:
    try:
        found = given() if callable(given) else given
    except Exception as error:  # a caller's own function, which must not end the federation
        found = f"unknown ({type(error).__name__}: {error})"
    return found if found is None or isinstance(found, (bool, int, float)) else untrusted.one_line(found)
