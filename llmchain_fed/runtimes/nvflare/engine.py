"""The engine's processes: checks a kit before it is used, starts hub or site, and ends them with all their children.

Knows kits, processes and TLS. Knows nothing of jobs or models. The checks are here because the engine itself waits
forever, mostly without a word, on a wrong certificate or a port in use.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.nvflare import certificates, kits
from llmchain_fed.runtimes.nvflare.job import SOCKET

_MODULES = {True: "nvflare.private.fed.app.server.server_train", False: "nvflare.private.fed.app.client.client_train"}


def check(kit: Path) -> None:
    """Makes sure that an engine started from this kit can work.

    Raises:
        ConfigError: Certificate expired, not yet valid, not of this federation's authority or of another name; the
            hub's port in use; the hub of another authority or refusing this certificate.
    """
    hub = kits.is_hub(kit)
    certificates.check(kit)
    host, port = kits.address(kit)
    if hub:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                msg = f"port {port} is in use ({error.strerror}): stop what listens there, or provision another port."
                raise ConfigError(msg) from error
    else:
        _check_hub(kit, host, port)


def _check_hub(kit: Path, host: str, port: int) -> None:
    """Shakes hands with the hub as the engine will; a hub that is not up yet is no error, the engine waits for it."""
    startup = kit / "startup"
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.check_hostname = False  # the engine pins the authority and the identity, not the address
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    try:
        with socket.create_connection((host, port), timeout=5) as plain, context.wrap_socket(plain) as secure:
            secure.settimeout(0.5)
            with suppress(TimeoutError):  # TLS 1.3: a refusal of our certificate comes with the first read
                secure.recv(1)
    except ssl.SSLError as error:
        why = error.reason or error
        msg = f"the hub at {host}:{port} and this site do not accept each other's certificates ({why})."
        raise ConfigError(msg) from error
    except OSError:
        return


def start(
    kit: Path, *, socket: Path | None = None, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Starts the hub's or a site's engine in the background, after `check`.

    Args:
        kit: Whose.
        socket: At a site: where its peer listens.
        environment: Further variables.
        log: Where its output goes; `engine.log` in the kit by default.

    Raises:
        ConfigError: See `check`; a site without a socket.
    """
    kit = kit.absolute()
    check(kit)
    command, variables = command_of(kit, socket)
    descriptor = os.open(log or kit / "engine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        return subprocess.Popen(  # noqa: S603 (this interpreter, no shell)
            command,
            cwd=kit,
            env=os.environ | variables | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=0o077,  # its logs and what it stores are this account's
        )


def command_of(kit: Path, socket: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """The engine's command line in the foreground, and the environment variables it needs.

    Raises:
        ConfigError: A site without a socket.
    """
    hub = kits.is_hub(kit)
    settings = ["secure_train=true", "config_folder=config"]
    # a kit may come from elsewhere and is the engine's working directory, of which no module is to be imported
    variables = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    if hub:
        settings += ["org=hub"]
    else:
        if socket is None:
            msg = f"a site's engine needs the socket at which its peer listens: start {kit.name} with socket=…"
            raise ConfigError(msg)
        name = kits.site_name(kit)
        settings += [f"uid={name}", f"org={name}", "heart_beat_interval=4"]
        variables[SOCKET] = str(Path(socket).absolute())
    configuration = "fed_server.json" if hub else "fed_client.json"
    command = [sys.executable, "-m", _MODULES[hub], "-m", str(kit), "-s", configuration, "--set", *settings]
    return command, variables


def stop(processes: Iterable[subprocess.Popen[bytes]], *, patience: float = 10.0) -> None:
    """Ends engines with every process they started, also those that left their group; kills what does not end.

    Args:
        processes: Engines that `start` returned.
        patience: seconds before they are killed.
    """
    import psutil

    trees: list[psutil.Process] = []
    roots = list(processes)
    for process in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            trees += [*root.children(recursive=True), root]  # collected first: orphans have no parent to find them by
    for member in trees:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(trees, timeout=patience)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=5)
    for process in roots:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def wait_for_hub(kit: Path, seconds: float = 60.0) -> None:
    """Waits until the hub's port answers.

    Raises:
        ConfigError: It does not within `seconds`.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(kits.address(kit), timeout=1):
            return
        time.sleep(0.2)
    msg = f"no hub answers at {':'.join(map(str, kits.address(kit)))} within {seconds:g} s: see engine.log in its kit."
    raise ConfigError(msg)
