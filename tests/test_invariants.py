"""The invariants of a federation, one named test each.

Belongs here: what is true whatever the options (docs/architecture.md: 1, 2, 3, 4, 6, 7, 8, 9). Does not: the options
themselves (test_averaging), text against text (test_llm_chain).
"""

import copy
import json
import math
import random

import pytest
import torch
from tiny import PAIRS, TEMPLATE
from torch.utils.data import DataLoader

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, LocalModel, Participant, TrainingConfig, train_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import QuorumError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.target import Target
from llmchain_fed.updates.update import Update

SGD = TrainingConfig(optimizer="sgd", learning_rate=0.05, batch_size=64)
ADAM = TrainingConfig(optimizer="adamw", learning_rate=3e-3, batch_size=3)


def federate(chain, participants, training=ADAM, **options):
    options = {"progress": False} | options
    return FederatedAveraging(chain, participants=participants, training=training, **options)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], wanted[n]) for n in wanted), [
        n for n in wanted if not torch.equal(got[n], wanted[n])
    ]


def assert_close(got, wanted, atol=1e-6, rtol=1e-5):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=rtol, atol=atol, msg=name)


def moved(before, after):
    return any(not torch.equal(before[n], after[n]) for n in before)


# --- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"epochs": 2}, {"max_steps": 3}, {"max_steps": 3, "keep_optimizer": True}])
def test_1_one_participant_is_plain_fine_tuning_bit_for_bit(options, battery):
    """Three rounds with one participant = train_locally three times in a row."""
    config = TrainingConfig(learning_rate=3e-3, batch_size=3, max_grad_norm=1.0, **options)
    chain, alone = battery(), battery()
    history = federate(chain, {"solo": PAIRS}, config).fit(rounds=3)
    step, kept = 0, None
    for round_number in range(3):
        result = train_locally(
            alone.model, PAIRS, config, prompt=alone, participant="solo", round=round_number, first_step=step,
            optimizer_state=kept,
        )  # fmt: skip
        step, kept = (result.next_step if "max_steps" in options else 0), result.optimizer_state
        assert history[round_number].participants["solo"].train_loss == result.loss
    assert moved(battery().model.trainable_state(), chain.model.trainable_state())
    assert_equal(chain.model.trainable_state(), alone.model.trainable_state())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_1_identical_participants_are_one_of_them(count, battery):
    """All examples in one batch, so that the order, which follows from the name, is the same for all."""
    many, one = battery(), battery()
    federate(many, {f"p{i}": PAIRS[:4] for i in range(count)}, SGD).fit(rounds=2)
    federate(one, {"p0": PAIRS[:4]}, SGD).fit(rounds=2)
    assert_close(many.model.trainable_state(), one.model.trainable_state())


@pytest.mark.parametrize(("config", "rounds"), [(ADAM, 1), (SGD, 3)])
def test_1_the_order_of_participants_is_irrelevant(config, rounds, battery):
    """Adam divides by gradients that may be all rounding: over rounds it makes much of the last bit, so it gets one."""
    shares = {"a": PAIRS[:5], "b": PAIRS[5:7], "c": PAIRS[7:]}
    results = []
    for order in (["a", "b", "c"], ["c", "a", "b"]):
        chain = battery()
        federate(chain, {name: shares[name] for name in order}, config).fit(rounds=rounds)
        results.append(chain.model.trainable_state())
    for other in results[1:]:
        assert_close(other, results[0])


# --- 2 ----------------------------------------------------------------------------------------------------------------


def tokens_of(chain, pairs):
    return encode_examples(pairs, chain.model, chain).report.completion_tokens


def centralised_step(chain, pairs, lr):
    """One plain SGD step on the mean loss over all tokens of the pooled pairs."""
    encoded = encode_examples(pairs, chain.model, chain)
    batch = collate([encoded[i] for i in range(len(encoded))], chain.model)
    chain.model.module(**batch).loss.backward()
    with torch.no_grad():
        for parameter in chain.model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    return chain.model.trainable_state()


