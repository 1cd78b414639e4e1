"""Attendance: who is out and why is told once, at once, and once again when it takes part anew; records keep the cause.

Belongs here: what is told, to whom and when, with scripted answers. Does not: who is asked how often (test_dispatch),
the status file and command (test_status), real sites (test_attendance_federation).
"""

import io
import re

import pytest
import torch
from other_work import does
from scripted import BROKEN, CUT, REFUSED, SHARES, TRAINING, federation, statuses
from tiny import PAIRS

from llmchain_fed import (
    Callback,
    ConsoleTable,
    ContractError,
    DeadlineError,
    FederatedAveraging,
    Participant,
    ParticipantError,
    QuorumError,
    TransportError,
)
from llmchain_fed.cli.console import say
from llmchain_fed.federated.reporting import lines
from llmchain_fed.federated.server import dispatch
from llmchain_fed.federated.server.attendance import Attendance, AttendanceChange

MISMATCH = ContractError("another contract (base weights: 1e1c… at b, 8057… at the hub)")
FROZEN = TransportError("its peer has been silent for 30 s")
NOT_CONNECTED = TransportError("it is not connected to the hub")
LATE = DeadlineError("'b' was not done by the deadline")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "_PAUSE", 0.01)


class Watch(Callback):
    """What was told, in order."""

    def __init__(self):
        self.told = []

    def on_attendance(self, change):
        if change.was != "expected" or change.state != "in":
            self.told.append(f"{change.name} {change.state}")

    def on_round_begin(self, number, asked):
        self.told.append((number, asked))

    def on_round_end(self, record, history):
        self.told.append(record.round)

    @property
    def changes(self):
        return [entry for entry in self.told if isinstance(entry, str)]


def watched(make_chain, scripts, **options):
    watch = Watch()
    fed, transport = federation(make_chain, scripts, callbacks=[watch], **options)
    return fed, transport, watch


# --- at once --------------------------------------------------------------------------------------------------------


def test_a_mismatch_at_the_greeting_is_told_before_round_1_begins(make_chain, capfd):
    fed, _, watch = watched(make_chain, {"hello": {"b": [MISMATCH] * 3}}, progress=True)
    fed.fit(2)
    assert watch.told[:2] == ["b out", (1, ("a", "c"))]
    said = capfd.readouterr().err.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in said), said
    reason = "refused: another contract (base weights: 1e1c… at b, 8057… at the hub)"
    assert said[0].endswith(f" b is out: {reason}")
    (beginning,) = (line for line in said if " in: " in line)
    assert beginning.endswith(f" in: a, c; out: b ({reason})")
    assert " round 1 of 2 · 2 of 3 trained · train loss " in said[said.index(beginning) + 1]
    assert sum("b is out" in line for line in said) == 1
    assert fed.attendance.never == {"b": f"ContractError: {MISMATCH}"}


def test_who_goes_out_in_a_round_is_told_before_the_others_are_done(make_chain):
    fed, transport, watch = watched(make_chain, {"train": {"a": [CUT]}})
    inner, seen = transport.local["c"].handle, []

    def handle(op, payload):
        seen.append((op, list(watch.told), dict(fed.attendance.absent), fed.attendance.waiting_for))
        return inner(op, payload)

    transport.local["c"].handle = handle
    fed.fit(1)
    assert seen[-1] == ("train", [(1, ("a", "b", "c")), "a out"], {"a": f"TransportError: {CUT}"}, {"c": "train"})
    assert fed.attendance.waiting_for == {}


