"""What a participant may be, and options that are given without their name.

Belongs here: `Participant`, and what every configuration object refuses alike. Does not: a federation of them
(test_averaging).
"""

import copy
import pickle

import datasets
import pytest
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, Participant, TrainingConfig
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.participant import as_participants


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"], ids=ascii)
def test_a_name_that_no_encoding_has_is_refused_at_once(name):
    with pytest.raises(ConfigError, match=r"half a surrogate pair.*Choose another name"):
        Participant(name, PAIRS)
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        as_participants({name: PAIRS})


@pytest.mark.parametrize("name", ["é", "\U0001f600", "a/b", 7, "\x00"], ids=ascii)
def test_any_other_name_will_do(name):
    assert Participant(name, PAIRS).name == str(name)


@pytest.mark.parametrize("alpha", [10**400, float("inf"), float("nan"), 0, -1, True, "8"], ids=lambda a: f"{a!r:.9}")
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ConfigError, match="'a': alpha is positive and goes with a rank, got"):
        Participant("a", PAIRS, rank=2, alpha=alpha)


def splits(*names):
    return datasets.DatasetDict({n: datasets.Dataset.from_list([{"text": "a", "completion": "b"}]) for n in names})


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (splits("train", "validation", "test"), 'participants={"me": d["train"]}, evaluation=d["validation"]'),
        (splits("test", "train"), 'participants={"me": d["train"]}, evaluation=d["test"]'),
        (splits("train", "unsupervised"), 'participants={"me": d["train"]}; '),
        (splits("train_sft", "test_sft"), 'participants={"me": d["train_sft"]}, evaluation=d["test_sft"]'),
        (splits("validation", "test"), 'participants={"me": d["validation"]}; '),
        (datasets.IterableDatasetDict(train=iter(())), 'participants={"me": d["train"]}; '),
        ({"Train": PAIRS, "Dev": PAIRS}, 'participants={"me": d["Train"]}, evaluation=d["Dev"]'),
        ({"training": PAIRS, "testing": PAIRS, "eval": PAIRS}, 'evaluation=d["eval"]'),
        ({"train": PAIRS}, 'participants={"me": d["train"]}; '),
        ({"val": PAIRS}, 'participants={"me": d["val"]}; '),
        ({"train": PAIRS, "test": Participant("test", PAIRS)}, None),
    ],
)
def test_the_splits_of_a_data_set_are_no_participants(given, remedy, make_chain):
    """All of them would be trained on, the test split too."""
    if remedy is None:  # one of them is given explicitly: then the names are meant
        assert list(as_participants(given)) == list(given)
        return
    with pytest.raises(ConfigError, match="splits of one data set") as error:
        FederatedAveraging(make_chain(), participants=given, progress=False)
    assert remedy in str(error.value)


def test_participants_may_be_called_like_splits_explicitly_or_beside_others():
    explicit = {name: Participant(name, PAIRS) for name in ("train", "test")}
    assert as_participants(explicit) == explicit
    assert list(as_participants(list(explicit.values()))) == ["train", "test"]
    assert list(as_participants({"test": PAIRS, "django": PAIRS})) == ["test", "django"]
    assert list(as_participants({"test_1": PAIRS, "test_2": PAIRS})) == ["test_1", "test_2"]
    assert list(as_participants(splits("django", "wagtail"))) == ["django", "wagtail"]
    assert list(as_participants(splits("trainees", "tester"))) == ["trainees", "tester"]
    assert as_participants({}) == {}


def test_options_are_given_by_name():
    with pytest.raises(ConfigError, match=r"^Ditto takes options by name, got 0\.1 without\. Valid: lam, max_steps$"):
        Ditto(0.1)
    with pytest.raises(ConfigError, match=r"^TrainingConfig takes options by name, got 0\.1 .*learning_rate"):
        TrainingConfig(0.1, batch_size=2)
    with pytest.raises(ConfigError, match=r"^Ditto: unknown option `lambda`; .*Valid: lam, max_steps$"):
        Ditto(**{"lambda": 0.1})
    for name in ("cls", "self", "options", "values"):
        with pytest.raises(ConfigError, match=f"unknown option `{name}`"):
            TrainingConfig(**{name: 1})
    ditto = Ditto(lam=0.3)
    assert [copy.deepcopy(ditto), pickle.loads(pickle.dumps(ditto)), Ditto.model_validate({"lam": 0.3})] == [ditto] * 3