def test_2_one_full_batch_sgd_step_is_a_centralised_step_weighted_by_tokens(battery):
    """Σ n_k/n · (w − lr·∇L_k) = w − lr·∇L, where L is a mean over tokens and n_k counts tokens."""
    shares = {"a": PAIRS[:2], "b": PAIRS[2:9], "c": PAIRS[9:]}
    chain, pooled = battery(), battery()
    counts = [tokens_of(chain, pairs) / len(pairs) for pairs in shares.values()]
    assert max(counts) / min(counts) > 1.1  # or weighting by examples would pass as well
    federate(chain, shares, SGD, weighting="tokens").fit(rounds=1)
    assert_close(chain.model.trainable_state(), centralised_step(pooled, PAIRS, 0.05))
    by_examples = battery()
    federate(by_examples, shares, SGD).fit(rounds=1)
    wanted = pooled.model.trainable_state()
    gap = max(float((by_examples.model.trainable_state()[n] - wanted[n]).abs().max()) for n in wanted)
    assert gap > 1e-5


def test_2_the_same_with_equal_token_counts_and_default_weighting(battery):
    """x repeated: every completion has the same number of tokens, so examples and tokens weigh the same."""
    chain, pooled = battery(), battery()
    pairs = [(text, letter) for (text, _), letter in zip(PAIRS, "abcdefghijkl", strict=True)]
    assert tokens_of(chain, pairs) == 2 * len(pairs)
    federate(chain, {"a": pairs[:3], "b": pairs[3:5], "c": pairs[5:]}, SGD).fit(rounds=1)
    assert_close(chain.model.trainable_state(), centralised_step(pooled, pairs, 0.05))


# --- 3 ----------------------------------------------------------------------------------------------------------------


def outsiders_mean(make, shares, config, start, weights, round_number=0):
    """Σ n_k/n · w_k in float64, each w_k trained apart on a copy."""
    total, mean = sum(weights.values()), None
    for name, pairs in shares.items():
        chain = make()
        chain.model.load_state(start)
        train_locally(chain.model, pairs, config, prompt=chain, participant=name, round=round_number)
        part = {n: t.double() * weights[name] / total for n, t in chain.model.trainable_state().items()}
        mean = part if mean is None else {n: mean[n] + part[n] for n in part}
    return mean


@pytest.mark.parametrize("drive", ["fit", "train and step"])
def test_3_after_a_round_every_tensor_is_the_weighted_mean(drive, battery):
    shares = {"0": PAIRS[:6], "1": PAIRS[6:8], "2": PAIRS[8:]}
    chain = battery()
    fed = federate(chain, shares if drive == "fit" else None)
    for round_number in range(2):
        start = chain.model.trainable_state()
        if drive == "fit":
            fed.fit(rounds=1)
        else:
            for device_id in range(3):
                fed.train(shares[str(device_id)], device_id)
            fed.step()
        wanted = outsiders_mean(battery, shares, ADAM, start, {"0": 6, "1": 2, "2": 4}, round_number)
        assert moved(start, chain.model.trainable_state())
        assert_close(chain.model.trainable_state(), wanted)


# --- 4 ----------------------------------------------------------------------------------------------------------------


def test_4_a_fresh_model_given_the_same_state_gives_the_same_logits(battery, tmp_path):
    chain, fresh = battery(), battery()
    federate(chain, {"a": PAIRS[:6], "b": PAIRS[6:]}).fit(rounds=1)
    encoded = encode_examples(PAIRS[:3], chain.model, chain)
    batch = collate([encoded[i] for i in range(3)], chain.model)
    with torch.no_grad():
        untrained = fresh.model.module(**batch).logits
        fresh.model.load_state(chain.model.trainable_state())
        logits = chain.model.module(**batch).logits
        assert not torch.allclose(untrained, logits)
        assert torch.equal(fresh.model.module(**batch).logits, logits)
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    questions = [{"text": text} for text, _ in PAIRS[:4]]
    assert loaded.batch(questions) == chain.batch(questions) == fresh.batch(questions)
    with torch.no_grad():
        assert torch.equal(loaded.model.module(**batch).logits, logits)


# --- 6 ----------------------------------------------------------------------------------------------------------------


