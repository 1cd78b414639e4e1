"""Overview: how a federation, an engine or a peer stands now, looked up from outside while it runs.

Knows what each of them writes down or answers. Knows nothing of rounds or models, and changes nothing; no torch, so
that an operator waits for no more than a second.
"""

from __future__ import annotations

import shutil
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, LLMChainFedError, TransportError
from llmchain_fed.federated.reporting.lines import DOING, clock, reason_of, span
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.tracking import status_file
from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.runtimes.nvflare.engine_state import EngineState

Kind = Literal["federation", "kit", "peer"]
_ANSWER = 5.0  # seconds for a peer to answer
_KNOCK = 0.7  # seconds for the hub's port to be reached
_FROZEN = 120.0  # seconds after which an engine that has written nothing hangs: it does every ten, or every minute
_LITTLE = 200e6  # bytes on a disk
_SHORT = 300  # characters of a reason
_VERBS = {
    "starting": "starting",
    "joining": "asking who takes part in round {next}",
    "training": "training, round {k}",
    "evaluating": "evaluating, round {k}",
    "between": "between rounds, after round {k}",
    "ended": "ended after round {k}",
    "failed": "failed after round {k}",
    "stopped": "stopped after round {k}",
}


@dataclass
class Report:
    """How one thing stands."""

    kind: Kind
    where: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """why not all is fine; nothing where it is"""
    data: dict[str, Any] = field(default_factory=dict)
    """all of it as plain data"""


def look(where: str | Path) -> Report:
    """How what stands there is.

    Args:
        where: A federation's file, the folder of its results, a kit's folder, or a peer's socket.

    Raises:
        ConfigError: It is none of these.
    """
    path = Path(where).absolute()
    try:
        mode = path.stat().st_mode
    except OSError as error:
        msg = f"{where} cannot be looked at: {error.strerror or error}. {_CHOICES}"
        raise ConfigError(msg) from error
    if stat.S_ISSOCK(mode):
        return _peer(path)
    if stat.S_ISREG(mode):
        return _status(path.parent, {}) if path.name == status_file.FILE else _federation(path)
    if (path / "startup").is_dir():
        return _kit(path)
    if (path / status_file.FILE).is_file() or (path / "history.json").is_file():
        return _status(path, {})
    if (path / "federation.yaml").is_file():
        return _federation(path / "federation.yaml")
    msg = f"nothing in {where} is known. {_CHOICES}"
    raise ConfigError(msg)


_CHOICES = "Give a federation's file, the folder it writes to (`out`), a kit's folder, or a peer's socket."


# --- a federation ---------------------------------------------------------------------------------------------------


def _federation(path: Path) -> Report:
    """A federation's file, of which only the places are read: the rest is `federate`'s to check."""
    what = "the federation file"
    found = untrusted.read_yaml(path, what=what, error=ConfigError)
    out = found.get("out") if isinstance(found, dict) else None
    if not isinstance(out, str) or "\0" in out:
        msg = f"{path} names no folder `out`: it is no federation's file. {_CHOICES}"
        raise ConfigError(msg)
    hub = found.get("hub")
    admin = hub.get("admin") if isinstance(hub, dict) else None
    report = _status(path.parent / out, found)
    report.where = str(path)
    if isinstance(admin, str) and "\0" not in admin:
        if report.data.get("state") != "ended":
            _hubs_engine(report, path.parent / admin)
        _certificate(report, path.parent / admin, None)
    return report


def _hubs_engine(report: Report, admin: Path) -> None:
    """Whether the hub's engine runs: as it wrote down, or by its port where that is another account's or machine's."""
    from llmchain_fed.runtimes.aside import within
    from llmchain_fed.runtimes.nvflare import engine_state, kits

    try:
        host, port = kits.address(admin)
        state = engine_state.of_hub(port)
    except LLMChainFedError as error:
        report.problems.append(f"the hub's engine cannot be looked up: {one_line(error, _SHORT)}")
        return
    why: str | None = None
    if state is not None:
        why = _not_running(state, time.time())
    else:
        try:
            within(_KNOCK, lambda: socket.create_connection((host, port), timeout=_KNOCK).close())
        except (OSError, UnicodeError) as error:
            why = f"nobody answers at {host}:{port} ({getattr(error, 'strerror', None) or error})"
    if why is not None:
        report.problems.append(
            f"the hub's engine does not run: {one_line(why, _SHORT)}; start it again with `llmchain-fed engine`"
        )


