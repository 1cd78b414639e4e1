"""GradientStep: a step of somebody's own, outside the package, against plain torch.

Belongs here: how a batch becomes a gradient. Does not: the package's own step (test_loop), draws (test_batch_sampler).
"""

import math

import pytest
import torch
from tiny import PAIRS, lora_config

from llmchain_fed import DataError, TrainingConfig, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
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
