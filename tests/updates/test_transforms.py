"""UpdateTransform: what happens to an update before it is sent, shown by three of an outsider's own.

Belongs here: order, names, what is carried, what is refused. Does not: codecs with error feedback (test_codecs, and
federated/server/test_broadcast).
"""

import math

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import (
    CheckpointError,
    ConfigError,
    FederatedAveraging,
    FederationError,
    LLMChainFedError,
    TrainingConfig,
)
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms.base import UpdateTransform

SHARES = {"a": PAIRS[:3], "b": PAIRS[3:7], "c": PAIRS[7:]}
FAST = TrainingConfig(learning_rate=1e-2, batch_size=4)


def federation(chain, participants=SHARES, **options):
    return FederatedAveraging(chain, **({"participants": participants, "training": FAST, "progress": False} | options))


# --- the toys ---------------------------------------------------------------------------------------------------------


def noise(name, number, tensors):
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * number)
    return {n: 1e-3 * torch.randn(tensors[n].shape, generator=generator) for n in sorted(tensors)}


class ClippedWithNoise(UpdateTransform):
    """One L2 clip over all tensors, and noise that is the same whenever this participant's round is."""

    name = "clip"

    def __init__(self, clip):
        self.clip = clip

    def apply(self, delta, origin, carried):
        norm = math.hypot(*(float(torch.linalg.vector_norm(t)) for t in delta.values()))
        added = noise(origin.participant, origin.number, delta)
        return {n: t * min(1.0, self.clip / norm) + added[n] for n, t in delta.items()}, {}


class Half(UpdateTransform):
    """Sends half of what there is; the other half is carried to the next round."""

    name = "half"

    def carries(self, infos):
        return {n: TensorInfo(torch.float32, info.shape) for n, info in infos.items()}

    def apply(self, delta, origin, carried):
        whole = {n: t + carried[n] if carried else t for n, t in delta.items()}
        return {n: t / 2 for n, t in whole.items()}, {n: t / 2 for n, t in whole.items()}


class Counts(UpdateTransform):
    """Makes something else of a delta."""

    name, keeps_names = "counts", False

    def apply(self, delta, origin, carried):
        return {"count": torch.tensor([float(len(delta))])}, {}


class Summand(UpdateTransform):
    name, needs_sum = "summand", True

    def apply(self, delta, origin, carried):
        return dict(delta), {}


# --- what they do -----------------------------------------------------------------------------------------------------


def deltas(make, start, number, shares=SHARES, **options):
    """Participant → what it learns from there, found by one that trains alone."""
    found = {}
    for name, pairs in shares.items():
        chain = make()
        chain.model.load_state(start)
        alone = federation(chain, {name: pairs}, **options)
        alone._server.round = number  # the order of the examples follows from it
        alone.fit(1)
        found[name] = {n: t.double() - start[n].double() for n, t in chain.model.trainable_state().items()}
    return found


@pytest.mark.parametrize("how", ["fit", "train and step"])
def test_a_clip_and_noise_are_those_of_an_outsiders_arithmetic(how, make_chain):
    chain, clip = make_chain(lora=how == "fit"), 0.05
    fed = federation(chain, SHARES if how == "fit" else None, transforms=[ClippedWithNoise(clip)])
    for number in range(2):
        start = chain.model.trainable_state()
        if how == "fit":
            fed.fit(1)
        else:
            for name, pairs in SHARES.items():
                fed.train(pairs, name)
            fed.step()
        wanted = {n: t.double() for n, t in start.items()}
        for name, delta in deltas(lambda: make_chain(lora=how == "fit"), start, number).items():
            norm = math.sqrt(sum(float((t**2).sum()) for t in delta.values()))
            assert norm > clip
            more = noise(name, number, delta)
            for n, change in delta.items():
                wanted[n] = wanted[n] + len(SHARES[name]) / len(PAIRS) * (change * clip / norm + more[n].double())
        for n, tensor in chain.model.trainable_state().items():
            torch.testing.assert_close(tensor.double(), wanted[n], rtol=1e-5, atol=1e-6)


