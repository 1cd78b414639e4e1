"""Split: what is held out follows from a key alone, or from the time; groups stay together; nobody is left without.

Belongs here: sides of one participant's examples. Does not: what is measured on them (test_held_out).
"""

import datetime as dt
import hashlib
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAIRS, TEMPLATE
from torch.utils.data import DataLoader

from llmchain_fed import FederatedAveraging, Participant, RawText, Split
from llmchain_fed.data import read_examples
from llmchain_fed.data.sides import divide
from llmchain_fed.data.split import moment, position, text_of
from llmchain_fed.errors import CheckpointError, ConfigError, DataError, EmptyParticipantError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.options import FederationConfig

DAYS = [f"2026-01-{at % 28 + 1:02}" for at in range(80)]
PATIENTS = [
    {"text": f"finding {at}", "completion": f"label {at % 3}", "patient_id": at // 4, "date": day}
    for at, day in enumerate(DAYS)
]


def hashed(key, seed=0):
    """The rule as a reader of the docs would write it."""
    return int(hashlib.sha256(f"{seed}|{key}".encode()).hexdigest()[:16], 16) / 2**64


def texts(source, prompt):
    return [example.inputs["text"] for example in read_examples(source, prompt)]


def sides_of(source, split, prompt, seed=0):
    return [texts(side, prompt) for side in divide(source, prompt, split, seed, "a")]


def sources(tmp_path, column):
    """The rows in every kind of source, some with columns that nobody reads."""
    rows, frame = PATIENTS, pd.DataFrame(PATIENTS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gaps = frame.astype({"patient_id": float})  # as pandas makes a column of whole numbers with gaps
    strict = [{name: row[name] for name in ("text", "completion", column)} for row in rows]
    frames = [frame, gaps, polars.DataFrame(rows), pa.Table.from_pylist(rows)]
    return [strict, (row for row in strict), *frames, *sorted(tmp_path.iterdir())]


def test_a_group_is_on_one_side_and_the_same_in_every_source(tmp_path, make_chain):
    chain = make_chain()
    held = [row["text"] for row in PATIENTS if hashed(row["patient_id"]) < 0.3]
    assert 0 < len(held) < len(PATIENTS)
    for source in sources(tmp_path, "patient_id"):
        train, held_out = sides_of(source, Split(0.3, by="patient_id"), chain)
        assert held_out == held
        assert train == [row["text"] for row in PATIENTS if row["text"] not in held]


def test_the_group_is_dropped_and_is_no_column_that_nobody_reads(make_chain):
    chain = make_chain()
    train, _ = divide(pd.DataFrame(PATIENTS), chain, Split(0.3, by="patient_id"), 0, "a")
    from llmchain_fed.data import encode_examples

    assert encode_examples(train, chain.model, chain).report.ignored_names == ("date",)


def test_a_share_is_a_split_by_the_text_of_the_prompt(make_chain):
    chain = make_chain()
    held = [text for text, _ in PAIRS if hashed(TEMPLATE.format(text=text)) < 0.3]
    raw = [RawText(TEMPLATE.format(text=text), "x") for text, _ in PAIRS]
    train, held_out = divide([*PAIRS, *raw], chain, Split(0.3), 0, "a")
    assert [e.inputs for e in held_out[: len(held)]] == held
    assert [e.prompt for e in held_out[len(held) :]] == [TEMPLATE.format(text=text) for text in held]
    assert len(train) + len(held_out) == 2 * len(PAIRS)
    options = {"progress": False, "samples": 0, "lr": 1e-3}
    losses = set()
    for evaluation in (0.3, Split(0.3)):
        fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, evaluation=evaluation, **options)
        losses.add(fed.fit(rounds=1)[0].held_out_after)
    assert len(losses) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 5))
def test_one_more_example_moves_no_other(keys, share, seed):
    rows = [(f"x{at}", "y") for at in range(len(keys))]
    split = Split(share, by=lambda row: keys[int(row[0][1:])], seed=seed)

    def marks(count):
        try:
            train, held = divide(rows[:count], None, split, 0, "a")
        except EmptyParticipantError:
            return None
        return {e.prompt: False for e in train} | {e.prompt: True for e in held}

    whole = marks(len(rows))
    for count in range(1, len(rows)):
        some = marks(count)
        if whole is not None and some is not None:
            assert some.items() <= whole.items()
    if whole is not None:
        assert all(whole[f"x{at}"] == (position(str(key), seed) < share) for at, key in enumerate(keys))


