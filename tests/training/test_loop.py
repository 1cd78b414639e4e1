"""train_locally and evaluate_locally against plain torch loops written out here.

Belongs here: one participant's training. Does not: the loss of a batch (test_loss), rounds (test_invariants).
"""

import math
import random

import pytest
import torch
from tiny import PAIRS, lora_config, tiny_module
from torch.utils.data import DataLoader, Dataset, IterableDataset

from llmchain_fed import LocalModel, TrainingConfig, evaluate_locally, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import (
    ConfigError,
    DataError,
    EmptyParticipantError,
    NonFiniteLossError,
    NotTrainableError,
    UnsupportedModelError,
)
from llmchain_fed.training import trainable as door

FEW = PAIRS[:4]


def full_batch(chain, pairs=FEW):
    """All examples in one batch: the order cannot matter but to rounding."""
    encoded = encode_examples(pairs, chain.model, chain)
    return collate([encoded[i] for i in range(len(encoded))], chain.model)


def trainable(model):
    return {n: p for n, p in model.module.named_parameters() if p.requires_grad}


def states(model):
    return {n: p.detach().clone() for n, p in trainable(model).items()}


def plain_loop(chain, steps, make_optimizer, *, mu=0.0, clip=None, pairs=FEW):
    """What a user would write: the module's own mean loss, backward, step."""
    module, parameters = chain.model.module, trainable(chain.model)
    start = states(chain.model)
    optimizer = make_optimizer(list(parameters.values()))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(**full_batch(chain, pairs)).loss
        losses.append(float(loss.detach()))
        for name, parameter in parameters.items():
            if mu:
                loss = loss + mu / 2 * ((parameter - start[name]) ** 2).sum()
        loss.backward()
        if clip is not None:
            norm = math.sqrt(
                sum(float((p.grad.double() ** 2).sum()) for p in parameters.values() if p.grad is not None)
            )
            for parameter in parameters.values():
                if parameter.grad is not None and norm > clip:
                    parameter.grad *= clip / norm
        optimizer.step()
    return losses, states(chain.model)


def assert_same(got, wanted, *, rtol=1e-4, atol=1e-6):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=rtol, atol=atol, msg=name)


def assert_follows(make, config, steps, make_optimizer, **options):
    ours, theirs = make(), make()
    start = states(ours.model)
    result = train_locally(ours.model, FEW, config, prompt=ours)
    losses, wanted = plain_loop(theirs, steps, make_optimizer, **options)
    assert result.steps == steps == len(result.losses)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.loss == pytest.approx(sum(losses) / steps, rel=1e-4)
    assert any(not torch.equal(wanted[n], start[n]) for n in start)
    assert_same(states(ours.model), wanted)


@pytest.mark.parametrize("steps", [1, 3])
def test_sgd_follows_a_plain_loop(steps, battery):
    config = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4, epochs=steps)
    assert_follows(battery, config, steps, lambda p: torch.optim.SGD(p, lr=0.05))


OPTIMIZERS = {
    "adamw by name": ({"optimizer": "adamw", "learning_rate": 1e-3}, lambda p: torch.optim.AdamW(p, lr=1e-3)),
    "adam by class": ({"optimizer": torch.optim.Adam, "learning_rate": 1e-3}, lambda p: torch.optim.Adam(p, lr=1e-3)),
    "the default": ({}, lambda p: torch.optim.AdamW(p, lr=2e-4)),
    "weight decay": (
        {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.3},
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.3),
    ),
    "decay in sgd": (
        {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    ),
    "an instance": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.05, momentum=0.9, nesterov=True)},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "an instance, another rate": (
        {"optimizer": torch.optim.Adam([torch.zeros(1)], lr=9.0, betas=(0.5, 0.6)), "learning_rate": 1e-3},
        lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.6)),
    ),
    "any class of torch": (
        {"optimizer": torch.optim.Adagrad, "learning_rate": 1e-2},
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_every_way_to_name_an_optimizer(case, make_chain):
    options, make_optimizer = OPTIMIZERS[case]
    # adaptive optimizers divide by the gradient's size: entries of size 0 would show only rounding, hence LoRA
    assert_follows(lambda: make_chain(lora=True), TrainingConfig(batch_size=4, epochs=3, **options), 3, make_optimizer)


def test_a_template_is_only_read(make_chain):
    chain = make_chain()
    template = torch.optim.Adam(chain.model.parameters(), lr=1e-3)
    train_locally(chain.model, FEW, TrainingConfig(optimizer=template, batch_size=2), prompt=chain)
    assert template.state_dict()["state"] == {}


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clipping_scales_the_gradient_to_the_norm(share, battery):
    """w − lr · g · min(1, c / ‖g‖), the norm taken over all tensors together."""
    chain = battery()
    chain.model.module(**full_batch(chain)).loss.backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in trainable(chain.model).values()))
    config = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4, max_grad_norm=share * norm)
    assert_follows(battery, config, 1, lambda p: torch.optim.SGD(p, lr=0.05), clip=share * norm)
    if share < 1:
        ours = battery()
        before = states(ours.model)
        train_locally(ours.model, FEW, config, prompt=ours)
        after = states(ours.model)
        moved = math.sqrt(sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in before))
        assert moved == pytest.approx(0.05 * share * norm, rel=1e-3)


