"""The process group that ranks talk in: the one there is, or one that is made, with the store that its ranks share.

Knows torch.distributed and the variables of torchrun. Knows nothing of messages, participants or rounds.
"""

from __future__ import annotations

import atexit
import os
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.federated.reporting import lines
from llmchain_fed.runtimes.aside import Aside
from llmchain_fed.runtimes.heartbeat import Heartbeat
from llmchain_fed.untrusted import one_line, shown

LEADER = 0
_WORD_AFTER = 10.0  # seconds of waiting for the others before a line says so
_UNWATCHED = "a frozen rank will not be named, and costs `timeout`"
_ours = False  # whether the process group was made here
_heartbeat: tuple[Any, Heartbeat | None] = (None, None)  # of which process group
_said: list[str] = []
_connections: set[tuple[int, int]] = set()  # of gloo, by descriptor and inode


@dataclass(frozen=True)
class Group:
    """Where messages go, and who is seen to live."""

    messages: Any
    heartbeat: Heartbeat | None
    """None where the process group has no store whose connection can be doubled: then nobody is watched"""
    host: str
    """who keeps the store, for a message"""


def say(text: str) -> None:
    """One line on stderr, once: in the tracebacks of several ranks it would be buried."""
    if text not in _said:
        _said.append(text)
        lines.write(f"llmchain_fed: {one_line(text)}")


def words(error: BaseException) -> str:
    """What gloo says, without its source file and its advice."""
    found = str(error).split("This is typically caused")[0]
    return shown(found.rpartition(".cc:")[2].partition("] ")[2].strip(" .") or found, 300)


def join(timeout: timedelta) -> Group:
    """The group that carries messages: of the process group there is, or of one that is made now.

    Raises:
        ConfigError: The process was not started by torchrun, or another program listens at its port.
        FederationError: The ranks do not find each other in time.
    """
    sockets = _sockets()
    if dist.is_initialized():
        patience = timeout * (dist.get_world_size() + 1)
        messages = dist.new_group(backend="gloo", timeout=patience)  # the maker's to leave
    else:
        store, rank, world = _store(timeout)
        sockets = _sockets()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        patience = timeout * (world + 1)
        with _finding(rank, world, timeout):
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        global _ours
        _ours = True
        cpu = not torch.cuda.is_available()
        messages = dist.group.WORLD if cpu else dist.new_group(backend="gloo", timeout=patience)
    _connections.update(_sockets() - sockets)
    atexit.unregister(_end)
    atexit.register(_end)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Group(messages, _watch(), "torchrun's agent" if by_agent else f"rank {LEADER}")


