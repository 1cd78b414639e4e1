"""The server rule against float64 sums written out here.

Belongs here: pure numbers over named tensors. Does not: which updates get that far (test_update).
"""

import gc
import pickle
import random
import weakref

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import FederatedAveraging
from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.aggregation import AGGREGATIONS, RunningMean, make_aggregation
from llmchain_fed.updates.collection import Collection, Combined, Contribution, Round
from llmchain_fed.updates.server_optimizers import FedAvgM

SHAPES = {"a": (3, 4), "b": (5,), "scalar": (), "c.weight": (2, 1, 3)}


def states(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} for _ in range(count)]


def by_hand(pairs):
    """Σ n_k · w_k / Σ n_k in float64."""
    total = sum(weight for _, weight in pairs)
    return {n: sum(weight * s[n].double() for s, weight in pairs) / total for n in pairs[0][0]}


def block_of(state):
    """The same values as views into one block of memory, the way they come out of a message."""
    flat = torch.cat([t.reshape(-1) for t in state.values()])
    parts = torch.split(flat, [t.numel() for t in state.values()])
    return {n: part.view(t.shape) for (n, t), part in zip(state.items(), parts, strict=True)}


def weighted_average(pairs):
    mean = RunningMean()
    for state, weight in pairs:
        mean.add(Contribution(state, weight))
    return mean.finish().values


@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("shape", [dict, block_of])
def test_the_mean_is_the_float64_sum(count, shape):
    weights = random.Random(0).choices(range(1, 10_000), k=count)
    pairs = list(zip(states(count), weights, strict=True))
    mean = weighted_average((shape(s), w) for s, w in pairs)
    for name, wanted in by_hand(pairs).items():
        assert mean[name].dtype == torch.float32
        assert mean[name].shape == SHAPES[name]
        torch.testing.assert_close(mean[name].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_summed_in_float32_or_better(dtype):
    pairs = list(zip(states(50, dtype), range(1, 51), strict=True))
    mean = weighted_average(pairs)
    for name, wanted in by_hand(pairs).items():
        assert mean[name].dtype == dtype
        step = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
        # one rounding at the end, not fifty on the way
        torch.testing.assert_close(mean[name].double(), wanted, rtol=step, atol=1e-6 if step > 1e-6 else 1e-13)


def test_mixed_types():
    pairs = [({"x": s["a"].half(), "y": s["b"].double(), "z": s["scalar"]}, i + 1) for i, s in enumerate(states(4))]
    mean = weighted_average(pairs)
    assert {n: t.dtype for n, t in mean.items()} == {"x": torch.float16, "y": torch.float64, "z": torch.float32}
    for name, wanted in by_hand(pairs).items():
        torch.testing.assert_close(mean[name].double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_order_of_arrival_does_not_matter():
    pairs = list(zip(states(60), random.Random(1).choices(range(1, 3000), k=60), strict=True))
    first = weighted_average(pairs)
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        again = weighted_average(pairs)
        assert all(torch.allclose(again[n], first[n], rtol=0, atol=1e-6) for n in first)


def test_the_order_of_names_does_not_matter():
    one, two = states(2)
    mixed = weighted_average([(block_of(one), 1), (block_of(dict(reversed(two.items()))), 3)])
    for name, wanted in by_hand([(one, 1), (two, 3)]).items():
        torch.testing.assert_close(mixed[name].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [[1], [7], [3, 3, 3], [1, 1000, 17, 0.1]])
def test_identical_updates_and_a_single_one_are_bit_equal(dtype, weights):
    (state,) = states(1, dtype)
    mean = weighted_average((state, w) for w in weights)
    assert all(torch.equal(mean[n], state[n]) for n in state)


def test_values_far_apart_in_size():
    """A mean over sums would lose the small ones: 1e8 + 1 − 1e8 in float32 is 0 or 8."""
    values = [1e8, 1.0, -1e8, 1.0]
    mean = weighted_average(({"w": torch.tensor([v], dtype=torch.float64)}, 1) for v in values)["w"]
    assert float(mean) == pytest.approx(0.5, abs=1e-7)


def test_nothing_is_shared_with_what_came_in():
    one, two = states(2)
    kept = {n: t.clone() for n, t in one.items()}
    mean = RunningMean()
    mean.add(Contribution(one, 1))
    mean.add(Contribution(two, 1))
    assert all(torch.equal(one[n], kept[n]) for n in one)
    first = mean.finish().values
    one["b"].fill_(9e9)
    first["a"].fill_(9e9)
    again = mean.finish().values
    assert float(again["a"].abs().max()) < 10
    assert float(again["b"].abs().max()) < 10


def test_a_single_update_is_not_handed_through_by_reference():
    (state,) = states(1)
    mean = RunningMean()
    mean.add(Contribution(state, 5))
    state["b"].zero_()
    assert float(mean.finish().values["b"].abs().max()) > 0


def test_an_accumulator_keeps_one_state_however_many_come():
    """The updates are let go as soon as they are in, and what is kept does not grow."""
    mean, sizes, alive = RunningMean(), [], []
    for state in states(60):
        mean.add(Contribution(state, 1))
        alive += [weakref.ref(t) for t in state.values()]
        sizes.append(len(pickle.dumps(mean)))
    del state
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert max(sizes) - min(sizes) < 16


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    one, two = states(2)
    mean = RunningMean()
    with pytest.raises(FederationError, match="positive and finite"):
        mean.add(Contribution(one, weight))
    mean.add(Contribution(one, 2))
    with pytest.raises(FederationError, match="positive and finite"):
        mean.add(Contribution(two, weight))
    assert all(torch.equal(mean.finish().values[n], one[n]) for n in one)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {k: v for k, v in s.items() if k != "b"},
        lambda s: {**s, "more": torch.ones(1)},
        lambda s: {**s, "c.weight": torch.ones(1)},
        lambda s: {**s, "scalar": torch.ones(1)},
        lambda s: {**s, "a": s["a"].T.contiguous()},
    ],
)
def test_states_that_do_not_fit_leave_the_mean_as_it_was(change):
    """No broadcasting: (1,) into (2, 1, 3) would work in torch and mean nothing."""
    one, two = states(2)
    mean = RunningMean()
    mean.add(Contribution(one, 1))
    with pytest.raises(FederationError, match=r"differ|shape"):
        mean.add(Contribution(change(two), 1))
    assert all(torch.equal(mean.finish().values[n], one[n]) for n in one)
    mean.add(Contribution(two, 1))
    torch.testing.assert_close(mean.finish().values["a"], (one["a"] + two["a"]) / 2)


