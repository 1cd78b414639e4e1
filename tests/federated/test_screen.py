"""What progress=True shows within a round: a bar that moves by steps on a terminal, and nothing more in a log.

Belongs here: the bar. Does not: streams that cannot be written (test_stderr), lines of rounds (test_callbacks).
"""

import io
import re
import sys

import pytest
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, TrainingConfig
from llmchain_fed.federated.reporting import screen

TRAINING = TrainingConfig(learning_rate=1e-2, batch_size=2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr one, within the test: pytest sets it anew between a fixture and its test."""
    found = Terminal()
    monkeypatch.setattr(screen, "_SELDOM", 0.0)

    def make():
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return make


def make(chain, **options):
    return FederatedAveraging(
        chain, participants={"a": PAIRS[:4], "b": PAIRS[4:]}, training=TRAINING, samples=0, **options
    )


def test_the_bar_moves_by_steps_within_a_round(make_chain, terminal):
    """a has two steps and b four, each of whom is half of the round."""
    terminal = terminal()
    make(make_chain()).fit(2)
    drawn = re.findall(
        r"federating:[^\r]*?\| (\d+(?:\.\d+)?)/2 [^\r]*?(?:training: (\w), step (\d) of (\d))", terminal.getvalue()
    )
    assert list(dict.fromkeys(drawn)) == [
        ("0.25", "a", "1", "2"), ("0.5", "a", "2", "2"),
        ("0.62", "b", "1", "4"), ("0.75", "b", "2", "4"), ("0.88", "b", "3", "4"), ("1.0", "b", "4", "4"),
        ("1.25", "a", "1", "2"), ("1.5", "a", "2", "2"),
        ("1.62", "b", "1", "4"), ("1.75", "b", "2", "4"), ("1.88", "b", "3", "4"), ("2.0", "b", "4", "4"),
    ]  # fmt: skip
    assert re.findall(r"(\d+)/2 \[", terminal.getvalue())[-1] == "2"


def test_a_log_gets_no_line_and_no_step_is_told(make_chain, capsys):
    fed = make(make_chain())
    fed.fit(1)
    said = capsys.readouterr().err
    assert "step" not in said
    assert len(said.splitlines()) == 2  # who takes part, and the round
    assert all(client.tell_step is None for client in fed._peers.values())


def test_without_progress_nothing_is_shown_and_the_weights_are_the_same(make_chain, terminal):
    shown, silent, terminal = make_chain(), make_chain(), terminal()
    make(shown).fit(1)
    assert "step 1 of 2" in terminal.getvalue()
    terminal.truncate(0)
    make(silent, progress=False).fit(1)
    assert "federating" not in terminal.getvalue().strip("\0")
    assert shown.model.weights_hash == silent.model.weights_hash


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("training", r"FederatedAveraging\(chain, training=…\)"), ("lr", r"FederatedAveraging\(chain, lr=…\)"),
        ("participants", r"FederatedAveraging\(chain, participants=…\)"), ("quorum", r"resume\(…, quorum=…\)"),
        ("round", "can be read, and not set"), ("history", "can be read, and not set"),
        ("patiance", "nothing of that name"), ("num_train_epochs", r"TrainingConfig\(…\) has it: epochs="),
    ],
)  # fmt: skip
def test_an_option_that_is_set_later_is_refused_with_the_remedy(name, remedy, make_chain):
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, training=TRAINING, progress=False)
    with pytest.raises(ConfigError, match=remedy):
        setattr(fed, name, 3)
    assert fed.round == 0
    assert fed.config.training == TRAINING.replace(seed=0)


def test_a_subclass_may_have_attributes_of_its_own(make_chain):
    class Named(FederatedAveraging):
        """With a title."""

    fed = Named(make_chain(), progress=False)
    fed.title = "x"
    assert fed.title == "x"
    with pytest.raises(ConfigError, match="decided when a federation is made"):
        fed.seed = 1
