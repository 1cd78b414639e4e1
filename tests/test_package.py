"""The package as others meet it: its public names, its imports, its wheel, its error tree.

Belongs here: what is true of all modules together. Does not: what one of them does.
"""

import ast
import builtins
import importlib.metadata
import keyword
import os
import re
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import llmchain_fed
from llmchain_fed import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmchain_fed"

PUBLIC = [
    "Arm",
    "Callback",
    "ChainFileError",
    "ChatTemplateError",
    "CheckpointError",
    "Classification",
    "Collection",
    "Combined",
    "Comparison",
    "ConfigError",
    "ConsoleTable",
    "ContractError",
    "DataError",
    "DataReport",
    "DeadlineError",
    "DiLoCo",
    "DialogueError",
    "Ditto",
    "DuplicateParticipantError",
    "EmptyParticipantError",
    "ExampleFailedError",
    "Example",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "FederatedAveraging",
    "FederatedLearning",
    "FederationConfig",
    "FederationError",
    "History",
    "LLMChain",
    "LLMChainFedError",
    "LabelError",
    "LabelParser",
    "LocalChatModel",
    "LocalLLM",
    "LocalModel",
    "MLflow",
    "Metric",
    "MissingExtraError",
    "ModelError",
    "NVFlare",
    "NonFiniteLossError",
    "NotTrainableError",
    "NothingTrainedError",
    "Participant",
    "ParticipantError",
    "Policy",
    "PolicyError",
    "PromptTooLongError",
    "PromptVariablesError",
    "QuorumError",
    "RawText",
    "RecipeError",
    "Reptile",
    "Rule",
    "Runtime",
    "SchemaError",
    "Site",
    "Split",
    "Stop",
    "TemplatedTwiceError",
    "TensorBoard",
    "TorchDistributed",
    "TorchServerOptimizer",
    "Trackio",
    "TrainingConfig",
    "TrainingError",
    "TransportError",
    "UnsayableError",
    "UnsupportedModelError",
    "UpdateRefusedError",
    "UpdateTransform",
    "WeightsMismatchError",
    "__version__",
    "evaluate_locally",
    "list_chains",
    "list_prompts",
    "load_chain",
    "load_prompt",
    "register_task",
    "train_locally",
]

# docs/architecture.md: a room may import those to its left, never the reverse.
ROOMS = [
    *("errors", "untrusted", "_config", "stopping", "storage", "recipes", "model", "data", "training", "updates"),
    *("chain", "library", "federated", "tracking", "runtimes", "cli"),
]
LANGCHAIN = {"chain", "recipes"}


def modules():
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(path, *, whole=False):
    """(module, deferred) for each import, `whole` with the name; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((n if whole or node.module == "llmchain_fed" else node.module, node in inside) for n in names)


def own(module):
    """`llmchain_fed.updates.update.Update` → `federated`; None for others' modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "llmchain_fed" and len(parts) > 1 else None


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_public_names_are_pinned():
    assert llmchain_fed.__all__ == sorted(PUBLIC)
    assert len(set(llmchain_fed.__all__)) == len(llmchain_fed.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported(name):
    namespace = {}
    exec(f"from llmchain_fed import {name}", namespace)
    assert namespace[name] is getattr(llmchain_fed, name)
    assert name in dir(llmchain_fed)


def test_a_star_import_brings_the_public_names():
    namespace = {}
    exec("from llmchain_fed import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'FedAvg'"):
        llmchain_fed.FedAvg  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, llmchain_fed, llmchain_fed.errors; llmchain_fed.__version__; dir(llmchain_fed);"
        "heavy = ('torch', 'transformers', 'langchain_core', 'peft', 'pydantic', 'numpy');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- arrows ---------------------------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    tops = {name.split(".")[0] for name in modules()} - {"__init__"}
    assert tops == set(ROOMS)
    for name, path in modules().items():
        if name != "__init__" and path.read_text():
            assert ast.get_docstring(ast.parse(path.read_text())), f"{name} does not say what it knows"


def test_no_room_has_more_than_a_reader_can_keep_in_mind():
    counts = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > 15} == {}


