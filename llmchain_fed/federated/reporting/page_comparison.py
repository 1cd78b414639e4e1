"""What a comparison of arms adds to a page: each participant's loss alone, and all arms in a table.

Knows the rows of a comparison by their fields. Knows nothing of how arms are run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.reporting.page_text import NONE, digits_of, finite, inline, number, table, who

_MOST = 8  # participants with a column


def losses_in(comparison: Any) -> list[Any]:
    """The rows of arms measured by loss; none where there is no comparison.

    Raises:
        ConfigError: It is none.
    """
    if comparison is None:
        return []
    rows = getattr(comparison, "rows", None)
    wanted = ("arm", "metric", "own", "participants")
    if not isinstance(rows, Sequence) or not all(hasattr(row, name) for row in rows for name in wanted):
        msg = f"comparison= is what fed.compare(…) gives, got {type(comparison).__name__}. Leave it out or compare."
        raise ConfigError(msg)
    return [row for row in rows if row.metric == "loss"]


def check_of(comparison: Any, names: Collection[str]) -> None:
    """Makes sure that a comparison is one of these participants.

    Raises:
        ConfigError: It has others, or is none.
    """
    strangers = sorted({name for row in losses_in(comparison) for name in row.participants} - set(names))
    if strangers:
        msg = (
            f"comparison= is of other participants than the history: it has {', '.join(strangers[:5])}. Leave it "
            "out, or compare this federation."
        )
        raise ConfigError(msg)


def other_rounds(comparison: Any, rounds: int) -> str:
    """A sentence where the comparison is of another number of rounds than the history; else nothing."""
    theirs = getattr(comparison, "rounds", None)
    if not losses_in(comparison) or theirs in (None, rounds):
        return ""
    return (
        f"<p>The comparison is of {theirs} round{'s' if theirs != 1 else ''}, this history of {rounds}: training "
        "alone, and all in the table below, is as after those of the comparison.</p>"
    )


def alone_in(comparison: Any) -> dict[str, tuple[float | None, float | None]]:
    """Participant → (loss of training alone, loss of the federation), as the comparison has them."""
    arms: dict[str, Mapping[str, float]] = {row.arm: row.participants for row in losses_in(comparison)}
    alone, together = arms.get("alone", {}), arms.get("federated", {})
    return {name: (finite(loss), finite(together.get(name))) for name, loss in alone.items()}


def arms_table(comparison: Any) -> str:
    """All arms that were measured by loss: each participant on its own texts, mean and deviation over the seeds."""
    rows = losses_in(comparison)
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.participants))[:_MOST]
    digits = digits_of([value for row in rows for value in (row.own, *row.participants.values())])

    def cell(mean: float | None, deviation: float | None) -> str:
        said = number(mean, digits)
        return said if said == NONE or finite(deviation) is None else f"{said} ± {number(deviation, digits)}"

    cells = []
    for row in rows:
        deviations = getattr(row, "participants_sd", None) or {}
        own = cell(row.own, getattr(row, "own_sd", None))
        cells.append(
            [inline(row.arm, 60), own, *(cell(row.participants.get(name), deviations.get(name)) for name in names)]
        )
    seeds = len(getattr(comparison, "seeds", ()))
    over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed" if seeds else ""
    inner = table(["arm", "all, mean", *map(who, names)], cells, what="arms")
    lead = f"<p>Held-out loss of each participant on its own texts{over}; lower is better.</p>"
    return f"<h3>Against training alone and other arms</h3>{lead}{inner}"
