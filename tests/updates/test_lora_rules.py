"""The rules for LoRA factors against effective weights: base + s·B·A + remainder, summed in float64 by an outsider.

Belongs here: what each rule of `aggregation` promises, through whole rounds and on factors alone; the gap; what travels
under each rule; personal factors; server optimizers on factors. Does not: which options go together
(test_compatibility), plain means (test_aggregation), how adapters are kept (test_adapters).
"""

import copy
import itertools
import json
import math
import time
from dataclasses import dataclass, field

import pytest
import torch
from tiny import PAIRS, lora_config, tiny_module
from torch.utils._python_dispatch import TorchDispatchMode

from llmchain_fed import DiLoCo, FedAdam, FedAvgM, FederatedAveraging, LLMChain, Participant, TrainingConfig
from llmchain_fed import train_locally as train
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.target import Target
from llmchain_fed.updates.aggregation import AGGREGATIONS, RunningMean, make_aggregation
from llmchain_fed.updates.aggregation.gap import AggregationGap
from llmchain_fed.updates.collection import Contribution, Round
from llmchain_fed.updates.lora_layout import LoraLayout
from llmchain_fed.updates.low_rank import Factors, Stack, covariance, norms_of_mean, stack

A, B = ".lora_A.weight", ".lora_B.weight"
SHARES = {"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}
P = {"a": 5 / 12, "b": 4 / 12, "c": 3 / 12}
FAST = TrainingConfig(learning_rate=2e-2, batch_size=3)
SGD = TrainingConfig(optimizer="sgd", learning_rate=1.0, batch_size=3)
KINDS = ["causal", "seq2seq"]
FROZEN = {"ffa": lambda _: "A", "fedsvd": lambda _: "A", "rolora": lambda number: "B" if number % 2 else "A"}
"""rule → which factor participants leave alone in a round, as the papers have it"""


def federation(chain, rule, participants=SHARES, training=FAST, **options):
    return FederatedAveraging(
        chain, participants=participants, aggregation=rule, training=training, progress=False, **options
    )


# --- the outsider -----------------------------------------------------------------------------------------------------


@dataclass
class Global:
    """What a chain has, copied, so that an outsider can start from it."""

    values: dict
    remainder: dict
    scaling: dict

    @classmethod
    def of(cls, chain):
        return cls(chain.model.trainable_state(), chain.model.remainder(), chain.model.lora_scaling())


def layers_of(state):
    return sorted({name.rpartition(".lora_")[0] for name in state})


def cut(start, rank, scaling):
    """The leading rows and columns, with B taking up the difference in scaling."""
    found = {}
    for layer, own in scaling.items():
        found[layer + A] = start.values[layer + A][:rank]
        found[layer + B] = start.values[layer + B][:, :rank] * (start.scaling[layer] / own)
    return found


def outsider(chain, start, participant, number, *, config=FAST, frozen=None, private=None):
    """A chain that no federation knows, after the training loop has trained it from the global state."""
    own = chain.model.lora_scaling()
    rank = chain.model.trainable_state()[next(iter(own)) + A].shape[0]
    chain.model.load_remainder(start.remainder)
    chain.model.load_state(cut(start, rank, own) | (private or {}))
    for name, parameter in chain.model.module.named_parameters():
        if frozen and f"lora_{frozen}" in name:
            parameter.requires_grad_(False)
    train(chain.model, participant.examples, config, prompt=chain, participant=participant.name, round=number)
    for name, parameter in chain.model.module.named_parameters():
        if "lora_" in name and "remainder" not in name:
            parameter.requires_grad_(True)
    return chain


def merged(chain):
    """Layer → the weight that PEFT merges everything into, in float64; the chain's own stays as it is."""
    parts, found = dict(chain.model.module.named_modules()), {}
    for name in chain.model.lora_scaling():
        layer = copy.deepcopy(parts[f"base_model.model.{name}"])
        layer.merge()
        found[name] = layer.get_base_layer().weight.detach().double()
    return found


def by_formula(chain):
    """Layer → base + s·B·A + remainder in float64, from what the chain says it has."""
    stored, found = Global.of(chain), {}
    parts = dict(tiny_module(chain.model.kind, len(chain.model.tokenizer)).named_modules())
    for layer, scaling in stored.scaling.items():
        b, a = stored.values[layer + B].double(), stored.values[layer + A].double()
        found[layer] = parts[layer].weight.detach().double() + scaling * b @ a
        if layer in stored.remainder:
            more_b, more_a = (t.double() for t in stored.remainder[layer])
            found[layer] = found[layer] + more_b @ more_a
    return found


def mean_of(parts, shares=P):
    """Σ p_k · (each one's) in float64."""
    first = next(iter(parts.values()))
    return {name: sum(shares[k] * part[name].double() for k, part in parts.items()) for name in first}


def furthest(got, wanted):
    assert got.keys() == wanted.keys()
    return max(float((got[n].double() - wanted[n].double()).abs().max()) for n in wanted)


def norm(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def batch_of(chain):
    encoded = encode_examples(PAIRS[:3], chain.model, chain)
    return collate([encoded[i] for i in range(3)], chain.model)


def logits(chain):
    with chain.model.exclusive(), torch.no_grad():
        return chain.model.module(**batch_of(chain)).logits


def logits_with(chain, weights):
    """Those of the bare base with these weights in its layers."""
    module = tiny_module(chain.model.kind, len(chain.model.tokenizer))
    parts = dict(module.named_modules())
    with torch.no_grad():
        for layer, weight in weights.items():
            parts[layer].weight.copy_(weight)
        return module(**batch_of(chain)).logits


@dataclass
class Wire:
    """What has travelled, by operation."""

    sent: list = field(default_factory=list)
    answered: list = field(default_factory=list)

    @staticmethod
    def names(data):
        return set(Wire.layout(data))

    @staticmethod
    def layout(data):
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__")
        return header

    @staticmethod
    def size(data):
        """bytes beside the header."""
        return len(data) - 8 - int.from_bytes(data[:8], "little")


def watched(peers):
    """Every message of training that passes between hub and participants from now on: (name, bytes)."""
    wire = Wire()
    for name, peer in peers.items():
        inner = peer.handle

        def handle(op, payload, name=name, inner=inner):
            answer = inner(op, payload)
            if op == "train":
                wire.sent.append((name, payload))
                wire.answered.append((name, answer))
            return answer

        peer.handle = handle
    return wire


# --- the new global weights are the mean of the participants' weights -------------------------------------------------


@dataclass
class Case:
    rule: str
    config: dict = field(default_factory=dict)
    """of the chain"""
    people: dict = field(default_factory=dict)
    """participant → rank and alpha of its own"""


CASES = {
    "ffa": Case("ffa"),
    "rolora": Case("rolora"),
    "fedsvd": Case("fedsvd"),
    "fedex": Case("fedex"),
    "flora": Case("flora"),
    "flexlora whose rank reaches the stack's": Case(
        "flexlora", {"r": 12, "lora_alpha": 24}, {n: {"rank": 4, "alpha": 8} for n in SHARES}
    ),
    "flora, mixed": Case(
        "flora", {"r": 8, "lora_alpha": 16}, {"a": {"rank": 8, "alpha": 4}, "b": {"rank": 2, "alpha": 10}}
    ),
    "flora, mixed, rsLoRA": Case(
        "flora", {"r": 8, "lora_alpha": 4, "use_rslora": True}, {"a": {"rank": 2}, "b": {"rank": 5, "alpha": 9}}
    ),
    "flexlora, mixed": Case(
        "flexlora",
        {"r": 12, "lora_alpha": 24},
        {"a": {"rank": 6, "alpha": 3}, "b": {"rank": 4, "alpha": 12}, "c": {"rank": 2}},
    ),
    "flexlora, mixed, rsLoRA": Case(
        "flexlora",
        {"r": 12, "lora_alpha": 6, "use_rslora": True},
        {"a": {"rank": 5, "alpha": 2}, "b": {"rank": 4}, "c": {"rank": 3, "alpha": 7}},
    ),
}


CELLS = [("causal", name) for name in CASES] + [
    ("seq2seq", name) for name in ("fedex", "flora, mixed", "flexlora, mixed, rsLoRA")
]


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_after_every_round_the_weights_are_the_mean_of_the_participants_weights(kind, name, make_chain, tmp_path):
    """base + s·B·A + remainder = Σ p_k · (what participant k's weights come to), three rounds in a row.

    Also: the chain's logits are those of a bare base with these weights, saved and loaded too.
    """
    case = CASES[name]
    people = [Participant(n, pairs, **case.people.get(n, {})) for n, pairs in SHARES.items()]
    chain = make_chain(kind, lora=lora_config(kind, **case.config))
    fed = federation(chain, case.rule, people)
    alone, after = {}, merged(chain)
    for person in people:
        own = {"r": person.rank, "lora_alpha": person.alpha} if person.rank else {}
        config = case.config | {option: value for option, value in own.items() if value is not None}
        alone[person.name] = make_chain(kind, lora=lora_config(kind, **config))
    for number in range(3):
        start, before, theirs = Global.of(chain), after, {}
        for person in people:
            frozen = FROZEN.get(case.rule, lambda _: None)(number)
            theirs[person.name] = merged(outsider(alone[person.name], start, person, number, frozen=frozen))
        fed.fit(rounds=1)
        wanted = mean_of(theirs)
        assert furthest(wanted, before) > 1e-3  # a round that does nothing would satisfy everything
        assert furthest(theirs["a"], theirs["b"]) > 1e-3
        after = merged(chain)
        assert furthest(by_formula(chain), wanted) < 1e-5
        assert furthest(after, wanted) < 1e-5
    assert fed.history[2].trained == ["a", "b", "c"]
    answers = logits_with(chain, wanted)
    assert not torch.allclose(answers, logits_with(chain, before), atol=1e-3)
    torch.testing.assert_close(logits(chain), answers, rtol=1e-4, atol=1e-4)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    torch.testing.assert_close(logits(loaded), logits(chain), rtol=0, atol=1e-5)  # the remainder is kept over s
    assert bool(chain.model.remainder()) == bool(loaded.model.remainder()) == (case.rule in ("fedex", "flora"))


@pytest.mark.parametrize(("rule", "a_round"), [("fedex", 2 * 4), ("flora", 3 * 4)])
def test_the_remainder_grows_by_what_a_round_adds_and_never_beyond_its_matrix(rule, a_round, make_chain):
    """(K−1)·r or Σ r_k a round, until min(m, n) says it all; what it stands for is checked above."""
    chain = make_chain(lora=True)
    fed = federation(chain, rule)
    shapes = {n: w.shape for n, w in merged(chain).items()}
    assert {min(shape) for shape in shapes.values()} == {16, 32}
    for number in range(3):
        fed.fit(rounds=1)
        ranks = {n: a.shape[0] for n, (_, a) in chain.model.remainder().items()}
        assert ranks == {n: min((number + 1) * a_round, *shape) for n, shape in shapes.items()}
    assert set(ranks.values()) >= {16}  # at least one was brought back


@pytest.mark.parametrize(("rule", "weighting"), [("fedex", "tokens"), ("flora", "equal"), ("rolora", "examples")])
def test_who_was_not_asked_for_a_round_catches_up(rule, weighting, make_chain):
    """Two of three a round, who are sent what they missed; and p_k follows from what updates count by."""
    chain, alone = make_chain(lora=True), make_chain(lora=True)
    # each with a model of its own, as in other processes: in one they share what any of them was sent
    peers = {n: Client(Target.of(make_chain(lora=True)), Participant(n, pairs), FAST) for n, pairs in SHARES.items()}
    wire = watched(peers)
    options = {"participants_per_round": 2, "weighting": weighting, "runtime": InProcess(peers)}
    fed = federation(chain, rule, None, **options)
    for number in range(5):
        start = Global.of(chain)
        record = fed.fit(rounds=1)[number]
        found = {n: record.participants[n] for n in record.trained}
        weights = {n: {"examples": r.examples, "tokens": r.tokens, "equal": 1}[weighting] for n, r in found.items()}
        frozen = FROZEN.get(rule, lambda _: None)(number)
        theirs = {n: merged(outsider(alone, start, Participant(n, SHARES[n]), number, frozen=frozen)) for n in weights}
        shares = {n: w / sum(weights.values()) for n, w in weights.items()}
        assert furthest(by_formula(chain), mean_of(theirs, shares)) < 1e-5
    assert b"stale" not in {answer[2:7] for _, answer in wire.answered}
    rounds_of = {n: [i // 2 for i, (name, _) in enumerate(wire.sent) if name == n] for n in SHARES}
    assert any(b - a > 1 for rounds in rounds_of.values() for a, b in itertools.pairwise(rounds))


def test_a_personal_model_of_a_smaller_rank_is_what_it_would_have_become_alone(make_chain):
    """personalize(): the global state at its rank and scaling, the remainder within it, some steps on."""
    person = Participant("small", SHARES["a"], rank=2, alpha=9)
    chain = make_chain(lora=True)
    fed = federation(chain, "flora", [person, Participant("b", SHARES["b"])])
    fed.fit(rounds=2)
    start = Global.of(chain)
    fed.personalize("small", steps=2)
    alone = make_chain(lora=lora_config(r=2, lora_alpha=9))
    wanted = merged(outsider(alone, start, person, 2, config=FAST.replace(epochs=None, max_steps=2)))
    state = chain.model.adapter_state("small")
    base = bare_weights(chain)
    got = {n: base[n].detach().double() + w for n, w in product(state, dict.fromkeys(base, 4.5)).items()}
    assert furthest(got, wanted) < 1e-5
    assert furthest(got, by_formula(chain)) > 1e-3


# --- fedit is not exact, and by how much ------------------------------------------------------------------------------


def test_fedit_misses_the_mean_by_the_covariance_of_the_factors(make_chain):
    """mean(s·B·A) − s·B̄·Ā = s·Σ p_k (B_k − B̄)(A_k − Ā)."""
    chain = make_chain(lora=True)
    start = Global.of(chain)
    federation(chain, "fedit").fit(rounds=1)
    theirs = {n: outsider(make_chain(lora=True), start, Participant(n, s), 0) for n, s in SHARES.items()}
    missing = {n: w - by_formula(chain)[n] for n, w in mean_of({k: merged(c) for k, c in theirs.items()}).items()}
    states = {k: c.model.trainable_state() for k, c in theirs.items()}
    mean = mean_of(states)
    gap = {}
    for layer, scaling in start.scaling.items():
        apart = [P[k] * (s[layer + B] - mean[layer + B]) @ (s[layer + A] - mean[layer + A]) for k, s in states.items()]
        gap[layer] = scaling * sum(apart)
    assert min(float(g.abs().max()) for g in gap.values()) > 1e-4
    assert furthest(missing, gap) < 1e-6


def random_factors(count, m=9, n=7, r=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(m, r, generator=generator, dtype=dtype), torch.randn(r, n, generator=generator, dtype=dtype)
        )
        for _ in range(count)
    ]


def test_the_covariance_of_factors_in_float64():
    """Three ways to write it, dense; it takes one participant's rank less than all of them."""
    parts, shares = random_factors(4), [0.1, 0.2, 0.3, 0.4]
    mean_b, mean_a = (sum(p * getattr(f, part) for p, f in zip(shares, parts, strict=True)) for part in "ba")
    product = sum(p * f.b @ f.a for p, f in zip(shares, parts, strict=True)) - mean_b @ mean_a
    centred = sum(p * (f.b - mean_b) @ (f.a - mean_a) for p, f in zip(shares, parts, strict=True))
    found = covariance(parts, shares)
    torch.testing.assert_close(product, centred, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.b @ found.a, product, rtol=0, atol=1e-14)
    assert found.rank == 3 * 2
    assert int(torch.linalg.matrix_rank(product)) == 6
    assert found.norm() == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-12)
    whole, left_out = norms_of_mean(parts, shares)
    assert whole == pytest.approx(float(torch.linalg.matrix_norm(product + mean_b @ mean_a)), rel=1e-12)
    assert left_out == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-12)
    one = float(torch.linalg.matrix_norm(parts[0].b @ parts[0].a))
    assert norms_of_mean(parts[:1], [1.0]) == (pytest.approx(one, rel=1e-12), 0.0)


@pytest.mark.parametrize("part", "ab")
def test_it_is_zero_where_one_factor_is_everybodys(part):
    parts = random_factors(4)
    other = "b" if part == "a" else "a"
    parts = [Factors(**{part: getattr(parts[0], part), other: getattr(f, other)}) for f in parts]
    found = covariance(parts, [0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(found.b @ found.a, torch.zeros(9, 7, dtype=torch.float64), rtol=0, atol=1e-14)
    assert covariance(parts[:1], [1.0]).rank == 0


# --- the algebra of factors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 2), (7, 9, 5), (6, 6, 6), (4, 12, 9), (5, 3, 11), (1, 8, 2)])
def test_singular_values_from_thin_factors_are_the_dense_ones(m, n, r):
    (pair,) = random_factors(1, m, n, r)
    u, s, vt = pair.svd()
    torch.testing.assert_close(s, torch.linalg.svdvals(pair.b @ pair.a)[: len(s)], rtol=1e-10, atol=1e-12)
    assert len(s) == min(m, n, r)
    torch.testing.assert_close(u @ torch.diag(s) @ vt, pair.b @ pair.a, rtol=0, atol=1e-12)
    for basis in (u.T @ u, vt @ vt.T):
        torch.testing.assert_close(basis, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 3, 6, 9])
def test_what_a_truncation_leaves_out_are_the_small_singular_values(kept):
    both = stack(random_factors(3, 20, 15, 2))
    dense = both.b @ both.a
    nearest = both.truncated(kept)
    assert (nearest.b.shape, nearest.a.shape) == ((20, kept), (kept, 15))
    dropped = torch.linalg.svdvals(dense)[kept:]
    distance = float(torch.linalg.matrix_norm(dense - nearest.b @ nearest.a))
    assert distance == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("m", "n"), [(20, 5), (5, 20), (6, 6)])
def test_compacting_keeps_the_product(m, n):
    wide = stack(random_factors(8, m, n, 3))
    small = wide.compacted()
    assert (wide.rank, small.rank) == (24, min(m, n))
    torch.testing.assert_close(small.b @ small.a, wide.b @ wide.a, rtol=0, atol=1e-12)
    assert small.compacted() is small


def test_the_norm_of_a_product_of_zeros_is_zero():
    assert Factors(torch.zeros(4, 2), torch.randn(2, 3)).norm() == 0


def stacked(parts, capacity):
    found = Stack(capacity)
    for part in parts:
        found.append(part)
    return found


@pytest.mark.parametrize("capacity", [0, 1, 5, 9, 100])
def test_a_growing_stack_is_the_parts_side_by_side(capacity):
    parts = [random_factors(1, 9, 7, r, seed=r, dtype=torch.float32)[0] for r in (2, 1, 4, 2)]
    found = stacked(parts, capacity)
    assert found.ranks == [2, 1, 4, 2]
    for got, wanted in zip(found.parts(), parts, strict=True):
        assert torch.equal(got.b, wanted.b)
        assert torch.equal(got.a, wanted.a)
    weights = [0.1, -2.0, 3.0, 0.5]
    dense = sum(w * p.b.double() @ p.a.double() for w, p in zip(weights, parts, strict=True))
    whole = found.scale(weights)
    torch.testing.assert_close(whole.b.double() @ whole.a.double(), dense, rtol=0, atol=1e-5)
    assert parts[1].b is not found.parts()[1].b, "it copies: a message's memory is given back"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("capacity", [1, 10, 64])
def test_a_stack_becomes_the_covariance_of_its_parts(count, capacity):
    parts, shares = random_factors(count, dtype=torch.float32), [1 / count] * count
    mean_b, mean_a = (sum(p * getattr(f, part).double() for p, f in zip(shares, parts, strict=True)) for part in "ba")
    dense = sum(p * f.b.double() @ f.a.double() for p, f in zip(shares, parts, strict=True)) - mean_b @ mean_a
    found = stacked(parts, capacity).centre(shares, 3.0)
    assert found.rank == 2 * (count - 1)
    torch.testing.assert_close(found.b.double() @ found.a.double(), 3.0 * dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_what_goes_to_the_remainder_takes_no_more_memory_than_the_participants_factors(name):
    start = random_state(0)
    collector = AGGREGATIONS[name].begin(Round(start, LAYOUT, expected=3))
    for seed in (1, 2, 3):
        collector.add(given(random_state(seed)))
    for layer, factors in collector.finish().remainder.items():
        m, n = SHAPES[layer]
        stored = sum(t.untyped_storage().nbytes() for t in (factors.b, factors.a))
        assert stored == 3 * 4 * (m + n) * 4  # participants × rank × (m + n) × bytes


# --- rules on factors alone -------------------------------------------------------------------------------------------

LORA_RULES = sorted(name for name, rule in AGGREGATIONS.items() if rule.lora)
SHAPES = {"x": (20, 15), "y": (12, 18)}
LAYOUT = LoraLayout({"x": 2.0, "y": 0.5}, 4, 8.0)


def random_state(seed, rank=4, base=None, far=1.0):
    """A participant's factors for both layers, on float32."""
    state = {}
    for i, (layer, (m, n)) in enumerate(SHAPES.items()):
        (pair,) = random_factors(1, m, n, rank, 10 * seed + i, torch.float32)
        state[layer + A], state[layer + B] = far * pair.a, far * pair.b
    return state if base is None else {n: base[n] + t for n, t in state.items()}


def given(state, weight=1.0, scaling=None, steps=3):
    return Contribution(state, weight, steps, scaling)


def combined(name, contributions, start, number=0):
    """Layer → s·B·A + remainder's increment, float64, after the rule and its refactoring."""
    rule = AGGREGATIONS[name]
    collector = rule.begin(Round(start, LAYOUT, number, seed=3))
    for contribution in contributions:
        part = rule.shares(number)
        names = [n for n in contribution.tensors if part == "all" or n.endswith(A if part == "A" else B)]
        tensors = {n: contribution.tensors[n] for n in names}
        collector.add(Contribution(tensors, contribution.weight, contribution.steps, contribution.scaling))
    outcome = collector.finish()
    values = start | outcome.values
    if rule.refactor is not None:
        values = rule.refactor(values, LAYOUT)
    found = product(values, LAYOUT.scaling)
    for layer, more in outcome.remainder.items():
        found[layer] = found[layer] + more.b.double() @ more.a.double()
    return found, values, outcome.remainder


def product(state, scaling):
    return {layer: s * state[layer + B].double() @ state[layer + A].double() for layer, s in scaling.items()}


def seen_by(name, state, start, number=0):
    """A participant's state with what the rule leaves alone from where it started."""
    kept = {"A": A, "B": B}.get(FROZEN.get(name, lambda _: "B" if name == "fedsa" else None)(number))
    return {n: start[n] if kept and n.endswith(kept) else t for n, t in state.items()}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", LORA_RULES)
def test_identical_participants_are_one_of_them(name, number):
    start, client = random_state(0), random_state(1)
    wanted = product(seen_by(name, client, start, number), LAYOUT.scaling)
    for weights in ([1], [1, 1, 1], [7, 2, 31, 5]):
        found, _, _ = combined(name, [given(client, w) for w in weights], start, number)
        assert furthest(found, wanted) < 1e-4  # of values around 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LORA_RULES)
def test_torchs_default_type_plays_no_role(name, dtype):
    """Not even in the last bit: neither the random factors nor the sums are of another type."""
    start = random_state(0)
    updates = [given(seen_by(name, random_state(seed, base=start), start), float(seed)) for seed in (1, 2, 3)]
    _, values, remainder = combined(name, updates, start)
    torch.set_default_dtype(dtype)
    try:
        _, found, more = combined(name, updates, start)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(tensor, values[n]) for n, tensor in found.items())
    assert more.keys() == remainder.keys()
    for layer, factors in more.items():
        assert factors.a.dtype == factors.b.dtype == torch.float32
        assert torch.equal(factors.a, remainder[layer].a)
        assert torch.equal(factors.b, remainder[layer].b)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", LORA_RULES)
def test_the_order_of_participants_changes_nothing(name, number):
    start = random_state(0, far=0.1)
    clients = [given(random_state(i, far=0.1), w) for i, w in ((1, 3), (2, 50), (3, 8), (4, 1))]
    first, _, _ = combined(name, clients, start, number)
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        again, _, _ = combined(name, [clients[i] for i in order], start, number)
        assert furthest(again, first) < 1e-6


@pytest.mark.parametrize("name", LORA_RULES)
def test_who_has_next_to_no_weight_changes_next_to_nothing(name):
    start, clients = random_state(0, far=0.3), [random_state(i, far=0.3) for i in (1, 2, 3)]
    found, _, _ = combined(name, [given(c, w) for c, w in zip(clients, (1, 1e-7, 1e-7), strict=True)], start)
    wanted = product(seen_by(name, clients[0], start), LAYOUT.scaling)
    assert furthest(found, wanted) < 1e-5
    loud, _, _ = combined(name, [given(c, w) for c, w in zip(clients, (1, 1, 1), strict=True)], start)
    assert furthest(loud, wanted) > 1e-2


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora"])
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_share_is_refused_and_the_rest_stands(name, weight):
    start, client = random_state(0), random_state(1)
    collector = AGGREGATIONS[name].begin(Round(start, LAYOUT))
    with pytest.raises(FederationError, match="no update"):
        collector.finish()
    collector.add(given(client))
    with pytest.raises(FederationError, match="positive and finite"):
        collector.add(given(random_state(2), weight))
    outcome = collector.finish()
    found = product(start | outcome.values, LAYOUT.scaling)
    for layer, more in outcome.remainder.items():
        found[layer] = found[layer] + more.b.double() @ more.a.double()
    assert furthest(found, product(client, LAYOUT.scaling)) < 1e-4


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_rule_is_summable_if_one_update_can_be_the_mean_of_all(name):
    """What a hub that sees nothing but a weighted sum can do: the declaration is true of every rule, either way."""
    start, clients = random_state(0, far=0.3), [random_state(i, far=0.3) for i in (1, 2, 3)]
    weights, steps = (1, 5, 2), (3, 7, 4)
    mean = {n: sum(w / 8 * c[n].double() for w, c in zip(weights, clients, strict=True)).float() for n in start}
    parts = [given(c, w, steps=s) for c, w, s in zip(clients, weights, steps, strict=True)]
    apart, *_ = combined(name, parts, start)
    at_once, *_ = combined(name, [given(mean, 8, steps=4)], start)
    distance = furthest(apart, at_once)
    assert distance < 1e-5 if AGGREGATIONS[name].summable else distance > 1e-2
    assert not make_aggregation(RunningMean()).summable, "somebody's own rule must say so itself"


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_what_a_rule_declares_of_its_outcome_is_so(name):
    rule, start, ranks = AGGREGATIONS[name], random_state(0), (4, 2, 3)
    if not rule.mixed_ranks:
        ranks = (4, 4, 4)
    own = [None if rank == 4 else {"x": 2.0, "y": 0.5} for rank in ranks]
    clients = [given(random_state(i, rank), 1.0, s) for i, (rank, s) in enumerate(zip(ranks, own, strict=True))]
    _, values, remainder = combined(name, clients, start)
    grown = rule.remainder_rank(ranks) if rule.remainder_rank is not None else 0
    assert [more.rank for more in remainder.values()] == ([grown] * len(SHAPES) if grown else [])
    assert rule.restarts == all(not bool(t.any()) for n, t in values.items() if n.endswith(B))
    unshared = [n for n in start if rule.shares(0) != "all" and not n.endswith(A if rule.shares(0) == "A" else B)]
    assert rule.rewrites or all(torch.equal(values[n], start[n]) for n in unshared)
    assert rule.alternates == (name == "rolora")


@pytest.mark.parametrize("shares", [[0.2, 0.5, 0.3]])
def test_flexlora_is_the_nearest_of_its_rank(shares):
    """Frobenius distance = √(Σ of squared singular values left out), with ranks and scalings of their own."""
    start = random_state(0)
    ranks, scalings = (4, 2, 3), ({"x": 2.0, "y": 0.5}, {"x": 5.0, "y": 1.5}, {"x": 0.25, "y": 3.0})
    clients = [random_state(i + 1, r) for i, r in enumerate(ranks)]
    found, values, remainder = combined(
        "flexlora", [given(c, p, s) for c, p, s in zip(clients, shares, scalings, strict=True)], start
    )
    assert not remainder
    products = [product(c, s) for c, s in zip(clients, scalings, strict=True)]
    for layer in SHAPES:
        wanted = sum(p * w[layer] for p, w in zip(shares, products, strict=True))
        dropped = torch.linalg.svdvals(wanted)[4:]
        assert len(dropped[dropped > 1e-6]) == sum(ranks) - 4
        distance = float(torch.linalg.matrix_norm(wanted - found[layer]))
        assert distance == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-5)
        rows = values[layer + A].double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_flora_counts_every_participant_by_its_own_scaling():
    start = random_state(0)
    clients = [(random_state(1, 4), None, 1), (random_state(2, 1), {"x": 7.0, "y": 0.1}, 3)]
    found, values, remainder = combined("flora", [given(c, w, s) for c, s, w in clients], start)
    products = [product(c, s or LAYOUT.scaling) for c, s, _ in clients]
    wanted = {layer: 0.25 * products[0][layer] + 0.75 * products[1][layer] for layer in SHAPES}
    assert furthest(found, wanted) < 1e-4
    assert all(more.rank == 5 for more in remainder.values())
    assert all(not values[layer + B].any() for layer in SHAPES)


