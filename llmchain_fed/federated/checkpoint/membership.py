"""Membership: who is gone, new, or has something else than a checkpoint says, and what of their states goes on.

Knows names, counts and private states. Knows nothing about rounds, files or how participants are asked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.client.state import Progress
from llmchain_fed.federated.protocol.answers import Introduction

Members = Literal["same", "changed"]
START = private_state.pack({0: Progress()})
"""the state of a participant that has not trained yet"""


def checked_members(choice: str) -> Members:
    """`members`, if it is one of its two values.

    Raises:
        ConfigError: It is not.
    """
    if choice in get_args(Members):
        return cast(Members, choice)
    msg = (
        "members is 'same' (other participants, or other counts of examples, than the checkpoint's are refused) or "
        f"'changed' (the run goes on with them), got {choice!r:.80}."
    )
    raise ConfigError(msg)


def declared(hello: Introduction) -> dict[str, Any]:
    """What of a participant decides how it goes on, as far as it says so."""
    return {
        "examples": hello.num_examples,
        "tokens": hello.num_tokens,
        "rank": hello.rank,
        "alpha": hello.alpha,
        "options": hello.options,
    }


def different(
    hellos: Mapping[str, Introduction], declarations: Mapping[str, Any]
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Participant → what it has otherwise than a checkpoint says: (then, now).

    Of whom the checkpoint says nothing, nothing has changed.
    """
    found = {}
    for name, hello in hellos.items():
        then, now = declarations.get(name), declared(hello)
        if then is not None and then != now:
            found[name] = {what: (then.get(what), now[what]) for what in now if then.get(what) != now[what]}
    return found


def adapted(state: bytes, changes: Collection[str]) -> bytes:
    """A participant's state at a checkpoint, for what it has now.

    With other examples, or another batch size, it begins a new pass over them. With other training options a kept
    optimizer begins anew: it would bring the old ones back. With another rank or alpha all tensors do: their shapes,
    or what they mean, are other ones.
    """
    found = private_state.unpack(state)
    if {"rank", "alpha"} & set(changes):
        found = {number: Progress(progress.next_step) for number, progress in found.items()}
    elif "options" in changes:
        found = {number: replace(progress, optimizer_state=None) for number, progress in found.items()}
    return private_state.pack(found, new_pass=True)


def has_own(state: bytes) -> bool:
    """Whether there is a personal model in a participant's state."""
    return any(progress.has_own for progress in private_state.unpack(state).values())


@dataclass
class MembershipChange:
    """What is not as the checkpoint of a round says, until a record has said it."""

    round: int
    left: list[str]
    joined: list[str]
    reordered: bool
    """whether those who stay are asked in another order, which sums end differently by"""
    sampled: tuple[Any, Any] | None
    """`participants_per_round` then and now, where it changed"""
    divided: bool
    """whether other data change which of the former are held out"""
    told: bool = False
    """whether a record has been given a note of it: what is left are participants who say later what they have"""

    def tell(self, differences: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> tuple[list[str], bool]:
        """What the next record says of its round, once; and whether anything changed."""
        said = [f"left: {', '.join(self.left)}"] if self.left else []
        said += [f"joined: {', '.join(self.joined)}"] if self.joined else []
        said += ["asked in another order"] if self.reordered else []
        if self.sampled is not None:
            said.append(f"participants_per_round: {self.sampled[0]} then, {self.sampled[1]} now")
        said += [f"{name} changed: {_in_words(changes)}" for name, changes in differences.items()]
        first, self.told = not self.told, True
        self.left, self.joined, self.reordered, self.sampled = [], [], False, None
        if not said:
            same = f"members as after round {self.round}: nobody left or joined, and all have as many examples as then"
            return ([same] if first else []), False
        notes = [
            f"members changed after round {self.round}: {'; '.join(said)}",
            "from here on this is not, bit for bit, the run that was interrupted",
        ]
        if self.divided and any("examples" in changes for changes in differences.values()):
            notes.append("held-out shares are drawn anew from grown data: some of them may have been trained on before")
        return notes, True


def _in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    said = [f"{what} {then} then, {now} now" for what, (then, now) in changes.items() if what != "options"]
    if "options" in changes:
        said.append("training options of its own, a kept optimizer begins anew")
    if "rank" in changes or "alpha" in changes:
        said.append("what it kept to itself begins anew")
    return ", ".join(said)
