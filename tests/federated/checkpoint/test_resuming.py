"""An interrupted federation goes on as if it had never stopped: resume, roll_back, promote, and what refuses to.

Belongs here: what a checkpoint must have so that nothing is lost, and what makes it another federation's. Does not: the
files themselves (test_files), processes that are killed (test_kills).
"""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import (
    _ASK,
    ADAM,
    KEPT,
    SGD,
    SHARES,
    Elsewhere,
    Interrupt,
    assert_same,
    assert_tensors_equal,
    federation,
    resumed,
    standing,
    told,
    weights_of,
)
from tiny import PAIRS, lora_config

from llmchain_fed import FederatedAveraging, Participant, TrainingConfig
from llmchain_fed.errors import CheckpointError, ConfigError, LLMChainFedError, ParticipantError, PolicyError
from llmchain_fed.federated.checkpoint import contents as resuming
from llmchain_fed.federated.checkpoint import files as checkpoint
from llmchain_fed.federated.checkpoint.fitting import limits_of
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.updates import serialization
from llmchain_fed.updates.aggregation.mean import RunningMean
from llmchain_fed.updates.server_optimizers import DiLoCo, FedAdam, FedYogi, Reptile, TorchServerOptimizer

RANKS = [Participant("a", PAIRS[:5], rank=2), Participant("b", PAIRS[5:9], rank=4), Participant("c", PAIRS[9:], rank=1)]
_ODD = serialization.pack({}, {"progress": {"1": {"next_step": "7", "optimizer": None}}})


@dataclass(frozen=True)
class Case:
    """One federation, and after how many of its rounds it is interrupted."""

    id: str
    kind: str = "causal"
    lora: dict[str, Any] | None = None
    """changes to the adapter's configuration; None trains full weights"""
    options: Callable[[], dict[str, Any]] = field(default=dict)
    participants: Any = field(default_factory=lambda: SHARES)
    at: int = 2
    rounds: int = 4

    def chain(self, make_chain):
        return make_chain(self.kind, lora=False if self.lora is None else lora_config(self.kind, **self.lora))


CASES = [
    Case("full-int8-sampled", options=lambda: {"codec": "int8", "participants_per_round": 0.5, "training": ADAM}),
    Case("full-linear-kept", options=lambda: {"training": KEPT.replace(lr_schedule="linear", warmup=0.2)}),
    Case(
        "cosine-ditto-sampled",
        lora={"lora_dropout": 0.2},
        options=lambda: {
            "training": ADAM.replace(lr_schedule="cosine", warmup=3),
            "personal": Ditto(),
            "participants_per_round": 2,
        },
        at=3,
    ),
    Case("full-broadcast_int8", options=lambda: {"broadcast_codec": "int8"}),
    Case("seq2seq-full-yogi-topk", "seq2seq", options=lambda: {"server_optimizer": FedYogi(lr=0.02), "codec": "topk"}),
    Case("fednova-kept", options=lambda: {"aggregation": "fednova", "training": KEPT, "weighting": "tokens"}, at=1),
    Case(
        "fedit-adam-int4-ditto-kept",
        lora={},
        options=lambda: {
            "aggregation": "fedit",
            "server_optimizer": FedAdam(lr=0.01),
            "codec": "int4",
            "personal": Ditto(lam=0.3),
            "training": KEPT,
        },
    ),
    Case(
        "seq2seq-fedit-diloco-both-codecs",
        "seq2seq",
        {},
        lambda: {
            "aggregation": "fedit",
            "server_optimizer": DiLoCo(),
            "codec": "int8",
            "broadcast_codec": "int8",
            "evaluation": 0.34,
        },
    ),
    Case(
        "ffa-topk-broadcast_int8",
        lora={},
        options=lambda: {"aggregation": "ffa", "codec": "topk:0.2", "broadcast_codec": "int8"},
    ),
    Case("rolora-odd", lora={}, options=lambda: {"aggregation": "rolora", "codec": "int4", "personal": Ditto()}, at=1),
    Case(
        "seq2seq-rolora-even-adam",
        "seq2seq",
        {},
        lambda: {"aggregation": "rolora", "server_optimizer": FedAdam(lr=0.01)},
    ),
    Case(
        "fedsvd-reptile",
        lora={},
        options=lambda: {"aggregation": "fedsvd", "server_optimizer": Reptile(step_size=0.5), "codec": "int8"},
    ),
    Case(
        "fednova-torch_adamw",
        lora={},
        options=lambda: {
            "aggregation": "fednova",
            "server_optimizer": TorchServerOptimizer(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.95)),
            "codec": "int8",
        },
    ),
    Case(
        "fedex-bf16-evaluated",
        lora={},
        options=lambda: {"aggregation": "fedex", "codec": "bf16", "evaluation": 0.34},
    ),
    Case("seq2seq-fedex-kept", "seq2seq", {}, lambda: {"aggregation": "fedex", "training": KEPT, "codec": "int4"}),
    Case("flora-dropout", lora={"lora_dropout": 0.3}, options=lambda: {"aggregation": "flora", "training": ADAM}),
    Case("seq2seq-flora-mixed", "seq2seq", {}, lambda: {"aggregation": "flora", "codec": "int8"}, RANKS),
    Case(
        "flexlora-mixed-evaluated",
        lora={},
        options=lambda: {"aggregation": "flexlora", "evaluation": 0.34},
        participants=RANKS,
    ),
    Case(
        "fedsa-kept-sampled-dropout",
        lora={"lora_dropout": 0.2},
        options=lambda: {"aggregation": "fedsa", "training": KEPT, "codec": "int8", "participants_per_round": 0.5},
        rounds=5,
    ),
    Case(
        "seq2seq-fedsa-broadcast_int8",
        "seq2seq",
        {},
        lambda: {"aggregation": "fedsa", "broadcast_codec": "int8", "server_optimizer": DiLoCo(lr=0.5)},
        at=3,
    ),
    Case(
        "fedavg-lora-ditto-sampled",
        lora={"lora_dropout": 0.2},
        options=lambda: {"personal": Ditto(lam=1.0, max_steps=1), "participants_per_round": 2, "weighting": "equal"},
        at=1,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_resumed_run_is_the_run_that_never_stopped(case, make_chain, tmp_path):
    """The interrupted one writes checkpoints and the other does not, so that writing is seen to change nothing."""
    straight = federation(case.chain(make_chain), case.participants, **case.options())
    straight.fit(rounds=case.rounds)
    stopped = federation(case.chain(make_chain), case.participants, checkpoint_dir=tmp_path, **case.options())
    stopped.fit(case.at, of=case.rounds)
    again = resumed(tmp_path, case.chain(make_chain), case.participants)
    assert again.round == len(again.history) == case.at
    again.fit(rounds=case.rounds - case.at)
    assert_same(again, straight)
    assert checkpoint.rounds(tmp_path)[-1] == case.rounds


def test_the_cases_tell_a_lost_state_from_a_kept_one(make_chain, tmp_path, monkeypatch):
    """The comparison above would be worth nothing if forgetting where participants stood did not show in it."""
    case = next(c for c in CASES if c.id == "fedit-adam-int4-ditto-kept")
    straight = federation(case.chain(make_chain), **case.options())
    straight.fit(rounds=3)
    federation(case.chain(make_chain), checkpoint_dir=tmp_path, **case.options()).fit(rounds=2)
    monkeypatch.setattr(resuming, "give_back", lambda *_: None)
    again = resumed(tmp_path, case.chain(make_chain))
    again.fit(rounds=1)
    different = [n for n, t in weights_of(straight).items() if not torch.equal(t, weights_of(again)[n])]
    assert different


def test_a_run_interrupted_within_a_round_repeats_that_round(make_chain, tmp_path):
    """Ctrl-C while the second of three trains: the checkpoint is of the round before; nothing of this one counts."""
    options = {"training": KEPT, "codec": "int8", "personal": Ditto()}
    straight = federation(make_chain(lora=True), **options)
    straight.fit(rounds=3)
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=1)
    inner = fed._peers["b"].handle

    def interrupted(op, payload):
        if op == "train":
            raise KeyboardInterrupt
        return inner(op, payload)

    fed._peers["b"].handle = interrupted
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=2)
    again = resumed(tmp_path, make_chain(lora=True))
    again.fit(rounds=2)
    assert_same(again, straight)
    fed._peers["b"].handle = inner
    fed.fit(rounds=2)
    assert_same(fed, straight)