def test_arrows_point_one_way():
    wrong = [
        f"{name} imports {module}"
        for name, path in modules().items()
        for module, _ in imports(path)
        if name != "__init__" and (other := own(module)) and ROOMS.index(other) > ROOMS.index(name.split(".")[0])
    ]
    assert wrong == []


def test_no_two_modules_need_each_other():
    """Also within a room: which module is imported first changes nothing."""
    names = {f"llmchain_fed.{name}".removesuffix(".__init__") for name in modules()}
    arrows = {
        f"llmchain_fed.{name}".removesuffix(".__init__"): {
            found
            for module, deferred in imports(path, whole=True)
            if not deferred and (found := module if module in names else module.rpartition(".")[0]) in names
        }
        for name, path in modules().items()
    }
    list(TopologicalSorter(arrows).static_order())  # raises CycleError


def test_only_the_faces_know_langchain():
    knowing = {
        name.partition(".")[0]
        for name, path in modules().items()
        for m, _ in imports(path)
        if m.startswith("langchain")
    }
    assert knowing == LANGCHAIN


def test_the_engine_room_runs_without_langchain():
    code = "import sys, llmchain_fed.training.loop; print([m for m in sys.modules if m.startswith('langchain')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_loop_never_asks_which_runtime_is_in_use():
    """What it does otherwise for one than for another follows from what a `Runtime` says of itself."""
    runtimes = {"InProcess", "TorchDistributed", "NVFlare"}
    wrong = []
    for name, path in modules().items():
        if name.partition(".")[0] != "federated":
            continue
        tree = ast.parse(path.read_text())
        made = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}  # one is made where nobody gave any
        wrong += [
            f"{name}:{n.lineno} {ast.unparse(n)}"
            for n in ast.walk(tree)
            if (isinstance(n, ast.Name) and n.id in runtimes and id(n) not in made)
            or (
                isinstance(n, ast.Call)
                and ast.unparse(n.func) in ("isinstance", "hasattr", "getattr", "type")
                and re.search(r"\b_?(transport|runtime)\b", ast.unparse(n.args[0]))
            )
        ]
    assert wrong == []


def test_optional_dependencies_are_imported_only_where_they_are_used():
    optional = {"gguf", "matplotlib", "pandas", "datasets", "sacrebleu", "polib", "nvflare", "bitsandbytes", "rich"}
    optional |= {
        "sklearn",
        "polars",
        "pyarrow",
        "psutil",
        "cryptography",
        "tensorboard",
        "mlflow",
        "alembic",
        "sqlalchemy",
        "trackio",
    }
    eager = {
        (name, module.split(".")[0])
        for name, path in modules().items()
        for module, deferred in imports(path)
        if module.split(".")[0] in optional and not deferred
    }
    # the bridge is imported by the engine's own processes alone, and cli says itself which extra brings typer
    assert eager == {("runtimes.nvflare.bridge", "nvflare"), ("runtimes.nvflare.controller", "nvflare")}


def test_a_class_is_found_by_its_name():
    """Two public classes of one name would be two answers to one guess."""
    homes = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_hold_is_said_of_held_out_data_alone():
    """One word, one meaning: what else is had, kept, locked or owned has a name that says so."""
    other = re.compile(r"(?i)h(old|eld)(?!s?_out)(?<!placehold)(?<!threshold)")
    for name, path in modules().items():
        with tokenize.open(path) as file:
            names = {t.string for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.NAME}
        assert not [n for n in names if other.search(n)], name


