"""Files and frames → rows, or an error with file and line.

Belongs here: what JSONL, CSV and frames may contain, encodings, sizes. Does not: what a row must have (test_encoding),
missing values (test_missing_values).
"""

import csv
import json
import random
import threading
import time
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from tiny import PAIRS

from llmchain_fed import DataReport
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.data.examples import read_examples
from llmchain_fed.data.sources.readers import numbered
from llmchain_fed.errors import DataError


def rows(source):
    return [row for _, row in numbered(source)]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = '{"text": "a", "completion": "b"}\n'
HEAD = "text,completion\n"
REFUSED = {
    # JSONL
    "digits": ("a.jsonl", GOOD + '{"text": ' + "9" * 5000 + "}\n", r"^a\.jsonl, line 2 cannot be read: .*4300"),
    "depth": ("a.jsonl", GOOD + "\n" + "[" * 100_000 + "\n", r"^a\.jsonl, line 3 is nested more than 64 levels"),
    "closed depth": ("a.jsonl", '{"a":' * 200 + "1" + "}" * 200, r"^a\.jsonl, line 1 is nested more than 64"),
    "infinity": ("a.jsonl", GOOD + '{"text": -Infinity, "completion": "b"}', r"line 2 cannot be read: -Infinity"),
    "overflow": ("a.jsonl", '{"text": 1e999, "completion": "b"}', r"line 1 cannot be read: the number 1e999 is larger"),
    "twins": ("a.jsonl", '{"text": "a", "text": "b", "completion": "c"}', r"line 1 cannot be read: .*'text' twice"),
    "nested twins": ("a.jsonl", '{"text": [{"a": 1, "a": 2}], "completion": "c"}', r"line 1 .*'a' twice"),
    "list": ("a.jsonl", GOOD + '["a", "b"]\n', r"^a\.jsonl, line 2 is a list, not an object"),
    "text": ("a.jsonl", '"a"', "line 1 is a text"),
    "null": ("a.jsonl", "null", "line 1 is null"),
    "number": ("a.jsonl", "3", "line 1 is a number"),
    "true": ("a.jsonl", "true", "line 1 is true or false"),
    "pretty list": ("a.jsonl", "[\n" + GOOD + "]", r"line 1 is not JSON.*begins like a JSON list: write one object"),
    "two in a line": ("a.jsonl", GOOD.strip() + GOOD, "line 1 is not JSON: Extra data"),
    "no line": ("a.jsonl", "", r"no usable example: a\.jsonl ends at line 1"),
    "blank lines": ("a.jsonl", "\n \n", r"no usable example: a\.jsonl ends at line 2"),
    "two marks": ("a.jsonl", "\ufeff\ufeff" + GOOD, "line 1 is not JSON"),
    "mark within": ("a.jsonl", GOOD + "\ufeff" + GOOD, "line 2 is not JSON"),
    "control": ("a.jsonl", '{"text": "a\x01", "completion": "b"}', "line 1 is not JSON: Invalid control"),
    # encodings of both
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), r"^a\.jsonl is UTF-16 .*Save it as UTF-8"),
    "UTF-16 backwards": ("a.csv", b"\xfe\xff" + HEAD.encode("utf-16-be"), r"^a\.csv is UTF-16"),
    "UTF-32": ("a.csv", HEAD.encode("utf-32"), r"^a\.csv is UTF-16 or UTF-32"),
    "UTF-16 without mark": ("a.csv", (HEAD + "a,b\n").encode("utf-16-le"), r"^a\.csv, line 1 has a NUL byte.*UTF-16"),
    "NUL": ("a.jsonl", GOOD + GOOD + "\0" * 20, r"^a\.jsonl, line 3 has a NUL byte"),
    "NUL in a cell": ("a.csv", HEAD + "a,b\nc,d\0\n", r"^a\.csv, line 3 has a NUL byte"),
    "Latin-1": ("a.csv", HEAD.encode() + b'a,"b\nc"\ncaf\xe9,b\n', r"^a\.csv, line 4 is not UTF-8 text"),
    "Latin-1 JSONL": ("a.jsonl", GOOD.encode() * 2000 + b'{"text": "\xe9"}', r"^a\.jsonl, line 2001 is not UTF-8"),
    # CSV
    "empty": ("a.csv", "", r"^a\.csv, line 1 is the end of an empty file"),
    "only a mark": ("a.csv", "\ufeff\n", r"^a\.csv, line 1 is the end of an empty file"),
    "header only": ("a.csv", HEAD, r"^a\.csv, line 1 names the columns \(text, completion\), and no row follows"),
    "same columns": ("a.csv", "text,completion,text\na,b,c\n", r"line 1 has the column 'text' twice \(1 and 3\)"),
    "unnamed column": ("a.csv", ",text,completion\n0,a,b\n", r"line 1 gives column 1 no name.*index=False"),
    "blank column": ("a.csv", "text,completion, \na,b,\n", "line 1 gives column 3 no name"),
    "fewer": ("a.csv", HEAD + 'a,"b\nc"\na\n', r"^a\.csv, line 4 has 1 cells under 2 columns \(text, completion\)"),
    "more": ("a.csv", HEAD + "\na,b,c\n", r"^a\.csv, line 3 has 3 cells under 2 columns"),
    "trailing comma": ("a.csv", HEAD + "a,b,\n", "line 2 has 3 cells"),
    "sep": ("a.csv", "sep=,\n" + HEAD + "a,b\n", r"line 1 is a spreadsheet's note 'sep='"),
    "open quote": ("a.csv", HEAD + 'a,"b\nc,d\ne,f\n', r"line 4 is not CSV \(from line 2 on\): unexpected end"),
    "text behind a quote": ("a.csv", HEAD + "c,d\n" + '"a"x,b\n', r"^a\.csv, line 3 is not CSV: "),
    "joined": ("a.csv", HEAD + "a,b\n" + HEAD + "c,d\n", r"example 1 \(a\.csv, line 3\): .*names of the columns"),
    # rows
    "row of a file": (
        "a.jsonl",
        GOOD + "\n" + '{"text": "a", "completion": 5}',
        r"example 1 \(a\.jsonl, line 3\): .*int",
    ),
    "other columns": ("a.csv", "txt,completion\na,b\n", r"example 0 \(a\.csv, line 2\): .*'text'\] is missing"),
    "half a pair": ("a.jsonl", '{"text": "\\ud800", "completion": "b"}', r"line 1\): .*half a surrogate pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_it_should_be_is_refused_with_file_and_line(case, tmp_path, make_chain):
    name, content, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason) as error:
        list(read_examples(written(tmp_path, name, content), make_chain()))
    str(error.value).encode()  # can be printed
    assert len(str(error.value)) < 600


