"""Hellos of strangers: each is read, or makes its sender absent; nobody else notices.

Belongs here: what a participant says when it joins. Does not: updates, later answers (test_updates, test_answers).
"""

import json

import pytest
import torch
from bounded import bounded, within
from corpus import answers
from corpus.updates import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liars import federation

from llmchain_fed import untrusted
from llmchain_fed.data.report import DataReport
from llmchain_fed.errors import ParticipantError
from llmchain_fed.federated.client.data import Overlap
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.server.client_manager import ABSENCE

CONTRACT = {"base": "b" * 64, "adapter": "a" * 64, "prompt": "p", "tokenizer": "t", "version": "1"}
HONEST = {
    "participant": "p", "contract": CONTRACT, "held_out": True, "weights_hash": "h" * 16, "rank": 2, "alpha": 4,
    "options": "o" * 16, "num_examples": 5, "num_tokens": 40,
    "report": {"used": 5, "completion_tokens": 40, "empty": 1},
    "held_out_examples": 2, "held_out_tokens": 9, "overlap": [0, 1, 2],
    "held_out_report": {"used": 2, "completion_tokens": 9, "too_long": 3},
}  # fmt: skip


def read(data):
    """The hello, or None for a refusal that is short and can be shown."""
    refused = ""
    with within(2):
        try:
            with untrusted.decoding("it", ParticipantError):
                found = messages.read_introduction(data, "p", CONTRACT)
        except ABSENCE as error:
            refused = str(error)
    if refused:
        assert len(refused) < 1000
        assert untrusted.printable(refused) == refused
        return None
    assert isinstance(found, Introduction)
    assert type(found.held_out) is bool
    for count in (found.num_examples, found.num_tokens, found.held_out_tokens):
        assert count is None or (type(count) is int and 1 <= count <= 10**9)
    assert found.rank is None or 1 <= found.rank <= 2**16
    assert found.alpha is None or (found.rank and 1e-3 <= found.alpha <= 2**16)
    assert found.data_report is None or (found.data_report.used, found.data_report.completion_tokens) == (
        found.num_examples, found.num_tokens,
    )  # fmt: skip
    return found


def test_an_honest_hello_is_read():
    found = read(json.dumps(HONEST).encode())
    assert found.model_dump() == HONEST
    assert found.data_report == DataReport(used=5, empty=1, completion_tokens=40)
    assert found.overlapping == Overlap(0, 1, 2)
    assert found.held_out_notes == ["3 of 5 held-out examples are left out: 3 too long"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alpha": 5e-324}, "`alpha`: Input should be greater than or equal to 0.001"),
        ({"alpha": 1e300}, "`alpha`: Input should be less than or equal to 65536"),
        ({"alpha": True}, "`alpha`"),
        ({"rank": 0}, "`rank`"),
        ({"rank": 2**40}, "`rank`"),
        ({"rank": None}, "an alpha without a rank"),
        ({"num_examples": 10**9}, "num_examples is 1000000000, its data report supports 5"),
        ({"num_tokens": 41}, "num_tokens is 41, its data report supports 40"),
        ({"num_examples": 10**10}, "`num_examples`: Input should be less than or equal to 1000000000"),
        ({"num_examples": 50, "report": None}, "fewer completion tokens (40) than examples (50)"),
        ({"held_out_tokens": 10**12}, "`held_out_tokens`"),
        ({"held_out": False}, "counts held-out examples and says that it has none"),
        ({"held_out": 1}, "`held_out`"),
        ({"report": {"used": 5, "completion_tokens": 40, "\x1b[2J": 1}}, "its report counts"),
        ({"report": {"used": -5}}, "`report.used`"),
        (
            {"held_out_report": {"used": 3, "completion_tokens": 9}},
            "held_out_examples is 2, its data report",
        ),
        ({"held_out_report": {"text": 1}}, "its report counts 'text'"),
        ({"overlap": [3, 3, 3]}, "its overlap is [3, 3, 3]"),
        ({"participant": "\x1b[2J" * 50}, "calls itself"),
        ({"contract": {"base": "\x1b[2J" * 999}}, "another contract ("),
        ({"contract": "\ud800"}, "another contract ("),
        ({"contract": CONTRACT | {"more": "x"}, "weights_hash": 5}, "`weights_hash`"),
    ],
    ids=range(22),
)
def test_what_a_participant_may_not_say(changes, why):
    with pytest.raises(ABSENCE) as error:
        messages.read_introduction(answers.said(HONEST, **changes), "p", CONTRACT)
    assert why in str(error.value)
    assert len(str(error.value)) < 600
    assert untrusted.printable(str(error.value)) == str(error.value)


@bounded(seconds=60, megabytes=400)
def test_any_hello_is_one_or_makes_its_sender_absent():
    for data in answers.varied(HONEST).values():
        read(data)

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.dictionaries(st.sampled_from([*HONEST, "more"]), st.sampled_from(HOSTILE), max_size=4).map(
                lambda changes: answers.said(HONEST, **changes)
            ),
            st.dictionaries(st.sampled_from(["used", "empty", "\x07"]), st.sampled_from(HOSTILE)).map(
                lambda report: answers.said(HONEST, report=report)
            ),
            st.binary(max_size=200),
            st.integers(0, 500).map(lambda n: json.dumps(HONEST).encode()[:n]),
        )
    )
    def check(data):
        read(data)

    check()


HELLOS = {
    "half": lambda honest: honest[: len(honest) // 2],
    "a list": lambda honest: b"[1]",
    "deep": lambda honest: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": lambda honest: b'{"num_examples":' + b"9" * 4300 + b"}",
    "alpha": lambda honest: answers.said(json.loads(honest), rank=2, alpha=5e-324),
    "rank": lambda honest: answers.said(json.loads(honest), rank=2**16, alpha=1),
    "examples": lambda honest: answers.said(json.loads(honest), num_examples=10**9),
    "held out": lambda honest: answers.said(json.loads(honest), held_out_tokens=[]),
    "name": lambda honest: answers.said(json.loads(honest), participant="\ud800"),
    "contract": lambda honest: answers.said(json.loads(honest), contract={"base": ["\x1b[2J"]}),
    "nothing": lambda honest: b"",
}


@pytest.mark.parametrize("rule", ["fedit", "flora"])
def test_who_cannot_say_hello_is_absent_and_the_others_train_as_without(rule, make_chain, tmp_path):
    alone = federation(make_chain(lora=True), without=("liar",), aggregation=rule)
    alone.fit(1)
    wanted = alone.get_model().model.trainable_state()
    for name, lie in HELLOS.items() if rule == "flora" else list(HELLOS.items())[:4]:
        fed = federation(make_chain(lora=True), {"hello": lie}, aggregation=rule)
        with within(30):
            history = fed.fit(1)
        record = history[0].participants["liar"]
        assert record.status == "absent", name
        assert len(record.reason) < 600
        assert untrusted.printable(record.reason) == record.reason
        history.save(tmp_path / "history.json")
        found = fed.get_model().model.trainable_state()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), name