def test_the_proximal_term_is_fedprox(battery):
    """Two SGD steps: w1 = w0 − lr·g(w0);  w2 = w1 − lr·(g(w1) + mu·(w1 − w0))."""
    lr, mu = 0.05, 3.0
    chain = battery()
    w0 = states(chain.model)
    result = train_locally(
        chain.model,
        FEW,
        TrainingConfig(optimizer="sgd", learning_rate=lr, batch_size=4, epochs=2, proximal_mu=mu),
        prompt=chain,
    )
    by_hand = battery()
    for _ in range(2):
        by_hand.model.module.zero_grad()
        by_hand.model.module(**full_batch(by_hand)).loss.backward()
        with torch.no_grad():
            for name, p in trainable(by_hand.model).items():
                p -= lr * (p.grad + mu * (p - w0[name]))
    assert_same(states(chain.model), states(by_hand.model))
    without = battery()
    train_locally(
        without.model, FEW, TrainingConfig(optimizer="sgd", learning_rate=lr, batch_size=4, epochs=2), prompt=without
    )
    free, pulled = states(without.model), states(chain.model)
    assert sum(float(((pulled[n] - w0[n]) ** 2).sum()) for n in w0) < sum(
        float(((free[n] - w0[n]) ** 2).sum()) for n in w0
    )
    assert result.losses[0] == pytest.approx(math.fsum(result.losses[:1]))  # the loss reported is that of the data


