"""The bounded readers: every input gives the documented type or one error of our tree, in bounded time and memory."""

import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from bounded import bounded, within
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmchain_fed import untrusted
from llmchain_fed.errors import ConfigError

MB = 2**20
JSON = {"most": MB, "what": "the message", "error": ConfigError}
YAML = {"what": "the policy", "error": ConfigError}


def flat(found, depth=0):
    """The plain types there are in a value; the deepest level."""
    if isinstance(found, dict):
        assert all(isinstance(key, str) for key in found)
        return max([depth + 1, *(flat(v, depth + 1) for v in found.values())])
    if isinstance(found, list):
        return max([depth + 1, *(flat(v, depth + 1) for v in found)])
    assert found is None or type(found) in (bool, int, float, str)
    if type(found) is int:
        assert -(2**63) <= found < 2**63
    return depth


hostile = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from([b"[", b'{"a":', b"[[", b"- ", b"? ", b"{", b"&a ", b"!!"]), st.integers(1, 60_000)).map(
        lambda p: p[0] * p[1]
    ),
)


def told(error):
    """An error's message is short, and can be shown and written."""
    return len(str(error)) < 1000 and untrusted.printable(str(error)) == str(error)


def parsed(parse, data, **limits):
    """The value, or None for a refusal that says why."""
    with within(2):
        try:
            return parse(data, **limits)
        except ConfigError as error:
            refused = error
    assert told(refused)
    return None


@bounded(seconds=120, megabytes=400)
def test_json_of_any_kind_is_a_value_or_one_error():
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile)
    def check(data):
        assert flat(parsed(untrusted.parse_json, data, **JSON)) <= untrusted.MAX_DEPTH

    check()


@bounded(seconds=120, megabytes=400)
def test_yaml_of_any_kind_is_a_value_or_one_error():
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile)
    def check(data):
        assert flat(parsed(untrusted.parse_yaml, data, **YAML)) <= untrusted.MAX_DEPTH

    check()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 017", "not the one it looks like"),
        ("a: 1:30", "not the one it looks like"),
        ("a: 1_000", "not the one it looks like"),
        ("a: 1:30.5", "not the one it looks like"),
        ("a: " + "1:" * 300 + "1.", "not the one it looks like"),
        ('a: !!int ""', "no plain YAML"),
        ('a: !!float ""', "no plain YAML"),
        ('a: !!int "_"', "no plain YAML"),
        ('a: !!int "+"', "no plain YAML"),
        ('%TAG !e! tag:yaml.org,2002:\n---\na: !e!int ""', "no plain YAML"),
        ("a: !!bool maybe", "no plain YAML"),
        ("a: &x [1, 2]\nb: *x", "anchors and aliases"),
        ("&a [*a]", "anchors and aliases"),
        ("a: &x 1", "anchors and aliases"),
        ("a: 2020-99-99", "in line 1 is a date to YAML; put it in quotes"),
        ("a: 1\nb: 2020-01-01", "in line 2 is a date"),
        ("on: 1", "an unquoted yes, no, on or off is a boolean"),
        ("a: 1\na: 2", "`a` is given twice, again in line 2"),
        ("a: .inf", "not finite"),
        ("a: .NaN", "not finite"),
        ("<<: {a: 1}", "a meaning of its own"),
        ("a: " + "9" * 5000, "an integer of 5000 characters"),
        ("a: 9223372036854775808", "an integer of 64 bits"),
        ("[" * 100 + "]" * 100, "more than 32 levels"),
        ("[" * 20_000, "no plain YAML"),
        ("- " * 5_000, "no plain YAML"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!set {x}", "the tag"),
        ("a: !!python/object/apply:os.system [ls]", "the tag"),
        ("a: !foo b", "the tag"),
        ("{[1]: 2}", "no name of an option"),
        ("1: 2", "no name of an option"),
        ("a: \x00", "no plain YAML"),
        ("a: [1", "no plain YAML"),
        ("x" * (MB + 1), "more than the 1,048,576 bytes"),
    ],
    ids=range(36),
)
def test_what_plain_yaml_may_not_contain(text, why):
    with pytest.raises(ConfigError, match=r"^the policy ") as error:
        untrusted.parse_yaml(text, **YAML)
    assert why in str(error.value)
    assert len(str(error.value)) < 500


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_plain_data_that_is_dumped_comes_back(value):
    text = untrusted.dump_yaml({"a": value}, what="it", error=ConfigError)
    assert untrusted.parse_yaml(text, **YAML) == {"a": value}
    back = untrusted.parse_json(json.dumps(value), **JSON)
    assert back == value or (isinstance(value, str) and back == value)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
        (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "more than 32 levels"),
        (b'{"a":1,"a":2}', "a name occurs twice"),
        (b'{"a":NaN}', "NaN is no JSON"),
        (b'{"a":-Infinity}', "Infinity is no JSON"),
        (b'{"a":' + b"9" * 4300 + b"}", "an integer of 4300 digits"),
        (b'{"a":' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a":9223372036854775808}', "an integer of 19 digits"),
        ('{"a":1}'.encode("utf-16"), "UnicodeDecodeError"),
        (b"[1]", "not a JSON object"),
        (b"", "JSONDecodeError"),
        (b'{"a":"' + b"x" * MB + b'"}', "at most 1,048,576 make sense"),
    ],
    ids=range(12),
)
def test_what_json_of_ours_may_not_be(data, why):
    with pytest.raises(ConfigError) as error:
        untrusted.read_json(data, **JSON)
    assert why in str(error.value)


