"""Divergence: says when held-out loss runs away instead of falling.

Knows records and measurements. Knows nothing about how rounds are run. What it says follows from the history alone, so
that a resumed run says, and does, what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.measures.pooling import MEASURED, witnesses
from llmchain_fed.federated.server.evaluation import Measurement

FACTOR = 1.5
"""times the best held-out loss so far: above that a round counts"""
ROUNDS = 2
"""so many in a row, and it is divergence"""
OnDivergence = Literal["warn", "stop"]
_REMEDY = "Lower the learning rate"


def checked_on_divergence(choice: str, *, measured: bool) -> bool:
    """Whether `fit` ends when it diverges.

    Raises:
        ConfigError: Neither of them; or it should stop by a loss that nobody measures.
    """
    if choice not in get_args(OnDivergence):
        msg = f"on_divergence is 'warn' (a note, and going on) or 'stop' (fit ends), got {choice!r:.80}."
        raise ConfigError(msg)
    if choice == "stop" and not measured:
        msg = "on_divergence='stop' needs evaluation=…, which says what held-out loss is measured on."
        raise ConfigError(msg)
    return choice == "stop"


def nothing_finite(records: Mapping[str, ParticipantRecord]) -> str | None:
    """What to say of a round of these that failed because nobody's training stayed finite; None for another reason."""
    reasons = [record.reason or "" for record in records.values()]
    # by their words: from another process an error arrives as the text of one
    if not reasons or not all("NonFiniteLossError" in reason or "not finite" in reason for reason in reasons):
        return None
    return f"diverged: nobody's training stayed finite, so there was no update to use. {_REMEDY}"


class _Series:
    """Held-out losses over the rounds: the best so far, and for how many in a row they have been far above it."""

    def __init__(self) -> None:
        self._best: dict[Hashable, tuple[float, int]] = {}
        self.above = 0
        """how many losses in a row were far above the best"""

    def add(
        self, over: Hashable, number: int, before: float | None, after: float | None, *, believed: bool = True
    ) -> str | None:
        """One round's losses, None or not finite where they were not measured; what to say where they diverge.

        Only losses `over` the same examples are compared; one far above the best counts where it is `believed`.
        """
        known = [self._best[over]] if over in self._best else []
        if before is not None and math.isfinite(before):
            known.append((before, number - 1))
        said = None
        if after is not None and math.isfinite(after):
            best, since = min(known, default=(math.inf, 0))
            self.above = self.above + 1 if after > FACTOR * best and believed else 0
            if self.above >= ROUNDS:
                when = f"after round {since}" if since else "before round 1"
                said = f"{after:.4g}, for {self.above} rounds in a row above {FACTOR} × the best ({best:.4g} {when})"
            known.append((after, number))
        if known:
            self._best[over] = min(known)
        return said


class Divergence:
    """Watches a federation's history.

    From three participants on that are measured, no single one makes a federation diverge: a pooled loss far above the
    best counts where those of two participants are far above their own best, and losses that are not finite where two
    participants say so. Of one alone its record says it.
    """

    def __init__(self) -> None:
        self._begin(None)

    def look(self, history: History, record: RoundRecord, after: Measurement | None) -> str | None:
        """Notes at a new round's participants whose loss diverges, and says so where that of all together does."""
        if after is None:
            return None
        shared = bool(after.shared)
        if self._history is not history or self._seen != len(history):  # restored, rolled back, or interrupted
            self._begin(history)
            for earlier in history:
                self._take(earlier, shared=shared)
        pooled, own = self._take(record, shared=shared)
        for name, said in own.items():
            record.participants[name].notes.append(f"its held-out loss {said}")
        if (whose := _not_finite(after)) is not None:
            return f"diverged: the held-out loss{whose} is not finite. {_REMEDY}"
        return f"diverged: held-out loss {pooled}. {_REMEDY}" if pooled else None

    def _begin(self, history: History | None) -> None:
        self._history, self._seen = history, 0
        self._pooled = _Series()
        self._own: dict[str, _Series] = {}
        self._members = 0  # since which round they are those of now, and have what they have now

    def _take(self, record: RoundRecord, *, shared: bool) -> tuple[str | None, dict[str, str]]:
        self._seen += 1
        if record.members_changed:
            self._members = record.round
        own = {}
        measured, above = [], []
        for name, found in record.participants.items():
            before, after = found.held_out_before, found.held_out_after
            if before is not None and after is not None:
                measured.append(name)
            series = self._own.setdefault(name, _Series())
            if (said := series.add(self._members, record.round, before, after)) is not None:
                own[name] = said
            if name in measured and series.above:
                above.append(name)
        # a participant that is away takes its examples with it: the others' loss alone is no progress and no setback
        over = "shared" if shared else (self._members, frozenset(measured))
        losses = (record.held_out_before, record.held_out_after)
        # what this process measured itself needs no witness, and neither does a history without single losses
        believed = shared or len(measured) < MEASURED or witnesses(measured, above)
        return self._pooled.add(over, record.round, *losses, believed=believed), own


def _not_finite(found: Measurement) -> str | None:
    """Whose held-out loss is not finite, in words; None where each is: a mean over the others would hide it."""
    if found.shared:
        return "" if _is_not_finite(found.shared) else None
    whose = [name for name, own in found.own.items() if _is_not_finite(own)]
    if not witnesses([name for name, own in found.own.items() if name in whose or "loss" in own], whose):
        return None
    shown = ", ".join(whose[:3]) + (f" and {len(whose) - 3} more" if len(whose) > 3 else "")
    return f" of {shown}" if whose else None


def _is_not_finite(found: Mapping[str, Any]) -> bool:
    """Whether a loss was measured and is NaN or infinite, which an answer may say in so many words."""
    loss = found.get("loss")
    return bool(found.get("not_finite")) or (loss is not None and not math.isfinite(loss))