class InPlace:
    """A server optimizer of one's own that writes into the weights it is given."""

    def step(self, state, pseudo_gradient):
        for name, value in state.items():
            value.add_(pseudo_gradient[name])
        return dict(state)


def test_a_round_interrupted_after_a_step_in_place_leaves_the_chain_as_it_was(make_chain, monkeypatch):
    fed = federation(make_chain(), server_optimizer=InPlace())
    before = weights_of(fed)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(fed._server.evaluator, "fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fed.fit(rounds=1)
    assert fed.round == 0
    assert_tensors_equal(weights_of(fed), before)


def test_a_memory_that_no_checkpoint_has_begins_anew_and_that_is_said(make_chain, tmp_path):
    federation(make_chain(), server_optimizer=InPlace(), checkpoint_dir=tmp_path).fit(rounds=1)
    again = resumed(tmp_path, make_chain(), server_optimizer=InPlace())
    found = again.fit(rounds=2)
    assert found[1].notes == ["the server optimizer's memory began anew: it has no state_dict()"]
    assert found[2].notes == []


def test_a_run_may_be_resumed_after_every_round(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "topk", "broadcast_codec": "int8"}
    straight = federation(make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), **options)
    straight.fit(rounds=5)
    fed = federation(make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=1)
    for _ in range(4):
        fed = resumed(tmp_path, make_chain(lora=True))
        fed.fit(rounds=1)
    assert_same(fed, straight)


def test_resuming_twice_without_a_round_in_between_changes_nothing(make_chain, tmp_path):
    fed = federation(make_chain(), checkpoint_dir=tmp_path, training=KEPT)
    fed.fit(rounds=2)
    resumed(tmp_path, make_chain())
    again = resumed(tmp_path, make_chain())
    assert_tensors_equal(weights_of(again), weights_of(fed))
    assert again.history.to_json() == fed.history.to_json()
    again.fit(rounds=1)
    fed_straight = federation(make_chain(), training=KEPT)
    fed_straight.fit(rounds=3)
    assert_same(again, fed_straight)


def test_a_resumed_chain_answers_as_the_interrupted_one(battery, tmp_path):
    """At once, before another round."""
    chain, other = battery(), battery()
    federation(chain, checkpoint_dir=tmp_path, training=ADAM).fit(rounds=2)
    before = logits(other.model)
    resumed(tmp_path, other)
    assert torch.equal(logits(other.model), logits(chain.model))
    assert not torch.allclose(logits(other.model), before)
    assert other.invoke({"text": PAIRS[0][0]}) == chain.invoke({"text": PAIRS[0][0]})


