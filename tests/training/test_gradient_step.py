"""GradientStep: a step of somebody's own, outside the package, against plain torch.

Belongs here: how a batch becomes a gradient. Does not: the package's own step (test_loop), draws (test_batch_sampler).
"""

import math

import pytest
import torch
from tiny import PAIRS, lora_config
from torch.utils.data import DataLoader

from llmchain_fed import ConfigError, DataError, FederatedAveraging, TrainingConfig, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import CheckpointError
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.training.gradient_step import StepResult
from llmchain_fed.training.loop import mean_loss_gradient
from llmchain_fed.training.loss import summed_loss

LR = 0.05


class ClippedPerExample:
    """Σ g_i · min(1, c / ‖g_i‖) / batch size, plus noise: one gradient per example, none larger than c."""

    def __init__(self, clip, *, noise=0.0, seed=0):
        self.clip, self.noise = clip, noise
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model, batch, config):
        parameters = list(model.trainable_parameters().values())
        sums = [torch.zeros_like(p) for p in parameters]
        loss, tokens, examples = 0.0, 0, 0
        for one in batch.passes(model, 1):
            if len(one["labels"]) != 1:
                raise DataError("this batch cannot be taken apart into examples.")
            summed, count = summed_loss(model.module, one)
            grads = torch.autograd.grad(summed / count, parameters)
            norm = torch.sqrt(sum((g * g).sum() for g in grads))
            for total, grad in zip(sums, grads, strict=True):
                total.add_(grad * torch.clamp(self.clip / norm, max=1.0))
            loss, tokens, examples = loss + float(summed.detach()), tokens + count, examples + 1
        for parameter, total in zip(parameters, sums, strict=True):
            drawn = torch.randn(total.shape, generator=self.generator) * self.noise
            parameter.grad = (total + drawn) / config.batch_size
        return StepResult(loss / tokens if tokens else 0.0, tokens, examples)


def states(model):
    return {n: p.detach().clone() for n, p in model.module.named_parameters() if p.requires_grad}


def clipped_sum(chain, pairs, clip=math.inf):
    """What an outsider computes: every example alone through the module's own loss; the sum, norms, tokens and loss."""
    module, sums, norms, loss, tokens = chain.model.module, {}, [], 0.0, 0
    encoded = encode_examples(pairs, chain.model, chain)
    for i in range(len(encoded)):
        module.zero_grad()
        batch = collate([encoded[i]], chain.model)
        count = int((batch["labels"] != -100).sum())
        mean = module(**batch).loss
        mean.backward()
        grads = {n: p.grad.double().clone() for n, p in module.named_parameters() if p.requires_grad}
        norms.append(sum(float((g**2).sum()) for g in grads.values()) ** 0.5)
        for name, grad in grads.items():
            sums[name] = sums.get(name, 0.0) + grad * min(1.0, clip / norms[-1])
        loss, tokens = loss + float(mean.detach()) * count, tokens + count
    module.zero_grad()
    return sums, norms, loss, tokens


