"""columns=: which column of a table is which variable; what nobody reads is counted.

Belongs here: names of columns. Does not: what a file may be (test_readers, test_files), values (test_missing_values).
"""

import csv
import json

import datasets
import pandas as pd
import polars
import pyarrow as pa
import pytest
from langchain_core.prompts import PromptTemplate
from tiny import PAIRS

from llmchain_fed import Example, FederatedAveraging, LocalModel, Participant, RawText
from llmchain_fed.data import encode_examples, read_examples
from llmchain_fed.errors import ConfigError, DataError, PromptVariablesError

COLUMNS = {"text": "english", "completion": "french"}
ROWS = [{"id": at, "english": x, "french": y, "note": None} for at, (x, y) in enumerate(PAIRS)]


def tables(tmp_path, rows=ROWS):
    """The same rows in every kind of table."""
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "b.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "c.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "f.json").write_text(json.dumps(rows, indent=1))
    files = {path.name: path for path in sorted(tmp_path.iterdir())}
    return files | {
        "pandas": frame,
        "polars": polars.DataFrame(rows),
        "arrow": pa.Table.from_pylist(rows),
        "batch": pa.Table.from_pylist(rows).to_batches()[0],
        "datasets": datasets.Dataset.from_list(rows),
        "iterable": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "reader": csv.DictReader((tmp_path / "a.csv").read_text().splitlines()),
    }


def test_columns_are_found_in_every_table_and_the_others_counted(tmp_path, make_chain):
    chain = make_chain()
    expected = encode_examples(PAIRS, chain.model, chain)
    for name, source in tables(tmp_path).items():
        found = encode_examples(source, chain.model, chain, columns=COLUMNS)
        assert found.tokens.tolist() == expected.tokens.tolist(), name
        assert (found.report.used, found.report.ignored_columns) == (len(PAIRS), 2), name
        assert found.report.in_words().endswith(", 2 columns not read (id, note)"), name
        assert "ignored_columns=2" in repr(found.report)


def test_columns_of_the_right_names_need_no_mapping_and_the_others_are_counted(tmp_path, make_chain):
    chain = make_chain()
    rows = [{"text": x, "completion": y, "patient_id": 1} for x, y in PAIRS]
    for name, source in tables(tmp_path, rows).items():
        found = encode_examples(source, chain.model, chain)
        assert (found.report.used, found.report.ignored_names) == (len(PAIRS), ("patient_id",)), name


def test_rows_of_a_list_are_strict_unless_columns_say_what_counts(make_chain):
    chain = make_chain()
    rows = [{"text": "a", "completion": "b", "tone": "kind"}]
    with pytest.raises(PromptVariablesError, match=r"'tone'\] is unknown"):
        encode_examples(rows, chain.model, chain)
    found = encode_examples(rows, chain.model, chain, columns={"completion": "completion"})
    assert (found.report.used, found.report.ignored_names) == (1, ("tone",))


def test_what_has_no_columns_is_as_it_was(make_chain):
    chain = make_chain()
    rows = [PAIRS[0], Example({"text": "a"}, "b"), RawText("c", "d"), {"english": "e", "french": "f"}]
    found = list(read_examples(rows, chain, columns=COLUMNS))
    assert found == [Example(*PAIRS[0]), rows[1], rows[2], Example({"text": "e"}, "f")]


def test_an_optional_variable_may_be_a_column_or_not(make_chain):
    prompt = PromptTemplate.from_template("{tone}: {text}", partial_variables={"tone": "kind"})
    rows = [{"text": "a", "completion": "b", "mood": "stern"}]
    chain = make_chain(prompt=prompt)
    assert next(read_examples(pd.DataFrame(rows), chain)).inputs == {"text": "a"}
    found = next(read_examples(pd.DataFrame(rows), chain, columns={"tone": "mood"}))
    assert found.inputs == {"text": "a", "tone": "stern"}


