"""A federation with one participant that lies: honest peers in this process, and one whose answers are replaced."""

from tiny import PAIRS

from llmchain_fed import FederatedAveraging, Participant, TrainingConfig
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess, Runtime
from llmchain_fed.federated.target import Target

TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=4, epochs=1)
SHARES = {"a": PAIRS[:4], "b": PAIRS[4:8], "liar": PAIRS[8:10]}
HELD_OUT = PAIRS[:8:3]  # of what the others train on: their losses fall


class Liar:
    """Works honestly, and then says something else.

    Args:
        peer: Who works.
        lies: Operation → what becomes of its answer's bytes.
    """

    def __init__(self, peer, lies):
        self.peer, self.lies = peer, lies

    def handle(self, op, payload):
        answer = self.peer.handle(op, payload)
        return self.lies[op](answer) if op in self.lies else answer


class Elsewhere(Runtime):
    """The same participants behind a transport that is not this process's own: their errors are theirs."""

    def __init__(self, peers):
        self._inner = InProcess(peers)

    def nodes(self):
        return self._inner.nodes()

    def call(self, op, nodes, payload, timeout=None):
        return self._inner.call(op, nodes, payload, timeout)


def federation(chain, lies=None, *, without=(), held_out=False, runtime=InProcess, rank=None, alpha=None, **options):
    """One over a, b and the liar, who lies as it is told and may have a rank of its own; or without some of them."""
    target = Target.of(chain)
    people = (
        Participant(n, x, HELD_OUT if held_out else None, **({"rank": rank, "alpha": alpha} if n == "liar" else {}))
        for n, x in SHARES.items()
        if n not in without
    )
    peers = {p.name: Client(target, p, TRAINING) for p in people}
    if "liar" in peers:
        peers["liar"] = Liar(peers["liar"], lies or {})
    given = {"training": TRAINING, "progress": False, "samples": 0} | options
    return FederatedAveraging(target.prompt, runtime=runtime(peers), **given)