def test_the_proximal_term_agrees_with_autograd(make_chain):
    config = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4, epochs=4, proximal_mu=2.0)
    assert_follows(make_chain, config, 4, lambda p: torch.optim.SGD(p, lr=0.05), mu=2.0)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_make_the_same_step(micro, battery):
    """The mean over all tokens of the step, not the mean of the micro-batches' means."""
    results = []
    for size in (None, micro):
        chain = battery()
        config = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4, epochs=2, micro_batch_size=size)
        results.append((train_locally(chain.model, FEW, config, prompt=chain).losses, states(chain.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


# --- which batches -------------------------------------------------------------------------------------------------


class Watched(LocalModel):
    """Notes the completions that each forward pass in training saw."""

    def watch(self):
        seen = []

        def note(_module, _args, kwargs):
            if self.module.training:
                rows = kwargs["input_ids"].tolist()
                seen.append(tuple(sorted(tuple(i for i in row if i != 0) for row in rows)))

        # the decoder is what every path goes through
        self.handle = self.module.model.register_forward_pre_hook(note, with_kwargs=True)
        return seen


@pytest.fixture
def watched(make_model):
    def make():
        model = make_model()
        door.admit(model)  # its trial passes are no steps
        model.__class__ = Watched
        return model, model.watch()

    return make


def train_some(model, **options):
    config = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 1e-3} | options.pop("config", {})
    return train_locally(model, PAIRS[:10], TrainingConfig(**config), **options)


def test_an_epoch_sees_every_example_once(watched):
    model, seen = watched()
    result = train_some(model, config={"epochs": 2})
    assert result.steps == len(seen) == 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(len(b) for b in epoch) == [1, 3, 3, 3]
        assert len({row for batch in epoch for row in batch}) == 10
    assert set(seen[:4]) != set(seen[4:])
    assert (result.examples, result.next_step, result.report.used) == (10, 8, 10)


def test_max_steps_walk_on_through_the_data(watched):
    """Three calls of 3, 4 and 5 steps see the batches of one call of 12, whatever the rounds are called."""
    model, whole = watched()
    train_some(model, config={"max_steps": 12})
    model, parts = watched()
    step = 0
    for round_number, steps in enumerate((3, 4, 5)):
        result = train_some(model, config={"max_steps": steps}, first_step=step, round=7 * round_number)
        assert result.steps == steps
        step = result.next_step
    assert step == 12
    assert parts == whole
    for start in (0, 4, 8):  # each pass covers the data
        assert len({row for batch in whole[start : start + 4] for row in batch}) == 10
    assert set(whole[:4]) != set(whole[4:8])


def test_rounds_and_participants_draw_orders_of_their_own(watched):
    orders = []
    for options in ({}, {"round": 1}, {"participant": "b"}, {"config": {"seed": 1}}):
        model, seen = watched()
        train_some(model, **options)
        orders.append(tuple(seen))
    assert len(set(orders)) == 4


@pytest.mark.parametrize("options", [{"epochs": 2}, {"max_steps": 3}])
def test_a_rerun_is_bit_identical_and_global_generators_untouched(options, battery):
    def run():
        chain = battery()
        config = TrainingConfig(learning_rate=1e-2, batch_size=3, **options)
        result = train_locally(chain.model, PAIRS, config, prompt=chain, participant="p", round=2)
        return result.losses, states(chain.model)

    torch.manual_seed(1)
    random.seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    first = run()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(2)
    random.seed(2)
    second = run()
    assert first[0] == second[0]
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_dropout_is_active_and_follows_the_round(make_chain):
    """Equal batches (all examples in one): only dropout can make the losses differ."""
    losses = []
    for dropout, round_number in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1)):
        chain = make_chain(lora=lora_config(lora_dropout=dropout))
        config = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=1e-6)
        losses.append(train_locally(chain.model, FEW, config, prompt=chain, round=round_number).loss)
        assert not chain.model.module.training
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_the_optimizer_is_fresh_or_kept_as_asked(make_chain):
    """Adam's state carried over two calls equals one uninterrupted loop; a fresh one does not."""
    config = TrainingConfig(optimizer="adam", learning_rate=1e-3, batch_size=4, epochs=2, keep_optimizer=True)
    chain, whole, fresh = (make_chain(lora=True) for _ in range(3))
    first = train_locally(chain.model, FEW, config, prompt=chain)
    kept = {k: v.clone() for k, v in first.optimizer_state["state"][0].items()}
    train_locally(chain.model, FEW, config, prompt=chain, optimizer_state=first.optimizer_state)
    _, wanted = plain_loop(whole, 4, lambda p: torch.optim.Adam(p, lr=1e-3))
    assert_same(states(chain.model), wanted)
    # what was handed in can be handed in again: after a failed round it is
    assert all(torch.equal(v, kept[k]) for k, v in first.optimizer_state["state"][0].items())
    for _ in range(2):
        assert (
            train_locally(fresh.model, FEW, config.replace(keep_optimizer=False), prompt=fresh).optimizer_state is None
        )
    assert any(not torch.allclose(states(fresh.model)[n], wanted[n], rtol=1e-4, atol=1e-5) for n in wanted)


# --- ready tensors ---------------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, encoded):
        self.encoded = encoded

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, i):
        return self.encoded[i]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def loader_of(chain, pairs=PAIRS, *, stream=False, **options):
    encoded = encode_examples(pairs, chain.model, chain)
    rows = Stream([encoded[i] for i in range(len(encoded))]) if stream else Rows(encoded)
    return DataLoader(rows, collate_fn=lambda rows: collate(rows, chain.model), **({"batch_size": 4} | options))


