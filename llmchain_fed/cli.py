"""llmchain-fed: the commands of a federation across organisations.

    llmchain-fed provision …    certificates, by the engine's own provisioning; keys stay with their site
    llmchain-fed engine KIT     checks a kit and runs its engine in the foreground, at the hub and at every site
    llmchain-fed peer …         a site's long-lived process: loads the chain, reads the examples, answers the hub
    llmchain-fed policy …       says what a site's policy file lets happen
    llmchain-fed federate FILE  the hub's loop: rounds, history, the trained chain

Knows options and messages. What the commands do stands in the library: the same Python works in a notebook.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from llmchain_fed.errors import ConfigError, LLMChainFedError
from llmchain_fed.own_files import as_the_user_says, for_this_account_alone

try:
    import typer
except ImportError:  # pragma: no cover (the tests install the extra)
    sys.exit("the command llmchain-fed needs typer: pip install 'llmchain-fed[nvflare]'")

app = typer.Typer(help="Federations of LangChain chains across organisations.", no_args_is_help=True)
provision = typer.Typer(help="Certificates and kits. Keys stay with their site.", no_args_is_help=True)
app.add_typer(provision, name="provision")
policies = typer.Typer(help="What a site lets a hub ask of it.", no_args_is_help=True)
app.add_typer(policies, name="policy")


@app.callback()
def _begin(context: typer.Context) -> None:
    context.with_resource(for_this_account_alone())  # until the command has ended


@app.command()
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
    trainee = Trainee.of(_chain(chain))
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


@app.command()
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
        chain = _chain(found.chain)
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


@app.command()
def engine(
    kit: Annotated[Path, typer.Argument(help="the kit's folder")],
    socket: Annotated[Path | None, typer.Option(help="at a site: where its peer listens")] = None,
) -> None:
    """Checks a kit's certificate, port and hub, and runs its engine in the foreground."""
    from llmchain_fed.runtimes.nvflare import engine as engines

    kit = kit.absolute()
    engines.check(kit)
    command, variables = engines.command_of(kit, socket)
    os.chdir(kit)
    os.execve(command[0], command, os.environ | variables)  # noqa: S606 (this interpreter, no shell)


@provision.command("start")
def provision_start(
    folder: Annotated[Path, typer.Argument(help="the hub's folder for its certificate authority")],
    host: Annotated[str, typer.Option(help="the name by which sites reach the hub")],
    port: Annotated[int, typer.Option()] = 8002,
) -> None:
    """At the hub: makes the federation's certificate authority."""
    from llmchain_fed.runtimes.nvflare import kits

    trusted = kits.start_authority(folder, host=host, port=port)
    typer.echo(f"authority in {folder / 'ca'}. Tell every site this fingerprint by telephone, not by mail:\n{trusted}")


@provision.command("request")
def provision_request(
    name: Annotated[str, typer.Argument(help="a site's name; the hub's host name; or the administrator's name")],
    folder: Annotated[Path, typer.Argument(help="where the key is made and stays")],
    role: Annotated[str, typer.Option(help="site, hub or admin")] = "site",
) -> None:
    """At each site, and at the hub for itself and its administrator: makes a key, and a request without it."""
    from llmchain_fed.runtimes.nvflare import kits

    if role not in ("site", "hub", "admin"):
        msg = f"--role is site, hub or admin, got {role!r}."
        raise typer.BadParameter(msg)
    made = kits.request(name, role, folder)  # type: ignore[arg-type]  # checked above
    typer.echo(f"send this to the hub (it holds no key): {made}")


@provision.command("approve")
def provision_approve(
    request: Annotated[Path, typer.Argument(help="what a site sent")],
    authority: Annotated[Path, typer.Argument(help="the folder of `provision start`")],
    role: Annotated[str, typer.Option(help="as what it is signed: site, hub or admin")] = "site",
    again: Annotated[bool, typer.Option("--again", help="another key for a name that has a certificate")] = False,  # noqa: FBT002 (typer's)
) -> None:
    """At the hub: signs a request, if it asks for what it should."""
    from llmchain_fed.runtimes.nvflare import kits

    if role not in ("site", "hub", "admin"):
        msg = f"--role is site, hub or admin, got {role!r}."
        raise typer.BadParameter(msg)
    signed = kits.approve(request, authority, role, again=again)  # type: ignore[arg-type]  # checked above
    typer.echo(f"send this back: {signed}")


@provision.command("package")
def provision_package(
    signed: Annotated[Path, typer.Argument(help="what the hub sent back")],
    folder: Annotated[Path, typer.Argument(help="the folder of `provision request`")],
    fingerprint: Annotated[str, typer.Option(help="of the hub's authority, as told by telephone")],
) -> None:
    """At each site: puts key and certificate together to a kit that runs only this package's two bridge classes."""
    from llmchain_fed.runtimes.nvflare import kits

    typer.echo(f"kit: {kits.package(signed, folder, fingerprint)}")


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


def _chain(name: str) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from llmchain_fed.chain import LLMChain
    from llmchain_fed.library import load_chain

    disable_progress_bar()  # it writes to stderr, which is for errors: a peer's goes to a log
    return LLMChain.load(name) if Path(name).is_dir() else load_chain(name)


def main() -> None:
    """The console script: this package's errors are one line and exit status 2."""
    try:
        app()
    except LLMChainFedError as error:
        typer.echo(f"error: {type(error).__name__}: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
