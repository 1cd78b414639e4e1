"""The operator's pages name options that exist, and quote lines that the commands say.

Belongs here: docs/operations.md and the pages beside it, word by word. Does not: whether the commands do what the pages
say, which is tried with them (test_federate, test_provisioning, test_supervisor, test_status, test_peer_command).
"""

import ast
import re
from pathlib import Path

import pytest
import typer

from llmchain_fed.cli import __main__ as cli

ROOT = Path(__file__).parents[1]
PAGES = ["docs/operations.md", "examples/federation/README.md", "deploy/systemd/README.md"]
OTHERS = {"--system", "--home-dir", "--shell", "--now"}  # of useradd and systemctl
QUOTED = re.compile(r"`([^`]+)`")
# what is another each time it is said: the page's marks, the system's words, and how a line of attendance begins
PLACEHOLDER = re.compile(
    r"…|;|\bN\b|\bNAME(?: is out)?\b|No space left on device|refused: |\bpolicy\.\w+:|base weights: "
)


def commands(group, path=()):
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
OPTIONS = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}


def texts():
    """Every text that the package can say, a placeholder as a mark of its own."""
    found = []
    for path in sorted((ROOT / "llmchain_fed").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8")))
    assert named - OTHERS - OPTIONS == set()
    assert named & OPTIONS


def test_every_command_a_page_names_exists():
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"llmchain-fed (provision [a-z]+|policy [a-z]+|[a-z]+)\b", text))
    assert {tuple(name.split()) for name in named} <= set(COMMANDS)
    assert {("engine",), ("peer",), ("status",), ("federate",)} <= {tuple(name.split()) for name in named}


def test_every_symptom_is_a_line_that_is_said():
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.split("## By symptom")[1].splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    said = texts()
    wrong = []
    for row in rows:
        for quoted in QUOTED.findall(row):
            pieces = [piece.strip(" .;:(){}") for piece in PLACEHOLDER.split(quoted)]
            told = [piece for piece in pieces if len(piece) > 7]
            wrong += [(piece, quoted) for piece in told if piece not in said] if told else [("", quoted)]
    assert wrong == []
