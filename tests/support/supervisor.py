"""A supervisor that does what a systemd unit file says of starting, and of starting again.

Belongs here: how ExecStart, EnvironmentFile and Restart are read. Does not: what is started.
"""

import re
import shlex
import signal
from pathlib import Path

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
PROGRAM = "/opt/llmchain-fed/bin/llmchain-fed"
_CLEAN = {-signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM, -signal.SIGPIPE}  # systemd.service(5), SuccessExitStatus=


class Unit:
    """A template under a name, with the variables of its configuration file."""

    def __init__(self, template: str, name: str, variables: dict[str, str]) -> None:
        self.options: dict[str, str] = {}
        for line in (UNITS / template).read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.options[key] = value.replace("%i", name)
        self.variables = variables

    @property
    def arguments(self) -> list[str]:
        """What follows the program in ExecStart: ${X} is one argument, $X as many as it has words."""
        found = []
        program, *words = shlex.split(self.options["ExecStart"])
        assert program == PROGRAM
        for word in words:
            if re.fullmatch(r"\$[A-Z_]+", word):
                found += shlex.split(self.variables.get(word[1:], ""))
            else:
                found.append(re.sub(r"\$\{([A-Z_]+)\}", lambda m: self.variables.get(m[1], ""), word))
        return found

    def starts_again(self, status: int) -> bool:
        """Whether it is started again after an exit status, negative for a signal."""
        numbers = lambda key: {int(n) for n in self.options.get(key, "").split()}  # noqa: E731
        assert self.options["Restart"] == "on-failure"
        if status in numbers("RestartPreventExitStatus"):
            return False
        return status not in {0} | _CLEAN | numbers("SuccessExitStatus")
