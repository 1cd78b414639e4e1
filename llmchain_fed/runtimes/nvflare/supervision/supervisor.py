"""Supervisor: the parent of an engine's process for months. It says in lines what happens, and tidies up.

Knows one kit, one process of NVFlare with its children, signals and the clock. Knows nothing of models or jobs, nor of
screens: each line goes to whoever was given. It stays small: no torch, and NVFlare only to check a certificate.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket as sockets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.nvflare import certificates, engine, engine_state, kits
from llmchain_fed.runtimes.nvflare.supervision import logs, news, reaching
from llmchain_fed.runtimes.nvflare.supervision.guard import Guard
from llmchain_fed.runtimes.nvflare.supervision.standing import TURNED_AWAY, Diary, HubLink, SitesSeen
from llmchain_fed.storage import own_files

LASTING, AGAIN = 2, 4
"""statuses with which it ends by itself: mend what the line says, or start it again"""
_TICK, _WRITE, _TIDY, _DAY = 0.3, 10.0, 600.0, 86_400.0  # seconds
_PROBE = 3.0  # seconds between two attempts to reach the hub
_LOOK = 20.0  # seconds between two looks why a site's engine, which tries by itself, is not connected
_HALF_MADE = 90.0  # seconds after which one that was never connected is started anew
_PATIENCE = 6.0  # seconds for children to end
_OUT = 20.0  # seconds after which a site whose name is in use tries again
_NOT_NOW = -1
_WRONG_KIT = (102, 103)  # statuses of NVFlare: an unsafe component, a configuration that makes no sense


class Supervisor:
    """Runs a kit's engine until it is told to stop, or cannot go on.

    Args:
        socket: At a site: where its peer listens.
        authority: At the hub: the authority's folder, whose registry then says who may come.
    """

    def __init__(
        self, kit: Path, *, socket: Path | None = None, authority: Path | None = None, say: Callable[[str], None]
    ) -> None:
        self._kit, self._socket, self._authority, self._say = kit.absolute(), socket, authority, say
        self._hub = kits.is_hub(kit)
        host, self._port = kits.address(kit)
        self._where = f"{host}:{self._port}"
        self._name = news.HUB if self._hub else kits.site_name(kit)
        self._sites, self._link = SitesSeen(), HubLink(self._where)
        self._signal = 0
        self._diary = Diary(
            self._kit, self._name, self._where, say, self._sites, None if self._hub else self._link, socket
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._tree: list[Any] = []
        self._wire: sockets.socket | None = None
        self._heard = b""
        self._next: dict[str, float] = {}
        self._logged = 0
        """byte of the log at which NVFlare's process began to write"""
        self._was_in = self._turned = self._open = False
        """whether NVFlare's process was connected; the hub turned its former one away; the way to the hub was open"""

    def run(self) -> int:
        """The status of the command: 130 or 143 once it was told to stop, `LASTING` or `AGAIN` if it cannot go on.

        Raises:
            ConfigError: See `engine.check`; another process has the kit.
        """
        engine.needs_socket(self._kit, self._socket)
        engine.check_folder(self._kit)
        with own_files.lock(self._kit / engine.LOCK, f"the kit {self._kit.name}"), self._signals():
            try:
                engine.check(self._kit, reach=False)
                self._prepare()
                while not self._signal:
                    status = self._once()
                    if status is not None:
                        return status
                self._diary.tell("stopping", "stopping; the same command starts it again")
                return 128 + self._signal
            except ConfigError as error:
                self._diary.lasting = True
                self._diary.write("ended", str(error))
                raise
            finally:
                self._end()
                if self._diary.state != "ended":
                    self._diary.write("ended", "it was told to stop" if self._signal else "ended")

    def _once(self) -> int | None:
        """From the wait for the hub to the end of NVFlare's process; None for another time, or if it was stopped.

        One that is not let in, or does not get through, is ended: NVFlare is half made if it has to wait for longer
        than 30 seconds.
        """
        if not self._hub:
            self._wait_for_hub()
        if self._signal:
            return None
        self._start()
        status = self._watch()
        if status != _NOT_NOW:
            return status
        self._end()
        self._sleep(_OUT)
        return None

    # --- before it runs ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._hub:
            Guard(self._kit, self._authority)  # reads its list: a spoilt one is told now, in a line
        elif self._authority is not None:
            msg = "the authority's folder is of use to the hub's engine alone: leave --authority out at a site."
            raise ConfigError(msg)
        try:
            logs.configure(self._kit)
            if self._hub:
                engine_state.point(self._port, self._kit)
        except OSError as error:
            msg = f"the kit {self._kit} cannot be used: {error.strerror or error}."
            raise ConfigError(msg) from error
        self._warn()
        proxy = reaching.proxy_ignored(self._kit) if not self._hub else None
        if proxy is not None:
            self._say(proxy)
        self._tidy()

    def _warn(self) -> None:
        """Says what will stop working one day; again each day."""
        self._next["warn"] = time.monotonic() + _DAY
        self._diary.certificate_ends = time.time() + certificates.days_left(self._kit) * _DAY
        for warning in certificates.warnings(self._kit):
            self._say(f"warning: {warning}")

    def _wait_for_hub(self) -> None:
        while not self._signal:
            found = self._probe()
            if found is None:
                return
            if found.lasting:
                raise ConfigError(found.says + ".")
            self._diary.repeat("waiting", f"{found.says}; waiting")
            self._sleep(_PROBE)

    def _probe(self) -> reaching.Hindrance | None:
        return reaching.look(self._kit, is_stopped=lambda: bool(self._signal))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._signal and time.monotonic() < until:
            time.sleep(min(_TICK, seconds))

    def _start(self) -> None:
        ours, theirs = sockets.socketpair()
        command, variables = engine.nvflare_command(self._kit, self._socket, theirs.fileno(), self._authority)
        output = logs.open_file(self._kit)
        self._logged, self._was_in, self._open = logs.size(self._kit), False, False
        self._next |= {"look": time.monotonic() + _LOOK, "anew": time.monotonic() + _HALF_MADE}
        try:
            self._child = subprocess.Popen(  # noqa: S603 (this interpreter, no shell)
                command, cwd=self._kit, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True, umask=0o077, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        finally:
            os.close(output)
            theirs.close()
        ours.settimeout(0)
        self._wire = ours
        if not self._turned:
            ready = f"the hub's engine is up at port {self._port}" if self._hub else "its engine is up"
            self._diary.tell("running", f"{ready} (process {self._child.pid}); its log is {self._kit / logs.FILE}")

    # --- while it runs ----------------------------------------------------------------------------------------------

    def _watch(self) -> int | None:
        """Until it is told to stop (None), or cannot go on."""
        child, wire = self._child, self._wire
        if child is None or wire is None:
            return None
        with selectors.DefaultSelector() as waiting:
            waiting.register(wire, selectors.EVENT_READ)
            while not self._signal:
                for _ in waiting.select(timeout=_TICK):
                    status = self._hear(wire)
                    if status is not None:
                        return status
                if child.poll() is not None:
                    self._sleep(_TICK)  # who ends all processes at once ends this one as well
                    return None if self._signal else self._died(child.returncode)
                self._regularly()
                if not self._hub and not self._link.connected and time.monotonic() >= self._next["look"]:
                    self._look()
                    if not self._was_in and time.monotonic() >= self._next["anew"]:
                        return _NOT_NOW
        return None

    def _look(self) -> None:
        """Says why there is no connection to the hub; NVFlare by itself tries for ever, without a word."""
        found = self._probe()
        self._next["look"] = time.monotonic() + _LOOK
        why = found.says if found is not None else f"{reaching.NO_FURTHER} See {self._kit / logs.FILE}"
        was_open, self._open = self._open, found is None
        if not self._signal and (was_open or not self._open):  # a way that has just opened is tried in a moment
            self._diary.repeat("running", f"not connected to the hub at {self._where}: {why}; trying again")

    def _hear(self, wire: sockets.socket) -> int | None:
        try:
            data = wire.recv(2**16)
        except OSError:
            data = b""
        if not data:
            time.sleep(_TICK)  # it ended: its status says more
            return None
        *lines, self._heard = (self._heard + data).split(b"\n")
        if len(self._heard) > news.LONGEST:
            self._heard = b""
        for line in lines:
            with suppress(TransportError):
                told = news.read(line)
                status = self._take(told)
                if status is not None:
                    return status
        return None

    def _take(self, told: news.News) -> int | None:
        if isinstance(told, news.TurnedAway):
            return self._turned_away(told.code)
        lines = []
        if isinstance(told, news.Notice):
            lines = [told.says if self._hub else f"{told.says}; see {self._kit / logs.FILE}"]
        elif isinstance(told, news.RefusedSite):
            lines = self._sites.refused(told)
        elif self._hub:
            lines = self._sites.heard(told.peers)
        else:
            line = self._link.heard(told.peers)
            lines = [line] if line else []
            if self._link.connected:
                self._was_in, self._turned, self._open = True, False, False
            elif line:
                self._next["look"] = time.monotonic() + _LOOK
                found = self._probe()
                lines = [f"{line}: {found.says if found else 'the hub answers again'}; NVFlare tries again"]
        for line in lines:
            self._diary.tell("running", line)
        return None

    def _turned_away(self, code: int) -> int | None:
        why = TURNED_AWAY.get(code, TURNED_AWAY[news.NOT_ALLOWED]).format(name=self._name)
        if code in (news.ELSEWHERE, news.LATER):
            self._turned = True
            self._diary.repeat("waiting", f"{why}; waiting")
            return _NOT_NOW
        self._diary.lasting = True
        mark = kits.fingerprint(self._kit / "startup" / "client.crt")
        self._diary.tell("ended", f"{why}. Tell the hub's operator this kit's fingerprint, by telephone: {mark}")
        return LASTING

    def _died(self, status: int) -> int:
        self._diary.lasting = status in _WRONG_KIT
        error = logs.last_error(self._kit, self._logged) if status >= 0 else ""  # a signal is nobody's error
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        self._diary.tell(
            "ended", f"NVFlare's process ended {how}{': ' + error if error else ''} (see {self._kit / logs.FILE})"
        )
        return LASTING if self._diary.lasting else AGAIN

    def _regularly(self) -> None:
        now = time.monotonic()
        if now >= self._next.get("write", 0.0):
            self._next["write"] = now + _WRITE
            self._tree = self._members()
            self._diary.write()
            if logs.bound(self._kit):
                self._logged = 0
        if now >= self._next.get("tidy", 0.0):
            self._tidy()
        if now >= self._next.get("warn", 0.0):
            self._warn()

    def _tidy(self) -> None:
        self._next["tidy"] = time.monotonic() + _TIDY
        with suppress(OSError):  # who tidies the temporary folder takes what is not written for days
            if self._hub:
                engine_state.point(self._port, self._kit)
        logs.remove_ended_jobs(self._kit, self._command_lines())

    def _command_lines(self) -> Iterator[str]:
        import psutil

        for member in self._members():
            with suppress(psutil.Error):
                yield " ".join(member.cmdline())

    def _members(self) -> list[Any]:
        """NVFlare's process and all that it started."""
        import psutil

        if self._child is None:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._child.pid)
            return [root, *root.children(recursive=True)]
        return self._tree

    # --- its end ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, Ctrl-C and a closed terminal are noticed within `_TICK`."""

        def told(number: int, _: object) -> None:
            self._signal = signal.SIGTERM if number == signal.SIGHUP else number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        former = {number: signal.signal(number, told) for number in wanted}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        if self._child is not None:
            # what was seen before counts too: the processes of jobs lose their parent when NVFlare's process dies
            engine.end({member.pid: member for member in (*self._tree, *self._members())}.values(), _PATIENCE)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=2)
        if self._wire is not None:
            self._wire.close()
        self._child, self._wire, self._tree, self._heard = None, None, [], b""
        logs.bound(self._kit)