def test_long_digits_within_texts_are_no_integers():
    assert untrusted.read_json(b'{"digest":"' + b"1" * 64 + b'","n":-9223372036854775808}', **JSON)["n"] == -(2**63)


@settings(max_examples=500, deadline=None, database=None)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_printable_text_can_be_written_anywhere(text):
    found = untrusted.printable(text)
    found.encode("utf-8")
    assert not set(found) & {chr(c) for c in [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x2028]}


def test_printable_keeps_what_people_write():
    text = "naïve 日本語 👩‍⚕️ می‌خواهم\tand\nnewline"
    assert untrusted.printable(text) == text


@pytest.mark.parametrize(
    "value", [10**5000, [[[[]]]] * 10**5, {"a": 10**6000}, "x" * 10**6, math.inf, object()], ids=range(6)
)
def test_any_value_can_be_shown(value):
    assert len(untrusted.shown(value)) <= 81


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.tuples(inner) | st.tuples(inner, inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, database=None)
@given(PLAIN)
@example(2**63)
@example(-(2**63))
@example([10**40])
def test_plain_data_is_shown_as_python_spells_it(value):
    if not isinstance(value, str):
        assert untrusted.shown(value, 5000) == untrusted.printable(repr(value), 5000)
        assert untrusted.shown(value, 40)[:36] == untrusted.printable(repr(value), 40)[:36]


HUGE = "x" * 2**26
WITHIN = {
    "a list": [HUGE],
    "bytes": (bytes(2**26),),
    "a key": {HUGE: 1},
    "a value": {"a": {"b": HUGE}},
    "deep": [[[[HUGE]]]],
    "a long list within": [[0] * 2**23],
    "many within": {"a": dict.fromkeys(range(2**20))},
    "a set": [set(range(2**20))],
}


@pytest.mark.parametrize("kind", WITHIN)
@bounded(seconds=20, megabytes=16)
def test_what_is_large_within_a_value_is_not_spelled_out(kind):
    with within(0.5):
        assert len(untrusted.shown(WITHIN[kind])) <= 81


@bounded(seconds=20, megabytes=64)
def test_a_pipe_is_not_waited_for():
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(Path(folder) / "pipe")
        for path in (Path(folder) / "pipe", Path(folder), Path("/dev/zero"), Path("no\x00name"), Path(folder) / "none"):
            with within(2), pytest.raises(ConfigError):
                untrusted.read_file(path, most=100, what="the file", error=ConfigError)