def _not_running(state: EngineState, now: float) -> str | None:
    """Why an engine that wrote this is of no use now; None where it runs."""
    if state.state == "ended":
        return f"it has ended: {state.says}"
    if not status_file.is_running(state.pid, state.started):
        return f"its process (pid {state.pid}) is gone"
    if now - state.written > _FROZEN:
        return f"its process (pid {state.pid}) has written nothing for {span(now - state.written)}: it hangs, perhaps"
    return None


def _status(out: Path, options: dict[str, Any]) -> Report:
    report = Report("federation", str(out))
    if not (out / status_file.FILE).is_file():
        report.problems.append(f"no federation has written to {out} yet, or one of an earlier version")
        report.data = {"out": str(out), "state": None, "rounds": options.get("rounds")}
        return report
    found = status_file.read(out / status_file.FILE)
    now = time.time()
    report.data = found.model_dump() | {"gone": found.gone}
    count = f" of {found.rounds}" if found.rounds is not None else ""
    next_round = f"{found.round + 1}{count}"
    doing = _VERBS[found.state].format(k=f"{found.round}{count}", next=next_round)
    report.lines.append(f"{doing}; since {_since(found.since, now)}; process {found.pid}")
    report.lines += [f"it waits: {found.says}"] if found.says and not found.over else []
    report.lines += [_participant(name, each, now, over=found.over) for name, each in found.participants.items()]
    waiting = [f"{name} ({s.asked})" for name, s in found.participants.items() if s.asked is not None]
    report.lines += [f"waits for the answers of: {', '.join(waiting)}"] if waiting and not found.over else []
    report.lines += [f"last: {found.last_round}"] if found.last_round else []
    report.lines += [f"{name}: {value}" for name, value in found.about.items()]
    _disk(report, out)
    _problems(report, found)
    return report


def _problems(report: Report, found: status_file.Status) -> None:
    """What of a federation is not as it should be."""
    if found.gone:
        report.problems.append(
            f"the process that wrote it (pid {found.pid}) is gone, last seen {_since(found.written, time.time())}: "
            "start it again, it goes on"
        )
    elif (age := found.silent) is not None:
        report.problems.append(f"its process (pid {found.pid}) has written nothing for {span(age)}: it hangs, perhaps")
    if found.state in ("failed", "stopped"):
        report.problems.append(f"it {found.state} with {one_line(found.error or 'no word', _SHORT)}")
    for name, standing in found.participants.items():
        if standing.state == "out":
            report.problems.append(f"{name} is out: {one_line(reason_of(standing.reason), _SHORT)}")
        elif found.over and not standing.took_part and standing.state != "in":
            report.problems.append(f"{name} never took part")


def _participant(name: str, standing: status_file.ParticipantStatus, now: float, *, over: bool) -> str:
    state = {"expected": "not yet"}.get(standing.state, standing.state)
    parts = [f"{state:<8}{name}"]
    parts += [f"since {_since(standing.since, now)}"] if standing.since is not None else []
    parts.append(f"last heard {_since(standing.heard, now)}" if standing.heard is not None else "never heard")
    if standing.asked is not None and not over:
        parts.append(f"asked: {DOING.get(standing.asked, standing.asked)}")
    parts += [one_line(reason_of(standing.reason), _SHORT)] if standing.reason else []
    parts += [f"now: {one_line(reason_of(standing.latest), _SHORT)}"] if standing.latest else []
    return ", ".join(parts)


# --- an engine ------------------------------------------------------------------------------------------------------


