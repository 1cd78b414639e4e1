"""Logs: what NVFlare's processes leave in a kit: one file that does not grow without end, and the newest ended jobs.

Knows NVFlare's loggers, one file, and where NVFlare puts a job: KIT/ID at each engine, and in the hub's store. Knows
nothing of processes: which jobs run is for the caller to say. NVFlare by itself writes each line into three files, of
each process; here all write to their standard output, which is the file, and only the parent bounds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed import untrusted
from llmchain_fed.storage.own_files import write_whole

FILE = "nvflare.log"
"""in the kit"""
BOUND = 2**20  # bytes, after which it becomes FILE.1, and that FILE.2
_AUDIT = "audit.log"  # NVFlare's own, of what administrators' sessions ask
_KEPT = 2
_LAST = 2**16  # bytes from its end in which the last error is looked for
_PER_CALL = (
    "nvflare.collab", "nvflare.private.fed.client.client_runner", "nvflare.private.fed.server.server_runner",
    "nvflare.private.aux_runner", "nvflare.fuel.f3", "nvflare.fuel.hci", "nvflare.private.fed.client.communicator",
    "nvflare.apis.impl",
)  # fmt: skip
"""loggers that write for every call and poll below a warning"""
_KEPT_JOBS = 3
"""of ended jobs"""
_YOUNG = 600.0  # seconds in which a folder may be of a job whose process is not there yet
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LARGEST = 2**20  # bytes of a job's description
_STORES = ("storage/jobs", "storage/snapshots")


def config() -> dict[str, Any]:
    """What `local/log_config.json` of a kit contains."""
    line = {"()": "nvflare.fuel.utils.log_utils.BaseFormatter", "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s"}
    output = {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stdout"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": line},
        "handlers": {"output": output},
        "loggers": {"root": {"level": "INFO", "handlers": ["output"]}}
        | {name: {"level": "WARNING"} for name in _PER_CALL},
    }


def configure(kit: Path) -> None:
    """Writes it, where another stands.

    Raises:
        OSError: It cannot be written.
    """
    path, text = kit / "local" / "log_config.json", json.dumps(config(), indent=1)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text, mode=0o600)


def open_file(kit: Path) -> int:
    """A descriptor that appends to the file; whoever has it goes on after `bound`.

    Raises:
        OSError: It cannot be written.
    """
    return os.open(kit / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)


def size(kit: Path) -> int:
    """Bytes that are in the file now."""
    with suppress(OSError):
        return (kit / FILE).stat().st_size
    return 0


def bound(kit: Path, most: int = BOUND) -> bool:
    """Moves what is in the logs to others, when it is large; whether `FILE` was emptied by that."""
    emptied = False
    for path in (kit / FILE, kit / _AUDIT):
        with suppress(OSError):  # it is not there, or none of ours
            if path.stat().st_size > most:
                _shift(path)
                emptied = emptied or path.name == FILE
    return emptied


def _shift(path: Path) -> None:
    """FILE.1 becomes FILE.2, and FILE is copied to FILE.1 and emptied, as processes have it open.

    It is emptied also where there is no room for the copy: a full disk gets no emptier by a log that grows.
    """
    first = path.with_name(f"{path.name}.1")
    with suppress(OSError):
        for number in range(_KEPT, 1, -1):
            former = path.with_name(f"{path.name}.{number - 1}")
            if former.exists():
                former.replace(path.with_name(f"{path.name}.{number}"))
        shutil.copyfile(path, first)
        first.chmod(0o600)
    os.truncate(path, 0)


def last_error(kit: Path, since: int = 0) -> str:
    """The last line that tells of an error; empty if there is none.

    What stands before the byte `since` of the file is another process's.
    """
    with suppress(OSError), (kit / FILE).open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _LAST, since))
        lines = file.read(_LAST).decode(errors="replace").splitlines()
        told = [line for line in lines if " ERROR " in line or "Error: " in line or " CRITICAL " in line]
        return untrusted.one_line(told[-1], 500) if told else ""
    return ""


def remove_ended_jobs(kit: Path, running: Iterable[str] = (), *, kept: int = _KEPT_JOBS) -> list[str]:
    """Removes the folders of ended jobs but for the newest; returns their ids.

    A job stays whose id is in one of `running`: command lines, or parts of them, of the processes that work there.
    """
    busy = " ".join(running)
    gone: list[str] = []
    for folder in (kit, *(kit / store for store in _STORES)):
        old = [job for job in _jobs(folder) if time.time() - _when(job) > _YOUNG]
        ended = [job for job in old if job.name not in busy and _has_ended(job)]
        for job in sorted(ended, key=_when, reverse=True)[kept:]:
            shutil.rmtree(job, ignore_errors=True)
            if not job.exists() and job.name not in gone:
                gone.append(job.name)
    return gone


def _jobs(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [e for e in folder.iterdir() if _ID.fullmatch(e.name) and e.is_dir() and not e.is_symlink()]
    return []


def _when(job: Path) -> float:
    with suppress(OSError):
        return job.stat().st_mtime
    return 0.0


def _has_ended(job: Path) -> bool:
    """In the hub's store a job that was submitted stands before it runs: only what it says to be finished has ended."""
    meta = job / "meta"
    if not meta.is_file():
        return True
    with suppress(OSError, ValueError):
        if meta.stat().st_size <= _LARGEST:
            found = json.loads(meta.read_bytes())
            return isinstance(found, dict) and str(found.get("status", "")).startswith("FINISHED")
    return False
