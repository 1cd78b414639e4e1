"""Updates as bytes: bit-exact there and back, and every way an update can be wrong is refused by name and reason.

Belongs here: wire and update. Does not: what a round makes of a refusal (test_invariants).
"""

import json
import math
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save

from llmchain_fed.errors import UpdateRefusedError
from llmchain_fed.updates import serialization
from llmchain_fed.updates.update import Expected, Update

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3) / 7, "b": torch.tensor([-0.0, 1e-40, 3.4e38])}
GOOD = {
    "kind": "update", "participant": "p", "round": 3, "base": "beef", "num_examples": 5, "num_tokens": 40,
    "metrics": {"train_loss": 2.5, "steps": 4},
}  # fmt: skip


def expected(state=STATE, **changes):
    return Expected(
        **({"participant": "p", "round": 3, "base": "beef", "layout": serialization.describe(state)} | changes)
    )


def update(tensors=STATE, **changes):
    fields = {k: v for k, v in GOOD.items() if k != "kind"}
    return Update(tensors=tensors, **(fields | changes))


def packed(tensors=STATE, **header):
    """Bytes of anybody's making: safetensors with the header key that the receiver reads."""
    return save(tensors, metadata={"llmchain_fed": json.dumps(GOOD | header)})


def raw(header, body=b""):
    """A safetensors file from its two parts; `header` is JSON text or what becomes it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def assert_refused(data, reason, **changes):
    with pytest.raises(UpdateRefusedError, match=reason) as caught:
        Update.from_bytes(data, expected(**changes))
    assert len(str(caught.value)) < 600  # a log line, not a stranger's megabyte


# --- what is right ---------------------------------------------------------------------------------------------------


def test_there_and_back_every_bit_is_the_same():
    sent = update()
    got = Update.from_bytes(sent.to_bytes(), expected())
    assert got.tensors.keys() == STATE.keys()
    assert all(same_bits(got.tensors[n], STATE[n]) for n in STATE)
    assert (got.participant, got.round, got.base, got.num_examples, got.num_tokens) == ("p", 3, "beef", 5, 40)
    assert got.metrics == {"train_loss": 2.5, "steps": 4.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_travels(dtype):
    state = {
        "w": torch.randn(3, 4).to(dtype),
        "empty": torch.zeros(0, 2, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    got = Update.from_bytes(update(state).to_bytes(), expected(state))
    assert all(got.tensors[n].dtype == dtype and torch.equal(got.tensors[n], state[n]) for n in state)


def test_the_bytes_share_nothing_with_the_sender():
    state = {n: t.clone() for n, t in STATE.items()}
    data = update(state).to_bytes()
    state["b"].zero_()
    got = Update.from_bytes(data, expected())
    assert same_bits(got.tensors["b"], STATE["b"])
    got.tensors["b"].zero_()
    assert same_bits(Update.from_bytes(data, expected()).tensors["b"], STATE["b"])


def test_many_types_and_sizes_travel_together():
    types = [torch.float64, torch.bfloat16, torch.float32, torch.float16]
    state = {f"w{i}": torch.randn(1 + i % 5).to(types[i % 4]) for i in range(40)}
    got = Update.from_bytes(update(state).to_bytes(), expected(state))
    assert got.tensors.keys() == state.keys()
    assert all(torch.equal(got.tensors[n], state[n]) and got.tensors[n].dtype == state[n].dtype for n in state)


def test_values_whose_sum_overflows_are_still_finite():
    state = {"w": torch.full((4,), 3e38)}
    assert torch.equal(Update.from_bytes(update(state).to_bytes(), expected(state)).tensors["w"], state["w"])


def test_the_count_a_participant_joined_with_is_the_count_that_counts():
    Update.from_bytes(packed(), expected(num_examples=5))
    assert_refused(packed(num_examples=6), "num_examples is 6, but the participant joined with 5", num_examples=5)


# --- each refusal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 5])
def test_values_that_are_not_finite(value, at):
    state = {n: t.clone() for n, t in STATE.items()}
    state["a.weight"].view(-1)[at] = value
    assert_refused(packed(state), "a.weight contains NaN or infinite values")


def test_infinities_that_cancel_are_seen():
    state = {"w": torch.tensor([float("inf"), -float("inf"), 1.0])}
    with pytest.raises(UpdateRefusedError, match="w contains NaN"):
        Update.from_bytes(packed(state), expected(state))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.weight": STATE["a.weight"].reshape(3, 2), "b": STATE["b"]}, r"a.weight is torch.float32 \(3, 2\)"),
        ({"a.weight": STATE["a.weight"][:1].clone(), "b": STATE["b"]}, r"\(1, 3\), asked for was .*\(2, 3\)"),
        ({"a.weight": torch.ones(1), "b": STATE["b"]}, "a.weight"),
        ({"a.weight": STATE["a.weight"].double(), "b": STATE["b"]}, "torch.float64"),
        ({"a.weight": STATE["a.weight"].half(), "b": STATE["b"]}, "torch.float16"),
        ({"b": STATE["b"]}, r"lacks 1 tensors \['a.weight'\]"),
        ({**STATE, "c": torch.ones(1)}, r"adds 1 \['c'\]"),
        ({**STATE, "c" * 100_000: torch.ones(1)}, "bytes arrived"),
        ({"A.weight": STATE["a.weight"], "b": STATE["b"]}, r"lacks 1 .*adds 1 \['A.weight'\]"),
        ({}, "lacks 2"),
    ],
)
def test_tensors_that_are_not_those_sent_out(tensors, reason):
    assert_refused(packed(tensors), reason)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8])
def test_tensors_that_are_no_floats(dtype):
    # int8 and uint8 are what codecs make: of those, type and layout are what was not asked for
    reason = "asked for was" if dtype in (torch.int8, torch.uint8) else "header is not one of ours"
    assert_refused(packed({"a.weight": torch.ones(2, 3, dtype=dtype), "b": STATE["b"]}), reason)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"kind": "task"}, "kind is 'task'"),
        ({"participant": "q"}, "participant is 'q', asked for was 'p'"),
        ({"participant": None}, "participant is None"),
        ({"round": 2}, "round is 2, asked for was 3"),
        ({"round": 4}, "round is 4"),
        ({"round": 3.0}, r"round is 3\.0"),
        ({"round": "3"}, "round is '3'"),
        ({"base": "dead"}, "base is 'dead'"),
        ({"num_examples": 0}, "`num_examples`: Input should be greater"),
        ({"num_examples": -5}, "`num_examples`: Input should be"),
        ({"num_examples": 10**12}, "`num_examples`: Input should be"),
        ({"num_examples": True}, "`num_examples`: Input should be"),
        ({"num_examples": "5"}, "`num_examples`: Input should be"),
        ({"num_examples": 5.0}, "`num_examples`: Input should be"),
        ({"num_examples": None}, "`num_examples`: Input should be"),
        ({"num_examples": [5]}, "`num_examples`: Input should be"),
        ({"num_tokens": 0}, "`num_tokens`: Input should be"),
        ({"num_tokens": 10**12}, "`num_tokens`: Input should be"),
        ({"num_tokens": False}, "`num_tokens`: Input should be"),
        ({"metrics": {"train_loss": "low"}}, "metrics"),
        ({"metrics": {"train_loss": True}}, "metrics"),
        ({"metrics": {"train_loss": None}}, "metrics"),
        ({"metrics": {"steps": 10**14}}, "`metrics.steps`"),
        ({"metrics": {"steps": 10**400}}, "bytes arrived"),
        ({"metrics": {"steps": 1.5}}, "metrics.steps"),
        ({"metrics": {"accuracy": 0.5}}, "metrics.accuracy"),
        ({"metrics": {"seconds": -1.0}}, "metrics.seconds"),
        ({"metrics": {"train_loss": -1e308}}, "metrics.train_loss"),
        ({"more": 1}, "`more`: Extra inputs"),
        ({"metrics": [1.0]}, "metrics"),
        ({"metrics": None}, "metrics"),
        ({"participant": "q" * 100_000}, "bytes arrived"),
        ({"num_examples": "5" * 100_000}, "bytes arrived"),
    ],
)
def test_headers_that_are_not_what_was_asked_for(header, reason):
    assert_refused(packed(**header), reason)


@pytest.mark.parametrize("missing", ["kind", "participant", "round", "base", "num_examples", "num_tokens", "metrics"])
def test_headers_that_lack_something(missing):
    header = {k: v for k, v in GOOD.items() if k != missing}
    assert_refused(save(STATE, metadata={"llmchain_fed": json.dumps(header)}), missing)


def test_a_round_of_one_is_not_true():
    """True == 1 in Python; a round is a number."""
    with pytest.raises(UpdateRefusedError, match="round is True"):
        Update.from_bytes(packed(round=True), expected(round=1))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_metrics_that_are_no_json(number):
    text = json.dumps(GOOD).replace("2.5", number)
    assert_refused(save(STATE, metadata={"llmchain_fed": text}), "header of the message is no JSON of ours")


def test_metrics_too_large_for_a_float():
    text = json.dumps(GOOD).replace("2.5", "1e999")
    assert_refused(save(STATE, metadata={"llmchain_fed": text}), "metrics")


def test_a_sender_never_writes_metrics_that_are_not_finite():
    with pytest.raises(ValueError, match="JSON"):
        update(metrics={"train_loss": math.nan}).to_bytes()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickled_bytes():
    for protocol in (0, 2, 5):
        assert_refused(pickle.dumps(Bomb(), protocol=protocol), "not safetensors")
        assert_refused(pickle.dumps(STATE, protocol=protocol), "not safetensors|not one of ours")


def test_a_file_of_torch_save(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    assert_refused((tmp_path / "w.pt").read_bytes(), "not safetensors")


def test_oversized():
    exact = update().to_bytes()
    limit = expected().max_bytes
    assert len(exact) < limit
    assert_refused(exact + b"\0" * limit, rf"{len(exact) + limit:,} bytes arrived where at most {limit:,}")
    big = packed({**STATE, "c": torch.ones(400_000)})
    assert_refused(big, "bytes arrived")


def test_a_tensor_of_more_values_than_asked_for_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(serialization, "values", lambda _: pytest.fail("values were read"))
    assert_refused(packed({"a.weight": torch.ones(200, 300), "b": STATE["b"]}), "bytes arrived")
    assert_refused(packed({"a.weight": torch.ones(2, 4), "b": STATE["b"]}), "asked for was")
    assert_refused(packed(round=9), "round")


def test_every_truncation():
    data = update().to_bytes()
    for length in range(len(data)):
        with pytest.raises(UpdateRefusedError):
            Update.from_bytes(data[:length], expected())
    with pytest.raises(UpdateRefusedError):
        Update.from_bytes(data + b"\0", expected())


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 10**9, 17 * 2**20])
def test_a_header_that_claims_to_be_huge(size):
    assert_refused(struct.pack("<Q", size) + b"{}" + b" " * 100, "not safetensors")


def layout(**changes):
    """The JSON of a right header over two tensors, with changes."""
    return {
        "__metadata__": {"llmchain_fed": json.dumps(GOOD)},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
    } | changes


BODY = b"\0" * 36


def test_the_layout_written_by_hand_is_right():
    """Or the refusals below would prove nothing."""
    got = Update.from_bytes(raw(layout(), BODY), expected())
    assert torch.equal(got.tensors["a.weight"], torch.zeros(2, 3))


LIES = {
    "overlapping": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}},
    "beyond the end": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 3600]}},
    "backwards": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [36, 24]}},
    "a hole": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 32]}},
    "a negative shape": {"b": {"dtype": "F32", "shape": [-3], "data_offsets": [24, 36]}},
    "a shape of text": {"b": {"dtype": "F32", "shape": ["3"], "data_offsets": [24, 36]}},
    "a fractional shape": {"b": {"dtype": "F32", "shape": [3.5], "data_offsets": [24, 36]}},
    "a shape that is true": {"b": {"dtype": "F32", "shape": [True], "data_offsets": [24, 28]}},
    "no shape": {"b": {"dtype": "F32", "data_offsets": [24, 36]}},
    "shape is null": {"b": {"dtype": "F32", "shape": None, "data_offsets": [24, 36]}},
    "an unknown type": {"b": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [24, 36]}},
    "type is a list": {"b": {"dtype": ["F32"], "shape": [3], "data_offsets": [24, 36]}},
    "entry is a list": {"b": [1, 2]},
    "entry is null": {"b": None},
    "offsets of text": {"b": {"dtype": "F32", "shape": [3], "data_offsets": ["24", "36"]}},
    "three offsets": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36, 36]}},
    "one offset": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [24]}},
    "endless offsets": {"b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 10**4000]}},
    "no offsets": {"b": {"dtype": "F32", "shape": [3]}},
    "metadata is a list": {"__metadata__": ["llmchain_fed"]},
    "metadata is null": {"__metadata__": None},
    "metadata of others": {"__metadata__": {"format": "pt"}},
    "our header is a number": {"__metadata__": {"llmchain_fed": 5}},
    "our header is a list": {"__metadata__": {"llmchain_fed": "[]"}},
    "our header is no JSON": {"__metadata__": {"llmchain_fed": "{"}},
    "our header is deep": {"__metadata__": {"llmchain_fed": "[" * 100_000}},
    "our header has a long number": {"__metadata__": {"llmchain_fed": "9" * 100_000}},
}


@pytest.mark.parametrize("lie", LIES)
def test_layouts_that_lie(lie):
    with pytest.raises(UpdateRefusedError):
        Update.from_bytes(raw(layout(**LIES[lie]), BODY), expected())


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b"[]", b"null", b"5", b'"x"', b"{" * 50_000, b"[" * 200_000, b"\xff\xfe\xfd", b"9" * 10_000,
        json.dumps(layout()).replace("[3]", "[1e999]").encode(), json.dumps(layout()).replace("[3]", "[NaN]").encode(),
        json.dumps(layout()).replace("[3]", "[Infinity]").encode(),
        json.dumps(layout()).replace("[3]", f"[{'9' * 5000}]").encode(),
        json.dumps(layout()).replace('"b"', '"\\ud800"').encode(),
    ],
)  # fmt: skip
def test_headers_that_are_not_ours(text):
    with pytest.raises(UpdateRefusedError):
        Update.from_bytes(raw(text, BODY), expected())


def test_a_name_given_twice_cannot_smuggle_another_shape_past_the_check():
    """Python's JSON takes the last of two equal keys; a reader that takes the first would load what was not checked."""
    honest = '"b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]}'
    for other in (
        '"b": {"dtype": "F32", "shape": [1, 3], "data_offsets": [24, 36]}',
        '"b": {"dtype": "F32", "shape": [3, 1], "data_offsets": [24, 36]}',
        '"b": {"dtype": "I32", "shape": [3], "data_offsets": [24, 36]}',
    ):
        for pair in ((other, honest), (honest, other)):
            text = json.dumps(layout()).replace(honest, ", ".join(pair))
            assert text.count('"b"') == 2
            assert_refused(raw(text.encode(), BODY), "occurs twice")


