"""Kits: a participant's certificate, key and local rules, made by the engine's own provisioning and then closed down.

Knows the engine's kit layout and its command line. Knows nothing of jobs, sockets or models. Keys stay with their site:
it makes its key, sends a request, and puts the hub's signed answer beside the key (`request`, `approve`, `package`).
`provision_here` makes all kits in one place, for tests and walk-throughs on one machine. What another party sent is
read with bounds, and signed only as what the operator says it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, MissingExtraError
from llmchain_fed.runtimes.nvflare import names
from llmchain_fed.runtimes.nvflare.job import CONTROLLER, EXECUTOR, HUB, SITE
from llmchain_fed.runtimes.nvflare.names import Role

_TYPES: dict[Role, str] = {"site": "client", "hub": "server", "admin": "admin"}
ADMIN = "admin@hub.org"
_LARGEST = 2**20  # bytes of any file of a kit, and of what is sent for one
_PATIENCE = 300.0  # seconds for one command of the engine
_ALLOWED = dict.fromkeys(("submit_job", "manage_job", "download_job", "view"), "any")
_FORBIDDEN = dict.fromkeys(("clone_job", "operate", "shell_commands", "byoc", "server-predeployed-flwr"), "none")


def is_hub(kit: Path) -> bool:
    """Whether this is the hub's kit, rather than a site's.

    Raises:
        ConfigError: It is neither.
    """
    for name, found in (("fed_server.json", True), ("fed_client.json", False)):
        if (kit / "startup" / name).is_file():
            return found
    msg = f"{kit} is no kit of a hub or site: startup/fed_server.json or fed_client.json is missing."
    raise ConfigError(msg)


def site_name(kit: Path) -> str:
    """The name that the kit's certificate gives this site."""
    return _text(kit, "fed_client.json", "client", "fqsn")


def admin_name(kit: Path) -> str:
    """The name that an administrator's kit logs in with."""
    return _text(kit, "fed_admin.json", "admin", "username")


def address(kit: Path) -> tuple[str, int]:
    """Host and port of the hub, from any kit.

    Raises:
        ConfigError: It is no kit, or its file makes no sense.
    """
    with untrusted.decoding(f"the address in {kit}", ConfigError):
        if (kit / "startup" / "fed_admin.json").is_file():
            admin = _read(kit, "fed_admin.json")["admin"]
            host, port = str(admin["host"]), int(admin["port"])
        else:
            name = "fed_server.json" if is_hub(kit) else "fed_client.json"
            host, number = _read(kit, name)["servers"][0]["service"]["target"].rsplit(":", 1)
            port = int(number)
        if not 0 < port < 2**16:
            msg = f"{kit} names port {port}."
            raise ConfigError(msg)
    return host, port


def _read(kit: Path, name: str, folder: str = "startup") -> dict[str, Any]:
    what = f"{name} of {kit}"
    data = untrusted.read_file(kit / folder / name, most=_LARGEST, what=what, error=ConfigError)
    return untrusted.read_json(data, most=_LARGEST, what=what, error=ConfigError)


def _text(kit: Path, name: str, *keys: str) -> str:
    """A text in one of a kit's files."""
    found: Any = _read(kit, name)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, str) or not 0 < len(found) <= 256 or untrusted.printable(found) != found:
        msg = f"{name} of {kit} has no {'.'.join(keys)} that is a name. Make the kit anew."
        raise ConfigError(msg)
    return found


def configure(kit: Path) -> None:
    """Closes a kit down: only this package's two bridge classes run, no code is accepted, storage is the kit's own.

    Writes `local/resources.json` and `local/authorization.json` beside the engine's defaults.

    Raises:
        ConfigError: It is no kit.
    """
    kit = kit.absolute()  # the engine takes no relative paths
    hub, local = is_hub(kit), kit / "local"
    kit.chmod(0o700)  # it holds a key, and logs that can quote examples
    resources = _read(kit, "resources.json.default", "local")
    with untrusted.decoding(f"resources.json.default of {kit}", ConfigError):
        _close_down(resources, kit, hub=hub)
    roles = dict.fromkeys(("project_admin", "lead", "org_admin", "member"), _ALLOWED | _FORBIDDEN)
    roles["member"] = roles["org_admin"] = {"view": "any", "byoc": "none"}
    for name, content in (
        ("resources.json", resources),
        ("authorization.json", {"format_version": "1.0", "permissions": roles}),
    ):
        _write(local / name, json.dumps(content, indent=1))