def _store(timeout: timedelta) -> tuple[Any, int, int]:
    """The store at the master's port, this rank, and how many there are."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        msg = (
            f"{', '.join(missing)} are not set: start the script with torchrun --nproc-per-node 3 script.py, or leave "
            "runtime out to run all participants in this process."
        )
        raise ConfigError(msg)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with _finding(rank, world, timeout):
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world,
            is_master=not by_agent and rank == LEADER,
            timeout=timeout,
        )
    # The agent's store outlives a restart and still has the dead ranks' addresses, which the new ones would
    # dial; with keys of its own each attempt finds only itself. The count is each agent's own, so over several
    # machines this is right when all of them restart. https://github.com/pytorch/pytorch/issues/135712
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"llmchain_fed/{attempt}", store), rank, world  # type: ignore[attr-defined]


@contextmanager
def _finding(rank: int, world: int, timeout: timedelta) -> Iterator[None]:
    """While ranks look for each other: a line where it takes long, and an error of ours where they do not."""
    where, most = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", f"{timeout.total_seconds():g} s"
    word = f"rank {rank} of {world} waits for the others at {where}, for {most} at most"
    waiting = threading.Timer(_WORD_AFTER, say, [word])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            msg = (
                f"port {os.environ['MASTER_PORT']} is in use on this machine, by another job perhaps: choose a free "
                "one as MASTER_PORT, the same on all ranks (torchrun --master-port)."
            )
            raise ConfigError(msg) from None
        msg = f"rank {rank} of {world} found no others at {where} within {most}: {shown(str(error), 300)}"
        raise FederationError(msg) from error
    finally:
        waiting.cancel()


def _watch() -> Heartbeat | None:
    """The heartbeat of the process group there is; one for all that share it, as long as it lives."""
    global _heartbeat
    group, known = _heartbeat
    if group is not dist.group.WORLD:
        if known is not None:
            known.close()
        _heartbeat = dist.group.WORLD, _beating()
    return _heartbeat[1]


def _beating() -> Heartbeat | None:
    """A heartbeat in the default store, if there is one whose connection can be doubled."""
    rank = dist.get_rank()
    before = _sockets()
    try:
        store = dist.distributed_c10d._get_default_store()  # it has no public name
        whole = store
        while isinstance(whole, dist.PrefixStore):  # type: ignore[attr-defined]
            whole = whole.underlying_store
        if isinstance(whole, dist.FileStore):  # type: ignore[attr-defined]
            msg = "a FileStore, whose lock a frozen rank may have"
            raise TypeError(msg)
        store = dist.PrefixStore("llmchain_fed", store.clone())  # type: ignore[attr-defined]
    except Exception as error:  # torch's private parts: whatever they raise, it is said, and no job fails of it
        if rank == LEADER:
            say(f"this process group has no store to watch its ranks by ({error}): {_UNWATCHED}")
        return None
    own = _sockets() - before
    others = range(LEADER + 1, dist.get_world_size()) if rank == LEADER else (LEADER,)

    def failed(error: Exception) -> None:
        say(
            f"rank {rank} can watch the others no more ({type(error).__name__}: {shown(str(error), 300)}): {_UNWATCHED}"
        )

    return Heartbeat(store, rank, others, gone=lambda: _closed(own), failed=failed)


def leave() -> None:
    """Leaves the process group, if it was made here."""
    global _ours, _heartbeat
    if _heartbeat[1] is not None:
        _heartbeat[1].close()
    if Aside.left_behind():
        _hang_up()
    _heartbeat = None, None
    if _ours and dist.is_initialized():
        _ours = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()


def _end() -> None:
    """At the process's end: says what the script died of, in the last line of its own output and to who misses it."""
    error = getattr(sys, "last_value", None)
    if isinstance(error, Exception) and dist.is_initialized() and str(error) not in _said:
        why = f"{type(error).__name__}: {error}"
        say(f"rank {dist.get_rank()} ended: {why}")
        if _heartbeat[1] is not None:
            _heartbeat[1].leave_word(why)
    leave()


def _hang_up() -> None:
    """Ends all waits for who will never answer: gloo has no other way than that their connection breaks."""
    for connection in _open(_connections):
        with connection, suppress(OSError):
            connection.getpeername()  # one that listens stays: gloo's thread that accepts would end the process
            connection.shutdown(socket.SHUT_RDWR)
    until = time.monotonic() + 1.0
    for thread in Aside.left_behind():
        thread.join(max(until - time.monotonic(), 0.0))


def _open(descriptors: set[tuple[int, int]]) -> Iterator[socket.socket]:
    """Those of these sockets that are still what they were."""
    for descriptor, inode in descriptors:
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                yield socket.socket(fileno=os.dup(descriptor))


def _closed(descriptors: set[tuple[int, int]]) -> bool:
    """Whether the other side has closed these connections, none of which anything is awaited from."""
    found = False
    for connection in _open(descriptors):
        with connection, suppress(OSError):
            try:
                found |= connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except ConnectionError:  # reset, because it was killed
                found = True
    return found


def _sockets() -> set[tuple[int, int]]:
    """This process's open sockets."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with suppress(OSError):
                state = os.fstat(int(name))
                if stat.S_ISSOCK(state.st_mode):
                    found.add((int(name), state.st_ino))
    return found


def cores() -> int:
    """Cores this process may use; macOS cannot say which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
