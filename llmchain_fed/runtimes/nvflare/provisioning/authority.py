"""The hub's certificate authority: begins it, signs what sites ask for, once a name, and takes certificates back.

Knows the authority's folder: ca/, profile.yaml and the registry of names. Knows nothing of kits: a site makes its own.
Whatever is refused, or fails half way, leaves every file as it was.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import yaml

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.names import Role
from llmchain_fed.runtimes.nvflare import certificates, kits
from llmchain_fed.runtimes.nvflare.provisioning import registry, sent, tool
from llmchain_fed.runtimes.nvflare.provisioning.registry import Certificate, CertificateRegistry
from llmchain_fed.runtimes.nvflare.provisioning.sent import Asked
from llmchain_fed.runtimes.nvflare.provisioning.tool import place, said, scratch
from llmchain_fed.stopping import whole
from llmchain_fed.storage.own_files import write_whole

_CA, _PROFILE = "ca", "profile.yaml"


def start(folder: Path, *, host: str, port: int) -> str:
    """Makes a federation's certificate authority at the hub; returns the fingerprint to tell the sites by telephone.

    Raises:
        ConfigError: The host or port is none, an authority is there already, or the engine or the system refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    names.check_host(host)
    names.check_port(port)
    folder = folder.absolute()
    _refuse_second(folder, host, port)
    with scratch(folder) as unfinished:
        server = {"host": host, "fed_learn_port": port, "admin_port": port}
        profile = {"name": "fed", "scheme": "http", "connection_security": "mtls", "server": server}
        write_whole(unfinished / _PROFILE, yaml.safe_dump(profile, sort_keys=False), mode=0o600)
        # never with --org: NVFlare 2.9.0 then signs leaf certificates under another issuer than the root's subject
        tool.run("cert", "init", "--profile", unfinished / _PROFILE, "-o", unfinished / _CA, within=unfinished)
        notes = unfinished / _CA / "ca.json"  # its path is that in the scratch folder still
        found = json.loads(notes.read_text()) | {"project_profile": str(folder / _PROFILE)}
        write_whole(notes, json.dumps(found, indent=2) + "\n", mode=0o600)
        trusted = kits.fingerprint(unfinished / _CA / "rootCA.pem")
        registry.write(unfinished, CertificateRegistry())
        # ca/ comes last: killed before, this is no authority yet, and nobody has anything of it
        place([(unfinished / name, folder / name) for name in (registry.FILE, _PROFILE, _CA)])
    return trusted