def documented(tree):
    """(what the docstring stands in, its text) of a module, its classes, functions and fields."""
    for node in ast.walk(tree):
        for statement in node.body if isinstance(getattr(node, "body", None), list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield node, value


FOREIGN = {"datasets", "Dataset", "np", "array", "control_flow", "enable_thinking", "optional_import", "with_config"}
FOREIGN |= {
    "get_scheduler",
    "with_fallbacks",
    "with_retry",
    "batchsize",
    "python",
    "logdir",
    "sync",
    "db",
    "ARGUMENTS",
    "xE2",
}


def has(classes, kind, member):
    """Whether a class of the package has a member, or a base of it; one of another package's may have anything."""
    if kind not in classes:
        return True
    bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in classes[kind].bases]
    own = re.search(rf"\b{member}\b", ast.unparse(classes[kind]).partition('"""')[2].partition('"""')[2])
    return bool(own) or any(has(classes, base, member) for base in bases)


def test_docstrings_name_what_there_is():
    """A name in backticks is one of the package's code, or of another's; a member is its class's own."""
    known, classes, named = set(dir(builtins)) | set(keyword.kwlist) | FOREIGN, {}, []
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        texts = {id(value): value.value for _, value in documented(tree)}
        found = [words for text in texts.values() for words in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
        named += [(name, re.sub(r'"[^"]*"', "", words)) for words in found]
        known |= set(name.split("."))
        with tokenize.open(path) as file:
            known |= {t.string for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.NAME}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                known |= set(re.findall(r"\w+", node.value))
            elif isinstance(node, ast.ClassDef):
                classes[node.name] = node
    pairs = re.compile(r"\b([A-Z]\w+)\.([a-z]\w*)")
    unknown = [(n, text) for n, text in named if set(re.findall(r"\b[A-Za-z_]\w*", text)) - known]
    unknown += [(n, text) for n, text in named if not all(has(classes, *pair) for pair in pairs.findall(text))]
    assert unknown == []


def test_docstrings_explain_parameters_that_there_are():
    """What stands under `Args` is a parameter; a module is titled by a name of its own, or by its file's."""
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    classes = {n.name: n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    wrong = []
    for name, tree in trees.items():
        title = re.match(r"(\w+): ", ast.get_docstring(tree) or "")
        top = {getattr(node, "name", "") for node in tree.body} | {name.rpartition(".")[2].replace("_", "")[:4]}
        if title and not {title[1], title[1].lower()[:4]} & (top | {"llmc"}):
            wrong.append((name, title[1]))
        for node, value in documented(tree):
            args = re.search(r"\n *Args:\n(.*?)(\n\s*\n|\Z)", value.value, re.DOTALL)
            inner = getattr(node, "col_offset", 0) + 8
            entries = re.findall(rf"^ {{{inner}}}\*{{0,2}}(\w+):", args[1], re.MULTILINE) if args else []
            if isinstance(node, ast.ClassDef):
                wrong += [(name, node.name, entry) for entry in entries if not has(classes, node.name, entry)]
            elif entries:
                wrong += [
                    (name, node.name, e)
                    for e in entries
                    if e not in {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
                ]
    assert wrong == []


def test_tests_have_the_folders_of_the_package():
    """Who looks for the tests of a room finds a folder of its name, and no test imports another one."""
    own = {"support", "security", "benchmarks", "examples"}
    for path in (ROOT / "tests").rglob("*.py"):
        folder, *deeper = path.relative_to(ROOT / "tests").parts[:-1] or ("",)
        assert folder in own or (ROOT / "llmchain_fed" / folder).joinpath(*deeper).is_dir(), path
        imported = {module for module, _ in imports(path)}
        assert folder == "security" or not [m for m in imported if m.startswith("test_")], path


def test_a_function_fits_a_screen():
    long = {
        f"{name}:{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - (node.body[1] if ast.get_docstring(node) and node.body[1:] else node).lineno > 60
    }
    assert long == set()


def test_a_module_fits_a_reader():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name for name, length in lengths.items() if length > 350} == set()


def test_no_module_is_pickled_or_evaluated():
    for name, path in modules().items():
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load"}, name
        assert not {m for m, _ in imports(path)} & {"pickle", "marshal", "shelve", "dill"}, name


# --- errors ---------------------------------------------------------------------------------------------------------


def test_the_drawn_error_tree_is_the_real_one():
    drawn, parents = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+(?:Error))\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            drawn[match[2]] = parents[depth - 1] if depth else "Exception"
    real = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert drawn == real
    assert len(real) > 15
    assert set(real) <= set(llmchain_fed.__all__)
    assert all(getattr(errors, name).__doc__ for name in real)


def test_every_error_is_raised_somewhere():
    source = "".join(path.read_text() for name, path in modules().items() if name not in ("errors", "__init__"))
    grouping = {"LLMChainFedError", "ModelError", "DataError", "TrainingError", "FederationError"}
    kinds = {n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, Exception)}
    assert {n for n in kinds - grouping if n not in source} == set()


