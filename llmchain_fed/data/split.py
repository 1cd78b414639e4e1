"""Split: which examples are set apart for evaluation, by a hash of a key or by time.

Knows keys and times, in whatever dress a library has them. Knows nothing about examples or participants; what divides
by it is in `sides`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, fields
from decimal import Decimal
from typing import Any

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import shown

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_DIGITS_OF_A_DAY = 8  # of 20260102


@dataclass(frozen=True)
class Split:
    """What is held out of a participant's examples: `evaluation=Split(0.2)`, or `Participant(held_out=Split(0.2))`.

    Without `time` a key is held out where its hash, a number from 0 to 1, is below `share`. It depends on the key and
    the seed alone, so a key is on the same side at every participant, and one more example moves no other. Of few keys
    another share than `share` may be held out. With `time` what is newest is held out: training looks back.

    >>> Split(0.2, by="patient_id")
    Split(share=0.2, by='patient_id')

    Args:
        share: The part that is held out, between 0 and 1.
        by: What the key is: a column, which need be no variable of the prompt and is never part of one, several
            columns together, or a function of a row as it stands in the source. Rows of one key are never on both
            sides, however the key was written (`text_of`). By default it is the text of the prompt, so that one
            question with two answers is one key.
        time: A column of dates (ISO 8601, or what frames have) or numbers. With `share` the newest part of each
            participant's rows is held out, rows of the same time together.
        after: With `time` instead of `share`: what is of this time or later is held out, at every participant alike.
        seed: Another one is another split; None is the federation's, and 0 at a `Site`.

    Raises:
        ConfigError: These do not go together.
    """

    share: float | None = None
    _: KW_ONLY
    by: str | Sequence[str] | Callable[[Any], Any] | None = None
    time: str | None = None
    after: Any = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", plain_number(self.share))
        object.__setattr__(self, "seed", plain_number(self.seed))
        if self.share is not None and (type(self.share) is not float or not 0 < self.share < 1):
            msg = f"Split: as a share it lies between 0 and 1, got {self.share!r:.40}."
            raise ConfigError(msg)
        if (self.share is None) == (self.after is None):
            msg = 'Split: give a share to hold out, such as Split(0.2), or Split(time="date", after="2026-01-01").'
            raise ConfigError(msg)
        if self.after is not None and self.time is None:
            msg = 'Split: after= goes with the column that has the time: Split(time="date", after=…).'
            raise ConfigError(msg)
        if self.by is not None and self.time is not None:
            msg = "Split: by= keeps groups together and time= divides them. Give one."
            raise ConfigError(msg)
        if self.seed is not None and type(self.seed) is not int:
            msg = f"Split: seed is a whole number, got {self.seed!r:.40}."
            raise ConfigError(msg)
        if isinstance(self.by, (list, tuple)) and self.by and all(isinstance(name, str) for name in self.by):
            object.__setattr__(self, "by", tuple(self.by))
        elif not isinstance(self.by, (str, type(None))) and not callable(self.by):
            msg = f"Split: by is a column, a list of columns or a function of a row, got {self.by!r:.60}."
            raise ConfigError(msg)
        if not isinstance(self.time, (str, type(None))):
            msg = f"Split: time is a column, got {self.time!r:.60}."
            raise ConfigError(msg)
        if self.after is not None and moment(self.after) is None:
            msg = f"Split: after is a date such as '2026-01-31', or a number, got {self.after!r:.60}."
            raise ConfigError(msg)
        if isinstance(self.after, dt.date):
            object.__setattr__(self, "after", self.after.isoformat())

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return f"Split({', '.join(f'{name}={value!r:.80}' for name, value in given.items() if value is not None)})"

    def to_plain(self) -> dict[str, Any]:
        """What was given, as JSON has it; `by` must be a column."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> Split:
        """One that was written so.

        Raises:
            ConfigError: It has other options, or they do not go together.
        """
        if strange := sorted(set(found) - {f.name for f in fields(cls)}):
            msg = f"Split has no option {shown(strange[0], 80)}. It has share, by, time, after and seed."
            raise ConfigError(msg)
        return cls(**found)

    @property
    def moves_with_data(self) -> bool:
        """Whether more examples change on which side others are: of the newest share, but of no hash."""
        return self.time is not None and self.share is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that it reads."""
        by = self.by if isinstance(self.by, tuple) else (self.by,)
        return tuple(name for name in (*by, self.time) if isinstance(name, str))


def position(key: str, seed: int) -> float:
    """Where a key stands between 0 and 1; it follows from key and seed alone.

    >>> round(position("patient 7", seed=0), 3)
    0.988
    """
    digest = hashlib.sha256(f"{seed}|{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def text_of(value: Any) -> str:
    """A key as text, one normal form whatever it was written or read as.

    Numbers are what they count (7, 7.0, "007", "7e0", and no more digits than a float has), dates and times what moment
    they are, in UTC where they name no zone, and texts are without spaces around them. Two keys that become one are on
    one side together, which harms nothing; one key that became two would be trained on and held out.

    >>> [text_of(v) for v in (7, 7.0, " 7", "007", True, "true", dt.date(2026, 1, 2), "2026-01-02T00:00")]
    ['7', '7', '7', '7', 'True', 'True', '2026-01-02', '2026-01-02']
    """
    value = _plain(value)
    if isinstance(value, (list, tuple)):
        return json.dumps([text_of(part) for part in value])
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (numbers.Real, Decimal)):
        return _text_of_number(value)
    if isinstance(value, dt.date):
        return _text_of_time(value)
    text = unicodedata.normalize("NFKC", str(value)).strip()
    if text.lower() in ("true", "false"):
        return text.capitalize()
    if _NUMBER.fullmatch(text):
        return _text_of_number(Decimal(text))
    with suppress(ValueError):
        return _text_of_time(dt.datetime.fromisoformat(text))
    return text


def _plain(value: Any) -> Any:
    """A value as Python has it where it is one of numpy's, torch's or pyarrow's."""
    if hasattr(value, "astype") and str(getattr(value, "dtype", "")).startswith("datetime64"):
        return value.astype("datetime64[us]").item()  # of nanoseconds .item() makes a number
    if hasattr(value, "tolist") and not isinstance(value, str):
        return value.tolist()  # of several numbers, which .item() refuses, a list
    if hasattr(value, "as_py"):
        return value.as_py()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _text_of_number(value: Any) -> str:
    """As a float, since a column with gaps has made one of a whole number; of 20260102 the day that it may be."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number) and not isinstance(value, float):
        return f"{Decimal(value):f}"
    text = str(int(number)) if number.is_integer() else repr(number)
    if len(text) == _DIGITS_OF_A_DAY and text.isdigit():
        with suppress(ValueError):
            return dt.date.fromisoformat(text).isoformat()
    return text


def _text_of_time(value: dt.date) -> str:
    if not isinstance(value, dt.datetime):
        return value.isoformat()
    # field by field, for pandas' own kind counts nanoseconds too
    time = dt.datetime.combine(value.date(), dt.time(value.hour, value.minute, value.second, value.microsecond))
    if (ahead := value.utcoffset()) is not None:
        with suppress(OverflowError):
            time -= ahead
    return time.date().isoformat() if time.time() == dt.time() else time.isoformat()


def moment(value: Any) -> tuple[str, float] | None:
    """("date" or "number", what it is ordered by): of a date seconds since 1970, in UTC where it names no zone.

    >>> moment("1970-01-02"), moment("7"), moment("01/02/1970")
    (('date', 86400.0), ('number', 7.0), None)
    """
    value = _plain(value)
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value.strip())
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if isinstance(value, dt.datetime):
        zoned = value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)
        return "date", (zoned - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).total_seconds()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return "number", float(value)
    return None