def test_a_dataloader_is_used_as_it_is(battery):
    chain, by_hand = battery(), battery()
    config = TrainingConfig(optimizer="sgd", learning_rate=0.05, epochs=2)
    result = train_locally(chain.model, loader_of(chain, PAIRS[:6]), config)
    optimizer = torch.optim.SGD(trainable(by_hand.model).values(), lr=0.05)
    for _ in range(2):
        for pairs in (PAIRS[:4], PAIRS[4:6]):
            optimizer.zero_grad()
            by_hand.model.module(**full_batch(by_hand, pairs)).loss.backward()
            optimizer.step()
    assert_same(states(chain.model), states(by_hand.model))
    tokens = int((full_batch(by_hand, PAIRS[:6])["labels"] != -100).sum())
    assert (result.steps, result.examples, result.tokens) == (4, 6, tokens)
    assert (result.report.used, result.report.completion_tokens) == (6, tokens)


@pytest.mark.parametrize(("steps", "stream"), [(3, False), (6, False), (1, False), (3, True)])
def test_steps_over_a_dataloader_count_what_it_has(steps, stream, make_chain):
    """n_k is what a participant has, not what it consumed: twice through the data is not twice the data."""
    chain = make_chain()
    result = train_locally(
        chain.model, loader_of(chain, PAIRS, stream=stream), TrainingConfig(max_steps=steps, optimizer="sgd")
    )
    assert (result.steps, result.examples) == (steps, 12)


def test_steps_over_a_dataloader_walk_on(watched):
    model, seen = watched()
    encoded = encode_examples(PAIRS, model)
    loader = DataLoader(Rows(encoded), batch_size=4, collate_fn=lambda rows: collate(rows, model))
    step = 0
    for round_number in range(3):
        step = train_locally(
            model, loader, TrainingConfig(max_steps=2, optimizer="sgd"), round=round_number, first_step=step
        ).next_step
    assert len(seen) == 6
    assert len(set(seen[:3])) == 3
    assert seen[:3] == seen[3:]


def test_shuffling_in_a_dataloader_follows_the_seed(watched):
    orders = []
    for round_number in (0, 0, 1):
        model, seen = watched()
        encoded = encode_examples(PAIRS, model)
        loader = DataLoader(
            Rows(encoded), batch_size=4, shuffle=True, collate_fn=lambda rows, m=model: collate(rows, m)
        )
        train_locally(model, loader, TrainingConfig(optimizer="sgd"), round=round_number)
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("options", [{}, {"max_steps": 3}])
def test_an_empty_dataloader_is_an_empty_participant(options, make_chain):
    chain = make_chain()
    with pytest.raises(EmptyParticipantError, match="DataLoader gave no batch"):
        train_locally(chain.model, DataLoader([]), TrainingConfig(**options))
    with pytest.raises(EmptyParticipantError):
        evaluate_locally(chain.model, DataLoader([]))


def test_a_dataloader_without_a_single_label_is_an_empty_participant(make_chain):
    chain = make_chain()
    batch = full_batch(chain)
    loader = DataLoader([{**batch, "labels": torch.full_like(batch["labels"], -100)}], batch_size=None)
    before = states(chain.model)
    for work in (train_locally, evaluate_locally):
        with pytest.raises(EmptyParticipantError):
            work(chain.model, loader)
    assert all(torch.equal(v, before[n]) for n, v in states(chain.model).items())


def test_a_dataloader_of_something_else_is_refused(make_chain):
    chain = make_chain()
    loader = DataLoader([torch.ones(3, dtype=torch.int64)])
    for work in (train_locally, evaluate_locally):
        with pytest.raises(DataError, match=r"mapping of the tensors input_ids.*collate_fn"):
            work(chain.model, loader)


# --- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_nan_loss_leaves_the_weights_as_before(battery):
    chain = battery()
    before = states(chain.model)
    config = TrainingConfig(optimizer="sgd", learning_rate=1e30, batch_size=4, epochs=5)
    with pytest.raises(NonFiniteLossError, match=r"'me' became (nan|inf) at step \d of round 4.*learning rate"):
        train_locally(chain.model, PAIRS, config, prompt=chain, participant="me", round=3)
    assert all(torch.equal(v, before[n]) for n, v in states(chain.model).items())
    assert not chain.model.module.training


