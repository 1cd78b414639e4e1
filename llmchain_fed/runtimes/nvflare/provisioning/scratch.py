"""Scratch folders: what a command makes is whole before any of it takes its place, or there is no trace of it.

Knows folders, renames and the disk. Knows nothing of certificates.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmchain_fed.errors import ConfigError
from llmchain_fed.own_files import sync_folder


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for this account alone within `folder`, where something is made that `place` will then move.

    Whatever goes wrong within, nothing is left of it, nor of `folder` if it was not there before.

    Raises:
        ConfigError: The system refused to write (full disk, no permission): nothing has changed.
    """
    made: list[Path] = []
    unfinished: Path | None = None
    with said(folder):
        try:
            for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                missing.mkdir(mode=0o700 if missing == folder else 0o777)
                made.append(missing)
            unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))  # 0o700
            yield unfinished
        except BaseException:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            for folder_made in reversed(made):
                with suppress(OSError):  # what another command put there meanwhile stays
                    folder_made.rmdir()
            raise
        shutil.rmtree(unfinished, ignore_errors=True)


def place(moves: Sequence[tuple[Path, Path]]) -> None:
    """Moves each first to each second, on one file system; all, or none if one fails.

    Raises:
        OSError: One cannot be moved, or something is in its place already.
    """
    done: list[tuple[Path, Path]] = []
    for source, _ in moves:
        _settle(source)
    try:
        for source, target in moves:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise
    for parent in {target.parent for _, target in moves}:
        sync_folder(parent)


@contextmanager
def said(folder: Path) -> Iterator[None]:
    """What the system refuses within is one error that names the file and says so in the system's words."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else folder
        reason = error.strerror or type(error).__name__
        msg = f"{where} cannot be written or read ({reason}). Nothing was changed; mend that and start again."
        raise ConfigError(msg) from error


def _settle(path: Path) -> None:
    """Puts a file, or all files of a folder, on the disk: a rename alone can outlive their contents."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
