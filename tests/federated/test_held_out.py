"""What held-out losses are worth: examples that are trained on too, and losses that are not finite.

Belongs here: notes in records about held-out data. Does not: what is measured, and when (test_averaging).
"""

import json
import math

import pandas as pd
import pytest
import torch
from resumed_runs import Elsewhere
from tiny import PAIRS
from torch.utils.data import DataLoader

from llmchain_fed import FederatedAveraging, Participant, TrainingConfig, evaluate_locally
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.errors import ConfigError, DataError, EmptyParticipantError, ParticipantError, TransportError
from llmchain_fed.federated.client.data import Overlap, crossing, overlap
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord
from llmchain_fed.federated.measures import reading
from llmchain_fed.federated.protocol import finiteness, messages
from llmchain_fed.federated.server import evaluation
from llmchain_fed.federated.server.evaluation import HALF, WHOLE


def federation(chain, participants, **options):
    return FederatedAveraging(
        chain, participants=participants, progress=False, samples=0, **({"lr": 1e-3, "batch_size": 4} | options)
    )


def notes(record):
    return {name: found.notes for name, found in record.participants.items()}


A, B, REST = PAIRS[:4], PAIRS[4:8], PAIRS[8:]
BOTH = "1 of 5 held-out examples are also trained on: held-out loss flatters"


@pytest.mark.parametrize("how", ["held_out", "by name", "shared"])
def test_an_example_that_is_trained_on_and_held_out_is_noted_once(how, make_chain):
    held_out = [A[1], *REST]
    if how == "held_out":
        fed = federation(make_chain(), [Participant("a", A, held_out), Participant("b", B)])
    else:
        fed = federation(make_chain(), {"a": A, "b": B}, evaluation={"a": held_out} if how == "by name" else held_out)
    fed.fit(rounds=2)
    expected = BOTH.replace("held-out examples", "shared evaluation examples") if how == "shared" else BOTH
    assert notes(fed.history[0]) == {"a": [expected], "b": []}
    assert notes(fed.history[1]) == {"a": [], "b": []}
    assert expected in repr(fed.history)


@pytest.mark.parametrize("how", ["own", "shared"])
def test_what_is_trained_on_at_a_length_and_precision_is_measured_so(how, make_chain):
    """One set for all is measured as a participant's own is: without what is too long, in the training's precision."""
    chain = make_chain()
    lengths = encode_examples(REST, chain.model, chain).lengths()
    longest = sorted(lengths)[-2]
    usable = [pair for pair, length in zip(REST, lengths, strict=True) if length <= longest]
    assert len(usable) < len(REST)
    training = TrainingConfig(learning_rate=1e-3, max_length=longest, precision="bf16")
    expected = evaluate_locally(chain, usable, precision="bf16").loss
    assert expected not in (evaluate_locally(chain, REST, precision="bf16").loss, evaluate_locally(chain, usable).loss)
    options = {"training": training, "lr": None, "batch_size": None}
    if how == "own":
        fed = federation(chain, [Participant("a", A, REST)], **options)
    else:
        fed = federation(chain, {"a": A}, evaluation=REST, **options)
    assert fed.fit(1)[0].held_out_before == expected


def test_the_same_prompt_with_another_completion_is_counted_apart(make_chain):
    held_out = [(A[0][0], "other"), A[1], ({"text": A[2][0]}, A[2][1]), *REST]
    fed = federation(make_chain(), [Participant("a", A, held_out)])
    assert notes(fed.fit(rounds=1)[0])["a"] == [
        "2 of 7 held-out examples are also trained on: held-out loss flatters",
        "1 of 7 held-out examples have a prompt that is trained on, with another completion",
    ]


def test_what_another_participant_trains_on_is_noted(make_chain):
    fed = federation(make_chain(), [Participant("a", A, [*B[:2], *REST]), Participant("b", B)])
    assert notes(fed.fit(rounds=1)[0]) == {
        "a": ["2 of 6 held-out examples are trained on by another participant: held-out loss flatters"], "b": [],
    }  # fmt: skip


def test_a_share_set_apart_overlaps_with_nothing(make_chain):
    fed = federation(make_chain(), {"a": [*A, *A], "b": [*B, B[0]]}, evaluation=0.25)
    assert notes(fed.fit(rounds=1)[0]) == {"a": [], "b": []}


ODD = [A[1], ("", "x"), ("word " * 400, "y"), *REST]
ODD_NOTE = "2 of 7 {} are left out: 1 empty, 1 too long"


