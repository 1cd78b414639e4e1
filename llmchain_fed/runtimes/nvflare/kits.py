"""Kits: a participant's certificate, key and local rules, made by the engine's own provisioning and then closed down.

Knows the engine's kit layout and its command line. Knows nothing of jobs, sockets or models. Keys stay with their site:
it makes its key, sends a request, and puts the hub's signed answer beside the key (`request`, `approve`, `package`).
`provision_here` makes all kits in one place, for tests and walk-throughs on one machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from llmchain_fed.errors import ConfigError, MissingExtraError
from llmchain_fed.runtimes.nvflare.job import CONTROLLER, EXECUTOR, HUB, SITE

Role = Literal["site", "hub", "admin"]
_TYPES: dict[Role, str] = {"site": "client", "hub": "server", "admin": "admin"}
ADMIN = "admin@hub.org"
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
    found: str = json.loads((kit / "startup" / "fed_client.json").read_text())["client"]["fqsn"]
    return found


def admin_name(kit: Path) -> str:
    """The name that an administrator's kit logs in with."""
    found: str = json.loads((kit / "startup" / "fed_admin.json").read_text())["admin"]["username"]
    return found


def address(kit: Path) -> tuple[str, int]:
    """Host and port of the hub, from any kit."""
    startup = kit / "startup"
    if (startup / "fed_admin.json").is_file():
        admin = json.loads((startup / "fed_admin.json").read_text())["admin"]
        return str(admin["host"]), int(admin["port"])
    name = "fed_server.json" if is_hub(kit) else "fed_client.json"
    host, port = json.loads((startup / name).read_text())["servers"][0]["service"]["target"].rsplit(":", 1)
    return host, int(port)


def configure(kit: Path) -> None:
    """Closes a kit down: only this package's two bridge classes run, no code is accepted, storage is the kit's own.

    Writes `local/resources.json` and `local/authorization.json` beside the engine's defaults.

    Raises:
        ConfigError: It is no kit.
    """
    kit = kit.absolute()  # the engine takes no relative paths
    hub, local = is_hub(kit), kit / "local"
    resources: dict[str, Any] = json.loads((local / "resources.json.default").read_text())
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
    roles = dict.fromkeys(("project_admin", "lead", "org_admin", "member"), _ALLOWED | _FORBIDDEN)
    roles["member"] = roles["org_admin"] = {"view": "any", "byoc": "none"}
    for name, content in (
        ("resources.json", resources),
        ("authorization.json", {"format_version": "1.0", "permissions": roles}),
    ):
        (local / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


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
    names = list(sites)
    if (folder / "ws").exists():
        msg = f"{folder} holds kits already: the engine would write new ones beside them. Choose a fresh folder."
        raise ConfigError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    lighter = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": "fed",
        "participants": [
            {"name": host, "type": "server", "org": "hub", "fed_learn_port": port, "admin_port": port},
            *({"name": name, "type": "client", "org": _org(name)} for name in names),
            {"name": ADMIN, "type": "admin", "org": "hub", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder"},
            {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{lighter}.cert.CertBuilder", "args": {}},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    _nvflare("provision", "-p", folder / "project.yml", "-w", folder / "ws", "--force")
    made = folder / "ws" / "fed" / "prod_00"
    kits = {"hub": made / host, "admin": made / ADMIN} | {name: made / name for name in names}
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
    folder.mkdir(parents=True, exist_ok=True)
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    profile = {"name": "fed", "scheme": "http", "connection_security": "mtls", "server": server}
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
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
    folder.mkdir(parents=True, exist_ok=True)
    participant = {"name": name, "type": _TYPES[role], "org": "hub" if role != "site" else _org(name)}
    if role == "admin":
        participant["role"] = "lead"
    text = yaml.safe_dump({"name": "fed", "participants": [participant]}, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    _nvflare("cert", "request", "-p", folder / f"{name}.yaml", "--out", folder / "request")
    return folder / "request" / f"{name}.request.zip"


def approve(requested: Path, authority: Path) -> Path:
    """Signs a request at the hub; returns the file to send back, which holds no key.

    Raises:
        ConfigError: The engine refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    signed = requested.with_name(requested.name.replace(".request.zip", ".signed.zip"))
    _nvflare(
        "cert", "approve", requested, "-c", authority / "ca", "--profile", authority / "profile.yaml", "--out", signed
    )
    return signed


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
    _nvflare("package", signed, "--request-dir", folder / "request", "-w", folder / "ws", "--fingerprint", trusted)
    kit = folder / "ws" / "fed" / "prod_00" / signed.name.removesuffix(".signed.zip")
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
    done = subprocess.run(  # noqa: S603 (the engine's own command, no shell)
        [found, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())[-600:]
        msg = f"nvflare {arguments[0]} failed with status {done.returncode}: {said}"
        raise ConfigError(msg)
