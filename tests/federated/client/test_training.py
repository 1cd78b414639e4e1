"""A client's trainings: what each of them is given, and how many steps it says they have.

Belongs here: the operations that train, at one client, asked in bytes. Does not: what training itself
does (training/test_loop), what a policy refuses (security/test_policy).
"""

import json

import pytest
import torch
from safetensors.torch import load
from tiny import PAIRS
from torch.utils.data import DataLoader

from llmchain_fed import Participant, TrainingConfig
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.tasks import CurveTask, PersonalizeTask, StateHeader, TimeStepTask, TrainTask
from llmchain_fed.federated.target import Target
from llmchain_fed.training.gradient_step import StepResult

LR = 0.01


def asked(client, kind, **fields):
    model = client.model
    task = kind.of(round=1, base=model.fingerprint(), **fields)
    return client.handle(kind.operation, messages.write(task, model.trainable_state(), StateHeader()))


def ones(model, batch, _config):
    """A gradient of ones for any batch of examples."""
    for parameter in model.trainable_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    return StepResult(1.0, 3 * len(batch.rows), len(batch.rows))


def test_every_training_of_a_client_takes_its_own_gradient_step_and_sampler(make_chain):
    """Two draws of three rows, a gradient of ones: w − 2 · lr, and every other training draws likewise."""
    drawn = []

    def two_draws(examples, _config, place):
        drawn.append((len(examples), place.participant, place.round))
        return [[0, 1, 2], [3, 4, 5]]

    chain = make_chain(lora=True)
    config = TrainingConfig(optimizer="sgd", learning_rate=LR, batch_size=4)
    participant = Participant("a", PAIRS[:8], held_out=PAIRS[8:])
    client = Client(Target.of(chain), participant, config, gradient_step=ones, batch_sampler=two_draws)
    start = chain.model.trainable_state()
    answer = asked(client, TrainTask, ditto={"lam": 0.0})
    values = load(answer)
    for name, tensor in start.items():
        torch.testing.assert_close(values[name], tensor - 2 * LR, rtol=0, atol=1e-7)
    asked(client, PersonalizeTask, steps=2)
    asked(client, CurveTask, steps=[0, 1])
    asked(client, TimeStepTask)
    assert len(drawn) == 7  # the update, Ditto's model, the personal one, a step of the curve, two timed, one counted
    assert set(drawn) == {(8, "a", 0)}


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(None, None, 6), (3, None, 18), (None, 5, 5)])
def test_a_dataloaders_length_is_its_steps(epochs, max_steps, steps, make_chain):
    """Twelve examples in batches of two are six steps a pass, whatever batch_size the options name."""
    chain = make_chain(lora=True)
    examples = encode_examples(PAIRS[:12], chain.model, chain)
    loader = DataLoader(examples, batch_size=2, collate_fn=lambda rows: collate(rows, chain.model))
    config = TrainingConfig(learning_rate=LR, batch_size=4, epochs=epochs, max_steps=max_steps)
    client = Client(Target.of(chain), Participant("a", loader), config)
    assert json.loads(asked(client, TimeStepTask))["steps"] == steps