def test_6_training_a_participant_never_changes_what_another_starts_from(battery):
    """Each is trained alone from the same weights; together they return the same bits, in any order."""
    shares = {"a": PAIRS[:6], "b": PAIRS[6:]}
    alone = {}
    for name, pairs in shares.items():
        chain = battery()
        train_locally(chain.model, pairs, ADAM, prompt=chain, participant=name)
        alone[name] = chain.model.trainable_state()
    for order in (["a", "b"], ["b", "a"]):
        chain = battery()
        start = chain.model.trainable_state()
        seen = {}
        watched(chain, {n: shares[n] for n in order}, lambda name, data, seen=seen: seen.update({name: data}) or data)[
            0
        ].fit(rounds=1)
        for name in order:
            update = unpack(seen[name], chain, start)
            assert_equal(dict(update.tensors), alone[name])


def test_6_the_chain_keeps_its_weights_until_the_step(battery):
    chain = battery()
    start = chain.model.trainable_state()
    pointers = [p.data_ptr() for p in chain.model.parameters()]
    answer = chain.invoke({"text": "page locked"})
    fed = federate(chain, None)
    for device_id in range(2):
        fed.train(PAIRS[:4], device_id)
        assert_equal(chain.model.trainable_state(), start)
        assert chain.invoke({"text": "page locked"}) == answer
    fed.step()
    assert moved(start, chain.model.trainable_state())
    assert pointers == [p.data_ptr() for p in chain.model.parameters()]  # the same module, not a copy


def test_6_nothing_is_shared_by_reference(battery):
    chain = battery()
    fed = federate(chain, None)
    fed.train(PAIRS[:4], 0)
    broadcast = {n: t.data_ptr() for n, t in fed._open.start.items()}
    own = {p.data_ptr() for p in chain.model.parameters()}
    assert not own & set(broadcast.values())
    start = {n: t.clone() for n, t in fed._open.start.items()}
    with torch.no_grad():
        for parameter in chain.model.parameters():
            parameter.add_(1.0)  # whatever the user does to the chain in an open round
    assert_equal(dict(fed._open.start), start)


# --- 7 ----------------------------------------------------------------------------------------------------------------


def test_7_what_participants_train_on_is_what_invoke_sees(battery, monkeypatch):
    chain = battery(max_new_tokens=1)
    seen = []
    inner = chain.model.encode
    monkeypatch.setattr(chain.model, "encode", lambda texts, **k: seen.extend(texts) or inner(texts, **k))
    chain.batch([{"text": text} for text, _ in PAIRS[:5]])
    asked, seen[:] = list(seen), []
    federate(chain, {"a": PAIRS[:5]}, SGD).fit(rounds=1)
    assert seen == asked == [TEMPLATE.format(text=text) for text, _ in PAIRS[:5]]


# --- 8 ----------------------------------------------------------------------------------------------------------------


class Tampering(InProcess):
    """A transport that changes what participants answer."""

    def __init__(self, peers, change):
        super().__init__(peers)
        self.change = change

    def call(self, op, nodes, payload, timeout=None):
        for name, answer in super().call(op, nodes, payload, timeout):
            yield name, self.change(name, answer) if op == "train" and isinstance(answer, bytes) else answer


def watched(chain, shares, change, training=ADAM, **options):
    """A federation whose updates go through `change(name, bytes)`."""
    target = Target.of(chain)
    peers = {n: Client(target, Participant(n, pairs), training) for n, pairs in shares.items()}
    transport = Tampering(peers, change)
    return FederatedAveraging(chain, runtime=transport, training=training, progress=False, **options), transport


def header_of(data):
    layout = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(layout["__metadata__"]["llmchain_fed"])


def unpack(data, chain, state):
    from llmchain_fed.updates import serialization
    from llmchain_fed.updates.update import Expected

    header = header_of(data)
    return Update.from_bytes(
        data, Expected(header["participant"], header["round"], chain.model.fingerprint(), serialization.describe(state))
    )


def rewritten(data, chain, tensors=None, **changes):
    update = unpack(data, chain, chain.model.trainable_state())
    fields = {n: getattr(update, n) for n in ("participant", "round", "base", "num_examples", "num_tokens", "metrics")}
    values = {n: t.clone() for n, t in update.tensors.items()}
    return Update(tensors=tensors(values) if tensors else values, **(fields | changes)).to_bytes()


def with_value(value):
    def change(values):
        next(iter(values.values())).view(-1)[0] = value
        return values

    return change