def test_they_come_one_after_the_other_and_a_codec_last(make_chain):
    """A clip that halves, and a clip to nothing after it; then the same as bfloat16."""
    chain, rounded = make_chain(), make_chain()
    start = chain.model.trainable_state()
    first, second = ClippedWithNoise(1.0), ClippedWithNoise(0.01)
    second.name = "again"
    federation(chain, {"a": SHARES["a"]}, transforms=[first, second]).fit(1)
    federation(rounded, {"a": SHARES["a"]}, transforms=[first, second], codec="bf16").fit(1)
    ((_, delta),) = deltas(make_chain, start, 0, {"a": SHARES["a"]}).items()
    for clip in (1.0, 0.01):
        norm = math.sqrt(sum(float((t**2).sum()) for t in delta.values()))
        delta = {n: t * min(1.0, clip / norm) + noise("a", 0, delta)[n].double() for n, t in delta.items()}
    ours, coarse = chain.model.trainable_state(), rounded.model.trainable_state()
    for n, change in delta.items():
        torch.testing.assert_close(ours[n].double() - start[n].double(), change, rtol=1e-4, atol=1e-6)
        sent = change.float().bfloat16().double()
        torch.testing.assert_close(coarse[n].double() - start[n].double(), sent, rtol=1e-2, atol=1e-6)


def test_what_is_carried_comes_with_the_next_round_and_out_of_a_checkpoint(make_chain, tmp_path):
    chain = make_chain(lora=True)
    options = {"transforms": [Half()], "codec": "int8", "checkpoint_dir": tmp_path}
    fed = federation(chain, **options)
    fed.fit(2)
    kept = fed._peers["a"].progress.before()[1].carried
    assert {name.partition("/")[0] for name in kept} == {"half", "residual"}
    again = make_chain(lora=True)
    resumed = FederatedAveraging.resume(tmp_path, again, participants=SHARES, transforms=[Half()], progress=False)
    resumed.fit(1)
    fed.fit(1)
    ours, theirs = chain.model.trainable_state(), again.model.trainable_state()
    assert all(torch.equal(theirs[n], t) for n, t in ours.items())
    with pytest.raises(CheckpointError, match=r"transforms were code: .*half.* Pass transforms= again"):
        FederatedAveraging.resume(tmp_path, make_chain(lora=True), participants=SHARES, progress=False)


def test_half_and_the_other_half_later_is_all(make_chain):
    """One participant, SGD: the halves that were sent and the one that is carried are what it learnt."""
    chain, shares, total = make_chain(), {"a": SHARES["a"]}, None
    fed = federation(chain, shares, transforms=[Half()])
    begin = chain.model.trainable_state()
    for number in range(3):
        start = chain.model.trainable_state()
        fed.fit(1)
        ((_, learnt),) = deltas(make_chain, start, number, shares).items()
        total = learnt if total is None else {n: t + learnt[n] for n, t in total.items()}
    carried = fed._peers["a"].progress.before()[1].carried
    for n, tensor in chain.model.trainable_state().items():
        sent = tensor.double() - begin[n].double()
        torch.testing.assert_close(sent + carried[f"half/{n}"].double(), total[n], rtol=1e-4, atol=1e-6)


def test_none_at_all_leaves_every_bit(make_chain):
    chain, other = make_chain(lora=True), make_chain(lora=True)
    federation(chain, transforms=[]).fit(2)
    federation(other).fit(2)
    theirs = other.model.trainable_state()
    assert all(torch.equal(theirs[n], t) for n, t in chain.model.trainable_state().items())


# --- what is refused --------------------------------------------------------------------------------------------------


class NotFinite(UpdateTransform):
    name = "nan"

    def apply(self, delta, origin, carried):
        return {n: t / 0 for n, t in delta.items()}, {}


class Forgetful(UpdateTransform):
    name = "forgets"

    def apply(self, delta, origin, carried):
        return dict(list(delta.items())[1:]), {}


