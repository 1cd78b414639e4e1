"""Resuming: a hub's whole state as a checkpoint, and a checkpoint's back into a hub.

Knows what of a hub decides its future. Knows nothing about files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmchain_fed.errors import CheckpointError, DeadlineError, TransportError
from llmchain_fed.federated import private_state, server_optimizers, wire
from llmchain_fed.federated.aggregation import AGGREGATIONS
from llmchain_fed.federated.checkpoint import Checkpoint
from llmchain_fed.federated.codecs import spec
from llmchain_fed.federated.global_state import GlobalState, named, parted
from llmchain_fed.federated.history import History
from llmchain_fed.federated.hub import Hub
from llmchain_fed.federated.private_state import Progress
from llmchain_fed.federated.roster import ABSENCE, Hello
from llmchain_fed.federated.rule import Rule
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.server_optimizers import ResumableServerOptimizer
from llmchain_fed.federated.settings import Settings

_START = private_state.pack({-1: Progress()})
_MEANING = {"base": "base weights", "adapter": "adapter", "prompt": "prompt", "tokenizer": "tokenizer"}


def decisive(settings: Settings) -> dict[str, Any]:
    """The options that decide how a federation goes on, as JSON; what is code stands there by its name."""
    optimizer = settings.server_optimizer
    training = settings.training.to_plain()
    return {
        "aggregation": _name_of(settings.rule),
        "training": training if training is not None else _named_training(settings),
        "weighting": settings.weighting,
        "codec": spec(settings.codec),
        "broadcast_codec": spec(settings.broadcast_codec),
        "server_optimizer": optimizer.settings()
        if isinstance(optimizer, ResumableServerOptimizer)
        else _kind(optimizer),
        "personal": settings.personal.model_dump() if settings.personal is not None else None,
        "participants_per_round": settings.per_round,
        "seed": settings.seed,
    }


def _name_of(rule: Rule) -> str:
    """One of those that are known by name, or that it is code."""
    return rule.name if AGGREGATIONS.get(rule.name) is rule else f"code: {rule.name}"


def _named_training(settings: Settings) -> dict[str, Any]:
    given = {n: getattr(settings.training, n) for n in sorted(settings.training.model_fields_set) if n != "optimizer"}
    optimizer = settings.training.optimizer
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return given | {"optimizer": {"class": kind.__qualname__, "options": repr(getattr(optimizer, "defaults", {}))}}


def _kind(value: Any) -> str | None:
    return None if value is None else type(value).__qualname__


def checkpoint_of(
    hub: Hub, options: Mapping[str, Any], former: Mapping[str, bytes], since: int | None = None
) -> Checkpoint:
    """Everything a hub needs to go on as if it had never stopped.

    Participants are asked where they stand; who does not answer, or may not, is as in `former` or keeps it for itself.

    Args:
        hub: After a whole round.
        options: What the federation was made with, as JSON.
        former: Participants' states as they were asked for last.
        since: After how many rounds that was.
    """
    # what participants will be sent next: with a broadcast codec their copy follows the global state only then
    settings, state = hub.settings, hub.publish()
    optimizer = settings.server_optimizer
    memory, numbers = optimizer.state_dict() if isinstance(optimizer, ResumableServerOptimizer) else ({}, {})
    blobs = dict(former)
    ask = wire.pack({}, {"kind": "personal_state", "round": hub.round})  # before it: an interrupted one does not count
    asked = [n for n in hub.transport.nodes() if _stands_elsewhere(hub, n, former, since)]
    answers = hub.transport.call("personal_state", asked, ask, settings.deadline) if asked else ()
    for name, answer in answers:
        if isinstance(answer, bytes):
            blobs[name] = answer
        elif name in former and isinstance(answer, (TransportError, DeadlineError)):  # others keep it for themselves
            hub.notes[name] = f"the checkpoint of round {hub.round} holds an earlier state of it ({answer!s:.80})"
    about = {
        "contract": hub.trainee.contract(),
        "decisive": decisive(settings),
        "options": dict(options),
        "participants": hub.transport.nodes(),
        "federation": hub.roster.federation,
        "holdings": {n: _holding(h) for n, h in hub.roster.joined.items()},
        "history": json.loads(hub.history.to_json()),
        "patience": hub.patience,
        "server_optimizer": numbers,
    }
    tensors = {
        "global": {**state.values, **named(state.remainder)},
        "copy": hub.broadcast.copy_state(),
        "server": memory,
    }
    return Checkpoint(hub.round, about, tensors, blobs)


def _stands_elsewhere(hub: Hub, name: str, former: Mapping[str, bytes], since: int | None) -> bool:
    """Whether a participant can be asked, and may stand elsewhere than when it was asked last."""
    rounds = [r.participants.get(name) for r in hub.history if since is None or r.round > since]
    if name not in hub.roster.joined and (not rounds or rounds[-1] is None or rounds[-1].status != "trained"):
        return False  # it is not there; one that `train()` brought is there without having joined
    if name not in former or not rounds:  # no round since: something else has changed, a personal adapter perhaps
        return True
    return any(record is None or record.status != "idle" for record in rounds)


def check(hub: Hub, found: Checkpoint) -> None:
    """Makes sure that a checkpoint is this federation's.

    Raises:
        CheckpointError: Another base, adapter, prompt, set of participants, or option that decides the future.
    """
    about = found.about
    wrong = _other_contract(hub, found)
    there, here = about["participants"], hub.transport.nodes()
    if sorted(there) != sorted(here):
        gone, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
        wrong.append(f"participants: {', '.join(gone) or 'none'} are missing, {', '.join(new) or 'none'} are new")
    elif there != here and isinstance(hub.transport, InProcess):  # asked in their order, whose sums end otherwise
        wrong.append(f"participants: in the order {', '.join(there)} there, {', '.join(here)} here")
    now = json.loads(json.dumps(decisive(hub.settings)))
    then = about["decisive"]
    wrong += [f"{k}: {v!r:.200} there, {now.get(k)!r:.200} here" for k, v in then.items() if now.get(k) != v]
    _refuse(found, wrong)


def check_contract(hub: Hub, found: Checkpoint) -> None:
    """Makes sure that a checkpoint's weights mean in this hub's chain what they meant in its own.

    Raises:
        CheckpointError: Another base, adapter or prompt.
    """
    _refuse(found, _other_contract(hub, found))


def _other_contract(hub: Hub, found: Checkpoint) -> list[str]:
    ours, theirs = hub.trainee.contract(), found.about["contract"]
    different = [k for k in _MEANING if theirs.get(k) != ours[k]]
    return [f"{_MEANING[k]}: {theirs.get(k)!s:.12} there, {ours[k]!s:.12} here" for k in different]


def _refuse(found: Checkpoint, wrong: list[str]) -> None:
    if wrong:
        msg = (
            f"the checkpoint of round {found.round} is another federation's ({'; '.join(wrong)}). Give the same chain, "
            "participants and options, or begin anew with another checkpoint_dir."
        )
        raise CheckpointError(msg)


def restore(hub: Hub, found: Checkpoint) -> dict[str, bytes]:
    """Puts a hub where the checkpoint was; all of it or, on an error, nothing.

    Returns:
        What participants are to be given back once they have joined.

    Raises:
        CheckpointError: The weights or the server optimizer's memory do not fit.
    """
    values, remainder = parted(found.tensors["global"])
    optimizer = hub.settings.server_optimizer
    undo = server_optimizers.snapshot(optimizer)
    state = GlobalState(values, remainder)
    try:
        history = History.from_dict(found.about["history"])
        if isinstance(optimizer, ResumableServerOptimizer):
            optimizer.load_state_dict(found.tensors.get("server", {}), found.about["server_optimizer"])
        state.load(hub.model)
    except Exception as error:
        undo()
        msg = f"the checkpoint of round {found.round} does not fit ({type(error).__name__}: {error})."
        raise CheckpointError(msg) from error
    # in the model's order, not the file's: what is summed over all tensors depends on it in the last bits
    state = GlobalState.of(hub.model)
    copy = found.tensors.get("copy", {})
    hub.round, hub.history = found.round, history
    hub.broadcast.restore({n: copy[n] for n in state.values if n in copy}, state)
    hub.patience = list(found.about["patience"])
    hub.evaluator.forget()
    return dict(found.participants)


def begun_by_then(hub: Hub, nodes: list[str], states: Mapping[str, bytes]) -> dict[str, bytes]:
    """Participants' states at a checkpoint, with those of whom the restored history knows nothing at their start."""
    trained = {name for record in hub.history for name in record.trained}
    return {n: states.get(n, _START) for n in nodes if n in states or n not in trained}


