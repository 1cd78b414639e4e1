"""Certificates and kits, as commands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmchain_fed.cli.console import say, stoppable
from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.runtimes.names import Role
    from llmchain_fed.runtimes.nvflare.provisioning.registry import Certificate
    from llmchain_fed.runtimes.nvflare.provisioning.sent import Asked


class _Commands(TyperGroup):
    """Each of them ends in order when it is told to stop: what it had begun is cleared away."""

    def invoke(self, ctx: Any) -> Any:
        with stoppable(lambda: "stopping; what was begun is cleared away, and the same command begins anew"):
            return super().invoke(ctx)


app = typer.Typer(help="Certificates and kits. Keys stay with their site.", no_args_is_help=True, cls=_Commands)
_Authority = Annotated[Path, typer.Argument(help="the folder of `provision start`")]
_NAMES = "a site's name (A-Z a-z 0-9 _ -); with --role the hub's host name, or an administrator's, as a mail address"


@app.command("start")
def start(
    folder: Annotated[Path, typer.Argument(help="the hub's folder for its certificate authority")],
    host: Annotated[str, typer.Option(help="the name by which sites reach the hub")],
    port: Annotated[int, typer.Option()] = 8002,
) -> None:
    """At the hub: makes the federation's certificate authority. Back that folder up, and keep it closed."""
    from llmchain_fed.runtimes.nvflare.provisioning import authority

    trusted = authority.start(folder, host=host, port=port)
    typer.echo(f"authority in {folder}. Tell every site this fingerprint by telephone, not by mail:\n{trusted}")


@app.command("request")
def request(
    name: Annotated[str, typer.Argument(help=_NAMES)],
    folder: Annotated[Path, typer.Argument(help="where the key is made and stays")],
    role: Annotated[str, typer.Option(help="site, hub or admin")] = "site",
    org: Annotated[
        str | None, typer.Option(help="the organisation, which the hub is shown: A-Z a-z 0-9 _; by default the name")
    ] = None,
) -> None:
    """At each site, and at the hub for itself and its administrator: makes a key, and a request without it."""
    from llmchain_fed.runtimes.nvflare.provisioning import own_kit

    wanted = _role(role)
    _say_request(own_kit.request(name, wanted, folder, organisation=org), wanted)


@app.command("approve")
def approve(
    request: Annotated[Path, typer.Argument(help="what a site sent")],
    authority: _Authority,
    role: Annotated[str, typer.Option(help="as what it is signed: site, hub or admin")] = "site",
    replace: Annotated[  # noqa: FBT002 (typer's)
        bool, typer.Option("--replace", help="the name has a certificate: revoke that one, and sign this key")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask: for scripts")] = False,  # noqa: FBT002 (typer's)
) -> None:
    """At the hub: shows who asks for what, and signs it once the fingerprint was compared by telephone."""
    from llmchain_fed.runtimes.nvflare.provisioning import authority as authorities

    def confirm(asked: Asked, owner: Certificate | None) -> bool:
        return _confirm(asked, owner, yes=yes)

    signed = authorities.approve(request, authority, _role(role), replace=replace, confirm=confirm)
    typer.echo(f"signed. Send this back (it contains no key): {signed}")
    for warning in authorities.warnings(authority):
        say(f"warning: {warning}")


@app.command("package")
def package(
    signed: Annotated[Path, typer.Argument(help="what the hub sent back")],
    folder: Annotated[Path, typer.Argument(help="the folder of `provision request`")],
    fingerprint: Annotated[str, typer.Option(help="of the hub's authority, as told by telephone")],
) -> None:
    """At each site: puts key and certificate together to a kit that runs only this package's two bridge classes."""
    from llmchain_fed.runtimes.nvflare.provisioning import own_kit

    renews = own_kit.is_renewing(folder)
    typer.echo(f"kit: {own_kit.package(signed, folder, fingerprint)}")
    if renews:
        typer.echo(
            "It has the new key; its place and its local/ are as before, the former key and startup/ are kept in "
            "former-…/. Stop its engine and start it again; the peer goes on."
        )


@app.command("renew")
def renew(
    folder: Annotated[Path, typer.Argument(help="the folder of `provision request`, or the kit in it")],
) -> None:
    """At each site: a new key and request under the same name, before a certificate's end or after a key's loss."""
    from llmchain_fed.runtimes.nvflare.provisioning import own_kit

    made, role = own_kit.renew(folder)
    _say_request(made, role, replaces=True)
    typer.echo(
        "Until `provision package` has put the answer in, the kit goes on with the former key; the hub's --replace\n"
        "ends that one: package the answer as soon as it comes. The kit keeps its place and its local/."
    )


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="whose certificate is taken back")],
    authority: _Authority,
    why: Annotated[str | None, typer.Option(help="is kept with it")] = None,
) -> None:
    """At the hub: takes a certificate back. The hub's engine, started with --authority, lets it in no more."""
    from llmchain_fed.runtimes.nvflare.provisioning import authority as authorities
    from llmchain_fed.runtimes.nvflare.provisioning.sent import by_telephone

    ended = authorities.revoke(name, authority, why=why)
    typer.echo(
        f"revoked: {ended.role} {ended.name} ({ended.organisation}), key {by_telephone(ended.public_key)}, approved at "
        f"{ended.approved}. It takes effect at the hub's engine that was started with --authority "
        f"{shlex.quote(str(authority))}."
    )