def without_one(values):
    values.pop(next(iter(values)))
    return values


def renamed(values):
    name = next(iter(values))
    return {**{n: t for n, t in values.items() if n != name}, f"{name}.x": values[name]}


def transposed(values):
    name = next(n for n, t in values.items() if t.dim() == 2 and t.shape[0] != t.shape[1])
    return {**values, name: values[name].T.contiguous()}


class Pickled:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def pickled(_data, _chain):
    import pickle

    return pickle.dumps(Pickled())


BAD = {
    "NaN": (lambda d, c: rewritten(d, c, with_value(math.nan)), "NaN"),
    "infinite": (lambda d, c: rewritten(d, c, with_value(math.inf)), "NaN or infinite"),
    "wrong shape": (lambda d, c: rewritten(d, c, transposed), "asked for was"),
    "missing tensor": (lambda d, c: rewritten(d, c, without_one), "lacks 1"),
    "unknown tensor": (lambda d, c: rewritten(d, c, renamed), "adds 1"),
    "half precision": (lambda d, c: rewritten(d, c, lambda v: {n: t.half() for n, t in v.items()}), "float16"),
    "wrong round": (lambda d, c: rewritten(d, c, round=7), "round is 7"),
    "somebody else's": (lambda d, c: rewritten(d, c, participant="good"), "participant is 'good'"),
    "another base": (lambda d, c: rewritten(d, c, base="0" * 16), "base is"),
    "another count": (lambda d, c: rewritten(d, c, num_examples=5_000_000), "joined with 4"),
    "a count beyond belief": (
        lambda d, c: rewritten(d, c, num_examples=10**12),
        "`num_examples`: Input should be less",
    ),
    "oversized": (lambda d, _: d + b"\0" * 2**21, "bytes arrived"),
    "truncated": (lambda d, _: d[:-5], "layout of the message describes"),
    "pickled": (pickled, "not safetensors"),
    "empty": (lambda *_: b"", "not safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_8_a_bad_update_is_refused_by_name_and_reason_and_the_round_goes_on(case, make_chain):
    """The global weights are those of the accepted updates alone."""
    tamper, reason = BAD[case]
    shares = {"good": PAIRS[:5], "bad": PAIRS[5:9], "fine": PAIRS[9:]}
    chain = make_chain(lora=True)
    start = chain.model.trainable_state()
    fed, _ = watched(chain, shares, lambda n, d: tamper(d, chain) if n == "bad" else d, quorum=2)
    history = fed.fit(rounds=1)
    record = history[0].participants["bad"]
    assert record.status == "refused"
    assert record.reason.startswith("UpdateRefusedError: ")
    assert reason in record.reason
    assert history[0].trained == ["good", "fine"]
    assert "bad: refused" in repr(history)
    honest = {"good": PAIRS[:5], "fine": PAIRS[9:]}
    wanted = outsiders_mean(lambda: make_chain(lora=True), honest, ADAM, start, {"good": 5, "fine": 3})
    assert_close(chain.model.trainable_state(), wanted)


def test_8_too_few_good_updates_fail_the_round_and_change_nothing(battery):
    chain = battery()
    start = chain.model.trainable_state()
    bad = {"b", "c"}
    fed, transport = watched(
        chain, {"a": PAIRS[:4], "b": PAIRS[4:8], "c": PAIRS[8:]}, lambda n, d: d[:-1] if n in bad else d, quorum=2
    )
    with pytest.raises(QuorumError, match=r"1 usable updates, the quorum is 2 \(b: UpdateRefusedError.*c: Update"):
        fed.fit(rounds=2)
    assert_equal(chain.model.trainable_state(), start)
    assert (fed.round, len(fed.history)) == (0, 0)
    transport.change = lambda _name, data: data
    fed.fit(rounds=1)  # and it can be tried again
    assert fed.history[0].trained == ["a", "b", "c"]
    assert moved(start, chain.model.trainable_state())


def test_8_random_damage_on_the_way_never_ends_a_federation(make_chain):
    """Whatever arrives, a round ends in records, and the global weights stay finite."""
    rng = random.Random(0)

    def damage(name, data):
        if name == "a":
            return data
        damaged = bytearray(data)
        header = int.from_bytes(data[:8], "little")
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(8 + header)] = rng.randrange(256)
        return bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])])

    chain = make_chain(lora=True)
    fed, _ = watched(chain, {"a": PAIRS[:2], "b": PAIRS[2:4], "c": PAIRS[4:6]}, damage, SGD)
    history = fed.fit(rounds=8)
    assert all("a" in record.trained for record in history)
    statuses = {r.participants[n].status for r in history for n in "bc"}
    assert "refused" in statuses <= {"refused", "trained"}
    assert all(bool(torch.isfinite(t).all()) for t in chain.model.trainable_state().values())


