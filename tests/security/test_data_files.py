"""JSONL and CSV files that nobody looked at: rows, or one error that names file and line; memory for one line.

Belongs here: what a file may contain. Does not: how rows become examples (test_readers, test_encoding).
"""

import gzip
import json
import math
import os
import tempfile
from pathlib import Path

from bounded import bounded, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import untrusted
from llmchain_fed.data.examples import read_examples
from llmchain_fed.data.sources.readers import numbered
from llmchain_fed.errors import DataError

GOOD = '{"text": "a", "completion": "b"}\n'
HEAD = "text,completion\n"
FILES = {
    "levels": ("a.jsonl", GOOD + "[" * 100_000),
    "levels of objects": ("a.jsonl", GOOD + '{"a":' * 100_000),
    "brackets in a text": ("a.jsonl", GOOD + '{"a": "' + "[" * 10**6),
    "digits": ("a.jsonl", GOOD + '{"a": ' + "9" * 5000 + "}"),
    "digits of a float": ("a.jsonl", GOOD + '{"a": 1e' + "9" * 5000 + "}"),
    "many names": ("a.jsonl", GOOD + "{" + ",".join(f'"a{i}": 1' for i in range(10**5)) + ', "a0": 1}'),
    "names once": ("a.jsonl", "{" + ",".join(f'"a{i}": 1' for i in range(10**5)) + "}"),
    "a long name": ("a.jsonl", '{"' + "x" * 10**6 + '": 1}'),
    "a name that moves a terminal": ("a.jsonl", '{"\\u001b[2J": 1, "\\u202e": 2}'),
    "half a pair": ("a.jsonl", '{"\\ud800": 1, "\\ud800 ": "\\udc00"}'),
    "a million columns": ("a.csv", ",".join(f"a{i}" for i in range(10**6)) + "\n"),
    "a million columns of one name": ("a.csv", ",".join(["a"] * 10**6) + "\n"),
    "a million cells": ("a.csv", HEAD + "," * 10**6 + "\n"),
    "a long title": ("a.csv", "x" * 10**6 + "\ta\n"),
    "a note": ("a.csv", "sep=" + "x" * 10**6 + "\n"),
    "a quote left open": ("a.csv", HEAD + '"' + "a\n" * 10**6),
    "quotes": ("a.csv", HEAD + '"' * 10**6),
    "a NUL byte": ("a.csv", HEAD + "a,\0\n"),
    "an open comment": ("a.csv", "\ufeff" * 100),
    "Latin-1 at the end": ("a.jsonl", GOOD.encode() * 10**5 + b"\xe9"),
    "a line of Latin-1": ("a.csv", b"\xe9" * 10**6),
    "carriage returns": ("a.csv", "\r" * 10**6),
    "a list of lists": ("a.json", "[" * 100_000),
    "a list of objects in one another": ("a.json", '[{"a":' * 100_000),
    "digits in a list": ("a.json", "[{}, " + "9" * 5000 + "]"),
    "digits of 16 MB in a list": ("a.json", "[{}, 0." + "9" * (2**24 + 5)),
    "a text without an end in a list": ("a.json", '[{}, {"a": "' + "x\\n" * (2**23)),
    "escapes in a list": ("a.json", '[{"a": "' + "\\u00" * 10**5),
    "keys before the list": ("a.json", "{" + ",".join(f'"{i}": 1' for i in range(10**5)) + ', "data": [1]}'),
    "spaces in a list": ("a.json", "[" + " " * 10**7 + "x"),
    "commas in a list": ("a.json", "[" + "," * 10**6),
    "an object a line, and one not": ("a.json", GOOD + "[" * 10**5),
    "bars": ("a.csv", "|" * 10**6),
    "no gzip": ("a.csv.gz", "line"),
    "tabs": ("a.tsv", "a\tb\n" + "\t" * 10**6),
}


