"""Server optimizers against the papers' formulas in plain Python, and what a round may ask of their memory.

Belongs here: server_optimizers. Does not: a federation that uses one (test_averaging).
"""

import copy
import json
import math
import random
import re
import threading

import pytest
import torch
from safetensors.torch import load, save

from llmchain_fed.errors import ConfigError, FederationError
from llmchain_fed.untrusted import printable
from llmchain_fed.updates.server_optimizers import (
    DiLoCo,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    Reptile,
    ResumableServerOptimizer,
    TorchServerOptimizer,
    apply,
    check,
    from_settings,
    snapshot,
)

SHAPES = {"a": (3, 4), "b": (5,), "scalar": (), "layer.lora_A/w": (2, 1, 3), "empty": (0, 2)}
MAKERS = {
    "fedavgm": lambda: FedAvgM(lr=0.7, momentum=0.8),
    "fedadagrad": lambda: FedAdagrad(lr=0.1, beta1=0.3),
    "fedadam": lambda: FedAdam(lr=0.1, beta1=0.8, beta2=0.95, tau=1e-2),
    "fedyogi": lambda: FedYogi(lr=0.1, beta1=0.8, beta2=0.95, tau=1e-2),
    "reptile": lambda: Reptile(step_size=0.3),
    "diloco": DiLoCo,
    "sgd": lambda: TorchServerOptimizer(torch.optim.SGD, lr=0.5, momentum=0.5, dampening=0.1),
    "adamw": lambda: TorchServerOptimizer(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.95)),
    "adam": lambda: TorchServerOptimizer(torch.optim.Adam, lr=0.1, amsgrad=True),
    "rprop": lambda: TorchServerOptimizer(torch.optim.Rprop),
    "adagrad": lambda: TorchServerOptimizer(torch.optim.Adagrad, lr=0.2),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def values(seed, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: (size * torch.randn(s, generator=generator)).to(dtype) for n, s in SHAPES.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def one(value, dtype=torch.float32):
    return {"w": torch.tensor([value], dtype=dtype)}


# --- the papers' numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "delta", "wanted"),
    [
        (FedAdam, 1.0, 0.990050),
        (FedYogi, 1.0, 0.990050),
        (FedAdagrad, 1.0, 0.999000),
        (FedAdam, 0.01, 0.414822),
        (FedYogi, 0.01, 0.414214),
        (FedAdagrad, 0.01, 0.904988),
    ],
)
def test_the_first_step(rule, delta, wanted):
    for sign in (1, -1):
        after = rule(lr=1.0).step(one(0.0), one(sign * delta))
        assert float(after["w"]) == pytest.approx(sign * wanted, abs=1e-6)


def test_diloco_gathers_speed():
    optimizer, state = DiLoCo(lr=0.7, momentum=0.9), one(0.0)
    for wanted in (1.33, 3.227, 5.6343):
        state = optimizer.step(state, one(1.0))
        assert float(state["w"]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        FedAvgM(lr=1.0, momentum=0.0),
        Reptile(step_size=1.0),
        DiLoCo(lr=1.0, momentum=0.0),
        TorchServerOptimizer(torch.optim.SGD, lr=1.0),
    ],
    ids=repr,
)
def test_which_of_them_are_plain_averaging(optimizer):
    state = values(0)
    for seed in range(1, 5):
        mean = values(seed)
        state = apply(optimizer, state, mean)
        for name in SHAPES:
            torch.testing.assert_close(state[name], mean[name], rtol=1e-6, atol=1e-6)


# --- twins: the formulas, number by number, in float64 ----------------------------------------------------------------