# --- 9 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"participants_per_round": 2, "seed": 5}])
def test_9_the_same_seed_gives_identical_weights(options, battery):
    results = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)  # whatever the user's own generators do
        random.seed(ambient)
        chain = battery()
        fed = federate(chain, {"a": PAIRS[:4], "b": PAIRS[4:9], "c": PAIRS[9:]}, evaluation=PAIRS[:2], **options)
        fed.fit(rounds=1).rounds  # noqa: B018
        fed.fit(rounds=2)
        results.append((chain.model.trainable_state(), [r.trained for r in fed.history]))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_9_fit_of_three_rounds_is_three_fits_of_one_and_train_and_step(battery):
    shares = {"0": PAIRS[:7], "1": PAIRS[7:]}
    config = TrainingConfig(learning_rate=3e-3, batch_size=3, max_steps=3, keep_optimizer=True)
    whole, parts, by_hand = battery(), battery(), battery()
    federate(whole, shares, config).fit(rounds=3)
    fed = federate(parts, shares, config)
    for _ in range(3):
        fed.fit(rounds=1)
    assert fed.round == len(fed.history) == 3
    fed = federate(by_hand, None, config)
    for _ in range(3):
        for device_id in range(2):
            fed.train(shares[str(device_id)], device_id)
        fed.step()
    assert_equal(parts.model.trainable_state(), whole.model.trainable_state())
    assert_equal(by_hand.model.trainable_state(), whole.model.trainable_state())


def test_9_rounds_do_not_repeat_their_batches(make_chain):
    """The same weights trained in round 0 and round 1 see another order, so they end elsewhere."""
    results = []
    for round_number in (0, 1):
        chain = make_chain()
        train_locally(chain.model, PAIRS, ADAM, prompt=chain, participant="a", round=round_number)
        results.append(chain.model.trainable_state())
    assert moved(*results)


def test_a_deep_copy_of_a_chain_learns_alone(battery):
    """Copies share nothing, locks included."""
    chain = battery()
    twin = LLMChain(llm=LocalLLM(model=copy.deepcopy(chain.model), max_new_tokens=4), prompt=TEMPLATE)
    start = chain.model.trainable_state()
    federate(twin, {"a": PAIRS}, SGD).fit(rounds=1)
    assert_equal(chain.model.trainable_state(), start)
    assert moved(start, twin.model.trainable_state())


def test_a_bare_module_over_ready_tensors_follows_the_same_law():
    """FedAvg of a linear regression, one full-batch step: w − lr · Σ n_k/n ∇L_k, by hand."""

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]))

        def forward(self, x, labels):
            return type("Output", (), {"loss": ((x @ self.w - labels) ** 2).mean()})

    generator = torch.Generator().manual_seed(0)
    data = {
        n: (torch.randn(k, 2, generator=generator), torch.randn(k, generator=generator))
        for n, k in (("a", 3), ("b", 9))
    }
    module = Regression()
    w0 = module.w.detach().clone().double()
    loaders = {
        n: DataLoader([{"x": x, "labels": y} for x, y in zip(*pair, strict=True)], batch_size=64)
        for n, pair in data.items()
    }
    fed = FederatedAveraging(module, participants=loaders, optimizer="sgd", lr=0.1, progress=False)
    fed.fit(rounds=1)
    x, y = (torch.cat([data[n][i] for n in data]).double() for i in (0, 1))
    gradient = 2 * x.T @ (x @ w0 - y) / len(y)  # the pooled mean: n_k/n weighs the participants' means right
    torch.testing.assert_close(module.w.detach().double(), w0 - 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert fed.get_model() is module
    assert isinstance(fed._server.model, LocalModel)
