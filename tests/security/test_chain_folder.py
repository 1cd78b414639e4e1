"""Saved chains and model folders that somebody else made: data, or one error that says what to do; never code.

Belongs here: what a folder's author could do. Does not: damage, which test_saving has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import chains
from taught import taught_model
from tiny import TEMPLATE

from llmchain_fed import LLMChain, LocalLLM, untrusted

HERE = Path(__file__).parent
MUTATIONS = 120
QUESTION = {"text": "page locked"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A saved chain with its base, and the same base as a model's folder."""
    folder = tmp_path_factory.mktemp("good")
    chain = LLMChain(llm=LocalLLM(model=taught_model("causal", lora=True), max_new_tokens=8), prompt=TEMPLATE)
    chain.save(folder / "chain")
    plain = taught_model("causal")
    plain.module.save_pretrained(folder / "model")
    plain.tokenizer.save_pretrained(folder / "model")
    return folder


def in_a_child(cases, tmp_path):
    """What became of each case, in a process of its own."""
    (tmp_path / "cases").write_text("\n".join(json.dumps(case) for case in cases))
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent)))
    ran = subprocess.run(
        [sys.executable, HERE / "loading_child.py", tmp_path / "cases"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == len(cases), f"after {cases[len(found)]}: {ran.stderr[-3000:]}"
    return found


def noted_beside(chain):
    chains.code(chain, "megatron.py", "notes.py")


@pytest.fixture(scope="module")
def outcomes(good, tmp_path_factory):
    """(kind, name) → what became of it; one process for all, since it takes seconds to start."""
    top = tmp_path_factory.mktemp("cases")
    tables = {
        "chain": (chains.CHAINS, "chain", ["chain"]),
        "model": (chains.MODELS, "model", ["model", "llm", "chat"]),
        "mutated": ({seed: chains.mutated(seed) for seed in range(MUTATIONS)}, "chain", ["chain"]),
        "good chain": ({"notes beside": noted_beside}, "chain", ["chain"]),
        "good model": ({"code beside": chains.ignored_beside}, "model", ["llm"]),
    }
    cases, keys = [], []
    for kind, (table, origin, calls) in tables.items():
        for number, name in enumerate(table):
            cwd = top / f"case{len(cases)}"
            folder = chains.build(table, name, good / origin, cwd)
            case = {"folder": folder.name, "call": calls[number % len(calls)], "cwd": str(cwd)}  # named as beside it
            ask = {"good chain": QUESTION, "good model": QUESTION["text"]}.get(kind)
            cases.append(case | {"marker": f"{top}/ran{len(cases)}", "ask": ask})
            keys.append((kind, name))
    return dict(zip(keys, in_a_child(cases, top), strict=True))


def check_refused(found, error):
    assert not found["ran"], "its code ran"
    assert not found["asked"]
    assert found["error"] == error, found["message"]
    message = found["message"]
    assert 40 < len(message) < 1500, message
    assert untrusted.printable(message) == message
    assert not [p for p in found["opened"] if p.endswith((".py", ".bin", ".pyc"))]


@pytest.mark.parametrize("name", chains.CHAINS)
def test_a_hostile_chain_is_refused_and_nothing_of_it_runs(outcomes, name):
    """By one error, without a question, a connection, a look at its code, or much time and memory."""
    check_refused(outcomes["chain", name], "ChainFileError")


@pytest.mark.parametrize("name", chains.MODELS)
def test_a_hostile_model_is_refused_and_nothing_of_it_runs(outcomes, name):
    check_refused(outcomes["model", name], "UnsupportedModelError")


def test_a_chain_changed_at_random_loads_or_is_refused_by_one_error(outcomes):
    """A changed value may be right as well; a text that cannot be shown is not."""
    failed, kinds = [], set()
    for seed in range(MUTATIONS):
        found = outcomes["mutated", seed]
        kinds.add(found["error"])
        message = found["message"]
        fine = found["error"] in (None, "ChainFileError") and len(message) < 1500
        if not fine or found["ran"] or found["asked"] or untrusted.printable(message) != message:
            failed.append(f"seed {seed}: {found['error']}: {message}")
    assert not failed, "\n".join(failed)
    assert kinds == {None, "ChainFileError"}


@pytest.mark.parametrize("key", [("good chain", "notes beside"), ("good model", "code beside")])
def test_good_folders_load_without_a_hub_and_read_their_own_files_alone(outcomes, good, key):
    """Code and pickles that lie beside are never opened."""
    found = outcomes[key]
    assert (found["error"], found["ran"], found["asked"]) == (None, False, []), found["message"]
    suffixes = {Path(p).suffix for p in found["opened"]}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".yaml", ".md", ""}, suffixes
    if key[0] == "good chain":
        assert found["answer"] == LLMChain.load(good / "chain").invoke(QUESTION)
