"""News: what the process of NVFlare tells its parent, as lines of JSON, each a typed and bounded value.

Knows their fields. Knows nothing of who is told.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmchain_fed import untrusted
from llmchain_fed.errors import TransportError

ELSEWHERE, OTHER_KEY, NOT_ALLOWED, LATER = 1, 2, 3, 4
"""why the hub does not let a site in, as it tells that site"""
HUB = "server"
"""what the engine calls the hub"""
LONGEST = 2**20  # bytes of a line
_Name = Annotated[str, Field(max_length=256)]
_Text = Annotated[str, Field(max_length=2000)]


class SeenPeer(untrusted.Strict):
    """A connection to another engine, now."""

    address: _Text
    fingerprint: _Text
    silent: float
    """seconds since something was last heard over it"""


class Peers(untrusted.Strict):
    """Who is connected: sites at the hub, `HUB` at a site."""

    kind: Literal["peers"] = "peers"
    peers: dict[_Name, SeenPeer] = Field(max_length=10_000)


class RefusedSite(untrusted.Strict):
    """At the hub: somebody was not let in."""

    kind: Literal["refused"] = "refused"
    name: _Name
    code: int
    address: _Text
    says: _Text


class TurnedAway(untrusted.Strict):
    """At a site: the hub does not let it in, and why."""

    kind: Literal["turned away"] = "turned away"
    code: int


class Notice(untrusted.Strict):
    """What the operator should know, in a sentence."""

    kind: Literal["notice"] = "notice"
    says: _Text


News = Peers | RefusedSite | TurnedAway | Notice
_KINDS: dict[str, type[News]] = {"refused": RefusedSite, "turned away": TurnedAway, "notice": Notice}


def read(line: bytes) -> News:
    """A line.

    Raises:
        TransportError: It is none of these.
    """
    what = "what the engine's process told"
    found = untrusted.read_json(line, most=LONGEST, what=what, error=TransportError)
    kind = _KINDS.get(str(found.get("kind")), Peers) if isinstance(found, dict) else Peers
    return untrusted.checked(kind, found, what=what, error=TransportError)
