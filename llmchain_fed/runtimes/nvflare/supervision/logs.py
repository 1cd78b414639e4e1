"""Logs: what NVFlare's processes write down, in one file of the kit that does not grow without end.

Knows NVFlare's loggers and one file. Knows nothing of processes. NVFlare by itself writes each line into three files,
of each process; here all write to their standard output, which is the file, and only the parent bounds it.
"""

from __future__ import annotations

import json
import os
import shutil
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

    Args:
        kit: Whose.
        since: byte of the file at which to begin: what stands before it is another process's.
    """
    with suppress(OSError), (kit / FILE).open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _LAST, since))
        lines = file.read(_LAST).decode(errors="replace").splitlines()
        told = [line for line in lines if " ERROR " in line or "Error: " in line or " CRITICAL " in line]
        return untrusted.one_line(told[-1], 500) if told else ""
    return ""
