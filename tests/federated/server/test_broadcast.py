"""What travels: differences, codecs, the ledger and its projection.

Belongs here: which bytes participants are sent and send, and that the ledger counts them. Does not: how a codec turns
numbers into codes (test_codecs), or what rules do with what arrives (test_lora_rules).
"""

import json
import shutil

import pytest
import torch
from other_work import does
from tiny import PAIRS

from llmchain_fed import ConfigError, FedAdam, FederatedAveraging, FederationError, Participant, TrainingConfig
from llmchain_fed.federated.client import training
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.global_state_cache import GlobalStateCache
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.global_state import STALE, GlobalState, Version
from llmchain_fed.federated.protocol.tasks import TimeStepTask
from llmchain_fed.federated.runtime import InProcess, Runtime, payload_for
from llmchain_fed.federated.server.broadcast import Broadcast, KnownVersion
from llmchain_fed.federated.target import Target
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.codecs.quantization import Int4
from llmchain_fed.updates.low_rank import Factors
from llmchain_fed.updates.serialization import inspect, pack, values

SHARES = {"a": PAIRS[:4], "b": PAIRS[4:9], "c": PAIRS[9:]}
ADAM = TrainingConfig(optimizer="adam", learning_rate=1e-2, batch_size=4)


class Wire(InProcess):
    """In this process, noting every message: (op, node, bytes down, bytes up, header, names)."""

    def __init__(self, peers):
        super().__init__(peers)
        self.seen = []

    def call(self, op, nodes, payload, timeout=None):
        for node, answer in super().call(op, nodes, payload, timeout):
            sent = payload_for(payload, node)
            up = len(answer) if isinstance(answer, bytes) and answer != STALE else 0
            head, infos = inspect(sent, max_bytes=len(sent)) if op in ("train", "evaluate") else ({}, {})
            self.seen.append((op, node, len(sent), up, head, set(infos)))
            yield node, answer

    def of(self, op):
        found = [entry for entry in self.seen if entry[0] == op]
        self.seen = []
        return found


def federation(chain, shares=SHARES, **options):
    options = {"participants": shares, "training": ADAM, "progress": False} | options
    fed = FederatedAveraging(chain, **options)
    wire = Wire(fed._peers)
    server = fed._server
    fed._runtime = server.runtime = server.dispatcher._runtime = server.client_manager._runtime = wire
    return fed, wire


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(got[n], wanted[n])] == []


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_nobody_is_sent_what_it_has(make_chain):
    """The start is the same everywhere; after a round what changed travels once, and training comes for a header."""
    chain = make_chain(lora=True)
    fed, wire = federation(chain, evaluation=dict.fromkeys(SHARES, PAIRS[:2]), samples=0)
    state = set(chain.model.trainable_state())
    fed.fit(2)
    names = [(op, node, names) for op, node, *_, names in wire.seen if op in ("train", "evaluate")]
    assert [found for op, _, found in names[:6]] == [set()] * 6  # before round 1, and its training
    assert [found for op, _, found in names[6:9]] == [state] * 3  # after round 1
    assert [(op, found) for op, _, found in names[9:12]] == [("train", set())] * 3
    assert [(op, found) for op, _, found in names[12:]] == [("evaluate", state)] * 3


def test_only_the_factor_that_changed_travels(make_chain):
    fed, wire = federation(make_chain(lora=True), aggregation="ffa")
    fed.fit(1)
    wire.of("train")
    fed.fit(1)
    assert all(names and all("lora_B" in n for n in names) for *_, names in wire.of("train"))
    fed, wire = federation(make_chain(lora=True), aggregation="rolora")
    fed.fit(2)
    wire.of("train")
    fed.fit(1)
    assert all(names and all("lora_A" in n for n in names) for *_, names in wire.of("train"))


