"""Status: how a federation, an engine or a peer stands now, from another terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmchain_fed.cli.console import DONE, INCOMPLETE
from llmchain_fed.untrusted import one_line


def status(
    where: Annotated[
        list[Path] | None,
        typer.Argument(help="a federation's file, its `out`, a kit's folder, a peer's socket; by default this folder"),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False,
) -> None:
    """Says who is in, since when and last heard, which round it is, what is waited for, disk and certificates.

    Ends with 0 where all is fine, 3 where somebody is out or a process is gone, 2 where WHERE is nothing known.
    """
    from llmchain_fed.runtimes import overview

    reports = [overview.look(place) for place in where or [Path()]]
    code = INCOMPLETE if any(report.problems for report in reports) else DONE
    if as_json:
        found = [{"kind": r.kind, "where": r.where, "problems": r.problems, **r.data} for r in reports]
        typer.echo(json.dumps({"fine": code == DONE, "found": found}, indent=1))
    else:
        for report in reports:
            typer.echo(one_line(f"{report.kind} {report.where}"))
            for line in report.lines:
                typer.echo(one_line(f"  {line}"))
            for problem in report.problems:
                typer.echo(one_line(f"  ! {problem}"))
    raise typer.Exit(code)