def test_the_federation_keeps_its_name(make_chain, tmp_path):
    """By which sites know that it is the same: another one would make them forget where they stand."""
    fed = federation(make_chain(), checkpoint_dir=tmp_path)
    fed.fit(rounds=1)
    assert resumed(tmp_path, make_chain())._server.client_manager.federation == fed._server.client_manager.federation


# --- earlier rounds ---------------------------------------------------------------------------------------------------


def test_an_earlier_round_replays_what_followed(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int8", "keep_checkpoints": None}
    straight = federation(make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), checkpoint_dir=tmp_path, **options)
    straight.fit(rounds=4)
    assert checkpoint.rounds(tmp_path) == [1, 2, 3, 4]
    again = resumed(tmp_path, make_chain(lora=True), round=2)
    assert again.round == 2
    assert checkpoint.rounds(tmp_path) == [1, 2, 3, 4], "to look at an earlier round costs nothing"
    again.fit(rounds=1)
    assert checkpoint.rounds(tmp_path) == [1, 2, 3], "later ones are of a future that will not be"
    again.fit(rounds=1)
    assert_same(again, straight)
    assert checkpoint.rounds(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("aggregation", ["rolora", "fedsvd", "fedex", "flora", "fedsa"])
def test_rolling_back_is_the_state_of_then_and_goes_on_like_it(aggregation, make_chain, tmp_path):
    options = {"aggregation": aggregation, "evaluation": 0.34, "keep_checkpoints": None, "checkpoint_dir": tmp_path}
    fed = federation(make_chain(lora=True), **options)
    then, standings, histories = {}, {}, {}
    for _ in range(4):
        fed.fit(rounds=1)
        then[fed.round], histories[fed.round] = weights_of(fed), told(fed)
        standings[fed.round] = standing(fed)
    fed.roll_back(to=2)
    assert (fed.round, checkpoint.rounds(tmp_path)) == (2, [1, 2])
    assert_tensors_equal(weights_of(fed), then[2])
    assert told(fed) == histories[2]
    fed.fit(rounds=2)
    assert_tensors_equal(weights_of(fed), then[4])
    assert told(fed) == histories[4]
    for name, (header, tensors) in standing(fed).items():
        assert header == standings[4][name][0]
        assert_tensors_equal(tensors, standings[4][name][1])


@pytest.mark.parametrize(
    "options", [{}, {"evaluation": 0.34}, {"broadcast_codec": "int8"}], ids=["plain", "eval", "codec"]
)
@pytest.mark.parametrize(("rounds", "to"), [(1, 1), (2, 1), (2, 2)])
def test_rolling_back_from_any_round_to_any_other(rounds, to, options, make_chain, tmp_path):
    """Also to the round one is at: what participants have by an old name must not be taken for the new state."""
    straight = federation(make_chain(), **options)
    straight.fit(rounds=to + 2)
    fed = federation(make_chain(), checkpoint_dir=tmp_path, keep_checkpoints=None, **options)
    fed.fit(rounds=rounds)
    fed.roll_back(to=to)
    fed.fit(rounds=2)
    assert_tensors_equal(weights_of(fed), weights_of(straight))
    assert told(fed) == told(straight)


def test_rolling_back_brings_back_what_participants_kept(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int4", "personal": Ditto(), "participants_per_round": 0.5}
    straight = federation(make_chain(lora=True), server_optimizer=FedYogi(lr=0.01), **options)
    straight.fit(rounds=4)
    fed = federation(
        make_chain(lora=True),
        server_optimizer=FedYogi(lr=0.01),
        checkpoint_dir=tmp_path,
        keep_checkpoints=None,
        **options,
    )
    fed.fit(rounds=4)
    fed.roll_back(to=1)
    fed.fit(rounds=3)
    assert_same(fed, straight)


def test_rolling_back_to_what_is_not_there_changes_nothing(make_chain, tmp_path):
    fed = federation(make_chain(), checkpoint_dir=tmp_path, keep_checkpoints=2)
    fed.fit(rounds=4)
    before, history = weights_of(fed), fed.history.to_json()
    for number in (1, 5, 0, -1):
        with pytest.raises(CheckpointError, match=f"no checkpoint of round {number}.*rounds there: 3, 4"):
            fed.roll_back(to=number)
    (tmp_path / "round-000003" / "global.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"global.safetensors"):
        fed.roll_back(to=3)
    assert_tensors_equal(weights_of(fed), before)
    assert fed.history.to_json() == history
    assert checkpoint.rounds(tmp_path) == [3, 4]
    with pytest.raises(CheckpointError, match="checkpoint_dir="):
        federation(make_chain()).roll_back(to=1)


def logits(model) -> torch.Tensor:
    ids = torch.arange(2, 22)[None]
    inputs = {"decoder_input_ids": ids[:, :5]} if model.kind == "seq2seq" else {}
    with model.exclusive(), torch.inference_mode():
        return model.module(input_ids=ids, **inputs).logits.clone()


@pytest.mark.parametrize(
    ("aggregation", "kind"),
    [("fedit", "causal"), ("fedsvd", "causal"), ("fedex", "causal"), ("fedex", "seq2seq"), ("flora", "causal")],
)
def test_a_promoted_round_answers_beside_the_newest(aggregation, kind, make_chain, tmp_path):
    """As a chain answers that stopped at that round, its remainder included, while the trained adapter goes on."""
    options = {"aggregation": aggregation, "training": ADAM}
    then = make_chain(kind, lora=True)
    federation(then, **options).fit(rounds=2)
    chain = make_chain(kind, lora=True)
    fed = federation(chain, checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=3)
    fed.promote(2)
    fed.promote(3, "newest")
    wanted, newest = logits(then.model), logits(chain.model)
    torch.testing.assert_close(logits(chain.with_adapter("promoted").model), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(chain.with_adapter("newest").model), newest, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, newest, rtol=1e-4, atol=1e-5)
    fed.fit(rounds=1)
    torch.testing.assert_close(logits(chain.with_adapter("promoted").model), wanted, rtol=1e-4, atol=1e-5)
    straight = make_chain(kind, lora=True)
    federation(straight, **options).fit(rounds=4)
    assert_tensors_equal(chain.model.trainable_state(), straight.model.trainable_state())


def test_promoting_what_is_not_there_is_refused(make_chain, tmp_path):
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path, keep_checkpoints=1)
    fed.fit(rounds=2)
    with pytest.raises(CheckpointError, match="no checkpoint of round 1"):
        fed.promote(1)
    full = federation(make_chain())
    full.fit(rounds=1)
    with pytest.raises(LLMChainFedError, match="this model has none"):
        full.promote(1)
    for number in (None, "2", 2.0, True):
        with pytest.raises(ConfigError, match="takes the number of a round, such as 3, got"):
            fed.promote(number, "n")
        with pytest.raises(ConfigError, match="takes the number of a round, such as 3, got"):
            fed.roll_back(number)
    assert fed.round == 2


@pytest.mark.parametrize("what", ["adapter", "base weights", "prompt"])
def test_a_round_of_another_base_adapter_or_prompt_is_not_promoted(what, make_chain, tmp_path):
    federation(make_chain(lora=True), checkpoint_dir=tmp_path).fit(rounds=1)
    changes = {
        "adapter": {"lora": lora_config(lora_alpha=16)},
        "base weights": {"seed": 7},
        "prompt": {"prompt": "En français : {text}\n"},
    }
    chain = make_chain(**({"lora": True} | changes[what]))
    fed = federation(chain, checkpoint_dir=tmp_path)
    for refused in (lambda: fed.promote(1, "n"), lambda: fed.roll_back(1)):
        with pytest.raises(CheckpointError, match=f"of round 1 is another federation's \\({what}: .* there, .* here"):
            refused()
    assert "n" not in chain.model.adapters


def test_a_round_from_before_somebody_joined_is_promoted(make_chain, tmp_path):
    """Its weights mean the same in this chain, whoever has come since."""
    chain = make_chain(lora=True)
    fed = federation(chain, {"a": PAIRS[:5]}, checkpoint_dir=tmp_path)
    fed.fit(rounds=1)
    wanted = logits(chain.model)
    fed.train(PAIRS[5:9], "b")
    fed.step()
    fed.promote(1)
    torch.testing.assert_close(logits(chain.with_adapter("promoted").model), wanted, rtol=1e-4, atol=1e-5)


# --- personal models --------------------------------------------------------------------------------------------------


def test_a_personalised_adapter_outlives_the_process(make_chain, tmp_path):
    options = {"evaluation": 0.4, "training": ADAM}
    straight = federation(make_chain(lora=True), **options)
    chain = make_chain(lora=True)
    fed = federation(chain, checkpoint_dir=tmp_path, **options)
    for one in (straight, fed):
        one.fit(rounds=2)
        one.personalize("b", steps=3)
    other = make_chain(lora=True)
    again = resumed(tmp_path, other)
    assert again.side_by_side(["b"]) == fed.side_by_side(["b"])
    assert torch.equal(logits(other.with_adapter("b").model), logits(chain.with_adapter("b").model))
    again.fit(rounds=1)
    straight.fit(rounds=1)
    assert_same(again, straight)


def test_also_of_one_who_was_not_sampled_last(make_chain, tmp_path):
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path, participants_per_round=1, training=ADAM)
    fed.fit(rounds=2)
    idle = [n for n, r in fed.history[-1].participants.items() if r.status == "idle"]
    assert len(idle) == 2
    for name in idle:
        fed.personalize(name, steps=2)
    again = resumed(tmp_path, make_chain(lora=True))
    again._join()
    for name in idle:
        assert_tensors_equal(standing(again)[name][1], standing(fed)[name][1])
        assert any("/personal/" in n for n in standing(again)[name][1])


def test_before_the_first_round_too(make_chain, tmp_path):
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path, training=ADAM)
    fed.personalize("a", steps=2)
    assert checkpoint.rounds(tmp_path) == [0]
    again = resumed(tmp_path, make_chain(lora=True))
    again.fit(rounds=1)
    fed.fit(rounds=1)
    assert_same(again, fed)