def test_a_peer_that_is_back_takes_part_in_the_next_round_with_its_line(make_chain, capfd):
    fed, _, watch = watched(make_chain, {"hello": {"b": [MISMATCH]}, "train": {"a": [None, CUT]}}, progress=True)
    fed.fit(3)
    assert statuses(fed) == [
        {"a": "trained", "c": "trained", "b": "absent"},
        {"a": "absent", "b": "trained", "c": "trained"},
        {"a": "trained", "b": "trained", "c": "trained"},
    ]
    assert watch.changes == ["b out", "b in", "a out", "a in"]
    said = capfd.readouterr().err
    assert re.search(r" b is back after \d+ s\n.* round 2 of 3 ", said, re.DOTALL)
    assert re.search(r" a is out: the cable is out\n.* a is back after \d+ s\n", said, re.DOTALL)
    assert fed.attendance.absent == fed.attendance.never == {}


def test_one_that_was_lost_while_it_evaluated_is_told_at_once_and_greeted_anew(make_chain):
    """It may have restarted: without a greeting its next training would fail."""
    scripts = {"evaluate": {"b": [None, CUT]}}
    fed, transport, watch = watched(make_chain, scripts, held_out=PAIRS[:2])
    fed.fit(1)
    assert watch.told == [(1, ("a", "b", "c")), "b out", 1]
    fed.fit(1)
    assert watch.told[3:] == ["b in", (2, ("a", "b", "c")), 2]
    assert transport.asked.count(("hello", "b")) == 2
    assert transport.asked.count(("hello", "a")) == 1
    assert statuses(fed)[1]["b"] == "trained"


# --- once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [REFUSED, BROKEN, ParticipantError("ContractError: another"), ValueError("its own")])
def test_one_whose_trainings_fail_is_told_when_that_begins_and_when_it_ends(error, make_chain):
    fed, _, watch = watched(make_chain, {"train": {"b": [None, *[error] * 3]}})
    fed.fit(5)
    assert [s["b"] for s in statuses(fed)] == ["trained", "failed", "failed", "failed", "trained"]
    assert watch.changes == ["b out", "b in"]
    assert watch.told.index("b in") > watch.told.index((5, ("a", "b", "c"))), "a greeting alone proves nothing"


def test_one_that_is_lost_in_every_training_is_not_told_of_in_every_round(make_chain):
    """Its peer is started again each time: it can be greeted, and dies of what it is asked for."""
    fed, _, watch = watched(make_chain, {"train": {"b": [CUT] * 6}})
    fed.fit(7)
    assert [s["b"] for s in statuses(fed)] == ["absent"] * 6 + ["trained"]
    assert watch.changes == ["b out", "b in", "b out", "b in"]


def test_an_update_that_is_refused_is_an_absence_too(make_chain, monkeypatch):
    fed, transport, watch = watched(make_chain, {})
    inner, broken = transport.local["b"].handle, [True, True]

    def handle(op, payload):
        return b"junk" if op == "train" and broken and broken.pop() else inner(op, payload)

    monkeypatch.setattr(transport.local["b"], "handle", handle)
    fed.fit(3)
    assert [s["b"] for s in statuses(fed)] == ["refused", "refused", "trained"]
    assert watch.changes == ["b out", "b in"]


def test_one_that_is_late_is_told_once_is_not_out_and_is_asked_in_the_next_round(make_chain, capfd):
    fed, transport, watch = watched(make_chain, {"train": {"b": [None, LATE, LATE]}}, deadline=60, progress=True)
    fed.fit(3)
    assert fed.attendance.standings["b"].state == "late"
    assert fed.attendance.absent == {}
    assert fed.attendance.never == {}, "it trained in round 1"
    fed.fit(1)
    assert [s["b"] for s in statuses(fed)] == ["trained", "late", "late", "trained"]
    assert watch.changes == ["b late", "b in"]
    assert transport.asked.count(("hello", "b")) == 1
    said = capfd.readouterr().err
    assert said.count(" b is late: 'b' was not done by the deadline\n") == 1
    assert re.search(r" b is in time again after \d+ s\n", said)


