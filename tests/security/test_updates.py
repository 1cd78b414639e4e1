"""Updates of strangers: each is refused, with one short error, and the round of the others is as if it had not come.

Belongs here: bytes and values of updates. Does not: hellos and answers (test_hellos, test_answers).
"""

import contextlib
import json
import struct

import pytest
import torch
from bounded import bounded, within
from corpus import updates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liars import federation

from llmchain_fed import FederatedAveraging, untrusted
from llmchain_fed.errors import QuorumError, UpdateRefusedError
from llmchain_fed.federated.server.diagnostics import LARGEST_NORM
from llmchain_fed.updates import serialization
from llmchain_fed.updates.aggregation import AGGREGATIONS, RunningMean
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.server_optimizers import DiLoCo, FedAdagrad, FedAdam, FedAvgM, FedYogi, Reptile
from llmchain_fed.updates.update import Expected, Update

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3) / 7, "b": torch.tensor([-0.0, 1e-40, 3.4e38])}
CODECS = [None, "bf16", "int8", "int4", "topk:0.5"]
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def expected(codec=None):
    start = {n: torch.zeros_like(t) for n, t in STATE.items()}
    return Expected("p", 3, "beef", serialization.describe(STATE), 5, 40, make_codec(codec), start)


def honest(codec=None):
    made = make_codec(codec)
    small = {n: t.clamp(-1e30, 1e30) for n, t in STATE.items()}
    return Update(
        participant="p",
        round=3,
        base="beef",
        tensors=small if made is None else made.encode(small),
        num_examples=5,
        num_tokens=40,
        metrics={"train_loss": 2.5, "steps": 4, "seconds": 0.5},
        codec=made.name if made is not None else None,
    ).to_bytes()


def read(data, codec=None):
    """The update, or None for a refusal that is short and can be shown."""
    with within(2):
        try:
            found = Update.from_bytes(data, expected(codec))
        except UpdateRefusedError as error:
            refused = str(error)
        else:
            refused = ""
    if refused:
        assert len(refused) < 1000
        assert untrusted.printable(refused) == refused
        return None
    assert serialization.describe(found.tensors) == serialization.describe(STATE)
    assert all(bool(t.isfinite().all()) for t in found.tensors.values())
    assert (found.participant, found.round, found.base) == ("p", 3, "beef")
    assert (found.num_examples, found.num_tokens) == (5, 40)
    assert found.metrics.keys() <= {"train_loss", "steps", "seconds"}
    assert 0 <= found.metrics.get("train_loss", 0) <= 1e9
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_an_honest_update_is_read_and_just_fits(codec):
    data = honest(codec)
    assert read(data, codec) is not None
    cap = expected(codec)
    assert struct.unpack("<Q", data[:8])[0] <= cap.max_header
    assert len(data) <= cap.max_bytes < len(data) + 300


