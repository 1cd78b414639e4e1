"""Ranks: what the processes of one job say to each other, each field of its type and in its range.

Knows heads, and which part of a body is whose. Knows nothing of torch, process groups or of what an operation does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llmchain_fed import untrusted
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.runtime import Payload, payload_for
from llmchain_fed.runtimes.messaging.heads import Fault, HeadT, first_of

MAX_HEAD = 8 * 2**20
"""bytes: the names of some 100,000 participants"""
Name = Annotated[str, Field(max_length=4096)]
_MOST = 2**20  # participants of a job
_Names = Annotated[list[Name], Field(max_length=_MOST, fail_fast=True)]
_Rank = Annotated[int, Field(ge=0, lt=2**20)]
_Size = Annotated[int, Field(ge=0, lt=2**48)]


class Joining(untrusted.Strict):
    """A rank to the leader: whom it has."""

    names: _Names


class Homes(untrusted.Strict):
    """The leader to a rank: who is where, and who is in two places."""

    names: _Names
    ranks: Annotated[list[_Rank], Field(max_length=_MOST, fail_fast=True)]
    twice: _Names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.names) != len(self.ranks):
            msg = "there are more names than ranks, or fewer"
            raise ValueError(msg)
        return self


class RankTask(untrusted.Strict):
    """The leader to a rank: these participants do this; the body carries their payloads."""

    op: Annotated[str, Field(max_length=64)]
    nodes: _Names
    timeout: Annotated[float, Field(ge=0)] | None
    which: Annotated[list[_Rank], Field(max_length=_MOST, fail_fast=True)]
    sizes: Annotated[list[_Size], Field(min_length=1, max_length=_MOST, fail_fast=True)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.which) != len(self.nodes) or any(index >= len(self.sizes) for index in self.which):
            msg = "it does not say which payload is whose"
            raise ValueError(msg)
        return self


class Ended(untrusted.Strict):
    """The leader to a rank: the loop is over, the body is how it ended. A rank to the leader: the body is an answer."""

    error: Fault | None


def read_head(text: bytes, kinds: tuple[type[HeadT], ...], what: str) -> HeadT:
    """A head, which is the first of these kinds whose first field it has.

    Raises:
        FederationError: It is none of them.
    """
    found = untrusted.read_json(text, most=MAX_HEAD, what=what, error=FederationError)
    return first_of(kinds, found, what=what, error=FederationError)


def distinct(payload: Payload, names: list[str]) -> tuple[list[bytes], list[int]]:
    """The different payloads for these nodes, and which of them is whose."""
    parts: list[bytes] = []
    places: dict[int, int] = {}
    which = []
    for name in names:
        part = payload_for(payload, name)
        if id(part) not in places:
            places[id(part)] = len(parts)
            parts.append(part)
        which.append(places[id(part)])
    return parts, which


def by_node(body: bytes, task: RankTask, hosted: Mapping[str, Any]) -> Payload:
    """The reverse of `distinct`.

    Raises:
        FederationError: The body is not made of these parts, or a node is not one of this rank.
    """
    strangers = [name for name in task.nodes if name not in hosted]
    if strangers or sum(task.sizes) != len(body):
        why = (
            f"{untrusted.shown(strangers[0])} is not here" if strangers else "the body has another size than its parts"
        )
        msg = f"a task that makes no sense: {why}."
        raise FederationError(msg)
    if len(task.sizes) == 1:
        return body
    ends = list(itertools.accumulate(task.sizes))
    parts = [body[end - size : end] for end, size in zip(ends, task.sizes, strict=True)]
    return {name: parts[index] for name, index in zip(task.nodes, task.which, strict=True)}
