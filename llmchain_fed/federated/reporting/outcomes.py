"""Outcome: whether a federation helped a participant, by its own held-out loss, in numbers and in a sentence.

Knows records and what counts as better. Knows nothing of pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmchain_fed.federated.reporting.page_comparison import alone_in
from llmchain_fed.federated.reporting.page_text import finite, number

if TYPE_CHECKING:
    from llmchain_fed.federated.history import History, RoundRecord

MARGIN = 0.01
"""the share of the loss before by which it must change to count as better or worse"""
FEW = 20
"""held-out examples below which a loss says little"""
Verdict = Literal["better", "same", "worse", "unknown"]
WORDS: Mapping[Verdict, str] = {
    "better": "▼ better",
    "same": "about the same",
    "worse": "▲ worse",
    "unknown": "not measured",
}


@dataclass(frozen=True)
class Outcome:
    """One participant's held-out loss before and after; of all together where it has no name."""

    name: str | None
    before: float | None
    after: float | None
    since: int = 1
    """the round before which `before` was measured"""
    until: int = 1
    """the round after which `after` was"""
    best: tuple[float, int] | None = None
    """the lowest loss, and the round after which it was measured"""
    examples: int | None = None
    """that it is measured on"""
    alone: float | None = None
    """of training alone, where a comparison knows it"""
    together: float | None = None
    """of the federation, in that comparison"""

    @property
    def verdict(self) -> Verdict:
        """After against before."""
        return verdict(self.before, self.after)

    @property
    def against_alone(self) -> Verdict:
        """The federation against training alone."""
        return verdict(self.alone, self.together if self.together is not None else self.after)

    def sentence(self, unit: str, digits: int) -> str:
        """What a participant should know, in words."""
        said = [self._change(unit, digits), *self._alone(digits), *self._remarks(digits)]
        return " ".join(said)

    def _change(self, unit: str, digits: int) -> str:
        before, after = self.before, self.after
        whose = "all" if self.name is None else "its own"
        if before is None or after is None:
            return f"Its loss on {whose} held-out texts is not known both before and after: nothing can be said."
        by, share = number(abs(before - after), digits), _share(before, after)
        rounds = f"round {self.until}" if self.since == self.until else f"rounds {self.since} to {self.until}"
        if self.verdict == "same":
            return f"No clear change over {rounds}: {by} {unit}{share}."
        way = "Better" if self.verdict == "better" else "Worse"
        return f"{way} by {by} {unit}{share} on {whose} held-out texts, over {rounds}."

    def _alone(self, digits: int) -> list[str]:
        ours = self.together if self.together is not None else self.after
        if self.alone is None or ours is None:
            return []
        by = number(abs(self.alone - ours), digits)
        said = {
            "better": f"Better than training alone by {by}",
            "worse": f"Training alone was better by {by}",
        }.get(self.against_alone, "About the same as training alone")
        figures = f"{number(ours, digits)} against {number(self.alone, digits)}"
        return [f"{said} ({figures}{' in the comparison' if self.together is not None else ''})."]

    def _remarks(self, digits: int) -> list[str]:
        said = []
        if self.best is not None and self.after is not None and verdict(self.best[0], self.after) == "worse":
            loss, found = self.best
            when = f"after round {found}" if found >= self.since else "before training"
            said.append(f"It was lowest {when}, {number(loss, digits)}, and has risen since.")
        if self.examples is not None and self.examples < FEW:
            said.append(f"Measured on {self.examples} example{'' if self.examples == 1 else 's'} only: it may be luck.")
        return said


def verdict(before: float | None, after: float | None) -> Verdict:
    """Lower losses are better, by more than `MARGIN` of what was before.

    >>> verdict(2.0, 1.5), verdict(2.0, 1.99), verdict(2.0, 2.1), verdict(None, 1.0)
    ('better', 'same', 'worse', 'unknown')
    """
    if before is None or after is None:
        return "unknown"
    room = MARGIN * abs(before)
    return "better" if after < before - room else "worse" if after > before + room else "same"


def _share(before: float, after: float) -> str:
    return f" ({100 * abs(before - after) / before:.0f}\u00a0%)" if before > 0 else ""


def settled(history: History) -> list[RoundRecord]:
    """The rounds whose weights the chain was left with: all, or up to the one that `fit(keep="best")` went back to."""
    kept = getattr(history, "kept", None)
    return [record for record in history.rounds if kept is None or record.round <= kept] or history.rounds


def outcomes(history: History, examples: Mapping[str, int], comparison: Any = None) -> list[Outcome]:
    """All together, if that was measured, and then every participant, in the order of the records."""
    found = alone_in(comparison)
    names = list(dict.fromkeys(name for record in history for name in record.participants))
    own = [
        _outcome(name, _losses(settled(history), name), examples.get(name), found.get(name, (None, None)))
        for name in names
    ]
    whole = _outcome(None, _losses(settled(history), None), None, (None, None))
    return ([whole] if whole.verdict != "unknown" else []) + own


def _losses(rounds: Sequence[RoundRecord], name: str | None) -> list[tuple[int, float | None, float | None]]:
    """(round, held-out loss before, after), since members last changed: before, others were measured on others."""
    begin = max((n for n, record in enumerate(rounds) if record.members_changed), default=0)
    found = [(r.round, r if name is None else r.participants.get(name)) for r in rounds[begin:]]
    return [(n, finite(p.held_out_before), finite(p.held_out_after)) for n, p in found if p is not None]


def _outcome(
    name: str | None,
    losses: Sequence[tuple[int, float | None, float | None]],
    examples: int | None,
    comparison: tuple[float | None, float | None],
) -> Outcome:
    before, since = next(((old, n) for n, old, _ in losses if old is not None), (None, 1))
    after, until = next(((new, n) for n, _, new in reversed(losses) if new is not None), (None, since))
    steps = [(new, n) for n, _, new in losses if new is not None] + ([(before, since - 1)] if before else [])
    best = min(steps, default=None)
    return Outcome(name, before, after, since, until, best, examples, *comparison)