def test_a_source_that_is_no_file(tmp_path, make_chain):
    for source in ("x" * 5000, "a\0b", str(tmp_path), tmp_path / "none.csv"):
        with pytest.raises(DataError, match="there is no file"):
            list(read_examples(source, make_chain()))


def test_a_cell_of_any_size_is_read_and_counted_as_from_a_list(tmp_path, make_chain):
    """Field case 11: a long document in a quoted cell is too long for the model, not for the file."""
    pairs = [PAIRS[0], ("word, " * 40_000, "x"), ("y", 'z"\n' * 100_000), PAIRS[1]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "completion"), *pairs])
    before, chain = csv.field_size_limit(), make_chain()
    found = encode_examples(tmp_path / "a.csv", chain.model, chain)
    assert csv.field_size_limit() == before
    assert found.report == encode_examples(pairs, chain.model, chain).report
    assert (found.report.used, found.report.too_long) == (2, 2)
    assert rows(tmp_path / "a.csv") == [{"text": t, "completion": c} for t, c in pairs]


def test_the_limit_of_the_csv_module_is_never_left_raised(tmp_path):
    """Not between two rows, not after an error, not where two threads read at once."""
    limit = csv.field_size_limit()
    path = written(tmp_path, "a.csv", HEAD + "a,b\n" * 2000)
    reading = numbered(path)
    next(reading)
    assert csv.field_size_limit() == limit
    with pytest.raises(DataError):
        rows(written(tmp_path, "b.csv", HEAD + '"a"x,b\n'))
    assert csv.field_size_limit() == limit
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(rows(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2000] * 4
    assert csv.field_size_limit() == limit


def test_csv_cells_are_those_of_the_csv_module(tmp_path):
    """Random tables, written by Python, read by pandas as an outsider would: the same cells and line numbers."""
    rng = random.Random(0)
    alphabet = ["a", "é", ",", '"', "\n", "\r\n", ";", " ", "日", "'", "\\"]
    for trial in range(40):
        table = [["x" + "".join(rng.choices(alphabet, k=rng.randint(0, 9))) for _ in range(3)] for _ in range(8)]
        path = tmp_path / f"{trial}.csv"
        with path.open("w", newline="", encoding="utf-8-sig" if trial % 2 else "utf-8") as file:
            style = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
            csv.writer(file, quoting=style, lineterminator=rng.choice(["\n", "\r\n"])).writerows([list("uvw"), *table])
        assert rows(path) == [dict(zip("uvw", row, strict=True)) for row in table]
        physical = path.read_bytes().decode().splitlines()
        for place, row in numbered(path):
            line = physical[int(place.split("line ")[1].rstrip(")")) - 1].lstrip('"')
            assert line.startswith(row["u"].replace('"', '""').splitlines()[0][:1])


def test_a_word_is_a_word_with_quotes_and_without(tmp_path):
    words = ["None", "NA", "N/A", "n/a", "nan", "NaN", "NaT", "null", "NULL", "<NA>", "#N/A", "\\N", "-nan"]
    for suffix, style in ((".csv", csv.QUOTE_MINIMAL), (".csv", csv.QUOTE_ALL), (".tsv", csv.QUOTE_MINIMAL)):
        path = tmp_path / f"a{suffix}"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, quoting=style, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([("text", "completion"), *((word, word) for word in words), ("x", "")])
        assert [row["completion"] for row in rows(path)] == [*words, ""]


def test_spaces_around_a_columns_name_are_none_of_it(tmp_path):
    assert rows(written(tmp_path, "a.csv", "text ; completion\na; b\n")) == [{"text": "a", "completion": " b"}]
    with pytest.raises(DataError, match="'text' twice"):
        rows(written(tmp_path, "a.csv", "text, text\na,b\n"))


def test_a_path_that_is_no_files_says_what_it_is(tmp_path, monkeypatch):
    for path, why in {
        str(tmp_path): "it is a folder", f"{tmp_path}/*.csv": r"nothing is put in for \* and \?",
        "https://x.org/a.csv": "it is an address", "s3://x/a.csv": "it is an address",
        "nothing.csv": r"\. Give the path",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=f"^there is no file .*{why}"):
            rows(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "home.csv", "prompt,completion\na,b\n")
    for path in ("~/home.csv", Path("~/home.csv")):
        assert [e.completion for e in read_examples(path)] == ["b"]


def test_blank_lines_and_line_endings(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        content = end.join(["", "text,completion", "", "a,b", "  ", "c,d", "", ""])
        found = list(numbered(written(tmp_path, "a.csv", content)))
        assert [place for place, _ in found] == ["example 0 (a.csv, line 4)", "example 1 (a.csv, line 6)"]
        assert [row["text"] for _, row in found] == ["a", "c"]
        lines = end.join(["", json.dumps({"a": "\u2028"}, ensure_ascii=False), "", '{"a": 2}'])
        assert [place[-7:] for place, _ in numbered(written(tmp_path, "a.jsonl", lines))] == ["line 2)", "line 4)"]


def test_marks_and_suffixes(tmp_path):
    assert rows(written(tmp_path, "A.CSV", "\ufeff" + HEAD + "a,b\n")) == [{"text": "a", "completion": "b"}]
    assert rows(written(tmp_path, "A.JSONL", "\ufeff" + GOOD)) == [{"text": "a", "completion": "b"}]


def test_brackets_in_texts_are_no_depth(tmp_path):
    row = {"text": "[" * 500 + '"{\\', "completion": "]" * 500}
    assert rows(written(tmp_path, "a.jsonl", json.dumps(row))) == [row]
    deep = {"text": json.loads("[" * 60 + "]" * 60), "completion": "[" * 100}
    assert rows(written(tmp_path, "a.jsonl", json.dumps(deep))) == [deep]


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    from pathlib import Path

    path = written(tmp_path, "a.csv", HEAD)

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(DataError, match=r"a\.csv cannot be read: .*Permission denied"):
        rows(path)


def test_frames_give_their_rows_and_no_column_is_lost(make_chain):
    frame = pd.DataFrame(PAIRS, columns=["text", "completion"])
    chain = make_chain()
    expected = encode_examples(PAIRS, chain.model, chain)
    for source in (frame, pa.Table.from_pandas(frame), datasets.Dataset.from_pandas(frame)):
        assert encode_examples(source, chain.model, chain).tokens.tolist() == expected.tokens.tolist()
    twins = pd.DataFrame([("a", "b", "c")], columns=["text", "completion", "text"])
    reader = csv.DictReader(["text,completion,text", "a,b,c"])
    for source in (twins, pa.table([["a"], ["b"], ["c"]], names=["text", "completion", "text"]), reader):
        with pytest.raises(DataError, match="two columns 'text'"):
            rows(source)


def test_a_set_has_no_order_to_train_in():
    for source in ({("a", "b")}, frozenset([("a", "b")])):
        with pytest.raises(DataError, match=r"a set has no order.*Pass sorted\(examples\)"):
            rows(source)


def test_splits_are_not_examples(make_chain):
    data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a", "completion": "b"}])})
    with pytest.raises(DataError, match=r"splits 'train' of a data set are not examples.*d\['train'\]"):
        encode_examples(data, make_chain().model, make_chain())


def test_reading_costs_little(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "completion"), *(("some text", "NA, or so") for _ in range(20_000))])
    started = time.process_time()
    assert len(rows(path)) == 20_000
    assert time.process_time() - started < 2.0  # 0.1 s when nothing else runs


def test_the_report_of_a_file_is_that_of_its_rows(tmp_path, make_chain):
    path = written(tmp_path, "a.csv", HEAD + "a,b\n,b\na,b\n")
    chain = make_chain()
    report = encode_examples(path, chain.model, chain).report
    assert report == DataReport(2, empty=1, duplicate=1, completion_tokens=report.completion_tokens)
