"""Plots: a history as a figure.

Knows matplotlib and records. Knows nothing of how rounds come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import MissingExtraError, install
from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmchain_fed.federated.history import History

_MOST = 6  # metrics that have axes


def plotted(history: History) -> Figure:
    """Training and held-out loss per participant over the rounds; beside them each metric, the pooled value dashed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError(f"plot needs matplotlib: {install('plot', 'matplotlib')}") from error  # noqa: EM102
    rounds = history.rounds
    keys = list(dict.fromkeys(key for r in rounds for key in r.metrics))[:_MOST]
    figure: Figure
    figure, found = plt.subplots(1, 2 + len(keys), figsize=(4.5 * (2 + len(keys)), 3.5), layout="constrained")
    plt.close(figure)  # a notebook shows what a cell returns; left open, it would show it twice
    left, right, *others = found
    unit = "nats per example" if rounds and rounds[-1].loss == "labels" else "nats per token"
    for name in dict.fromkeys(n for r in rounds for n in r.participants):
        own = [(r.round, r.participants[name]) for r in rounds if name in r.participants]
        _draw(left, name, [(n, p.train_loss) for n, p in own])
        before = [(own[0][0] - 1, own[0][1].held_out_before)]
        _draw(right, name, before + [(n, p.held_out_after) for n, p in own])
        for axes, key in zip(others, keys, strict=True):
            before = [(own[0][0] - 1, own[0][1].metrics_before.get(key))]
            _draw(axes, name, before + [(n, p.metrics.get(key)) for n, p in own])
    for axes, key in zip(others, keys, strict=True):
        before = [(rounds[0].round - 1, rounds[0].metrics_before.get(key))]
        pool = before + [(r.round, r.metrics.get(key)) for r in rounds]
        _draw(axes, "pooled", pool, marker="", linestyle="--", color="black")
    titles = [("training", unit), ("held out", unit), *((one_line(key, 80).replace("$", r"\$"), "") for key in keys)]
    for axes, (title, label) in zip(found, titles, strict=True):
        axes.set(title=title, xlabel="round", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    return figure


def _draw(axes: Any, name: str, points: list[tuple[int, float | None]], **how: Any) -> None:
    known = [(number, value) for number, value in points if value is not None]
    if known:  # a dollar would begin a formula
        label = one_line(name, 80).replace("$", r"\$")
        axes.plot(*zip(*known, strict=True), **{"marker": "o", **how}, label=label)