def test_an_adapter_made_after_an_interruption_is_kept_with_the_round_before(make_chain, tmp_path):
    """What the interrupted round left at the first participant has not happened, on disk as little as here."""
    fed = federation(make_chain(lora=True), checkpoint_dir=tmp_path, training=KEPT)
    fed.fit(rounds=1)
    inner = fed._peers["b"].handle

    def interrupted(op, payload):
        if op == "train":
            raise KeyboardInterrupt
        return inner(op, payload)

    fed._peers["b"].handle = interrupted
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=1)
    fed._peers["b"].handle = inner
    fed.personalize("c", steps=2)
    again = resumed(tmp_path, make_chain(lora=True))
    again.fit(rounds=1)
    fed.fit(rounds=1)
    assert_same(again, fed)


# --- what stops a run early -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2])
def test_patience_counts_on(at, make_chain, tmp_path):
    """A rate that changes next to nothing: with patience 3 a run ends after 3 rounds, wherever it was interrupted."""
    options = {"training": SGD.replace(learning_rate=1e-9), "evaluation": PAIRS[:3]}
    straight = federation(make_chain(), **options)
    straight.fit(rounds=9, patience=3, min_delta=0.1)
    assert straight.round == 3
    fed = federation(make_chain(), checkpoint_dir=tmp_path, callbacks=[Interrupt(at)], **options)
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=9, patience=3, min_delta=0.1)
    again = resumed(tmp_path, make_chain(), evaluation=PAIRS[:3])
    again.fit(rounds=9 - at, patience=3, min_delta=0.1)
    assert_same(again, straight)
    assert again.history.stopped_early == straight.history.stopped_early


