"""Reach: whether a kit's holder can reach the hub's engine, asked step by step, so that a line says which one fails.

Knows names, ports and TLS. Knows nothing of jobs or sessions. The engine itself tries each of these again and again,
mostly without a word.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.nvflare import kits
from llmchain_fed.runtimes.nvflare.within import within

_STEP = 3.0  # seconds for each step
_AWAY = "the hub's engine is out of reach:"


def check_reach(kit: Path) -> None:
    """Looks the hub's name up, connects to its port, and shakes hands with the kit's certificate; in 8 s at most.

    Raises:
        ConfigError: What has to be mended: the name, or a certificate on one of the two sides.
        TransportError: What may pass: nobody listens, or nobody answers.
    """
    host, port = kits.address(kit)
    place = f"{host}:{port}"
    try:
        within(_STEP, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except TimeoutError:
        msg = f"{_AWAY} no name server told within {_STEP:g} s where {host} is. Is this machine's network up?"
        raise TransportError(msg) from None
    except (OSError, UnicodeError) as error:
        msg = f"the hub's name {host} does not resolve here ({error}). Mend this machine's DNS or /etc/hosts."
        raise ConfigError(msg) from None
    try:
        with socket.create_connection((host, port), timeout=_STEP) as plain:
            _shake_hands(kit, plain, place)
    except ConnectionRefusedError:
        msg = f"{_AWAY} nobody listens at {place}. Start it there: llmchain-fed engine, with the hub's kit."
        raise TransportError(msg) from None
    except TimeoutError:
        msg = f"{_AWAY} {place} does not answer within {_STEP:g} s. Is its machine on, and the port open?"
        raise TransportError(msg) from None
    except OSError as error:
        msg = f"{_AWAY} {place}: {error}."
        raise TransportError(msg) from None


def _shake_hands(kit: Path, plain: socket.socket, place: str) -> None:
    """TLS as the engine will do it.

    Raises:
        ConfigError, TransportError: See `check_reach`.
    """
    try:
        with _context(kit).wrap_socket(plain) as secure:
            secure.settimeout(0.5)
            with suppress(TimeoutError):  # TLS 1.3: a refusal of our certificate comes with the first read
                secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        if "expired" in error.verify_message or "not yet valid" in error.verify_message:
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            msg = f"the certificate of the hub at {place}: {error.verify_message}; it is {now} UTC at this machine."
        else:
            msg = (
                f"what answers at {place} is not this federation's hub: its certificate is {_signer(kit, place)} "
                f"({error.verify_message}). A firewall that opens TLS, another federation, or the wrong port."
            )
        raise ConfigError(msg) from None
    except ssl.SSLError as error:
        why = (error.reason or str(error)).lower().replace("_", " ")
        if "alert" in why:
            msg = f"the hub at {place} does not accept the certificate of {kit.name} ({why})."
        else:
            msg = f"what answers at {place} is no engine of a hub: it does not speak TLS ({why})."
        raise ConfigError(msg) from None
    except TimeoutError:
        msg = f"{_AWAY} {place} takes connections and has been silent for {_STEP:g} s: its process is stopped or busy."
        raise TransportError(msg) from None
    except OSError as error:
        msg = f"{_AWAY} {place} hung up in the middle of the handshake ({error})."
        raise TransportError(msg) from None


def _context(kit: Path) -> ssl.SSLContext:
    startup = kit / "startup"
    try:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.check_hostname = False  # the engine pins the authority and the identity, not the address
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
    except (OSError, ssl.SSLError) as error:
        msg = f"the certificate or key of {kit} cannot be used: {untrusted.printable(error, 300)}"
        raise ConfigError(msg) from error
    return context


def _signer(kit: Path, place: str) -> str:
    """By whom the certificate is signed that is shown there, for the one who has to find out what that is."""
    from cryptography import x509

    host, _, port = place.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(Exception):  # whatever it is: this only adds to a message
        context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
        with socket.create_connection((host, int(port)), timeout=1.0) as plain, context.wrap_socket(plain) as secure:
            shown = secure.getpeercert(binary_form=True)
        if shown:
            issuer = x509.load_der_x509_certificate(shown).issuer.rfc4514_string()
            return f"signed by {untrusted.shown(issuer, 100)}"
    return "signed by somebody else"