def test_another_base_start_is_sent_whole(make_chain):
    """A participant whose adapter starts elsewhere says so, and gets everything."""
    hub, other = make_chain(lora=True), make_chain(lora=True)
    with torch.no_grad():
        for parameter in other.model.trainable_parameters().values():
            parameter.add_(0.5)
    fed = FederatedAveraging(other, participants=SHARES, training=ADAM, progress=False)
    remote = Wire(fed._peers)
    lead = FederatedAveraging(hub, runtime=remote, training=ADAM, progress=False)
    twin = make_chain(lora=True)
    FederatedAveraging(twin, participants=SHARES, training=ADAM, progress=False).fit(2)
    lead.fit(2)
    first = [entry for entry in remote.seen if entry[0] == "train"][:3]
    assert [len(names) for *_, names in first] == [len(hub.model.trainable_state())] * 3
    assert_equal(hub.model.trainable_state(), twin.model.trainable_state())


@pytest.mark.parametrize("rule", ["fedit", "fedex", "flora"])
def test_a_participant_that_lost_what_it_had_is_sent_all(rule, make_chain):
    chain, smooth = make_chain(lora=True), make_chain(lora=True)
    federation(smooth, aggregation=rule)[0].fit(4)
    fed, wire = federation(chain, aggregation=rule)
    fed.fit(3)
    wire.of("train")
    next(iter(fed._peers.values())).global_states.forget()
    fed.fit(1)
    answers = wire.of("train")
    assert len(answers) == 4  # one that was stale, its repetition, and two that then found it in the process
    assert_equal(chain.model.trainable_state(), smooth.model.trainable_state())
    record = fed.history[-1].participants["a"]
    assert record.bytes_down == sum(down for _, node, down, *_ in answers if node == "a")


def test_who_missed_rounds_is_sent_what_changed_since(make_chain):
    """Sampled rarely, without evaluation: versions behind, whole tensors, the same weights as for the others."""
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    options = {"participants_per_round": 1, "aggregation": "fedex", "seed": 3}
    fed, _ = federation(chain, **options)
    fed.fit(5)
    other, _ = federation(twin, **options)
    for _ in range(5):
        next(iter(other._peers.values())).global_states.forget()  # everything is sent whole every time
        other.fit(1)
    assert_equal(chain.model.trainable_state(), twin.model.trainable_state())


def test_weights_that_the_user_changes_between_rounds_reach_the_participants(make_chain):
    chain, twin = make_chain(lora=True), make_chain(lora=True)
    fed, _ = federation(chain)
    fed.fit(1)
    state = {n: t + 0.01 for n, t in chain.model.trainable_state().items()}
    chain.model.load_state(state)
    fed.fit(1)
    other, _ = federation(twin)
    other.fit(1)
    twin.model.load_state(state)
    next(iter(other._peers.values())).global_states.forget()
    other.fit(1)
    assert_equal(chain.model.trainable_state(), twin.model.trainable_state())


class Processes(Runtime):
    """Participants in groups: each group one model and what it was sent, as a process elsewhere has them."""

    def __init__(self, make_chain, groups, shares=SHARES):
        self.peers, self.stale = {}, 0
        for group in groups:
            target = Target.of(make_chain(lora=True))
            cache = GlobalStateCache(target.model)
            self.peers |= {n: Client(target, Participant(n, shares[n]), None, global_states=cache) for n in group}

    def nodes(self):
        return list(self.peers)

    def call(self, op, nodes, payload, timeout=None):
        for node in nodes:
            answer = self.peers[node].handle(op, payload_for(payload, node))
            self.stale += answer == STALE
            yield node, answer

    def close(self):
        pass


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora", "fedex", "flora"])
def test_sampled_participants_are_sent_the_same_wherever_they_live(rule, codec, make_chain):
    """In one process, two by two, or with a model each: what they lack, once, and nothing is stale."""
    if codec and rule in ("fedex", "flora"):
        pytest.skip("refused: broadcast codecs do not go with it")
    options = {"training": ADAM, "progress": False, "participants_per_round": 1, "seed": 1, "aggregation": rule}
    options |= {"broadcast_codec": codec}
    found = []
    for groups in (None, ["ab", "c"], ["a", "b", "c"]):
        chain = make_chain(lora=True)
        runtime = Processes(make_chain, groups) if groups else None
        fed = FederatedAveraging(chain, runtime=runtime, participants=None if groups else SHARES, **options)
        fed.fit(8)
        assert runtime is None or runtime.stale == 0
        found.append(([r.bytes_down for r in fed.history], chain.model.trainable_state()))
    # a version's name is as long everywhere, but one's own start is named by another word than the first version
    for down, state in found[1:]:
        assert max(abs(a - b) for a, b in zip(down, found[0][0], strict=True)) < 80
        assert_equal(state, found[0][1])


