"""Federations that are interrupted and go on: how they start, how they stop, and what is equal afterwards."""

import json
from typing import Any

import torch
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, TrainingConfig
from llmchain_fed.federated.callbacks import Callback
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.global_state import GlobalState, named
from llmchain_fed.federated.protocol.tasks import PersonalStateTask
from llmchain_fed.federated.runtime import InProcess, Runtime
from llmchain_fed.updates import serialization

SGD = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4)


ADAM = TrainingConfig(optimizer="adamw", learning_rate=0.005, batch_size=4)


KEPT = ADAM.replace(max_steps=2, epochs=None, keep_optimizer=True)


SHARES = {"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}


_MEASURED = {"seconds", "training_seconds", "evaluation_seconds", "bytes_up", "bytes_down", "evaluation_bytes"}
_MEASURED |= {"about"}  # dates, and options that may differ


_ASK = messages.write(PersonalStateTask())


def federation(chain, participants=SHARES, **options):
    return FederatedAveraging(chain, participants=participants, **({"training": SGD, "progress": False} | options))


def resumed(directory, chain, participants=SHARES, **options):
    return FederatedAveraging.resume(directory, chain, participants=participants, progress=False, **options)


def weights_of(fed) -> dict[str, torch.Tensor]:
    """Every trainable tensor and every factor of the remainder."""
    state = GlobalState.of(fed._server.model)
    return {**state.values, **named(state.remainder)}


def told(fed) -> Any:
    """The history without what a clock or a counter of loads says."""

    def without(value):
        if isinstance(value, dict):
            value = {k: without(v) for k, v in value.items() if k not in _MEASURED}
            if "weights_version" in value:
                value["weights_version"] = value["weights_version"].partition("-")[2]  # the hash alone
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads(fed.history.to_json()))


def standing(fed) -> dict[str, Any]:
    """Where every participant says it stands: place in the data, moments, residual, private and personal tensors."""
    found = {}
    for name, answer in fed._runtime.call("personal_state", fed._runtime.nodes(), _ASK):
        assert isinstance(answer, bytes), answer
        header, infos = serialization.inspect(answer, max_bytes=len(answer))
        found[name] = header["progress"], serialization.values(answer, infos)
    return found


def assert_tensors_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def assert_same(fed, twin):
    """Weights, remainder, history, the server's memory and every participant are those of the twin, bit for bit."""
    assert fed.round == twin.round
    assert_tensors_equal(weights_of(fed), weights_of(twin))
    assert told(fed) == told(twin)
    server, wanted = (f._server.settings.server_optimizer for f in (fed, twin))
    if wanted is not None:
        assert_tensors_equal(server.state_dict()[0], wanted.state_dict()[0])
        assert server.state_dict()[1] == wanted.state_dict()[1]
    ours, theirs = standing(fed), standing(twin)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name][0] == theirs[name][0], name
        assert_tensors_equal(ours[name][1], theirs[name][1])


class Interrupt(Callback):
    """Ends the process, as far as this test is concerned, after a round."""

    def __init__(self, after: int) -> None:
        self._after = after

    def on_round_end(self, record, history):
        if record.round == self._after:
            raise KeyboardInterrupt


class Elsewhere(Runtime):
    """Participants on a model of their own, who say what they have once they are asked to join."""

    def __init__(self, peers) -> None:
        self._inside = InProcess(peers)

    def nodes(self):
        return self._inside.nodes()

    def call(self, op, nodes, payload, timeout=None):
        return self._inside.call(op, nodes, payload, timeout)
