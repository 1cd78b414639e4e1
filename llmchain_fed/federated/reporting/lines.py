"""Lines: how a time, a change of attendance and a reason are worded for an operator, and how a line is written.

Knows words, the clock, stderr and stdout. Knows nothing of files or rounds. A line that cannot be written costs that
line, and never what the process is at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.federated.server.attendance import AttendanceChange

_LONGEST = 2000  # characters of a line
_SHORT = 160  # and of a reason in a list
_NAMES = 20  # names that are listed
DOING = {
    "hello": "joining",
    "train": "training",
    "personalize": "personalizing",
    "evaluate": "evaluating",
    "side_by_side": "comparing",
    "curve": "measuring a curve",
    "time_step": "timing a step",
    "personal_state": "its state for a checkpoint",
}
# what an operator need not know a class's name for; the others stay, because they say what to look for
_WORDS = {
    "ContractError": "refused: ",
    "DeadlineError": "",
    "OtherExamplesError": "",
    "ParticipantError": "",
    "PolicyError": "",
    "TransportError": "",
    "UpdateRefusedError": "its update was refused: ",
}
_TYPE = re.compile(rf"({'|'.join(_WORDS)}): ")


def stamped(text: str, at: float | None = None) -> str:
    r"""A line with the local time in front; what comes from elsewhere can write no further lines.

    It is now, or `at` so many seconds since the epoch.

    >>> stamped("a is back\nb, too")[19:]
    ' a is back\\nb, too'
    """
    return f"{clock(at)} {one_line(text, _LONGEST)}"


def clock(at: float | None = None) -> str:
    """A local time with its seconds."""
    return f"{datetime.fromtimestamp(at) if at is not None else datetime.now():%Y-%m-%d %H:%M:%S}"


def span(seconds: float) -> str:
    """How long something took, for people.

    >>> span(63.2), span(7000), span(200_000)
    ('63 s', '1 h 56 min', '2 days 7 h')
    """
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


def reason_of(reason: str | None) -> str:
    """Why somebody is out, in words.

    >>> reason_of("ParticipantError: ContractError: another contract (base weights: 1e1c… at b, 8057… at the hub)")
    'refused: another contract (base weights: 1e1c… at b, 8057… at the hub)'
    """
    found = reason or "no reason is known"
    while match := _TYPE.match(found):
        found = _WORDS[match[1]] + found[match.end() :]
    return found


def change_of(change: AttendanceChange) -> str:
    """A change of attendance, without its time."""
    name, reason = one_line(change.name, 80), reason_of(change.reason)
    if change.state == "in":
        if change.after is None:
            return f"{name} is in"
        back = "is in time again" if change.was == "late" else "is back"
        return f"{name} {back} after {span(change.after)}"
    if change.state == "late":
        return f"{name} is late: {reason}"
    return f"{name} is {'still out, now for another reason' if change.was == 'out' else 'out'}: {reason}"


def names_of(names: list[str]) -> str:
    """Names in a line; of many the first."""
    shown = ", ".join(one_line(name, 80) for name in names[:_NAMES])
    return shown + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "") or "nobody"


def beginning_of(there: list[str], absent: Mapping[str, str]) -> str:
    """Who takes part in the first round, and who does not."""
    out = [f"{one_line(name, 80)} ({one_line(reason_of(why), _SHORT)})" for name, why in list(absent.items())[:_NAMES]]
    more = f" and {len(absent) - _NAMES} more" if len(absent) > _NAMES else ""
    return f"in: {names_of(there)}" + (f"; out: {', '.join(out)}{more}" if out else "")


def write(line: str) -> None:
    """A line on stderr, above a progress bar where there is one.

    A log on a full disk, a terminal that has gone, a pipe that nobody reads: in the middle of a round, or in a thread
    that has other work, none of them is a reason to end.
    """
    with suppress(OSError, ValueError):  # ValueError: it was closed
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """What was asked for, on stdout, as far as that can be written."""
    with suppress(OSError, ValueError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
