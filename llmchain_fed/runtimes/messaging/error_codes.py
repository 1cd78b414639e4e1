"""Errors as JSON, so that what failed in one process is raised by name in another.

Knows this package's error tree. Knows nothing of sockets or ranks. No type is looked up outside that tree.
"""

from __future__ import annotations

from typing import Any

from llmchain_fed import errors, untrusted
from llmchain_fed.errors import DeadlineError, LLMChainFedError, ParticipantError, PolicyError, TransportError

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
