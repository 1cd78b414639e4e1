"""The engine's own command `nvflare`, called in a process of its own and within a time.

Knows how that command is called and what it says when it fails. Knows nothing of what it is asked to do.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError, MissingExtraError

_PATIENCE = 300.0  # seconds for one command of the engine
_ADVICE = ("Hint:", "Code:")  # lines of the engine that advise its own options, which no command here has


def run(*arguments: object, within: Path) -> None:
    """Runs `nvflare ARGUMENTS` with a scratch folder as its working directory and its home.

    Raises:
        ConfigError: It failed, or was not done in time.
        MissingExtraError: The extra `nvflare` is not installed.
    """
    if importlib.util.find_spec("nvflare") is None:
        msg = "the NVFlare runtime needs its engine: pip install 'llmchain-fed[nvflare]'"
        raise MissingExtraError(msg)
    what = " ".join(str(a) for a in arguments[: 2 if arguments[0] == "cert" else 1])
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter, no shell)
            [*program(), *map(str, arguments)],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False, umask=0o077,
            timeout=_PATIENCE, cwd=within,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        msg = f"the engine's own command ({what}) was not done within {_PATIENCE:g} s. Nothing was changed."
        raise ConfigError(msg) from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(_ADVICE)]
        said = untrusted.one_line(" ".join(" ".join(lines).split())[-600:]) or "it said nothing"
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        msg = f"the engine's own command ({what}) failed with {how}: {said.rstrip('.')}. Nothing was changed."
        raise ConfigError(msg)


def program() -> list[str]:
    """How the command is started; nothing is imported from the folder where it runs."""
    return [sys.executable, "-P", str(Path(__file__).with_name("backdating.py"))]
