"""Collection: what the hub keeps of arrivals, shown by one that never sees an update. It knows the public seams alone.

Belongs here: payloads of their own, and tasks between training and sum. Does not: the rules that are there
(test_aggregation, test_lora_rules).
"""

import json

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, Participant, TrainingConfig, TransportError
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.target import Target
from llmchain_fed.updates import serialization
from llmchain_fed.updates.aggregation import RunningMean
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.collection import Collection, Combined, Contribution
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms.base import UpdateTransform

SHARES = {"a": PAIRS[:3], "b": PAIRS[3:7], "c": PAIRS[7:]}
SGD = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=4)

# --- the toy: a sum of masked integers --------------------------------------------------------------------------------

GRID = 2.0**-24
SEEDS = {frozenset(pair): 1000 + i for i, pair in enumerate(["ab", "ac", "bc"])}  # what key agreement would give


def seeds(me, others):
    return {n: SEEDS[frozenset((me, n))] for n in others}


def masked_by(total, seed, number, sign):
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    drawn = {n: torch.randint(-(2**31), 2**31, total[n].shape, generator=generator).int() for n in sorted(total)}
    return {n: t + sign * drawn[n] for n, t in total.items()}


class Masked(UpdateTransform):
    """n_k · delta on a grid, and a mask for every other participant, whose sign is the other way round there."""

    name, keeps_names, needs_sum = "masked", False, True

    def apply(self, delta, origin, carried):
        me, total = origin.participant, {n: (t * origin.examples / GRID).round().int() for n, t in delta.items()}
        for other, seed in seeds(me, SHARES.keys() - {me}).items():
            total = masked_by(total, seed, origin.number, 1 if me < other else -1)
        return total, {}


class MaskedSum(Collection):
    """The sum, from which the masks of those who stayed away are taken once the others have told their seeds."""

    def zero(self, about):
        self.about, self.total, self.weights = about, None, {}

    def payload(self, layout):
        return {n: TensorInfo(torch.int32, info.shape) for n, info in layout.items()}

    def add(self, given):
        self.total = {n: t + self.total[n] if self.total else t for n, t in given.tensors.items()}
        self.weights[given.participant] = given.weight

    def between(self, ask):
        gone = sorted(SHARES.keys() - self.weights.keys())
        for name, answer in ask("unmask", {n: json.dumps(gone).encode() for n in self.weights if gone}).items():
            if isinstance(answer, Exception):
                raise FederationError(f"{name} told no seeds: the sum stays masked.")
            for other, seed in json.loads(answer).items():
                self.total = masked_by(self.total, seed, self.about.number, -1 if name < other else 1)

    def finish(self):
        share = GRID / sum(self.weights.values())
        return Combined({n: (self.about.state[n].double() + t.double() * share).float() for n, t in self.total.items()})


def telling(client):
    """A participant that also tells the seeds it shares with those who are gone."""
    me, inner = client.participant.name, client.handle

    def handle(op, sent):
        return json.dumps(seeds(me, json.loads(sent))).encode() if op == "unmask" else inner(op, sent)

    client.handle = handle


# --- what it shows ----------------------------------------------------------------------------------------------------


class Plain(UpdateTransform):
    name = "plain"

    def apply(self, delta, origin, carried):
        return dict(delta), {}


class Seen(MaskedSum):
    """Keeps what it was given and asked, for the test to look at."""

    def zero(self, about):
        super().zero(about)
        self.given, self.asked = {}, []

    def add(self, given):
        self.given[given.participant] = given.tensors
        super().add(given)

    def between(self, ask):
        super().between(lambda op, messages: self.asked.append((op, sorted(messages))) or ask(op, messages))


def unreachable_for(op, inner):
    def handle(asked, payload):
        if asked == op:
            raise TransportError("it is gone")
        return inner(asked, payload)

    return handle


def masked(chain, aggregation, gone=(), silent=(), **options):
    people = [Participant(name, pairs) for name, pairs in SHARES.items()]
    peers = {p.name: Client(Target.of(chain), p, SGD, transforms=[Masked()]) for p in people}
    for peer in peers.values():
        telling(peer)
    for name, op in [(n, "train") for n in gone] + [(n, "unmask") for n in silent]:
        peers[name].handle = unreachable_for(op, peers[name].handle)
    options = {"aggregation": aggregation, "training": SGD, "progress": False} | options
    return FederatedAveraging(chain, runtime=InProcess(peers), **options)


