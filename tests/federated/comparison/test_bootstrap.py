"""The paired bootstrap against a full enumeration of its resamples, and against numpy.

Belongs here: intervals of tables of numbers. Does not: where such tables come from (test_compare).
"""

import itertools

import numpy as np
import pytest
import torch

from llmchain_fed.federated.comparison.bootstrap import interval


def enumerated(difference, weights=None):
    """The interval over all resamples there are, each equally likely: nothing is drawn."""
    seeds, people = difference.shape[:2]
    means = []
    for s in itertools.product(range(seeds), repeat=seeds):
        for p in itertools.product(range(people), repeat=people):
            chosen = difference[np.ix_(s, p)]
            if weights is None:
                means.append(chosen.mean())
            else:
                means.append(np.mean([np.average(chosen[i, j][list(p)], weights=weights[list(p)])
                                      for i in range(seeds) for j in range(people)]))  # fmt: skip
    return np.quantile(means, [0.025, 0.975])


def test_the_interval_of_own_texts_is_that_of_all_resamples_there_are():
    own = np.array([[0.4, -0.1, 0.3], [0.2, 0.0, 0.6], [0.3, 0.1, 0.2]])
    found = interval(torch.tensor(own), resamples=200_000)
    np.testing.assert_allclose(found, enumerated(own), atol=0.01)  # 729 values, 0.01 apart at the ends


def test_the_interval_of_pooled_texts_draws_models_and_texts_together():
    rng = np.random.default_rng(1)
    difference, weights = rng.normal(size=(2, 3, 3)), np.array([10.0, 1.0, 5.0])
    found = interval(torch.tensor(difference), torch.tensor(weights), resamples=4000)
    np.testing.assert_allclose(found, enumerated(difference, weights), atol=0.08)


def test_the_draws_of_one_call_are_numpys_mean_over_the_drawn_grid():
    own = np.random.default_rng(2).normal(size=(4, 5))
    draw = torch.Generator().manual_seed(0)
    s = torch.randint(4, (2000, 4), generator=draw).numpy()
    p = torch.randint(5, (2000, 5), generator=draw).numpy()
    means = [own[np.ix_(rows, columns)].mean() for rows, columns in zip(s, p, strict=True)]
    np.testing.assert_allclose(interval(torch.tensor(own)), np.quantile(means, [0.025, 0.975]), atol=1e-12)


def test_a_constant_difference_has_no_width_and_one_cell_no_interval():
    assert interval(torch.full((3, 2), 0.25)) == pytest.approx((0.25, 0.25))
    assert interval(torch.tensor([[0.25]])) is None


def test_the_interval_draws_from_a_generator_of_its_own():
    before = torch.get_rng_state()
    first, second = (interval(torch.randn(3, 3, generator=torch.Generator().manual_seed(5))) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
