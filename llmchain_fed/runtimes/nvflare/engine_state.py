"""EngineState: what an engine's own process writes down of itself, for `llmchain-fed status` and the hub's loop.

Knows one JSON file in a kit, and where on this machine a hub's engine writes it. Knows nothing of processes or TLS.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.storage.own_files import write_whole

FILE = "engine_state.json"
_LARGEST = 2**23  # bytes: all sites that there can be
_LONGEST_PATH = 2**13  # bytes
_Text = Annotated[str, Field(max_length=2000)]
_Name = Annotated[str, Field(max_length=256)]
State = Literal["starting", "waiting", "running", "stopping", "ended"]


class SeenSite(untrusted.Strict):
    """A site as the hub's engine sees it."""

    connected: bool = False
    since: float | None = None
    """seconds since the epoch since when it is connected, or is not"""
    fingerprint: _Text | None = None
    """of the certificate that it came with"""
    trouble: _Text | None = None
    """what is wrong, in a sentence: another key tried to come under its name, it is seen from two places, …"""


class EngineState(untrusted.Strict):
    """All of the file."""

    name: _Name
    """the site's; "server" at the hub, which no site can have"""
    pid: int
    started: float
    """seconds since the epoch, as all times here"""
    written: float
    state: State
    says: _Text
    """one sentence: what it does or waits for"""
    hub: _Text
    """host:port"""
    connected: bool | None = None
    """whether there is a connection to the hub; None at the hub itself"""
    since: float | None = None
    """since when it is or is not"""
    certificate_ends: float | None = None
    lasting: bool = False
    """it ended by itself, and a start alone changes nothing: `says` tells what to mend"""
    socket: Annotated[str, Field(max_length=4096)] | None = None
    """at a site: where its peer listens"""
    sites: dict[_Name, SeenSite] = Field(default_factory=dict, max_length=10_000)
    """at the hub: who came, by name"""


def write(kit: Path, state: EngineState) -> None:
    """Puts the state into a kit, for this account alone.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(kit / FILE, state.model_dump_json(indent=1), mode=0o600)


def read(kit: Path) -> EngineState | None:
    """What the engine of a kit wrote last; None where it never wrote.

    Raises:
        ConfigError: It is none of ours.
    """
    path, what = kit / FILE, f"{FILE} of {kit.name}"
    if not path.is_file():
        return None
    data = untrusted.read_file(path, most=_LARGEST, what=what, error=ConfigError)
    found = untrusted.read_json(data, most=_LARGEST, what=what, error=ConfigError)
    return untrusted.checked(EngineState, found, what=what, error=ConfigError)


def of_hub(port: int) -> EngineState | None:
    """What the hub's engine of this machine that listens at a port wrote last; None where none of this account does.

    Raises:
        ConfigError: What it wrote is none of ours.
    """
    try:
        path = pointer(port)
    except OSError:
        return None
    if not path.is_file():
        return None
    data = untrusted.read_file(path, most=_LONGEST_PATH, what=f"{path.name}", error=ConfigError, follow=False)
    with untrusted.decoding(path.name, ConfigError):
        kit = Path(data.decode())
    return read(kit)


def point(port: int, kit: Path) -> None:
    """Lets the hub's engine of a kit be found from its port.

    Raises:
        OSError: It cannot be.
    """
    write_whole(pointer(port), str(kit), mode=0o600)


def pointer(port: int) -> Path:
    """The file on this machine that says in which kit the engine of the hub at a port is: this account's alone.

    Raises:
        OSError: There can be none.
    """
    folder = Path(tempfile.gettempdir()) / f"llmchain_fed-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "is not this account's folder", str(folder))  # anybody can write to /tmp
    return folder / f"hub-{port}"
