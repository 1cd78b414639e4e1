"""A site's commands: its peer, its engine, its policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmchain_fed.cli.chains import load
from llmchain_fed.cli.console import say
from llmchain_fed.errors import ConfigError

policies = typer.Typer(help="What a site lets a hub ask of it.", no_args_is_help=True)


def peer(
    chain: Annotated[str, typer.Option(help="a chain recipe's name, or a folder that chain.save wrote")],
    data: Annotated[Path, typer.Option(help="training examples: JSONL or CSV")],
    socket: Annotated[Path, typer.Option(help="where to listen; the site's engine is told the same path")],
    name: Annotated[str | None, typer.Option(help="this site's name, as in its certificate; by default DATA's")] = None,
    held_out: Annotated[Path | None, typer.Option(help="examples to evaluate on, never trained on")] = None,
    hold_out_share: Annotated[float | None, typer.Option(help="or a share of the examples, such as 0.1")] = None,
    rank: Annotated[int | None, typer.Option(help="a LoRA rank of its own, for the rules flora and flexlora")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha that goes with it; the chain's by default")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: what may be asked; see the README")] = None,
    audit: Annotated[Path | None, typer.Option(help="a line per request; SOCKET.audit.jsonl by default")] = None,
    threads: Annotated[int | None, typer.Option(help="for torch; all cores by default")] = None,
) -> None:
    """Answers the hub for one participant until it is stopped: the model is loaded once and stays."""
    import torch

    from llmchain_fed.federated.participant import Participant, hold_out
    from llmchain_fed.federated.peer import LocalPeer
    from llmchain_fed.federated.trainee import Trainee
    from llmchain_fed.runtimes.policy import Audit, Policy
    from llmchain_fed.runtimes.site import Site

    name = name or data.stem
    if hold_out_share is not None and (held_out is not None or not 0 < hold_out_share < 1):
        msg = f"--hold-out-share lies between 0 and 1 and goes without --held-out, got {hold_out_share}."
        raise ConfigError(msg)
    rules = Policy.from_file(policy) if policy is not None else Policy()
    log = audit or socket.with_name(socket.name + ".audit.jsonl")
    written = Audit(log)
    if threads is not None:
        torch.set_num_threads(threads)
    trainee = Trainee.of(load(chain))
    participant = Participant(name, data, held_out, rank=rank, alpha=alpha)
    if hold_out_share is not None:
        participant = hold_out(participant, hold_out_share, trainee.prompt, seed=0)
    worker = LocalPeer(trainee, participant, None, samples=rules.samples)
    typer.echo(f"{name}: {worker.inspect()}")  # reads the examples now: a wrong path is not found out in round 1
    contract = ", ".join(f"{key} {value[:12]}" for key, value in trainee.contract().items())
    typer.echo(f"contract: {contract}\npolicy: {rules}\naudit: {log}\nlistening at {socket}")
    sys.stdout.flush()
    Site(worker, rules, written).serve(socket)


@policies.command("explain")
def policy_explain(
    file: Annotated[Path | None, typer.Argument(help="a site's policy; by default that of a peer without one")] = None,
) -> None:
    """At a site: says in sentences what a policy lets happen, and what it refuses."""
    from llmchain_fed.runtimes.explaining import LIMITATIONS, explain
    from llmchain_fed.runtimes.policy import Policy

    found = Policy.from_file(file) if file is not None else Policy()
    typer.echo("\n".join([*explain(found), "", *LIMITATIONS]))


def engine(
    kit: Annotated[Path, typer.Argument(help="the kit's folder")],
    socket: Annotated[Path | None, typer.Option(help="at a site: where its peer listens")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="at the hub: the authority's folder; its list then says who may come")
    ] = None,
) -> None:
    """Checks a kit's certificate, port and hub, and runs its engine until it is stopped; a line for each change."""
    from llmchain_fed.runtimes.nvflare.keeping.keeper import Keeper

    raise typer.Exit(Keeper(kit, socket=socket, authority=authority, say=say).run())
