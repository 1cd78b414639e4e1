"""Job folders: what ended jobs left in a kit, of which the newest few are kept.

Knows where NVFlare puts a job: KIT/ID at each engine, and in the hub's store. Knows nothing of processes: which jobs
run is for the caller to say.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

KEPT = 3
"""of ended jobs"""
_YOUNG = 600.0  # seconds in which a folder may be of a job whose process is not there yet
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LARGEST = 2**20  # bytes of a job's description
_STORES = ("storage/jobs", "storage/snapshots")


def remove_ended(kit: Path, running: Iterable[str] = (), *, kept: int = KEPT) -> list[str]:
    """Removes the folders of ended jobs but for the newest; returns their ids.

    Args:
        kit: Whose.
        running: Command lines, or parts of them, of the processes that work there: a job whose id is in one stays.
        kept: How many ended jobs stay.
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
