"""Heads of frames: which fields each kind has, of which type and in which range. Anything else is refused.

Knows what is said between hub, bridge and peer, and this package's error tree: what failed in one process is raised by
name in another, and no type is looked up outside that tree. Knows nothing of sockets or of what becomes of it; no
torch, because the engine's own processes import this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from llmchain_fed import errors, untrusted
from llmchain_fed.errors import DeadlineError, LLMChainFedError, ParticipantError, PolicyError, TransportError
from llmchain_fed.runtimes.messaging import frames

Count = Annotated[int, Field(ge=0, lt=2**48)]
"""bytes"""
Name = Annotated[str, Field(min_length=1, max_length=256)]
"""of a site, as its certificate has it"""
_KNOWN: dict[str, type[LLMChainFedError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LLMChainFedError)
}
_LONGEST = 2000  # characters of a message that came from elsewhere
_Names = Annotated[list[Name], Field(max_length=100_000, fail_fast=True)]
_CallId = Annotated[str, Field(min_length=1, max_length=64)]
_Seconds = Annotated[float, Field(ge=0, le=7 * 86_400)]


class Ping(untrusted.Strict):
    """Is a peer there?"""

    do: Literal["ping"]


class Put(untrusted.Strict):
    """A slice of a call's payload."""

    do: Literal["put"]
    call: _CallId
    op: Annotated[str, Field(max_length=64)]
    offset: Count
    total: Count


class Poll(untrusted.Strict):
    """Is a call's answer there? May wait for so many seconds."""

    do: Literal["poll"]
    call: _CallId
    wait: _Seconds = 0.0


class Get(untrusted.Strict):
    """A slice of a call's answer, please."""

    do: Literal["get"]
    call: _CallId
    offset: Count


class Drop(untrusted.Strict):
    """Nobody waits for a call any more."""

    do: Literal["drop"]
    call: _CallId


class StatusRequest(untrusted.Strict):
    """How does the site stand? Asked by a process of its own account; a hub may not."""

    do: Literal["status"]


class Carry(untrusted.Strict):
    """From a site's own bridge: the body is a frame of `caller`, as the engine authenticated it."""

    do: Literal["carry"]
    caller: Name


class RefusedRequest(untrusted.Strict):
    """From a site's own bridge: somebody who may not has called, and was sent away unheard."""

    do: Literal["refused"]
    caller: Name
    bytes: Count
    count: Annotated[int, Field(ge=1)]
    """how many calls of this caller were refused so far"""


_REQUESTS: dict[str, type[untrusted.Strict]] = {
    "ping": Ping,
    "put": Put,
    "poll": Poll,
    "get": Get,
    "drop": Drop,
    "refused": RefusedRequest,
    "status": StatusRequest,
}
_OF_THIS_ACCOUNT = (RefusedRequest, StatusRequest)


class Fault(untrusted.Strict):
    """An error of elsewhere."""

    type: str
    message: str


class Reply(untrusted.Strict):
    """What a site says of a call; `unknown` where it knows nothing of it."""

    state: Literal["here", "receiving", "waiting", "working", "done", "failed", "unknown", "noted"]
    total: Annotated[int, Field(ge=0)] | None = None
    """bytes of the answer, as it claims"""


_Time = Annotated[float, Field(ge=0, lt=2**40)]
"""seconds since the epoch"""
_Many = Annotated[int, Field(ge=0, lt=2**48)]


class PeerStatus(untrusted.Strict):
    """How a site stands, for its operator."""

    name: Name
    started: _Time
    examples: _Many | None
    """that it trains on; None of a DataLoader"""
    held_out: bool
    trainings: _Many
    """since it was started, and how many it does at most"""
    max_rounds: _Many | None
    op: Annotated[str, Field(max_length=64)] | None
    """what is being worked on, of which round, since when"""
    round: _Many | None
    since: _Time | None
    heard: _Time | None
    """when a hub last asked anything"""
    last_refusal: Annotated[str, Field(max_length=2000)] | None
    trouble: Annotated[str, Field(max_length=2000)] | None
    """why the last hello, or training, came to nothing; None once one succeeds"""
    audit: Annotated[str, Field(max_length=4096)] | None
    contract: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=128)]], Field(max_length=32)
    ]


class Failed(untrusted.Strict):
    """Why a site did not do it."""

    error: Fault


class Greeting(untrusted.Strict):
    """The job's bridge to the driver: which submission it is of, and who is in the job."""

    run: Annotated[str, Field(max_length=64)]
    sites: _Names


class Order(untrusted.Strict):
    """The driver to the bridge: carry the body to these nodes."""

    nodes: _Names
    seconds: _Seconds


class Allowed(untrusted.Strict):
    """The hub's bridge to a site's: how long the peer may be silent. More than a day is believed of nobody."""

    seconds: Annotated[float, Field(gt=0, le=86_400)]


