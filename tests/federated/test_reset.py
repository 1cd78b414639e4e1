"""fed.reset: a federation is put back to where it began, as if no round had been.

Belongs here: what is the same after it as in a new federation. Does not: what a comparison does between its arms.
"""

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import ConfigError, Ditto, FedAdam, FederatedAveraging, TrainingConfig

SHARES = {"a": PAIRS[:4], "b": PAIRS[4:9]}
HOW = TrainingConfig(optimizer="adam", learning_rate=5e-3, batch_size=2, keep_optimizer=True, max_steps=2)


class Momentum:
    """A server optimizer of one's own, with memory and no state_dict."""

    def __init__(self):
        self.memory = {}

    def step(self, state, pseudo_gradient):
        for name, delta in pseudo_gradient.items():
            self.memory[name] = self.memory.get(name, 0) * 0.5 + delta
        return {n: state[n] + self.memory[n] for n in pseudo_gradient}


def federation(chain, **options):
    options = {"participants": SHARES, "training": HOW, "evaluation": 0.3, "progress": False} | options
    return FederatedAveraging(chain, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregation": "fedex"},
        {"personal": Ditto()},
        {"aggregation": "flora", "training": HOW.replace(keep_optimizer=False)},
        {"aggregation": "fedsa"},
        {"server_optimizer": FedAdam(lr=0.01), "codec": "int8", "broadcast_codec": "int8"},
        {"server_optimizer": Momentum()},
    ],
)
def test_rounds_after_a_reset_are_those_of_a_new_federation(make_chain, options):
    chain = make_chain(lora=True)
    start = chain.model.trainable_state()
    fed = federation(chain, **options)
    first = fed.fit(2)
    trained = chain.model.trainable_state()
    fed.reset()
    assert (fed.round, len(fed.history), chain.adapters) == (0, 0, ["global"])
    assert len(first) == 2  # a history that somebody has stays theirs
    now = chain.model.trainable_state()
    assert all(torch.equal(now[n], start[n]) for n in start)
    assert chain.model.remainder() == {}
    again = fed.fit(2)
    assert all(torch.equal(chain.model.trainable_state()[n], trained[n]) for n in trained)
    assert [r.held_out_after for r in again] == [r.held_out_after for r in first]


def test_full_weights_go_back_too(make_chain):
    chain = make_chain()
    start = chain.model.weights_hash
    fed = federation(chain)
    fed.fit(1)
    assert chain.model.weights_hash != start
    fed.reset()
    assert chain.model.weights_hash == start


def test_the_copy_of_the_start_is_counted_in_the_plan_and_costs_nothing_before_the_first_round(make_chain):
    chain = make_chain()
    fed = federation(chain)
    kept, sent = fed._start.state.values, fed._server.broadcast.state_for()
    assert all(kept[name].is_set_to(sent[name]) for name in kept)
    parameters = sum(p.numel() * p.element_size() for p in chain.model.parameters())
    assert fed.plan(1).memory >= 6 * parameters  # the model, its four copies in a round, and the start


def test_rounds_on_disk_are_not_written_over(make_chain, tmp_path):
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path)
    fed.reset()
    fed.fit(1)
    with pytest.raises(ConfigError, match="roll_back"):
        fed.reset()
    assert fed.round == 1
