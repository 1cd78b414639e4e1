"""Names: what a site may be called, and whether a request for a certificate asks for what was agreed.

Knows the engine's rules for names and what a request says of itself. Knows nothing of keys, kits or processes.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError

Role = Literal["site", "hub", "admin"]
_KINDS: dict[Role, str] = {"site": "site", "hub": "server", "admin": "user"}
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = {
    "server",
    "hub",
    "admin",
}  # the engine calls the hub "server", and so does a site that makes sure who calls
_LARGEST = 2**20  # bytes of a request
_SHORTEST_KEY = 2048  # bits


def check_name(name: str) -> None:
    """Makes sure that a site can have this name.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        msg = (
            f"{untrusted.shown(name)!r} is no name for a site: at most 64 letters, digits, - and _, and not one of "
            f"{', '.join(sorted(_RESERVED))}, which the engine has for the hub."
        )
        raise ConfigError(msg)


def requested(sent: Path, role: Role) -> str:
    """The name that a request asks a certificate for, once it asks for what it should.

    Args:
        sent: NAME.request.zip.
        role: As what it will be signed.

    Raises:
        ConfigError: It is no request, or asks for another name or role.
    """
    name = named(sent, ".request.zip")
    asked, signing = _requested(sent)
    if (asked.get("name"), asked.get("kind")) != (name, _KINDS[role]):
        wanted = f"{untrusted.shown(asked.get('kind'))} {untrusted.shown(asked.get('name'))}"
        msg = (
            f"{sent.name} asks for a certificate as {wanted}; it would be signed as {role} {name}. If that is what you "
            "agreed on, say --role and call the file as the request is called; else ask who sent it."
        )
        raise ConfigError(msg)
    if role == "site":
        check_name(name)
    _check_key(sent, signing)
    return name


def named(sent: Path, ending: str) -> str:
    """Whose file this is, which its name says."""
    name = sent.name.removesuffix(ending)
    if name == sent.name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,252}", name):
        msg = f"{untrusted.shown(sent.name)!r} should be called NAME{ending}, as the command wrote it."
        raise ConfigError(msg)
    return name


def _requested(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a request says of itself, and the certificate signing request in it."""
    what = f"the request {path.name}"
    data = untrusted.read_file(path, most=_LARGEST, what=what, error=ConfigError)
    with untrusted.decoding(what, ConfigError), zipfile.ZipFile(io.BytesIO(data)) as parts:
        with parts.open("request.json") as file:
            text = file.read(_LARGEST + 1)
        signing = b""
        for name in [name for name in parts.namelist() if name.endswith(".csr")][:1]:
            with parts.open(name) as file:
                signing = file.read(_LARGEST)
    return untrusted.read_json(text, most=_LARGEST, what=what, error=ConfigError), signing


def _check_key(sent: Path, signing: bytes) -> None:
    """Makes sure that the key to be certified is long enough.

    Raises:
        ConfigError: It is an RSA key of fewer than 2,048 bits, or there is none.
    """
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.x509 import load_pem_x509_csr

    with untrusted.decoding(f"the key in {sent.name}", ConfigError):
        key = load_pem_x509_csr(signing).public_key()
    if isinstance(key, RSAPublicKey) and key.key_size < _SHORTEST_KEY:
        msg = f"{sent.name} is for a key of {key.key_size} bits, which is too short: {_SHORTEST_KEY:,} at least."
        raise ConfigError(msg)
