"""Contents: a hub's whole state as a checkpoint, and a checkpoint's back into a hub.

Knows what of a hub decides its future: one thing more is stored and restored here, and read in `schema`. Knows nothing
about files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from llmchain_fed.errors import CheckpointError, DeadlineError, ParticipantError, PolicyError, TransportError
from llmchain_fed.federated.checkpoint.files import Checkpoint
from llmchain_fed.federated.checkpoint.fitting import check_state, copy_of, limits_of, state_of
from llmchain_fed.federated.checkpoint.membership import Members, MembershipChange, declared, different
from llmchain_fed.federated.checkpoint.schema import Contents
from llmchain_fed.federated.history import ParticipantRecord, told_of
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.protocol.global_state import GlobalState, named
from llmchain_fed.federated.protocol.tasks import PersonalStateTask
from llmchain_fed.federated.server.client_manager import ABSENCE
from llmchain_fed.federated.server.server import Server
from llmchain_fed.untrusted import shown
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer

_UNTOLD = asdict(ParticipantRecord())
# the hub cannot tell a peer that goes on from one that was started anew and begins with none
_ITS_OWN = "trains on with the optimizer and place in the data that its peer has, if it was not started anew"
_MEANING = {"base": "base weights", "adapter": "adapter", "prompt": "prompt", "tokenizer": "tokenizer"}


class OtherExamplesError(ParticipantError):
    """A participant has something else than when the federation was interrupted."""


def checkpoint_of(server: Server, former: Mapping[str, bytes], since: int | None = None) -> Checkpoint:
    """Everything a server needs to go on as if it had never stopped.

    Participants are asked where they stand; who does not answer, or may not, is as in `former`, when they were asked
    last, after `since` rounds, or keeps it for itself.
    """
    # what participants will be sent next: with a broadcast codec their copy follows the global state only then
    settings, state = server.settings, server.publish()
    optimizer = settings.server_optimizer
    memory, numbers = optimizer.state_dict() if isinstance(optimizer, ResumableServerOptimizer) else ({}, {})
    blobs = dict(former)
    ask = messages.write(PersonalStateTask(round=server.round + 1))  # before it: an interrupted one does not count
    asked = [n for n in server.runtime.nodes() if _stands_elsewhere(server, n, former, since)]
    server.runtime.expect(limits_of(server.model).file, "personal_state")  # what could not be read again is refused
    answers = server.runtime.call("personal_state", asked, ask, settings.config.deadline) if asked else ()
    for name, answer in server.client_manager.attendance.following("personal_state", asked, answers):
        if isinstance(answer, bytes) and not server.runtime.sequential:
            hello = server.client_manager.joined.get(name)
            try:  # now: what could not be given back would make all of the checkpoint unusable
                check_state(server, name, answer, hello.rank if hello is not None else None, server.round)
            except CheckpointError as error:
                answer = ParticipantError(str(error))
        if isinstance(answer, bytes):
            blobs[name] = answer
        elif isinstance(answer, (TransportError, DeadlineError, ParticipantError)):  # others keep it for themselves
            what = "an earlier state" if name in former else "no state"
            server.notes[name] = f"the checkpoint of round {server.round} has {what} of it ({told_of(answer)[:80]})"
    about = {
        "contract": server.target.contract(),
        "config": settings.config.model_dump(mode="json"),
        "participants": server.runtime.nodes(),
        "federation": server.client_manager.federation,
        "declarations": {n: declared(h) for n, h in server.client_manager.joined.items()},
        "history": _short(json.loads(server.history.to_json())),
        "patience": server.patience,
        "round_notes": server.round_notes,
        "members_changed": server.members_changed,
        "server_optimizer": numbers,
    }
    tensors = {
        "global": {**state.values, **named(state.remainder)},
        "copy": server.broadcast.copy_state(),
        "server": memory,
    }
    return Checkpoint(server.round, about, tensors, blobs)


def _short(history: dict[str, Any]) -> dict[str, Any]:
    """The same without what records leave at its default: of those whom a round did not ask there is hardly more."""
    for record in history["rounds"]:
        people = record["participants"].items()
        record["participants"] = {
            name: {field: value for field, value in each.items() if value != _UNTOLD[field]} for name, each in people
        }
    return history


def _stands_elsewhere(server: Server, name: str, former: Mapping[str, bytes], since: int | None) -> bool:
    """Whether a participant can be asked, and may stand elsewhere than when it was asked last."""
    rounds = [r.participants.get(name) for r in server.history if since is None or r.round > since]
    if name not in server.client_manager.joined and (
        not rounds or rounds[-1] is None or rounds[-1].status != "trained"
    ):
        return False  # it is not there; one that `train()` brought is there without having joined
    if name not in former or not rounds:  # no round since: something else has changed, a personal adapter perhaps
        return True
    return any(record is None or record.status != "idle" for record in rounds)


def check(server: Server, found: Contents, members: Members) -> MembershipChange | None:
    """Makes sure that a checkpoint is this federation's; says what changed of its members, where they may change.

    Raises:
        CheckpointError: Another base, adapter, prompt, option that decides the future, or set of participants.
    """
    wrong, others = _other_contract(server, found), _other_options(server, found)
    there, here = found.about.participants, server.runtime.nodes()
    left, joined = [n for n in there if n not in here], [n for n in here if n not in there]
    # asked in another order, sums end otherwise
    reordered = server.runtime.sequential and [n for n in there if n in here] != [n for n in here if n in there]
    if members == "changed":
        sampled = None
        if others.pop("participants_per_round", None):  # a count of those who were there then
            sampled = found.config.participants_per_round, server.settings.config.participants_per_round
        _refuse(found, wrong + list(others.values()))
        split = server.evaluator.split
        divided = split is not None and split.moves_with_data
        return MembershipChange(found.round, left, joined, reordered, sampled=sampled, divided=divided)
    people = []
    if left or joined:
        people = [f"participants: {_listed(sorted(left))} are missing, {_listed(sorted(joined))} are new"]
    elif reordered:
        people = [f"participants: in the order {_listed(there)} there, {_listed(here)} here"]
    _refuse(found, wrong + people + list(others.values()), f" {_changed(found)}" if people else "")
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(shown(name) for name in names[:20]) or "none") + more


def _other_options(server: Server, found: Contents) -> dict[str, str]:
    now, then = server.settings.config.decisive(), found.config.decisive()
    return {
        k: f"{k}: {shown(repr(v), 200)} there, {shown(repr(now.get(k)), 200)} here"
        for k, v in then.items()
        if now.get(k) != v
    }


def _changed(found: Contents) -> str:
    return (
        f'FederatedAveraging.resume(…, round={found.round}, members="changed"), or llmchain-fed federate with '
        "--members changed, goes on with the members, and the data, of now."
    )


def check_contract(server: Server, found: Contents) -> None:
    """Makes sure that a checkpoint's weights mean in this hub's chain what they meant in its own.

    Raises:
        CheckpointError: Another base, adapter or prompt.
    """
    _refuse(found, _other_contract(server, found))


def _other_contract(server: Server, found: Contents) -> list[str]:
    ours, theirs = server.target.contract(), found.about.contract
    different = [k for k in _MEANING if theirs.get(k) != ours[k]]
    return [f"{_MEANING[k]}: {shown(theirs.get(k), 12)} there, {ours[k]!s:.12} here" for k in different]


def _refuse(found: Contents, wrong: list[str], remedy: str = "") -> None:
    if wrong:
        msg = (
            f"the checkpoint of round {found.round} is another federation's ({'; '.join(wrong)}). Give the same chain, "
            f"participants and options, or begin anew with another checkpoint_dir.{remedy}"
        )
        raise CheckpointError(msg)


def restore(server: Server, found: Contents) -> dict[str, bytes]:
    """Puts a server where the checkpoint was; all of it or, on an error, nothing.

    Returns:
        What participants are to be given back once they have joined.

    Raises:
        CheckpointError: The weights or the server optimizer's memory do not fit.
    """
    # in this order: everything is looked at before anything is changed
    state, copy = state_of(found, server.model), copy_of(found, server.model)
    optimizer = server.settings.server_optimizer
    undo = server_optimizers.snapshot(optimizer)
    try:
        if isinstance(optimizer, ResumableServerOptimizer):
            optimizer.load_state_dict(found.found.tensors.get("server", {}), found.about.server_optimizer)
            server_optimizers.rehearse(optimizer, state.values)
        state.load(server.model)
    except Exception as error:
        undo()
        msg = f"it does not fit ({type(error).__name__}: {shown(str(error), 400)})"
        raise found.found.unusable(msg) from error
    # in the model's order, not the file's: what is summed over all tensors depends on it in the last bits
    state = GlobalState.of(server.model)
    server.round, server.history = found.round, found.history
    server.broadcast.restore({n: copy[n] for n in state.values if n in copy}, state)
    server.patience, server.round_notes = list(found.found.about["patience"]), list(found.about.round_notes)
    if optimizer is not None and not isinstance(optimizer, ResumableServerOptimizer):
        server.round_notes.append("the server optimizer's memory began anew: it has no state_dict()")
    server.members_changed = found.about.members_changed
    server.evaluator.forget()
    server.client_manager.attendance.remember({name for record in server.history for name in record.trained})
    return dict(found.found.participants)


def check_declarations(hellos: Mapping[str, Introduction], declarations: Mapping[str, Any], found: Contents) -> None:
    """Makes sure that participants have what they had.

    Raises:
        CheckpointError: A participant has other examples than it did.
    """
    for name, changes in different(hellos, declarations).items():
        raise CheckpointError(other_declaration(name, changes, found))


def other_declaration(name: str, changes: Mapping[str, tuple[Any, Any]], found: Contents) -> str:
    """Why a participant that has something else than at a checkpoint does not go on from it, and what to do."""
    said = "; ".join(f"{what}: {shown(then)} then, {now} now" for what, (then, now) in changes.items())
    return (
        f"participant {shown(name)!r} is not as it was ({said}): the run would not be the one that was interrupted. "
        f"Give it the examples and options of then. {_changed(found)}"
    )


def give_back(server: Server, names: list[str], states: Mapping[str, bytes]) -> None:
    """Tells participants where they stood; one that keeps that for itself stays as it is, and its record says so."""
    known = {name: states[name] for name in names if name in states}
    server.notes |= {n: f"{_ITS_OWN} (no checkpoint contains it)" for n in names if n not in states}
    if not known:
        return
    for name, answer in server.runtime.call("personal_state", list(known), known, server.settings.config.deadline):
        if isinstance(answer, Exception):
            if server.runtime.sequential and not isinstance(answer, ABSENCE):
                raise answer  # this process's own
            kept_from_us = isinstance(answer, PolicyError)
            why = "its policy keeps that from the hub" if kept_from_us else type(answer).__name__
            server.notes[name] = f"{_ITS_OWN} ({why})"


@contextmanager
def as_before(server: Server) -> Iterator[None]:
    """What fails within leaves the hub, its model and its participants in this process where they were."""
    former, undo = GlobalState.of(server.model), server_optimizers.snapshot(server.settings.server_optimizer)
    kept, sent = dict(vars(server)), dict(vars(server.broadcast))
    here = server.runtime.sequential
    ask = messages.write(PersonalStateTask(round=server.round + 1))
    stood = dict(server.runtime.call("personal_state", server.runtime.nodes(), ask)) if here else {}
    try:
        yield
    except BaseException:
        former.load(server.model)
        undo()
        vars(server).update(kept)
        vars(server.broadcast).update(sent)
        states: dict[str, Any] = {name: state for name, state in stood.items() if isinstance(state, bytes)}
        for _ in server.runtime.call("personal_state", list(states), states) if states else ():
            pass
        raise