def _close_down(resources: dict[str, Any], kit: Path, *, hub: bool) -> None:
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = [HUB, CONTROLLER] if hub else [SITE, EXECUTOR]
    # the two that copy log files from sites to the hub: a log can quote an example
    resources["components"] = [
        c for c in resources["components"] if c["id"] not in ("log_receiver", "site_log_streamer")
    ]
    if hub:
        # The default is one folder in /tmp for every federation on the machine, and jobs that a killed server left.
        store = kit / "storage"
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(store / "snapshots")
        for component in resources["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(store / "jobs")
            if component["id"] == "job_scheduler":
                component["args"]["max_jobs"] = 20  # those that a killed hub left behind count
        resources["servers"][0]["heart_beat_timeout"] = 30
    else:
        resources["allow_log_streaming"] = False
        resources["client"]["maint_msg_timeout"] = 5.0


def _write(path: Path, text: str) -> None:
    """Writes a file for this account alone, in place of a former one."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _folder(path: Path) -> None:
    """Makes a folder for this account alone, if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def provision_here(folder: Path, *, sites: Iterable[str], port: int, host: str = "localhost") -> dict[str, Path]:
    """All kits of a federation in one place: name → kit, the hub's under "hub", the driver's under "admin".

    Args:
        folder: Where; made if it is missing.
        sites: Their names.
        port: The hub's.
        host: The name by which sites reach it.

    Raises:
        ConfigError: The engine's provisioning failed.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    wanted = list(sites)
    for name in wanted:
        names.check_name(name)
    if (folder / "ws").exists():
        msg = f"{folder} holds kits already: the engine would write new ones beside them. Choose a fresh folder."
        raise ConfigError(msg)
    _folder(folder)
    lighter = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": "fed",
        "participants": [
            {"name": host, "type": "server", "org": "hub", "fed_learn_port": port, "admin_port": port},
            *({"name": name, "type": "client", "org": _org(name)} for name in wanted),
            {"name": ADMIN, "type": "admin", "org": "hub", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder"},
            {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{lighter}.cert.CertBuilder", "args": {}},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }
    _write(folder / "project.yml", yaml.safe_dump(project, sort_keys=False))
    _nvflare("provision", "-p", folder / "project.yml", "-w", folder / "ws", "--force")
    made = folder / "ws" / "fed" / "prod_00"
    kits = {"hub": made / host, "admin": made / ADMIN} | {name: made / name for name in wanted}
    for name, kit in kits.items():
        if name != "admin":
            configure(kit)
    return kits


def start_authority(folder: Path, *, host: str, port: int) -> str:
    """Makes a federation's certificate authority at the hub; returns the fingerprint to tell the sites by phone.

    Raises:
        ConfigError: The engine refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    _folder(folder)
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    profile = {"name": "fed", "scheme": "http", "connection_security": "mtls", "server": server}
    _write(folder / "profile.yaml", yaml.safe_dump(profile, sort_keys=False))
    # never with --org: NVFlare 2.9.0 then signs leaf certificates under another issuer than the root's subject
    _nvflare("cert", "init", "--profile", folder / "profile.yaml", "-o", folder / "ca")
    return fingerprint(folder / "ca" / "rootCA.pem")


def fingerprint(certificate: Path) -> str:
    """The SHA-256 of a PEM certificate, as the engine writes it."""
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest().upper()
    return "SHA256:" + ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))


