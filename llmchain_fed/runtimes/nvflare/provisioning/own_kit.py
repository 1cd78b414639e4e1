"""One's own key and kit: makes a key and a request, puts the hub's answer beside it, and does both again in time.

Knows the folder of a site (or of the hub, or of its administrator): request/ with the key, ws/ with the kit, renewal/
while a new key waits for its answer. Knows nothing of the authority. Whatever is refused, or fails half way, leaves
every file as it was; where a process is killed the same command does the rest. The key never leaves the folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.names import Role
from llmchain_fed.runtimes.nvflare import kits
from llmchain_fed.runtimes.nvflare.provisioning import registry, sent, tool
from llmchain_fed.runtimes.nvflare.provisioning.tool import place, scratch, sweep
from llmchain_fed.storage.own_files import write_whole

_REQUEST, _RENEWAL, _KITS = kits.REQUEST, "renewal", kits.KITS
_TYPES: dict[Role, str] = {"site": "client", "hub": "server", "admin": "admin"}
_ROLES: dict[object, Role] = {"site": "site", "server": "hub", "user": "admin"}


def request(name: str, role: Role, folder: Path, *, organisation: str | None = None) -> Path:
    """Makes a key that stays in `folder` and a request to send to the hub; returns the request's file.

    Raises:
        ConfigError: The name or organisation cannot be had, the folder contains a request, or the engine or the system
            refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    names.check(name, role)
    organisation = names.organisation_of(name, role) if organisation is None else organisation
    names.check_organisation(organisation)
    folder = folder.absolute()
    if os.path.lexists(folder / _REQUEST):
        raise ConfigError(_what_is_there(folder))
    with scratch(folder) as unfinished:
        _make_key(name, role, organisation, unfinished)
        place([(unfinished / _REQUEST, folder / _REQUEST)])
    return folder / _REQUEST / f"{name}.request.zip"


def renew(folder: Path) -> tuple[Path, Role]:
    """Makes a new key and request under the same name, in `renewal/`; returns the request's file and role.

    The kit goes on with the former key until `package` has put the answer in: before a certificate's end, or after the
    loss of a key.

    Raises:
        ConfigError: There is no kit to renew, a new key waits for its answer, or the engine or the system refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    folder = kits.home_of(folder) or folder.absolute()
    said = _own_request(folder / _REQUEST)
    name, role, organisation = _asked(said, folder)
    waiting = folder / _RENEWAL / _REQUEST / f"{name}.request.zip"
    if os.path.lexists(folder / _RENEWAL):
        msg = (
            f"a new key of {name} waits for its certificate already: send {waiting} to the hub, then `llmchain-fed "
            f"provision package` its answer. To begin anew, delete {folder / _RENEWAL} first."
        )
        raise ConfigError(msg)
    if not (folder / _KITS / name).is_dir():
        msg = (
            f"{folder} has no kit to renew ({_KITS / name} is missing). Request anew, in a fresh folder: llmchain-fed "
            f"provision request {name} FRESH_FOLDER; the hub approves it with --replace if {name} has a certificate."
        )
        raise ConfigError(msg)
    with scratch(folder) as unfinished:
        _make_key(name, role, organisation, unfinished)
        (unfinished / _RENEWAL).mkdir(mode=0o700)
        (unfinished / _REQUEST).rename(unfinished / _RENEWAL / _REQUEST)
        place([(unfinished / _RENEWAL, folder / _RENEWAL)])
    return waiting, role


def package(signed: Path, folder: Path, trusted: str) -> Path:
    """Puts the hub's answer and the own key together to a kit, closed down; returns it.

    After `renew` the kit keeps its place, `local/` and all else; only `startup/` is another. The former one and the
    former key are kept in `former-…/`.

    Args:
        signed: The hub's answer.
        folder: Where `request` left the key.
        trusted: The authority's fingerprint, as told by another way than the file.

    Raises:
        ConfigError: The answer is for another key, or of another authority; the kit is there already; or the engine or
            the system refused.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    folder = kits.home_of(folder) or folder.absolute()
    sweep(folder)  # also where the kit is there already: a killed process can have left a key
    renews = is_renewing(folder)
    own = folder / _RENEWAL / _REQUEST if renews else folder / _REQUEST
    name = sent.named(signed, ".signed.zip")
    answer = sent.read_answer(signed)
    _check_authority(answer, trusted)
    kit = folder / _KITS / name
    if kit.exists() and not renews:
        msg = (
            f"the kit is there already: {kit}. Start its engine with `llmchain-fed engine`. For a new key: "
            f"llmchain-fed provision renew {shlex.quote(str(folder))}"
        )
        raise ConfigError(msg)
    _check_key(answer, name, own)
    with scratch(folder) as unfinished:
        request, workspace = unfinished / _REQUEST, unfinished / "ws"
        shutil.copytree(own, request)
        copy = unfinished / signed.name
        write_whole(copy, answer.data, mode=0o600)
        tool.run(
            "package", copy, "--request-dir", request, "-w", workspace, "--fingerprint", registry.normal(trusted),
            within=unfinished,
        )  # fmt: skip
        made = workspace / kit.relative_to(folder / "ws")
        kits.configure(made, at=kit)
        if renews:
            _exchange(made, kit, folder, unfinished)
        elif (folder / "ws").exists():  # of an attempt with another name
            msg = f"{folder / 'ws'} is there already, without a kit of {name}. Move it away, then start again."
            raise ConfigError(msg)
        else:
            place([(workspace, folder / "ws")])
    return kit


