"""The engine's own command `nvflare`, whose certificates begin an hour before they are signed. A program, not a module.

Knows the one function of the engine that writes a certificate's dates. Knows nothing of this package, so that it runs
by its path, wherever the package was imported from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

BACKDATED = timedelta(hours=1)
"""a site's clock may be so far behind the hub's: else a certificate would begin in its future"""


def earlier(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's function that signs a certificate, with an earlier beginning and the end that was asked for."""

    def generate_cert(*arguments: Any, not_valid_before: datetime | None = None, **options: Any) -> Any:
        return generate(*arguments, not_valid_before=(not_valid_before or datetime.now(UTC)) - BACKDATED, **options)

    return generate_cert


def main() -> None:
    """Runs the command of this process's arguments: the engine has no option for a beginning (NVFlare 2.9.0)."""
    from nvflare import cli
    from nvflare.lighter.impl import cert
    from nvflare.tool.cert import cert_commands

    for module in (cert, cert_commands):
        module.generate_cert = earlier(module.generate_cert)
    os.environ["HOME"] = os.getcwd()  # the engine keeps notes in its user's home, of paths that soon are others
    sys.argv[0] = "nvflare"
    cli.main()


if __name__ == "__main__":
    main()