def test_values_that_do_not_lie_on_their_own_grid():
    """A float32 behind a single bfloat16 begins in the middle of nowhere: torch cannot view it."""
    state = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(2)}
    header = {
        "__metadata__": {"llmchain_fed": json.dumps(GOOD)},
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
    }
    with pytest.raises(UpdateRefusedError, match="contradicts itself"):
        Update.from_bytes(raw(header, b"\0" * 10), expected(state))
    got = Update.from_bytes(update(state).to_bytes(), expected(state))  # whoever writes them sorts them by size
    assert serialization.describe(got.tensors) == serialization.describe(state)


def test_random_bytes_and_random_damage():
    """Whatever arrives: the update that was sent, or a refusal. Nothing else, in particular no other exception."""
    rng = random.Random(0)
    data = update().to_bytes()
    refused = 0
    for trial in range(4000):
        damaged = bytearray(data)
        match trial % 4:
            case 0:
                for _ in range(rng.randint(1, 3)):
                    damaged[rng.randrange(len(data) - 36)] = rng.randrange(256)  # in the header
            case 1:
                at = rng.randrange(len(data))
                del damaged[at : at + rng.randint(1, 20)]
            case 2:
                at = rng.randrange(len(data))
                damaged[at:at] = rng.randbytes(rng.randint(1, 20))
            case 3:
                damaged = bytearray(rng.randbytes(rng.randint(0, 200)))
        try:
            got = Update.from_bytes(bytes(damaged), expected())
        except UpdateRefusedError:
            refused += 1
            continue
        # what damage may do without being seen: change a number that nobody can check
        assert (got.participant, got.round, got.base) == ("p", 3, "beef")
        assert serialization.describe(got.tensors) == serialization.describe(STATE)
        assert all(bool(torch.isfinite(t).all()) for t in got.tensors.values())
        assert 1 <= got.num_examples <= 10**9
        assert all(math.isfinite(v) for v in got.metrics.values())
    assert refused > 3000


def test_damage_outside_the_counts_is_always_seen():
    """Every byte of the header but those of the free numbers: change it, and the update is refused or equal."""
    rng = random.Random(1)
    sent = update()
    data = sent.to_bytes()
    start = data.index(b"__metadata__")
    free = data.index(b"num_examples"), data.index(b"}", data.index(b"train_loss"))
    for at in range(start, len(data) - 36):
        if free[0] <= at <= free[1]:
            continue
        damaged = bytearray(data)
        damaged[at] = (damaged[at] + rng.randint(1, 255)) % 256
        try:
            got = Update.from_bytes(bytes(damaged), expected())
        except UpdateRefusedError:
            continue
        assert all(same_bits(got.tensors[n], STATE[n]) for n in STATE)
        assert (got.num_examples, got.num_tokens) == (5, 40)