def is_renewing(folder: Path) -> bool:
    """Whether a new key waits for its certificate in a folder of `request`, or of the kit in it."""
    return ((kits.home_of(folder) or folder) / _RENEWAL).is_dir()


def _make_key(name: str, role: Role, organisation: str, folder: Path) -> None:
    """Makes `request/` in a scratch folder, and makes sure that the engine did."""
    participant = {"name": name, "type": _TYPES[role], "org": organisation}
    if role == "admin":
        participant["role"] = "lead"
    definition = folder / "participant.yaml"
    text = yaml.safe_dump({"name": "fed", "participants": [participant]}, sort_keys=False)
    write_whole(definition, text, mode=0o600)
    tool.run("cert", "request", "-p", definition, "--out", folder / _REQUEST, within=folder)
    made = folder / _REQUEST
    untrusted.read_file(made / f"{name}.key", most=sent.LARGEST, what="the new key", error=ConfigError)
    sent.read_request(made / f"{name}.request.zip", role)


def _exchange(made: Path, kit: Path, folder: Path, unfinished: Path) -> None:
    """Puts a renewed kit's `startup/` and key in place of the former ones, of which a copy is kept.

    Killed between two steps, the kit has the former `startup/` or the new one, and `renewal/` is there still: the same
    command then does what is left, which the keys say.
    """
    startup, request, steps = kit / "startup", folder / _REQUEST, []
    begun = _keys(startup) == _keys(made / "startup") or any(
        _keys(kept / _REQUEST) == _keys(request) for kept in folder.glob("former-*")
    )
    if not begun:
        former = unfinished / "former"
        former.mkdir(mode=0o700)
        for part in (startup, request):
            shutil.copytree(part, former / part.name, symlinks=True)
        steps.append((former, folder / f"former-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"))
    steps += [
        (made / "startup", startup),
        (unfinished / _REQUEST, request),
        (folder / _RENEWAL, unfinished / _RENEWAL),
    ]
    place(steps, over=(startup, request))


def _keys(folder: Path) -> dict[str, bytes]:
    """The private keys in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.key")}


def _check_authority(answer: sent.Answer, trusted: str) -> None:
    told = registry.normal(trusted)
    if not registry.FINGERPRINT.fullmatch(told):
        msg = (
            f"{untrusted.one_line(untrusted.shown(trusted))!r} is no fingerprint: SHA256: and 32 pairs of 0-9 A-F, as "
            "the hub's `provision start` printed it. Nothing was changed."
        )
        raise ConfigError(msg)
    if told != answer.authority:
        msg = (
            f"this answer is of another authority than you were told of: its fingerprint is {answer.authority}, told "
            f"was {told}. Ask the hub by telephone which is right. Nothing was changed."
        )
        raise ConfigError(msg)


def _check_key(answer: sent.Answer, name: str, own: Path) -> None:
    """Makes sure that the answer certifies the key that is here."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    asked = _own_request(own).get("name")
    if asked != name or answer.name != name:
        msg = (
            f"{own} asked for the name {untrusted.shown(asked)}; the answer is for {untrusted.shown(answer.name)}. "
            "Give the folder of `provision request` that this answer is for. Nothing was changed."
        )
        raise ConfigError(msg)
    path = own / f"{name}.key"
    data = untrusted.read_file(path, most=sent.LARGEST, what="the key", error=ConfigError)
    with untrusted.decoding(f"the key {path}", ConfigError):
        public_key = sent.fingerprint_of(load_pem_private_key(data, None).public_key())  # type: ignore[arg-type]
    if public_key != answer.public_key:
        msg = (
            f"the answer is for another key ({sent.by_telephone(answer.public_key)}) than the one in {own} "
            f"({sent.by_telephone(public_key)}): an older request's, or somebody else's. Send the hub the request that "
            "lies beside the key. Nothing was changed."
        )
        raise ConfigError(msg)


def _own_request(own: Path) -> dict[str, Any]:
    """What the request in a folder says of itself."""
    if not own.is_dir():
        msg = f"{own.parent} has no request: give the folder of `provision request`, where the key is."
        raise ConfigError(msg)
    what = f"request.json of {own}"
    data = untrusted.read_file(own / "request.json", most=sent.LARGEST, what=what, error=ConfigError)
    return untrusted.read_json(data, most=sent.LARGEST, what=what, error=ConfigError)


def _asked(said: dict[str, Any], folder: Path) -> tuple[str, Role, str]:
    """Name, role and organisation of one's own request."""
    name, role, organisation = said.get("name"), _ROLES.get(said.get("kind")), said.get("org")
    if not isinstance(name, str) or role is None or not isinstance(organisation, str):
        msg = f"{folder / _REQUEST / 'request.json'} does not say who asked. Request anew, in a fresh folder."
        raise ConfigError(msg)
    names.check(name, role)
    return name, role, organisation


def _what_is_there(folder: Path) -> str:
    """What to do in a folder that contains a request already."""
    name = untrusted.one_line(untrusted.shown(_own_request(folder / _REQUEST).get("name")))
    kit = folder / _KITS / name
    if kit.is_dir():
        return (
            f"{folder} has the kit of {name} already: {kit}. For a new key: llmchain-fed provision renew "
            f"{shlex.quote(str(folder))}. For another name choose another folder. Nothing was changed."
        )
    return (
        f"{folder} has the request of {name} already: send {folder / _REQUEST / name}.request.zip to the hub, then "
        "`llmchain-fed provision package` its answer. For a new key or another name choose a fresh folder. Nothing was "
        "changed."
    )
