"""A site's commands: its peer, its engine, its policy."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmchain_fed._config import read_options
from llmchain_fed.cli.chains import check, load
from llmchain_fed.cli.console import say, stoppable
from llmchain_fed.errors import ConfigError

if TYPE_CHECKING:
    from llmchain_fed.runtimes.site.policy import Policy

policies = typer.Typer(help="What a site lets a hub ask of it.", no_args_is_help=True)


def peer(
    chain: Annotated[str, typer.Option(help="a chain recipe's name, or a folder that chain.save wrote")],
    data: Annotated[Path, typer.Option(help="training examples: a CSV, TSV, JSON, JSONL or Parquet file")],
    socket: Annotated[Path, typer.Option(help="where to listen; the site's engine is told the same path")],
    name: Annotated[str | None, typer.Option(help="this site's name, as in its certificate; by default DATA's")] = None,
    held_out: Annotated[Path | None, typer.Option(help="examples to evaluate on, never trained on")] = None,
    hold_out_share: Annotated[float | None, typer.Option(help="or a share of the examples, such as 0.1")] = None,
    hold_out_by: Annotated[str | None, typer.Option(help="never across groups: the column of the group's key")] = None,
    hold_out_time: Annotated[str | None, typer.Option(help="or the newest, by this column of times")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COLUMN, where the table calls it otherwise: text=english, completion=french; repeat it"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="a LoRA rank of its own, for the rules flora and flexlora")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha that goes with it; the chain's by default")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: what may be asked; see docs/organisations.md")] = None,
    audit: Annotated[Path | None, typer.Option(help="a line per request; SOCKET.audit.jsonl by default")] = None,
    threads: Annotated[int | None, typer.Option(help="for torch; all cores by default")] = None,
) -> None:
    """Answers the hub for one participant until it is stopped: the model is loaded once and stays.

    Says on stderr what happens. Exit status: 2 it cannot begin, mend what the line says; 130, 143 stopped.
    """
    if hold_out_share is not None and (held_out is not None or not 0 < hold_out_share < 1):
        msg = f"--hold-out-share lies between 0 and 1 and goes without --held-out, got {hold_out_share}."
        raise ConfigError(msg)
    if hold_out_share is None and (hold_out_by is not None or hold_out_time is not None):
        msg = "--hold-out-by and --hold-out-time say how --hold-out-share divides the examples: give it, too."
        raise ConfigError(msg)
    columns = _columns(column or ())
    if threads is not None and threads < 1:
        msg = f"--threads is a count of at least 1, got {threads}."
        raise ConfigError(msg)
    log = audit or socket.with_name(socket.name + ".audit.jsonl")
    with stoppable(lambda: "stopping; start it again with the same command"):
        # what can be wrong is looked for first, the quick before the slow; then the model is loaded, and served
        _look_first(chain, data, held_out, policy, log, socket)

        from llmchain_fed.data.split import Split
        from llmchain_fed.federated.participant import Participant, hold_out
        from llmchain_fed.runtimes.site import warnings
        from llmchain_fed.runtimes.site.policy import Audit, Policy

        participant = Participant(name or data.stem, data, held_out, rank=rank, alpha=alpha, columns=columns)
        rules = Policy.from_file(policy) if policy is not None else Policy()
        written = Audit(log, say)
        open_to_others, may_leave = warnings.of_files(data, held_out, policy), warnings.of_policy(rules)
        for warning in (*warnings.of_name(participant.name), *open_to_others, *may_leave):
            say(f"warning: {warning}")

        import torch

        from llmchain_fed.federated.target import Target
        from llmchain_fed.runtimes.site.site import Site

        if threads is not None:
            torch.set_num_threads(threads)
        target = Target.of(load(chain))
        if hold_out_share is not None:
            split = Split(hold_out_share, by=hold_out_by, time=hold_out_time)
            participant = hold_out(participant, split, target.prompt, seed=0)
        site = Site(target, participant, policy=rules, audit=written, say=say)
        for warning in warnings.of_examples(data, held_out, site.client.data.overlap()):
            say(f"warning: {warning}")
        say(f"{participant.name}: {site.examples}")
        say("contract: " + ", ".join(f"{key} {value[:12]}" for key, value in target.contract().items()))
        say(f"policy: {_in_words(rules, policy)}")
        say(f"audit: {log}")
        say(f"listening at {socket}")
        site.serve(socket)


def _columns(given: Iterable[str]) -> dict[str, str] | None:
    """Variable, or "completion" → column of the table."""
    pairs = [text.partition("=") for text in given]
    if wrong := next((f"{a}{sign}{b}" for a, sign, b in pairs if not (a and sign and b)), None):
        msg = f"--column is NAME=COLUMN, such as completion=french, got {wrong!r:.80}."
        raise ConfigError(msg)
    return {name: column for name, _, column in pairs} or None


def _look_first(chain: str, data: Path, held_out: Path | None, policy: Path | None, audit: Path, socket: Path) -> None:
    """Makes sure that there is all a peer needs, before torch is imported, which takes seconds."""
    from llmchain_fed.runtimes.messaging import frames
    from llmchain_fed.runtimes.site import warnings

    warnings.check_apart({"--audit": audit, "--socket": socket}, {"--data": data, "--held-out": held_out})
    warnings.check_readable(data, "the training examples")
    if held_out is not None:
        warnings.check_readable(held_out, "the held-out examples")
    if policy is not None:
        read_options(policy, "policy")
    check(chain)
    frames.listen(socket).close()  # what would be wrong with it after the model is loaded is wrong now


def _in_words(rules: Policy, file: Path | None) -> str:
    """The options that differ from the default, and what says more."""
    options = repr(rules).removeprefix("Policy(").removesuffix(")")
    more = "llmchain-fed policy explain" + (f" {shlex.quote(str(file))}" if file is not None else "")
    return f"{options or 'the default'} (what it lets happen: {more})"


@policies.command("explain")
def policy_explain(
    file: Annotated[Path | None, typer.Argument(help="a site's policy; by default that of a peer without one")] = None,
) -> None:
    """At a site: says in sentences what a policy lets happen, and what it refuses."""
    from llmchain_fed.runtimes.site.policy import LIMITATIONS, Policy, explain

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
    from llmchain_fed.runtimes.nvflare.supervision.supervisor import Supervisor

    raise typer.Exit(Supervisor(kit, socket=socket, authority=authority, say=say).run())