def test_a_run_that_stopped_early_says_so_when_it_is_read_again(make_chain, tmp_path):
    options = {"training": SGD.replace(learning_rate=1e-9), "evaluation": PAIRS[:3]}
    fed = federation(make_chain(), checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=5, patience=1, min_delta=0.1)
    again = resumed(tmp_path, make_chain(), evaluation=PAIRS[:3])
    again.fit(rounds=1)
    fed.fit(rounds=1)
    assert_same(again, fed)


# --- one participant at a time ----------------------------------------------------------------------------------------


def test_train_and_step_go_on_too(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int8"}

    def drive(fed, rounds):
        for _ in range(rounds):
            for name, pairs in SHARES.items():
                fed.train(pairs, name)
            fed.step()

    straight = federation(make_chain(), **options)
    drive(straight, 3)
    drive(federation(make_chain(), checkpoint_dir=tmp_path, **options), 2)
    again = resumed(tmp_path, make_chain())
    drive(again, 1)
    assert_same(again, straight)


def test_who_joined_by_train_alone_is_kept_as_well(make_chain, tmp_path):
    fed = federation(make_chain(), None, checkpoint_dir=tmp_path, training=KEPT)
    for name, pairs in SHARES.items():
        fed.train(pairs, name)
    fed.step()
    kept = checkpoint.read(tmp_path).participants
    assert sorted(kept) == sorted(SHARES)
    again = resumed(tmp_path, make_chain())
    again.fit(rounds=1)
    straight = federation(make_chain(), training=KEPT)
    straight.fit(rounds=2)
    assert_tensors_equal(weights_of(again), weights_of(straight))


# --- another process --------------------------------------------------------------------------------------------------

_PROCESS = """
import hashlib, sys
import torch
torch.set_num_threads(1)
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora
from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel
tokenizer = train_tokenizer()
model = LocalModel(with_lora(tiny_module("causal", len(tokenizer)), lora_config("causal")), tokenizer, name="tiny")
chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=12), prompt=TEMPLATE)
fed = FederatedAveraging.resume(
    sys.argv[1], chain, participants={"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}, progress=False
)
fed.fit(rounds=2)
digest = hashlib.sha256()
for name, tensor in sorted(model.trainable_state().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print(fed.round, digest.hexdigest())
"""


def test_a_fresh_process_goes_on_bit_for_bit(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int8", "personal": Ditto()}
    straight = federation(make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), **options)
    straight.fit(rounds=4)
    federation(
        make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), checkpoint_dir=tmp_path / "kept", **options
    ).fit(rounds=2)
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(tmp_path / "kept")],
        cwd=Path(__file__).parents[2] / "support", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256()
    for name, tensor in sorted(straight._server.model.trainable_state().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert done.stdout.split() == ["4", digest.hexdigest()]


# --- what must be given again -----------------------------------------------------------------------------------------


class Halfway:
    """A server optimizer of one's own, whose memory is the number of its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, state, pseudo_gradient):
        self.steps += 1
        return {n: state[n] + d / (1 + self.steps) for n, d in pseudo_gradient.items()}

    def settings(self):
        return {"class": "Halfway"}

    def state_dict(self):
        return {}, {"steps": self.steps}

    def load_state_dict(self, tensors, numbers):
        self.steps = numbers["steps"]


ADAGRAD = {"optimizer": torch.optim.Adagrad, "lr": 0.01}


class Mine(RunningMean):
    """An aggregation of one's own."""

    name = "mine"


@pytest.mark.parametrize(
    ("options", "again", "said"),
    [
        ({"training": None, **ADAGRAD}, ADAGRAD, "Adagrad"),
        ({"evaluation": {"a": PAIRS[9:]}}, {"evaluation": {"a": PAIRS[9:]}}, "evaluation="),
        ({"evaluation": PAIRS[9:]}, {"evaluation": PAIRS[9:]}, "evaluation="),
        ({"server_optimizer": Halfway}, {"server_optimizer": Halfway}, "Halfway.*server_optimizer="),
        ({"aggregation": Mine}, {"aggregation": Mine}, "mine.*aggregation="),
    ],
    ids=["optimizer", "evaluation by name", "evaluation for all", "server optimizer", "aggregation"],
)  # fmt: skip
def test_what_is_code_or_data_must_be_given_again(options, again, said, make_chain, tmp_path):
    def made(given):
        return {n: v() if v in (Halfway, Mine) else v for n, v in given.items()}

    straight = federation(make_chain(), **made(options))
    straight.fit(rounds=3)
    federation(make_chain(), checkpoint_dir=tmp_path, **made(options)).fit(rounds=2)
    chain = make_chain()
    before = chain.model.trainable_state()
    with pytest.raises(CheckpointError, match=said):
        resumed(tmp_path, chain)
    assert_tensors_equal(chain.model.trainable_state(), before)
    fed = resumed(tmp_path, chain, **made(again))
    fed.fit(rounds=1)
    assert_same(fed, straight)


def test_everything_else_need_not_be_given_again(make_chain, tmp_path):
    """Deadline, retries, quorum, samples and how many checkpoints are kept are those of then."""
    options = {"deadline": 60.0, "retries": 2, "quorum": 2, "samples": 0, "keep_checkpoints": 1, "evaluation": 0.34}
    federation(make_chain(), checkpoint_dir=tmp_path, **options).fit(rounds=2)
    fed = resumed(tmp_path, make_chain())
    settings = fed._server.settings
    assert (settings.config.deadline, settings.config.retries, settings.config.quorum) == (60.0, 2, 2)
    fed.fit(rounds=2)
    assert checkpoint.rounds(tmp_path) == [4]
    assert fed.history[-1].samples == []
    assert fed.history[-1].held_out_after is not None
    assert resumed(tmp_path, make_chain(), quorum=1, keep_checkpoints=2)._server.settings.config.quorum == 1, (
        "given goes first"
    )


@pytest.mark.parametrize(
    "again", [{"lr": 0.05}, {"batch_size": 4}, {"optimizer": "sgd"}, {"lr": 0.05, "batch_size": 4}, {"training": SGD}]
)
def test_training_options_given_again_as_they_were_are_laid_over_those_of_then(again, make_chain, tmp_path):
    training = SGD.replace(max_grad_norm=0.5)
    straight = federation(make_chain(), training=training)
    straight.fit(rounds=3)
    federation(make_chain(), training=training, checkpoint_dir=tmp_path).fit(rounds=2)
    fed = resumed(tmp_path, make_chain(), **({n: training if n == "training" else v for n, v in again.items()}))
    fed.fit(rounds=1)
    assert_same(fed, straight)


def test_of_an_optimizer_that_is_code_the_rest_need_not_be_given_again(make_chain, tmp_path):
    options = {"training": TrainingConfig(batch_size=4), **ADAGRAD}
    straight = federation(make_chain(), **options)
    straight.fit(rounds=2)
    federation(make_chain(), checkpoint_dir=tmp_path, **options).fit(rounds=1)
    with pytest.raises(CheckpointError, match=r"optimizer was code: Adagrad\. Pass optimizer= again"):
        resumed(tmp_path, make_chain(), lr=0.01)
    fed = resumed(tmp_path, make_chain(), optimizer=torch.optim.Adagrad)
    fed.fit(rounds=1)
    assert_same(fed, straight)


# --- another federation's ---------------------------------------------------------------------------------------------


@pytest.fixture
def kept(make_chain, tmp_path):
    """A directory with two rounds of a LoRA federation, and what is in it."""
    federation(make_chain(lora=True), checkpoint_dir=tmp_path, server_optimizer=FedAdam(lr=0.01)).fit(rounds=2)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


REFUSED = {
    "base weights": (lambda make: make(lora=True, seed=7), {}),
    "prompt": (lambda make: make(lora=True, prompt="En français : {text}\n"), {}),
    "adapter": (lambda make: make(lora=lora_config(r=2)), {}),
    "adapter: .* there": (lambda make: make(lora=lora_config(lora_alpha=16)), {}),
    "b are missing, none are new": (None, {"participants": {"a": PAIRS[:5], "c": PAIRS[9:]}}),
    "none are missing, d are new": (None, {"participants": {**SHARES, "d": PAIRS[:2]}}),
    "participants: in the order a, b, c there, c, a, b here": (None, {"participants": {n: SHARES[n] for n in "cab"}}),
    "c are missing, d are new": (None, {"participants": {"a": PAIRS[:5], "b": PAIRS[5:9], "d": PAIRS[9:]}}),
    "aggregation: 'fedavg' there, 'fedex' here": (None, {"aggregation": "fedex", "server_optimizer": None}),
    "seed: 0 there, 1 here": (None, {"seed": 1}),
    "training: .*0.05.* there, .*0.5.* here": (None, {"training": SGD.replace(learning_rate=0.5)}),
    "training: ": (None, {"lr": 0.5}),
    "weighting: 'examples' there, 'equal' here": (None, {"weighting": "equal"}),
    "codec: None there, 'int8' here": (None, {"codec": "int8"}),
    "broadcast_codec: None there, 'int8' here": (None, {"broadcast_codec": "int8"}),
    "server_optimizer: .*FedAdam.* there, .*FedYogi.* here": (None, {"server_optimizer": FedYogi(lr=0.01)}),
    "server_optimizer: .*0.01.* there, .*0.02.* here": (None, {"server_optimizer": FedAdam(lr=0.02)}),
    "personal: None there": (None, {"personal": Ditto()}),
    "participants_per_round: None there, 2 here": (None, {"participants_per_round": 2}),
}


@pytest.mark.parametrize("named_so", REFUSED)
def test_another_federations_checkpoint_is_refused_by_name(named_so, kept, make_chain):
    make, options = REFUSED[named_so]
    chain = make(make_chain) if make else make_chain(lora=True)
    before, files = chain.model.trainable_state(), contents(kept)
    with pytest.raises(CheckpointError, match=named_so):
        resumed(kept, chain, **options)
    assert_tensors_equal(chain.model.trainable_state(), before)
    assert contents(kept) == files


@pytest.mark.parametrize(
    "changed", [PAIRS[5:8], [*PAIRS[5:8], ("page", "une page bien plus longue")]], ids=["fewer", "longer"]
)
def test_other_examples_are_refused_before_anything_is_restored(changed, kept, make_chain):
    chain = make_chain(lora=True)
    before, version = chain.model.trainable_state(), chain.model.weights_version
    with pytest.raises(CheckpointError, match=r"'b' is not as it was \(.*Give it the examples and options of then"):
        resumed(kept, chain, {**SHARES, "b": changed})
    assert_tensors_equal(chain.model.trainable_state(), before)
    assert chain.model.weights_version == version, "not even for a while"
    assert checkpoint.rounds(kept) == [1, 2]


def test_examples_that_changed_meanwhile_are_refused_by_roll_back(kept, make_chain):
    chain = make_chain(lora=True)
    fed = resumed(kept, chain)
    fed.train(PAIRS[:3], "a")
    fed.step()
    before = chain.model.trainable_state()
    with pytest.raises(CheckpointError, match=r"'a' is not as it was .*examples: 5 then, 3 now"):
        fed.roll_back(to=1)
    assert_tensors_equal(chain.model.trainable_state(), before)
    assert fed.round == 3
    fed.fit(rounds=1)


@pytest.mark.parametrize(
    "changed", [PAIRS[5:8], [*PAIRS[5:8], ("page", "une page bien plus longue")]], ids=["fewer", "longer"]
)
def test_other_examples_elsewhere_are_refused_when_they_are_first_counted(changed, kept, make_chain):
    chain = make_chain(lora=True)
    sites = federation(make_chain(lora=True), {**SHARES, "b": changed})._peers
    fed = resumed(kept, chain, None, runtime=Elsewhere(sites), quorum=len(SHARES))
    before, history = chain.model.trainable_state(), fed.history.to_json()
    for _ in range(2):  # nor the second time
        with pytest.raises(CheckpointError, match="'b' is not as it was"):
            fed.fit(rounds=1)
    assert_tensors_equal(chain.model.trainable_state(), before)
    assert fed.history.to_json() == history
    assert checkpoint.rounds(kept) == [1, 2]


def test_one_who_has_other_examples_is_absent_and_the_others_go_on(kept, make_chain):
    """One participant's word does not end the run of the others, whose quorum it is not needed for."""
    chain = make_chain(lora=True)
    sites = federation(make_chain(lora=True), {**SHARES, "b": PAIRS[5:8]})._peers
    fed = resumed(kept, chain, None, runtime=Elsewhere(sites))
    fed.fit(rounds=1)
    assert set(fed.history[-1].trained) == SHARES.keys() - {"b"}
    assert "'b' is not as it was (" in fed.history[-1].participants["b"].reason
    assert 'members="changed"' in fed.history[-1].participants["b"].reason


@pytest.mark.parametrize("nonsense", [b"", b"x" * 1000, b'{"stale": true}', _ASK, _ODD], ids=range(5))
def test_a_state_that_could_not_be_given_back_is_no_state_and_the_checkpoint_stays_usable(
    nonsense, make_chain, tmp_path
):
    class Spoiling(Elsewhere):
        def call(self, op, nodes, payload, timeout=None):
            for node, answer in super().call(op, nodes, payload, timeout):
                yield node, nonsense if op == "personal_state" and node == "b" else answer

    sites = federation(make_chain(lora=True), SHARES)._peers
    chain = make_chain(lora=True)
    options = {"training": SGD, "progress": False, "checkpoint_dir": tmp_path}
    fed = FederatedAveraging(chain, runtime=Spoiling(sites), **options)
    fed.fit(rounds=2)
    assert any("has no state of it" in note for note in fed.history[-1].participants["b"].notes)
    back = resumed(tmp_path, make_chain(lora=True), None, runtime=Elsewhere(sites))
    assert back.round == 2
    back.fit(rounds=1)
    assert set(back.history[-1].trained) == SHARES.keys()


def test_an_empty_directory_is_no_run(make_chain, tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            resumed(directory, make_chain())
    assert not (tmp_path / "nowhere").exists()


def test_a_round_that_is_not_kept_is_refused_by_number(kept, make_chain):
    with pytest.raises(CheckpointError, match=r"no checkpoint of round 7 .*rounds there: 1, 2"):
        resumed(kept, make_chain(lora=True), round=7)


def test_an_option_that_goes_nowhere_is_refused_before_anything_is_dropped(kept, make_chain):
    with pytest.raises(ConfigError, match="unknown option `rounds`"):
        resumed(kept, make_chain(lora=True), round=1, rounds=3)
    assert checkpoint.rounds(kept) == [1, 2]


# --- participants that keep to themselves -----------------------------------------------------------------------------


class Discreet(InProcess):
    """Participants whose policy keeps where they stand from the hub, once it is in force."""

    def __init__(self, peers, *, refuses: bool = True) -> None:
        super().__init__(peers)
        self.refuses = refuses

    def call(self, op, nodes, payload, timeout=None):
        for node in nodes:
            if op == "personal_state" and self.refuses:
                yield node, PolicyError("refused by site: policy.operations: personal_state is not allowed here")
            else:
                yield from super().call(op, [node], payload, timeout)


@pytest.mark.parametrize("from_the_start", [False, True])
def test_participants_that_refuse_their_state_go_on_from_what_they_kept(from_the_start, make_chain, tmp_path):
    """The sites live on while the hub restarts: the outcome is the same, and the record says who was not told."""
    straight = federation(make_chain(), training=KEPT)
    straight.fit(rounds=3)
    sites = federation(make_chain(), training=KEPT)._peers  # on a model of their own, like real ones
    first = federation(
        make_chain(), None, training=KEPT, runtime=Discreet(sites, refuses=from_the_start), checkpoint_dir=tmp_path
    )
    first.fit(rounds=2)
    again = resumed(tmp_path, make_chain(), None, runtime=Discreet(sites))
    again.fit(rounds=1)
    assert_tensors_equal(weights_of(again), weights_of(straight))
    why = "no checkpoint contains it" if from_the_start else "its policy keeps that from the hub"
    for record in again.history[-1].participants.values():
        assert any(note.endswith(f"its peer has, if it was not started anew ({why})") for note in record.notes)
    again.fit(rounds=1)
    assert all(record.notes == [] for record in again.history[-1].participants.values()), "said once"


class Overlong(InProcess):
    """Participants whose state does not come, and which remembers how large one may be."""

    expected: int = 0

    def expect(self, num_bytes, op="train"):
        self.expected = num_bytes if op == "personal_state" else self.expected

    def call(self, op, nodes, payload, timeout=None):
        if op != "personal_state":
            yield from super().call(op, nodes, payload, timeout)
            return
        for node in nodes:
            yield node, ParticipantError("it wants to answer with more bytes than make sense")


def test_a_state_that_did_not_come_is_said_also_where_there_was_none_before(make_chain, tmp_path):
    peers = federation(make_chain(), training=KEPT)._peers
    chain = make_chain()
    runtime = Overlong(peers)
    fed = federation(chain, None, training=KEPT, runtime=runtime, checkpoint_dir=tmp_path)
    fed.fit(rounds=2)
    for record in fed.history[-1].participants.values():
        assert record.notes == ["the checkpoint of round 1 has no state of it (ParticipantError: it wants to answer "
                                "with more bytes than make sense)"]  # fmt: skip
    assert runtime.expected == limits_of(chain.model).file, "what is taken is what can be read again"


# --- when writing fails on the way ------------------------------------------------------------------------------------


def test_a_checkpoint_that_failed_leaves_no_gap_behind(make_chain, tmp_path, monkeypatch):
    """Who trained in the round that could not be written and rests in the next is not kept as of the round before."""
    options = {"training": KEPT, "codec": "int8", "participants_per_round": 1}
    straight = federation(make_chain(), **options)
    straight.fit(rounds=6)
    fed = federation(make_chain(), checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=1)
    for _ in range(2):
        with monkeypatch.context() as full:
            full.setattr(checkpoint, "write", _no_space)
            with pytest.raises(CheckpointError, match="no space"):
                fed.fit(rounds=1)
    fed.fit(rounds=1)
    missed = {n for record in fed.history.rounds[1:3] for n in record.trained}
    assert missed - set(fed.history[-1].trained), "somebody trained unwritten and rested since"
    again = resumed(tmp_path, make_chain())
    assert again.round == 4
    again.fit(rounds=2)
    assert_same(again, straight)


def _no_space(*_: Any, **__: Any) -> None:
    raise CheckpointError("no space left on the device")


# --- when going on fails on the way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["resume", "roll_back"])
def test_what_fails_after_the_weights_were_loaded_puts_all_back(act, make_chain, tmp_path, monkeypatch):
    """Whatever it is that fails: here that a personal model becomes an adapter."""
    options = {"training": KEPT, "codec": "int8", "broadcast_codec": "int8", "personal": Ditto(lam=0.3)}
    straight = federation(make_chain(lora=True), server_optimizer=FedAdam(lr=0.01), **options)
    straight.fit(rounds=4)
    chain = make_chain(lora=True)
    fed = federation(chain, server_optimizer=FedAdam(lr=0.01), checkpoint_dir=tmp_path, **options)
    fed.fit(rounds=3)
    files, history, before = contents(tmp_path), fed.history.to_json(), chain.model.trainable_state()
    other = make_chain(lora=True)
    with monkeypatch.context() as failing:
        calls = []

        def add_adapter(self, name, *_, **__):
            calls.append(name)
            if len(calls) == 2:
                raise RuntimeError("out of memory")

        failing.setattr(type(chain.model), "add_adapter", add_adapter)
        with pytest.raises(RuntimeError, match="out of memory"):
            fed.roll_back(1) if act == "roll_back" else resumed(tmp_path, other)
    assert contents(tmp_path) == files
    assert_tensors_equal(other.model.trainable_state(), make_chain(lora=True).model.trainable_state())
    assert (fed.round, fed.history.to_json()) == (3, history)
    assert_tensors_equal(chain.model.trainable_state(), before)
    fed.fit(rounds=1)
    assert_same(fed, straight)


def test_a_history_that_could_not_be_read_again_is_not_written(make_chain, tmp_path, monkeypatch):
    fed = federation(make_chain(), checkpoint_dir=tmp_path)
    fed.fit(rounds=1)
    with monkeypatch.context() as small:
        small.setattr(checkpoint, "MAX_MANIFEST", 2000)
        with pytest.raises(CheckpointError, match=r"round 2 cannot be written .*more than could be read again"):
            fed.fit(rounds=1)
    assert fed.round == 2
    assert checkpoint.rounds(tmp_path) == [1]


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**5000], ids=range(3))
def test_a_seed_that_no_message_can_carry_is_refused_at_once(seed, make_chain):
    with pytest.raises(ConfigError, match="seed"):
        federation(make_chain(), seed=seed)
