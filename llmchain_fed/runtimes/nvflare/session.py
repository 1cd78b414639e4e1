"""EngineSession: what the driver asks of the hub's engine, as few and quiet calls that survive its restart.

Knows the engine's session interface. Knows nothing of frames or rounds.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, MissingExtraError, TransportError, install
from llmchain_fed.runtimes.nvflare import kits

_T = TypeVar("_T")
_SECONDS = 10.0  # for a connection or a command
_REFUSALS = ("AuthenticationError", "AuthorizationError", "InvalidJobDefinition", "JobNotFound", "JobNotRunning")
_LONGEST = 1000  # characters of what the engine says


class _Quiet:
    """In place of the module `traceback`."""

    @staticmethod
    def print_exc(*_args: Any, **_kwargs: Any) -> None:
        """What failed is in the error that is raised."""


class EngineSession:
    """An administrator's session, opened when it is needed and again when it broke.

    Raises:
        ConfigError: It is no such kit.
        MissingExtraError: The extra `nvflare` is not installed.
    """

    def __init__(self, admin: Path) -> None:
        if not (admin / "startup" / "fed_admin.json").is_file():
            msg = f"{admin} is no administrator's kit: startup/fed_admin.json is missing. See `llmchain-fed provision`."
            raise ConfigError(msg)
        try:
            from nvflare.fuel.hci.client import api
        except ImportError as error:
            msg = f"the NVFlare runtime needs its engine: {install('nvflare', 'nvflare', 'psutil', 'typer')}"
            raise MissingExtraError(msg) from error
        # The session prints progress to the screen and has no switch for it (NVFlare 2.9.0, fuel/hci/client/api.py).
        if hasattr(api, "_print_hci_message"):
            api._print_hci_message = lambda *_args, **_kwargs: None
        # It prints the traceback of a server that is away, too.
        if hasattr(api, "traceback"):
            api.traceback = _Quiet()
        if hasattr(api, "secure_log_traceback"):
            api.secure_log_traceback = lambda *_args, **_kwargs: None
        # Its warnings about a server that is away reach whoever has set up logging, and not everyone's screen.
        logging.getLogger("nvflare").addHandler(logging.NullHandler())
        self._admin, self._lock = admin, threading.Lock()
        self._session: Any = None

    @property
    def port(self) -> int:
        """The hub's."""
        return kits.address(self._admin)[1]

    def connected(self) -> dict[str, float]:
        """Sites that the server knows → when it last heard of them, in seconds since the epoch.

        Raises:
            TransportError: The server does not answer.
        """
        info = self._ask(lambda session: session.get_system_info())
        return {client.name: float(client.last_connect_time) for client in info.client_info}

    def submit(self, folder: Path) -> str:
        """Submits a job; returns its id.

        Raises:
            TransportError: The server does not answer, or refuses it.
        """
        return str(self._ask(lambda session: session.submit_job(str(folder))))

    def status(self, job: str) -> tuple[str, str]:
        """A job's status, such as RUNNING or FINISHED:COMPLETED, and what the server says about its deployment.

        Raises:
            TransportError: The server does not answer, or does not know it.
        """
        meta = self._ask(lambda session: session.get_job_meta(job))
        said = "; ".join(map(str, meta.get("job_deploy_detail") or []))  # by sites, too
        return untrusted.printable(meta.get("status", ""), 100), untrusted.printable(said, _LONGEST)

    def abort(self, job: str) -> None:
        """Ends a job.

        Raises:
            TransportError: The server does not answer, or does not know it.
        """
        self._ask(lambda session: session.abort_job(job))

    def close(self) -> None:
        """Ends the session; left open, its connector would go on trying in the background."""
        with self._lock:
            self._end()

    def _ask(self, do: Callable[[Any], _T]) -> _T:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        with self._lock:
            try:
                if self._session is None:
                    # the engine's library tries for ten seconds where nobody listens
                    socket.create_connection(kits.address(self._admin), timeout=_SECONDS).close()
                    self._session = new_secure_session(kits.admin_name(self._admin), str(self._admin), timeout=_SECONDS)
                return do(self._session)
            except Exception as error:  # the engine's errors have no common root
                self._end()
                host, port = kits.address(self._admin)
                why = f"{type(error).__name__}: {untrusted.printable(error, _LONGEST)}"
                if type(error).__name__ in _REFUSALS:
                    msg = f"the hub's engine at {host}:{port} refused it ({why})."
                else:
                    msg = f"the hub's engine is out of reach: {host}:{port} did not answer ({why})."
                raise TransportError(msg) from error

    def _end(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            with suppress(Exception):  # it may be broken: that can be why it is ended
                session.close()