@pytest.mark.parametrize("name", ["ä" * 40, 'quo"te', "back\\slash", "日本語", "x" * 500, "w"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cap_applies_to_every_name_and_participant(name, dtype):
    state = {name: torch.zeros(3, 0, 5, dtype=dtype), name[:-1] + "2": torch.ones((), dtype=dtype)}
    whose = 'p"\\ä日' + "\U0001f600"
    metrics = {"train_loss": 1.2345678901234567e-99, "steps": 10**13, "seconds": 1234567.1234567891}
    sent = Update(whose, 10**9, "b" * 64, state, 10**9, 10**9, metrics).to_bytes()
    wanted = Expected(whose, 10**9, "b" * 64, serialization.describe(state))
    assert Update.from_bytes(sent, wanted).num_examples == 10**9


@pytest.mark.parametrize("codec", CODECS)
def test_the_audits_updates_are_refused(codec):
    @bounded(seconds=100, megabytes=300)
    def check():
        fine = set()
        for name, data in updates.audited(honest(codec)).items():
            if read(data, codec) is not None:
                fine.add(name)
        same = {f"{field} is" for field in ("num_examples", "metrics", "codec", "more")}
        assert all(name.startswith(tuple(same)) for name in fine), fine
        assert len(fine) <= 2, fine  # `codec: null` where none was asked for, and metrics of none

    check()


@bounded(seconds=100, megabytes=300)
def test_damage_of_any_kind_is_an_update_or_a_refusal():
    made = {codec: honest(codec) for codec in CODECS}
    fields = ("kind", "participant", "round", "base", "num_examples", "num_tokens", "metrics", "codec", "x")
    values = st.sampled_from(updates.HOSTILE)

    def damaged(codec):
        data = made[codec]
        layout, body = updates.parts(data)
        text = json.dumps(layout).encode()
        index = st.integers(0, len(layout) - 2)
        places = st.integers(0, len(data) - 1)
        metrics = st.dictionaries(st.sampled_from(["train_loss", "steps", "seconds", "more"]), values)
        return st.one_of(
            st.tuples(st.sampled_from(fields), values).map(lambda p: updates.with_field(data, *p)),
            metrics.map(lambda m: updates.with_metrics(data, m)),
            st.tuples(index, st.sampled_from(["dtype", "shape", "data_offsets", "y"]), values).map(
                lambda p: updates.with_entry(data, p[0], **{p[1]: p[2]})
            ),
            st.tuples(index, st.lists(values, max_size=12)).map(lambda p: updates.with_entry(data, p[0], shape=p[1])),
            st.text(max_size=600).map(lambda name: updates.renamed(data, name)),
            st.integers(0, len(data)).map(lambda n: data[:n]),
            st.binary(max_size=60).map(lambda more: data + more),
            st.tuples(places, st.binary(min_size=1, max_size=8)).map(
                lambda p: data[: p[0]] + p[1] + data[p[0] + len(p[1]) :]
            ),
            st.tuples(st.integers(0, len(text)), st.binary(max_size=4)).map(
                lambda p: updates.raw(text[: p[0]] + p[1] + text[p[0] :], body)
            ),
            st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + data[8:]),
            st.binary(max_size=len(body)).map(lambda other: updates.raw(layout, other + body[len(other) :])),
        )

    @settings(max_examples=600, **QUIET)
    @given(st.sampled_from(CODECS).flatmap(lambda codec: st.tuples(st.just(codec), damaged(codec))))
    def check(case):
        read(case[1], case[0])

    check()


def test_whatever_goes_wrong_in_decoding_is_a_refusal(make_chain, monkeypatch):
    """Also what nobody has thought of: an error of any kind is that message's, and the round goes on."""
    inner = Update.from_bytes.__func__

    def broken(cls, data, wanted):
        if wanted.participant == "liar":
            raise ZeroDivisionError("\x1b[2J" + "x" * 10_000)
        return inner(cls, data, wanted)

    monkeypatch.setattr(Update, "from_bytes", classmethod(broken))
    record = federation(make_chain(lora=True)).fit(1)[0]
    assert {n: r.status for n, r in record.participants.items()} == {"a": "trained", "b": "trained", "liar": "refused"}
    reason = record.participants["liar"].reason
    assert "ZeroDivisionError" in reason
    assert len(reason) < 1100
    assert "\x1b" not in reason


ATTACKS = [
    "a size whose sum has one digit more than Python converts", "490,000 dimensions that end in zero",
    "half a surrogate for a name, and wrong offsets", "a terminal's commands for a name", "five thousand metrics",
    "a tensor given twice", "UTF-16", "a pickle", "nothing", "a loss far below zero",
]  # fmt: skip


def test_one_hostile_participant_changes_nothing_for_the_others(make_chain, tmp_path):
    alone = federation(make_chain(lora=True), without=("liar",), checkpoint_dir=tmp_path / "alone")
    alone.fit(len(ATTACKS))
    attacks = iter(ATTACKS)
    lies = {"train": lambda honest: updates.audited(honest)[next(attacks)]}
    fed = federation(make_chain(lora=True), lies, checkpoint_dir=tmp_path / "with")
    with within(60):
        history = fed.fit(len(ATTACKS))
    assert next(attacks, None) is None
    for ours, theirs in zip(history, alone.history, strict=True):
        assert ours.participants["liar"].status == "refused"
        assert len(ours.participants["liar"].reason) < 600
        for name in "ab":
            assert ours.participants[name].update_norm == theirs.participants[name].update_norm
        assert ours.update_norm == theirs.update_norm
    mine, others = fed.get_model().model.trainable_state(), alone.get_model().model.trainable_state()
    assert all(torch.equal(mine[n], others[n]) for n in others)
    history.save(tmp_path / "history.json")
    for text in (repr(history), history._repr_html_(), (tmp_path / "history.json").read_text()):
        assert untrusted.printable(text, 10**7) == text
    made = make_chain(lora=True)
    again = FederatedAveraging.resume(tmp_path / "with", made, runtime=fed._runtime, progress=False)
    again.history.save(tmp_path / "history.json")


# --- extreme values ---------------------------------------------------------------------------------------------------

EXTREMES = {
    "zero": lambda t, i: torch.zeros_like(t),
    "denormal": lambda t, i: torch.full_like(t, 1e-42),
    "1e18": lambda t, i: torch.full_like(t, 1e18),
    "-1e18": lambda t, i: torch.full_like(t, -1e18),
    "just below the bound": lambda t, i: torch.full_like(t, 0.99 * LARGEST_NORM / max(t.numel(), 1) ** 0.5),
    "the largest float": lambda t, i: torch.full_like(t.float(), 3.3e38).to(t.dtype),
    "one tensor huge": lambda t, i: t if i else torch.full_like(t, 1e9),
    "mixed": lambda t, i: t * (1e9 if i % 2 else 1e-30),
}


def extreme(kind):
    """What makes an honest update an extreme one."""

    def lie(data):
        header, infos = serialization.inspect(data, max_bytes=len(data))
        tensors = serialization.values(data, infos)
        if header["codec"] is None:
            tensors = {n: EXTREMES[kind](t, i) for i, (n, t) in enumerate(sorted(tensors.items()))}
        else:  # the codes stay: their scales, or the values, are what can be extreme
            tensors = {n: EXTREMES[kind](t, 1).abs() if t.is_floating_point() else t for n, t in tensors.items()}
        return serialization.pack({n: t.contiguous() for n, t in tensors.items()}, header)

    return lie


def survives(chain, lies, rounds=2, **options):
    """A fit with this liar ends, with finite weights and the honest ones' updates in its records."""
    fed = federation(chain, lies, **options)
    before = chain.model.trainable_state()
    history = fed.fit(1)
    if rounds > 1:
        with contextlib.suppress(QuorumError):  # where what was accepted has ruined the weights, nobody trains on
            fed.fit(rounds - 1)
    after = chain.model.trainable_state()
    assert all(bool(t.isfinite().all()) for t in after.values())
    assert {history[0].participants[n].status for n in "ab"} == {"trained"}
    for record in history:
        assert {r.status for r in record.participants.values()} <= {"trained", "refused", "failed"}
        unusable = [note for note in record.notes if "cannot be combined" in note]
        if unusable:
            assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads(history.to_json())
    return history


@pytest.mark.parametrize("rule", sorted(AGGREGATIONS))
def test_no_rule_fails_on_extreme_values(rule, make_chain):
    for kind in EXTREMES:
        rounds = 2 if kind in ("denormal", "just below the bound") else 1
        history = survives(make_chain(lora=True), {"train": extreme(kind)}, rounds, aggregation=rule)
        refused = [r.participants["liar"].status == "refused" for r in history]
        assert all(refused) if kind in ("1e18", "-1e18", "the largest float") else not refused[0], kind


@pytest.mark.parametrize("rule", ["flora", "flexlora"])
@pytest.mark.parametrize("alpha", [1e-3, 2.0**16])
def test_no_alpha_that_may_be_told_breaks_a_round(rule, alpha, make_chain):
    lies = {"train": extreme("just below the bound")}
    history = survives(make_chain(lora=True), lies, aggregation=rule, rank=1, alpha=alpha)
    assert history[0].participants["liar"].status == "trained"


OPTIMIZERS = [FedAvgM(), FedAdam(), FedAdagrad(), FedYogi(), Reptile(), DiLoCo()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_no_server_optimizer_fails_on_extreme_values(optimizer, make_chain):
    for kind in ("denormal", "just below the bound", "1e18", "mixed"):
        survives(make_chain(lora=True), {"train": extreme(kind)}, server_optimizer=optimizer)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk:0.1"])
@pytest.mark.parametrize("weighting", ["tokens", "equal"])
def test_no_codec_and_no_weighting_fails_on_extreme_values(codec, weighting, make_chain):
    for kind in ("zero", "denormal", "just below the bound", "the largest float"):
        survives(make_chain(lora=True), {"train": extreme(kind)}, 1, codec=codec, weighting=weighting)


@pytest.mark.parametrize("rule", ["fedsvd", "flexlora"])
@pytest.mark.parametrize("function", ["svd", "qr"])
def test_factors_that_cannot_be_decomposed_leave_the_weights_as_before(rule, function, make_chain, monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, function, fails)
    chain = make_chain(lora=True)
    before = chain.model.trainable_state()
    history = federation(chain, aggregation=rule).fit(2)
    for record in history:
        assert record.notes == [
            "the updates of this round cannot be combined (factors of rank "
            f"{4 if rule == 'fedsvd' else 12} cannot be decomposed (the algorithm failed to converge).): the weights "
            "are as before"
        ]
        assert record.update_norm == 0
    after = chain.model.trainable_state()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_step_that_overflows_leaves_weights_and_memory_as_before(make_chain):
    """Every update is finite for itself, and so is their mean; the server optimizer's step is not."""
    chain = make_chain()
    optimizer = FedAvgM(lr=1e38, momentum=0.0)
    before = chain.model.trainable_state()
    history = federation(chain, {"train": extreme("one tensor huge")}, server_optimizer=optimizer).fit(1)
    after = chain.model.trainable_state()
    assert "the weights are as before" in history[0].notes[0]
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_errors_of_a_users_own_rule_are_still_raised(make_chain):
    """They are this process's own: hiding them would hide a mistake."""

    class Mine(RunningMean):
        name = "mine"

        def add(self, given):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        federation(make_chain(lora=True), aggregation=Mine()).fit(1)