@pytest.mark.parametrize(
    ("transform", "reason"), [(NotFinite(), "makes .* NaN, infinite"), (Forgetful(), "makes other tensors")]
)
def test_one_that_does_not_keep_its_word_fails_its_participant(transform, reason, make_chain):
    chain = make_chain()
    before = chain.model.trainable_state()
    with pytest.raises(LLMChainFedError, match=reason):
        federation(chain, transforms=[transform]).fit(1)
    after = chain.model.trainable_state()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"transforms": [Summand()], "aggregation": "fednova"}, "does not say that a sum is all it needs.* Use fedavg"),
        ({"transforms": [Summand()], "aggregation": "fedex"}, "does not say that a sum is all it needs"),
        ({"transforms": [Summand()], "max_weight_share": 0.5}, "cannot cut the weight of one. Leave max_weight_share"),
        ({"transforms": [Half()], "aggregation": "flora"}, "writes the factors anew.* Use fedit, ffa or rolora"),
        ({"transforms": [Half()], "aggregation": "fedsvd"}, "writes the factors anew"),
        ({"transforms": [Counts(), Half()]}, "no other can use that. Put it last"),
        ({"transforms": [Counts()], "codec": "int8"}, "asked for is a delta for the codec, and the transform makes"),
        ({"transforms": [Half(), Half()]}, "a name of its own without"),
        ({"transforms": [lambda delta: delta]}, "UpdateTransform objects with a name"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(options, reason, make_chain):
    with pytest.raises(ConfigError, match=reason):
        federation(make_chain(lora=True), **options)


@pytest.mark.parametrize("rule", ["fedavg", "fedit", "ffa", "rolora", "fedsa", "fedsvd"])
def test_a_summand_goes_with_every_rule_that_is_a_sum(rule, make_chain):
    assert federation(make_chain(lora=True), transforms=[Summand()], aggregation=rule).fit(1)[0].trained == [
        "a",
        "b",
        "c",
    ]


def test_no_code_travels_to_participants_of_a_runtime(make_chain):
    with pytest.raises(ConfigError, match=r"no code travels to the participants that a runtime brings. Leave them out"):
        federation(make_chain(), None, runtime=InProcess({}), transforms=[Half()])


@pytest.mark.parametrize("kind", [tuple, iter])
def test_any_iterable_of_transforms_is_applied_as_a_list_is(kind, make_chain):
    one, other = make_chain(), make_chain()
    federation(one, transforms=[Half()]).fit(1)
    fed = federation(other, transforms=kind([Half()]))
    fed.fit(1)
    assert fed.config.transforms == ["code: half (give it again on resume)"]
    wanted = one.model.trainable_state()
    assert all(torch.equal(wanted[n], t) for n, t in other.model.trainable_state().items())


@pytest.mark.parametrize("empty", [(), [], iter(())])
def test_none_at_all_are_none(empty, make_chain):
    assert federation(make_chain(), transforms=empty).config == federation(make_chain()).config
    federation(make_chain(), None, runtime=InProcess({}), transforms=empty)


class Forgetful(UpdateTransform):
    """Carries what its carries() does not say."""

    name = "forgetful"

    def apply(self, delta, origin, carried):
        return dict(delta), {"sum": torch.zeros(1)}


class Single(UpdateTransform):
    name = "single"

    def apply(self, delta, origin, carried):
        return dict(delta)


@pytest.mark.parametrize(
    ("transform", "said"), [(Forgetful(), "which its carries"), (Single(), "a pair, an outcome and what it carries")]
)
def test_what_no_checkpoint_could_go_on_from_is_refused_before_it_is_written(transform, said, make_chain, tmp_path):
    fed = FederatedAveraging(
        make_chain(), participants={"a": PAIRS[:4]}, transforms=[transform], checkpoint_dir=tmp_path, progress=False
    )
    with pytest.raises(FederationError, match=said):
        fed.fit(1)
    assert not list(tmp_path.glob("round*"))


def test_one_transform_alone_is_no_list(make_chain):
    with pytest.raises(ConfigError, match=r"Write transforms=\[…\]"):
        FederatedAveraging(make_chain(), participants={"a": PAIRS[:4]}, transforms=Single(), progress=False)
