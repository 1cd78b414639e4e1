"""CertificateRegistry: which names the authority gave to which keys, when, by whom, and which it took back.

Knows one JSON file in the authority's folder. Knows nothing of how certificates are made, of the engine, or of who is
connected now: whoever accepts a site asks `allowed`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.storage import own_files
from llmchain_fed.storage.own_files import sweep, write_whole

FILE = "names.json"
_LARGEST = 2**24  # bytes: some 20,000 certificates
_Text = Annotated[str, Field(max_length=300)]
_Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
FINGERPRINT = re.compile("SHA256(:[0-9A-F]{2}){32}")
_Fingerprint = Annotated[str, Field(pattern=f"^{FINGERPRINT.pattern}$")]


class Certificate(untrusted.Strict):
    """One certificate that the authority signed."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    role: Literal["site", "hub", "admin"]
    organisation: _Text
    certificate: _Fingerprint
    """SHA-256 of the certificate in DER, as `kits.fingerprint` writes it"""
    public_key: _Fingerprint
    """SHA-256 of the public key (SubjectPublicKeyInfo in DER): what both sides compare by telephone"""
    approved: _Time
    """UTC, as all times here"""
    by: _Text
    """account@host that approved it"""
    until: _Time
    """end of its validity"""
    revoked: _Time | None = None
    why: _Text | None = None
    """why it was revoked"""

    @property
    def days_left(self) -> float:
        """Until its end; negative after it."""
        return (moment(self.until) - datetime.now(UTC)).total_seconds() / 86_400


class CertificateRegistry(untrusted.Strict):
    """All of the file: every certificate that was ever signed, in the order of signing."""

    format: Literal[1] = 1
    certificates: Annotated[list[Certificate], Field(max_length=50_000, fail_fast=True)] = Field(default_factory=list)

    def owner(self, name: str) -> Certificate | None:
        """The certificate that has a name now, whatever the case of its letters; None where none does."""
        owned = [c for c in self.certificates if c.name.casefold() == name.casefold() and c.revoked is None]
        return owned[-1] if owned else None

    def allowed(self, name: str, fingerprint: str) -> str | None:
        """Why whoever presents this certificate under this name is not let in, in a sentence; None where it is.

        The fingerprint is in hex, with or without colons and "SHA256:".
        """
        who = untrusted.one_line(name, 80)
        presented = normal(fingerprint)
        for known in self.certificates:
            if known.certificate == presented and known.name == name:
                if known.revoked is None:
                    return None
                why = f": {untrusted.one_line(known.why)}" if known.why else ""
                return f"the certificate of {who} was revoked at {known.revoked}{why}"
        owner = self.owner(name)
        if owner is None:
            return f"the authority's {FILE} has no certificate for the name {who}"
        return (
            f"the name {who} belongs to the certificate {owner.certificate}, approved at {owner.approved}, "
            "and another one was presented"
        )


def read(authority: Path) -> CertificateRegistry:
    """What an authority signed so far.

    Raises:
        ConfigError: The file is lost, or none of ours: then nobody can be told from a stranger.
    """
    path = authority / FILE
    if not os.path.lexists(path):
        if not (authority / "ca").is_dir():
            msg = f"{authority} is no authority's folder: it has no ca/. Give the folder of `provision start`."
        else:
            msg = (
                f"{path} is missing: without it nobody knows which names were given, and to which keys. Put it back "
                "from a back-up; if there is none, begin a new authority in a fresh folder."
            )
        raise ConfigError(msg)
    what = f"{FILE} of the authority in {authority}"
    data = untrusted.read_file(path, most=_LARGEST, what=what, error=ConfigError)
    found = untrusted.read_json(data, most=_LARGEST, what=what, error=ConfigError)
    return untrusted.checked(
        CertificateRegistry, found, what=what, error=ConfigError, remedy="Put it back from a back-up."
    )


def write(authority: Path, registry: CertificateRegistry) -> None:
    """Puts the registry in the former one's place, for this account alone.

    Raises:
        OSError: It cannot be written; the former one stays.
    """
    write_whole(authority / FILE, registry.model_dump_json(indent=1) + "\n", mode=0o600)


@contextmanager
def alone(authority: Path) -> Iterator[None]:
    """Within, no other command changes this authority: of two that approve one name the second sees the first.

    Raises:
        ConfigError: Another command is at work there, or it is no folder.
    """
    if not authority.is_dir():
        msg = f"{authority} is no authority's folder. Give the folder of `provision start`."
        raise ConfigError(msg)
    with own_files.lock_folder(authority, f"the authority in {authority}"):
        sweep(authority / FILE)
        yield


def now() -> str:
    """This moment, as times are written here."""
    return written(datetime.now(UTC))


def written(time: datetime) -> str:
    """A time of UTC, as it is written here."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """A time as it is written here."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def normal(fingerprint: str) -> str:
    """A SHA-256 in hex as it is written here; what is no SHA-256 stays as it is, in capitals."""
    digits = re.sub(r"^\s*SHA256\s*:|[\s:]", "", fingerprint.upper())
    if not re.fullmatch("[0-9A-F]{64}", digits):
        return fingerprint.upper()
    return "SHA256:" + ":".join(digits[at : at + 2] for at in range(0, 64, 2))
