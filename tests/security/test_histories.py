"""A history that is read back: records of their types and ranges, or one error that says where it is odd."""

import json
import math

import pytest
from bounded import bounded, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import History, untrusted
from llmchain_fed.errors import CheckpointError, ConfigError
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord, Sample
from llmchain_fed.federated.reporting.page import page


def honest():
    people = {
        "a": ParticipantRecord(
            "trained", None, 1.5, 2.5, 2.25, 6, 40, 2, 0.5, 0.25, 1.0000001, 10, 20, 30, notes=["a note"]
        ),
        "b/é\n": ParticipantRecord("late", "DeadlineError: no answer"),
        "c": ParticipantRecord("idle"),
    }
    sample = Sample("a", "page locked", "page verrouillée", "?", None)
    first = RoundRecord(
        1, people, 2.5, 2.25, {"f1": 0.5}, {"f1": 0.25}, 0.1, 0.01, 3.0, 1.0, 1.5, "2-abc", [sample], ["diverges"]
    )
    history = History([first, RoundRecord(2, {"a": ParticipantRecord()}, members_changed=True)])
    history.stopped_early = "held-out loss did not improve"
    model = {"name": "tiny", "kind": "causal", "parameters": 10, "trained": 5, "tensors": 2, "adapter": None}
    history.about = {
        "began": "2026-11-28T08:06:40+00:00",
        "ended": "2026-11-28T08:27:02+00:00",
        "versions": {"torch": "2.10"},
        "model": model | {"fingerprint": "abc", "device": "cpu"},
        "options": {"seed": 0, "codec": "int8", "training.shuffle": True, "lr": 0.1},
        "shares": "all",
        "simulated": True,
        "data": {"a": {"used": 6, "empty": 1, "held_out": 2}},
    }
    return history


def read(data, seconds=2.0):
    """A history, or None for a refusal that can be shown."""
    said = ""
    try:
        with within(seconds):
            return History.from_dict(data)
    except ConfigError as error:
        said = str(error)
    assert said
    assert len(said) < 1000
    assert untrusted.printable(said) == said
    return None


def test_what_was_written_comes_back():
    history = honest()
    assert History.from_dict(json.loads(history.to_json())).to_json() == history.to_json()
    assert History.from_dict(history.to_dict()).to_dict() == history.to_dict()
    history[0].participants["a"].train_loss = math.nan  # was not measured, as in JSON
    assert History.from_dict(history.to_dict())[0].participants["a"].train_loss is None
    short = {"rounds": [{"round": 1, "participants": {"a": {"status": "idle"}}}]}
    assert History.from_dict(short)[0] == RoundRecord(1, {"a": ParticipantRecord("idle")})


DEEP = []
for _ in range(100_000):
    DEEP = [DEEP]
ODD = [
    None,
    True,
    -1,
    10**400,
    -(10**5000),
    math.inf,
    -math.inf,
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"x": 1},
    DEEP,
    object(),
    b"x",
]


def paths(found, here=()):
    if here:
        yield here
    entries = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in entries:
        yield from paths(value, (*here, key))


@bounded(seconds=60, megabytes=400)
def test_every_value_of_every_other_kind():
    for place in paths(honest().to_dict()):
        for value in ODD:
            made = honest().to_dict()
            inside = made
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
            found = read(made)
            if found is not None:
                repr(found), found._repr_html_(), found.to_json().encode()
                if len(found):
                    page(found, title=None, comparison=None, samples=True).encode()
        del inside[place[-1]]
        read(made)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data["rounds"][0].update(round=-1), "`round`"),
        (lambda data: data["rounds"][1].update(extra=1), "`extra`"),
        (lambda data: data["rounds"][0].update(seconds=-1.0), "`seconds`"),
        (lambda data: data["rounds"][0]["participants"]["a"].update(status="odd"), "participants.a"),
        (lambda data: data["rounds"][0]["participants"]["a"].update(bytes_up=2**63), "`bytes_up`"),
        (lambda data: data["rounds"][0]["participants"]["a"].update(examples=True), "`examples`"),
        (lambda data: data["rounds"][0]["participants"]["a"].update(notes=["x", 1]), "`notes.1`"),
        (lambda data: data["rounds"][0]["samples"][0].pop("prompt"), "`samples.0.prompt`"),
        (lambda data: data.update(stopped_early=1), "`stopped_early`"),
        (lambda data: data["about"].update(note="x"), "`about.note`"),
        (lambda data: data["about"]["data"]["a"].update(used=-1), "`about.data.a.used`"),
        (lambda data: data.pop("rounds"), "`rounds`"),
    ],
    ids=range(12),
)
def test_what_is_odd_is_named(change, why):
    data = honest().to_dict()
    change(data)
    with pytest.raises(ConfigError) as error:
        History.from_dict(data)
    assert why in str(error.value)
    with pytest.raises(CheckpointError, match=r"^the file.* Copy it again\."):
        History.from_dict(data, what="the file", error=CheckpointError, remedy="Copy it again.")


def test_text_that_commands_a_terminal_is_spelled_out():
    data = honest().to_dict()
    data["rounds"][0]["samples"][0]["before"] = "\x1b[2J\ud800 日本語"
    data["rounds"][0]["notes"] = ["\x1b]0;title\x07"]
    found = History.from_dict(data)
    assert found[0].samples[0].before == "\\x1b[2J\\ud800 日本語"
    assert found[0].notes == ["\\x1b]0;title\\x07"]
    found.to_json().encode()


@bounded(seconds=60, megabytes=900)
def test_large_ones_are_read_or_refused_in_time():
    few = {"round": 1, "participants": {}}
    assert len(read({"rounds": [few] * 50_000}, 20.0)) == 50_000
    assert read({"rounds": [{"round": 1}] * 50_000}) is None
    assert read({"rounds": [few | {"participants": {str(n): 0 for n in range(50_000)}}]}, 5.0) is None
    assert read({"rounds": [few | {"notes": [0] * 150_000}]}, 5.0) is None
    assert read({"rounds": [few | {"samples": [0] * 150_000}]}, 5.0) is None
    assert read({"rounds": [few | {str(n): 0 for n in range(150_000)}]}, 5.0) is None
    assert read({str(n): 0 for n in range(150_000)}, 5.0) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@bounded(seconds=60, megabytes=400)
def test_any_data_is_a_history_or_one_error():
    names = [*honest().to_dict()["rounds"][0], *ParticipantRecord("idle").__dataclass_fields__]

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(names), json_values, max_size=4), json_values, st.booleans())
    def check(fields, value, within_a_round):
        data = honest().to_dict()
        target = data["rounds"][0] if within_a_round else data["rounds"][0]["participants"]["a"]
        target |= fields
        for each in (data, value, {"rounds": value}, {"rounds": [value]}):
            found = read(each)
            if found is not None:
                repr(found), found.to_json().encode()

    check()
