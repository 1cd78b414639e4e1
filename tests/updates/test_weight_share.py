"""max_weight_share: no update weighs more than a share of its round, against an outsider's arithmetic.

Belongs here: how weights are cut, and that rounds use them. Does not: weights as they are (test_invariants).
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, FederationError, QuorumError, TrainingConfig
from llmchain_fed.federated.options import FederationConfig
from llmchain_fed.runtimes.federation_file import FederationFile
from llmchain_fed.updates.aggregation import RunningMean, weight_share
from llmchain_fed.updates.aggregation.weight_share import SMALLEST, CappedWeights, Share, cut
from llmchain_fed.updates.collection import Collection, Combined, Contribution

SGD = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=64)
SHARES = {"a": PAIRS[:1], "b": PAIRS[1:3], "c": PAIRS[3:5], "large": PAIRS[5:]}  # 1, 2, 2 and 7 of 12


def naively(weights, share):
    """Shares of the whole: cut who is above, hand what is over to the others by their weights, and again."""
    total = sum(weights.values())
    shares = {n: w / total for n, w in weights.items()}
    if len(weights) * share <= 1:
        return dict.fromkeys(weights, 1 / len(weights))
    fixed = set()
    for _ in range(len(weights)):
        above = {n for n, s in shares.items() if n not in fixed and s > share * (1 + 1e-12)}
        if not above:
            break
        fixed |= above
        rest = sum(weights[n] for n in weights if n not in fixed)
        left = 1 - share * len(fixed)
        shares = {n: share if n in fixed else left * weights[n] / rest for n in weights}
    return shares


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 10**9), min_size=1, max_size=12),
    st.sampled_from([0.05, 0.1, 0.25, 1 / 3, 0.4, 0.5, 0.75, 1.0]),
)
def test_cutting_and_handing_on_is_one_threshold(weights, share):
    found = cut(weights, share)
    total = math.fsum(found.values())
    for name, wanted in naively(weights, share).items():
        assert found[name] / total == pytest.approx(wanted, rel=1e-9)
        assert found[name] / total <= max(share, 1 / len(weights)) * (1 + 1e-9)
    if max(weights.values()) <= share * sum(weights.values()) and len(weights) * share > 1 + 1e-6:
        assert found == weights, "weights that fit are left alone"


class Seen(Collection):
    """Who was added by which weight."""

    def __init__(self):
        self.weights = []

    def zero(self, about): ...

    def add(self, given):
        self.weights.append((given.participant, given.weight))

    def finish(self):
        return Combined({})


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_only_updates_that_may_be_cut_are_kept(weights, share):
    named = {str(i): w for i, w in enumerate(weights)}
    inner, most = Seen(), 0
    capped = CappedWeights(inner, share)
    for name, weight in named.items():
        capped.add(Contribution({}, weight, participant=name))
        most = max(most, len(capped._kept))
    assert most <= math.ceil(1 / share)
    assert all(weight == named[name] for name, weight in inner.weights)
    capped.release()
    assert dict(inner.weights) == capped.weights == cut(named, share)
    assert len(inner.weights) == len(named)


def trained_apart(make_chain):
    """Participant → the weights it would hand over, by one that trains alone."""
    found = {}
    for name, pairs in SHARES.items():
        chain = make_chain(lora=True)
        FederatedAveraging(chain, participants={name: pairs}, training=SGD, progress=False).fit(1)
        found[name] = chain.model.trainable_state()
    return found


@pytest.mark.parametrize("how", ["fit", "train and step"])
@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (None, {"a": 1 / 12, "b": 2 / 12, "c": 2 / 12, "large": 7 / 12}),
        (0.4, {"a": 0.12, "b": 0.24, "c": 0.24, "large": 0.4}),
        (0.26, {"a": 0.22, "b": 0.26, "c": 0.26, "large": 0.26}),
        (0.2, {"a": 0.25, "b": 0.25, "c": 0.25, "large": 0.25}),
    ],
)
def test_the_mean_is_that_of_the_cut_shares(how, share, wanted, make_chain):
    apart = trained_apart(make_chain)
    chain = make_chain(lora=True)
    people = SHARES if how == "fit" else None
    fed = FederatedAveraging(chain, participants=people, training=SGD, progress=False, max_weight_share=share)
    if how == "fit":
        fed.fit(1)
    else:
        for name, pairs in reversed(SHARES.items()):
            fed.train(pairs, name)
        fed.step()
    for name, tensor in chain.model.trainable_state().items():
        mean = sum(apart[n][name].double() * s for n, s in wanted.items())
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    notes = {n: [note for note in r.notes if "weighs" in note] for n, r in fed.history[0].participants.items()}
    assert bool(notes["large"]) == (share is not None)
    if share == 0.4:
        assert notes["large"] == ["its update weighs 0.4 of the round, not 0.5833: max_weight_share=0.4"]
        assert notes["a"] == notes["b"] == notes["c"] == []
    if share == 0.2:
        assert notes["a"] == ["its update weighs 0.25 of the round, not 0.08333: as all do, for they are too few"]


@pytest.mark.parametrize("rule", ["fednova", "fedex", "flora", "flexlora", "fedsvd"])
def test_every_rule_weighs_the_same_way(rule, make_chain):
    """A share that cuts the largest to 0.4 of 12 is what 10/3 examples instead of 7 would be."""
    chains = [make_chain(lora=True) for _ in range(2)]
    options = {"training": SGD, "progress": False, "aggregation": rule}
    FederatedAveraging(chains[0], participants=SHARES, max_weight_share=0.4, **options).fit(1)
    with pytest.MonkeyPatch.context() as patch:
        # the threshold of an outsider: 0.4 = t / (t + 5)
        patch.setattr(weight_share, "cut", lambda *_: pytest.fail("not asked for"))
        other = FederatedAveraging(chains[1], participants=SHARES, **options)
        inner = other._server.begin

        def begin():
            opened = inner()
            add = opened._collection.add
            opened._collection.add = lambda g: add(replace(g, weight=10 / 3 if g.weight == 7 else g.weight))
            return opened

        patch.setattr(other._server, "begin", begin)
        other.fit(1)
    ours, theirs = (chain.model.trainable_state() for chain in chains)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    for layer, (b, a) in chains[0].model.remainder().items():
        other_b, other_a = chains[1].model.remainder()[layer]
        torch.testing.assert_close(b @ a, other_b @ other_a, rtol=1e-4, atol=1e-6)


def test_who_stays_away_lifts_nobody_above_the_share(make_chain):
    """Shares are of those whose updates are in, not of those who were asked."""
    bad = {**SHARES, "b": PAIRS[1:3]}
    fed = FederatedAveraging(
        make_chain(lora=True), participants=bad, training=SGD, progress=False, max_weight_share=0.5
    )
    inner = fed._peers["b"].handle
    fed._peers["b"].handle = lambda op, payload: b"{}" if op == "train" else inner(op, payload)
    record = fed.fit(1)[0]
    assert record.participants["b"].status == "refused"
    assert record.participants["large"].notes == ["its update weighs 0.5 of the round, not 0.7: max_weight_share=0.5"]


class Asking(Collection):
    """What was in when its own task between training and sum began; it cannot add the update of one participant."""

    name = "asking"

    def __init__(self, refused=None):
        self.mean, self.refused, self.names, self.between_with = RunningMean(), refused, [], None

    def zero(self, about):
        self.mean.zero(about)
        self.names = []

    def add(self, given):
        if given.participant == self.refused:
            raise FederationError("it cannot be added.")
        self.mean.add(given)
        self.names.append(given.participant)

    def between(self, ask):
        self.between_with = sorted(self.names)

    def finish(self):
        return self.mean.finish()


def capped_federation(make_chain, collection, **options):
    chain = make_chain(lora=True)
    options = {"training": SGD, "progress": False, "max_weight_share": 0.4, "aggregation": collection} | options
    return chain, FederatedAveraging(chain, participants=SHARES, **options)


def test_a_collections_own_task_comes_after_every_update_is_in(make_chain):
    """Of shares of 0.4 two updates are kept until all are there: a task between training and sum is about them, too."""
    collection = Asking()
    _, fed = capped_federation(make_chain, collection)
    fed.fit(1)
    assert collection.between_with == ["a", "b", "c", "large"]


def test_an_update_that_was_kept_and_could_not_be_added_counts_for_no_quorum(make_chain):
    chain, fed = capped_federation(make_chain, Asking("large"), quorum=4)
    before = chain.model.trainable_state()
    with pytest.raises(QuorumError, match=r"3 usable updates, the quorum is 4 \(large: .*it cannot be added"):
        fed.fit(1)
    assert all(torch.equal(t, before[n]) for n, t in chain.model.trainable_state().items())
    _, fed = capped_federation(make_chain, Asking("large"), quorum=3)
    assert fed.fit(1)[0].trained == ["a", "b", "c"]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), True, "0.5", [0.5]])
def test_shares_that_are_none(share, make_chain):
    with pytest.raises(ConfigError, match="`max_weight_share`: Input should be"):
        FederatedAveraging(make_chain(), participants=SHARES, training=SGD, max_weight_share=share)


def test_it_goes_on_after_a_checkpoint(make_chain, tmp_path):
    options = {"training": SGD, "progress": False, "max_weight_share": 0.4}
    fed = FederatedAveraging(make_chain(lora=True), participants=SHARES, checkpoint_dir=tmp_path, **options)
    fed.fit(1)
    again = FederatedAveraging.resume(tmp_path, make_chain(lora=True), participants=SHARES, progress=False)
    assert again._server.settings.config.max_weight_share == 0.4
    assert again.fit(1)[-1].participants["large"].notes == fed.fit(1)[-1].participants["large"].notes


@pytest.mark.parametrize("share", [5e-324, 1e-300, SMALLEST / 2, 0.0, 1.5, True, "0.5"])
def test_a_share_of_nothing_is_none_wherever_it_is_given(share, make_chain):
    with pytest.raises(ConfigError, match="max_weight_share"):
        FederatedAveraging(make_chain(), participants=SHARES, max_weight_share=share, progress=False)
    for model in (FederationConfig, FederationFile):
        assert model.model_fields["max_weight_share"].annotation == Share | None
    assert CappedWeights(Seen(), SMALLEST)._most == 10**6