def test_shares_are_met_in_the_mean():
    places = [position(f"patient {at}", seed=3) for at in range(20_000)]
    for share in (0.1, 0.5, 0.9):  # three standard errors of a binomial
        error = (share * (1 - share) / 20_000) ** 0.5
        assert np.mean([p < share for p in places]) == pytest.approx(share, abs=3 * error)


def test_a_key_is_on_the_same_side_at_every_participant(make_chain):
    """What two share is trained at neither and held out at neither, or the other way round."""
    mine = [*PAIRS[:8], ("shared one", "x"), ("shared two", "y")]
    participants = {"a": mine, "b": [*PAIRS[4:], *mine[8:]]}
    options = {"progress": False, "samples": 0, "lr": 1e-3}
    fed = FederatedAveraging(make_chain(), participants=participants, evaluation=0.4, **options)
    record = fed.fit(rounds=1)[0]
    assert [p.notes for p in record.participants.values()] == [[], []]  # no word of held-out texts that others train on


def test_several_columns_are_a_key_together(tmp_path, make_chain):
    chain, split = make_chain(), Split(0.3, by=["patient_id", "date"])
    frame = pd.DataFrame(PATIENTS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    held = [r["text"] for r in PATIENTS if hashed(json.dumps([str(r["patient_id"]), r["date"]])) < 0.3]
    for source in (frame, tmp_path / "a.csv", frame.assign(date=pd.to_datetime(frame["date"]))):
        assert sides_of(source, split, chain)[1] == held
    config = FederationConfig(evaluation=split)
    assert FederationConfig(**json.loads(config.model_dump_json())) == config


def test_a_participant_may_give_a_share(make_chain):
    options = {"progress": False, "lr": 1e-3, "samples": 0}
    given = [0.3, Split(0.3), np.float32(0.3)]
    found = [FederatedAveraging(make_chain(), participants=[Participant("a", PAIRS, s)], **options) for s in given]
    assert len({len(fed._peers["a"].participant.held_out) for fed in found}) == 1


def test_a_function_may_say_what_the_key_is(make_chain):
    chain = make_chain()
    found = sides_of(pd.DataFrame(PATIENTS), Split(0.3, by=lambda row: row["patient_id"]), chain)
    assert found == sides_of(pd.DataFrame(PATIENTS), Split(0.3, by="patient_id"), chain)
    with pytest.raises(DataError, match=r"example 0: the function of Split\(by=…\) raises KeyError: 'id'"):
        divide(pd.DataFrame(PATIENTS), chain, Split(0.3, by=lambda row: row["id"]), 0, "a")
    with pytest.raises(DataError, match="Give a key for every row"):
        divide(pd.DataFrame(PATIENTS), chain, Split(0.3, by=lambda row: None), 0, "a")


def test_the_key_may_be_a_variable_and_columns_may_be_mapped(make_chain):
    chain = make_chain()
    rows = [({"text": row["text"]}, row["completion"]) for row in PATIENTS]
    held = sides_of(rows, Split(0.3, by="text"), chain)[1]
    assert held == [row["text"] for row in PATIENTS if hashed(row["text"]) < 0.3]
    frame = pd.DataFrame(PATIENTS).rename(columns={"text": "finding"})
    fed = FederatedAveraging(
        make_chain(), participants={"a": frame}, columns={"text": "finding"}, evaluation=Split(0.3, by="finding"),
        progress=False, samples=2, lr=1e-3,
    )  # fmt: skip
    record = fed.fit(rounds=1)[0]
    assert record.participants["a"].examples == len(PATIENTS) - len(held)
    assert [s.prompt for s in record.samples] == [TEMPLATE.format(text=text) for text in held[:2]]


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_newest_are_held_out_and_rows_of_one_time_stay_together(tmp_path, make_chain):
    chain = make_chain()
    dates = sorted(row["date"] for row in PATIENTS)
    start = dates[-round(0.2 * len(dates))]
    wanted = [row["text"] for row in PATIENTS if row["date"] >= start]
    frame = pd.DataFrame(PATIENTS).assign(date=lambda f: pd.to_datetime(f["date"]))
    polar = polars.DataFrame(PATIENTS).with_columns(polars.col("date").str.to_date())
    for source in (*sources(tmp_path, "date"), frame, polar):
        assert sides_of(source, Split(0.2, time="date"), chain)[1] == wanted
    after = [row["text"] for row in PATIENTS if row["date"] >= "2026-01-20"]
    for given_after in ("2026-01-20", dt.date(2026, 1, 20), dt.datetime(2026, 1, 20), "2026-01-20T00:00+00:00"):
        assert sides_of(frame, Split(time="date", after=given_after), chain)[1] == after


def test_moments_are_ordered_whatever_they_are_written_as():
    day = moment("2026-01-02")
    dates = (dt.date(2026, 1, 2), dt.datetime(2026, 1, 2), pd.Timestamp("2026-01-02"), np.datetime64("2026-01-02"))
    for same in (*dates, "20260102"):
        assert moment(same) == day
    assert moment("2026-01-02T01:00+01:00") == day
    assert moment(7) == moment("7") == moment(np.int64(7)) == moment(torch.tensor(7)) == ("number", 7.0)
    for nothing in ("01/02/2026", "soon", float("nan"), float("inf"), True, None, [1]):
        assert moment(nothing) is None


DAY = dt.datetime(2026, 1, 2)
ONE_KEY = {
    "7": [7, 7.0, "7", np.int64(7), np.float32(7), pa.scalar(7), torch.tensor(7), "7.0", "007", " 7\n", "7.",
          "+7", b"7", Decimal("7.00"), "7e0", Fraction(7), "\uff17", "7\xa0"],
    "0.5": [0.5, ".5", "0.50", Decimal("0.5"), np.float64(0.5)],
    "100000": [10**5, "1e+05", "100000.0"],
    str(2**60): [2**60, float(2**60), str(2**60 + 1), 2**60 + 1, "1152921504606846976.0"],
    "True": [True, "true", "TRUE", np.bool_(True), pa.scalar(True)],
    "2026-01-02": [DAY.date(), DAY, pd.Timestamp(DAY), "2026-01-02", "2026-01-02 00:00:00", np.datetime64(DAY, "ns"),
                   "2026-01-02T01:00+01:00", pd.Timestamp(DAY, tz="UTC"), 20260102, "20260102", pa.scalar(DAY)],
    "2026-01-02T03:04:00": ["2026-01-02 03:04", DAY.replace(hour=3, minute=4),
                            pd.Timestamp("2026-01-02 03:04:00.000000001")],
    "caf\u00e9": ["caf\u00e9", "cafe\u0301", "caf\u00e9 "],
    '["7", "2026-01-02"]': [(7, DAY), ["7.0", "2026-01-02"]],
    '["7", "8"]': [(7, 8), np.array([7.0, 8.0]), torch.tensor([7, 8]), pa.scalar([7, 8]), ["07", "8"]],
    "9" * 400: ["9" * 400, int("9" * 400)],
}  # fmt: skip


@pytest.mark.parametrize("text", ONE_KEY)
def test_a_key_is_one_however_it_was_written_or_read(text):
    assert {text_of(value) for value in ONE_KEY[text]} == {text}


def test_other_keys_stay_apart():
    keys = [7, 70, -7, 0.7, "P7", "7a", "7 8", "2026-01", "NA", "true story", 20261332, (7,), float("inf")]
    assert len({text_of(key) for key in keys}) == len(keys)


def test_ids_that_a_frame_made_floats_of_or_took_zeros_from_are_on_the_side_of_the_files(tmp_path, make_chain):
    """A file with padded ids, pandas' reading of it, and what pandas writes of a column with gaps."""
    chain, frame = make_chain(), pd.DataFrame(PATIENTS)
    padded, gaps = tmp_path / "padded.csv", tmp_path / "gaps.csv"
    frame.assign(patient_id=[f"{at:04}" for at in frame["patient_id"]]).to_csv(padded, index=False)
    frame.astype({"patient_id": float}).to_csv(gaps, index=False)
    wanted = sides_of(frame, Split(0.3, by="patient_id"), chain)
    for source in (padded, pd.read_csv(padded), gaps):
        assert sides_of(source, Split(0.3, by="patient_id"), chain) == wanted


# --- what cannot be divided -------------------------------------------------------------------------------------------

REFUSED = {
    "no column": (
        Split(0.3, by="patient"),
        r"there is no column 'patient' for Split\(by='patient'\); there are \['comp",
    ),
    "no time": (Split(0.3, time="when"), r"there is no column 'when' for Split\(time='when'\)"),
    "no date": (Split(0.3, time="text"), r"^example 0: 'text' is 'finding 0', which is no time"),
    "one group": (
        Split(0.3, by=lambda row: "all"),
        r"80 usable examples with 1 different keys, too few to hold out 30%",
    ),
    "nobody newer": (Split(time="date", after="2027-01-01"), r"80 usable examples.*none to hold out"),
    "nobody older": (Split(time="date", after="2025-01-01"), r"80 usable examples.*none to train on"),
    "another kind": (Split(time="date", after=5), r"'date' is the date '2026-01-01', and others are numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_divided_is_refused_and_says_why(case, make_chain):
    split, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason):
        divide(pd.DataFrame(PATIENTS), make_chain(), split, 0, "a")


def test_a_row_without_a_group_is_refused_by_its_place(tmp_path, make_chain):
    rows = [*PATIENTS[:5], PATIENTS[5] | {"patient_id": None}, {"text": "", "completion": "x", "patient_id": None}]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=r"^example 5 \(a\.csv, line 7\): it has no 'patient_id' to split by"):
        divide(tmp_path / "a.csv", make_chain(), Split(0.3, by="patient_id"), 0, "a")
    with pytest.raises(DataError, match="a tuple has no columns"):
        divide(PAIRS, make_chain(), Split(0.3, by="patient_id"), 0, "a")
    with pytest.raises(ConfigError, match="DataLoader cannot be held out"):
        FederatedAveraging(make_chain(), participants={"a": DataLoader([1])}, evaluation=Split(0.3, by="patient_id"))


def test_too_few_to_divide_is_said_with_what_would_divide_them(make_chain):
    """A user with four examples learns which share, or seed, has one on each side; and both do."""
    chain, few = make_chain(), [pair for pair in PAIRS if hashed(TEMPLATE.format(text=pair[0])) > 0.5][:4]
    for split, said in ((Split(0.2), "none is"), (Split(0.99), "all are")):
        with pytest.raises(EmptyParticipantError, match=f"'a' has 4 usable examples.*{said} held out") as error:
            divide(few, chain, split, 0, "a")
        text = str(error.value)
        ways = {name: text.split(f"{name}=")[1].split()[0] for name in ("share", "seed") if f"{name}=" in text}
        assert ways.keys() == {"share", "seed"}
        for again in (Split(float(ways["share"])), Split(split.share, seed=int(ways["seed"]))):
            assert all(divide(few, chain, again, 0, "a"))
    with pytest.raises(EmptyParticipantError, match="too few to hold out"):
        FederatedAveraging(chain, participants={"a": few}, evaluation=0.2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give a share"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"share": 1}, "between 0 and 1"),
        ({"share": "a"}, "between 0 and 1"),
        ({"share": 0.2, "after": "2026-01-01", "time": "date"}, "give a share"),
        ({"after": "2026-01-01"}, "after= goes with the column"),
        ({"share": 0.2, "by": "a", "time": "b"}, "Give one"),
        ({"share": 0.2, "by": 5}, "by is a column, a list of columns or a function"),
        ({"share": 0.2, "by": []}, "by is a column"),
        ({"share": 0.2, "by": ["a", 1]}, "by is a column"),
        ({"share": 0.2, "time": 5}, "time is a column"),
        ({"time": "date", "after": "soon"}, "after is a date"),
        ({"share": 0.2, "seed": 0.5}, "seed is a whole number"),
    ],
)
def test_options_that_make_no_split_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        Split(**options)