def request(name: str, role: Role, folder: Path) -> Path:
    """Makes a key that stays in `folder` and a request to send to the hub; returns the request's file.

    Raises:
        ConfigError: The engine refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    if role == "site":
        names.check_name(name)
    _folder(folder)
    participant = {"name": name, "type": _TYPES[role], "org": "hub" if role != "site" else _org(name)}
    if role == "admin":
        participant["role"] = "lead"
    text = yaml.safe_dump({"name": "fed", "participants": [participant]}, sort_keys=False)
    _write(folder / f"{name}.yaml", text)
    _nvflare("cert", "request", "-p", folder / f"{name}.yaml", "--out", folder / "request")
    return folder / "request" / f"{name}.request.zip"


def approve(requested: Path, authority: Path, role: Role = "site", *, again: bool = False) -> Path:
    """Signs a request at the hub; returns the file to send back, which holds no key.

    Args:
        requested: What was sent, NAME.request.zip.
        authority: The folder of `start_authority`.
        role: As what it is signed. A request says itself as what it wants to be, and an administrator's certificate
            gives orders to all: so what is asked for must be what was agreed.
        again: Whether another key may be signed for a name that has a certificate: after a loss, or before its end.

    Raises:
        ConfigError: It asks for another name or role, or for the hub's own name, is no request, has too short a key, or
            its name has a certificate already; or the engine refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    name = names.requested(requested, role)
    signed = requested.with_name(f"{name}.signed.zip")
    if signed.exists():
        msg = f"{signed} is there already: nothing is overwritten."
        raise ConfigError(msg)
    profile = authority / "profile.yaml"
    if role == "site" and name.casefold() == _host(profile).casefold():
        msg = f"{name} is what sites reach the hub by: a site of that name could stand in for it. Choose another."
        raise ConfigError(msg)
    # one name, one holder, also where only the case differs: the engine would sign a second key without a word
    known = authority / "approved" / name.casefold()
    if known.exists() and not again:
        msg = (
            f"{name} has a certificate already: another key under its name would be taken for it. If its holder asked "
            "for a new one, by telephone, say --again."
        )
        raise ConfigError(msg)
    _nvflare("cert", "approve", requested, "-c", authority / "ca", "--profile", profile, "--out", signed)
    _folder(known.parent)
    _write(known, f"{name} {role}\n")
    return signed


def _host(profile: Path) -> str:
    """The name by which sites reach the hub."""
    found = untrusted.read_yaml(profile, what="the authority's", error=ConfigError)
    host = found.get("server", {}).get("host") if isinstance(found, dict) else None
    return host if isinstance(host, str) else ""


def package(signed: Path, folder: Path, trusted: str) -> Path:
    """Puts the hub's answer and the own key together to a kit, closed down; returns it.

    Args:
        signed: The hub's answer.
        folder: Where `request` left the key.
        trusted: The authority's fingerprint, as told by another way than the file.

    Raises:
        ConfigError: The answer is for another key, or of another authority.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    name = names.named(signed, ".signed.zip")
    untrusted.read_file(signed, most=_LARGEST, what="the hub's answer", error=ConfigError)  # the engine reads all of it
    _nvflare("package", signed, "--request-dir", folder / "request", "-w", folder / "ws", "--fingerprint", trusted)
    kit = folder / "ws" / "fed" / "prod_00" / name
    if not (kit / "startup" / "fed_admin.json").is_file():
        configure(kit)
    return kit


def _org(name: str) -> str:
    return "".join(c for c in name if c.isalnum()) or "org"


def _nvflare(*arguments: object) -> None:
    command = Path(sys.executable).with_name("nvflare")
    found = str(command) if command.is_file() else shutil.which("nvflare")
    if found is None:
        msg = "the NVFlare runtime needs its engine: pip install 'llmchain-fed[nvflare]'"
        raise MissingExtraError(msg)
    try:
        done = subprocess.run(  # noqa: S603 (the engine's own command, no shell)
            [found, *map(str, arguments)],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False, umask=0o077,
            timeout=_PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        msg = f"nvflare {arguments[0]} was not done within {_PATIENCE:g} s."
        raise ConfigError(msg) from None
    if done.returncode != 0:
        said = untrusted.printable(" ".join((done.stdout + done.stderr).split())[-600:])
        msg = f"nvflare {arguments[0]} failed with status {done.returncode}: {said}"
        raise ConfigError(msg)