def test_a_reason_of_another_kind_is_told_but_no_more_than_a_few(make_chain):
    fed, _, watch = watched(make_chain, {"hello": {"b": [CUT, NOT_CONNECTED, MISMATCH, MISMATCH, CUT, LATE]}})
    fed.fit(7)
    assert watch.changes == ["b out", "b out", "b in"], "out of reach, then there with another model, then in"
    fed, _, watch = watched(make_chain, {"hello": {"b": [MISMATCH, CUT]}})
    fed.fit(3)
    assert watch.changes == ["b out", "b in"], "its peer is started with the right model"
    attendance = Attendance()
    told = []
    attendance.listen(told.append)
    for number in range(100):
        attendance.out("x", ParticipantError(f"always {number}"))
        attendance.out("x", ParticipantError("something new: " + "x" * number))
    assert len(told) < 10
    assert attendance.standings["x"].latest.endswith("x" * 99)


# --- the first reason -----------------------------------------------------------------------------------------------


def test_records_of_an_absence_begin_with_its_first_reason(make_chain):
    scripts = {"train": {"b": [FROZEN]}, "hello": {"b": [None, NOT_CONNECTED, NOT_CONNECTED, NOT_CONNECTED, MISMATCH]}}
    fed, _, _ = watched(make_chain, scripts, retries=1)
    fed.fit(5)
    reasons = [record.participants["b"].reason for record in fed.history]
    first = f"TransportError: {FROZEN}"
    assert reasons == [first, first, first, f"{first}; then ContractError: {MISMATCH}", None]
    standing = fed.attendance.standings["b"]
    assert (standing.state, standing.reason, standing.error, standing.took_part) == ("in", None, None, True)


def test_another_cause_stands_behind_the_first(make_chain):
    fed, _, _ = watched(make_chain, {"train": {"b": [FROZEN]}, "hello": {"b": [None, MISMATCH]}}, retries=0)
    fed.fit(2)
    assert fed.history[0].participants["b"].reason == f"TransportError: {FROZEN}"
    assert fed.history[1].participants["b"].reason == f"TransportError: {FROZEN}; then ContractError: {MISMATCH}"


def test_a_quorum_that_is_missed_lists_the_first_reasons(make_chain):
    fed, _, _ = watched(make_chain, {"hello": {"b": [FROZEN, NOT_CONNECTED]}}, retries=1, quorum=3)
    with pytest.raises(QuorumError, match=r"b: its peer has been silent for 30 s"):
        fed.fit(1)


# --- who never took part --------------------------------------------------------------------------------------------


def test_never_are_those_of_whom_no_update_was_used(make_chain):
    scripts = {"train": {"a": [REFUSED] * 2}, "hello": {"b": [CUT] * 2}}
    fed, _, _ = watched(make_chain, scripts)
    fed.fit(2)
    assert fed.attendance.never.keys() == {"a", "b"}
    idle, _, _ = watched(make_chain, {}, participants_per_round=1)
    idle.fit(1)
    assert idle.attendance.never == {}, "who was not asked did not refuse"


def test_who_took_part_before_a_resume_is_none_of_them(make_chain, tmp_path):
    chain = make_chain(lora=True)
    options = {"training": TRAINING, "progress": False}
    FederatedAveraging(chain, participants=SHARES, checkpoint_dir=tmp_path / "run", **options).fit(1)
    fed = FederatedAveraging.resume(tmp_path / "run", chain, participants=SHARES, progress=False)
    assert all(fed.attendance.standings[name].took_part for name in SHARES)


# --- who is told ----------------------------------------------------------------------------------------------------


def test_nobody_out_leaves_weights_and_records_as_they_were(make_chain):
    """The same federation with everything that watches, and with nothing."""
    chains = make_chain(lora=True), make_chain(lora=True)
    options = {"training": TRAINING, "evaluation": {"a": PAIRS[:2]}}
    FederatedAveraging(chains[0], participants=SHARES, progress=False, **options).fit(2)
    fed = FederatedAveraging(chains[1], participants=SHARES, progress=True, callbacks=[Watch()], **options)
    for _ in range(2):
        fed.fit(1, of=2)
    ours, theirs = (chain.model.trainable_state() for chain in chains)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(record.reason is None for r in fed.history for record in r.participants.values())