class StopOrder(untrusted.Strict):
    """The driver to the bridge: the job is over."""

    do: Literal["stop"]


class Carried(untrusted.Strict):
    """The bridge to the driver: the body is what a node answered, unless there is an error."""

    node: Name
    error: Fault | None = None


class Done(untrusted.Strict):
    """The bridge to the driver: every node has answered, or will not."""

    do: Literal["done"]


HeadT = TypeVar("HeadT", bound=untrusted.Strict)


def first_of(
    kinds: Sequence[type[HeadT]], head: Mapping[str, Any], *, what: str, error: type[LLMChainFedError]
) -> HeadT:
    """A head as the first of these kinds whose first field it has; told apart by that, it is that kind or refused."""
    kind = next((k for k in kinds if next(iter(k.model_fields)) in head), kinds[0])
    return untrusted.checked(kind, head, what=what, error=error)


def one_of(frame: bytes | memoryview, *kinds: type[HeadT], what: str) -> tuple[HeadT, memoryview]:
    """A frame's head, which is the first of these kinds whose first field it has, and the body.

    Raises:
        TransportError: It is no frame, or its head is none of these.
    """
    head, body = frames.read(frame, most=frames.MAX_ORDER)
    return first_of(kinds, head, what=what, error=TransportError), body


def request(frame: bytes) -> tuple[str | None, dict[str, Any], memoryview]:
    """What a peer is asked: by whom, the head, the body.

    Returns:
        The caller as the site's own bridge has it, None for a process of this account that asked by itself; the head,
        each field of its type and in its range; the body.

    Raises:
        TransportError: It is none of the requests that a peer answers.
    """
    caller: str | None = None
    head, body = frames.read(frame)
    if head.get("do") == "carry":
        caller = untrusted.checked(Carry, head, what="the head of a carried frame", error=TransportError).caller
        head, body = frames.read(body)
    do = head.get("do")
    kind = _REQUESTS.get(do) if isinstance(do, str) else None
    if kind is None or (kind in _OF_THIS_ACCOUNT and caller is not None):
        msg = f"unknown request {untrusted.shown(do, 40)!r}; a site answers ping, put, poll, get and drop."
        raise TransportError(msg)
    found = untrusted.checked(kind, head, what=f"the head of a {do}", error=TransportError)
    return caller, found.model_dump(), body


def read_reply(frame: bytes | memoryview) -> tuple[Reply | Failed, memoryview]:
    """What a site answered.

    Raises:
        TransportError: It is no answer of a site.
    """
    head, body = frames.read(frame)
    kind: type[Reply] | type[Failed] = Failed if "error" in head else Reply
    return untrusted.checked(kind, head, what="what a site answered", error=TransportError), body


def read_status(frame: bytes | memoryview) -> PeerStatus:
    """How a site says that it stands.

    Raises:
        TransportError: It is no such answer; what it failed for is its message.
    """
    head, _ = frames.read(frame)
    if "error" in head:
        failed = untrusted.checked(Failed, head, what="what a site answered", error=TransportError)
        raise TransportError(untrusted.one_line(failed.error.message, 500))
    return untrusted.checked(PeerStatus, head, what="what a site says of itself", error=TransportError)


def to_plain(error: BaseException) -> dict[str, str]:
    """The error's type and message."""
    return {"type": type(error).__name__, "message": str(error)[:_LONGEST]}


def from_same_script(plain: Any) -> LLMChainFedError:
    """The error of a process that runs the same script: its own type where it is one of this package's."""
    name, message = _parts(plain)
    kind = _KNOWN.get(name)
    return kind(message) if kind is not None else ParticipantError(f"{name}: {message}")


def from_site(plain: Any) -> LLMChainFedError:
    """The error of another organisation's process: late, out of reach, against its policy, or its own trouble.

    It must not stop the loop, so it never comes back as any other error of this side.
    """
    name, message = _parts(plain)
    if name == PolicyError.__name__:
        return PolicyError(f"refused by site: {message}")
    for kind in (DeadlineError, TransportError):
        if name == kind.__name__:
            return kind(message)
    return ParticipantError(f"{name}: {message}")


def said(plain: Any) -> str:
    """An error of elsewhere in a line."""
    return ": ".join(_parts(plain))


def _parts(plain: Any) -> tuple[str, str]:
    found = plain if isinstance(plain, dict) else {}
    return _line(found.get("type", "an unknown error"), 80), _line(found.get("message", ""), _LONGEST)


def _line(text: Any, longest: int) -> str:
    """One line that can be shown and written anywhere."""
    shown = text if isinstance(text, str) else untrusted.shown(text)
    return untrusted.printable(shown, longest).replace("\n", " ").replace("\t", " ")
