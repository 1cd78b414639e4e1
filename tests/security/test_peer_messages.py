"""What a hub, or somebody who speaks like one, may send a participant: an answer, or one error and no change.

Belongs here: messages into `Client.handle` and `SiteServer.answer`. Does not: what a policy refuses of honest messages
(test_policy).
"""

import copy
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from bounded import bounded, within
from corpus import messages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, train_tokenizer, with_lora

from llmchain_fed import LLMChain, LocalLLM, LocalModel, Participant
from llmchain_fed.errors import FederationError, LLMChainFedError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.operations import operations
from llmchain_fed.federated.protocol.tasks import TrainingOptions
from llmchain_fed.federated.target import Target
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import printable
from llmchain_fed.updates import serialization

OPEN = Policy(operations=operations(), max_rounds=None, samples=9)


def make_target(rank=None):
    tokenizer = train_tokenizer()
    model = LocalModel(with_lora(tiny_module("causal", len(tokenizer)), lora_config()), tokenizer, name="tiny")
    return Target.of(LLMChain(llm=LocalLLM(model=model, max_new_tokens=4), prompt=TEMPLATE))


@pytest.fixture(scope="module")
def target():
    return make_target()


def peer_of(target, **options):
    peer = Client(target, Participant("a", PAIRS[:8], held_out=PAIRS[8:], **options), None)
    peer.handle("hello", messages.hello(target))
    return peer


@pytest.fixture
def peer(target):
    return peer_of(target)


def stands(peer):
    """All that a message could change: weights, remainder, adapters, progress, what is kept, how it trains."""
    model = peer.model
    progress = {
        n: (
            p.next_step,
            p.optimizer_state,
            {k: {n: t.clone() for n, t in kept.items()} for k, kept in p.kept().items()},
        )
        for n, p in peer.progress.rounds.items()
    }
    states = {rank: (version, dict(state.values)) for rank, (version, state) in peer.global_states._states.items()}
    return model.weights_hash, tuple(model.adapters), sorted(model.remainder()), progress, states, (
        peer.federation, repr(peer.config), peer.aggregation, peer.data._max_length,
    )  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused(peer, op, payload, seconds=5.0):
    """The one error; the peer is as before."""
    before = copy.deepcopy(stands(peer))
    with within(seconds), pytest.raises(FederationError) as error:
        peer.handle(op, payload)
    text = str(error.value)
    assert len(text) < 2000
    assert printable(text) == text
    text.encode()
    assert same(stands(peer), before)
    return text


def still_works(peer, target):
    assert (
        serialization.inspect(peer.handle("train", messages.task(target.model)), max_bytes=10**7)[0]["kind"] == "update"
    )


# --- case by case ---------------------------------------------------------------------------------------------------


def test_the_options_that_travel_are_those_of_a_training():
    assert TrainingOptions.model_fields.keys() == TrainingConfig.model_fields.keys()


@pytest.mark.parametrize("field", messages.WRONG_FIELDS)
def test_a_field_of_a_training_has_its_type_and_its_range(field, peer, target):
    for value in messages.WRONG_FIELDS[field]:
        text = refused(peer, "train", messages.task(target.model, **{field: value}))
        assert any(
            words in text
            for words in (f"`{field}", f"another {field}", "no JSON of ours", "about a state of", "the state of")
        )
    still_works(peer, target)


@pytest.mark.parametrize("fields", messages.COMBINATIONS, ids=range(len(messages.COMBINATIONS)))
def test_fields_that_make_no_sense_together_are_refused(fields, peer, target):
    refused(peer, "train", messages.task(target.model, **fields))


@pytest.mark.parametrize("field", ["round", "base"])
def test_a_field_that_is_missing_is_named(field, peer, target):
    header, infos = serialization.inspect(payload := messages.task(target.model), max_bytes=10**7)
    del header[field]
    assert f"`{field}`" in refused(peer, "train", serialization.pack(serialization.values(payload, infos), header))