def by_hand(rule, weights, deltas, lr, b1=0.0, b2=0.0, tau=0.0):
    """One weight over several rounds; what it is after each."""
    m, v, seen = 0.0, tau**2, []
    for d in deltas:
        if rule == "fedavgm":
            m = b1 * m + d
            weights += lr * m
        elif rule == "reptile":
            weights += lr * d
        elif rule == "diloco":  # torch's SGD(nesterov=True): the buffer begins as the first gradient
            g = -d
            m = g if not seen else b1 * m + g
            weights -= lr * (g + b1 * m)
        else:
            m = b1 * m + (1 - b1) * d
            if rule == "fedadagrad":
                v = v + d * d
            elif rule == "fedyogi":
                v = v - (1 - b2) * d * d * ((v > d * d) - (v < d * d))
            else:
                v = b2 * v + (1 - b2) * d * d
            weights += lr * m / (math.sqrt(v) + tau)
        seen.append(weights)
    return seen


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize(
    ("optimizer", "rule", "options"),
    [
        (FedAvgM(lr=0.7, momentum=0.8), "fedavgm", {"lr": 0.7, "b1": 0.8}),
        (Reptile(step_size=0.3), "reptile", {"lr": 0.3}),
        (DiLoCo(lr=0.6, momentum=0.8), "diloco", {"lr": 0.6, "b1": 0.8}),
        (FedAdagrad(lr=0.3, beta1=0.2, tau=1e-2), "fedadagrad", {"lr": 0.3, "b1": 0.2, "tau": 1e-2}),
        (FedAdam(lr=0.3, beta1=0.8, beta2=0.9, tau=1e-2), "fedadam", {"lr": 0.3, "b1": 0.8, "b2": 0.9, "tau": 1e-2}),
        (FedYogi(lr=0.3, beta1=0.8, beta2=0.9, tau=1e-2), "fedyogi", {"lr": 0.3, "b1": 0.8, "b2": 0.9, "tau": 1e-2}),
        (FedAdam(), "fedadam", {"lr": 1.0, "b1": 0.9, "b2": 0.99, "tau": 1e-3}),
        (FedYogi(), "fedyogi", {"lr": 1.0, "b1": 0.9, "b2": 0.99, "tau": 1e-3}),
        (FedAdagrad(), "fedadagrad", {"lr": 1.0, "tau": 1e-3}),
        (FedAvgM(), "fedavgm", {"lr": 1.0, "b1": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_five_random_rounds_are_what_the_formula_says(optimizer, rule, options, size):
    optimizer = copy.deepcopy(optimizer)
    start = state = values(0)
    deltas = [values(seed, size=size) for seed in range(1, 6)]
    deltas[3] = {n: t * 0 for n, t in deltas[3].items()}  # a round in which nothing moved
    for number, delta in enumerate(deltas):
        state = optimizer.step(state, delta)
        for name, tensor in state.items():
            history = torch.stack([d[name].reshape(-1) for d in deltas[: number + 1]])
            wanted = [
                by_hand(rule, float(w), history[:, i].double().tolist(), **options)[-1]
                for i, w in enumerate(start[name].reshape(-1))
            ]
            torch.testing.assert_close(
                tensor.double().reshape(-1), torch.tensor(wanted).double(), rtol=1e-5, atol=5e-6 * max(size, 0.1)
            )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Adafactor, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_torchs_optimizers_do_what_they_do_with_parameters_of_their_own(kind, options):
    """The twin keeps one optimizer and one set of parameters over all rounds."""
    state = {n: t for n, t in values(0).items() if n != "empty"}  # Adafactor divides by the number of values
    parameters = {n: torch.nn.Parameter(t.clone()) for n, t in state.items()}
    twin = kind(parameters.values(), **options)
    optimizer = TorchServerOptimizer(kind, **options)
    for seed in range(1, 7):
        delta = {n: t for n, t in values(seed).items() if n in state}
        for name, parameter in parameters.items():
            parameter.grad = -delta[name]
        twin.step()
        state = optimizer.step(state, delta)
        assert_equal(state, {n: p.detach() for n, p in parameters.items()})


# --- memory -----------------------------------------------------------------------------------------------------------


@EVERY
def test_a_saved_one_continues_bit_by_bit(make):
    """Through safetensors and JSON, as a checkpoint does it."""
    smooth, state = make(), values(0)
    for seed in (1, 2, 3):
        state = smooth.step(state, values(seed))
    tensors, numbers = smooth.state_dict()
    assert all("/" in name for name in tensors)
    resumed = make()
    resumed.load_state_dict(load(save(tensors)), json.loads(json.dumps(numbers)))
    other = state
    for seed in (4, 5, 6):
        state, other = smooth.step(state, values(seed)), resumed.step(other, values(seed))
        assert_equal(state, other)
    assert_equal(smooth.state_dict()[0], resumed.state_dict()[0])
    assert smooth.state_dict()[1] == resumed.state_dict()[1]


@EVERY
def test_nothing_is_shared_with_what_was_saved_or_loaded(make):
    optimizer, state = make(), values(0)
    optimizer.step(state, values(1))
    tensors, numbers = optimizer.state_dict()
    kept = {n: t.clone() for n, t in tensors.items()}
    other = make()
    other.load_state_dict(tensors, numbers)
    for tensor in tensors.values():
        tensor.fill_(9e9)
    assert_equal(optimizer.state_dict()[0], kept)
    assert_equal(other.state_dict()[0], kept)
    before = optimizer.state_dict()[0]
    other.step(state, values(2))
    assert_equal(optimizer.state_dict()[0], before)


@EVERY
def test_names_left_out_are_neither_moved_nor_aged(make):
    """Odd rounds train a and b, even ones the rest: each half goes as if the other did not exist."""
    optimizer, state = make(), values(0)
    halves = [{"a", "b"}, set(SHAPES) - {"a", "b"}]
    alone, alone_state = [make(), make()], [{n: state[n] for n in half} for half in halves]
    for number in range(6):
        which, delta = number % 2, values(number + 1)
        part = {n: delta[n] for n in halves[which]}
        moved = optimizer.step(state, part)
        assert moved.keys() == halves[which]
        state = {**state, **moved}
        alone_state[which] = alone[which].step(alone_state[which], part)
    assert_equal({n: state[n] for n in SHAPES}, {n: (alone_state[0] | alone_state[1])[n] for n in SHAPES})


@EVERY
def test_a_step_changes_nothing_it_was_given(make):
    optimizer, state = make(), values(0)
    for seed in range(1, 4):
        delta = values(seed)
        kept = [{n: t.clone() for n, t in tensors.items()} for tensors in (state, delta)]
        moved = optimizer.step(state, delta)
        assert_equal(state, kept[0])
        assert_equal(delta, kept[1])
        memory = optimizer.state_dict()[0]
        for tensor in delta.values():
            tensor.fill_(9e9)
        assert_equal(optimizer.state_dict()[0], memory)
        following = {n: t.clone() for n, t in moved.items()}
        for tensor in moved.values():
            tensor.fill_(9e9)
        assert_equal(optimizer.state_dict()[0], memory)
        state = following
    assert not any(t.requires_grad for t in state.values())


@EVERY
def test_a_failed_step_leaves_the_memory(make):
    optimizer, state = make(), values(0)
    state = optimizer.step(state, values(1))
    before = optimizer.state_dict()
    bad = values(2)
    bad["b"][2] = math.nan
    for delta, reason in (
        (bad, "would make b NaN or infinite"),
        (values(2) | {"c": torch.ones(1)}, r"1 tensors \['c'\] are not in the global weights"),
        (values(2) | {"b": torch.ones(1)}, r"b has shape \(1,\), the global weights' is \(5,\)"),
    ):
        with pytest.raises(FederationError, match=reason):
            optimizer.step(state, delta)
        assert_equal(optimizer.state_dict()[0], before[0])
        assert optimizer.state_dict()[1] == before[1]
    smooth = make()
    smooth.load_state_dict(*before)
    assert_equal(optimizer.step(state, values(3)), smooth.step(state, values(3)))


@pytest.mark.parametrize("make", [MAKERS["fedadam"], MAKERS["adam"], MAKERS["diloco"]])
def test_memory_of_another_model(make):
    optimizer = make()
    optimizer.step({"w": torch.zeros(3)}, {"w": torch.ones(3)})
    with pytest.raises(FederationError, match=r"memory of w has shape|failed .*weights and memory are as they were"):
        optimizer.step({"w": torch.zeros(2)}, {"w": torch.ones(2)})


def test_squares_that_overflow_are_refused():
    """v would be infinite for ever, and the weight would never move again."""
    with pytest.raises(FederationError, match=r"FedAdam\(lr=1.0.* would make w NaN or infinite"):
        FedAdam().step(one(0.0), one(1e20))


@EVERY
def test_a_deep_copy_is_independent(make):
    optimizer, state = make(), values(0)
    optimizer.step(state, values(1))
    twin = copy.deepcopy(optimizer)
    assert repr(twin) == repr(optimizer)
    before = twin.state_dict()[0]
    first = optimizer.step(state, values(2))
    assert_equal(twin.state_dict()[0], before)
    assert_equal(twin.step(state, values(2)), first)


@EVERY
def test_a_snapshot_undoes_a_step(make):
    optimizer, state = make(), values(0)
    for _ in range(2):  # with and without memory
        before = optimizer.state_dict()
        undo = snapshot(optimizer)
        first = optimizer.step(state, values(2))
        undo()
        assert_equal(optimizer.state_dict()[0], before[0])
        assert_equal(optimizer.step(state, values(2)), first)


def test_a_snapshot_of_an_object_of_ones_own():
    class Momentum:
        def __init__(self):
            self.memory = {}

        def step(self, state, pseudo_gradient):
            for name, delta in pseudo_gradient.items():
                self.memory[name] = self.memory.get(name, 0) * 0.5 + delta
            return {n: state[n] + self.memory[n] for n in pseudo_gradient}

    own = Momentum()
    assert not isinstance(own, ResumableServerOptimizer)
    own.step(one(0.0), one(1.0))
    undo = snapshot(own)
    own.step(one(0.0), one(1.0))
    own.more = 1
    undo()
    assert (vars(own).keys(), own.memory["w"].tolist()) == ({"memory"}, [1.0])
    snapshot(None)()
    own.lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"cannot be copied \(TypeError.*Give it settings"):
        snapshot(own)


def test_half_a_memory_is_refused_and_so_is_one_of_another_form():
    class Plain:
        def step(self, state, pseudo_gradient):
            return {n: state[n] + g for n, g in pseudo_gradient.items()}

    class Torchs(Plain):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise AssertionError

    class Unpaired(Torchs):
        def settings(self):
            return {"class": "Unpaired"}

    check(Plain())
    with pytest.raises(ConfigError, match=r"has state_dict, load_state_dict alone.*settings\(\) → a mapping"):
        check(Torchs())
    with pytest.raises(ConfigError, match=r"state_dict\(\) gives dict, no pair of mappings"):
        check(Unpaired())


# --- types and odd values ---------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_states_type_is_kept_and_the_numbers_are_done_in_float32_or_better(make, dtype):
    state, wide = values(0, dtype), make()
    optimizer = make()
    twin = {n: t.to(torch.promote_types(dtype, torch.float32)) for n, t in state.items()}
    for seed in range(1, 4):
        delta = values(seed, size=0.1)
        moved = optimizer.step(state, delta)
        exact = wide.step(twin, delta)
        assert_equal(moved, {n: t.to(dtype) for n, t in exact.items()})
        state, twin = moved, {n: t.to(twin[n].dtype) for n, t in moved.items()}
    for name, tensor in optimizer.state_dict()[0].items():
        assert tensor.dtype in (torch.float32, torch.float64), name


@EVERY
def test_a_round_that_moves_nothing_is_finite(make):
    optimizer, state = make(), values(0)
    for _ in range(3):
        state = optimizer.step(state, {n: torch.zeros(s) for n, s in SHAPES.items()})
    assert all(bool(t.isfinite().all()) for t in state.values())
    if make not in (MAKERS["adamw"],):  # it decays the weights by itself
        assert_equal(state, values(0))
    assert optimizer.step(state, {}) == {}


def test_a_yogi_forgets_slower_than_an_adam():
    """After one large D and many small ones v of Adam has shrunk by β₂ each round; Yogi's by no more than D²."""
    adam, yogi = FedAdam(), FedYogi()
    for optimizer in (adam, yogi):
        optimizer.step(one(0.0), one(1.0))
        for _ in range(100):
            optimizer.step(one(0.0), one(1e-3))
    v = [float(o.state_dict()[0]["v/w"]) for o in (adam, yogi)]
    assert v[0] == pytest.approx(0.01 * 0.99**100, rel=1e-2)
    assert v[1] == pytest.approx(0.01, rel=1e-2)


# --- options and what they are resumed with ---------------------------------------------------------------------------


def test_reprs_and_settings():
    assert repr(FedAdam()) == "FedAdam(lr=1.0, beta1=0.9, beta2=0.99, tau=0.001)"
    assert repr(FedYogi(lr=1)) == "FedYogi(lr=1.0, beta1=0.9, beta2=0.99, tau=0.001)"
    assert repr(FedAdagrad()) == "FedAdagrad(lr=1.0, beta1=0.0, tau=0.001)"
    assert repr(FedAvgM()) == "FedAvgM(lr=1.0, momentum=0.9)"
    assert repr(Reptile(step_size=0.5)) == "Reptile(step_size=0.5)"
    assert repr(DiLoCo()) == "DiLoCo(lr=0.7, momentum=0.9)"
    assert repr(MAKERS["adamw"]()) == "TorchServerOptimizer(AdamW, lr=0.1, betas=(0.8, 0.95))"
    assert FedAdam().settings() == {"class": "FedAdam", "lr": 1.0, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    assert MAKERS["adamw"]().settings() == {
        "class": "TorchServerOptimizer",
        "optimizer": "torch.optim.adamw.AdamW",
        "options": {"lr": 0.1, "betas": [0.8, 0.95]},
    }


@EVERY
def test_settings_tell_optimizers_apart(make):
    mine = make().settings()
    assert json.loads(json.dumps(mine)) == mine
    assert make().settings() == mine
    assert sum(other().settings() == mine for other in MAKERS.values()) == 1
    assert isinstance(make(), ResumableServerOptimizer)


@EVERY
def test_the_memory_of_another_optimizer_is_refused(make):
    optimizer = make()
    optimizer.step(values(0), values(1))
    tensors, numbers = before = optimizer.state_dict()
    for other in MAKERS.values():
        stranger = other()
        if all(stranger.settings()[n] == v for n, v in optimizer.settings().items() if n in ("class", "optimizer")):
            continue
        stranger.step(values(0), values(1))
        with pytest.raises(ConfigError, match="Resume with the optimizer it began with"):
            optimizer.load_state_dict(*stranger.state_dict())
    name = next(iter(tensors), "m/w")
    for wrong in (
        (tensors, {}),
        (tensors, {**numbers, "more": 1}),
        ({**tensors, "noslash": torch.ones(1)}, numbers),
        ({**tensors, "/w": torch.ones(1)}, numbers),
        ({**tensors, name: torch.full((2,), math.nan)}, numbers),
    ):
        with pytest.raises(ConfigError, match=r"is not of|is no finite server optimizer state"):
            optimizer.load_state_dict(*wrong)
    assert_equal(optimizer.state_dict()[0], before[0])
    assert optimizer.state_dict()[1] == before[1]


def test_incomplete_memory_is_refused():
    optimizer = FedAdam()
    optimizer.step(values(0), values(1))
    tensors, numbers = optimizer.state_dict()
    for wrong in (
        {n: t for n, t in tensors.items() if n != "v/a"},
        {**tensors, "u/a": tensors["v/a"]},
        {**tensors, "v/a": torch.ones(1)},
    ):
        with pytest.raises(ConfigError, match=r"FedAdam keeps \('m', 'v'\) of one shape per tensor; of a came"):
            FedAdam().load_state_dict(wrong, numbers)
    with pytest.raises(ConfigError, match="Reptile keeps"):
        Reptile().load_state_dict({"m/w": torch.ones(1)}, {"class": "Reptile"})


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, 10**400, "0.1", None, True], ids=lambda v: f"{v!r:.9}")
@pytest.mark.parametrize(
    ("rule", "option"),
    [(r, "lr") for r in (FedAvgM, FedAdagrad, FedAdam, FedYogi, DiLoCo)]
    + [(r, "tau") for r in (FedAdagrad, FedAdam, FedYogi)]
    + [(Reptile, "step_size")],
)
def test_rates_that_are_none(rule, option, bad):
    said = "an integer of 1329 bits" if bad == 10**400 else repr(bad)
    with pytest.raises(ConfigError, match=f"{rule.__name__}: `{option}` is a number, positive and finite, got {said}"):
        rule(**{option: bad})


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.9", None, False])
@pytest.mark.parametrize(
    ("rule", "option"),
    [(FedAvgM, "momentum"), (DiLoCo, "momentum"), (FedAdagrad, "beta1")]
    + [(r, b) for r in (FedAdam, FedYogi) for b in ("beta1", "beta2")],
)
def test_decays_that_are_none(rule, option, bad):
    with pytest.raises(ConfigError, match=f"{rule.__name__}: `{option}` is a number, from 0 to below 1, got {bad!r}"):
        rule(**{option: bad})


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (FedAvgM, "lr, momentum"),
        (FedAdagrad, "beta1, lr, tau"),
        (FedAdam, "beta1, beta2, lr, tau"),
        (FedYogi, "beta1, beta2, lr, tau"),
        (Reptile, "step_size"),
        (DiLoCo, "lr, momentum"),
    ],
)
def test_options_are_given_by_name(rule, options):
    with pytest.raises(ConfigError, match=rf"^{rule.__name__} takes options by name, got 0\.1 .*Valid: {options}$"):
        rule(0.1)
    with pytest.raises(ConfigError, match=rf"^{rule.__name__}: unknown option `learning_rate`; .*Valid: {options}$"):
        rule(learning_rate=0.1)
    with pytest.raises(ConfigError, match=rf"unknown option `{options.split(', ')[0]}s`; did you mean"):
        from_settings({"class": rule.__name__, f"{options.split(', ')[0]}s": 0.1})