def test_flora_starts_anew_as_peft_does_and_differently_every_round():
    """Kaiming uniform with a = √5: within ±1/√n, of variance 1/(3n)."""
    layout = LoraLayout({"x": 1.0}, 64, 64.0)
    start = {"x" + A: torch.zeros(64, 400), "x" + B: torch.zeros(300, 64)}
    found = {}
    for number, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        collector = AGGREGATIONS["flora"].begin(Round(start, layout, number, seed))
        collector.add(given(start))
        fresh = collector.finish().values["x" + A]
        assert float(fresh.abs().max()) <= 1 / math.sqrt(400)
        assert float(fresh.var()) == pytest.approx(1 / (3 * 400), rel=0.05)
        assert torch.equal(found.setdefault((number, seed), fresh), fresh)
    different = list(found.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_fedsvd_rewrites_the_factors_and_not_their_product():
    """A gets orthonormal rows, B the singular values in falling order."""
    state = random_state(1)
    same = AGGREGATIONS["fedsvd"].refactor(state, LAYOUT)
    assert furthest(product(same, LAYOUT.scaling), product(state, LAYOUT.scaling)) < 1e-4
    for layer in SHAPES:
        rows, columns = same[layer + A].double(), same[layer + B].double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
        values = torch.linalg.svdvals(product(state, {layer: 1.0})[layer])[:4]
        torch.testing.assert_close(columns.norm(dim=0), values, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(same[layer + A], state[layer + A])
    again = AGGREGATIONS["fedsvd"].refactor(same, LAYOUT)
    assert furthest(product(again, LAYOUT.scaling), product(state, LAYOUT.scaling)) < 1e-4


def test_fedsvd_in_float64_is_lossless():
    state = {n: t.double() for n, t in random_state(1).items()}
    same = AGGREGATIONS["fedsvd"].refactor(state, LAYOUT)
    assert furthest(product(same, LAYOUT.scaling), product(state, LAYOUT.scaling)) < 1e-12


def test_fedsvd_leaves_a_layer_that_has_learnt_nothing():
    """B = 0, as PEFT starts: a product of zeros has no directions, and A must not become zero with it."""
    state = random_state(1)
    state["x" + B] = torch.zeros_like(state["x" + B])
    same = AGGREGATIONS["fedsvd"].refactor(state, LAYOUT)
    assert torch.equal(same["x" + A], state["x" + A])
    assert not torch.equal(same["y" + A], state["y" + A])


@pytest.mark.parametrize("ranks", [[1], [1, 2]])
def test_flexlora_keeps_unneeded_directions_trainable(ranks):
    """A stack of a smaller rank than the adapter's leaves columns of B empty; where A's rows were zero as well, the
    product's gradient would be zero for both, for ever."""
    start = random_state(0)
    clients = [random_state(i + 1, r) for i, r in enumerate(ranks)]
    found, values, _ = combined("flexlora", [given(c) for c in clients], start)
    products = [product(c, LAYOUT.scaling) for c in clients]
    wanted = {layer: sum(p[layer] for p in products) / len(products) for layer in SHAPES}
    assert furthest(found, wanted) < 1e-4
    for layer in SHAPES:
        assert not values[layer + B][:, sum(ranks) :].any()
        assert int(torch.linalg.matrix_rank(values[layer + A])) == 4


# --- PEFT's own sums of adapters as oracle ----------------------------------------------------------------------------


@pytest.fixture
def theirs(make_chain):
    """A PEFT model with the three participants' adapters after one round, and their states by name."""
    start = Global.of(make_chain(lora=True))
    chains = {n: outsider(make_chain(lora=True), start, Participant(n, s), 0) for n, s in SHARES.items()}
    states = {n: chain.model.trainable_state() for n, chain in chains.items()}
    module = make_chain(lora=True).model.module
    for name, state in states.items():
        module.add_adapter(f"site-{name}", lora_config())
        parts = dict(module.named_parameters())
        with torch.no_grad():
            for key, value in state.items():
                parts[f"base_model.model.{key.removesuffix('.weight')}.site-{name}.weight"].copy_(value)
    return module, states


def pefts_sum(module, kind, **options):
    """Layer → what PEFT adds to the base for a weighted adapter."""
    module.add_weighted_adapter([f"site-{n}" for n in P], list(P.values()), kind, combination_type=kind, **options)
    layers = {n.removeprefix("base_model.model."): m for n, m in module.named_modules() if hasattr(m, "lora_A")}
    return {n: layer.get_delta_weight(kind).detach().double() for n, layer in layers.items() if kind in layer.lora_A}


def added(chain):
    """Layer → what the chain adds to the base."""
    base = dict(tiny_module(chain.model.kind, len(chain.model.tokenizer)).named_modules())
    return {n: w - base[n].weight.detach().double() for n, w in by_formula(chain).items()}


def test_pefts_cat_is_the_stack(theirs, make_chain):
    module, _ = theirs
    wanted = pefts_sum(module, "cat")
    for rule in ("flora", "fedex"):
        chain = make_chain(lora=True)
        federation(chain, rule).fit(rounds=1)
        assert furthest(added(chain), wanted) < 1e-6


def test_pefts_svd_of_the_whole_rank_is_flexlora(theirs, make_chain):
    module, _ = theirs
    people = [Participant(n, s, rank=4, alpha=8) for n, s in SHARES.items()]
    wide = make_chain(lora=lora_config(r=12, lora_alpha=24))  # scaling 2 at both ranks
    narrow = make_chain(lora=True).model.trainable_state()
    state = {}
    for name, value in wide.model.trainable_state().items():  # the first four directions are the others' start
        state[name] = torch.zeros_like(value)
        state[name][tuple(slice(n) for n in narrow[name].shape)] = narrow[name]
    wide.model.load_state(state)
    federation(wide, "flexlora", people).fit(rounds=1)
    assert furthest(added(wide), pefts_sum(module, "svd", svd_rank=12)) < 1e-5


def test_pefts_linear_is_not_federated_averaging(theirs, make_chain):
    """It takes √p_k for both factors, and mixes one participant's B with another's A."""
    module, states = theirs
    wanted = pefts_sum(module, "linear")
    chain = make_chain(lora=True)
    federation(chain, "fedit").fit(rounds=1)
    scaling = chain.model.lora_scaling()
    root = {n: sum((P[k] * s) ** 0.5 * states[k][n].double() for k, s in dict.fromkeys(P, 2.0).items()) for n in
            states["a"]}  # fmt: skip
    assert furthest({n: root[n + B] @ root[n + A] for n in scaling}, wanted) < 1e-5
    assert furthest(added(chain), wanted) > 1e-2
    assert furthest(mean_of({k: product(s, scaling) for k, s in states.items()}), wanted) > 1e-2


# --- the gap ----------------------------------------------------------------------------------------------------------


def dense_gap(states, weights, scaling):
    """‖mean(s·BA) − s·B̄Ā‖ / ‖mean(s·BA)‖ over all layers together, in float64."""
    total = sum(weights.values())
    shares = {k: w / total for k, w in weights.items()}
    mean = mean_of(states, shares)
    whole = mean_of({k: product(s, scaling) for k, s in states.items()}, shares)
    apart = product(mean, scaling)
    return norm(whole[n] - apart[n] for n in scaling) / norm(whole.values())


@pytest.mark.parametrize("rule", ["fedavg", "fednova", "fedit", "fedex", "flora", "flexlora"])
def test_the_history_says_what_averaging_factors_apart_leaves_out(rule, make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, rule)
    for number in range(2):
        start = Global.of(chain)
        fed.fit(rounds=1)
        states = {
            n: outsider(make_chain(lora=True), start, Participant(n, s), number).model.trainable_state()
            for n, s in SHARES.items()
        }
        wanted = dense_gap(states, P, start.scaling)
        assert wanted > 1e-3
        assert fed.history[number].aggregation_gap == pytest.approx(wanted, rel=1e-4)


def test_the_gap_where_there_can_be_none_or_it_means_nothing(make_chain):
    mixed = [Participant("a", SHARES["a"], rank=2), Participant("b", SHARES["b"])]
    turned = [mixed[1], mixed[0]]
    for rule, people, lora, gaps in (
        ("ffa", SHARES, True, [0.0]),
        ("rolora", SHARES, True, [0.0, 0.0]),
        ("fedsvd", SHARES, True, [0.0]),
        ("fedsa", SHARES, True, [None]),
        ("fedavg", SHARES, False, [None]),
        ("fedavg", SHARES, lora_config(use_dora=True), [None]),
        ("flora", mixed, True, [None]),
        ("flexlora", turned, True, [None]),
    ):
        history = federation(make_chain(lora=lora), rule, people).fit(rounds=len(gaps))
        assert [r.aggregation_gap for r in history] == gaps, rule


def gap_of(states, weights, layout=LAYOUT):
    gap = AggregationGap(layout)
    for key, state in states.items():
        gap.add(given(state, weights[key]))
    return gap.value()


@pytest.mark.parametrize(("count", "rank"), [(1, 4), (2, 4), (5, 4), (16, 4), (16, 12)])
def test_the_gap_is_exact_for_up_to_sixteen(count, rank):
    start = random_state(0, rank)
    states = {k: random_state(k + 1, rank, base=start, far=0.5) for k in range(count)}
    weights = {k: 1.0 + k * k for k in states}
    wanted = dense_gap(states, weights, LAYOUT.scaling)
    assert gap_of(states, weights) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert (wanted > 1e-2) == (count > 1)


@pytest.mark.parametrize("count", [17, 40])
@pytest.mark.parametrize("far", [0.1, 0.5, 2.0])
def test_the_gap_of_more_is_estimated(count, far):
    start = random_state(0)
    states = {k: random_state(k + 1, base=start, far=far) for k in range(count)}
    weights = {k: 1.0 + k % 7 for k in states}
    assert gap_of(states, weights) == pytest.approx(dense_gap(states, weights, LAYOUT.scaling), rel=0.15)


def test_the_layers_scalings_count_in_the_gap():
    """Only layer y differs between participants; the larger its scaling, the more of the whole it is."""
    start = random_state(0)
    for count in (3, 20):
        others = [random_state(k + 1, base=start, far=0.3) for k in range(count)]
        states = {k: start | {n: t for n, t in s.items() if n.startswith("y")} for k, s in enumerate(others)}
        weights = dict.fromkeys(states, 1.0)
        small, large = (LoraLayout({"x": 1.0, "y": y}, 4, 4.0) for y in (0.1, 10.0))
        for layout in (small, large):
            wanted = dense_gap(states, weights, layout.scaling)
            assert gap_of(states, weights, layout) == pytest.approx(wanted, rel=1e-5 if count == 3 else 0.15)
        assert gap_of(states, weights, large) > 5 * gap_of(states, weights, small)


def test_no_gap_without_updates_or_with_nothing_but_zeros():
    assert AggregationGap(LAYOUT).value() is None
    zeros = {n: torch.zeros_like(t) for n, t in random_state(0).items()}
    for count in (2, 20):
        assert gap_of(dict.fromkeys(range(count), zeros), dict.fromkeys(range(count), 1.0)) is None


def test_the_gap_of_half_precision_factors_is_that_of_their_values():
    """Differences from a mean that was rounded to bfloat16 would be rounding as well."""
    start = random_state(0)
    states = {k: {n: t.bfloat16() for n, t in random_state(k + 1, base=start, far=0.02).items()} for k in range(4)}
    weights = {k: 1.0 + k for k in states}
    assert gap_of(states, weights) == pytest.approx(dense_gap(states, weights, LAYOUT.scaling), rel=1e-4)


# --- who trains and shares what ---------------------------------------------------------------------------------------


def parts_in(messages):
    return [sorted({n.rpartition(".lora_")[2][0] for n in Wire.names(data)}) for _, data in messages]


@pytest.mark.parametrize("kind", KINDS)
def test_ffa_leaves_a_where_it_started_and_at_home(kind, make_chain):
    chain = make_chain(kind, lora=True)
    start = chain.model.trainable_state()
    fed = federation(chain, "ffa")
    wire = watched(fed._peers)
    fed.fit(rounds=3)
    end = chain.model.trainable_state()
    assert all(torch.equal(end[n], start[n]) == n.endswith(A) for n in start)
    assert parts_in(wire.answered) == [["B"]] * 9
    assert parts_in(wire.sent) == [[]] * 3 + [["B"]] * 6  # the start is in everybody's model already


def test_rolora_takes_turns(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, "rolora")
    wire = watched(fed._peers)
    for number in range(4):
        before = chain.model.trainable_state()
        fed.fit(rounds=1)
        after, turn = chain.model.trainable_state(), (B, A)[number % 2]
        assert all(torch.equal(after[n], before[n]) != n.endswith(turn) for n in after)
    turns = [["B"]] * 3 + [["A"]] * 3
    assert parts_in(wire.answered) == turns * 2
    assert parts_in(wire.sent) == [[]] * 3 + turns + turns[:3]  # what changed in the round before


def test_fedsa_shares_a_and_everybody_keeps_a_b_of_its_own(make_chain):
    """Three rounds against a loop written out here; then every participant's own chain."""
    chain = make_chain(lora=True)
    start = Global.of(chain)
    fed = federation(chain, "fedsa")
    wire = watched(fed._peers)
    fed.fit(rounds=3)
    values, own = dict(start.values), {n: {} for n in SHARES}
    for number in range(3):
        trained = {}
        for name, pairs in SHARES.items():
            alone = outsider(
                make_chain(lora=True), Global(values, {}, start.scaling), Participant(name, pairs), number,
                private=own[name],
            )  # fmt: skip
            trained[name] = alone.model.trainable_state()
            own[name] = {n: t for n, t in trained[name].items() if n.endswith(B)}
        shared = {k: {n: t for n, t in s.items() if n.endswith(A)} for k, s in trained.items()}
        values |= {n: t.float() for n, t in mean_of(shared).items()}
    got = chain.model.trainable_state()
    assert furthest(got, values) < 1e-5
    assert all(torch.equal(got[n], t) for n, t in start.values.items() if n.endswith(B))
    assert furthest(own["a"], own["b"]) > 1e-2
    for name in SHARES:
        assert furthest(chain.model.adapter_state(name), values | own[name]) < 1e-5
        weights = {n: w.detach().double() for n, w in bare_weights(chain).items()}
        for layer, delta in product(values | own[name], start.scaling).items():
            weights[layer] = weights[layer] + delta
        torch.testing.assert_close(
            logits(chain.with_adapter(name)), logits_with(chain, weights), rtol=1e-3, atol=1e-3
        )  # fmt: skip
    assert parts_in(wire.answered) == [["A"]] * 9
    assert parts_in(wire.sent) == [[]] * 3 + [["A"]] * 6


def bare_weights(chain):
    parts = dict(tiny_module(chain.model.kind, len(chain.model.tokenizer)).named_modules())
    return {layer: parts[layer].weight for layer in chain.model.lora_scaling()}


BOTH = ("AB", "AB", "AB")
TRAVELS = {"fedavg": BOTH, "fednova": BOTH, "fedit": BOTH, "ffa": ("B", "B", "B"), "rolora": ("B", "B", "A"),
           "fedsa": ("A", "A", "A"), "fedsvd": ("B", "AB", "B"), "fedex": BOTH, "flora": BOTH,
           "flexlora": BOTH}  # fmt: skip
"""rule → which factors go up in the first round, down in the second, up in the second"""


@pytest.mark.parametrize("rule", TRAVELS)
def test_bytes_on_the_wire_are_those_of_the_table(rule, make_chain):
    """4 bytes a value: r(m+n), rm or rn up; down what changed, and what the remainder has grown by."""
    chain = make_chain(lora=True)
    values = {part: sum(t.numel() for n, t in chain.model.trainable_state().items() if n.endswith(end))
              for part, end in (("A", A), ("B", B))}  # fmt: skip
    assert values["A"] != values["B"]
    assert set(TRAVELS) == set(AGGREGATIONS)
    more = {"fedex": 2, "flora": 3}.get(rule, 0) * sum(values.values())  # (K−1)·r(m+n), Σ r_k (m+n)
    fed = federation(chain, rule)
    wire = watched(fed._peers)
    history = fed.fit(rounds=2)
    first, back, second = (4 * sum(values[part] for part in parts) for parts in TRAVELS[rule])
    assert [Wire.size(data) for _, data in wire.sent] == [0] * 3 + [back + 4 * more] * 3
    assert [Wire.size(data) for _, data in wire.answered] == [first] * 3 + [second] * 3
    for record, up in zip(history, (wire.answered[:3], wire.answered[3:]), strict=True):
        assert record.bytes_up == sum(len(data) for _, data in up)


def test_smaller_ranks_send_and_get_less(make_chain):
    chain = make_chain(lora=True)
    per_rank = sum(t.numel() for t in chain.model.trainable_state().values()) // 4
    fed = federation(chain, "flexlora", [Participant("a", SHARES["a"], rank=1), Participant("b", SHARES["b"])])
    wire = watched(fed._peers)
    fed.fit(rounds=2)
    assert [(n, Wire.size(d)) for n, d in wire.answered] == [("a", 4 * per_rank), ("b", 16 * per_rank)] * 2
    assert [(n, Wire.size(d)) for n, d in wire.sent[2:]] == [("a", 4 * per_rank), ("b", 16 * per_rank)]


# --- no matrix of a layer's size --------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The shapes of everything that torch makes meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out

    def dense(self, m, n):
        return sorted(s for s in self.shapes if math.prod(s) >= 0.9 * m * n and min(s) >= 0.5 * min(m, n))


@pytest.mark.parametrize("rule", ["fedex", "flora", "flexlora", "fedsvd", "fedit", "ffa"])
def test_no_rule_multiplies_factors_out(rule):
    m, n, r = 400, 300, 2
    layout = LoraLayout({"x": 2.0}, r, 4.0)
    states = [{"x" + A: f.a, "x" + B: f.b} for f in random_factors(4, m, n, r, dtype=torch.float32)]
    with Sizes() as sizes:
        states[0]["x" + B] @ states[0]["x" + A]
    assert sizes.dense(m, n) == [(m, n)]  # it would be seen
    chosen, gap = AGGREGATIONS[rule], AggregationGap(layout)
    names = [name for name in states[0] if chosen.shares(0) == "all" or name.endswith(B)]
    with Sizes() as sizes:
        collector = chosen.begin(Round(states[0], layout))
        for state in states[1:]:
            collector.add(given({name: state[name] for name in names}))
            gap.add(given(state))
        outcome = collector.finish()
        values = states[0] | outcome.values
        if chosen.refactor is not None:
            chosen.refactor(values, layout)
        for more in outcome.remainder.values():
            more.compacted()
        assert gap.value() > 0
    assert len(sizes.shapes) > 3
    assert sizes.dense(m, n) == []


# --- fednova ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_fednova_takes_everybodys_change_per_step(lora, make_chain):
    """w + τ_eff · Σ p_k (w_k − w)/τ_k with τ_eff = Σ p_k τ_k, for 1, 2 and 5 steps."""
    chain, plain = make_chain(lora=lora), make_chain(lora=lora)
    steps = {"a": 1, "b": 2, "c": 5}
    people = [Participant(n, s, training={"max_steps": steps[n]}) for n, s in SHARES.items()]
    start = {n: t.double() for n, t in chain.model.trainable_state().items()}
    history = federation(chain, "fednova", people).fit(rounds=1)
    federation(plain, "fedavg", people).fit(rounds=1)
    assert {n: r.steps for n, r in history[0].participants.items()} == steps
    changes, effective = [], sum(P[n] * steps[n] for n in SHARES)
    for name, pairs in SHARES.items():
        alone = make_chain(lora=lora)
        config = FAST.replace(max_steps=steps[name])
        train(alone.model, pairs, config, prompt=alone, participant=name, round=0)
        after = alone.model.trainable_state()
        changes.append({n: P[name] * (after[n].double() - w) / steps[name] for n, w in start.items()})
    wanted = {n: w + effective * sum(c[n] for c in changes) for n, w in start.items()}
    assert furthest(chain.model.trainable_state(), wanted) < 1e-6
    assert furthest(plain.model.trainable_state(), wanted) > 1e-3


def test_fednova_with_equal_steps_is_fedavg(battery):
    results = []
    for rule in ("fednova", "fedavg"):
        chain = battery()
        federation(chain, rule, training=FAST.replace(max_steps=2)).fit(rounds=1)
        results.append(chain.model.trainable_state())
    assert furthest(*results) < 1e-6


@pytest.mark.parametrize("steps", [None, 0])
def test_fednova_refuses_an_update_without_steps_and_the_rest_stands(steps):
    start, client = random_state(0), random_state(1)
    collector = AGGREGATIONS["fednova"].begin(Round(start, None))
    collector.add(given(client, steps=4))
    with pytest.raises(FederationError, match="divides by local steps"):
        collector.add(given(random_state(2), steps=steps))
    assert furthest(collector.finish().values, client) < 1e-6


# --- server optimizers on factors -------------------------------------------------------------------------------------


def adam(memory, delta, lr=0.05, beta1=0.8, beta2=0.95, tau=1e-2):
    m, v = memory or (torch.zeros_like(delta), torch.full_like(delta, tau**2))
    m, v = beta1 * m + (1 - beta1) * delta, beta2 * v + (1 - beta2) * delta**2
    return lr * m / (v.sqrt() + tau), (m, v)


def momentum(memory, delta):
    v = delta if memory is None else 0.5 * memory + delta
    return 0.8 * v, v


def nesterov(memory, delta):
    v = delta if memory is None else 0.9 * memory + delta
    return 0.7 * (delta + 0.9 * v), v


SERVER = {
    "FedAdam": (lambda: FedAdam(lr=0.05, beta1=0.8, beta2=0.95, tau=1e-2), adam),
    "FedAvgM": (lambda: FedAvgM(lr=0.8, momentum=0.5), momentum),
    "DiLoCo": (lambda: DiLoCo(), nesterov),
}


@pytest.mark.parametrize("optimizer", SERVER)
@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora"])
def test_a_server_optimizer_moves_what_is_trained_and_nothing_else(rule, optimizer, make_chain):
    """Against a loop written out here, from the participants' own updates; rolora keeps A's memory over B's turn."""
    made, formula = SERVER[optimizer]
    chain = make_chain(lora=True)
    start = Global.of(chain)
    fed = federation(chain, rule, training=SGD, server_optimizer=made())
    values, memory = {n: t.double() for n, t in start.values.items()}, {}
    for number in range(3):
        frozen = FROZEN.get(rule, lambda _: None)(number)
        now = Global({n: t.float() for n, t in values.items()}, {}, start.scaling)
        theirs = {
            n: outsider(make_chain(lora=True), now, Participant(n, s), number, config=SGD, frozen=frozen)
            for n, s in SHARES.items()
        }
        mean = mean_of({n: c.model.trainable_state() for n, c in theirs.items()})
        moving = [n for n in values if frozen is None or not n.endswith({"A": A, "B": B}[frozen])]
        for name in moving:
            by, memory[name] = formula(memory.get(name), mean[name] - now.values[name].double())
            values[name] = values[name] + by
        before = chain.model.trainable_state()
        fed.fit(rounds=1)
        after = chain.model.trainable_state()
        assert furthest(after, values) < 1e-5
        assert furthest(after, mean) > 1e-3
        assert all(torch.equal(after[n], before[n]) for n in values if n not in moving)
        assert all(not torch.equal(after[n], before[n]) for n in moving)


# --- everything different at once -------------------------------------------------------------------------------------


def test_one_round_of_participants_that_differ_in_everything(make_chain):
    """Rank, alpha, steps, batch size, learning rate, precision; and one who is late. The mean is that of the others."""
    own = {
        "a": ({"r": 2, "lora_alpha": 3}, {"max_steps": 1, "batch_size": 2, "precision": "bf16"}),
        "b": ({"r": 5, "lora_alpha": 20}, {"epochs": 2, "batch_size": 3, "learning_rate": 5e-3}),
        "c": ({}, {"max_steps": 4, "batch_size": 1, "optimizer": "sgd", "weight_decay": 0.1}),
    }
    config = {"r": 8, "lora_alpha": 24}
    people = [
        Participant(n, SHARES[n], training=training, rank=lora.get("r"), alpha=lora.get("lora_alpha"))
        for n, (lora, training) in own.items()
    ]
    chain = make_chain(lora=lora_config(**config))
    fed = federation(chain, "flora", [*people, Participant("late", PAIRS[:2], rank=1)], deadline=1.2)
    inner = fed._peers["late"].handle

    def slow(op, payload):
        answer = inner(op, payload)
        time.sleep(1.3 if op == "train" else 0)
        return answer

    fed._peers["late"].handle = slow
    start, before, theirs = Global.of(chain), merged(chain), {}
    record = fed.fit(rounds=1)[0]
    for person in people:
        lora, training = own[person.name]
        alone = make_chain(lora=lora_config(**(config | lora)))
        theirs[person.name] = merged(outsider(alone, start, person, 0, config=FAST.replace(**training)))
    assert record.trained == ["a", "b", "c"]
    assert record.participants["late"].status == "late"
    assert [record.participants[n].steps for n in "abc"] == [1, 4, 4]
    wanted = mean_of(theirs)
    assert furthest(by_formula(chain), wanted) < 1e-5
    assert furthest(before, wanted) > 1e-3