@pytest.mark.parametrize("op", messages.WRONG_TASKS)
def test_other_operations_have_fields_of_their_own(op, peer, target):
    for fields in messages.WRONG_TASKS[op]:
        refused(peer, op, messages.task(target.model, **fields))


def test_an_evaluation_of_the_right_fields_is_answered(peer, target):
    assert json.loads(peer.handle("evaluate", messages.evaluation(target.model)))["tokens"] > 0


def test_a_hello_that_is_refused_has_changed_nothing(peer, target):
    for fields in messages.WRONG_HELLOS:
        before = copy.deepcopy(stands(peer))
        with pytest.raises(LLMChainFedError) as error:
            peer.handle("hello", messages.hello(target, **fields))
        assert len(str(error.value)) < 2000
        assert printable(str(error.value)) == str(error.value)
        assert same(stands(peer), before), fields
    still_works(peer, target)


def test_examples_that_other_limits_leave_out_are_there_again_after_a_refused_hello(peer, target):
    with pytest.raises(LLMChainFedError, match="no usable example"):
        peer.handle("hello", messages.hello(target, training={"max_length": 2}))
    still_works(peer, target)
    assert peer.data.train().report.used == 8


@pytest.mark.parametrize("op", operations())
@pytest.mark.parametrize("kind", messages.RAW)
def test_bytes_that_are_no_message(kind, op, peer):
    refused(peer, op, messages.RAW[kind])


def test_a_state_is_exactly_the_tensors_that_are_trained(peer, target):
    for kind, tensors in messages.wrong_tensors(target.model).items():
        assert refused(peer, "train", messages.task(target.model, tensors)), kind
        assert refused(peer, "evaluate", messages.evaluation(target.model, tensors=tensors)), kind
    still_works(peer, target)


def test_a_remainder_may_be_as_wide_as_a_hub_makes_it(peer, target):
    state = target.model.trainable_state()
    layer = next(n.removesuffix(".lora_A.weight") for n in state if n.endswith("lora_A.weight"))
    n, m = state[f"{layer}.lora_A.weight"].shape[1], state[f"{layer}.lora_B.weight"].shape[0]
    rank = min(m, n)
    wide = {f"{layer}.remainder_A.weight": torch.zeros(rank, n), f"{layer}.remainder_B.weight": torch.zeros(m, rank)}
    assert peer.handle("train", messages.task(target.model, state | wide))
    wider = {name: torch.zeros(*(each + (each == rank) for each in t.shape)) for name, t in wide.items()}
    assert refused(peer, "train", messages.task(target.model, state | wider))


def test_a_difference_is_to_what_is_kept_and_codes_are_what_their_codec_makes(peer, target):
    model = target.model
    first = sorted(model.trainable_state())[0]
    full = {"version": "hub/1/", "against": None}
    peer.handle("train", messages.task(model, **full))
    changed = {"version": "hub/2/", "against": "hub/1/"}
    coded = changed | {"coded": "int8", "coded_names": {"2": [first]}}
    for header, tensors in [
        (coded, {}),
        (coded, {"coded/2/codes": torch.zeros(5, dtype=torch.int8), "coded/2/scales": torch.zeros(1)}),
        (coded | {"coded_names": {"2": ["nobody"]}}, {}),
        (coded | {"coded_names": {"2": [first, first]}}, {}),
        (changed | {"appended": {"nobody": 2}}, {}),
        (changed, {first: torch.zeros(1, 1)}),
        (full | {"version": "hub/3/4x2.0"}, model.trainable_state()),
    ]:
        refused(peer, "train", messages.task(model, tensors, **header))
    assert peer.handle("train", messages.task(model, {}, **changed, round=2)) != b'{"stale": true}'
    stale = messages.task(model, {}, version="hub/9/", against="other/1/")
    assert peer.handle("train", stale) == b'{"stale": true}'


