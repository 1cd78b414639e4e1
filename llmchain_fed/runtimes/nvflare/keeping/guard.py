"""Guard: at the hub, which certificate may come under which name; it remembers the first that came.

Knows names, fingerprints, one file in the hub's kit and the authority's registry. Knows nothing of connections.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.own_files import write_whole

FILE = "known_sites.json"
HEARD = 10.0  # seconds since a site's last sign of life within which nobody else comes under its name
_LARGEST = 2**22  # bytes
_MOST = 10_000  # names


class Known(untrusted.Strict):
    """Who came first under a name."""

    fingerprint: Annotated[str, Field(max_length=200)]
    first_seen: float
    """seconds since the epoch"""


class KnownSites(untrusted.Strict):
    """All of the file."""

    sites: dict[Annotated[str, Field(max_length=256)], Known] = Field(default_factory=dict, max_length=_MOST)


class Guard:
    """Answers whether a certificate may come under a name.

    Args:
        kit: The hub's.
        authority: Its folder, whose registry decides then; else the first certificate of a name is remembered.
        now: The clock, in seconds since the epoch.

    Raises:
        ConfigError: The list, or the registry, is none of ours.
    """

    def __init__(self, kit: Path, authority: Path | None = None, *, now: Callable[[], float] = time.time) -> None:
        self._path, self._authority, self._now = kit / FILE, authority, now
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._known = KnownSites()
        if authority is None:
            self._read_again()
        else:
            from llmchain_fed.runtimes.nvflare import registry

            registry.read(authority)

    def refusal(self, name: str, fingerprint: str, *, admin: bool = False) -> str | None:
        """Why this certificate may not come under this name, with what the hub's operator does; None where it may.

        Args:
            name: In the certificate.
            fingerprint: The certificate's.
            admin: Whether it is an administrator's, whose kits are made at the hub: only a registry tells them apart.
        """
        with self._lock:
            if self._authority is not None:
                return self._by_registry(name, fingerprint)
            return None if admin else self._by_memory(name, fingerprint)

    def _by_registry(self, name: str, fingerprint: str) -> str | None:
        from llmchain_fed.runtimes.nvflare import registry

        try:
            return registry.read(self._authority or Path()).allowed(name, fingerprint)
        except ConfigError as error:  # then nobody can be told from a stranger
            return f"the authority's registry cannot be read: {error}"

    def _by_memory(self, name: str, fingerprint: str) -> str | None:
        with suppress(ConfigError):  # spoilt meanwhile: what is remembered counts on
            self._read_again()
        known = self._known.sites.get(name)
        if known is None and len(self._known.sites) < _MOST:
            self._known.sites[name] = Known(fingerprint=fingerprint, first_seen=self._now())
            with suppress(OSError):  # a full disk shuts nobody out; it is remembered until this process ends
                write_whole(self._path, self._known.model_dump_json(indent=1), mode=0o600)
                self._stamp = self._stamp_now()
            return None
        if known is not None and known.fingerprint == fingerprint:
            return None
        if known is None:
            return f"{self._path} holds {_MOST} names and takes no more"
        since = time.strftime("%Y-%m-%d", time.gmtime(known.first_seen))
        return (
            f"another key came under its name: known since {since} is {known.fingerprint}, presented was {fingerprint}."
            f" If its operator confirms the new one by telephone, take {name} out of {self._path}; else somebody "
            "has a certificate under a name that is not theirs"
        )

    def _read_again(self) -> None:
        """Takes over what an operator changed in the file; where there is none, all are new."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            self._known = KnownSites()
            return
        what, remedy = f"{FILE} of the hub's kit", "Put it back from a back-up, or remove it: all are new then."
        data = untrusted.read_file(self._path, most=_LARGEST, what=what, error=ConfigError)
        found = untrusted.read_json(data, most=_LARGEST, what=what, error=ConfigError)
        self._known = untrusted.checked(KnownSites, found, what=what, error=ConfigError, remedy=remedy)

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


def elsewhere(former: str | None, instance: str | None, silent: float) -> bool:
    """Whether a process that comes under a name is another one than that which has it and is heard of.

    Args:
        former: What the connected process calls itself.
        instance: What the one that comes calls itself.
        silent: seconds since the connected one was last heard.
    """
    return silent < HEARD and (instance is None or instance != former)