@app.command("names")
def names(authority: _Authority) -> None:
    """At the hub: lists every certificate that was signed, with its owner, its end, and whether it was revoked."""
    from llmchain_fed.runtimes.nvflare.provisioning import registry
    from llmchain_fed.runtimes.nvflare.provisioning.sent import by_telephone

    certificates = registry.read(authority).certificates
    if not certificates:
        typer.echo(f"no certificate was signed yet by the authority in {authority}.")
    for each in certificates:
        ended = f"{each.days_left:.0f} days left" if each.days_left > 0 else "ended"
        ended = f"revoked {each.revoked}" if each.revoked else ended
        why = f" ({each.why})" if each.why else ""
        typer.echo(
            f"{each.name}  {each.role}  {each.organisation}  {ended}{why}\n"
            f"    approved {each.approved} by {each.by}, valid until {each.until}\n"
            f"    key {by_telephone(each.public_key)}\n    certificate {each.certificate}"
        )


def _role(text: str) -> Role:
    roles: dict[str, Role] = {"site": "site", "hub": "hub", "admin": "admin"}
    if text not in roles:
        msg = f"--role is site, hub or admin, got {one_line(text, 80)!r}."
        raise ConfigError(msg)
    return roles[text]


def _say_request(made: Path, role: Role, *, replaces: bool = False) -> None:
    from llmchain_fed.runtimes.nvflare.provisioning.sent import by_telephone, read_request

    approve = f"llmchain-fed provision approve {made.name} AUTHORITY"
    approve += "" if role == "site" else f" --role {role}"
    approve += " --replace" if replaces else ""
    typer.echo(
        f"send this to the hub (it contains no key), where it is signed by `{approve}`: {made}\n"
        f"the hub is shown this fingerprint of your key; compare it by telephone:\n"
        f"{by_telephone(read_request(made, role).public_key)}"
    )


def _confirm(asked: Asked, owner: Certificate | None, *, yes: bool) -> bool:
    """Shows what is about to be signed; asks on a terminal."""
    from llmchain_fed.runtimes.nvflare.provisioning.sent import by_telephone

    typer.echo(f"{asked.role} {asked.name}, organisation {asked.organisation}, key\n{by_telephone(asked.public_key)}")
    if owner is not None:
        typer.echo(
            f"in place of {owner.name}, organisation {owner.organisation}, approved {owner.approved} by "
            f"{owner.by}, which is revoked by this; key\n{by_telephone(owner.public_key)}"
        )
    if yes:
        return True
    if not sys.stdin.isatty():
        msg = (
            "nobody can be asked here whether that is the fingerprint which the site reads out: standard input is no "
            "terminal. Say --yes once it was compared. Nothing was signed."
        )
        raise ConfigError(msg)
    try:
        return typer.confirm("Does the site read out the same on the telephone?")
    except typer.Abort:  # Ctrl-C or Ctrl-D
        return False