@pytest.mark.parametrize("how", ["own", "file", "shared"])
def test_held_out_examples_that_are_left_out_are_noted_once(how, tmp_path, make_chain):
    """A loss over one of a hundred held-out examples must not pass for one over all."""
    odd = [*ODD[1:], B[0]]
    if how == "file":
        pd.DataFrame(odd, columns=["text", "completion"]).to_csv(tmp_path / "a.csv", index=False)
        odd = tmp_path / "a.csv"
    if how == "shared":
        fed = federation(make_chain(), {"a": A}, evaluation=odd)
    else:
        fed = federation(make_chain(), [Participant("a", A, odd)])
    fed.fit(rounds=2)
    said = [[*record.notes, *record.participants["a"].notes] for record in fed.history]
    what = "shared evaluation examples" if how == "shared" else "held-out examples"
    assert said == [[ODD_NOTE.format(what)], []]


@pytest.mark.parametrize(
    ("held_out", "why"),
    [
        ([], r"\(DataReport\(used=0\)\).*Give it some: the source has no row\.$"),
        (
            [("", "x"), ("y", None), ("z", " ")],
            r"\(DataReport\(used=0, empty=3\)\).*Fill the prompt, the variables and",
        ),
        ([("word " * 400, "y")], r"\(DataReport\(used=0, too_long=1\)\).*Raise max_length"),
    ],
)
def test_an_error_says_that_it_is_the_held_out_part_that_is_empty(held_out, why, make_chain):
    with pytest.raises(EmptyParticipantError, match=f"participant 'a': its held-out part has no usable example {why}"):
        federation(make_chain(), [Participant("a", A, held_out)]).fit(rounds=1)
    with pytest.raises(EmptyParticipantError, match=f"evaluation: the set for all has no usable example {why}"):
        federation(make_chain(), {"a": A}, evaluation=held_out).fit(rounds=1)


def test_an_error_in_the_evaluations_rows_says_so(make_chain):
    frame, other = (pd.DataFrame({name: ["x", "y"], "completion": ["a", "b"]}) for name in ("english", "german"))
    with pytest.raises(DataError, match=r"^evaluation: example 0: there is no column 'english'"):
        federation(make_chain(), {"a": frame}, evaluation=other, columns={"text": "english"}).fit(rounds=1)


def test_the_two_low_level_calls_note_it_too(make_chain):
    fed = federation(make_chain(), None, evaluation=[A[0], *REST])
    for _ in range(2):
        fed.train(A, 0)
        fed.step()
    assert len(notes(fed.history[0])["0"]) == 1
    assert notes(fed.history[1]) == {"0": []}


def test_what_is_not_looked_into_is_not_noted(make_chain):
    chain = make_chain()
    encoded = encode_examples(A, chain.model, chain)
    loader = DataLoader(
        [encoded[i] for i in range(4)], batch_size=2, collate_fn=lambda rows: collate(rows, chain.model)
    )
    fed = federation(chain, [Participant("a", A, loader), Participant("b", loader, A)])
    fed.fit(rounds=1)
    assert overlap(loader, encoded) is None


def test_counts_are_those_of_sets_of_texts(make_chain):
    chain = make_chain()

    def encoded(rows):
        return encode_examples(rows, chain.model, chain)

    train = [("a", "b"), ("a", "c"), ("d", "e"), ("d", "e")]
    held_out = [("a", "b"), ("a", "b"), ("a", "x"), ("d", "e"), ("e", "d"), ("ab", ""), ("x", "c")]
    usable = [row for row in held_out if row[1]]
    pairs, prompts = set(train), {x for x, _ in train}
    same = sum(row in pairs for row in usable)
    asked = sum(row[0] in prompts and row not in pairs for row in usable)
    assert overlap(encoded(train), encoded(held_out)) == Overlap(same, asked, len(usable)) == Overlap(3, 1, 6)
    assert crossing({"p": encoded(train), "q": encoded(held_out)}, {"p": encoded(held_out)}) == {"p": (6, 6)}
    assert crossing({"p": encoded(train)}, {"p": encoded(held_out)}) == {}


@pytest.mark.parametrize(
    "said", [3, [1, 2], [1, 2, 3, 4], [-1, 0, 3], [2, 2, 3], [1.0, 0, 3], [True, 0, 3], [0, 0, 10**12], "x"]
)
def test_counts_from_elsewhere_are_read_with_bounds(said, make_chain):
    fed = federation(make_chain(), [Participant("a", A, REST)])
    contract = fed._server.target.contract()
    hello = {"participant": "a", "contract": contract, "held_out": True, "overlap": [1, 1, 4]}
    assert messages.read_introduction(json.dumps(hello).encode(), "a", contract).overlapping == Overlap(1, 1, 4)
    nothing = json.dumps(hello | {"overlap": None}).encode()
    assert messages.read_introduction(nothing, "a", contract).overlapping is None
    with pytest.raises(ParticipantError, match="makes no sense"):
        messages.read_introduction(json.dumps(hello | {"overlap": said}).encode(), "a", contract)


