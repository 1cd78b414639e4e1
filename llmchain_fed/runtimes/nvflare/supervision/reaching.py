"""Reaching: why a site's engine cannot talk to the hub now, in one sentence and within ten seconds.

Knows DNS, TCP, TLS and a kit's certificates. Knows nothing of engines; whether somebody waits is for the caller.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes.aside import Aside, within
from llmchain_fed.runtimes.nvflare import kits

NO_FURTHER = "its port answers in TLS, and the engine gets no further: does a proxy or firewall block websockets?"
"""where there is no hindrance, and no connection either"""
SECONDS = 4.0  # for a name, and again for a connection: together with TLS it stays below ten
_TLS = 1.5  # seconds for a handshake, and again for whose certificate it was
_ISSUED_ELSEWHERE = (18, 19, 20, 21, 24, 7)  # OpenSSL's verify codes: another authority signed it
_NOT_YET, _EXPIRED = 9, 10
_ALL, _TICK = 15.0, 0.3  # seconds for all of it, and between two looks whether to go on
_EXCHANGED = 0.5  # seconds in which a kit's files may be exchanged by others
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class Hindrance:
    """What is in the way."""

    says: str
    """a sentence without its full stop"""
    lasting: bool = False
    """it stays until somebody mends it here: to wait is of no use"""


class _KitError(Exception):
    """Certificates or key of the kit cannot be read."""


def hindrance(kit: Path) -> Hindrance | None:
    """Does what the site's engine does first: name, connection, TLS with the kit's certificate; None where all works.

    The kit is a site's, or the administrator's: who of the two reads this can mend different things.

    Raises:
        ConfigError: It is no such kit.
    """
    host, port = kits.address(kit)
    where = f"{host}:{port}"
    try:
        # the system's resolver has no limit that one could set
        addresses = within(SECONDS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except TimeoutError:
        return Hindrance(f"{host} does not resolve (no DNS server answered within {SECONDS:g} s)")
    except (OSError, UnicodeError) as error:
        return Hindrance(f"{host} does not resolve (DNS: {_words(error)})")
    try:
        plain = _connect(addresses)
    except TimeoutError:
        return Hindrance(f"no answer from {where} within {SECONDS:g} s (a firewall?)")
    except ConnectionRefusedError:
        return Hindrance(f"nobody listens at {where} (connection refused)")
    except OSError as error:
        return Hindrance(f"{where} cannot be reached ({_words(error)})")
    with plain:
        try:
            return _shake_hands(kit, plain, where)
        except _KitError as error:
            return Hindrance(f"the kit {kit} cannot be used ({error})", lasting=True)


def look(kit: Path, *, is_stopped: Callable[[], bool]) -> Hindrance | None:
    """As `hindrance`, which whoever is told to stop need not wait for; what it raises is one as well."""
    asked = Aside(lambda: hindrance(kit))
    until = time.monotonic() + _ALL
    while not is_stopped() and time.monotonic() < until:
        if asked.over(_TICK):
            try:
                return asked.result()
            except Exception as error:  # else it would be told as an answer that never came
                return Hindrance(_words(error).rstrip("."), lasting=isinstance(error, ConfigError))
    return Hindrance(f"the hub did not answer within {_ALL:g} s")


def proxy_ignored(kit: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """A warning where a proxy is set that the engine does not use."""
    found = [name for name in _PROXIES if environment.get(name)]
    if not found:
        return None
    host, port = kits.address(kit)
    return f"{found[0]} is set and not used: the engine connects directly to {host}:{port}."


def _connect(addresses: list[Any]) -> socket.socket:
    """A connection to the first address that takes one."""
    until, last = time.monotonic() + SECONDS, OSError("no address")
    for family, kind, protocol, _, address in addresses:
        tried = socket.socket(family, kind, protocol)
        try:
            tried.settimeout(max(until - time.monotonic(), 0.1))
            tried.connect(address)
            return tried
        except OSError as error:
            tried.close()
            last = error
    raise last


def _context(kit: Path) -> ssl.SSLContext:
    """For TLS as the engine does it."""
    startup = kit / "startup"
    try:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.check_hostname = False  # the engine pins the authority and the identity, not the address
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.load_cert_chain(startup / "client.crt", startup / "client.key", password=lambda: "")
    except OSError as error:  # of which ssl's are
        raise _KitError(_words(error)) from error
    return context


def _shake_hands(kit: Path, plain: socket.socket, where: str) -> Hindrance | None:
    """TLS over a connection."""
    try:
        context = _context(kit)
    except _KitError:
        time.sleep(_EXCHANGED)
        context = _context(kit)
    try:
        plain.settimeout(_TLS)
        address = plain.getpeername()[:2]
        with context.wrap_socket(plain) as secure:
            secure.settimeout(0.3)
            with suppress(TimeoutError):  # TLS 1.3: a refusal of our certificate comes with the first read
                secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        return _unverified(error, address, where, at_hub=kits.is_admin(kit))
    except TimeoutError:
        return Hindrance(f"{where} takes connections but does not answer in TLS within {_TLS:g} s")
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if "ALERT" in reason:
            whose, remedy = (
                ("the administrator's", f"use a kit of the hub's authority in place of {kit}")
                if kits.is_admin(kit)
                else ("this site's", "ask its operator")
            )
            return Hindrance(
                f"the hub at {where} does not accept {whose} certificate ({reason}): {remedy}; was the authority made "
                "anew, and is the hub's clock right?",
                lasting=True,
            )
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"):
            return Hindrance(f"what answers at {where} does not speak TLS: another program, or a proxy's page")
        return Hindrance(f"{where} broke off the TLS handshake ({reason})")
    except OSError as error:
        return Hindrance(f"{where} broke off the TLS handshake ({_words(error)}); a firewall may do that")
    return None


def _unverified(
    error: ssl.SSLCertVerificationError, address: tuple[str, int], where: str, *, at_hub: bool
) -> Hindrance:
    if error.verify_code == _EXPIRED:
        who = "renew that of its kit, and start its engine again" if at_hub else "the hub's operator renews it"
        return Hindrance(
            f"the certificate of the hub at {where} has expired by this machine's clock: {who}, unless this clock is "
            "wrong",
            lasting=at_hub,  # a site waits for it; whoever can mend it is to be told
        )
    if error.verify_code == _NOT_YET:
        return Hindrance(f"the certificate of the hub at {where} is not valid yet: this machine's clock is behind")
    if error.verify_code in _ISSUED_ELSEWHERE:
        return Hindrance(
            f"what answers at {where} is not this federation's hub: its certificate was signed by another authority"
            f"{_issuer(address)}; TLS interception by a firewall looks like that. Have {where} excepted from it, or "
            "get a kit of this hub's authority",
            lasting=True,
        )
    return Hindrance(f"the certificate of {where} cannot be verified ({untrusted.one_line(error.verify_message)})")


def _issuer(address: tuple[str, int]) -> str:
    """Who signed the certificate that was refused, for the operator to recognise a firewall by."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent: only a name is read
    try:
        from cryptography import x509

        with socket.create_connection(address, timeout=_TLS) as plain, context.wrap_socket(plain) as secure:
            found = secure.getpeercert(binary_form=True) or b""
        name = x509.load_der_x509_certificate(found).issuer.rfc4514_string()
    except Exception:  # a help for the eye, by whoever is not the hub
        return ""
    return f" ({untrusted.one_line(name, 150)})"


def _words(error: Exception) -> str:
    return untrusted.one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