def test_rounds_are_counted_over_fits(make_chain, capfd):
    fed, _, watch = watched(make_chain, {}, progress=True)
    for _ in range(2):
        fed.fit(1, of=3)
    said = capfd.readouterr().err
    assert re.findall(r"round \d of \d", said) == ["round 1 of 3", "round 2 of 3"]
    assert said.count(" in: a, b, c\n") == 1
    assert watch.told == [(1, ("a", "b", "c")), 1, (2, ("a", "b", "c")), 2]


def test_on_a_terminal_the_bar_counts_on_and_lines_stand_above_it(make_chain, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    fed, _, _ = watched(make_chain, {"hello": {"b": [CUT]}}, progress=True)
    for _ in range(2):
        fed.fit(1, of=2)
    shown = screen.getvalue()
    assert "1/2" in shown
    assert "2/2" in shown
    assert "0/1" not in shown
    assert re.search(r"(^|[\r\n])\d{4}-\d\d-\d\d \d\d:\d\d:\d\d b is out: the cable is out\n", shown)
    assert "training: a" in shown, "who is waited for"


def test_without_progress_nothing_is_written_and_a_table_prints_lines_of_changes(make_chain, capfd):
    text = io.StringIO()
    fed, _ = federation(make_chain, {"hello": {"b": [CUT]}}, callbacks=[ConsoleTable(text)])
    fed.fit(2)
    assert capfd.readouterr() == ("", "")
    assert re.search(r"\n\d{4}-\d\d-\d\d \d\d:\d\d:\d\d b is out: the cable is out\n", text.getvalue())
    assert re.search(r" b is back after \d+ s\nround 2 ", text.getvalue())


def test_what_a_callback_raises_ends_the_fit_and_costs_no_round(make_chain):
    class Fails(Callback):
        def on_attendance(self, change):
            if change.state == "out":
                raise OSError("no disk")

        def on_error(self, error):
            heard.append(error)

    heard = []
    fed, _ = federation(make_chain, {"train": {"b": [None, CUT]}}, callbacks=[Fails()])
    with pytest.raises(OSError, match="no disk"):
        fed.fit(2)
    assert len(heard) == 1
    assert fed.round == 1
    assert fed.attendance.waiting_for == {}
    fed._callbacks._all = ()
    fed.fit(1)
    assert statuses(fed)[-1]["b"] == "trained"


# --- words ----------------------------------------------------------------------------------------------------------


def test_what_comes_from_elsewhere_writes_no_further_lines(capfd):
    change = AttendanceChange("a\nb", "out", 0.0, "TransportError: lost\n\x1b[2J2026-01-01 00:00:00 c is back")
    say(lines.change_of(change))
    (line,) = capfd.readouterr().err.splitlines()
    assert "a\\nb is out: lost\\n\\x1b[2J" in line


def test_a_change_has_its_times():
    now = [100.0]
    attendance = Attendance(lambda: now[0])
    told = []
    attendance.listen(told.append)
    attendance.expect(["a"])
    attendance.out("a", CUT)
    now[0] = 163.0
    attendance.came("a")
    assert told[-1] == AttendanceChange("a", "in", 163.0, after=63.0, was="out")
    assert lines.change_of(told[-1]) == "a is back after 63 s"


def test_a_participant_of_this_process_that_fails_is_told_of_with_its_own_error(make_chain, monkeypatch):
    watch = Watch()
    people = [Participant(name, pairs) for name, pairs in SHARES.items()]
    fed = FederatedAveraging(
        make_chain(lora=True), participants=people, training=TRAINING, progress=False, callbacks=[watch]
    )
    with monkeypatch.context() as patch:
        does(patch, fed._peers["b"], lambda *_: 1 / 0)
        fed.fit(2)
    fed.fit(1)
    assert watch.changes == ["b out", "b in"]
    assert fed.history[1].participants["b"].reason == "ZeroDivisionError: division by zero"