# --- losses that are not finite -----------------------------------------------------------------------------------


def spoil(chain, value):
    """Held-out losses become NaN, as those of a model that has diverged; training is left alone."""
    head = chain.model.module.get_output_embeddings()

    def hook(module, args, output):
        return torch.full_like(output, value) if not torch.is_grad_enabled() else output

    return head.register_forward_hook(hook)


@pytest.mark.parametrize("how", ["own", "shared"])
def test_a_held_out_loss_that_is_not_finite_is_said(how, make_chain):
    chain = make_chain()
    if how == "own":
        fed = federation(chain, [Participant("a", A, REST), Participant("b", B)])
    else:
        fed = federation(chain, {"a": A, "b": B}, evaluation=REST)
    fed.fit(rounds=1)
    handle = spoil(chain, float("nan"))
    record = fed.fit(rounds=1)[-1]
    handle.remove()
    what = "held-out loss" if how == "own" else "the shared evaluation's loss"
    said = f"{what} is not finite (nan) after the round: the model has diverged"
    assert any(note.startswith(said) for note in record.participants["a"].notes)
    assert not any("makes no sense" in note for note in record.participants["a"].notes)
    assert record.held_out_after is None
    assert record.participants["a"].held_out_after is None
    assert math.isfinite(record.held_out_before)
    assert "not finite (nan)" in repr(fed.history)
    assert "not finite (nan)" in fed.history._repr_html_()
    assert History.from_dict(json.loads(fed.history.to_json()))[-1].participants["a"].notes  # and in its JSON
    assert [r.status for r in record.participants.values()] == ["trained"] * 2
    assert fed.fit(rounds=1)[-1].held_out_after is not None


def test_the_pooled_loss_is_over_those_that_are_finite_on_both_sides():
    fine, worse = {"loss": 2.0, "tokens": 10}, {"loss": 4.0, "tokens": 30}
    before = evaluation.Measurement(own={"a": fine, "b": worse})
    after = evaluation.Measurement(own={"a": fine, "b": worse | finiteness.told(math.inf)})
    assert evaluation._pooled(before, before) == (3.5, 3.5, [])
    assert evaluation._pooled(before, after) == evaluation._pooled(after, before) == (2.0, 2.0, [])
    nobody = evaluation.Measurement(own={n: {"tokens": 10} | finiteness.told(math.nan) for n in "ab"})
    assert evaluation._pooled(before, nobody) == (3.5, None, [])
    assert evaluation._pooled(nobody, nobody) == (None, None, [])


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"loss": 2}, {"loss": 2.0}),
        ({"loss": None, "not_finite": "nan"}, {"loss": None, "not_finite": "nan"}),
        ({"loss": None, "not_finite": "-inf"}, {"loss": None, "not_finite": "-inf"}),
        ({"loss": None, "not_finite": "<script>"}, None),
        ({"loss": None, "not_finite": ["nan"]}, None),
        ({"loss": 2.0, "not_finite": "nan"}, None),
        ({"loss": None}, None),
        ({}, None),
        ({"loss": True}, None),
        ({"loss": -0.5}, None),
        ({"loss": 1e4}, {"loss": 1e4}),
        ({"loss": 1e5}, {"loss": None, "not_finite": "inf"}),
        ({"loss": "nan"}, None),
        ({"loss": 10**400}, None),
    ],
)
def test_answers_from_elsewhere_are_read_with_bounds(said, found):
    assert finiteness.read(said) == found
    answer = json.dumps(said | {"tokens": 5}).encode()
    kept = reading.read_evaluation(answer, 0)
    if found is None:
        assert "makes no sense" in kept["error"] or "no JSON of ours" in kept["error"]
    else:
        assert kept == found | {"tokens": 5, "samples": []}


def test_losses_side_by_side_show_what_is_not_finite(make_chain):
    chain = make_chain(lora=True)
    fed = federation(chain, [Participant("a", A, REST)])
    fed.fit(rounds=1)
    handle = spoil(chain, float("nan"))
    table = fed.side_by_side()
    handle.remove()
    assert math.isnan(table["a"]["global"])
    assert "nan" in repr(table)
    assert math.isfinite(fed.side_by_side()["a"]["global"])