def test_an_interruption_leaves_the_weights_as_before(battery, monkeypatch):
    chain = battery()
    before = states(chain.model)
    calls = []

    def interrupt(_module, _args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = chain.model.module.get_output_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_locally(chain.model, PAIRS, TrainingConfig(batch_size=2, learning_rate=1e-2), prompt=chain)
    handle.remove()
    assert len(calls) == 4
    assert all(torch.equal(v, before[n]) for n, v in states(chain.model).items())
    assert not chain.model.module.training


class Normed(torch.nn.Module):
    """A module with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, x, labels):
        return type("Output", (), {"loss": torch.nn.functional.cross_entropy(self.norm(x), labels)})


def normed_rows():
    torch.manual_seed(0)
    return [{"x": torch.randn(2) + 5, "labels": torch.tensor(i % 2)} for i in range(6)]


def test_running_statistics_are_refused(make_chain):
    """They would differ at every participant, and only trainable parameters travel."""
    module = Normed()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"norm \(BatchNorm1d\).*get_submodule\('norm'\).eval"):
        train_locally(LocalModel(module), DataLoader(normed_rows(), batch_size=3), TrainingConfig(learning_rate=0.1))
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_frozen_statistics_stay_frozen_while_the_rest_is_trained(make_chain):
    """With the remedy of the message, in every later call too, and equal to torch's own loop over a frozen norm."""
    module = Normed()
    module.norm.running_mean += 4.0
    module.norm.running_var *= 2.0
    start = {n: t.clone() for n, t in module.state_dict().items()}
    module.train()
    module.get_submodule("norm").eval()
    config = TrainingConfig(learning_rate=0.1, optimizer="sgd", epochs=1)
    model = LocalModel(module)
    for _ in range(2):
        train_locally(model, DataLoader(normed_rows(), batch_size=6), config)
    weight, bias = (start[f"norm.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
    x = torch.stack([row["x"] for row in normed_rows()])
    y = torch.stack([row["labels"] for row in normed_rows()])
    for _ in range(2):
        logits = (x - start["norm.running_mean"]) / (start["norm.running_var"] + 1e-5).sqrt() * weight + bias
        slopes = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), (weight, bias))
        weight, bias = ((p - 0.1 * g).detach().requires_grad_() for p, g in zip((weight, bias), slopes, strict=True))
    torch.testing.assert_close(module.norm.weight, weight)
    torch.testing.assert_close(module.norm.bias, bias)
    assert all(torch.equal(b, start[n]) for n, b in module.named_buffers())


def test_an_empty_participant_says_what_became_of_its_examples(make_chain):
    chain = make_chain()
    for source, why in (([], "used=0"), ([("a", "")], "empty=1"), ([("page " * 200, "b")], "too_long=1")):
        with pytest.raises(EmptyParticipantError, match=why):
            train_locally(chain.model, source, prompt=chain)
        with pytest.raises(EmptyParticipantError, match=why):
            evaluate_locally(chain.model, source, prompt=chain)


def test_a_frozen_model_is_refused(make_model):
    model = make_model()
    model.module.requires_grad_(requires_grad=False)
    with pytest.raises(NotTrainableError, match="LoraConfig"):
        train_locally(model, PAIRS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"epochs": 1, "max_steps": 2}, "not both"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"max_steps": -1}, "max_steps"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"proximal_mu": -0.1}, "proximal_mu"),
        ({"proximal_mu": float("nan")}, "proximal_mu"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": "adamax"}, r"\['adam', 'adamw', 'sgd'\]"),
        ({"optimizer": 3}, "torch.optim class"),
        ({"optimizer": torch.nn.Linear}, "torch.optim class"),
        ({"learning_rat": 0.1}, "did you mean `learning_rate`"),
        (
            {"optimizer": torch.optim.SGD([{"params": torch.zeros(1)}, {"params": torch.ones(1), "lr": 2.0}], lr=1.0)},
            "2 parameter groups",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainingConfig(**options)


def test_a_config_is_frozen_and_replaced_with_the_same_checks():
    config = TrainingConfig(learning_rate=1e-3, max_steps=4)
    with pytest.raises(Exception, match="frozen"):
        config.max_steps = 5
    assert config.replace(max_steps=2) == TrainingConfig(learning_rate=1e-3, max_steps=2)
    with pytest.raises(ConfigError, match="not both"):
        config.replace(epochs=1)
    with pytest.raises(ConfigError, match="unknown option"):
        config.replace(max_step=1)


def test_an_optimizer_that_takes_no_weight_decay_says_so(make_chain):
    chain = make_chain()
    config = TrainingConfig(optimizer=torch.optim.Rprop, weight_decay=0.1)
    with pytest.raises(ConfigError, match="Rprop takes no weight_decay"):
        train_locally(chain.model, FEW, config, prompt=chain)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_evaluation_is_the_mean_over_all_tokens(batch_size, battery):
    """Σ over tokens / tokens, with batches of unequal token counts; not a mean of batch means."""
    chain = battery()
    before = states(chain.model)
    result = evaluate_locally(chain.model, PAIRS, prompt=chain, batch_size=batch_size)
    total, tokens = 0.0, 0
    for pair in PAIRS:
        batch = full_batch(chain, [pair])
        with torch.no_grad():
            logits = chain.model.module(**batch).logits[0].double()
        labels = batch["labels"][0]
        if battery.kind == "causal":
            logits, labels = logits[:-1], labels[1:]
        for row, label in zip(logits, labels, strict=True):
            if label != -100:
                total += float(torch.logsumexp(row, 0) - row[label])
                tokens += 1
    assert (result.tokens, result.examples) == (tokens, 12)
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert all(torch.equal(v, before[n]) for n, v in states(chain.model).items())
    assert all(p.grad is None for p in chain.model.parameters())


def test_evaluation_of_a_dataloader_passes_over_batches_without_labels(make_chain):
    chain = make_chain()
    batch = full_batch(chain)
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    result = evaluate_locally(chain.model, DataLoader([silent, batch, silent], batch_size=None))
    assert result.loss == pytest.approx(evaluate_locally(chain.model, FEW, prompt=chain).loss, rel=1e-6)


def test_a_row_without_labels_is_no_example(battery):
    """n_k counts no row of −100 alone, nor one with a label on a decoder's first token, which nothing predicts."""
    chain = battery()
    batch = full_batch(chain)
    labels = batch["labels"].clone()
    labels[0], count = -100, len(labels) - 1
    if battery.kind == "causal":
        labels[1], count = -100, count - 1
        labels[1, 0] = batch["input_ids"][1, 0]
    loader = DataLoader([{**batch, "labels": labels}], batch_size=None)
    assert evaluate_locally(chain.model, loader).examples == count
    result = train_locally(chain.model, loader, TrainingConfig(epochs=2))
    assert (result.examples, result.tokens) == (count, int((labels[len(labels) - count :] != -100).sum()))


def test_evaluation_is_without_dropout_and_restores_the_mode(make_chain):
    chain = make_chain(lora=lora_config(lora_dropout=0.5))
    chain.model.module.train()
    assert len({evaluate_locally(chain.model, FEW, prompt=chain).loss for _ in range(3)}) == 1
    assert chain.model.module.training


def test_training_lowers_the_loss_it_reports(battery):
    """End to end: the loss before, as evaluate_locally measures it, is the first step's loss."""
    chain = battery()
    before = evaluate_locally(chain.model, PAIRS, prompt=chain).loss
    config = TrainingConfig(learning_rate=0.1 if battery.lora else 1e-2, batch_size=12, epochs=6)
    result = train_locally(chain.model, PAIRS, config, prompt=chain)
    after = evaluate_locally(chain.model, PAIRS, prompt=chain).loss
    assert result.losses[0] == pytest.approx(before, rel=1e-5)
    assert after < result.losses[-1] < before


def test_training_from_final_text_needs_no_chain(make_chain, tokenizer):
    chain, alone = make_chain(), LocalModel(tiny_module("causal", len(tokenizer)), tokenizer)
    config = TrainingConfig(learning_rate=1e-2, batch_size=4)
    train_locally(chain.model, FEW, config, prompt=chain)
    train_locally(alone, [(chain.render(t), c) for t, c in FEW], config)
    assert all(torch.equal(v, states(chain.model)[n]) for n, v in states(alone).items())