# --- floors ---------------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
PINNED = dict(
    line.split("==") for line in (ROOT / "tests/floors.txt").read_text().splitlines() if not line.startswith("#")
)
UNSAFE_BELOW = {  # the release that closed a hole on a path of ours; pyproject.toml names the hole
    "langchain-core": "1.3.3",
    "torch": "2.10",
    "transformers": "5.10",
    "peft": "0.20",
    "tqdm": "4.66.3",
}


def floors():
    """name → the lowest version that pyproject.toml allows."""
    found = {}
    for requirement in REQUIRED:
        (floor,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        found[requirement.name] = floor
    return found


def test_the_floors_that_are_tested_are_those_of_pyproject():
    assert {name: Version(version) for name, version in PINNED.items()} == floors()


def test_no_floor_is_below_a_closed_hole():
    assert [name for name, version in UNSAFE_BELOW.items() if floors()[name] < Version(version)] == []


@pytest.mark.skipif("LLMCHAIN_FED_FLOORS" not in os.environ, reason="only where make test-floors runs")
def test_the_lowest_versions_are_the_installed_ones():
    installed = {name: Version(importlib.metadata.version(name)).public for name in PINNED}  # without torch's +cpu
    assert installed == {name: Version(version).public for name, version in PINNED.items()}


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built with the build backend itself: no isolated environment, no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_contains_the_package_and_its_recipes_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"llmchain_fed", "llmchain_fed-0.1.0.dist-info"}
    for kind in ("prompts", "chains"):
        recipes = {f"llmchain_fed/_library/{kind}/{p.name}" for p in (ROOT / kind).glob("*.yaml")}
        assert len(recipes) >= 6
        assert {n for n in names if n.startswith(f"llmchain_fed/_library/{kind}/")} == recipes
    code = {n for n in names if n.endswith(".py")}
    assert code == {f"llmchain_fed/{p.relative_to(PACKAGE).as_posix()}" for p in modules().values()}
    assert "llmchain_fed/py.typed" in names
    assert not [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".ipynb", ".safetensors", ".gguf"))]


def test_the_installed_wheel_finds_its_recipes(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import llmchain_fed; from llmchain_fed import *;"
        "assert llmchain_fed.__file__.startswith(sys.argv[1]), llmchain_fed.__file__;"
        "print(list_prompts() == list_chains(), load_prompt('translate').format(text='x', language='French')[:9])"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "Translate"]


def test_the_wheels_requirements_are_those_of_the_project(wheel):
    metadata = zipfile.ZipFile(wheel).read("llmchain_fed-0.1.0.dist-info/METADATA").decode()
    lines = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE)  # with a `;`: those of extras
    assert {(r.name, r.specifier) for r in map(Requirement, lines)} == {(r.name, r.specifier) for r in REQUIRED}
    assert "Requires-Python: >=3.11" in metadata
    assert importlib.metadata.version("llmchain-fed") == llmchain_fed.__version__ == "0.1.0"


def test_examples_can_be_read_encoded_and_collated_by_hand():
    from llmchain_fed import data

    assert set(data.__all__) == {"DataReport", "Example", "RawText", "collate", "encode_examples", "read_examples"}
    assert all(callable(getattr(data, name)) for name in data.__all__)
