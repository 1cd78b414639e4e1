"""Kits: a participant's certificate, key and local rules, made by the engine's own provisioning and then closed down.

Knows the engine's kit layout, and what is read from a kit. Knows nothing of jobs, sockets or models, nor of how a kit
is made whose key stays with its site (`provisioning`). `provision_here` makes all kits in one place, for tests and
walk-throughs on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.nvflare.job import CONTROLLER, EXECUTOR, HUB, SITE
from llmchain_fed.runtimes.nvflare.provisioning import tool
from llmchain_fed.runtimes.nvflare.provisioning.registry import normal
from llmchain_fed.runtimes.nvflare.provisioning.tool import place, scratch
from llmchain_fed.storage.own_files import write_whole

ADMIN = "admin@hub.org"
REQUEST = "request"
"""folder of one's own key and request, beside the folder of the kit"""
_WORKSPACE = "ws"
KITS = Path(_WORKSPACE, "fed", "prod_00")
"""where the engine's own commands put kits"""
_LARGEST = 2**20  # bytes of any file of a kit
_STARTS = ("fed_server.json", "fed_client.json")
_ABOVE = ("", "prod_*/", "fed/prod_*/", f"{_WORKSPACE}/fed/prod_*/")  # where kits lie in a folder made for them
_LISTED = 5  # kits that a message names
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
    msg = f"{kit} is no kit of a hub or site: startup/fed_server.json or fed_client.json is missing.{_instead(kit)}"
    raise ConfigError(msg)


def _instead(folder: Path) -> str:
    """What was meant, perhaps: a kit within this folder, or what is still to be done to get one."""
    if is_admin(folder):
        return " It is an administrator's, which runs nothing: `federate` is given it, as hub.admin."
    for above in _ABOVE:
        startups = [path.parent for name in _STARTS for path in folder.glob(f"{above}*/startup/{name}")]
        if startups:
            found = sorted(str(path.parent) for path in startups)
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            return f" Within it are: {untrusted.one_line(', '.join(found[:_LISTED]))}{more}"
    if (folder / "request").is_dir():
        return " It contains a request: `llmchain-fed provision package` makes the kit of it and the hub's answer."
    return ""


def is_admin(kit: Path) -> bool:
    """Whether this is an administrator's kit, which runs nothing, and no other."""
    startup = kit / "startup"
    others = (startup / "fed_server.json", startup / "fed_client.json")
    return (startup / "fed_admin.json").is_file() and not any(path.is_file() for path in others)


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


def home_of(kit: Path) -> Path | None:
    """The folder of `provision request` that a kit lies in; None where it was copied elsewhere, or is none."""
    kit = kit.absolute()
    if len(kit.parents) <= len(KITS.parts):
        return None
    home = kit.parents[len(KITS.parts)]
    return home if kit == home / KITS / kit.name and (home / REQUEST).is_dir() else None


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


def configure(kit: Path, *, at: Path | None = None) -> None:
    """Closes a kit down: only this package's two bridge classes run, no code is accepted, storage is the kit's own.

    Writes `local/resources.json` and `local/authorization.json` beside the engine's defaults; an administrator's kit
    runs nothing, and is only made this account's alone. `at` is the folder that it will lie in, if that is another one:
    the engine's settings name it.

    Raises:
        ConfigError: It is no kit.
    """
    kit = kit.absolute()  # the engine takes no relative paths
    if is_admin(kit):
        kit.chmod(0o700)
        return
    hub, local = is_hub(kit), kit / "local"
    kit.chmod(0o700)  # it contains a key, and logs that can quote examples
    resources = _read(kit, "resources.json.default", "local")
    with untrusted.decoding(f"resources.json.default of {kit}", ConfigError):
        _close_down(resources, (at or kit).absolute(), hub=hub)
    roles = dict.fromkeys(("project_admin", "lead", "org_admin", "member"), _ALLOWED | _FORBIDDEN)
    roles["member"] = roles["org_admin"] = {"view": "any", "byoc": "none"}
    for name, content in (
        ("resources.json", resources),
        ("authorization.json", {"format_version": "1.0", "permissions": roles}),
    ):
        write_whole(local / name, json.dumps(content, indent=1), mode=0o600)


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


def provision_here(folder: Path, *, sites: Iterable[str], port: int, host: str = "localhost") -> dict[str, Path]:
    """All kits of a federation in one place: name → kit, the hub's under "hub", the driver's under "admin".

    The folder is made if it is missing. Sites reach the hub at `host` and `port`.

    Raises:
        ConfigError: A name cannot be had, kits are there already, or the engine or the system refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    wanted = list(sites)
    names.check_host(host)
    names.check_port(port)
    for name in wanted:
        names.check_name(name, host=host)
    if len({name.casefold() for name in wanted}) < len(wanted):
        msg = f"two sites of one name: {untrusted.shown(sorted(wanted))}. Each needs its own, whatever the case."
        raise ConfigError(msg)
    folder = folder.absolute()
    if os.path.lexists(folder / _WORKSPACE):
        msg = f"{folder} contains kits already: the engine would write new ones beside them. Choose a fresh folder."
        raise ConfigError(msg)
    with scratch(folder) as unfinished:
        project = unfinished / "project.yml"
        write_whole(project, yaml.safe_dump(_project(wanted, host, port), sort_keys=False), mode=0o600)
        tool.run("provision", "-p", project, "-w", unfinished / _WORKSPACE, "--force", within=unfinished)
        made, there = unfinished / KITS, folder / KITS
        for name in (host, ADMIN, *wanted):
            configure(made / name, at=there / name)
        place([(unfinished / name, folder / name) for name in (_WORKSPACE, "project.yml")])
    return {"hub": there / host, "admin": there / ADMIN} | {name: there / name for name in wanted}


def _project(sites: Iterable[str], host: str, port: int) -> dict[str, Any]:
    """A whole federation, as the engine's provisioning reads it."""
    lighter = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": "fed",
        "participants": [
            {"name": host, "type": "server", "org": "hub", "fed_learn_port": port, "admin_port": port},
            *({"name": name, "type": "client", "org": names.organisation_of(name, "site")} for name in sites),
            {"name": ADMIN, "type": "admin", "org": "hub", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{lighter}.workspace.WorkspaceBuilder"},
            {"path": f"{lighter}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{lighter}.cert.CertBuilder", "args": {}},
            {"path": f"{lighter}.signature.SignatureBuilder"},
        ],
    }


def fingerprint(certificate: Path) -> str:
    """The SHA-256 of a PEM certificate, as the engine writes it."""
    return normal(hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest())
