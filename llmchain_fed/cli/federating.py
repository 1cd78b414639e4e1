"""The hub's loop as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmchain_fed.cli.chains import load
from llmchain_fed.errors import ConfigError
from llmchain_fed.own_files import as_the_user_says


def federate(
    file: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    members: Annotated[
        str, typer.Option(help="changed: a checkpoint goes on with other sites, or sites' data, than it had")
    ] = "same",
) -> None:
    """Runs the rounds of a federation at the hub, and saves the trained chain and the history."""
    from llmchain_fed.federated.averaging import FederatedAveraging
    from llmchain_fed.federated.checkpoint import rounds
    from llmchain_fed.federated.membership import checked_members
    from llmchain_fed.runtimes.federation_file import FederationFile
    from llmchain_fed.runtimes.nvflare.transport import NVFlare

    chosen = checked_members(members)
    found = FederationFile.read(file)
    hub = {key: getattr(found.hub, key) for key in ("socket", "patience", "recovery", "startup")}
    with NVFlare(found.hub.admin, sites=found.hub.sites, **hub) as runtime:
        chain = load(found.chain)
        options = found.loop_options()
        if found.checkpoint_dir is not None and rounds(found.checkpoint_dir):
            fed = FederatedAveraging.resume(found.checkpoint_dir, chain, runtime=runtime, members=chosen, **options)
            typer.echo(f"going on after round {fed.round}")
        else:
            fed = FederatedAveraging(chain, runtime=runtime, checkpoint_dir=found.checkpoint_dir, **options)
        _save(fed, chain, found.out)  # now rather than after hours: a folder that holds something else is refused
        while fed.round < found.rounds:
            fed.fit(rounds=1)
            _save(fed, chain, found.out)
        typer.echo(f"{fed.history}\n{fed.round} rounds, chain and history in {found.out}")


def _save(fed: Any, chain: Any, out: Path) -> None:
    """The chain for whom the user lets read it; the history, which can quote held-out examples, for nobody else."""
    try:
        with as_the_user_says():
            out.mkdir(parents=True, exist_ok=True)
            chain.save(out / "chain")
        history = out / "history.json"
        if history.exists():
            history.chmod(0o600)  # of a run that was begun by an earlier version
        fed.history.save(history)
    except OSError as error:
        msg = f"out: {out} cannot be written: {error}."
        raise ConfigError(msg) from error
