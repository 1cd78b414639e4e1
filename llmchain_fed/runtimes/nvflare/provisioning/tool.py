"""The engine's own command `nvflare`, and scratch folders: what a command makes is whole, or there is no trace of it.

Knows how the engine's command is called and what it says when it fails; folders, renames and the disk. Knows nothing of
certificates. A process that is killed clears nothing away: what it left, which can contain a key, the next one
removes.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, MissingExtraError, install
from llmchain_fed.stopping import whole
from llmchain_fed.storage import own_files
from llmchain_fed.storage.own_files import sync_folder, sync_tree
from llmchain_fed.storage.whole_folders import exchange

_PATIENCE = 300.0  # seconds for one command of the engine
_ADVICE = ("Hint:", "Code:")  # lines of the engine that advise its own options, which no command here has
_PREFIX = ".unfinished-"


def run(*arguments: object, within: Path) -> None:
    """Runs `nvflare ARGUMENTS` with a scratch folder as its working directory and its home.

    Raises:
        ConfigError: It failed, or was not done in time.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    if importlib.util.find_spec("nvflare") is None:
        msg = f"the NVFlare runtime needs its engine: {install('nvflare', 'nvflare', 'psutil', 'typer')}"
        raise MissingExtraError(msg)
    what = " ".join(str(a) for a in arguments[: 2 if arguments[0] == "cert" else 1])
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter, no shell)
            [*program(), *map(str, arguments)],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False, umask=0o077,
            timeout=_PATIENCE, cwd=within,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        msg = f"the engine's own command ({what}) was not done within {_PATIENCE:g} s. Nothing was changed."
        raise ConfigError(msg) from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(_ADVICE)]
        said = untrusted.one_line(" ".join(" ".join(lines).split())[-600:]) or "it said nothing"
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        msg = f"the engine's own command ({what}) failed with {how}: {said.rstrip('.')}. Nothing was changed."
        raise ConfigError(msg)


def program() -> list[str]:
    """How the command is started; nothing is imported from the folder where it runs."""
    return [sys.executable, "-P", str(Path(__file__).with_name("backdating.py"))]


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for this account alone within `folder`, where something is made that `place` will then move.

    Whatever goes wrong within, nothing is left of it, nor of `folder` if it was not there before.

    Raises:
        ConfigError: The system refused to write (full disk, no permission): nothing has changed.
    """
    made: list[Path] = []
    unfinished: Path | None = None
    with said(folder), ExitStack() as claim:
        try:
            for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                missing.mkdir(mode=0o700 if missing == folder else 0o777)
                made.append(missing)
            sweep(folder)
            unfinished = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))  # 0o700
            with suppress(ConfigError):  # a file system without locks: there nobody sweeps either
                claim.enter_context(own_files.lock_folder(unfinished, "what a command makes"))
            yield unfinished
        except BaseException:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            for folder_made in reversed(made):
                with suppress(OSError):  # what another command put there meanwhile stays
                    folder_made.rmdir()
            raise
        shutil.rmtree(unfinished, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes the scratch folders that killed processes left in a folder; those in use stay."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(ConfigError, OSError):  # it is in use, or none of this account's
            if not left.is_symlink() and left.stat().st_uid == os.geteuid():
                with own_files.lock_folder(left, "what a command makes"):
                    shutil.rmtree(left, ignore_errors=True)


def place(moves: Sequence[tuple[Path, Path]], *, over: Container[Path] = ()) -> None:
    """Moves each first to each second, on one file system; all, or none if one fails.

    A process that is killed meanwhile has done the first of the moves, in their order, each of them whole.
    Seconds that may be there already are in `over`: they are exchanged with their first.

    Raises:
        OSError: One cannot be moved, or something is in its place already.
    """
    done: list[tuple[Callable[[Path, Path], object], Path, Path]] = []
    for source, _ in moves:
        sync_tree(source)
    with whole():
        try:
            for source, target in moves:
                there = os.path.lexists(target)
                if there and target not in over:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
                move: Callable[[Path, Path], object] = exchange if there else Path.rename
                move(source, target)
                done.append((move, target, source))
                sync_folder(target.parent)  # so that the next is not on the disk before this one
        except BaseException:
            for move, target, source in reversed(done):
                move(target, source)
            raise


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
