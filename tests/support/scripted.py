"""A federation whose transport answers with scripted errors in place of participants' trouble."""

from __future__ import annotations

from tiny import PAIRS

from llmchain_fed import (
    FederatedAveraging,
    Participant,
    ParticipantError,
    PolicyError,
    TrainingConfig,
    TransportError,
)
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.target import Target

TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=4, epochs=1)
SHARES = {"a": PAIRS[:4], "b": PAIRS[4:8], "c": PAIRS[8:]}


class Scripted(InProcess):
    """Answers with the next error of a node's script, and lets the peer work once it is used up or says None."""

    def __init__(self, peers, scripts):
        super().__init__(peers)
        self.scripts = {op: {n: list(errors) for n, errors in nodes.items()} for op, nodes in scripts.items()}
        self.asked = []

    def call(self, op, nodes, payload, timeout=None):
        for node in nodes:
            self.asked.append((op, node))
            script = self.scripts.get(op, {}).get(node, [])
            error = script.pop(0) if script else None
            if error is not None:
                yield node, error
            else:
                yield from super().call(op, [node], payload, timeout)


def federation(make_chain, scripts, *, held_out=None, **options):
    target = Target.of(make_chain(lora=True))
    peers = {n: Client(target, Participant(n, pairs, held_out), TRAINING) for n, pairs in SHARES.items()}
    transport = Scripted(peers, scripts)
    options = {"training": TRAINING, "progress": False} | options
    return FederatedAveraging(target.prompt, runtime=transport, **options), transport


def statuses(fed):
    return [{n: r.status for n, r in record.participants.items()} for record in fed.history]


CUT = TransportError("the cable is out")
BROKEN = ParticipantError("RuntimeError: out of memory")
REFUSED = PolicyError("refused by site: policy.max_steps: 1,000,000 steps are more than 1,000")