def test_no_update_is_no_mean():
    with pytest.raises(FederationError, match="no update"):
        weighted_average([])


# --- rules by name ----------------------------------------------------------------------------------------------------


def test_rules_by_name():
    wanted = {"fedavg", "fednova", "fedit", "ffa", "rolora", "fedsa", "fedsvd", "fedex", "flora", "flexlora"}
    assert {name: make_aggregation(name).name for name in AGGREGATIONS} == {name: name for name in wanted}
    with pytest.raises(ConfigError, match=r"unknown aggregation 'fedprox'. Valid: fedavg, fedex, fedit, fednova"):
        make_aggregation("fedprox")
    with pytest.raises(ConfigError, match="a Collection with zero, add and finish"):
        make_aggregation(3)


def test_a_rule_of_ones_own_combines_as_it_says():
    class Largest(Collection):
        name = "largest"

        def zero(self, about):
            self.found = dict(about.state)

        def add(self, given):
            self.found = {n: torch.maximum(t, self.found[n]) for n, t in given.tensors.items()}

        def finish(self):
            return Combined(self.found)

    rule = make_aggregation(Largest())
    collector = rule.begin(Round({"w": torch.tensor([0.0, 9.0])}, None))
    collector.add(Contribution({"w": torch.tensor([5.0, 1.0])}, 1.0))
    assert (rule.name, collector.finish().values["w"].tolist()) == ("largest", [5.0, 9.0])