@pytest.mark.parametrize("rule", ["fedit", "flora", "fedex"])
def test_a_run_resumed_on_shared_processes_is_the_same_bit_for_bit(rule, make_chain, tmp_path):
    shares = {"a": PAIRS[:3], "b": PAIRS[3:6], "c": PAIRS[6:9], "d": PAIRS[9:]}

    def processes():
        return Processes(make_chain, ["ab", "cd"], shares)

    options = {"training": ADAM, "progress": False, "participants_per_round": 3, "aggregation": rule}
    chain, folder = make_chain(lora=True), tmp_path / "run"
    whole = FederatedAveraging(chain, runtime=processes(), checkpoint_dir=folder, keep_checkpoints=None, **options)
    whole.fit(5)
    for number in (2, 3):
        copied = shutil.copytree(folder, tmp_path / f"{rule}{number}")
        other = make_chain(lora=True)
        FederatedAveraging.resume(copied, other, runtime=processes(), round=number, progress=False).fit(5 - number)
        assert_equal(other.model.trainable_state(), chain.model.trainable_state())


# --- versions, on the two ends alone ----------------------------------------------------------------------------------


def both_ends(make_model, codec=None):
    model = make_model(lora=True)
    return Broadcast(make_codec(codec), None), GlobalStateCache(model), GlobalState.of(model), model.weights_hash


def deliver(broadcast, cache, node="a"):
    message = broadcast.message(node, TimeStepTask(round=1, base="b"))
    header = messages.read_header(TimeStepTask, message)
    state = cache.receive(header.state, values(message, header.infos))
    if state is not None:
        broadcast._known[node] = KnownVersion(broadcast.number)
    return state, len(message)


def moved(state, seed, layer="model.layers.0.self_attn.q_proj", rank=2):
    generator = torch.Generator().manual_seed(seed)
    new = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in state.values.items()}
    more = Factors(torch.randn(32, rank, generator=generator), torch.randn(rank, 32, generator=generator))
    return GlobalState(new, state.plus({layer: more}))


def test_both_ends_have_the_same_after_every_version(make_model):
    broadcast, cache, state, digest = both_ends(make_model)
    for number in range(6):
        broadcast.publish(state, digest)
        if number != 2:  # one version is missed
            found, _ = deliver(broadcast, cache)
            assert_equal(dict(found.values), dict(state.values))
            assert found.remainder.keys() == state.remainder.keys()
            for layer, factors in state.remainder.items():
                assert torch.equal(found.remainder[layer].b, factors.b)
                assert torch.equal(found.remainder[layer].a, factors.a)
        state = moved(state, number)


def test_a_remainder_travels_as_what_was_added(make_model):
    broadcast, cache, state, digest = both_ends(make_model)
    broadcast.publish(state, digest)
    deliver(broadcast, cache)
    sizes = []
    for number in range(5):
        state = GlobalState(state.values, moved(state, number).remainder)
        broadcast.publish(state, digest)
        sizes.append(deliver(broadcast, cache)[1])
    assert max(sizes) - min(sizes) < 100
    fresh = Broadcast(None, None)
    fresh.publish(state, "")
    assert (
        deliver(fresh, GlobalStateCache(make_model(lora=True)))[1] > sizes[-1] + 4 * 4 * 2 * 64
    )  # four earlier increments