def approve(
    requested: Path,
    authority: Path,
    role: Role = "site",
    *,
    replace: bool = False,
    confirm: Callable[[Asked, Certificate | None], bool] | None = None,
) -> Path:
    """Signs a request at the hub, and writes down which key has the name now; returns the file to send back.

    Args:
        requested: What was sent, NAME.request.zip.
        authority: The folder of `start`.
        role: As what it is signed. A request says itself as what it wants to be, and an administrator's certificate
            gives orders to all: so what is asked for must be what was agreed.
        replace: Whether a certificate that has the name is revoked for it: after a loss, or before its end.
        confirm: Is shown what is about to be signed, and whose certificate that will replace; False: it is not signed.

    Raises:
        ConfigError: It asks for another name or role, or for the hub's own name, is no request, has too short a key, or
            its name has a certificate already; it was not confirmed; or the engine or the system refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    authority = authority.absolute()
    with registry.alone(authority):
        asked = sent.read_request(requested, role)
        former = registry.read(authority)
        names.check(asked.name, role, host=_host(authority))
        owner = former.owner(asked.name)
        signed = requested.absolute().with_name(f"{asked.name}.signed.zip")
        _refuse_taken(asked, owner, signed, replace=replace)
        _check_root(authority)
        if confirm is not None and not confirm(asked, owner):
            msg = f"{requested.name} was not signed. Nothing was changed."
            raise ConfigError(msg)
        with scratch(signed.parent) as unfinished:
            copy, answer = unfinished / f"{asked.name}.request.zip", unfinished / signed.name
            write_whole(copy, asked.data, mode=0o600)  # what was shown, whatever stands in the file by now
            ca, profile = authority / _CA, authority / _PROFILE
            tool.run("cert", "approve", copy, "-c", ca, "--profile", profile, "--out", answer, within=unfinished)
            new = _certificate(asked, sent.read_answer(answer))
            with whole():  # else the answer could lie there though the registry was put back
                _write_down(authority, former, owner, new)
                try:
                    place([(answer, signed)])
                except BaseException:
                    registry.write(authority, former)
                    raise
    return signed


def revoke(name: str, authority: Path, *, why: str | None = None) -> Certificate:
    """Takes the certificate back that has a name; returns it as it stands in the registry now.

    Raises:
        ConfigError: Nobody has the name, or the registry cannot be written.
    """
    authority = authority.absolute()
    with registry.alone(authority):
        known = registry.read(authority)
        owner = known.owner(name)
        if owner is None:
            revoked = [c for c in known.certificates if c.name.casefold() == name.casefold()]
            shown = untrusted.one_line(untrusted.shown(name))
            msg = (
                f"the certificate of {revoked[-1].name} was revoked already, at {revoked[-1].revoked}."
                if revoked
                else f"no certificate was approved for the name {shown}; `provision names {authority}` lists them all."
            )
            raise ConfigError(msg)
        ended = _revoked(owner, why)
        with said(authority):
            registry.write(authority, _with(known, owner, ended))
    return ended


def warnings(authority: Path) -> list[str]:
    """What is to be mended soon though the authority can sign today, each in a sentence that says how.

    Raises:
        ConfigError: It is no authority's folder, or its certificate cannot be read or has ended.
    """
    ca = authority.absolute() / _CA
    left = _check_root(authority.absolute()) - datetime.now(UTC)
    found = certificates.open_to_others(ca, "the folder of the key that signs for all", "700")
    found += certificates.open_to_others(ca / "rootCA.key", "the key that signs for all", "600")
    if left < certificates.SOON:
        found.append(
            f"the authority's own certificate ends in {left.days} days, and with it all that it signed: begin a new "
            "authority in a fresh folder, of which hub, administrator and every site get new kits."
        )
    return found


def _refuse_second(folder: Path, host: str, port: int) -> None:
    """Makes sure that no authority is here: with another host, every kit approved from then on would dial that one."""
    parts = [folder / _PROFILE, folder / registry.FILE, folder / _CA]
    if not any(os.path.lexists(part) for part in parts):
        return
    if not all(part.is_file() for part in (*parts[:2], folder / _CA / "rootCA.pem")):
        msg = (
            f"{folder} contains a part of an authority, but not all of {_PROFILE}, {registry.FILE} and {_CA}/. Nothing "
            "was changed: put the rest back from a back-up, or choose a fresh folder."
        )
        raise ConfigError(msg)
    there = f"the authority of the hub {_host(folder)}:{_port(folder)} is in {folder} already"
    if (host, port) == (_host(folder), _port(folder)):
        trusted = kits.fingerprint(folder / _CA / "rootCA.pem")
        msg = f"{there}: nothing to do. Its fingerprint, for the sites by telephone: {trusted}"
    else:
        msg = f"{there}. Nothing was changed: for a hub at {host}:{port} choose a fresh folder."
    raise ConfigError(msg)


def _refuse_taken(asked: Asked, owner: Certificate | None, signed: Path, *, replace: bool) -> None:
    """One name, one key, also where only the case differs: the engine would sign a second key without a word."""
    if owner is not None and not replace:
        key = sent.by_telephone(owner.public_key)
        if owner.public_key == asked.public_key:
            where = f"in {signed}: send it back" if signed.exists() else "no longer beside the request: say --replace"
            msg = f"this request of {asked.name} was approved already, at {owner.approved}; the answer is {where}."
        else:
            msg = (
                f"{owner.name} has a certificate already: {owner.organisation}, key {key}, approved at "
                f"{owner.approved} by {owner.by}. This request is for another key ({asked.organisation}, "
                f"{sent.by_telephone(asked.public_key)}). If the owner asked for a new one, by telephone, say "
                "--replace, which revokes the former; else ask for another name. Nothing was changed."
            )
        raise ConfigError(msg)
    if os.path.lexists(signed):
        msg = f"{signed} is there already: nothing is overwritten. {_about_answer(asked, owner, signed)}"
        raise ConfigError(msg)


def _about_answer(asked: Asked, owner: Certificate | None, signed: Path) -> str:
    """What an answer says that lies where another would: above all, whether this request is the one it answers.

    A site that renews sends a second request of the same file name: approved by mistake, the former would take the new
    one's place.
    """
    key = sent.by_telephone(asked.public_key)
    if owner is not None and owner.public_key == asked.public_key:
        return (
            f"{asked.name} has its certificate for the key of this very request already ({key}, approved at "
            f"{owner.approved}), and the answer lies there: send it back. If a new key was agreed on, this is the "
            "former request, of the same file name: give the one that `provision renew` wrote, in renewal/request/."
        )
    found = None
    with suppress(ConfigError):
        found = sent.read_answer(signed)
    if found is not None and found.public_key == asked.public_key:
        return f"It answers this request (key {key}). If it was sent back, delete it; then start again."
    whose = f"is for the key {sent.by_telephone(found.public_key)}" if found is not None else "cannot be read"
    return (
        f"That answer {whose}, this request is for {key}. If this is the key that the site reads out on the "
        "telephone, move the former answer away; then start again."
    )


def _check_root(authority: Path) -> datetime:
    """Makes sure that the authority's own certificate can sign; returns its end."""
    from cryptography.x509 import load_pem_x509_certificate

    key = authority / _CA / "rootCA.key"
    if not key.is_file():
        msg = f"the authority's key {key} is missing: put it back from a back-up. Without it nothing can be signed."
        raise ConfigError(msg)
    path = authority / _CA / "rootCA.pem"
    data = untrusted.read_file(path, most=sent.LARGEST, what="the authority's certificate", error=ConfigError)
    with untrusted.decoding(f"the authority's certificate {path}", ConfigError):
        end = load_pem_x509_certificate(data).not_valid_after_utc
    if end <= datetime.now(UTC):
        msg = (
            f"the authority's own certificate ended at {registry.written(end)}: it can sign nothing any more. Begin a "
            "new authority in a fresh folder; every site then needs a new kit."
        )
        raise ConfigError(msg)
    return end


