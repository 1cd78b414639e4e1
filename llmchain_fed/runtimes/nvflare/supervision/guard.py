"""Guard: at the hub, which certificate may come under which name; it remembers the first that came.

Knows names, fingerprints, one file in the hub's kit and the authority's registry. Knows nothing of connections. What
cannot be looked at for a moment is no new knowledge: then what was read last counts on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.nvflare.supervision import news
from llmchain_fed.storage.own_files import write_whole

if TYPE_CHECKING:
    from llmchain_fed.runtimes.nvflare.provisioning.registry import CertificateRegistry

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


class Refusal(NamedTuple):
    """That a certificate may not come."""

    code: int
    """what its site is told, of `news`"""
    says: str
    """why, with what the hub's operator does"""


class Guard:
    """Answers whether a certificate may come under a name.

    Args:
        kit: The hub's.
        authority: Its folder, whose registry decides then; else the first certificate of a name is remembered.
        now: The clock, in seconds since the epoch.

    Raises:
        ConfigError: The list, or the registry, cannot be read or is none of ours.
    """

    def __init__(self, kit: Path, authority: Path | None = None, *, now: Callable[[], float] = time.time) -> None:
        self._path, self._authority, self._now = kit / FILE, authority, now
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._known = KnownSites()
        self._registry: CertificateRegistry | None = None
        self._trouble: str | None = None
        if authority is None:
            self._read_again()
        else:
            self._registry = _read_registry(authority, None)

    def trouble(self) -> str | None:
        """Looks at the authority's registry; why that cannot be read now, while the last one counts on."""
        with self._lock:
            self._look()
            return self._trouble

    def refusal(self, name: str, fingerprint: str, *, admin: bool = False) -> Refusal | None:
        """Why this certificate may not come under this name; None where it may.

        Administrators' kits are made at the hub: only a registry tells them apart.
        """
        with self._lock:
            if self._authority is not None:
                return self._by_registry(name, fingerprint)
            return None if admin else self._by_memory(name, fingerprint)

    def _by_registry(self, name: str, fingerprint: str) -> Refusal | None:
        from llmchain_fed.runtimes.nvflare.provisioning import registry

        self._look()
        known = self._registry or registry.CertificateRegistry()
        why = known.allowed(name, fingerprint)
        if why is None:
            return None
        mark = registry.normal(fingerprint)
        if self._trouble is None or any(c.certificate == mark and c.name == name for c in known.certificates):
            return Refusal(news.NOT_ALLOWED, why)
        return Refusal(news.LATER, f"cannot be looked up, and was not known before: {self._trouble}")

    def _look(self) -> None:
        if self._authority is None:
            return
        try:
            self._registry, self._trouble = _read_registry(self._authority, self._registry), None
        except ConfigError as error:
            self._trouble = f"the authority's registry cannot be read: {error}"

    def _by_memory(self, name: str, fingerprint: str) -> Refusal | None:
        with suppress(ConfigError):  # spoilt meanwhile: what is remembered counts on
            self._read_again()
        known = self._known.sites.get(name)
        if known is None and len(self._known.sites) < _MOST:
            self._known.sites[name] = Known(fingerprint=fingerprint, first_seen=self._now())
            with suppress(OSError, ConfigError):  # a full disk shuts nobody out: this process remembers it
                write_whole(self._path, self._known.model_dump_json(indent=1), mode=0o600)
                self._stamp = self._stamp_now()
            return None
        if known is not None and known.fingerprint == fingerprint:
            return None
        if known is None:
            return Refusal(news.NOT_ALLOWED, f"{self._path} contains {_MOST} names and takes no more")
        since = time.strftime("%Y-%m-%d", time.gmtime(known.first_seen))
        return Refusal(
            news.OTHER_KEY,
            f"another key came under its name: known since {since} is {known.fingerprint}, presented was {fingerprint}."
            f" If its operator confirms the new one by telephone, take {name} out of {self._path}; else somebody "
            "has a certificate under a name that is not theirs",
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
        """When it was written, and how large it is; None where there is no such file."""
        with untrusted.decoding(f"{FILE} of the hub's kit", ConfigError):
            self._path.parent.stat()  # a kit that is away for a moment has no list either
            try:
                found = self._path.stat()
            except FileNotFoundError:
                return None
            return found.st_mtime_ns, found.st_size


def _read_registry(authority: Path, former: CertificateRegistry | None) -> CertificateRegistry:
    """What the authority signed."""
    from llmchain_fed.runtimes.nvflare.provisioning import registry

    with untrusted.decoding(f"{registry.FILE} of the authority in {authority}", ConfigError):
        found = registry.read(authority)
    if former is not None and former.certificates and not found.certificates:
        msg = f"{registry.FILE} of the authority in {authority} is gone or empty: put it back from a back-up."
        raise ConfigError(msg)
    return found


def elsewhere(former: str | None, instance: str | None, silent: float) -> bool:
    """Whether a process that comes under a name is another one than that which has it and is heard of."""
    return silent < HEARD and (instance is None or instance != former)
