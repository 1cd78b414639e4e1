"""FederationConfig: every option stands once, and whoever takes options takes these, with these defaults.

Belongs here: the constructor, the file and the page against the config, and what the config shows. Does not: what an
option does (test_averaging), what goes together (test_compatibility), going on from a checkpoint (checkpoint/).
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import options_table
import pytest
import torch
from resumed_runs import Elsewhere

from llmchain_fed import ConfigError, Ditto, FedAdam, FederatedAveraging, FederatedLearning, Participant, TrainingConfig
from llmchain_fed.federated.checkpoint import files
from llmchain_fed.federated.options import FederationConfig, FederationOptions
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.updates.codecs.sparsification import TopK

ROOT = Path(__file__).parents[2]
PAIRS = [(f"w{i}", f"mot {i}") for i in range(8)]
SHARES = {"a": PAIRS[:5], "b": PAIRS[5:]}
BESIDE = {"llm", "lr", "batch_size", "runtime", "callbacks", "progress"}
FIELDS = FederationConfig.model_fields


class Halfway:
    def step(self, state, pseudo_gradient):
        return {name: state[name] + 0.5 * value for name, value in pseudo_gradient.items()}


def test_the_constructor_takes_the_configs_fields_and_shows_their_defaults():
    assert FederationOptions.__annotations__.keys() == FIELDS.keys() - {"optimizer"} | BESIDE
    shown = inspect.signature(FederatedAveraging).parameters
    assert shown.keys() == FIELDS.keys() | BESIDE | {"model", "participants", "checkpoint_dir"}
    assert {n: shown[n].default for n in FIELDS} == {n: field.default for n, field in FIELDS.items()}
    assert inspect.signature(FederatedAveraging.resume).parameters.keys() == shown.keys() | {"round", "members"}
    short = inspect.signature(FederatedLearning).parameters
    assert short.keys() == shown.keys() - {"participants"} | {"data_loader"}


def test_the_file_has_the_same_options_and_defaults():
    own = FederationFile.model_fields.keys() - FIELDS.keys()
    fit = inspect.signature(FederatedAveraging.fit).parameters
    of_fit = fit.keys() - {"self", "rounds", "of"}
    assert own == {"chain", "hub", "out", "rounds", "checkpoint_dir"} | of_fit
    assert {name: FederationFile.model_fields[name].default for name in of_fit} == {n: fit[n].default for n in of_fit}
    assert {n: FederationFile.model_fields[n].default for n in FIELDS} == {n: f.default for n, f in FIELDS.items()}


def test_a_config_goes_on_to_another_federation(make_chain):
    first = FederatedAveraging(make_chain(), participants={"a": PAIRS}, server_optimizer=FedAdam(lr=0.02), seed=3)
    given = {n: v for n, v in dict(first.config).items() if n not in ("optimizer", "runtime")}
    second = FederatedAveraging(make_chain(), participants={"a": PAIRS}, **given)
    assert second.config == first.config
    with pytest.raises(ConfigError, match=r"option `learning_rate`.*TrainingConfig\(learning_rate=…\)"):
        FederatedAveraging(make_chain(), participants={"a": PAIRS}, learning_rate=0.1)


def test_the_page_is_what_the_fields_say():
    assert options_table.PAGE.read_text(encoding="utf-8") == options_table.page(), options_table.__doc__


def test_a_type_checker_rejects_what_is_no_option(tmp_path):
    snippet = tmp_path / "snippet.py"
    lines = {
        'FederatedAveraging(object(), participants={"a": []}, lr=0.1, aggregation="fedit", quorum=2)': None,
        "FederatedAveraging(object(), quorm=2)": 'did you mean "quorum"',
        'FederatedAveraging(object(), quorum="2")': 'expected "int"',
        'FederatedAveraging.resume("run", object(), weighting="size")': "Literal['examples', 'tokens', 'equal']",
        'FederatedLearning(object(), [], codecs="int8")': 'Unexpected keyword argument "codecs"',
    }  # fmt: skip
    snippet.write_text("from llmchain_fed import FederatedAveraging, FederatedLearning\n" + "\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(snippet)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = [line for line in said.splitlines() if ": error: " in line]
    assert len(found) == len(lines) - 1, said
    for number, wanted in enumerate(lines.values(), start=2):
        assert wanted is None or any(f":{number}: " in line and wanted in line for line in found), (wanted, said)


def test_what_is_code_stands_by_name(make_chain, tmp_path):
    options = {"optimizer": torch.optim.Adagrad, "server_optimizer": Halfway(), "evaluation": {"a": PAIRS[:2]}}
    fed = FederatedAveraging(make_chain(), participants=SHARES, progress=False, codec=TopK(0.1), **options)
    assert fed.config.optimizer == "code: Adagrad (give it again on resume)"
    assert fed.config.server_optimizer == "code: Halfway (give it again on resume)"
    assert fed.config.codec == "topk:0.1"
    assert fed.config.evaluation.startswith("examples: ")
    assert "aggregation" not in repr(fed.config)
    assert fed._server.settings.training.optimizer is torch.optim.Adagrad
    # all of it is JSON, and reads as what it was
    assert FederationConfig(**json.loads(fed.config.model_dump_json())) == fed.config


def test_a_checkpoint_contains_it(make_chain, tmp_path):
    options = {"server_optimizer": FedAdam(lr=0.01), "personal": Ditto(lam=0.2), "quorum": 2, "lr": 1e-3}
    chain = make_chain(lora=True)
    fed = FederatedAveraging(chain, participants=SHARES, progress=False, checkpoint_dir=tmp_path, **options)
    fed.fit(1)
    stored = files.about(tmp_path)["config"]
    assert stored.keys() == FIELDS.keys()
    assert FederationConfig(**stored) == fed.config
    assert fed.config.training == TrainingConfig(learning_rate=1e-3, seed=0)


def test_who_decides_the_future_does_so_unless_it_is_said_otherwise():
    may_differ = {"quorum", "deadline", "retries", "evaluation", "samples", "keep_checkpoints"}
    may_differ |= {"answer_tokens", "metrics", "labels"}  # what is measured
    may_differ |= {"columns"}  # what somebody's table calls it
    assert FederationConfig().decisive().keys() == FIELDS.keys() - may_differ


@pytest.mark.parametrize(("given", "here", "elsewhere"), [(None, 1, 0), (2, 2, 2), (0, 0, 0)])
def test_samples_are_one_here_and_none_elsewhere(given, here, elsewhere, make_chain):
    fed = FederatedAveraging(
        make_chain(), participants=SHARES, evaluation={"a": PAIRS[:3]}, samples=given, progress=False
    )
    assert len(fed.fit(1)[0].samples) == here
    away = FederatedAveraging(make_chain(), runtime=Elsewhere(fed._peers), samples=given, progress=False)
    assert away._server.evaluator._samples == elsewhere


@pytest.mark.parametrize("single", [np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(single, make_chain):
    options = {
        "evaluation": 0.25, "deadline": 60.0, "participants_per_round": 0.5, "lr": 0.125, "quorum": 1, "retries": 2,
        "samples": 0, "seed": 5, "batch_size": 4, "keep_checkpoints": 2, "max_weight_share": 0.5,
    }  # fmt: skip
    theirs = {n: single(v) if isinstance(v, float) else np.int64(v) for n, v in options.items()}
    made = [FederatedAveraging(make_chain(), participants=SHARES, progress=False, **o) for o in (options, theirs)]
    assert made[0].config == made[1].config
    assert json.loads(made[1].config.model_dump_json()) == json.loads(made[0].config.model_dump_json())
    made[0].fit(1, patience=2, min_delta=0.5)
    made[1].fit(np.int64(1), patience=np.int32(2), min_delta=single(0.5))
    assert made[0].history[0].held_out_after == made[1].history[0].held_out_after
    assert made[1].plan(np.int64(1)).rounds == 1
    assert TrainingConfig(max_steps=np.int32(3)).max_steps == 3
    ours, theirs = (Participant("a", PAIRS, rank=r, alpha=a) for r, a in ((2, 4.0), (np.int64(2), single(4.0))))
    assert (theirs.rank, theirs.alpha, type(theirs.rank), type(theirs.alpha)) == (ours.rank, ours.alpha, int, float)


@pytest.mark.parametrize("wrong", [{"quorum": np.float64(1.5)}, {"evaluation": np.float64(1.5)}, {"seed": np.True_}])
def test_numbers_of_numpy_have_the_same_ranges(wrong, make_chain):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FederatedAveraging(make_chain(), participants=SHARES, progress=False, **wrong)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"training": TrainingConfig(optimizer=torch.optim.SGD)}, "cannot be written down"),
        ({"deadline": float("inf")}, "`deadline"),
        ({"deadline": 0}, "`deadline.*greater than 0"),
        ({"retries": -1}, "`retries`: .*greater than or equal to 0"),
        ({"keep_checkpoints": 0}, "`keep_checkpoints`"),
        ({"seed": 2**63}, "`seed`: .*less than"),
        ({"evaluation": "code"}, "between 0 and 1"),
        ({"participants_per_round": float("nan")}, r"a share in \(0, 1\]"),
        ({"rule": "fedavg"}, "unknown option `rule`"),
    ],
)
def test_one_that_is_out_of_its_range_is_named(options, reason):
    with pytest.raises(ConfigError, match=reason):
        FederationConfig(**options)
