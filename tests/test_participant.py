"""What a participant may be, and options that are given without their name.

Belongs here: `Participant`, and what every configuration object refuses alike. Does not: a federation of them
(test_averaging).
"""

import copy
import pickle

import pytest
from tiny import PAIRS

from llmchain_fed import Participant, TrainingConfig
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.participant import as_participants
from llmchain_fed.federated.personal import Ditto


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"], ids=ascii)
def test_a_name_that_no_encoding_holds_is_refused_at_once(name):
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
