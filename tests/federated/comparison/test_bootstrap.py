"""The paired bootstrap against a full enumeration of its resamples, and against numpy.

Belongs here: intervals of tables of numbers. Does not: where such tables come from (test_compare).
"""

import itertools

import numpy as np
import pytest
import torch

from llmchain_fed.federated.comparison.bootstrap import interval


def enumerated(difference, weights=None, *, whole=False):
    """The interval over all resamples there are, each equally likely: nothing is drawn."""
    seeds, people = difference.shape[:2]
    means = []
    for s in itertools.product(range(seeds), repeat=seeds):
        for p in itertools.product(range(people), repeat=people):
            chosen = difference[np.ix_(s, p)]
            if weights is None:
                means.append(chosen.mean())
            else:
                means.append(pooled(chosen, list(p), difference[list(s)], weights))
    return means if whole else np.quantile(means, [0.025, 0.975])


def pooled(chosen, p, all_people, weights):
    """Cell by cell: two draws of one participant are two like it, one's model never on the other's own texts."""
    people, total, of = difference_size(all_people), 0.0, 0.0
    for at, model in enumerate(p):
        for where, texts in enumerate(p):
            if at == where or model != texts:
                cell = chosen_mean(all_people, model, texts)
            else:
                rest = [q for q in range(people) if q != model]
                cells = [chosen_mean(all_people, model, q) for q in rest]
                cells += [chosen_mean(all_people, q, model) for q in rest]
                cell = np.mean(cells)
            total, of = total + weights[texts] * cell, of + weights[texts]
    return total / of


def difference_size(table):
    return table.shape[1]


def chosen_mean(table, model, texts):
    return table[:, model, texts].mean()


def test_the_interval_of_own_texts_is_that_of_all_resamples_there_are():
    own = np.array([[0.4, -0.1, 0.3], [0.2, 0.0, 0.6], [0.3, 0.1, 0.2]])
    found = interval(torch.tensor(own), resamples=200_000)
    np.testing.assert_allclose(found, enumerated(own), atol=0.01)  # 729 values, 0.01 apart at the ends


def test_the_interval_of_pooled_texts_draws_models_and_texts_together():
    rng = np.random.default_rng(1)
    difference, weights = rng.normal(size=(2, 3, 3)), np.array([10.0, 1.0, 5.0])
    found = interval(torch.tensor(difference), torch.tensor(weights), resamples=4000)
    np.testing.assert_allclose(found, enumerated(difference, weights), atol=0.08)


@pytest.mark.parametrize("people", [2, 3])
def test_own_texts_count_in_the_pool_as_often_as_they_do(people):
    """The mean over all resamples is the difference that was measured: the interval is not beside it."""
    difference = np.random.default_rng(people).normal(size=(2, people, people)) + 3 * np.eye(people)
    means = enumerated(difference, np.ones(people), whole=True)
    assert np.mean(means) == pytest.approx(difference.mean(), abs=1e-12)
    low, high = interval(torch.tensor(difference), torch.ones(people), resamples=4000)
    assert low <= difference.mean() <= high


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