def test_numbers_of_numpy_are_numbers():
    assert Split(np.float64(0.5), seed=np.int64(3)) == Split(0.5, seed=3)
    assert repr(Split(np.float32(0.5), by="a")) == "Split(share=0.5, by='a')"


def test_a_table_that_changes_after_it_was_divided_is_refused(tmp_path, make_chain):
    chain, path = make_chain(), tmp_path / "a.csv"
    pd.DataFrame(PATIENTS).to_csv(path, index=False)
    train, _ = divide(path, chain, Split(0.3, by="patient_id"), 0, "a")
    path.write_text(path.read_text() + "more,rows,1,2026-01-01\n")
    with pytest.raises(DataError, match="has changed since it was divided"):
        texts(train, chain)
    rows = [{name: row[name] for name in ("text", "completion", "patient_id")} for row in PATIENTS]
    by_index = torch.utils.data.Subset(rows, list(range(len(rows))))
    train, held_out = divide(by_index, chain, Split(0.3, by="patient_id"), 0, "a")
    assert len(train) + len(held_out) == len(rows)
    by_index.indices.pop()
    with pytest.raises(DataError, match="has changed since it was divided"):
        texts(train, chain)


FRAMES = {
    "a frame": lambda rows: pd.DataFrame(rows),
    "a data set by index": lambda rows: torch.utils.data.Subset(rows, list(range(len(rows)))),
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("split", [Split(0.4), Split(0.4, by="patient_id"), Split(0.4, time="date")], ids=str)
def test_a_table_in_memory_whose_rows_change_places_is_refused(kind, split, make_chain):
    """Turned round in place, it has as many rows as before: held-out ones would be trained on."""
    chain, dated = make_chain(), split.columns[0] if split.columns else "completion"
    rows = [{name: row[name] for name in dict.fromkeys(("text", "completion", dated))} for row in PATIENTS]
    source = FRAMES[kind](rows)
    train, held_out = divide(source, chain, split, 0, "a")
    assert not {*texts(train, chain)} & {*texts(held_out, chain)}
    if kind == "a frame":
        source[:] = source[::-1].to_numpy()
    else:
        source.indices.reverse()
    for side in (train, held_out):
        with pytest.raises(DataError, match=f"^the {type(source).__name__} has changed since it was divided"):
            texts(side, chain)


# --- where it is given ------------------------------------------------------------------------------------------------


def test_a_participant_may_split_as_it_says_itself(make_chain):
    frame, own = pd.DataFrame(PATIENTS), Split(0.4, by="patient_id")
    participants = [Participant("a", frame, own), Participant("b", frame), Participant("c", PAIRS, PAIRS[:2])]
    fed = FederatedAveraging(
        make_chain(), participants=participants,
        evaluation=Split(0.2, time="date"), progress=False, seed=3, lr=1e-3, samples=0,
    )  # fmt: skip
    chain = make_chain()
    found = {name: texts(client.participant.held_out, chain) for name, client in fed._peers.items() if name != "c"}
    assert found["a"] == [row["text"] for row in PATIENTS if hashed(row["patient_id"], seed=3) < 0.4]
    assert found["b"] == sides_of(frame, Split(0.2, time="date"), chain)[1]
    assert fed._peers["c"].participant.held_out == PAIRS[:2]
    alone = FederatedAveraging(make_chain(), participants=[Participant("a", frame, own)], progress=False, seed=3)
    assert texts(alone._peers["a"].participant.held_out, chain) == found["a"]
    site = Client(fed._server.target, Participant("a", frame, own), None)  # as a Site makes it, where no hub has a word
    assert texts(site.participant.held_out, chain) == [r["text"] for r in PATIENTS if hashed(r["patient_id"]) < 0.4]


def test_a_split_is_written_down_and_goes_on_from_a_checkpoint(tmp_path, make_chain):
    split = Split(0.3, by="patient_id", seed=2)
    config = FederationConfig(evaluation=split)
    assert FederationConfig(**json.loads(config.model_dump_json())) == config
    for wrong in ({"share": 2.0}, {"share": 0.5, "group": "a"}, {"by": 5}):
        with pytest.raises(ConfigError, match="Split"):
            FederationConfig(evaluation=wrong)
    frame = pd.DataFrame(PATIENTS)
    fed = FederatedAveraging(
        make_chain(), participants={"a": frame}, evaluation=split, checkpoint_dir=tmp_path, progress=False, lr=1e-3
    )
    fed.fit(rounds=1)
    again = FederatedAveraging.resume(tmp_path, make_chain(), participants={"a": frame}, progress=False)
    assert again.config.evaluation == split
    assert again.fit(rounds=1)[-1].held_out_before == fed.history[-1].held_out_after


def test_a_split_that_is_code_is_given_again(tmp_path, make_chain):
    split = Split(0.3, by=lambda row: row["patient_id"])
    options = {"participants": {"a": pd.DataFrame(PATIENTS)}, "progress": False}
    fed = FederatedAveraging(make_chain(), evaluation=split, checkpoint_dir=tmp_path, lr=1e-3, **options)
    fed.fit(rounds=1)
    with pytest.raises(CheckpointError, match=r"evaluation was code: Split\(by=.*Pass evaluation= again"):
        FederatedAveraging.resume(tmp_path, make_chain(), **options)
    assert FederatedAveraging.resume(tmp_path, make_chain(), evaluation=split, **options).round == 1
