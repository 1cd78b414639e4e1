"""Errors as JSON, so that what failed in one process is raised by name in another.

Knows this package's error tree. Knows nothing of sockets or ranks. No type is looked up outside that tree.
"""

from __future__ import annotations

from typing import Any

from llmchain_fed import errors
from llmchain_fed.errors import DeadlineError, LLMChainFedError, ParticipantError, TransportError

_KNOWN: dict[str, type[LLMChainFedError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LLMChainFedError)
}
_LONGEST = 2000  # characters of a message that came from elsewhere


def to_plain(error: BaseException) -> dict[str, str]:
    """The error's type and message."""
    return {"type": type(error).__name__, "message": str(error)[:_LONGEST]}


def from_same_script(plain: Any) -> LLMChainFedError:
    """The error of a process that runs the same script: its own type where it is one of this package's."""
    name, message = _parts(plain)
    kind = _KNOWN.get(name)
    return kind(message) if kind is not None else ParticipantError(f"{name}: {message}")


def from_site(plain: Any) -> LLMChainFedError:
    """The error of another organisation's process: late, out of reach, or a participant's own trouble.

    It must not stop the loop, so it never comes back as an error of this side.
    """
    name, message = _parts(plain)
    for kind in (DeadlineError, TransportError):
        if name == kind.__name__:
            return kind(message)
    return ParticipantError(f"{name}: {message}")


def _parts(plain: Any) -> tuple[str, str]:
    found = plain if isinstance(plain, dict) else {}
    name, message = str(found.get("type", "an unknown error"))[:80], str(found.get("message", ""))[:_LONGEST]
    return _printable(name), _printable(message)


def _printable(text: str) -> str:
    """Without control characters: it will be shown on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
