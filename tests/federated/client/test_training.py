"""A participant's training, as its client does it. Belongs here: how long it will take. Does not: what it learns."""

from tiny import PAIRS
from torch.utils.data import DataLoader

from llmchain_fed import Participant, TrainingConfig
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.training import time_step
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import TimeStepTask
from llmchain_fed.federated.target import Target


def test_a_dataloaders_batches_are_its_steps(make_chain):
    chain = make_chain()
    encoded = encode_examples(PAIRS[:6], chain.model, chain)
    loader = DataLoader(encoded, batch_size=2, collate_fn=lambda rows: collate(rows, chain.model))
    client = Client(Target.of(chain), Participant("a", loader), TrainingConfig(batch_size=4, epochs=2))
    task = TimeStepTask.of(round=1, base=chain.model.fingerprint())
    assert time_step(client, task, GlobalState.of(chain.model)).steps == 3 * 2