def plain(chain, names):
    shares = {name: SHARES[name] for name in names}
    return FederatedAveraging(chain, participants=shares, training=SGD, progress=False)


@pytest.mark.parametrize("gone", [(), ("a",), ("b",), ("c",)])
def test_a_sum_of_masked_updates_is_the_sum_of_the_plain_ones(gone, make_chain):
    """Two rounds; whoever stays away, the mean is that of the others, to the grid."""
    chain, other, collection = make_chain(lora=True), make_chain(lora=True), Seen()
    names = [name for name in SHARES if name not in gone]
    history = masked(chain, collection, gone).fit(2)
    plain(other, names).fit(2)
    theirs = other.model.trainable_state()
    for name, tensor in chain.model.trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert [record.trained for record in history] == [names] * 2
    assert collection.asked == [("unmask", names if gone else [])]


def test_the_hub_sees_no_single_update(make_chain):
    """What it is given is uniform noise, next to none of it the participant's own integers; no record says more."""
    chain, collection = make_chain(lora=True), Seen()
    start = chain.model.trainable_state()
    record = masked(chain, collection).fit(1)[0]
    for name, pairs in SHARES.items():
        alone = make_chain(lora=True)
        FederatedAveraging(alone, participants={name: pairs}, training=SGD, progress=False).fit(1)
        after = alone.model.trainable_state()
        true = [((after[n].double() - start[n].double()) * len(pairs) / GRID).round() for n in sorted(start)]
        masked_ones = [collection.given[name][n] for n in sorted(start)]
        own, seen = (torch.cat([t.flatten() for t in found]) for found in (true, masked_ones))
        assert seen.dtype == torch.int32
        assert float((own == seen).float().mean()) < 0.001
        both = torch.stack([own, seen.double()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / own.numel() ** 0.5
        assert float(seen.double().std()) == pytest.approx(2**32 / 12**0.5, rel=0.05)
        said = record.participants[name]
        assert (said.status, said.update_norm, said.cosine_to_mean) == ("trained", None, None)
    assert record.aggregation_gap is None


def test_a_sum_that_stays_masked_changes_nothing(make_chain):
    chain = make_chain(lora=True)
    before = chain.model.trainable_state()
    with pytest.raises(FederationError, match="b told no seeds"):
        masked(chain, MaskedSum(), gone=["a"], silent=["b"]).fit(1)
    after = chain.model.trainable_state()
    assert all(torch.equal(after[n], t) for n, t in before.items())


class Receipt(UpdateTransform):
    """Keeps the update, until the hub has heard from all who trained."""

    name, keeps_names = "receipt", False

    def __init__(self):
        self.kept = {}

    def apply(self, delta, origin, carried):
        self.kept[origin.participant] = delta
        return {}, {}

    def telling(self, client):
        me, inner = client.participant.name, client.handle

        def handle(op, sent):
            return serialization.pack(self.kept.pop(me), {}) if op == "hand over" else inner(op, sent)

        client.handle = handle


class AllOrNone(Collection):
    """Asks for updates only once it knows whose they are."""

    def zero(self, about):
        self.about, self.weights, self.mean = about, {}, RunningMean()

    def payload(self, layout):
        return {}

    def add(self, given):
        self.weights[given.participant] = given.weight

    def between(self, ask):
        for name, data in ask(
            "hand over", dict.fromkeys(self.weights, json.dumps(sorted(self.weights)).encode())
        ).items():
            _, infos = serialization.inspect(data, max_bytes=len(data))
            self.mean.add(Contribution(serialization.values(data, infos), self.weights[name]))

    def finish(self):
        change = self.mean.finish().values
        return Combined({n: self.about.state[n] + t for n, t in change.items()})


def test_updates_may_come_only_after_all_have_trained(make_chain):
    """A round's update is a receipt of no tensors; what is summed comes with a task of the collection's own."""
    chain, other, receipt = make_chain(lora=True), make_chain(lora=True), Receipt()
    options = {"participants": SHARES, "training": SGD, "progress": False}
    fed = FederatedAveraging(chain, aggregation=AllOrNone(), transforms=[receipt], **options)
    for peer in fed._peers.values():
        receipt.telling(peer)
    history = fed.fit(2)
    smooth = plain(other, SHARES).fit(2)
    theirs = other.model.trainable_state()
    for name, tensor in chain.model.trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert [(r.trained, r.notes) for r in history] == [(["a", "b", "c"], [])] * 2
    assert history[0].bytes_up < smooth[0].bytes_up / 10
    assert receipt.kept == {}


@pytest.mark.parametrize("share", [None, 0.5])
def test_one_that_sees_plain_updates_may_ask_as_well(share, make_chain):
    """Every participant that trained is asked once, before the end, and waited for as in any other task."""

    class Asks(RunningMean):
        def between(self, ask):
            self.told = ask("unmask", dict.fromkeys(["a", "c"], b'["b"]'))

    collection = Asks()
    fed = FederatedAveraging(
        make_chain(lora=True), participants=SHARES, aggregation=collection, max_weight_share=share, progress=False
    )
    for name in ("a", "c"):
        telling(fed._peers[name])
    waited, attendance = [], fed._server.client_manager.attendance
    attendance.follow(lambda: waited.append(attendance.waiting_for))
    fed.fit(1)
    assert {"a": "unmask", "c": "unmask"} in waited
    assert {name: json.loads(answer) for name, answer in collection.told.items()} == {
        "a": {"b": 1000},
        "c": {"b": 1002},
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"codec": "int8"}, "asks for a payload of its own, which no codec makes"),
        ({"max_weight_share": 0.4}, "sees no single update cannot cut the weight of one"),
    ],
)
def test_what_needs_single_updates_is_refused(options, reason, make_chain):
    with pytest.raises(ConfigError, match=reason):
        masked(make_chain(lora=True), MaskedSum(), **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"transforms": [Masked()]}, "asked for is values, and the transform makes something else"),
        ({"transforms": [Masked()], "aggregation": "fednova"}, "does not say that a sum is all it needs"),
        ({"transforms": [Masked()], "aggregation": MaskedSum()}, "declare your own rule summable if it is"),
        ({"transforms": [Plain()], "aggregation": MaskedSum()}, "asked for is a payload of its own, and"),
    ],
)
def test_a_payload_and_what_makes_it_belong_together(options, reason, make_chain):
    options = {"participants": SHARES, "training": SGD, "progress": False} | options
    with pytest.raises(ConfigError, match=reason):
        FederatedAveraging(make_chain(), **options)