def test_an_optimizer_made_of_one_of_these_may_take_what_it_likes():
    class Halved(FedAvgM):
        def __init__(self, full):
            super().__init__(lr=full / 2, momentum=0.0)

    assert Halved(1.0).step({"w": torch.zeros(1)}, {"w": torch.ones(1)})["w"].tolist() == [0.5]
    assert copy.deepcopy(Halved(1.0)).lr == 0.5


class KeepsAcross(torch.optim.SGD):
    """Counts its steps for all parameters together, as schedule-free optimizers do."""

    def step(self, closure=None):
        super().step()
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (torch.optim.LBFGS, {}, "closure"),
        (torch.optim.SparseAdam, {}, "sparse|Sparse"),
        (torch.optim.SGD, {"lr": -1}, "Invalid learning rate: -1"),
        (torch.optim.SGD, {"rate": 0.1}, "rate"),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, "Nesterov"),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, "away from the participants"),
        (torch.optim.SGD, {"lr": torch.tensor(0.1)}, "JSON"),
        (torch.optim.SGD, {"lr": math.nan}, "JSON"),
        (KeepsAcross, {"lr": 0.1}, "state across tensors"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_torchs_that_cannot_work_are_refused_at_once(kind, options, reason):
    with pytest.raises(ConfigError, match=rf"TorchServerOptimizer\({kind.__name__}.* cannot step .*({reason})"):
        TorchServerOptimizer(kind, **options)


@pytest.mark.parametrize("kind", ["sgd", None, torch.nn.Linear, torch.optim.lr_scheduler.StepLR])
def test_what_is_no_torch_optimizer(kind):
    with pytest.raises(ConfigError, match=r"takes a torch\.optim class such as torch\.optim\.SGD, got"):
        TorchServerOptimizer(kind)


def test_torchs_that_cannot_take_these_tensors():
    """Muon is for matrices: it shows once a vector comes, and nothing has changed."""
    optimizer = TorchServerOptimizer(torch.optim.Muon, lr=0.1)
    matrix = {"w": torch.eye(3)}
    optimizer.step(matrix, matrix)
    before = optimizer.state_dict()[0]
    with pytest.raises(FederationError, match=r"Muon, lr=0.1\) failed \(ValueError"):
        optimizer.step({**matrix, "b": torch.ones(3)}, {**matrix, "b": torch.ones(3)})
    assert_equal(optimizer.state_dict()[0], before)


# --- the seam ---------------------------------------------------------------------------------------------------------


class Plain:
    """An object with step alone, written as if every round had all names."""

    def step(self, state, pseudo_gradient):
        return {n: state[n] + 0.5 * pseudo_gradient[n] for n in state}


@pytest.mark.parametrize("optimizer", [None, Plain(), Reptile(step_size=0.5), DiLoCo()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_aggregate_of_some_names_moves_those_alone(optimizer, dtype):
    state, mean = values(0, dtype), values(1, dtype)
    some = {n: mean[n] for n in ("scalar", "a")}
    after = apply(optimizer, state, some)
    assert list(after) == list(state)
    assert_equal({n: after[n] for n in state.keys() - some.keys()}, {n: state[n] for n in state.keys() - some.keys()})
    for name in some:
        assert after[name].dtype == dtype
        assert not torch.equal(after[name], state[name])
        if optimizer is None:
            assert torch.equal(after[name], mean[name])
        elif not isinstance(optimizer, DiLoCo):
            halfway = (state[name].double() + mean[name].double()) / 2
            torch.testing.assert_close(after[name].double(), halfway, rtol=1e-2, atol=1e-2)


def test_names_and_shapes_that_do_not_fit_are_refused():
    for optimizer in (None, Plain(), FedAdam()):
        with pytest.raises(FederationError, match=r"1 tensors \['x'\] are not in the global weights"):
            apply(optimizer, values(0), values(1) | {"x": torch.ones(1)})
        with pytest.raises(FederationError, match=r"b has shape \(1,\), the global weights' is \(5,\)"):
            apply(optimizer, values(0), values(1) | {"b": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda moved: {n: t for n, t in moved.items() if n != "a"}, r"lacks 1 tensors \['a'\]"),
        (lambda moved: moved | {"x": torch.ones(1)}, r"adds 1 \['x'\]"),
    ],
)
def test_a_step_that_returns_other_names_is_refused(change, reason):
    class Wrong(Plain):
        def step(self, state, pseudo_gradient):
            return change(super().step(state, pseudo_gradient))

    with pytest.raises(FederationError, match=reason):
        apply(Wrong(), values(0), values(1))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda state: None, r"returned NoneType\. It must return a mapping of names to tensors"),
        (lambda state: list(state.values()), "returned list"),
        (lambda state: {n: v.numpy() for n, v in state.items()}, "returned ndarray for 'a'. Make it a torch.Tensor"),
    ],
)
def test_a_step_that_returns_no_tensors_is_refused(answer, reason):
    class Wrong:
        def step(self, state, pseudo_gradient):
            return answer(state)

    with pytest.raises(FederationError, match=rf"the step of .*{reason}"):
        apply(Wrong(), values(0), values(1))


