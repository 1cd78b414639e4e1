"""The engine's processes: checks a kit before it is used, starts hub or site, and ends them with all their children.

Knows kits, processes and command lines. Knows nothing of jobs or models; what happens while an engine runs is for its
parent, `supervision.supervisor`. The checks are here because NVFlare itself waits forever, mostly without a word, on a
wrong certificate or a port in use.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.nvflare import certificates, kits
from llmchain_fed.runtimes.nvflare.job import SOCKET
from llmchain_fed.runtimes.nvflare.supervision import reaching
from llmchain_fed.storage import own_files

LOCK = "engine.lock"
"""in the kit: locked while its engine runs"""
_MODULES = {True: "nvflare.private.fed.app.server.server_train", False: "nvflare.private.fed.app.client.client_train"}
_PARTS = {
    True: ("startup/fed_server.json", "startup/server.crt", "startup/server.key"),
    False: ("startup/fed_client.json", "startup/client.crt", "startup/client.key"),
}
_ALL_HAVE = ("startup/rootCA.pem", "local/resources.json", "local/authorization.json")
# a kit may come from elsewhere and is the engine's working directory, of which no module is to be imported
_SAFE = {"PYTHONSAFEPATH": "1"}


def check(kit: Path, *, reach: bool = True) -> None:
    """Makes sure that an engine started from this kit can work.

    With `reach` a site's hub is dialled as well; one that is not up yet is no error, the engine waits for it.

    Raises:
        ConfigError: See `check_folder`; certificate expired, not yet valid, not of this federation's authority or of
            another name; the hub's port in use; the hub of another authority or refusing this certificate.
    """
    check_folder(kit)
    certificates.check(kit)
    if kits.is_hub(kit):
        port = kits.address(kit)[1]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                msg = f"port {port} cannot be had ({error.strerror}): stop what listens there, or provision another."
                raise ConfigError(msg) from error
    elif reach:
        found = reaching.hindrance(kit)
        if found is not None and found.lasting:
            raise ConfigError(found.says + ".")


def check_folder(kit: Path) -> None:
    """Makes sure that all of a kit is there, and that its engine can write beside it.

    Raises:
        ConfigError: It is none, is incomplete, or cannot be written.
    """
    hub = kits.is_hub(kit)
    missing = [part for part in (*_PARTS[hub], *_ALL_HAVE) if not (kit / part).is_file()]
    if missing:
        msg = (
            f"the kit {kit} is incomplete: {', '.join(missing)} cannot be found. Copy the whole folder, startup/ and "
            "local/, or make the kit anew with `llmchain-fed provision package`."
        )
        raise ConfigError(msg)
    for folder in (kit, kit / "local"):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            msg = (
                f"the kit cannot be written: {folder}: {error.strerror}. Its engine keeps its lock, log and jobs "
                "there: give this account the right to write, and room on the disk."
            )
            raise ConfigError(msg) from error


def start(
    kit: Path,
    *,
    socket: Path | None = None,
    authority: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts the hub's or a site's engine in the background, after `check`: the command that an operator starts.

    Args:
        kit: The folder of the kit.
        socket: The path at which a site's peer listens; a hub has none.
        authority: The authority's folder, whose list says at the hub who may come; a site has none.
        environment: Variables that the engine is given beside this process's.
        log: The file that its lines go to; `engine.log` in the kit by default.

    Raises:
        ConfigError: See `check`; a site without a socket; the kit's engine runs already.
    """
    kit = kit.absolute()
    command, variables = command_of(kit, socket, authority)
    check_folder(kit)
    with own_files.lock(kit / LOCK, f"the kit {kit.name}"):
        check(kit)
    descriptor = os.open(log or kit / "engine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        return subprocess.Popen(  # noqa: S603 (this interpreter, no shell)
            command,
            env=os.environ | variables | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=0o077,  # its logs and what it stores are this account's
        )


def command_of(
    kit: Path, socket: Path | None = None, authority: Path | None = None
) -> tuple[list[str], dict[str, str]]:
    """The operator's command by this interpreter, and the environment variables it needs.

    Raises:
        ConfigError: A site without a socket.
    """
    needs_socket(kit, socket)
    command = [sys.executable, "-m", "llmchain_fed.cli", "engine", str(kit)]
    command += ["--socket", str(socket)] if socket is not None else []
    command += ["--authority", str(authority)] if authority is not None else []
    return command, dict(_SAFE)


def nvflare_command(
    kit: Path, socket: Path | None, wire: int, authority: Path | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line of NVFlare's process, and the environment variables it needs.

    It tells its parent over the descriptor `wire`: see `supervision.child`. The parent has made sure of the socket.
    """
    hub = kits.is_hub(kit)
    settings = ["secure_train=true", "config_folder=config"]
    variables = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"} | _SAFE
    if hub:
        settings += ["org=hub"]
    else:
        name = kits.site_name(kit)
        settings += [f"uid={name}", f"org={name}", "heart_beat_interval=4"]
        variables[SOCKET] = str(Path(socket or "").absolute())
    configuration = "fed_server.json" if hub else "fed_client.json"
    ours = [sys.executable, "-m", "llmchain_fed.runtimes.nvflare.supervision.child", str(wire), str(kit)]
    registry = str(authority.absolute()) if authority is not None else ""
    return [*ours, registry, _MODULES[hub], "-m", str(kit), "-s", configuration, "--set", *settings], variables


def needs_socket(kit: Path, socket: Path | None) -> None:
    """Raises where it is missing.

    Raises:
        ConfigError: A site without a socket.
    """
    if socket is None and not kits.is_hub(kit):
        msg = (
            "a site's engine needs the socket at which its peer listens: add --socket SOCKET, the path that "
            f"`llmchain-fed peer` of {kit.name} is given."
        )
        raise ConfigError(msg)


def stop(processes: Iterable[subprocess.Popen[bytes]], *, patience: float = 10.0) -> None:
    """Ends engines with every process they started, also those that left their group.

    What does not end within `patience` seconds is killed.
    """
    import psutil

    trees: list[Any] = []
    roots = list(processes)
    for process in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            trees += [*root.children(recursive=True), root]  # collected first: orphans have no parent to find them by
    end(trees, patience)
    for process in roots:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def end(members: Iterable[Any], patience: float) -> None:
    """Ends processes (psutil's), and kills those that have not ended after `patience` seconds."""
    import psutil

    found = list(members)
    for member in found:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(found, timeout=patience)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=2)