def read(path):
    """The rows, or the message."""
    with within(10):
        try:
            return list(numbered(path)), list(read_examples(path))
        except DataError as refused:
            told = str(refused)
    assert 20 < len(told) < 1500, told
    assert untrusted.printable(told) == told
    assert path.name in told
    return told


@bounded(seconds=60, megabytes=600)
def test_hostile_files_are_refused_with_file_and_line():
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, content) in FILES.items():
            path = Path(folder) / file
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
            told = read(path)
            assert isinstance(told, str), name
            assert "line" in told or file.endswith(".gz"), (name, told)


@bounded(seconds=60, megabytes=300)
def test_a_line_of_a_gigabyte_takes_no_gigabyte():
    with tempfile.TemporaryDirectory() as folder:
        for file, start in (("a.jsonl", GOOD), ("a.csv", HEAD), ("b.csv", HEAD + '"')):
            path = Path(folder) / file
            path.write_text(start)
            os.truncate(path, 2**30)
            told = read(path)
            assert "line 2 has more than the 16,777,216 characters of an example" in told, told


@bounded(seconds=60, megabytes=300)
def test_a_small_file_that_unpacks_to_a_gigabyte_takes_no_gigabyte():
    """Of one line, of an entry of a list, of a quoted cell: 1 MB of gzip each; many small rows are read one by one."""
    starts = {"a.jsonl.gz": GOOD, "a.csv.gz": HEAD, "b.csv.gz": HEAD + '"', "a.json.gz": '[{"a": "'}
    with tempfile.TemporaryDirectory() as folder:
        for file, start in starts.items():
            path = Path(folder) / file
            path.write_bytes(gzip.compress(start.encode()) + gzip.compress(b"x" * 2**20) * 2**10)
            told = read(path)
            assert "more than the 16,777,216 characters of an example" in told, told
        path.write_bytes(
            gzip.compress(b"[" + b"{}," * 1000) + gzip.compress(b"{}," * 1000) * 100 + gzip.compress(b"{}]")
        )
        assert sum(1 for _ in numbered(path)) == 101_001


@bounded(seconds=60, megabytes=300)
def test_a_record_of_many_lines_takes_no_more_than_a_line():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w") as file:
            file.write(HEAD + 'a,"')
            for _ in range(40):
                file.write("x" * 10**6 + "\n")
        assert "belongs to a record of more than the 16,777,216 characters" in read(path)


@bounded(seconds=20, megabytes=100)
def test_pipes_and_devices_are_no_files():
    with tempfile.TemporaryDirectory() as folder:
        pipe, link = Path(folder) / "a.jsonl", Path(folder) / "b.csv"
        os.mkfifo(pipe)
        link.symlink_to("/dev/zero")
        for path in (pipe, link):
            assert "there is no file" in read(path)


pieces = st.sampled_from(
    [
        *(
            "{",
            "}",
            "[",
            "]",
            '"',
            ",",
            ":",
            "\\",
            "\n",
            "\r",
            "\0",
            "\ufeff",
            "a",
            "NaN",
            "1e999",
            "-0",
            "null",
            "\ud800",
        ),
        *('{"text": "a", "completion": "b"}\n', "text,completion\n", "a,b\n", '"a""b",c\n', "\\ud800", "9" * 400),
    ]
)


@bounded(seconds=90, megabytes=400)
def test_any_file_is_rows_of_plain_values_or_one_error():
    plain = (str, int, float, bool, type(None), list, dict)
    kinds = ["a.jsonl", "a.csv", "a.tsv", "a.json", "a.csv.gz", "a.json.gz"]

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(kinds),
        st.lists(pieces, max_size=12).map("".join) | st.binary(max_size=60),
    )
    def check(file, content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            path.write_bytes(gzip.compress(data) if file.endswith(".gz") and len(data) % 2 else data)
            found = read(path)
        if not isinstance(found, str):
            for _, row in found[0]:
                assert isinstance(row, dict)
                assert all(isinstance(v, plain) for v in row.values())
                assert not any(isinstance(v, float) and math.isinf(v) for v in row.values())
                json.dumps(row)

    check()