def _kit(path: Path) -> Report:
    from llmchain_fed.runtimes.nvflare import engine_state

    report = Report("kit", str(path))
    now, ends = time.time(), None
    administrator = (path / "startup" / "fed_admin.json").is_file()
    state = engine_state.read(path)
    if state is not None:
        report.data = state.model_dump()
        ends = state.certificate_ends
        stands = _not_running(state, now)
        does = state.state if stands is None or state.state == "ended" else f"was {state.state}"
        report.lines.append(f"{state.name}: {does}; {state.says}; process {state.pid}")
        if state.connected is not None and stands is None:
            connected = "connected" if state.connected else "not connected"
            report.lines.append(f"{connected} to the hub at {state.hub}" + _since_of(state.since, now))
        for name, site in state.sites.items():
            standing = "in" if site.connected else "out"
            line = f"{standing if stands is None else f'was {standing}':<8}{name}{_since_of(site.since, now)}"
            report.lines.append(line + (f", {one_line(site.trouble, _SHORT)}" if site.trouble else ""))
            if not site.connected or site.trouble:
                report.problems.append(f"{name}: {one_line(site.trouble or 'not connected', _SHORT)}")
        if stands is not None:
            remedy = "mend that first, then start" if state.lasting and state.state == "ended" else "start"
            end = f" --socket {state.socket}" if state.socket is not None else ""
            report.problems.append(
                f"the engine of this kit does not run: {one_line(stands, 2 * _SHORT).rstrip('.')}. To go on, {remedy} "
                f"`llmchain-fed engine {path}{end}`"
            )
        elif state.connected is False:
            report.problems.append(f"it is not connected to the hub: {one_line(state.says, _SHORT)}")
        if state.socket is not None:
            peer = _peer(Path(state.socket))
            report.data["peer"] = peer.data
            report.lines += [f"its peer {line}" for line in peer.lines[:1]] + [f"  {line}" for line in peer.lines[1:]]
            report.problems += [p if p.startswith("its peer") else f"its peer: {p}" for p in peer.problems]
    elif not administrator:
        report.problems.append(f"no engine runs from this kit: start `llmchain-fed engine {path}`")
    _certificate(report, path, ends)
    _disk(report, path)
    return report


def _certificate(report: Report, kit: Path, ends: float | None) -> None:
    """How long a kit's certificate can be used."""
    from llmchain_fed.runtimes.nvflare import certificates

    if ends is not None:
        days = (ends - time.time()) / 86_400
    else:
        try:
            days = certificates.days_left(kit)
        except (LLMChainFedError, ImportError) as error:
            report.problems.append(f"the certificate of {kit.name}: {one_line(error, _SHORT)}")
            return
    report.data["certificate_days_left"] = round(days, 1)
    report.lines.append(f"certificate of {kit.name}: {days:,.0f} days left")
    if days < certificates.SOON.days:
        left = f"ends in {days:.0f} days" if days > 0 else f"ended {-days:.0f} days ago"
        report.problems.append(f"the certificate of {kit.name} {left}: renew it")


# --- a peer ---------------------------------------------------------------------------------------------------------


def _peer(path: Path) -> Report:
    report, now = Report("peer", str(path)), time.time()
    try:
        found = ask_status(path)
    except TransportError as error:
        report.problems.append(f"its peer does not answer: {one_line(error, _SHORT)}")
        return report
    report.data = found.model_dump()
    rounds = f"{found.trainings} trainings" + (f" of {found.max_rounds}" if found.max_rounds is not None else "")
    report.lines.append(f"{found.name}: up since {_since(found.started, now)}; {rounds}")
    work = "idle" if found.op is None else f"at work: {found.op}"
    if found.op is not None and found.round is not None:
        work += f", round {found.round}"
    report.lines.append(work + _since_of(found.since if found.op is not None else None, now))
    heard = f"last asked by a hub {_since(found.heard, now)}" if found.heard is not None else "no hub has asked yet"
    report.lines.append(heard)
    held_out = "with" if found.held_out else "without"
    report.lines += [f"{found.examples:,} examples, {held_out} held-out ones"] if found.examples is not None else []
    report.lines += [f"last refusal: {one_line(reason_of(found.last_refusal), _SHORT)}"] if found.last_refusal else []
    if found.trouble is not None:
        report.problems.append(
            f"it does not take part; the hub was refused, or refused: {one_line(reason_of(found.trouble), _SHORT)}"
        )
    if found.audit is not None:
        report.lines.append(f"audit: {found.audit}")
        _disk(report, Path(found.audit).parent)
    return report


def ask_status(path: str | Path) -> heads.PeerStatus:
    """What the peer that listens at a socket says of itself.

    Raises:
        TransportError: It does not answer in time, or what it answers is none of this.
    """
    try:
        return heads.read_status(frames.ask(path, frames.pack({"do": "status"}), _ANSWER))
    except frames.SilentError as error:
        msg = f"it has been silent for {_ANSWER:g} s: it is stopped, or its machine is overloaded."
        raise TransportError(msg) from error


def _disk(report: Report, folder: Path) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    report.data["free"] = free
    report.lines.append(f"disk: {free / 1e9:,.1f} GB free at {folder}")
    if free < _LITTLE:
        report.problems.append(f"the disk of {folder} is full, or nearly: {free / 1e6:,.0f} MB are free")


def _since(at: float, now: float) -> str:
    return f"{clock(at)} ({span(now - at)} ago)"


def _since_of(at: float | None, now: float) -> str:
    return f", since {_since(at, now)}" if at is not None else ""
