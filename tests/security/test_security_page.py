"""SECURITY.md makes no promise without a test: every row of its table names tests, and they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([a-z_/]+\.py)::(\w+)`")


def names_of_tests(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def rows():
    """The cells of every row of the tables actor × asset."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_named_test_exists():
    named = NAMED.findall(PAGE)
    assert len(named) > 40
    assert [f"{file}::{name}" for file, name in named if name not in names_of_tests(file)] == []


def test_every_promise_names_a_test():
    promises = [row for row in rows() if len(row) == 5 and row[0] != "asset" and not set(row[0]) <= {"-"}]
    assert len(promises) > 20
    for asset, promised, mechanism, shown, _ in promises:
        assert asset
        assert (promised == "–") == (mechanism == "–") == (not NAMED.findall(shown)), (asset, promised)


def test_every_command_it_names_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", PAGE))
    assert len(named) > 2
    assert named <= targets


def test_the_page_contains_the_core():
    for sentence in (
        "Nothing that one participant sends raises out of `fit`, hangs it, or costs more than twice an honest update.",
        "Nothing that a hub sends makes a site do what its policy does not name.",
        "No file of somebody else runs code or asks a question.",
    ):
        assert sentence in PAGE