def test_a_rule_of_ones_own_that_says_it_is_summable(make_chain):
    """In one process, with the participants of the federation itself: the same as by hand."""
    chain, other = make_chain(lora=True), make_chain(lora=True)
    options = {"aggregation": Rule("masked sum", MaskedSum, summable=True), "transforms": [Masked()]}
    FederatedAveraging(chain, participants=SHARES, training=SGD, progress=False, **options).fit(1)
    plain(other, SHARES).fit(1)
    theirs = other.model.trainable_state()
    for name, tensor in chain.model.trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_plain_values_are_not_the_payload_that_was_asked_for(make_chain):
    """A participant without the transform sends float32: it is refused by name, and the round fails its quorum."""
    chain = make_chain()
    peers = {n: Client(Target.of(chain), Participant(n, pairs), SGD) for n, pairs in SHARES.items()}
    options = {"aggregation": MaskedSum(), "training": SGD, "progress": False}
    fed = FederatedAveraging(chain, runtime=InProcess(peers), **options)
    with pytest.raises(FederationError, match=r"asked for was torch\.int32"):
        fed.fit(1)


class Forgets(RunningMean):
    """The mean of all tensors but the last, with a gap that it says itself."""

    def finish(self):
        found = super().finish()
        del found.values[max(found.values)]
        return Combined(found.values, gap=0.25)


def test_what_comes_out_of_no_update_is_noted_and_a_gap_of_its_own_is_recorded(make_chain):
    chain = make_chain(lora=True)
    before = chain.model.trainable_state()
    fed = FederatedAveraging(
        chain, participants=SHARES, training=SGD, aggregation=Rule("forgets", Forgets), progress=False
    )
    (record,) = fed.fit(1)
    last = max(before)
    assert record.notes == [
        f"1 of {len(before)} shared tensors, such as {last}, came out of no update: they are as before"
    ]
    assert record.aggregation_gap == 0.25
    assert torch.equal(chain.model.trainable_state()[last], before[last])