class InPlace:
    """Writes into what it is given, as torch's own optimizers do."""

    def step(self, state, pseudo_gradient):
        for name, value in state.items():
            value.add_(pseudo_gradient[name])
        return dict(state)


class InPlaceAndResumable(FedAvgM):
    step = InPlace.step


@pytest.mark.parametrize("optimizer", [InPlace(), InPlaceAndResumable()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_place_moves_the_result_and_not_what_a_failed_round_goes_back_to(optimizer, dtype):
    state, mean = values(0, dtype), values(1, dtype)
    after = apply(optimizer, state, mean)
    assert_equal(state, values(0, dtype))
    for name in mean:
        torch.testing.assert_close(after[name], mean[name], rtol=1e-2, atol=1e-2)


def test_what_can_be_passed():
    check(None)
    check(Plain())
    for make in MAKERS.values():
        check(make())
    for wrong in ("adam", 3, torch.nn.Linear, object()):
        with pytest.raises(ConfigError, match=re.escape("object with step(state, pseudo_gradient), got")) as told:
            check(wrong)
        for kind in (FedAvgM, FedAdagrad, FedAdam, FedYogi, Reptile, DiLoCo, TorchServerOptimizer):
            assert f"{kind.__name__}(" in str(told.value)
    for kind in (FedAdam, DiLoCo, Plain):
        with pytest.raises(ConfigError, match=rf"is a class, not an object\. Call it: {kind.__name__}\(…\)\."):
            check(kind)
    with pytest.raises(ConfigError, match=r"is a class.*Pass TorchServerOptimizer\(torch\.optim\.SGD, …\)"):
        check(torch.optim.SGD)
    with pytest.raises(ConfigError, match=r"Pass TorchServerOptimizer\(torch\.optim\.Adam, …\)"):
        check(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]))


