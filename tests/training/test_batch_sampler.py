"""BatchSampler: a draw of somebody's own, outside the package, and orders; what the package's own draws: test_loop."""

import random

import numpy as np
import pytest
import torch
from tiny import PAIRS
from torch.utils.data import DataLoader

from llmchain_fed import ConfigError, TrainingConfig, train_locally
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.training.batch_sampler import Place, bucketed_order, seed_of
from llmchain_fed.training.loop import mean_loss_gradient


class Poisson:
    """Every example is in every batch with probability batch size / n, independently; a batch may be empty."""

    def __call__(self, examples, config, place):
        count = len(examples)
        share = config.batch_size / count
        steps = config.max_steps or (config.epochs or 1) * -(-count // config.batch_size)
        for step in range(place.first_step, place.first_step + steps):
            rng = random.Random(seed_of(config.seed, place.participant, place.round, step))
            yield [i for i in range(count) if rng.random() < share]


def drawn(chain, config, **place):
    """The rows of each batch that a step was given, by what is in them, and the result."""
    encoded, seen = encode_examples(PAIRS, chain.model, chain), []
    numbers = {repr(encoded[i]): i for i in range(len(encoded))}

    def note(model, batch, config):
        seen.append([numbers[repr(row)] for row in batch.rows])
        return mean_loss_gradient(model, batch, config)

    result = train_locally(
        chain.model, PAIRS, config, prompt=chain, gradient_step=note, batch_sampler=Poisson(), **place
    )
    return seen, result


def test_a_poisson_draw_reaches_the_step_as_it_is(make_chain):
    """The batches are the sampler's own, the empty ones too, and their losses' mean is over the others."""
    config = TrainingConfig(batch_size=1, max_steps=40, optimizer="sgd", learning_rate=1e-3, seed=3)
    seen, result = drawn(make_chain(), config, participant="p", round=2, first_step=5)
    assert seen == list(Poisson()(range(12), config, Place("p", 2, 5)))
    filled = [rows for rows in seen if rows]
    assert 0 < len(filled) < len(seen) == 40 == result.steps
    assert any(len(rows) > 1 for rows in filled)
    assert (result.next_step, len(result.losses), result.examples) == (45, len(filled), 12)
    assert result.loss == pytest.approx(sum(result.losses) / len(filled))


def test_the_place_decides_the_draw_and_a_rerun_is_bit_identical(make_chain):
    config = TrainingConfig(batch_size=4, max_steps=6, learning_rate=1e-2)
    places = [{}, {}, {"participant": "b"}, {"round": 1}, {"first_step": 6}]
    chains = [make_chain() for _ in places]
    draws = [drawn(chain, config, **place)[0] for chain, place in zip(chains, places, strict=True)]
    assert draws[0] == draws[1]
    first, second = (chain.model.trainable_state() for chain in chains[:2])
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert len({repr(rows) for rows in draws[1:]}) == 4


@pytest.mark.parametrize("wrong", [[[-1]], [[0, 12]], [[1.0]], [3], ["ab"], None])
def test_rows_that_there_are_not_are_refused_and_nothing_is_learnt(wrong, make_chain):
    chain = make_chain()
    before = chain.model.weights_hash
    with pytest.raises(ConfigError, match=r"batch sampler (draws|gives)"):
        train_locally(chain, PAIRS, TrainingConfig(learning_rate=0.1), batch_sampler=lambda *_: wrong)
    assert chain.model.weights_hash == before


def test_rows_may_be_an_array_of_numpys(make_chain):
    config, order = TrainingConfig(learning_rate=0.1, optimizer="sgd"), [[0, 3, 2], [5]]
    chains = [make_chain(), make_chain()]
    train_locally(chains[0], PAIRS, config, batch_sampler=lambda *_: order)
    train_locally(chains[1], PAIRS, config, batch_sampler=lambda *_: [np.array(rows) for rows in order])
    assert chains[0].model.weights_hash == chains[1].model.weights_hash != make_chain().model.weights_hash


def test_a_poisson_draw_has_the_rate_that_it_says():
    """12 examples at 1/4 over 4,000 steps: each 1,000 times, within five standard deviations of a binomial."""
    config = TrainingConfig(batch_size=3, max_steps=4000)
    counts = [0] * 12
    for rows in Poisson()(range(12), config, Place()):
        for row in rows:
            counts[row] += 1
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_a_sampler_for_a_dataloader_is_refused(make_chain):
    with pytest.raises(ConfigError, match=r"DataLoader draws its batches itself.*Give the examples"):
        train_locally(make_chain(), DataLoader([]), batch_sampler=Poisson())


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_an_order_is_a_permutation_in_batches_of_the_size(batch_size):
    lengths = random.Random(1).choices(range(3, 60), k=23)
    batches = bucketed_order(lengths, batch_size, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(23))
    sizes = sorted((len(b) for b in batches), reverse=True)
    assert sizes == [batch_size] * (23 // batch_size) + [23 % batch_size] * (23 % batch_size > 0)


def test_orders_differ_between_passes_and_repeat_with_the_seed():
    lengths = [10 + i % 7 for i in range(40)]
    rng = random.Random(0)
    first, second = bucketed_order(lengths, 4, rng), bucketed_order(lengths, 4, rng)
    assert first != second
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}  # other batches, not the same ones shuffled
    assert first == bucketed_order(lengths, 4, random.Random(0))


def test_batches_contain_neighbours_in_length():
    lengths = random.Random(2).choices(range(5, 200), k=64)
    bucketed = sum(len(b) * max(lengths[i] for i in b) for b in bucketed_order(lengths, 8, random.Random(0)))
    in_order = sum(8 * max(lengths[i : i + 8]) for i in range(0, 64, 8))
    assert bucketed - sum(lengths) < 0.4 * (in_order - sum(lengths))  # padding