def test_the_forms_of_other_tables_are_columns_too(make_chain):
    """TRL's rows, and conversations, with what data sets have beside them."""
    model = make_chain().model
    trl = pd.DataFrame([{"prompt": "a", "completion": "b", "source": "web"}])
    assert next(read_examples(trl)) == RawText("a", "b")
    assert next(read_examples(trl, make_chain())).inputs == {"text": "a"}
    renamed = pd.DataFrame([{"q": "a", "a": "b", "n": 1}])
    assert next(read_examples(renamed, columns={"prompt": "q", "completion": "a"})) == RawText("a", "b")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = datasets.Dataset.from_list([{"conversation": said, "id": 7}])
    found = next(read_examples(talk, make_chain(), columns={"messages": "conversation"}))
    assert [message["content"] for message in found.dialogue.messages] == ["a", "b"]
    assert found.dialogue.variables == {}
    assert isinstance(model, LocalModel)


REFUSED = {
    "no such column": ({"text": "englsh"}, r"^example 0: there is no column 'englsh'; there are \['english', 'french'"),
    "no completion": ({"text": "english"}, r"there are the columns \['english', .* and \['completion'\] is missing"),
    "no variable": ({"completion": "french"}, r"\['text'\] is missing.*columns=\{'text': …\}"),
    "strange name": ({"txt": "english"}, r"columns names \['txt'\], and the prompt takes \['text'\] and 'completion'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_missing_column_is_one_error_that_lists_those_that_are_there(case, make_chain):
    columns, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason):
        list(read_examples(pd.DataFrame(ROWS), make_chain(), columns=columns))


def test_an_error_about_a_value_names_file_line_and_column(tmp_path, make_chain):
    path = tmp_path / "a.jsonl"
    path.write_text('{"english": "a", "french": "b"}\n{"english": "c", "french": 5}\n')
    with pytest.raises(DataError, match=r"^example 1 \(a\.jsonl, line 2\): a completion is text.*column 'french'"):
        list(read_examples(path, make_chain(), columns=COLUMNS))
    path.write_text('{"english": "a", "french": "b"}\n{"english": "Translate to French: c", "french": "d"}\n')
    with pytest.raises(DataError, match=r"line 2\): `text` already.*`text` is the column 'english'"):
        list(read_examples(path, make_chain(), columns=COLUMNS))


@pytest.mark.parametrize("columns", [{}, "text", ["text"], {"text": None}, {1: "text"}, {"text": True}])
def test_columns_are_a_mapping_of_names(columns, make_chain):
    for make in (lambda: Participant("a", PAIRS, columns=columns), lambda: read_examples(PAIRS, columns=columns)):
        with pytest.raises(ConfigError, match="columns is a mapping"):
            make()
    with pytest.raises(ConfigError, match="columns is a mapping"):
        FederatedAveraging(make_chain(), participants={"a": PAIRS}, columns=columns)


def test_a_federation_reads_columns_wherever_examples_come_in(make_chain):
    """Of participants without their own, of one that comes later, of evaluation as examples, and of evaluate()."""
    frame = pd.DataFrame(ROWS)
    own = Participant("b", frame.rename(columns={"english": "en"}), columns={"text": "en", "completion": "french"})
    options = {"lr": 1e-3, "batch_size": 4, "progress": False, "samples": 0}
    fed = FederatedAveraging(
        make_chain(), participants=[Participant("a", frame), own, Participant("c", PAIRS)], columns=COLUMNS,
        evaluation=frame[:4], **options,
    )  # fmt: skip
    plain = FederatedAveraging(make_chain(), participants=dict.fromkeys("abc", PAIRS), evaluation=PAIRS[:4], **options)
    records = [each.fit(rounds=1)[0] for each in (fed, plain)]
    assert records[0].held_out_after == records[1].held_out_after
    assert fed.evaluate(frame[4:]).loss == plain.evaluate(PAIRS[4:]).loss
    assert fed.config.columns == COLUMNS
    assert fed.data_reports["a"].ignored_names == ("id", "note")
    assert fed.data_reports["c"].ignored_columns == 0
    assert len(fed.preview("a").examples) == 1
    later = FederatedAveraging(make_chain(), columns=COLUMNS, **options)
    assert later.train(frame, "a").examples == len(PAIRS)


def test_names_of_columns_do_not_travel(make_chain):
    """What a participant says when it joins has their count alone."""
    fed = FederatedAveraging(make_chain(), participants={"a": pd.DataFrame(ROWS)}, columns=COLUMNS, progress=False)
    fed.fit(rounds=1)
    hello = fed._server.client_manager.joined["a"]
    assert hello.report["ignored_columns"] == 2
    assert "note" not in hello.model_dump_json()