def test_invented_ranks_and_other_hubs_leave_no_states_behind():
    target = make_target()
    peer = peer_of(target, rank=2, alpha=4.0)
    with target.model.resized(2, peer.scaling):
        state = {n: torch.zeros_like(t) for n, t in target.model.trainable_state().items()}
    for number in range(40):
        text = f"2x{2.0 + number * 1e-9!r}"
        peer.handle(
            "train", messages.task(target.model, state, version=f"hub{number // 20}/1/{text}", round=number + 1)
        )
    assert len(peer.global_states._states) <= Policy().max_states
    for rank in ("3x2.0", "2x5.0", "", "2xnan", "2xinf"):
        refused(peer, "train", messages.task(target.model, state, version=f"hub9/1/{rank}"))


def test_a_personal_state_that_is_given_back_is_one_of_this_participants(peer, target):
    for fields in messages.WRONG_STATES:
        refused(peer, "personal_state", serialization.pack({}, fields))
    head = {"progress": {"0": {"next_step": 0, "optimizer": None}}}
    for name in messages.WRONG_STATE_TENSORS:
        refused(peer, "personal_state", serialization.pack({name: torch.zeros(2)}, head))
    first = sorted(target.model.trainable_state())[0]
    nan = torch.full_like(target.model.trainable_state()[first], float("nan"))
    refused(peer, "personal_state", serialization.pack({f"0/private/{first}": nan}, head))
    assert peer.handle("personal_state", peer.handle("personal_state", serialization.pack({}, {})))


def test_an_optimizer_comes_back_with_the_settings_it_has_here(target):
    peer = peer_of(target)
    kept = messages.TRAINING | {"keep_optimizer": True}
    peer.handle("hello", messages.hello(target, training=kept))
    peer.handle("train", messages.task(target.model))
    given = peer.handle("personal_state", serialization.pack({}, {}))
    header, infos = serialization.inspect(given, max_bytes=10**7)
    tensors = serialization.values(given, infos)
    assert peer.handle("personal_state", given) == given

    def changed(change, **other):
        found = copy.deepcopy(header)
        change(found["progress"]["1"]["optimizer"]["param_groups"][0])
        return serialization.pack(tensors | other, found)

    refused(peer, "personal_state", changed(lambda group: group.update(lr=1e9)))
    refused(peer, "personal_state", changed(lambda group: group.update(params=[0])))
    refused(peer, "personal_state", changed(lambda group: group.pop("betas")))
    refused(peer, "personal_state", changed(lambda group: None, **{"1/0/step": torch.tensor(-1.0)}))
    short = {n: t for n, t in tensors.items() if n != "1/0/exp_avg"}
    refused(peer, "personal_state", serialization.pack(short, header))
    refused(peer, "train", messages.task(target.model, round=2, trains="A", shares="A"))
    still = peer.handle("train", messages.task(target.model, round=2))
    assert serialization.inspect(still, max_bytes=10**7)[0]["round"] == 2


def test_a_round_that_asks_for_a_part_that_is_not_there():
    tokenizer = train_tokenizer()
    model = LocalModel(tiny_module("causal", len(tokenizer)), tokenizer, name="tiny")
    full = Target.of(LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE))
    peer = peer_of(full)
    assert "this model trains none" in refused(peer, "train", messages.task(model, shares="A"))


# --- mutations ------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.text(max_size=8),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [
    "kind", "round", "base", "seconds", "trains", "shares", "codec", "feedback", "state", "ditto", "steps", "lr",
    "samples", "answer_tokens", "metrics", "labels", "progress", "new_pass", "contract", "training", "federation",
    "aggregation", "more",
]  # fmt: skip
plausible = st.sampled_from([
    "all", "A", "B", "int8", "topk:0.1", "hub/1/", "start:00", True, False, 0, 1, 2, 2**31, 1e-3, [0, 1], {"steps": 1},
    {"lam": 0.1}, {"1": "all"}, "evaluate", "task", "personal_state", None, {"0": {"next_step": 1, "optimizer": None}},
])  # fmt: skip
states = st.dictionaries(st.sampled_from(sorted(messages.OF_THE_STATE)), values | plausible, max_size=3)
mutation = st.dictionaries(st.sampled_from(FIELDS), values | plausible | states, max_size=4)
cut = st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))


