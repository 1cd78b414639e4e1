"""Certificates: whether a kit's can be used now, how long it will be, and who may read its key.

Knows X.509 and a kit's layout. Knows nothing of the network or of how certificates are made.
"""

from __future__ import annotations

import math
import shlex
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.nvflare import kits

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SOON = timedelta(days=30)
"""before its end a certificate is warned of"""


def check(kit: Path) -> None:
    """Makes sure that a kit's certificate can be used now, by who it is for: hub, site or administrator.

    Raises:
        ConfigError: Expired, not yet valid, not of this federation's authority, of another name, or unreadable.
    """
    from cryptography.x509.oid import NameOID
    from nvflare.lighter.utils import verify_cert_chain

    certificate, key = _files(kit)
    leaf, root = _read(certificate), _read(kit / "startup" / "rootCA.pem")
    untrusted.read_file(key, most=2**20, what="the key", error=ConfigError)  # names the file that is missing
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            certificate, key, password=lambda: ""
        )  # is never asked for
    except (ssl.SSLError, OSError) as error:
        msg = (
            f"the certificate or key of {kit} cannot be used: {certificate.name} and {key.name} do not go together, or "
            f"one was cut ({untrusted.one_line(error, 200)}). Put both back from a back-up, or: {_renew(kit)}"
        )
        raise ConfigError(msg) from error
    now = datetime.now(UTC)
    _check_dates(f"the certificate of {kit.name}", leaf, now, _renew(kit))
    _check_dates("the root certificate of this federation's authority", root, now, _NEW_AUTHORITY)
    try:
        verify_cert_chain(leaf, [], root)
    except Exception as error:  # also what a certificate's parts make cryptography raise: none is trusted
        why = untrusted.printable(error, 200)
        msg = f"the certificate of {kit.name} was not signed by this federation's authority ({why})."
        raise ConfigError(msg) from error
    wanted = _owner(kit)
    named = [str(a.value) for a in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if wanted is not None and named != [wanted]:
        owner = untrusted.shown(", ".join(named))
        msg = f"the certificate belongs to {owner}, the kit to {wanted}: they were mixed up."
        raise ConfigError(msg)


def days_left(kit: Path) -> float:
    """Until the end of a kit's certificate; negative after it.

    Raises:
        ConfigError: It cannot be read.
    """
    return (_read(_files(kit)[0]).not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86_400


def warnings(kit: Path) -> list[str]:
    """What is to be mended soon though the kit works today, each in a sentence that says how.

    Raises:
        ConfigError: The certificates cannot be read.
    """
    certificate, key = _files(kit)
    found = open_to_others(kit, "the folder of the key and of logs that can quote examples", "700")
    found += open_to_others(key, "the key", "600")
    now = datetime.now(UTC)
    for what, of, remedy in (
        (f"the certificate of {kit.name}", _read(certificate), f"before that: {_renew(kit)}"),
        ("the root certificate of this federation's authority", _read(kit / "startup" / "rootCA.pem"), _NEW_AUTHORITY),
    ):
        end = of.not_valid_after_utc
        if now <= end < now + SOON:
            found.append(f"{what} ends at {_utc(end)}, in {_span(end - now)}; {remedy}")
    return found


def open_to_others(path: Path, what: str, mode: str) -> list[str]:
    """A sentence if accounts other than the owner's may open a file or folder that should be its alone; else none.

    Raises:
        ConfigError: It is not there.
    """
    with untrusted.decoding(f"the mode of {path}", ConfigError):
        is_open = bool(path.stat().st_mode & 0o077)
    command = f"chmod {mode} {shlex.quote(str(path))}"
    return [f"other accounts of this machine may open {path}, {what}: {command}"] if is_open else []


_NEW_AUTHORITY = (
    "the hub begins a new authority in a fresh folder (llmchain-fed provision start), and hub, administrator and every "
    "site get new kits of it"
)


def _files(kit: Path) -> tuple[Path, Path]:
    """Certificate and key."""
    startup = kit / "startup"
    hub = not kits.is_admin(kit) and kits.is_hub(kit)
    return tuple(startup / f"{'server' if hub else 'client'}.{ending}" for ending in ("crt", "key"))  # type: ignore[return-value]


def _owner(kit: Path) -> str | None:
    """Whose kit it says it is; the hub's says so by its host alone."""
    if kits.is_admin(kit):
        return kits.admin_name(kit)
    return None if kits.is_hub(kit) else kits.site_name(kit)


def _read(path: Path) -> Certificate:
    from cryptography.x509 import load_pem_x509_certificate

    data = untrusted.read_file(path, most=2**20, what="the certificate", error=ConfigError)
    with untrusted.decoding(f"the certificate {path}", ConfigError):
        return load_pem_x509_certificate(data)


def _check_dates(what: str, certificate: Certificate, now: datetime, remedy: str) -> None:
    """Makes sure that a certificate has begun, and has not ended."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        msg = (
            f"this machine's clock is at least {_span(begin - now, math.ceil)} behind, or {what} was made on a machine "
            f"whose clock is ahead: it is valid from {_utc(begin)}, and here it is {_utc(now)}. Set the clock, then "
            "start again."
        )
        raise ConfigError(msg)
    if end < now:
        msg = (
            f"{what} ended at {_utc(end)}, {_span(now - end)} ago: here it is {_utc(now)}. If this clock is right, "
            f"{remedy}"
        )
        raise ConfigError(msg)


def _renew(kit: Path) -> str:
    """How a kit gets another certificate."""
    home = kits.home_of(kit)
    folder = shlex.quote(str(home)) if home else "FOLDER (that of its `provision request`)"
    return (
        f"llmchain-fed provision renew {folder}, send the request to the hub, which approves it with --replace, and "
        "package the answer"
    )


def _utc(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _span(span: timedelta, rounded: Callable[[float], int] = math.floor) -> str:
    """A length of time in the unit that one would say it in."""
    minutes = max(1, rounded(span.total_seconds() / 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{rounded(minutes / 60)} hours" if minutes < 2 * 24 * 60 else f"{rounded(minutes / 1440)} days"