@pytest.mark.parametrize(("codec", "rounds"), [("int8", 2), ("int4", 3), ("topk:0.05", 3)])
def test_who_missed_changes_is_sent_their_codes(codec, rounds, make_model):
    """All of them, as long as they are fewer bytes than the values; then both have the same copy."""
    broadcast, cache, state, digest = both_ends(make_model, codec)
    broadcast.publish(state, digest)
    deliver(broadcast, cache, "b")
    often, size = GlobalStateCache(make_model(lora=True)), 0
    deliver(broadcast, often)
    for number in range(rounds):
        state = GlobalState(moved(state, number).values)
        broadcast.publish(state, digest)
        always, each = deliver(broadcast, often)
        size += each
    after, sent = deliver(broadcast, cache, "b")
    assert_equal(dict(after.values), dict(always.values))
    assert_equal(dict(after.values), broadcast.state_for("b"))
    assert sent < 0.95 * sum(t.nbytes for t in state.values.values())
    assert sent < size
    for number in range(20):  # far behind: the values themselves are less
        state = GlobalState(moved(state, number).values)
        broadcast.publish(state, digest)
        always, _ = deliver(broadcast, often)
    after, sent = deliver(broadcast, cache, "b")
    assert_equal(dict(after.values), dict(always.values))
    assert sent < sum(t.nbytes for t in state.values.values()) + 3000


def test_a_process_that_has_newer_states_understands_what_changed_since_an_older_one(make_model):
    """Its participants are asked in turns: a message says what changed since *they* were asked."""
    broadcast, cache, state, digest = both_ends(make_model)
    broadcast.publish(state, digest)
    deliver(broadcast, cache, "a")
    deliver(broadcast, cache, "b")
    for number in range(4):
        state = moved(state, number, rank=1 + number)
        broadcast.publish(state, digest)
        if number < 3:
            deliver(broadcast, cache, "a")
    found, _ = deliver(broadcast, cache, "b")
    assert_equal(dict(found.values), dict(state.values))
    for layer, factors in state.remainder.items():
        assert factors.rank == 1 + 2 + 3 + 4
        assert torch.equal(found.remainder[layer].b, factors.b)
        assert torch.equal(found.remainder[layer].a, factors.a)


@pytest.mark.parametrize("write", ["in place", "through data"])
def test_a_remainder_that_somebody_wrote_into_is_sent_anew(write, make_model):
    broadcast, cache, state, digest = both_ends(make_model)
    state = moved(state, 0)
    broadcast.publish(state, digest)
    deliver(broadcast, cache)
    (factors,) = state.remainder.values()
    tensor = factors.b if write == "in place" else factors.b.data
    tensor.mul_(2)
    broadcast.publish(state, digest)
    found, _ = deliver(broadcast, cache)
    (got,) = found.remainder.values()
    assert torch.equal(got.b, factors.b)


@pytest.mark.parametrize("version", ["x", "x/y/", "", 3, "x/-1/"])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(FederationError, match="names no version"):
        Version.read(version)


@pytest.mark.parametrize("codec", ["int8", "int4", "topk:0.2"])
def test_what_a_broadcast_codec_leaves_out_comes_with_the_next_message(codec, make_model):
    """The copy that participants have follows the weights; once these stand still it comes arbitrarily near."""
    broadcast, cache, state, digest = both_ends(make_model, codec)
    broadcast.publish(state, digest)
    deliver(broadcast, cache)
    start = state
    for number in range(4):
        state = GlobalState(moved(state, number).values)
        broadcast.publish(state, digest)
        found, _ = deliver(broadcast, cache)
        assert_equal(dict(found.values), broadcast.state_for("a"))  # the hub knows the copy exactly

    def gap(values):
        return sum(float((values[n] - state.values[n]).norm() ** 2) for n in values) ** 0.5

    way = sum(float((start.values[n] - state.values[n]).norm() ** 2) for n in state.values) ** 0.5
    assert gap(found.values) < {"int8": 0.02, "int4": 0.2, "topk:0.2": 0.8}[codec] * way
    left = [gap(found.values)]
    for number in range(3):  # a change too small to see carries what was left out before
        state = GlobalState({n: t + 1e-9 * (number + 1) for n, t in state.values.items()})
        state = GlobalState({n: torch.nextafter(t, torch.tensor(float("inf"))) for n, t in state.values.items()})
        broadcast.publish(state, digest)
        found, _ = deliver(broadcast, cache)
        left.append(gap(found.values))
    assert left[-1] < 0.7 * left[0]


