"""What is sent between a site and the hub: a request for a certificate, and its signed answer; read with bounds.

Knows their zip files and what they say of themselves. Knows nothing of folders, of who was approved before, or of the
engine, which verifies their signatures.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.names import Role
from llmchain_fed.runtimes.nvflare.provisioning import registry

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509 import Name

LARGEST = 2**20  # bytes of what is sent, and of each file in it
_KINDS: dict[Role, str] = {"site": "site", "hub": "server", "admin": "user"}
_SHORTEST_KEY = 2048  # bits


@dataclass(frozen=True)
class Asked:
    """What a request asks a certificate for."""

    name: str
    role: Role
    organisation: str
    public_key: str
    """SHA-256 of the key to be certified: the site reads it out on the telephone"""
    data: bytes
    """the request as it was read"""


@dataclass(frozen=True)
class Answer:
    """A signed answer."""

    name: str
    organisation: str
    certificate: str
    """SHA-256 of the certificate"""
    public_key: str
    """SHA-256 of the key that is certified"""
    until: str
    """the certificate's end, UTC"""
    authority: str
    """SHA-256 of the root certificate that the answer claims to come from"""
    data: bytes


def read_request(sent: Path, role: Role) -> Asked:
    """A request, NAME.request.zip, once it asks for what it should.

    Raises:
        ConfigError: It is no request, asks for another name or role, or is for a key that is too short.
    """
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.x509 import load_pem_x509_csr

    name = named(sent, ".request.zip")
    data, parts = _parts(sent, "the request", ["request.json", f"{name}.csr"])
    what = f"the request {sent.name}"
    said = untrusted.read_json(parts["request.json"], most=LARGEST, what=what, error=ConfigError)
    if (said.get("name"), said.get("kind")) != (name, _KINDS.get(role)):
        kind = next((ours for ours, theirs in _KINDS.items() if theirs == said.get("kind")), said.get("kind"))
        wanted = f"{untrusted.shown(kind)} {untrusted.shown(said.get('name'))}"
        msg = (
            f"{sent.name} asks for a certificate as {wanted}; it would be signed as {role} {name}. If that is what you "
            "agreed on, say --role and call the file as the request is called; else ask who sent it."
        )
        raise ConfigError(msg)
    names.check(name, role)
    with untrusted.decoding(f"the key in {sent.name}", ConfigError):
        signing = load_pem_x509_csr(parts[f"{name}.csr"])
        key, subject = signing.public_key(), _names_of(signing.subject)
        public_key = fingerprint_of(key)
    if isinstance(key, RSAPublicKey) and key.key_size < _SHORTEST_KEY:
        msg = f"{sent.name} is for a key of {key.key_size} bits, which is too short: {_SHORTEST_KEY:,} at least."
        raise ConfigError(msg)
    if subject != (name, said.get("org")):
        msg = (
            f"{sent.name} was altered: it says {untrusted.shown(said.get('org'))} {name}, what its key signed says "
            f"{untrusted.one_line(' '.join(reversed(subject)), 200)}. Ask for it again."
        )
        raise ConfigError(msg)
    return Asked(name, role, subject[1], public_key, data)


def read_answer(sent: Path) -> Answer:
    """A signed answer; whether its signatures are the authority's is for the engine to say.

    Raises:
        ConfigError: It is none.
    """
    from cryptography.x509 import load_pem_x509_certificate

    name = named(sent, ".signed.zip")
    data, parts = _parts(sent, "the hub's answer", [f"{name}.crt", "rootCA.pem"])
    with untrusted.decoding(f"the certificate in {sent.name}", ConfigError):
        leaf = load_pem_x509_certificate(parts[f"{name}.crt"])
        root = load_pem_x509_certificate(parts["rootCA.pem"])
        subject, until = _names_of(leaf.subject), registry.written(leaf.not_valid_after_utc)
        certificate, authority = (_fingerprint(c.public_bytes(_der())) for c in (leaf, root))
        return Answer(
            subject[0], subject[1], certificate, fingerprint_of(leaf.public_key()), until, authority, data
        )  # fmt: skip


def named(sent: Path, ending: str) -> str:
    """Whose file this is, which its name says."""
    name = sent.name.removesuffix(ending)
    if name == sent.name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,252}", name):
        msg = f"{untrusted.shown(sent.name)!r} should be called NAME{ending}, as the command wrote it."
        raise ConfigError(msg)
    return name


def fingerprint_of(key: CertificatePublicKeyTypes) -> str:
    """The SHA-256 of a public key (SubjectPublicKeyInfo in DER)."""
    from cryptography.hazmat.primitives.serialization import PublicFormat

    return _fingerprint(key.public_bytes(_der(), PublicFormat.SubjectPublicKeyInfo))


def by_telephone(fingerprint: str) -> str:
    """A fingerprint in eight groups of eight digits, to be read out and compared."""
    digits = fingerprint.removeprefix("SHA256:").replace(":", "").lower()
    return " ".join(digits[at : at + 8] for at in range(0, len(digits), 8))


def _fingerprint(der: bytes) -> str:
    return registry.normal(hashlib.sha256(der).hexdigest())


def _der() -> Encoding:
    from cryptography.hazmat.primitives import serialization

    return serialization.Encoding.DER


def _names_of(subject: Name) -> tuple[str, str]:
    """Common name and organisation."""
    from cryptography.x509.oid import NameOID

    found = (subject.get_attributes_for_oid(oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME))
    name, organisation = (str(each[0].value) if each else "" for each in found)
    return name, organisation


def _parts(path: Path, kind: str, wanted: list[str]) -> tuple[bytes, dict[str, bytes]]:
    """A zip as it was read, and some of its files."""
    what = f"{kind} {path.name}"
    data = untrusted.read_file(path, most=LARGEST, what=what, error=ConfigError)
    found = {}
    with untrusted.decoding(what, ConfigError), zipfile.ZipFile(io.BytesIO(data)) as parts:
        for name in wanted:
            with parts.open(name) as file:
                found[name] = file.read(LARGEST + 1)
    if any(len(content) > LARGEST for content in found.values()):
        msg = f"{what} contains a file of more than {LARGEST:,} bytes, which makes no sense."
        raise ConfigError(msg)
    return data, found
