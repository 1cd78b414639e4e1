"""Names: what a site, an administrator, an organisation and the hub's host may be called.

Knows NVFlare's rules for names, and says them in our own words: wherever a name is typed, in a request, in a
federation's file or for a peer, it is this rule. Knows nothing of requests, keys or kits, and needs no NVFlare.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from typing import Literal

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError

Role = Literal["site", "hub", "admin"]
LONGEST = 64  # characters that a certificate has for a name
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # the engine refuses a - or _ in front, and so do command lines
_ORGANISATION = re.compile("[A-Za-z0-9_]{1,64}")
_ADMIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}")
_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
# the engine calls the hub "server", and so does a site that makes sure who calls; the last is a stand-in of its tools
_RESERVED = ("admin", "hub", "server", "__nvflare_dummy_server__")
_SPELLED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss"})


def check_name(name: str, *, host: str = "") -> None:
    """Makes sure that a site can have this name, where sites reach the hub by `host`.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        reserved = ", ".join(sorted(_RESERVED)[1:])
        msg = (
            f"{untrusted.one_line(untrusted.shown(name))!r} is no name for a site: 1 to 64 of A-Z a-z 0-9 _ -, with a "
            f"letter or digit in front, and not one of {reserved}, which the engine has for the hub.{_such_as(name)}"
        )
        raise ConfigError(msg)
    if host and name.casefold() == host.casefold():
        msg = f"{name} is what sites reach the hub by: a site of that name could stand in for it. Choose another."
        raise ConfigError(msg)


def check_organisation(organisation: str) -> None:
    """Makes sure that a certificate can name this organisation.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(organisation, str) or not _ORGANISATION.fullmatch(organisation):
        msg = (
            f"{untrusted.one_line(untrusted.shown(organisation))!r} is no organisation for a certificate: 1 to 64 of "
            f"A-Z a-z 0-9 _.{_such_as(organisation, '_')}"
        )
        raise ConfigError(msg)


def check_admin(name: str) -> None:
    """Makes sure that an administrator can have this name.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(name, str) or not _ADMIN.fullmatch(name) or len(name) > LONGEST:
        msg = (
            f"{untrusted.one_line(untrusted.shown(name))!r} is no name for an administrator: it has the form of a mail "
            "address, such as admin@hub.example.org, with at most 64 of A-Z a-z 0-9 . _ - and one @."
        )
        raise ConfigError(msg)


def check_host(host: str) -> None:
    """Makes sure that sites can reach a hub by this name.

    Raises:
        ConfigError: They cannot.
    """
    if isinstance(host, str) and _HOST.fullmatch(host) and len(host) <= LONGEST:
        return
    shown = untrusted.one_line(untrusted.shown(host))
    why = "letters, digits, - and dots"
    if isinstance(host, str):
        if not host.strip():
            why = "it is empty"
        elif "://" in host:
            why = "without http:// or the like"
        elif _is_ipv6(host):
            why = "the engine takes no IPv6 address: give the name that DNS has for it"
        elif ":" in host:
            why = "without a port, which is said by --port"
        elif len(host) > LONGEST:
            why = f"at most {LONGEST} characters, which is what a certificate has room for"
    msg = f"{shown!r} is no host name for the hub ({why}). Give the name by which sites reach it: hub.example.org"
    raise ConfigError(msg)


def check_port(port: int) -> None:
    """Makes sure that a hub can listen there.

    Raises:
        ConfigError: It cannot.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 2**16:
        msg = f"{untrusted.shown(port)} is no port: 1 to 65535, and above 1023 for an ordinary account."
        raise ConfigError(msg)


def check(name: str, role: Role, *, host: str = "") -> None:
    """Makes sure that whoever has this role can have this name.

    Raises:
        ConfigError: They cannot.
    """
    if role == "site":
        check_name(name, host=host)
    elif role == "admin":
        check_admin(name)
    elif role == "hub":
        check_host(name)
        if host and name != host:
            msg = f"the hub's certificate is for the name by which sites reach it, {host}, not for {name}."
            raise ConfigError(msg)
    else:
        msg = f"a role is site, hub or admin, got {untrusted.shown(role)!r}."
        raise ConfigError(msg)


def organisation_of(name: str, role: Role) -> str:
    """The organisation of who did not name one."""
    return name.replace("-", "_") if role == "site" else "hub"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).version == 6
    except ValueError:
        return False


def _such_as(text: object, between: str = "-") -> str:
    """A proposal that is near to what was wanted, if there is one."""
    if not isinstance(text, str):
        return ""
    plain = unicodedata.normalize("NFKD", text[:1000].translate(_SPELLED)).encode("ascii", "ignore").decode()
    kept = "A-Za-z0-9_" if between == "_" else "A-Za-z0-9_-"
    near = re.sub(f"[^{kept}]+", between, plain).strip("-_")[:LONGEST]
    return f" For example: {near}" if _NAME.fullmatch(near) and near.lower() not in _RESERVED else ""