def answered(peer, op, payload, seconds=10.0):
    """Bytes, or the one error, which has changed nothing of what the next honest message needs."""
    before = copy.deepcopy(stands(peer))
    with within(seconds):
        try:
            assert isinstance(peer.handle(op, payload), bytes)
            return
        except LLMChainFedError as error:
            text = str(error)
    assert len(text) < 3000
    text.encode()
    assert same(stands(peer)[:3], before[:3])
    assert same(stands(peer)[3:], before[3:]), text


@bounded(seconds=200, megabytes=1500)
def test_mutated_messages_are_answered_or_refused_by_one_error():
    target = make_target()
    peer = peer_of(target)
    peer.obey(OPEN.replace(max_steps=4, max_evaluations=10**6))
    honest = {
        "train": messages.task(target.model),
        "evaluate": messages.evaluation(target.model),
        "personal_state": serialization.pack({}, {}),
        "personalize": messages.task(target.model, steps=1),
        "curve": messages.task(target.model, steps=[0, 1]),
        "side_by_side": messages.task(target.model),
        "time_step": messages.task(target.model),
    }
    read = {op: serialization.inspect(payload, max_bytes=10**7) for op, payload in honest.items()}

    @settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(honest)), mutation, st.booleans())
    def fields(op, changes, with_tensors):
        header, infos = read[op]
        try:
            payload = serialization.pack(
                serialization.values(honest[op], infos) if with_tensors else {}, header | changes
            )
        except UnicodeEncodeError:
            return
        answered(peer, op, payload)

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(honest)), cut)
    def places(op, change):
        at, new = change
        payload = bytearray(honest[op])
        at %= min(len(payload), 4000)  # where the header is
        payload[at : at + len(new)] = new
        answered(peer, op, bytes(payload))

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutation)
    def hellos(changes):
        said = json.loads(messages.hello(target)) | changes
        answered(peer, "hello", json.dumps(said).encode())

    fields()
    places()
    peer.handle("hello", messages.hello(target))
    hellos()
    peer.handle("hello", messages.hello(target))
    peer.obey(OPEN)
    still_works(peer, target)


@bounded(seconds=120, megabytes=1500)
def test_a_site_answers_whatever_it_is_sent_and_goes_on():
    target = make_target()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "audit.jsonl"
        site = SiteServer(Client(target, Participant("a", PAIRS[:8], held_out=PAIRS[8:]), None), OPEN, Audit(log))
        calls = iter(range(10**6))

        def ask(op, payload):
            head = {"do": "put", "call": f"c{next(calls)}", "op": op, "offset": 0, "total": len(payload)}
            site.answer(frames.pack(head, payload))
            until = time.monotonic() + 20
            while time.monotonic() < until:
                found, body = frames.read(site.answer(frames.pack({"do": "poll", "call": head["call"], "wait": 5})))
                if found.get("state") != "working":
                    return found, bytes(body)
            raise TimeoutError(op)

        assert "error" not in ask("hello", messages.hello(target))[0]
        begun = len(log.read_text().splitlines())
        for payload in messages.RAW.values():
            for op in ("train", "evaluate", "hello", "personal_state"):
                found, _ = ask(op, payload)
                assert found["error"]["type"] in ("FederationError", "UpdateRefusedError", "ContractError"), found
        lines = [json.loads(line) for line in log.read_text().splitlines()][begun:]
        assert len(lines) == 2 * 4 * len(messages.RAW)
        assert [e["status"] for e in lines] == ["began", "failed"] * (len(lines) // 2)
        assert max(map(len, log.read_text().splitlines())) < 3000
        found, body = ask("train", messages.task(target.model))
        assert found["state"] == "done"
        assert serialization.inspect(body, max_bytes=10**7)[0]["kind"] == "update"
