"""llmchain-fed: the commands of a federation across organisations.

    llmchain-fed provision …    certificates, by the engine's own provisioning; keys stay with their site
    llmchain-fed engine KIT     checks a kit and runs its engine in the foreground, at the hub and at every site
    llmchain-fed peer …         a site's long-lived process: loads the chain, reads the examples, answers the hub
    llmchain-fed policy …       says what a site's policy file lets happen
    llmchain-fed federate FILE  the hub's loop: rounds, history, the trained chain
    llmchain-fed status WHERE   who is in, which round, what is waited for: from another terminal, while it runs

A module a group of commands; they know options and messages. What the commands do stands in the library: the same
Python works in a notebook.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import NoReturn

from llmchain_fed.errors import LLMChainFedError, install
from llmchain_fed.storage.own_files import for_this_account_alone

try:
    import typer
except ImportError:  # pragma: no cover (the tests install the extra)
    sys.exit(f"the command llmchain-fed needs typer: {install('nvflare', 'typer', 'nvflare', 'psutil')}")

from llmchain_fed.cli import federating, provisioning, site, status
from llmchain_fed.cli.console import DONE, FAILED, INTERRUPTED, TERMINATED, error_line, status_of

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}

app = typer.Typer(help="Federations of LangChain chains across organisations.", no_args_is_help=True)
app.add_typer(provisioning.app, name="provision")
app.add_typer(site.policies, name="policy")
app.command()(site.peer)
app.command()(site.engine)
app.command()(federating.federate)
app.command()(status.status)


@app.callback()
def _begin(context: typer.Context) -> None:
    context.with_resource(for_this_account_alone())  # until the command has ended


def main() -> None:
    """The console script: ends with the command's status, at once."""
    _leave(run())


def run() -> int:
    """Runs the command that `sys.argv` says; this package's errors, and the disk's, are one line and an exit status."""
    try:
        app()
    except LLMChainFedError as error:
        error_line(error)
        return status_of(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        error_line(error)
        return FAILED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE if end.code is None else 1
    return DONE


def _leave(status: int) -> NoReturn:
    """All is written by now. NVFlare's threads try to connect on for half a minute: they delay nobody."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe that nobody reads, a full disk: it has ended all the same
            stream.flush()
    if "nvflare" in sys.modules or status in (INTERRUPTED, TERMINATED):
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