class Wrong(Collection):
    """A rule of one's own whose result is not what it should be."""

    name = "wrong"

    def __init__(self, answer):
        self.answer = answer

    def zero(self, about):
        self.tensors = {}

    def add(self, given):
        self.tensors = dict(given.tensors)

    def finish(self):
        return self.answer(self.tensors)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: None, r"aggregation 'wrong': finish\(\) returned NoneType\. It must return Combined"),
        (lambda tensors: tensors, r"aggregation 'wrong': finish\(\) returned dict\. It must return Combined"),
        (
            lambda _: Combined(None),
            r"aggregation 'wrong' returned NoneType\. It must return a mapping of names to tensors",
        ),
        (
            lambda tensors: Combined({n: t.numpy() for n, t in tensors.items()}),
            r"returned ndarray for .* Make it a torch\.Tensor",
        ),
        (lambda tensors: Combined({"x": torch.ones(1)}), r"1 tensors \['x'\] are not in the global weights"),
        (
            lambda tensors: Combined({n: t.flatten()[:1] for n, t in tensors.items()}),
            r"has shape \(1,\), the global weights' is",
        ),
    ],
    ids=["nothing", "a dict", "no values", "numpy", "other names", "other shapes"],
)
@pytest.mark.parametrize("options", [{}, {"broadcast_codec": "int8"}, {"server_optimizer": FedAvgM()}], ids=repr)
def test_a_rule_of_ones_own_that_returns_no_weights_fails_its_round(answer, reason, options, make_chain):
    chain = make_chain()
    fed = FederatedAveraging(chain, participants={"a": PAIRS[:3]}, aggregation=Wrong(answer), progress=False, **options)
    before = chain.model.trainable_state()
    with pytest.raises(FederationError, match=reason):
        fed.fit(1)
    after = chain.model.trainable_state()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert (fed.round, len(fed.history)) == (0, 0)


def test_a_rule_of_ones_own_may_write_into_what_it_is_given():
    class Sum(Collection):
        def zero(self, about):
            self.total = about.state

        def add(self, given):
            for name, tensor in given.tensors.items():
                self.total[name].add_(tensor)

        def finish(self):
            return Combined(self.total)

    state = {"w": torch.tensor([1.0, 2.0])}
    collector = make_aggregation(Sum()).begin(Round(state, None))
    collector.add(Contribution({"w": torch.tensor([5.0, 1.0])}, 1.0))
    assert torch.equal(state["w"], torch.tensor([1.0, 2.0]))
    assert torch.equal(collector.finish().values["w"], torch.tensor([6.0, 3.0]))


def test_a_rule_of_ones_own_is_a_collection_or_refused_before_anything_is_trained(make_chain):
    class Nearly:
        def zero(self, about): ...
        def add(self, given): ...
        def finish(self): ...

    with pytest.raises(ConfigError, match=r"a Collection with zero, add and finish, or a Rule, got <"):
        FederatedAveraging(make_chain(), participants={"a": PAIRS[:3]}, aggregation=Nearly(), progress=False)


def test_fedit_is_for_lora():
    with pytest.raises(ConfigError, match="'fedit' averages LoRA factors"):
        make_aggregation("fedit").check(None)


def test_fedit_differs_from_the_mean_of_the_products():
    """Why it is called inexact: mean(B)·mean(A) is not mean(B·A)."""
    pairs = [({"lora_A": torch.tensor([[a]]), "lora_B": torch.tensor([[b]])}, 1) for a, b in ((1.0, 1.0), (3.0, 5.0))]
    mean = weighted_average(pairs)
    assert float(mean["lora_B"] @ mean["lora_A"]) == 6.0
    assert sum(float(s["lora_B"] @ s["lora_A"]) for s, _ in pairs) / 2 == 8.0


# --- how the mean moves the global weights ---------------------------------------------------------------------------


class Sgd:
    """w + lr · D."""

    def __init__(self, lr):
        self.lr = lr

    def step(self, state, pseudo_gradient):
        return {n: state[n] + self.lr * pseudo_gradient[n] for n in state}


def test_without_server_optimizer_the_mean_itself_is_next():
    start, mean = states(2)
    after = server_optimizers.apply(None, start, mean)
    assert all(torch.equal(after[n], mean[n]) for n in mean)


@pytest.mark.parametrize("lr", [1.0, 0.5, 0.0])
def test_a_server_optimizer_gets_mean_minus_global(lr):
    start, mean = states(2)
    after = server_optimizers.apply(Sgd(lr), start, mean)
    for name in start:
        wanted = (1 - lr) * start[name].double() + lr * mean[name].double()
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_server_optimizer_works_in_float32_and_gives_back_the_states_type():
    start, mean = ({"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (1.0, 2.0))
    seen = []

    class Watch(Sgd):
        def step(self, state, pseudo_gradient):
            seen.append(pseudo_gradient["w"].dtype)
            return super().step(state, pseudo_gradient)

    assert server_optimizers.apply(Watch(0.5), start, mean)["w"].dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_something_that_cannot_step_is_refused():
    with pytest.raises(ConfigError, match="step"):
        server_optimizers.check("adam")
