"""Every format of a file, compressed too, and what is not in memory as a list: the same rows, or one error.

Belongs here: TSV, JSON, Parquet, gzip, files that change, data sets by index. Does not: CSV and JSONL as such
(test_readers), names of columns (test_columns).
"""

import gzip
import json
import os
import random
import sys
import weakref

import datasets
import pandas as pd
import polars
import pyarrow as pa
import pytest
import torch
from tiny import PAIRS

from llmchain_fed import Example
from llmchain_fed.data import encode_examples, read_examples
from llmchain_fed.data.sources import files, json_files
from llmchain_fed.data.sources.readers import count_of, numbered
from llmchain_fed.data.sources.text_files import separator_of
from llmchain_fed.errors import DataError, EmptyParticipantError, MissingExtraError

ROWS = [{"text": x, "completion": y} for x, y in PAIRS]
AWKWARD = [{"text": 'a;b,c\t"d"|e', "completion": "f\ng"}, {"text": "é 日", "completion": "[{"}]


def rows(source):
    return [row for _, row in numbered(source)]


def places(source):
    return [place for place, _ in numbered(source)]


def written(tmp_path, name, content):
    path = tmp_path / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("table", [ROWS, AWKWARD])
def test_every_format_gives_the_rows_that_pandas_wrote(table, tmp_path):
    frame = pd.DataFrame(table)
    for separator in ",;\t|":
        frame.to_csv(tmp_path / "a.csv", index=False, sep=separator)
        frame.to_csv(tmp_path / "a.csv.gz", index=False, sep=separator)
        assert rows(tmp_path / "a.csv") == rows(tmp_path / "a.csv.gz") == table
    frame.to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "c.json", orient="records")
    frame.to_json(tmp_path / "d.json.gz", orient="records", indent=2)
    frame.to_json(tmp_path / "e.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "f.jsonl.gz", orient="records", lines=True)
    frame.to_json(tmp_path / "g.json", orient="records", lines=True)  # as many data sets are published
    frame.to_json(tmp_path / "h.json", orient="table", index=False)  # {"schema": …, "data": […]}
    frame.to_parquet(tmp_path / "i.parquet")
    (tmp_path / "j.ndjson").write_bytes((tmp_path / "e.jsonl").read_bytes())
    for path in tmp_path.iterdir():
        assert rows(path) == rows(str(path)) == table, path.name
    assert count_of(tmp_path / "i.parquet") == len(table)


def test_the_separator_is_what_the_header_has_most_of():
    assert separator_of("a;b, in text;c") == ";"
    assert separator_of('"a;b;c;d",e') == ","
    assert separator_of("a|b\n") == "|"
    assert separator_of("completion") == ","


def test_places_in_files(tmp_path):
    content = '\n[\n {"text": "a\\nb",\n  "completion": "c"},\n\n{"text": "d", "completion": "e"}]\n'
    assert places(written(tmp_path, "a.json", content)) == ["example 0 (a.json, line 3)", "example 1 (a.json, line 6)"]
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet")[-1] == f"example {len(ROWS) - 1} (a.parquet, row {len(ROWS) - 1})"
    assert places(written(tmp_path, "a.csv.gz", "\n\ntext;completion\n\na;b\n")) == ["example 0 (a.csv.gz, line 5)"]


def test_a_list_is_read_as_json_reads_it_wherever_its_chunks_end(tmp_path, monkeypatch):
    rng = random.Random(0)
    letters = ['"', "\\", "é", "😀", "[", "}", "\n", "a", ",", " "]
    table = [
        {"text": "".join(rng.choices(letters, k=rng.randint(0, 30))), "n": rng.choice([1e300, -5, None, True, [1, {}]])}
        for _ in range(60)
    ]
    path = tmp_path / "a.json"
    for trial in range(24):
        monkeypatch.setattr(json_files, "_CHUNK", rng.randint(1, 40))
        inside = json.dumps(table, ensure_ascii=bool(trial % 2), indent=rng.choice([None, 1]))
        content = inside if trial % 3 else f'{{"version": [1, "data"], "n": 12,\n"data":{inside}, "more": {{"a": []}}}}'
        path.write_text(content)
        assert rows(path) == table


REFUSED = {
    "no list": (
        "a.json",
        '{"text": "a",\n"completion": "b"}',
        r"^a\.json, line 2 ends an object with the keys \['text', ",
    ),
    "split": ("a.json", '{"columns": ["a"],\n "data": [["b"]]}', r"^a\.json, line 2 is a list, not an object"),
    "by column": ("a.json", '{"text": {\n"0": "a"}}', r"line 2 ends an object with the keys \['text'\]"),
    "text": ("a.json", '"a"', r"""line 1 begins with '"': a \.json file is a list of objects"""),
    "nothing": ("a.json", " \n ", "line 2 is the end of an empty file"),
    "two lists": ("a.json", '{"data": [{}],\n"n": 1,\n"data": [{}]}', "line 3 has the key 'data' a second time"),
    "two lists in a line": ("a.json", '{"data": [{"a": 1}], "data": []}', "line 1 has the key 'data' a second time"),
    "a list behind a value": ("a.json", '{"data": 5,\n"data": [{"a": 2}]}', "line 2 has the key 'data' a second time"),
    "no entry": ("a.json", "[\n]", r"no usable example: a\.json ends at line 2"),
    "no comma": ("a.json", '[{"a": 1}\n{"a": 2}]', r"line 2 is not JSON: ',' should stand after an entry"),
    "comma at the end": ("a.json", '[{"a": 1},\n]', r"line 2 is not JSON: Expecting value \(column 1\)"),
    "cut off": ("a.json", '[{"a": 1},\n{"a": "b', r"line 2 is not JSON: Unterminated string.*\(column 7\)"),
    "open list": ("a.json", '[{"a": 1}\n', "line 2 ends too early"),
    "a word": ("a.json", '[{"a": 1},\n  oops]', r"line 2 is not JSON: Expecting value \(column 3\)"),
    "within": ("a.json", '[{"a": 1},\n{"b" 2}]', r"line 2 is not JSON: Expecting ':' delimiter \(column 6\)"),
    "twins": ("a.json", '[{"a": 1, "a": 2}]', r"line 1 cannot be read: it has the key 'a' twice"),
    "depth": ("a.json", "[" + "[" * 70 + "]" * 70 + "]", "line 1 is nested more than 64 levels"),
    "endless": ("a.json", "[\n" + "[" * 200_000, "line 2 is nested more than 64 levels"),
    "more behind": ("a.json", "[{}]\n[{}]", r"line 2 goes on with '\['"),
    "NUL": ("a.json", '[{"a": 1},\n\0]', "line 2 has a NUL byte"),
    "no number": ("a.json", '[{"a": -Infinity}]', "line 1 cannot be read: -Infinity"),
    "Latin-1": ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', "line 2 is not UTF-8"),
    "UTF-16": ("a.json", "[]".encode("utf-16"), r"^a\.json is UTF-16"),
    "Latin-1 in gzip": ("a.csv.gz", b"text,completion\na,b\n\xe9,b\n", r"a\.csv\.gz, line 3 is not UTF-8"),
    "cells": ("a.csv", "text;completion\na;b;c\n", "line 2 has 3 cells under 2 columns.*contain semicolons"),
    "parquet in gzip": ("a.parquet.gz", b"PAR1", "all but the last as .gz"),
    "zip": ("a.zip", b"PK", r"read from \.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.parquet files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_it_should_be_is_refused_with_file_line_and_column(case, tmp_path):
    name, content, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason) as error:
        rows(written(tmp_path, name, content))
    assert len(str(error.value)) < 500


def test_what_is_no_whole_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(json.dumps(ROWS).encode() * 50)
    for content in (b"[]", whole[:-20], whole[:100] + b"\0" * 50 + whole[150:], whole[:-8] + b"\0" * 8):
        path = tmp_path / "a.json.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json\.gz"):
            rows(path)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for content in (whole[:-1], whole[: len(whole) // 2], b"", *(rng.randbytes(200) for _ in range(5))):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file"):
            rows(path)
    pa.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match="two columns 'text'"):
        rows(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"\.\[datasets\]"):
        rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(name, tmp_path):
    path, table = tmp_path / name, [{"text": f"row {at}", "completion": "b"} for at in range(3000)]
    frame = pd.DataFrame(table)
    write = {
        "a.csv": lambda: frame.to_csv(path, index=False),
        "a.parquet": lambda: frame.to_parquet(path, row_group_size=1000),
    }.get(name, lambda: frame.to_json(path, orient="records", lines="jsonl" in name))
    write()
    reading = numbered(path)
    next(reading)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.replace(path)  # the same bytes in another file: still not the one that was begun
    with pytest.raises(DataError, match="has changed while it was read"):
        list(reading)
    reading = numbered(path)
    next(reading)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="has changed while it was read"):
        list(reading)


# --- not in files -----------------------------------------------------------------------------------------------------


class ByIndex(torch.utils.data.Dataset):
    """torch's map-style data set: no __iter__, and no IndexError at its end."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, at):
        return self.made[at % len(PAIRS)]


def test_data_sets_by_index_give_their_rows_once_each(make_chain):
    chain = make_chain()
    expected = encode_examples(PAIRS, chain.model, chain)
    for made in (PAIRS, ROWS):
        for source in (ByIndex(made), torch.utils.data.Subset(ByIndex(made), range(len(PAIRS)))):
            assert encode_examples(source, chain.model, chain).tokens.tolist() == expected.tokens.tolist()
    assert count_of(ByIndex(PAIRS)) == len(PAIRS)

    class Endless(torch.utils.data.Dataset):
        def __getitem__(self, at):
            return PAIRS[0]

    with pytest.raises(DataError, match="does not say how many rows"):
        rows(Endless())


def test_frames_come_in_pieces_and_whole(make_chain):
    table = [{"text": f"a{at}", "completion": "b"} for at in range(2500)]
    arrow = pa.Table.from_pylist(table)
    for source in (pd.DataFrame(table), polars.DataFrame(table), arrow, arrow.to_batches()[0], arrow.to_reader(700)):
        assert rows(source) == table
    with pytest.raises(DataError, match=r"Pass frame\.collect\(\)"):
        rows(polars.DataFrame(table).lazy())


def test_labels_that_are_missing_count_alike_in_files_and_frames(tmp_path, make_chain):
    chain = make_chain()
    frame = pd.DataFrame([("a", "b"), ("c", float("nan")), ("d", None)], columns=["text", "completion"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    polar = polars.DataFrame({"text": ["a", "c", "d"], "completion": ["b", None, None]})
    sources = [frame, polar, *sorted(tmp_path.iterdir())]
    reports = [encode_examples(source, chain.model, chain).report for source in sources]
    assert [(report.used, report.empty) for report in reports] == [(1, 2)] * 5


def test_examples_become_tokens_some_at_a_time_and_the_same_as_at_once(make_chain, monkeypatch):
    from llmchain_fed.data import encoding

    chain = make_chain()
    source = [*PAIRS, ("", "x"), *PAIRS[:3], ("word " * 200, "y")]
    whole = encode_examples(source, chain.model, chain)
    monkeypatch.setattr(encoding, "ROWS", 2)
    some = encode_examples((pair for pair in source), chain.model, chain)
    for name in ("tokens", "bounds", "starts"):
        assert torch.equal(getattr(whole, name), getattr(some, name))
    assert whole.report == some.report
    assert (some.report.used, some.report.empty, some.report.duplicate, some.report.too_long) == (15, 1, 3, 1)


def test_texts_are_let_go_once_they_are_tokens(make_chain, monkeypatch):
    """Of a long stream no more examples are alive than become tokens at a time."""
    from llmchain_fed.data import encoding

    monkeypatch.setattr(encoding, "ROWS", 8)
    alive, most = weakref.WeakSet(), []

    def stream():
        for at in range(400):
            example = Example(f"text {at}", "answer")
            alive.add(example)
            most.append(len(alive))
            yield example

    chain = make_chain()
    assert encode_examples(stream(), chain.model, chain).report.used == 400
    assert max(most) <= 3 * 8


def test_a_stream_is_read_once(make_chain):
    begun = []

    def generate():
        begun.append(1)
        yield from ROWS

    stream = datasets.IterableDataset.from_generator(generate)
    chain = make_chain()
    assert encode_examples(stream, chain.model, chain).report.used == len(PAIRS)
    assert len(begun) == 1


def test_a_bar_shows_how_far_reading_is_on_a_terminal_alone(make_chain, monkeypatch, capsys):
    from llmchain_fed.data.sources import progress

    chain = make_chain()
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    encode_examples(PAIRS, chain.model, chain, progress="reading a")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    encode_examples(PAIRS, chain.model, chain, progress="reading a")
    assert "reading a" in (said := capsys.readouterr().err)
    assert f"/{len(PAIRS)}" in said.replace(".0", "")
    encode_examples(PAIRS, chain.model, chain)
    assert capsys.readouterr().err == ""


def test_an_empty_list_is_a_participant_without_examples(tmp_path):
    with pytest.raises(EmptyParticipantError):
        list(read_examples(written(tmp_path, "a.json", '{"data": []}')))
    assert files.identity(tmp_path / "none") is None
