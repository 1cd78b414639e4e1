"""Certificates and kits, as commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Certificates and kits. Keys stay with their site.", no_args_is_help=True)


@app.command("start")
def start(
    folder: Annotated[Path, typer.Argument(help="the hub's folder for its certificate authority")],
    host: Annotated[str, typer.Option(help="the name by which sites reach the hub")],
    port: Annotated[int, typer.Option()] = 8002,
) -> None:
    """At the hub: makes the federation's certificate authority."""
    from llmchain_fed.runtimes.nvflare import kits

    trusted = kits.start_authority(folder, host=host, port=port)
    typer.echo(f"authority in {folder / 'ca'}. Tell every site this fingerprint by telephone, not by mail:\n{trusted}")


@app.command("request")
def request(
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


@app.command("approve")
def approve(
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


@app.command("package")
def package(
    signed: Annotated[Path, typer.Argument(help="what the hub sent back")],
    folder: Annotated[Path, typer.Argument(help="the folder of `provision request`")],
    fingerprint: Annotated[str, typer.Option(help="of the hub's authority, as told by telephone")],
) -> None:
    """At each site: puts key and certificate together to a kit that runs only this package's two bridge classes."""
    from llmchain_fed.runtimes.nvflare import kits

    typer.echo(f"kit: {kits.package(signed, folder, fingerprint)}")