@pytest.mark.parametrize("again", [None, 2, 5], ids=["in one process", "resumed while it is so", "resumed after it"])
def test_who_counts_one_half_is_said_when_that_begins_and_when_it_ends(again, make_chain):
    """A round that failed said nothing, and a hub that resumes knows from its history what was said."""
    evaluator = federation(make_chain(), {"a": A, "b": B})._server.evaluator
    history, said = History(), []
    for number, name in enumerate(["a", "a", "a", None, None, None, "a", "b"]):
        if number == again:
            evaluator.forget()
        for _ in range(2):  # the first of them fails after it
            record = RoundRecord(round=number + 1, participants={n: ParticipantRecord("trained") for n in "abc"})
            evaluator._say_half(record, name, history)
        history.append(record)
        said.append({n: p.notes for n, p in record.participants.items() if p.notes})
    assert said == [{"a": [HALF]}, {}, {}, {"a": [WHOLE]}, {}, {}, {"a": [HALF]}, {"a": [WHOLE], "b": [HALF]}]


# --- participants who hold out their examples elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [0.5, {"a": REST}, {}])
def test_nobody_here_can_hold_out_for_participants_that_a_runtime_brings(evaluation, make_chain):
    here = federation(make_chain(), {"a": A, "b": B})
    with pytest.raises(ConfigError, match=r"evaluation=.* participants that a runtime brings.*Participant\(held_out="):
        federation(make_chain(), None, runtime=Elsewhere(here._peers), evaluation=evaluation)


def test_one_set_for_all_is_measured_here_wherever_they_are(make_chain):
    here = federation(make_chain(), {"a": A, "b": B})
    away = federation(make_chain(), None, runtime=Elsewhere(here._peers), evaluation=REST)
    assert away.fit(rounds=1, patience=1)[0].held_out_after is not None


@pytest.mark.parametrize("options", [{"patience": 1}, {"on_divergence": "stop"}])
def test_nothing_to_stop_by_is_said_before_the_first_round(options, make_chain):
    here = federation(make_chain(), {"a": A, "b": B})
    away = federation(make_chain(), None, runtime=Elsewhere(here._peers))
    start = away._server.model.trainable_state()
    with pytest.raises(ConfigError, match=r"all participants have joined and none of them .*held_out="):
        away.fit(rounds=2, **options)
    assert away.round == 0
    assert all(torch.equal(start[n], t) for n, t in away._server.model.trainable_state().items())
    assert away.fit(rounds=1).rounds


class WithoutB(Elsewhere):
    """Where b cannot be reached."""

    def call(self, op, nodes, payload, timeout=None):
        for name in nodes:
            yield from [(name, TransportError("no way"))] if name == "b" else super().call(op, [name], payload)


def test_who_is_absent_may_yet_bring_something_to_stop_by(make_chain):
    here = federation(make_chain(), [Participant("a", A), Participant("b", B, REST)])
    away = federation(make_chain(), None, runtime=WithoutB(here._peers))
    assert len(away.fit(rounds=1, patience=1)) == 1


class Ranks(Elsewhere):
    """One of several processes that all make the federation: here is `a`, and `b` is in another one."""

    replicated = True

    def host(self, clients):
        assert clients.keys() == {"a"}

    def publish(self, outcome, error=None):
        pass


def test_every_process_of_a_script_may_be_given_what_all_hold_out(make_chain):
    given = {"a": REST, "b": REST[:2]}
    here = federation(make_chain(), {"a": A, "b": B}, evaluation=given)
    rank = federation(make_chain(), {"a": A}, evaluation=given, runtime=Ranks(here._peers))
    assert rank._server.evaluator.divide({"a": Participant("a", A)})["a"].held_out == REST
    with pytest.raises(ConfigError, match=r"evaluation names \['z'\], who take no part. Participants: a, b"):
        federation(make_chain(), {"a": A}, evaluation=given | {"z": REST}, runtime=Ranks(here._peers))


def test_a_shared_set_is_as_long_as_training_lets_examples_be(make_chain):
    chain = make_chain()
    longer = ({"text": "send a message now " * 3}, "yes")
    longest = max(encode_examples(REST, chain.model, chain).lengths()) + 1
    training = TrainingConfig(learning_rate=1e-3, batch_size=4, max_length=longest)
    fed = FederatedAveraging(
        chain, participants={"a": A}, evaluation=[*REST, longer], training=training, samples=0, progress=False
    )
    wanted = evaluate_locally(chain, REST).loss
    assert evaluate_locally(chain, [*REST, longer]).loss != pytest.approx(wanted, rel=1e-4)
    assert fed.fit(rounds=1)[0].held_out_before == pytest.approx(wanted, rel=1e-6)