def test_the_order_of_names_does_not_matter():
    for make in MAKERS.values():
        one_way, other_way, state = make(), make(), values(0)
        for seed in range(1, 4):
            delta = values(seed)
            names = list(delta)
            random.Random(seed).shuffle(names)
            moved = one_way.step(state, delta)
            mixed = other_way.step(dict(reversed(state.items())), {n: delta[n] for n in names})
            assert_equal(moved, {n: mixed[n] for n in moved})
            state = moved


@pytest.mark.parametrize(
    "settings",
    [
        {"class": ["FedAdam"]},
        {"class": {"FedAdam": 1}},
        {"class": None},
        {},
        [],
        None,
        "x" * 100_000,
        {"class": "TorchServerOptimizer"},
        {"class": "TorchServerOptimizer", "optimizer": ["torch.optim.sgd.SGD"], "options": {}},
        {"class": "TorchServerOptimizer", "optimizer": "os.system", "options": {}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.lr_scheduler", "options": {}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": []},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {"optimizer": 1}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {"self": 1}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {"lr": {"a": 1}}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {"lr": "0.1"}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {1: 2}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.adam.Adam", "options": {"betas": [[0.9], 0.9]}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.adam.Adam", "options": {"betas": [0.9] * 1000}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {"lr": 10**400}},
        {"class": "TorchServerOptimizer", "optimizer": "torch.optim.sgd.SGD", "options": {}, "more": 1},
        {"class": "FedAdam", "lr": 10**5000},
        {"class": "FedAdam", "lr": [0.1]},
        {"class": "FedAdam", "lr": {"a": [1]}},
        {"class": "FedAdam", "lr": float("nan")},
        {"class": "FedAdam", "self": 1},
        {"class": "FedAdam", "rate": 1},
        {"class": "FedAdam", 3: 1},
        {"class": "DiLoCo", "momentum": "\ud800"},
        {"class": "FedAdam", "lr": "\x1b[2J" * 5},
    ],
    ids=range(30),
)
def test_settings_from_elsewhere_are_an_optimizer_or_one_error(settings):
    with pytest.raises(ConfigError) as error:
        from_settings(settings)
    assert len(str(error.value)) < 700
    assert printable(str(error.value)) == str(error.value)