def test_a_clipped_step_per_example_is_an_outsiders_clipped_mean(battery):
    """w − lr · Σ clip(g_i) / B after one step of SGD, for every kind of model."""
    chain, theirs = battery(), battery()
    pairs = PAIRS[:5]
    clip = sorted(clipped_sum(theirs, pairs)[1])[2]  # two of the five are longer
    sums, _, loss, tokens = clipped_sum(theirs, pairs, clip)
    start = states(chain.model)
    config = TrainingConfig(optimizer="sgd", learning_rate=LR, batch_size=5)
    result = train_locally(chain.model, pairs, config, prompt=chain, gradient_step=ClippedPerExample(clip))
    for name, now in states(chain.model).items():
        wanted = start[name].double() - LR * sums[name] / 5
        torch.testing.assert_close(now.double(), wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert (result.steps, result.tokens, result.examples) == (1, tokens, 5)
    assert result.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_an_empty_batch_is_a_step_of_noise_alone(make_chain):
    """Poisson draws may be empty, and a mechanism's noise is added all the same: w − lr · (z1 + z2 + z3) / B."""
    chain = make_chain(lora=lora_config())
    start = states(chain.model)
    config = TrainingConfig(optimizer="sgd", learning_rate=LR, batch_size=4)
    result = train_locally(
        chain.model,
        PAIRS,
        config,
        prompt=chain,
        gradient_step=ClippedPerExample(1.0, noise=0.3, seed=7),
        batch_sampler=lambda *_: [[], [], []],
    )
    generator = torch.Generator().manual_seed(7)
    wanted = start
    for _ in range(3):
        wanted = {n: w - LR * 0.3 * torch.randn(w.shape, generator=generator) / 4 for n, w in wanted.items()}
    now = states(chain.model)
    assert all(torch.allclose(now[n], wanted[n], rtol=1e-5, atol=1e-7) for n in wanted)
    assert (result.steps, result.losses, result.loss, result.next_step, result.examples) == (3, [], 0.0, 3, 12)


def test_an_empty_batch_leaves_the_weights_alone_in_the_packages_own_step(make_chain):
    chain = make_chain()
    start = states(chain.model)
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, proximal_mu=0.5, max_grad_norm=1.0)
    result = train_locally(chain.model, PAIRS, config, prompt=chain, batch_sampler=lambda *_: [[]])
    assert all(torch.equal(t, start[n]) for n, t in states(chain.model).items())
    assert (result.steps, result.losses) == (1, [])


