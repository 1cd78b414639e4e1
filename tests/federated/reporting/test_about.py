"""What a history knows beside its rounds: filled by a federation, saved, read back, and free of examples' text."""

import json
from datetime import datetime
from importlib.metadata import version

import pytest
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, History, TrainingConfig

SHARES = {"a": PAIRS[:6], "b": [*PAIRS[6:], ("", "empty"), PAIRS[6]]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def federation(chain, **options):
    training = TrainingConfig(learning_rate=0.1, batch_size=4, optimizer="sgd")
    return FederatedAveraging(chain, participants=SHARES, training=training, evaluation=0.34, progress=False, **options)


def test_a_fit_notes_model_options_versions_dates_and_counts(make_chain, tmp_path):
    chain = make_chain(lora=True)
    fed = federation(chain, codec="int8", aggregation="ffa")
    about = fed.fit(rounds=1).about
    parameters = list(chain.model.module.parameters())
    assert about["model"] == {
        "name": "tiny",
        "kind": "causal",
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "tensors": sum(p.requires_grad for p in parameters),
        "adapter": "LoRA, rank 4, alpha 8",
        "fingerprint": chain.model.fingerprint(),
        "device": "cpu",
    }
    assert about["versions"]["torch"] == version("torch")
    assert about["versions"]["llmchain-fed"] == version("llmchain-fed")
    assert about["options"]["codec"] == "int8"
    assert about["options"]["training.batch_size"] == 4
    assert (about["shares"], about["simulated"]) == ("B", True)
    assert about["data"]["b"]["empty"] == 1
    assert about["data"]["b"]["duplicate"] == fed.data_reports["b"].duplicate
    assert all(about["data"][n]["used"] == fed.data_reports[n].used for n in SHARES)
    assert about["data"]["a"]["held_out"] == 6 - about["data"]["a"]["used"]
    began, ended = (datetime.fromisoformat(about[key]) for key in ("began", "ended"))
    assert began <= ended
    assert began.utcoffset() is not None
    again = fed.fit(rounds=1).about
    assert again["began"] == about["began"], "a later fit is of the same federation"
    path = fed.history.report(tmp_path / "report.html")
    assert "LoRA, rank 4, alpha 8" in path.read_text(encoding="utf-8")


def test_it_is_saved_with_the_history_and_its_checkpoint_and_read_back(make_chain, tmp_path):
    chain = make_chain(lora=True)
    fed = federation(chain, checkpoint_dir=tmp_path / "run")
    fed.fit(rounds=1)
    fed.history.save(tmp_path / "history.json")
    read = History.from_dict(json.loads((tmp_path / "history.json").read_text(encoding="utf-8")))
    assert read.about == fed.history.about
    back = FederatedAveraging.resume(tmp_path / "run", make_chain(lora=True), participants=SHARES, progress=False)
    assert back.history.about == fed.history.about
    back.fit(rounds=1)
    assert back.history.about["began"] == fed.history.about["began"]


def test_no_text_of_an_example_is_in_it(make_chain):
    """Labels are completions: how many there are is said, not which."""
    rows = {
        "a": [("red apple", "fruit"), ("green pea", "vegetable")] * 2,
        "b": [("pear tree", "fruit"), ("leek soup", "vegetable")] * 2,
    }
    training = TrainingConfig(
        learning_rate=0.1, batch_size=4, optimizer="sgd", loss="labels", labels=("fruit", "vegetable"),
        class_weight={"fruit": 1.0, "vegetable": 2.0},
    )  # fmt: skip
    fed = FederatedAveraging(make_chain(), participants=rows, training=training, progress=False)
    said = json.dumps(fed.fit(rounds=1).about)
    for text in ("fruit", "vegetable", "apple", "leek", "Translate"):
        assert text not in said, text
    assert fed.history.about["options"]["training.labels"] == "2 labels"


def test_rounds_by_hand_are_noted_too(make_chain):
    fed = FederatedAveraging(make_chain(), lr=0.1, batch_size=4, progress=False)
    fed.train(SHARES["a"], 0)
    fed.step()
    assert fed.history.about["model"]["adapter"] is None
    assert fed.history.about["shares"] == "all"
