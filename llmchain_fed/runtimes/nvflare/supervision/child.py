"""The process of NVFlare: its own program, with a guard at the hub's door and a wire to the parent that keeps it.

Knows NVFlare's connections (NVFlare 2.9, fuel/f3/sfm/conn_manager.py) and the wire. Knows nothing of screens, files or
restarts. The guard stands where a connection gets its name: there TLS has proven the key, and the former connection of
that name is not yet closed. NVFlare itself lets the later one of two evict the earlier, and each again every ten
seconds. Nothing here outlives the parent: its end closes the wire.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import runpy
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed import untrusted
from llmchain_fed.runtimes.nvflare.provisioning.registry import normal
from llmchain_fed.runtimes.nvflare.supervision import job_processes, news
from llmchain_fed.runtimes.nvflare.supervision.guard import Guard, Refusal, elsewhere
from llmchain_fed.runtimes.nvflare.supervision.handshakes import FramesInOrder

_log = logging.getLogger(__name__)
_EVERY = 2.0  # seconds between two reports
_AGAIN = 10.0  # seconds between two looks at who is connected, for who may no longer be
_WAITING = 200  # lines that the parent has not read
_REFUSED = "llmchain_fed_refused"  # property of a handshake: why the hub does not let a site in
_CODES = (news.ELSEWHERE, news.OTHER_KEY, news.NOT_ALLOWED, news.LATER)
_INSTANCE = "llmchain_fed_process"  # property of a handshake: which process it is, of those that have one certificate


class Wire:
    """To the parent: lines one way, and the other way only its end. A parent that does not read delays nobody."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 (else the processes of jobs keep it open)
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(None)
        self._lines: queue.Queue[bytes] = queue.Queue(maxsize=_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def tell(self, what: news.News) -> None:
        """Tells the parent, soon."""
        with suppress(queue.Full):
            self._lines.put_nowait(what.model_dump_json().encode() + b"\n")

    def _write(self) -> None:
        with suppress(OSError):  # the parent's end is noticed elsewhere
            while True:
                self._socket.sendall(self._lines.get())

    def end_with_parent(self) -> None:
        """Waits for the parent's end, and ends this process and those of its jobs."""
        with suppress(OSError):
            while self._socket.recv(1):
                pass
        import psutil

        for member in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        os._exit(1)


class Door:
    """Stands in NVFlare's connection manager: lets in, refuses, and sees who is there."""

    def __init__(self, wire: Wire, guard: Guard | None) -> None:
        self._wire, self._guard = wire, guard
        self._lock = threading.RLock()
        self._managers: list[Any] = []
        self._named: Any = None
        self._in_trouble = False
        """whether the parent was told that the registry cannot be read"""

    def install(self) -> None:
        """Takes the place of two of the manager's methods; NVFlare has no hook before a former connection is closed."""
        from nvflare.fuel.f3.sfm.conn_manager import ConnManager

        door, made = self, ConnManager.__init__
        self._named = ConnManager.update_endpoint

        def init(manager: Any, local_endpoint: Any, *arguments: Any, **named: Any) -> None:
            local_endpoint.set_prop(_INSTANCE, uuid.uuid4().hex)
            door._managers.append(manager)
            made(manager, local_endpoint, *arguments, **named)

        ConnManager.__init__ = init
        ConnManager.update_endpoint = lambda manager, connection, data: door.named(manager, connection, data)

    def named(self, manager: Any, connection: Any, data: dict[str, Any]) -> None:
        """A connection said whose it is; NVFlare compares that with its certificate afterwards."""
        if self._guard is None and data.get(_REFUSED) in _CODES and _is_hub(manager, connection):
            self._wire.tell(news.TurnedAway(code=data[_REFUSED]))
            return
        if self._guard is None or not _of_site(connection):
            self._named(manager, connection, data)
            return
        from nvflare.fuel.f3.cellnet.fqcn import FQCN
        from nvflare.fuel.f3.comm_error import CommError

        whole = str(FQCN.normalize(str(data.get("endpoint_name"))))
        with self._lock:
            try:  # first NVFlare's own rule, that the name is the certificate's: nobody gets another's into the list
                manager.identity_resolver.require_match(whole, _owner(connection), connection.get_name())
            except ValueError:
                self._named(manager, connection, data)  # refuses it
                return
            refusal = self._refusal(manager, connection, whole, data)
            if refusal is None:
                self._named(manager, connection, data)
                return
            self._turn_away(connection, refusal)
            raise CommError(CommError.ERROR, f"{whole} was not let in: {refusal.says}")

    def _refusal(self, manager: Any, connection: Any, whole: str, data: dict[str, Any]) -> Refusal | None:
        unknown = self._unknown(whole, connection)
        if unknown is not None:
            return unknown
        there = [c for c in _connections(manager, whole) if c is not connection]
        if not there or not _is_engine(whole):  # the processes of jobs come and go with their engine
            return None
        former = manager.sfm_endpoints[whole].endpoint.get_prop(_INSTANCE)
        if not elsewhere(former, data.get(_INSTANCE), _silent(there[0])):
            return None
        return Refusal(
            news.ELSEWHERE,
            f"is seen from two places: {_address(there[0])}, which stays, and {_address(connection)}, which was "
            "refused: its kit was copied, or its engine started twice. Ask its operator to stop one of them",
        )

    def _unknown(self, whole: str, connection: Any) -> Refusal | None:
        """Whether the certificate may not come under its name; the hub's own processes have the hub's."""
        if self._guard is None or whole.split(".")[0] == news.HUB:
            return None
        owner, session = _owner(connection), _is_admin(whole)
        if session and "@" not in owner:  # a session's name is made up: NVFlare takes it with any certificate
            return Refusal(news.NOT_ALLOWED, "came as an administrator, with a site's certificate")
        return self._guard.refusal(owner, _fingerprint(connection), admin=session)

    def _turn_away(self, connection: Any, refusal: Refusal) -> None:
        """Tells the site in a further handshake, which is how engines say something of themselves, and hangs up."""
        from nvflare.fuel.f3.sfm.constants import HandshakeKeys, Types

        told = {HandshakeKeys.ENDPOINT_NAME: news.HUB, HandshakeKeys.TIMESTAMP: time.time(), _REFUSED: refusal.code}
        connection.send_dict(Types.READY, 1, told)
        connection.conn.close()
        name, says = untrusted.printable(_owner(connection), 200), untrusted.printable(refusal.says, 1900)
        self._wire.tell(news.RefusedSite(name=name, code=refusal.code, address=_address(connection), says=says))

    def report(self) -> None:
        """Tells again and again who is there, and puts out who may no longer be."""
        looked = time.monotonic()
        while True:
            time.sleep(_EVERY)
            try:
                self._wire.tell(news.Peers(peers=self._peers()))
                if self._guard is not None and time.monotonic() - looked >= _AGAIN:
                    looked = time.monotonic()
                    self._look_at_registry(self._guard)
                    self._put_out()
            except Exception as error:  # of a connection that is being closed just now: the next look is another
                _log.warning("who is connected could not be seen: %s", untrusted.printable(error, 300))

    def _peers(self) -> dict[str, news.SeenPeer]:
        return {
            untrusted.printable(name, 200): news.SeenPeer(
                address=_address(connection), fingerprint=_fingerprint(connection), silent=_silent(connection)
            )
            for name, connection in self._there()
            if (name == news.HUB if self._guard is None else _of_site(connection) and _is_engine(name))
        }

    def _look_at_registry(self, guard: Guard) -> None:
        trouble = guard.trouble()
        if self._in_trouble == (trouble is not None):
            return
        self._in_trouble = trouble is not None
        says = (
            "the authority's registry can be read again"
            if trouble is None
            else f"{untrusted.printable(trouble, 1500)} Until it can, who was in it stays and comes back, others wait"
        )
        self._wire.tell(news.Notice(says=says))

    def _put_out(self) -> None:
        for name, connection in self._there():
            if _of_site(connection):
                unknown = self._unknown(name, connection)
                if unknown is not None and unknown.code != news.LATER:
                    self._turn_away(connection, unknown)

    def _there(self) -> Iterator[tuple[str, Any]]:
        for manager in list(self._managers):
            for name in list(manager.sfm_endpoints):
                for connection in _connections(manager, name):
                    yield name, connection


def _connections(manager: Any, name: str) -> list[Any]:
    endpoint = manager.sfm_endpoints.get(name)
    return list(endpoint.connections) if endpoint is not None else []


def _of_site(connection: Any) -> bool:
    """Whether somebody dialled the hub's port, rather than a process of this engine's own."""
    from nvflare.fuel.f3.cellnet.identity import is_mtls_connection
    from nvflare.fuel.f3.drivers.connector_info import Mode

    connector = connection.conn.connector
    return bool(connector.mode == Mode.PASSIVE and is_mtls_connection(connector.params))


def _is_hub(manager: Any, connection: Any) -> bool:
    """At a site: whether this engine dialled it, and its certificate is the hub's; anybody may dial this engine."""
    from nvflare.fuel.f3.cellnet.identity import is_mtls_connection
    from nvflare.fuel.f3.drivers.connector_info import Mode

    connector = connection.conn.connector
    if connector.mode != Mode.ACTIVE or not is_mtls_connection(connector.params):
        return False
    try:
        manager.identity_resolver.require_match(news.HUB, _owner(connection), connection.get_name())
    except ValueError:
        return False
    return True


def _is_admin(name: str) -> bool:
    """Whether it is an administrator's: their sessions come under names that they make up each time."""
    from nvflare.fuel.utils.admin_name_utils import is_valid_admin_client_name

    return bool(is_valid_admin_client_name(name))


def _is_engine(name: str) -> bool:
    """Whether it is a site's engine, rather than a process of a job, the hub's or an administrator's."""
    return "." not in name and name != news.HUB and not _is_admin(name)


def _owner(connection: Any) -> str:
    """The name in the certificate."""
    return str(connection.conn.get_conn_properties().get("peer_cn", ""))


def _fingerprint(connection: Any) -> str:
    """Of the certificate with which the connection was made; empty where none can be seen, which nobody knows."""
    secure = connection.conn.websocket.get_extra_info("ssl_object")
    found = secure.getpeercert(binary_form=True) if secure is not None else None
    return normal(hashlib.sha256(found).hexdigest()) if found else ""


def _address(connection: Any) -> str:
    return untrusted.printable(connection.conn.get_conn_properties().get("peer_addr", "?"), 200)


def _silent(connection: Any) -> float:
    """Seconds since something was heard over it."""
    if not connection.last_activity:
        connection.last_activity = time.time()  # it was made just now
    return max(time.time() - float(connection.last_activity), 0.0)


def main(descriptor: str, kit: str, authority: str, module: str, *arguments: str) -> None:
    """Runs NVFlare's program; `authority` may be empty."""
    wire = Wire(int(descriptor))
    threading.Thread(target=wire.end_with_parent, daemon=True).start()
    at_hub = module.endswith("server_train")
    door = Door(wire, Guard(Path(kit), Path(authority) if authority else None) if at_hub else None)
    door.install()
    FramesInOrder().install()
    job_processes.install(lambda says: wire.tell(news.Notice(says=says)))
    threading.Thread(target=door.report, daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