def test_proximal_term_and_clipping_come_after_somebodys_step(make_chain):
    """One SGD step from an anchor of zeros: w − lr · h · min(1, c / ‖h‖) with h = 1 + mu · w, all entries together."""
    chain = make_chain(lora=True)
    start = states(chain.model)

    def ones(model, batch, _config):
        for parameter in model.trainable_parameters().values():
            assert parameter.grad is None
            parameter.grad = torch.ones_like(parameter)
        return StepResult(1.0, 1, len(batch.rows))

    config = TrainingConfig(optimizer="sgd", learning_rate=LR, batch_size=12, proximal_mu=2.0, max_grad_norm=3.0)
    anchor = {n: torch.zeros_like(p) for n, p in chain.model.trainable_parameters().items()}
    train_locally(chain.model, PAIRS, config, prompt=chain, anchor=anchor, gradient_step=ones)
    slopes = {n: 1 + 2.0 * w.double() for n, w in start.items()}
    norm = sum(float((s**2).sum()) for s in slopes.values()) ** 0.5
    assert norm > 3.0
    for name, now in states(chain.model).items():
        wanted = start[name].double() - LR * slopes[name] * 3.0 / norm
        torch.testing.assert_close(now.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_packages_own_step_says_the_sum_and_the_tokens(battery):
    chain = battery()
    said = []

    def watched(model, batch, config):
        said.append(mean_loss_gradient(model, batch, config))
        return said[-1]

    _, _, loss, tokens = clipped_sum(battery(), PAIRS[:4])
    config = TrainingConfig(batch_size=4, micro_batch_size=3)
    train_locally(chain.model, PAIRS[:4], config, prompt=chain, gradient_step=watched)
    assert [(s.tokens, s.examples) for s in said] == [(tokens, 4)]
    assert said[0].loss * said[0].tokens == pytest.approx(loss, rel=1e-5)


# --- through a federation ---------------------------------------------------------------------------------------------

SHARES = {"a": PAIRS[:5], "b": PAIRS[5:8]}
ONE_STEP = TrainingConfig(optimizer="sgd", learning_rate=LR, batch_size=5)


def first_two(examples, config, place):
    """A draw of one's own: one batch, of the first two examples."""
    return [[0, 1]]


def federation(chain, participants=SHARES, **options):
    return FederatedAveraging(
        chain, participants=participants, **{"training": ONE_STEP, "progress": False, "samples": 0} | options
    )


@pytest.mark.parametrize("how", ["fit", "train and step"])
@pytest.mark.parametrize("draw", [None, first_two])
def test_each_participant_takes_it_and_draws_as_told(how, draw, make_chain):
    """w − Σ n_k/n · lr · Σ clip(g_i) / B, over the examples that each one draws."""
    chain, theirs = make_chain(lora=lora_config()), make_chain(lora=lora_config())
    start, clip = states(chain.model), 0.5 * clipped_sum(theirs, PAIRS[:1])[1][0]
    fed = federation(chain, SHARES if how == "fit" else None, gradient_step=ClippedPerExample(clip), batch_sampler=draw)
    if how == "fit":
        fed.fit(rounds=1)
    else:
        for name, pairs in SHARES.items():
            fed.train(pairs, name)
        fed.step()
    wanted = {n: t.double() for n, t in start.items()}
    for name, pairs in SHARES.items():
        sums, _, loss, tokens = clipped_sum(theirs, pairs if draw is None else pairs[:2], clip)
        for n, total in sums.items():
            wanted[n] -= len(pairs) / 8 * LR * total / 5
        record = fed.history[0].participants[name]
        assert (record.steps, record.examples) == (1, len(pairs))
        assert record.train_loss == pytest.approx(loss / tokens, rel=1e-5)
    for n, now in states(chain.model).items():
        torch.testing.assert_close(now.double(), wanted[n], rtol=1e-4, atol=1e-6, msg=n)


def test_what_a_participant_learns_for_itself_is_learnt_in_the_same_way(make_chain):
    chain, theirs = make_chain(lora=lora_config()), make_chain(lora=lora_config())
    fed = federation(chain, gradient_step=ClippedPerExample(0.01), batch_sampler=first_two)
    fed.personalize("b", steps=1)
    sums, start = clipped_sum(theirs, SHARES["b"][:2], 0.01)[0], states(theirs.model)
    own, module = chain.model.adapter_state("b"), theirs.model.trainable_parameters()
    names = {id(p): n for n, p in theirs.model.module.named_parameters()}
    for name, parameter in module.items():
        n = names[id(parameter)]
        wanted = start[n].double() - LR * sums[n] / 5
        torch.testing.assert_close(own[name].double(), wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_both_are_code_that_is_given_again(make_chain, tmp_path):
    code = {"gradient_step": ClippedPerExample(1.0), "batch_sampler": first_two}
    straight = federation(make_chain(), **code)
    straight.fit(rounds=2)
    fed = federation(make_chain(), checkpoint_dir=tmp_path, **code)
    assert fed.config.gradient_step == "code: ClippedPerExample (give it again on resume)"
    assert fed.config.batch_sampler == "code: first_two (give it again on resume)"
    fed.fit(rounds=1)
    for name in code:
        others = {n: given for n, given in code.items() if n != name}
        with pytest.raises(CheckpointError, match=rf"the run's {name} was code: .* Pass {name}= again"):
            FederatedAveraging.resume(tmp_path, make_chain(), participants=SHARES, **others)
    resumed = FederatedAveraging.resume(tmp_path, make_chain(), participants=SHARES, progress=False, **code)
    resumed.fit(rounds=1)
    theirs = states(straight.get_model().model)
    assert all(torch.equal(theirs[n], t) for n, t in states(resumed.get_model().model).items())


@pytest.mark.parametrize("name", ["gradient_step", "batch_sampler"])
def test_a_federation_refuses_what_it_cannot_use(name, make_chain):
    with pytest.raises(ConfigError, match=f"{name} is a function .*, got 5"):
        federation(make_chain(), **{name: 5})
    with pytest.raises(ConfigError, match=f"{name}: that is code, and no code travels"):
        federation(make_chain(), None, runtime=InProcess({}), **{name: first_two})


def test_a_sampler_for_a_loader_is_refused_before_anything_is_trained(make_chain):
    loader = DataLoader([0], collate_fn=lambda rows: rows)
    with pytest.raises(ConfigError, match="has a DataLoader, which draws its batches itself"):
        federation(make_chain(), {"a": PAIRS[:5], "b": loader}, batch_sampler=first_two)
    with pytest.raises(ConfigError, match="has a DataLoader, which draws its batches itself"):
        federation(make_chain(), None, batch_sampler=first_two).train(loader, "a")