def _certificate(asked: Asked, answer: sent.Answer) -> Certificate:
    """What is written down of a certificate that was just signed, once it is the one that was shown."""
    if (answer.name, answer.organisation, answer.public_key) != (asked.name, asked.organisation, asked.public_key):
        msg = f"the engine signed something else than {asked.name} asked for. Nothing was changed; ask who sent it."
        raise ConfigError(msg)
    return Certificate(
        name=asked.name,
        role=asked.role,
        organisation=untrusted.one_line(asked.organisation, 200),
        certificate=answer.certificate,
        public_key=answer.public_key,
        approved=registry.now(),
        by=_who(),
        until=answer.until,
    )


def _write_down(authority: Path, former: CertificateRegistry, owner: Certificate | None, new: Certificate) -> None:
    known = former if owner is None else _with(former, owner, _revoked(owner, f"replaced at {new.approved}"))
    registry.write(authority, known.model_copy(update={"certificates": [*known.certificates, new]}))


def _with(known: CertificateRegistry, former: Certificate, now: Certificate) -> CertificateRegistry:
    return known.model_copy(update={"certificates": [now if c is former else c for c in known.certificates]})


def _revoked(certificate: Certificate, why: str | None) -> Certificate:
    reason = untrusted.one_line(why, 200) if why else None
    return certificate.model_copy(update={"revoked": registry.now(), "why": reason})


def _who() -> str:
    """The account that approves, and its machine."""
    account = str(os.getuid())
    with suppress(KeyError, OSError):  # no entry for it, and no variable that says so
        account = getpass.getuser()
    return untrusted.one_line(f"{account}@{socket.gethostname()}", 200)


def _host(authority: Path) -> str:
    """The name by which sites reach the hub."""
    host = _server(authority).get("host")
    return host if isinstance(host, str) else ""


def _port(authority: Path) -> object:
    return _server(authority).get("fed_learn_port")


def _server(authority: Path) -> dict[str, object]:
    profile = authority / _PROFILE
    found = untrusted.read_yaml(profile, what=f"the authority's {_PROFILE}", error=ConfigError)
    server = found.get("server") if isinstance(found, dict) else None
    return server if isinstance(server, dict) else {}