def _holding(hello: Hello) -> dict[str, Any]:
    """What of a participant decides how it goes on, as far as it says so."""
    return {
        "examples": hello.num_examples,
        "tokens": hello.num_tokens,
        "rank": hello.rank,
        "alpha": hello.alpha,
        "options": hello.options,
    }


def check_holdings(hellos: Mapping[str, Hello], holdings: Mapping[str, Any]) -> None:
    """Makes sure that participants hold what they held.

    Args:
        hellos: What they say now, by name.
        holdings: What a checkpoint says of them.

    Raises:
        CheckpointError: A participant holds other examples than it did.
    """
    for name, hello in hellos.items():
        then, now = holdings.get(name), _holding(hello)
        if then is not None and then != now:
            different = "; ".join(
                f"{what}: {then.get(what)} then, {now[what]} now" for what in now if then.get(what) != now[what]
            )
            msg = (
                f"participant {name!r} is not as it was ({different}): the run would not be the one that was "
                "interrupted. Give it the examples and options of then."
            )
            raise CheckpointError(msg)


def give_back(hub: Hub, names: list[str], states: Mapping[str, bytes]) -> None:
    """Tells participants where they stood; one that keeps that for itself stays as it is, and its record says so."""
    known = {name: states[name] for name in names if name in states}
    hub.notes |= {n: "goes on from what it kept itself (no checkpoint holds it)" for n in names if n not in states}
    if not known:
        return
    for name, answer in hub.transport.call("personal_state", list(known), known, hub.settings.deadline):
        if isinstance(answer, ABSENCE):  # its policy, say, keeps that from the hub
            hub.notes[name] = f"goes on from what it kept itself ({type(answer).__name__})"
        elif isinstance(answer, Exception):
            raise answer
