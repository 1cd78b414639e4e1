"""The hub's loop as a command: it goes on where it was, says so, and ends with a status that a supervisor can go by."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llmchain_fed._config import read_options
from llmchain_fed.cli.chains import check, load
from llmchain_fed.cli.console import INCOMPLETE, error_line, say, stoppable
from llmchain_fed.errors import ContractError, PolicyError, QuorumError, TransportError
from llmchain_fed.federated.callbacks import Callback
from llmchain_fed.federated.reporting.lines import show
from llmchain_fed.federated.runtime import Runtime

_WAITS = re.compile(r"\b[Ww]aiting for |\bthe others wait ")  # of what a runtime says: the rest has happened


def federate(
    file: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    members: Annotated[
        str, typer.Option(help="changed: a checkpoint goes on with other sites, or sites' data, than it had")
    ] = "same",
) -> None:
    """Runs the rounds of a federation at the hub, and saves the trained chain and the history.

    Started again it goes on after the last whole round; a federation that is finished says so. Exit status: 0 all as
    asked; 2 it cannot be done as asked, mend what the line says; 3 a site was refused or missing throughout: the last
    line says whether the rounds are done all the same, or too few sites are left for them; 4 out of reach or too few,
    the same command may succeed later; 130, 143 stopped.
    """
    done: list[int] = []

    def said() -> str:  # what changed is in the checkpoint once a round is done
        options = f" --members {shlex.quote(members)}" if members != "same" and not done else ""
        return f"stopping; go on with `llmchain-fed federate {shlex.quote(str(file))}{options}`"

    with stoppable(said):
        _federate(file, members, done)


def _federate(file: Path, members: str, done: list[int]) -> None:
    read_options(file, "federation")  # a file that is not there is said before torch is imported
    from llmchain_fed.federated.checkpoint.membership import checked_members
    from llmchain_fed.runtimes.federation_file import FederationFile
    from llmchain_fed.runtimes.results import Results
    from llmchain_fed.tracking.status_file import StatusFile

    chosen = checked_members(members)
    found = FederationFile.read(file)
    assert found.checkpoint_dir is not None  # read() gives it a default
    results = Results(found.out, found.checkpoint_dir)
    with results.locked():
        if results.rounds >= found.rounds or results.ended_early(found):
            results.check_finished(found, members)
            _finish(found, results)
            return
        check(found.chain, file)
        results.check(start=found.chain)
        results.begin(found.chain)
        about: dict[str, Any] = {
            "federation": str(file),
            "quorum": found.quorum,
            "checkpoints": str(results.checkpoints),
        }
        with StatusFile(results.status, rounds=found.rounds, about=about) as status:
            _run(found, results, chosen, status, done)


def _finish(found: Any, results: Any) -> None:
    """Of a federation whose rounds are done: makes sure that its results are there. No site is asked."""
    if not results.is_whole(results.rounds) or not _is_kept(found, results):
        results.check(start=found.chain)
        chain = load(found.chain)
        fed = _begun(found, chain, _Away(found.hub.sites), results, "changed")
        if found.keep == "best" and fed.best is not None:
            fed.load_best()
        results.save(fed, chain)
    history = results.read_history()
    missing = _missing(history, found.hub.sites, {})
    _say_missing(missing)
    if len(history) < found.rounds:
        more = "To go on, take what ended it (`patience`, `on_divergence`) out of the file"
        say(f"done: {len(history)} of {found.rounds} rounds, {_endings(history)}; {_where(results)}. {more}.")
    else:
        say(f"done: all {found.rounds} rounds{_endings(history, ', ')}; {_where(results)}. For more, raise `rounds`.")
    if missing:
        raise typer.Exit(INCOMPLETE)


class _Saving(Callback):
    """Writes chain and history after each round, once its checkpoint is there."""

    def __init__(self, results: Any, chain: Any, done: list[int]) -> None:
        self.fed: Any = None
        self._results, self._chain, self._done = results, chain, done

    def on_round_end(self, record: Any, history: Any) -> None:  # noqa: ARG002 (the hook's arguments)
        """Written before the next round begins; not where the checkpoint could not be: it would be behind them."""
        if self._results.rounds < record.round:
            return
        self._results.save(self.fed, self._chain)
        self._done.append(record.round)


def _is_kept(found: Any, results: Any) -> bool:
    """Whether the chain that is there has the weights that the file wants: the last round's, or the best's."""
    if found.keep != "best":
        return True
    history = results.read_history()
    return history.best is None or history.best == (history.kept or len(history))


def _endings(history: Any, before: str = "") -> str:
    lines = history.endings()
    return before + "; ".join(lines) if lines else ""


def _run(found: Any, results: Any, members: str, status: Any, done: list[int]) -> None:
    from llmchain_fed.runtimes.nvflare.runtime import NVFlare

    hub = {key: getattr(found.hub, key) for key in ("socket", "patience", "recovery", "startup")}

    def told(text: str) -> None:
        say(text)
        status.note(text if _WAITS.search(text) else None)

    with NVFlare(found.hub.admin, sites=found.hub.sites, say=told, **hub) as runtime:
        runtime.check()
        chain = load(found.chain)
        saving = _Saving(results, chain, done)
        fed = saving.fed = _begun(found, chain, runtime, results, members, callbacks=[status, saving])
        say(f"going on after round {fed.round} of {found.rounds}" if fed.round else f"beginning: {found.rounds} rounds")
        default = "" if "quorum" in found.model_fields_set else ", the default; `quorum:` sets another"
        say(f"a round counts with {found.quorum} of {len(found.hub.sites)} sites (quorum{default})")
        if fed.round and not results.is_whole(fed.round):
            results.save(fed, chain)
        with _lasting_causes(fed, found.rounds, _where(results)):
            fed.fit(rounds=found.rounds - fed.round, of=found.rounds, **found.fit_options())
        if fed.history.endings():  # which the last round could not know
            results.save(fed, chain)
        show(f"{fed.history}")
        missing = _missing(fed.history, found.hub.sites, fed.attendance.never)
        _say_missing(missing)
        say(f"done: {fed.round} rounds; {_where(results)}")
    if missing:
        raise typer.Exit(INCOMPLETE)


def _say_missing(missing: Mapping[str, str]) -> None:
    for name, reason in missing.items():
        say(f"{name} has not taken part: {reason}")


def _begun(found: Any, chain: Any, runtime: Any, results: Any, members: Any, **more: Any) -> Any:
    """The federation, where its newest checkpoint has it."""
    from llmchain_fed.federated.averaging import FederatedAveraging

    options = found.options() | more
    if results.rounds:
        return FederatedAveraging.resume(results.checkpoints, chain, runtime=runtime, members=members, **options)
    return FederatedAveraging(chain, runtime=runtime, checkpoint_dir=results.checkpoints, **options)


def _where(results: Any) -> str:
    return f"chain and history in {results.out}, checkpoints in {results.checkpoints}"


@contextmanager
def _lasting_causes(fed: Any, rounds: int, where: str) -> Iterator[None]:
    """Too few sites because of what does not pass by itself is a status that no supervisor starts again after."""
    try:
        yield
    except QuorumError as error:
        out = [standing.error for standing in fed.attendance.standings.values() if standing.state == "out"]
        if not out or not all(map(_lasts, out)):
            raise
        error_line(error)
        say(f"not done: {fed.round} of {rounds} rounds" + (f"; {where}" if fed.round else ""))
        raise typer.Exit(INCOMPLETE) from error


def _lasts(error: Exception | None) -> bool:
    from llmchain_fed.federated.checkpoint.contents import OtherExamplesError

    return isinstance(error, (OtherExamplesError, ContractError, PolicyError))


def _missing(history: Any, sites: Iterable[str], never: Mapping[str, str]) -> dict[str, str]:
    """Who never took part, or was never able to train when it was asked, and the first reason."""
    trained = {name for record in history for name in record.trained}
    found = {}
    for name in sites:
        records = [r.participants[name] for r in history if name in r.participants]
        untrained = name not in trained and any(record.status != "idle" for record in records)
        if name in never or untrained:
            reasons = [record.reason for record in records if record.reason]
            found[name] = never.get(name) or (reasons[0] if reasons else "no reason is known")
    return found


class _Away(Runtime):
    """The sites of a federation that is finished: nobody is asked."""

    def __init__(self, sites: Iterable[str]) -> None:
        self._sites = list(sites)

    def nodes(self) -> list[str]:
        return list(self._sites)

    def call(self, op: str, nodes: Iterable[str], *_: Any) -> Iterator[tuple[str, Exception]]:
        yield from ((name, TransportError(f"{name!r} is not asked to {op}.")) for name in nodes)