def test_publishing_the_same_weights_again_sends_nothing(make_model):
    broadcast, cache, state, digest = both_ends(make_model, "int4")
    broadcast.publish(state, digest)
    deliver(broadcast, cache)
    broadcast.publish(moved(state, 0), digest)
    deliver(broadcast, cache)
    number = broadcast.number
    broadcast.publish(moved(state, 0), digest)
    assert broadcast.number == number
    assert deliver(broadcast, cache)[1] < 400


def test_a_difference_to_something_else_is_stale(make_model):
    broadcast, cache, state, digest = both_ends(make_model)
    broadcast.publish(state, digest)
    deliver(broadcast, cache)
    broadcast.publish(moved(state, 1), digest)
    assert deliver(broadcast, GlobalStateCache(make_model(lora=True)))[0] is None
    assert json.loads(STALE) == {"stale": True}


# --- codecs, end to end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fedavg", "fedit", "ffa", "rolora", "fedsvd", "fedex", "flora", "flexlora"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_codecs_go_with_every_rule(rule, codec, make_chain):
    plain, coded = make_chain(lora=True), make_chain(lora=True)
    one, _ = federation(plain, aggregation=rule)
    two, _ = federation(coded, aggregation=rule, codec=codec)
    start = plain.model.trainable_state()
    one.fit(1)
    two.fit(1)
    wanted, found = (c.model.trainable_state() for c in (plain, coded))
    if rule not in ("flora", "fedsvd", "flexlora"):  # whose factors are written anew: compared by what they mean
        way = sum(float((wanted[n] - start[n]).norm() ** 2) for n in wanted) ** 0.5
        apart = sum(float((wanted[n] - found[n]).norm() ** 2) for n in wanted) ** 0.5
        assert 0 < apart < 0.03 * way
    losses = [f.evaluate(PAIRS).loss for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    ups = [f.history[0].bytes_up for f in (one, two)]
    assert ups[1] < {"bf16": 0.6, "int8": 0.4}[codec] * ups[0]


def test_error_feedback_sends_what_was_left_out(make_chain, monkeypatch):
    """The sum of what arrived, and the residual a participant keeps, is the sum of what it learnt."""
    chain = make_chain(lora=True)
    fed, _ = federation(chain, {"a": PAIRS[:4]}, codec="int4")
    peer, learnt, arrived = fed._peers["a"], None, None
    inner = training.trained_values

    def watch(client, task, state, *rest):
        nonlocal learnt
        trained, result = inner(client, task, state, *rest)
        change = {n: t - state.values[n] for n, t in trained.items()}
        learnt = change if learnt is None else {n: learnt[n] + c for n, c in change.items()}
        return trained, result

    monkeypatch.setattr(training, "trained_values", watch)
    start = chain.model.trainable_state()
    fed.fit(6)
    arrived = {n: t - start[n] for n, t in chain.model.trainable_state().items()}
    carried = peer.progress.before()[1].carried
    residual = {name.removeprefix("residual/"): tensor for name, tensor in carried.items()}
    assert sum(float(r.norm()) for r in residual.values()) > 0
    for name in start:
        torch.testing.assert_close(arrived[name] + residual[name], learnt[name], rtol=1e-4, atol=1e-5)


def test_a_codec_that_the_participant_did_not_use_is_refused(make_chain, monkeypatch):
    fed, _ = federation(make_chain(lora=True), codec="int8", quorum=1)

    def without(client, task, state):
        return training.train(client, task.model_copy(update={"codec": None, "feedback": False}), state)

    does(monkeypatch, fed._peers["b"], without)
    fed.fit(1)
    record = fed.history[0].participants["b"]
    assert record.status == "refused"
    assert "bytes arrived where at most" in record.reason


class OwnCodec(Int4):
    """Code that participants elsewhere do not have."""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"codec": "int7"}, "unknown codec 'int7'. Valid: bf16, int8, int4, topk"),
        ({"broadcast_codec": "zip"}, "unknown codec 'zip'"),
        ({"codec": OwnCodec()}, "no code travels"),
        ({"codec": "topk", "aggregation": "flora"}, "error feedback cannot bring it back"),
        ({"broadcast_codec": "int8", "aggregation": "fedsvd"}, "blur the whole model"),
        ({"broadcast_codec": "int8", "aggregation": "fedex"}, "never saw what the codec had left out"),
        ({"server_optimizer": FedAdam(), "aggregation": "flexlora"}, "no longer be the participants' mean"),
    ],
)
def test_codecs_that_cannot_be_used(options, reason, make_chain):
    with pytest.raises(ConfigError, match=reason):
        federation(make_chain(lora=True), **options)


