"""Where a participant stands, by round: the table in the docstring of `ProgressByRound`, row by row.

Belongs here: which rounds have happened. Does not: how a state travels or what of it is refused
(security/test_peer_messages), or that training goes on from it (checkpoint/test_resuming).
"""

import pytest

from llmchain_fed.federated.client.state import Progress, ProgressByRound, pack, unpack


def after(*numbers):
    """Trained in these rounds, each of which counts because the next one was asked for; next_step is the round."""
    progress = ProgressByRound()
    for number in numbers:
        _, former = progress.before(number)
        progress.trained(number, former, Progress(next_step=number))
    return progress


@pytest.mark.parametrize(
    ("rounds", "asked", "stands"),
    [
        ((), 1, 0),
        ((), None, 0),
        ((1, 2), 3, 2),
        ((1, 2), None, 2),
        ((1, 2), 9, 2),
        ((1, 2), 2, 1),
        ((1, 2, 3), 2, 0),
        ((1, 2, 2), 2, 1),
        ((1, 2, 2), 3, 2),
        ((4,), 4, 0),
    ],
)
def test_an_interrupted_round_has_not_happened(rounds, asked, stands):
    number, progress = after(*rounds).before(asked)
    assert (number, progress.next_step) == (stands, stands)


def test_no_more_than_two_rounds_are_kept():
    progress = after(*range(1, 50))
    assert sorted(progress.rounds) == [48, 49]
    assert after(1, 2, 2, 2).rounds.keys() == {1, 2}


def test_a_personal_model_belongs_to_the_rounds_before_it():
    progress = after(1, 2)
    progress.personalized(2, {"w": None})  # in the place of round 2, which was interrupted
    assert progress.before(2)[1].personal
    assert not progress.before(3)[1].personal
    assert progress.before(2)[1].next_step == 1


def test_the_beginning_is_round_0_and_travels():
    assert unpack(pack(ProgressByRound().rounds)) == {0: Progress()}
