"""README and docs/: every Python block runs, and what the pages name is there.

Belongs here: blocks, commands, rooms, invariants, sizes and links of the pages. Does not: the operators' words
(test_operations_page), SECURITY.md's promises (security/test_security_page), what the commands do.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmchain_fed

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# not run here: "  # the first line of a block that needs a cluster, with the reason
NAMED = re.compile(r"`tests/([a-z_/]+\.py)::(\w+)`")


def blocks(page):
    """(line, code) of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1]) for m in BLOCK.finditer(text)]


def to_run(page):
    return [(line, code) for line, code in blocks(page) if not code.startswith(NOT_RUN)]


def run(page, folder):
    """Runs a page's blocks in order, in one namespace of a child process; what they print."""
    program = "import sys\n" + "".join(
        f"exec(compile({chr(10) * (line - 1) + code!r}, {str(page)!r}, 'exec'))\n" for line, code in to_run(page)
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", [p for p in PAGES if p != README and to_run(p)], ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, tmp_path):
    run(page, tmp_path)


@pytest.mark.real_model
def test_the_readmes_block_ends_with_the_right_answer(tmp_path):
    (_, code), *more = blocks(README)
    assert not more, "README has one snippet; others belong to docs/"
    taught = dict(re.findall(r'\("([^"]+)", "([^"]+)"\)', code))
    *_, last = code.strip().splitlines()
    asked = re.search(r'print\(.*invoke\(\{"text": "([^"]+)"\}\)\)', last)[1]
    printed = run(README, tmp_path).splitlines()
    assert printed[-1] == f"after: {taught[asked]}"
    untuned = printed[0].removeprefix("before: ")
    assert f"`{untuned}`" in README.read_text(encoding="utf-8"), "README shows the untuned answer as it is"


def test_few_blocks_are_not_run_and_each_says_why():
    left_out = {page.name: [c for _, c in blocks(page) if c.startswith(NOT_RUN)] for page in PAGES}
    assert {name: len(found) for name, found in left_out.items() if found} == {"runtimes.md": 2}
    for code in (code for found in left_out.values() for code in found):
        assert len(code.splitlines()[0]) > len(NOT_RUN) + 20
        ast.parse(code)


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 7_000


def test_every_page_is_in_the_navigation():
    named = re.findall(r"\b\w+\.md\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named) == [page.name for page in PAGES[1:]]


def test_every_command_a_page_names_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CONTRIBUTING.md"])
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"-m (examples[\w.]+)", text + makefile):
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file(), module


def test_every_measured_table_names_its_command():
    for name in ("results.md", "benchmarks.md"):
        _, *sections = re.split(r"^## ", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections:
            assert re.search(r"`make [a-z-]+", section), f"{name}: {section.splitlines()[0]}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_test_a_page_names_exists(page):
    for file, name in NAMED.findall(page.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, f"{file}::{name}"


def test_every_invariant_has_a_test():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Invariants")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    untested = [int(number) for number, _, shown in rows if not NAMED.search(shown)]
    assert untested == [14], "only what is not there yet has no test"


def test_every_room_stands_on_the_architecture_page():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "llmchain_fed"
    files = {f"llmchain_fed/{path.name}" for path in package.glob("*.py")}
    rooms = {f"{path.parent.relative_to(ROOT)}/" for path in package.rglob("__init__.py")} - {"llmchain_fed/"}
    assert set(re.findall(r"^\| `(llmchain_fed/[^`]*)`", page, re.MULTILINE)) == files | rooms


def test_the_drawn_arrows_are_the_imports():
    """Every import of one room by another is a drawn arrow or follows from some; none is drawn that is not there."""
    drawing = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    drawn = {tuple(arrow.split()) for arrow in re.findall(r'data-arrow="([^"]+)"', drawing)}
    for_all = set(re.search(r">([^<]+) \(every room may use these\)", drawing)[1].split(" · "))
    real = set()
    for path in (ROOT / "llmchain_fed").rglob("*.py"):
        room = path.relative_to(ROOT / "llmchain_fed").parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        for node in (n for n in [*tree.body, *inside] if isinstance(n, ast.ImportFrom) and n.module):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            real |= {(room, name.split(".")[1]) for name in names if name.startswith("llmchain_fed.")}
    places = {path.name.removesuffix(".py") for path in (ROOT / "llmchain_fed").iterdir()} - {"__init__"}
    real = {(a, b) for a, b in real if a != b and a in places and b in places - for_all}
    follow = set(drawn)
    while more := {(a, d) for a, b in follow for c, d in follow if b == c} - follow:
        follow |= more
    assert real - follow == set(), "imports that the drawing does not have"
    assert drawn - real == set(), "arrows that no import has"
    assert places - {"__pycache__", "py.typed", "_library"} <= for_all | {room for arrow in drawn for room in arrow}


def test_nothing_cites_a_page_outside_the_repository():
    folders = ("llmchain_fed", "tests", "examples", "docs", "deploy")
    paths = {p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml")}
    for path in paths - {Path(__file__).resolve()}:
        assert not re.search(r"\bDESIGN\b|house_review", path.read_text(encoding="utf-8")), path


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: llmchain_fed\.(\w+)", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.M)
    public = {name for name in llmchain_fed.__all__ if not name.endswith("Error")} - {"__version__"}
    assert set(shown) - {"errors", "data"} == public  # what is public of a room stands there by its room