# --- the ledger and its projection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codec": "int8", "broadcast_codec": "int4"},
        {"aggregation": "fedex"},
        {"aggregation": "rolora", "evaluation": dict.fromkeys(SHARES, PAIRS[:2])},
        {"participants_per_round": 2, "aggregation": "flora"},
    ],
)
def test_the_ledger_is_what_travelled(options, make_chain):
    fed, wire = federation(make_chain(lora=True), samples=0, **options)
    fed.fit(3)
    records = [r.participants for r in fed.history]
    for name in SHARES:
        down = sum(d for op, node, d, *_ in wire.seen if (op, node) == ("train", name))
        up = sum(u for op, node, _, u, *_ in wire.seen if (op, node) == ("train", name))
        both = sum(d + u for op, node, d, u, *_ in wire.seen if (op, node) == ("evaluate", name))
        assert sum(r[name].bytes_down for r in records) == down
        assert sum(r[name].bytes_up for r in records) == up
        assert sum(r[name].evaluation_bytes for r in records) == both


@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora", "fedsvd", "fedex", "flora", "flexlora"])
@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("evaluates", [False, True])
def test_the_projection_is_what_the_ledger_says_afterwards(rule, codec, evaluates, make_chain):
    held_out = dict.fromkeys(SHARES, PAIRS[:2]) if evaluates else None
    options = {"aggregation": rule, "codec": codec, "samples": 0, "evaluation": held_out}
    fed, _ = federation(make_chain(lora=True), **options)
    start = fed._server.model.trainable_state()
    plan, parameters = fed.plan(rounds=4), sum(p.numel() * 4 for p in fed._server.model.parameters())
    assert_equal(fed._server.model.trainable_state(), start)
    assert fed.round == 0
    fed.fit(4)
    up = sum(r.bytes_up for r in fed.history)
    down = sum(p.bytes_down + p.evaluation_bytes for r in fed.history for p in r.participants.values())
    assert plan.bytes_up == pytest.approx(up, rel=0.05)
    assert plan.bytes_down == pytest.approx(down, rel=0.08)
    assert plan.seconds > 0
    assert plan.memory > parameters
    assert "4 rounds × 3 participants" in str(plan)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": "fedit", "participants_per_round": 1},
        {"aggregation": "fedit", "participants_per_round": 1, "codec": "int8", "broadcast_codec": "int8"},
        {"aggregation": "rolora", "participants_per_round": 1, "broadcast_codec": "int8"},
        {"aggregation": "ffa", "participants_per_round": 2},
        {"aggregation": "fedex", "participants_per_round": 2},
        {"aggregation": "flora", "participants_per_round": 1},
        {"aggregation": "flora", "mixed": True},
        {"aggregation": "flora", "participants_per_round": 2, "mixed": True},
        {"aggregation": "flexlora", "mixed": True},
    ],
)
def test_the_projection_knows_who_will_be_asked(options, after, make_chain):
    """Sampled participants lack more than one change, and those of a smaller rank are sent less."""
    mixed = [Participant("a", PAIRS[:5], rank=2), Participant("b", PAIRS[5:9]), Participant("c", PAIRS[9:], rank=1)]
    options = dict(options)
    shares = mixed if options.pop("mixed", False) else SHARES
    fed, _ = federation(make_chain(lora=True), shares, samples=0, **options)
    if after:
        fed.fit(after)
    plan = fed.plan(rounds=6)
    fed.fit(6)
    assert plan.bytes_up == pytest.approx(sum(r.bytes_up for r in fed.history[after:]), rel=0.05)
    assert plan.bytes_down == pytest.approx(sum(r.bytes_down for r in fed.history[after:]), rel=0.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_the_projection_counts_what_somebody_has_lacked_for_long(rule, seed, make_chain):
    """Who was never asked lacks the whole remainder, which has grown before the plan."""
    shares = {name: PAIRS[2 * i : 2 * i + 2] for i, name in enumerate("abcdef")}
    options = {"aggregation": rule, "participants_per_round": 2 if rule == "fedex" else 1, "seed": seed, "samples": 0}
    fed, _ = federation(make_chain(lora=True), shares, **options)
    fed.fit(3)
    plan = fed.plan(rounds=6)
    fed.fit(6)
    assert plan.bytes_down == pytest.approx(sum(r.bytes_down for r in fed.history[3:]), rel=0.08)


def test_the_projection_counts_evaluation_where_somebody_holds_out(make_chain):
    options = {"evaluation": {"a": PAIRS[:2]}, "participants_per_round": 1, "samples": 0}
    fed, _ = federation(make_chain(lora=True), **options)
    plan = fed.plan(rounds=4)
    fed.fit(4)
    down = sum(p.bytes_down + p.evaluation_bytes for r in fed.history for p in r.participants.values())
    assert plan.bytes_down == pytest.approx(down, rel=0.08)


def test_a_projection_needs_participants(make_chain):
    with pytest.raises(ConfigError, match="nobody to learn from"):
        FederatedAveraging(make_chain(lora=True)).plan(rounds=2)
    with pytest.raises(ConfigError, match="at least one round"):
        federation(make_chain(lora=True))[0].plan(rounds=0)


def test_mixed_ranks_are_sent_their_own_size(make_chain):
    shares = [Participant("weak", PAIRS[:6], rank=1), Participant("strong", PAIRS[6:])]
    fed, wire = federation(make_chain(lora=True), shares, aggregation="flexlora")
    fed.fit(2)
    last = {node: (down, up) for op, node, down, up, *_ in wire.seen if op == "train"}
    assert last["weak"][0] < 0.65 * last["strong"][0]
    assert last["weak"][1] < 0.65 * last["strong"][1]


# --- what nobody should send ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1e6, 1e300, -1.0, 2.5])
def test_steps_that_nobody_asked_for_are_refused(steps, make_chain, monkeypatch):
    """FedNova divides by them; one participant must not move the others' weights by lying, nor end the round."""
    honest, chain = make_chain(lora=True), make_chain(lora=True)
    federation(honest, {n: SHARES[n] for n in "ac"}, aggregation="fednova")[0].fit(1)
    fed, _ = federation(chain, aggregation="fednova")

    def lie(client, task, state):
        answer = training.train(client, task, state)
        head, infos = inspect(answer, max_bytes=len(answer))
        head["metrics"]["steps"] = steps
        return pack(values(answer, infos), head)

    does(monkeypatch, fed._peers["b"], lie)
    fed.fit(1)
    record = fed.history[0].participants["b"]
    assert record.status == "refused"
    assert "steps" in record.reason
    assert_equal(chain.model.trainable_state(), honest.model.trainable_state())


def test_two_federations_do_not_share_a_server_optimizers_memory(make_chain):
    optimizer = FedAdam(lr=0.01)
    federation(make_chain(lora=True), server_optimizer=optimizer)[0].fit(2)
    second, fresh = make_chain(lora=True), make_chain(lora=True)
    federation(second, server_optimizer=optimizer)[0].fit(1)
    federation(fresh, server_optimizer=FedAdam(lr=0.01))[0].fit(1)
    assert_equal(second.model.trainable_state(), fresh.model.trainable_state())


def test_other_trainable_tensors_between_rounds_are_named(make_chain):
    chain = make_chain(lora=True)
    fed, _ = federation(chain)
    fed.fit(1)
    dict(chain.model.module.named_parameters())["base_model.model.model.norm.weight"].requires_grad_(True)
    with pytest.raises(FederationError, match="trainable tensors are others than when the federation began"):
        fed.fit(1)
    assert fed.round == 1
