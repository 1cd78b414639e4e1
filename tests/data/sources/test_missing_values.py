"""Missing values in every dress and every form of an example: counted as empty, never a word of the prompt.

Belongs here: what is missing or blank, and what follows for examples. Does not: files as such (test_readers).
"""

import io
import json
import subprocess
import sys
from collections import namedtuple
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from tiny import PAIRS

from llmchain_fed import DataReport, Example, LocalChatModel, LocalModel, Participant
from llmchain_fed.data.encoding import encode_examples
from llmchain_fed.data.examples import read_examples
from llmchain_fed.data.sources.missing import filled, is_blank, is_missing
from llmchain_fed.data.split import Split
from llmchain_fed.errors import DataError, EmptyParticipantError, PromptVariablesError
from llmchain_fed.federated.participant import hold_out

MARKERS = {
    "None": None,
    "float": float("nan"),
    "numpy float": np.float32("nan"),
    "numpy double": np.float64("nan"),
    "numpy array of none": np.array(float("nan")),
    "numpy time": np.datetime64("NaT"),
    "numpy span": np.timedelta64("NaT"),
    "numpy masked": np.ma.masked,
    "numpy text of a NaN": np.array(["a", np.nan])[1],
    "pandas NA": pd.NA,
    "pandas NaT": pd.NaT,
    "pyarrow null": pa.scalar(None),
    "pyarrow null text": pa.scalar(None, pa.string()),
    "pyarrow NaN": pa.scalar(float("nan")),
    "decimal": Decimal("NaN"),
    "signalling decimal": Decimal("sNaN"),
    "complex": complex("nan"),
    "torch": torch.tensor(float("nan")),
    "list": ["a", None],
    "set": {None},
    "nested": {"a": [1.0, float("nan")]},
}
BLANKS = {"empty": "", "spaces": " \t\n", "no-break": "\xa0", "byte order mark": "\ufeff", "zero width": "\u200b\u2060"}
PRESENT = {
    "word": "nan", "None as a word": "None", "zero": 0, "false": False, "infinite": float("inf"), "empty list": [],
    "array": np.array([1.0, 2.0]), "time": pd.Timestamp("2026-01-01"), "decimal": Decimal(1), "private use": "\ue000",
    "mapping of nulls": {"name": None}, "tensor": torch.tensor([1.0, 2.0]), "numpy word": np.str_("none"),
}  # fmt: skip


@pytest.mark.parametrize("dress", MARKERS)
def test_markers_are_missing(dress):
    assert is_missing(MARKERS[dress])
    assert is_blank(MARKERS[dress])


@pytest.mark.parametrize("dress", PRESENT)
def test_values_are_not(dress):
    assert not is_missing(PRESENT[dress])
    assert not is_blank(PRESENT[dress])


@pytest.mark.parametrize("dress", BLANKS)
def test_texts_without_ink_are_blank_but_not_missing(dress):
    assert is_blank(BLANKS[dress])
    assert not is_missing(BLANKS[dress])


ROWS = {
    "tuple": lambda x, c: (x, c),
    "list": lambda x, c: [x, c],
    "tuple with a mapping": lambda x, c: ({"text": x}, c),
    "mapping": lambda x, c: {"text": x, "completion": c},
    "Example": lambda x, c: Example({"text": x}, c),
    "named tuple": lambda x, c: namedtuple("Row", "completion text")(c, x),
}


@pytest.mark.parametrize("form", ROWS)
def test_a_row_without_a_value_counts_as_empty_in_every_form(form, make_chain):
    chain = make_chain()
    alone = encode_examples(PAIRS[:2], chain.model, chain)
    for dress, marker in (MARKERS | BLANKS).items():
        if isinstance(marker, dict) and form in ("tuple", "list"):
            continue  # there it would be the variables
        label = None if isinstance(marker, (list, set, dict)) else marker  # these are no completions
        for x, c in ((marker, "seite"), ("page", label), (marker, label)):
            encoded = encode_examples([PAIRS[0], ROWS[form](x, c), PAIRS[1]], chain.model, chain)
            assert encoded.report == DataReport(2, empty=1, completion_tokens=alone.report.completion_tokens), dress
            assert encoded.tokens.tolist() == alone.tokens.tolist()


def test_an_input_as_a_whole_may_be_missing_whatever_the_variables(make_chain):
    chain = make_chain(prompt="{a} and {b}:")
    rows = [(None, "c"), (float("nan"), "c"), Example(inputs="", completion="c"), ({"a": "x", "b": None}, "c")]
    assert encode_examples(rows, chain.model, chain).report == DataReport(empty=4)


@pytest.mark.parametrize("marker", [None, float("nan"), ""])
def test_final_text_may_be_missing(marker, make_model):
    rows = [{"prompt": marker, "completion": "c"}, (marker, "c"), {"prompt": "a", "completion": marker}]
    assert encode_examples(rows, make_model()).report == DataReport(empty=3)


def test_a_missing_key_is_an_error_all_the_same(make_chain):
    chain = make_chain()
    for row in ({"txt": None, "completion": "c"}, ({}, "c"), ({"txt": ""}, None)):
        with pytest.raises(PromptVariablesError, match=r"\['text'\] is missing"):
            encode_examples([row], chain.model, chain)
    with pytest.raises(DataError, match="no 'completion'"):
        encode_examples([{"text": None}], chain.model, chain)


def test_the_word_nan_is_text(make_chain, tokenizer):
    chain = make_chain()
    encoded = encode_examples([("nan", "brot"), {"text": "None", "completion": "nan"}], chain.model, chain)
    assert encoded.report.used == 2
    assert "nan" in tokenizer.decode(encoded[0][0])


def test_a_frame_a_list_a_file_and_a_dataset_are_treated_alike(make_chain, tmp_path):
    """The empty cells of the file are missing; the same rows are left out everywhere."""
    text = 'text,completion\nwelt,erde\n,mond\nsonne,\n"",a\nb,""\n"NA",c\nnan,null\n,\n" ",e\nhell,dunkel\n'
    path = tmp_path / "a.csv"
    path.write_text(text)
    frame = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    rows = frame.to_dict("records")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))  # Python's writer: NaN
    frame.to_json(tmp_path / "b.jsonl", orient="records", lines=True)  # pandas' writer: null
    nulls = [{k: None if is_missing(v) else v for k, v in row.items()} for row in rows]
    sources = {
        "CSV": path, "records": rows, "frame": frame, "pairs": [(r["text"], r["completion"]) for r in rows],
        "tuples": frame.itertuples(index=False), "JSONL with NaN": tmp_path / "a.jsonl",
        "JSONL with null": tmp_path / "b.jsonl", "Dataset": datasets.Dataset.from_list(nulls),
        "nullable": frame.convert_dtypes(), "objects": frame.astype(object).where(frame.notna(), None),
        "table": pa.Table.from_pandas(frame), "dataset of pandas": datasets.Dataset.from_pandas(frame),
    }  # fmt: skip
    chain = make_chain()
    expected = encode_examples([("welt", "erde"), ("NA", "c"), ("nan", "null"), ("hell", "dunkel")], chain.model, chain)
    for name, source in sources.items():
        encoded = encode_examples(source, chain.model, chain)
        assert encoded.report == DataReport(4, empty=6, completion_tokens=expected.report.completion_tokens), name
        assert encoded.tokens.tolist() == expected.tokens.tolist(), name


def test_a_written_frame_comes_back_with_the_same_missing_values_and_the_same_words(make_chain, tmp_path):
    """A class that is called None is learnt from the file that pandas writes as from the frame."""
    labels = ["minor", "None", None, "NA", float("nan"), "n/a", "null"]
    frame = pd.DataFrame(
        {"text": [f"alarm {at}" for at in range(7)], "completion": labels, "age": [63, None, *range(5)]}
    )
    frame.loc[6, "text"] = None
    chain = make_chain(prompt="{text}:")
    for age in (False, True):
        chain = make_chain(prompt="{age} {text}:" if age else "{text}:")
        for name, separator in (("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")):
            frame.astype({"age": "Int64"}).to_csv(tmp_path / name, index=False, sep=separator)
            found = encode_examples(tmp_path / name, chain.model, chain)
            assert (found.report.used, found.report.empty) == ((3, 4) if age else (4, 3))
            assert found.tokens.tolist() == encode_examples(frame, chain.model, chain).tokens.tolist()


def test_whole_numbers_of_a_frame_are_whole_where_others_are_missing(make_chain):
    """pandas makes floats of them; what is asked with is "Age 63", not "Age 63.0"."""
    ages = [63, None, *range(3000)]
    frame = pd.DataFrame({"age": ages, "size": [0.5, None, *range(3000)], "weight": 1.0, "completion": "a"})
    found = [e.inputs for e in read_examples(frame, make_chain(prompt="Age {age}"))]
    assert [inputs["age"] for inputs in found] == ["" if age is None else age for age in ages]
    assert {type(inputs["age"]) for inputs in found} == {int, str}
    found = [e.inputs for e in read_examples(frame, make_chain(prompt="{size} {weight}"))]
    assert all(type(inputs["size"]) is float for inputs in found if inputs["size"] != "")
    assert {type(inputs["weight"]) for inputs in found} == {float}
    chain, asked = make_chain(prompt="Age {age}"), PromptTemplate.from_template("Age {age}")
    one = encode_examples(frame[:2], chain.model, chain)
    assert one[0][0] == chain.model.encode([asked.format(age=63)])[0]


def test_a_missing_default_is_no_wish_for_the_default(make_chain):
    """A row that names a variable and gives nothing is incomplete, whether or not the prompt could do without."""
    prompt = PromptTemplate.from_template("{tone}: {text}", partial_variables={"tone": "kind"})
    chain = make_chain(prompt=prompt)
    rows = [{"text": "a", "tone": float("nan"), "completion": "b"}, {"text": "a", "completion": "b"}]
    encoded = encode_examples(rows, chain.model, chain)
    assert (encoded.report.used, encoded.report.empty) == (1, 1)
    assert encoded[0][0] == chain.model.encode(["kind: a"])[0]


def test_a_missing_history_is_not_rendered_and_an_empty_one_is(make_model):
    from llmchain_fed import LLMChain

    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", "{text}")])
    chain = LLMChain(llm=LocalChatModel(model=make_model()), prompt=prompt)
    rows = [
        {"history": None, "text": "a", "completion": "b"},
        {"history": float("nan"), "text": "a", "completion": "b"},
        {"history": [], "text": "a", "completion": "b"},
        {"history": [HumanMessage("x"), AIMessage("y")], "text": "a", "completion": "b"},
    ]
    report = encode_examples(rows, chain.model, chain).report
    assert (report.used, report.empty) == (2, 2)
    assert is_blank([HumanMessage(" ")])
    assert not is_blank([AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])])


@pytest.mark.parametrize("value", [float("inf"), -np.inf, np.float64("inf")])
def test_an_infinite_number_is_refused_from_a_list_as_from_a_file(value, make_chain):
    with pytest.raises(DataError, match="example 0: `text` is infinite"):
        encode_examples([({"text": value}, "c")], make_chain().model, make_chain())


@pytest.mark.parametrize("value", [b"abc", bytearray(b"abc"), np.bytes_(b"abc")])
def test_bytes_are_refused_as_inputs_and_as_completions(value, make_chain):
    chain = make_chain()
    with pytest.raises(DataError, match="Decode it first"):
        encode_examples([({"text": value}, "c")], chain.model, chain)
    with pytest.raises(DataError, match="completion is text"):
        encode_examples([("a", value)], chain.model, chain)


@pytest.mark.parametrize(
    "label", [1, True, 1.5, np.int64(1), np.float32(2), np.bool_(True), Decimal(1), ["a"], {"a": 1}]
)
def test_labels_that_are_no_text_are_refused(label, make_chain):
    chain = make_chain()
    with pytest.raises(DataError, match=r"example 0.*completion is text, got"):
        encode_examples([("a", label)], chain.model, chain)


def test_texts_of_numpy_are_texts(make_chain):
    chain = make_chain()
    found = encode_examples([(np.str_(t), np.str_(c)) for t, c in PAIRS], chain.model, chain)
    assert found.tokens.tolist() == encode_examples(PAIRS, chain.model, chain).tokens.tolist()
    assert found.report.used == len(PAIRS)


def test_a_number_beyond_what_python_writes_is_refused(make_chain):
    chain = make_chain()
    with pytest.raises(DataError, match="example 0: `text` is a number of more digits"):
        encode_examples([({"text": 10**4301}, "c")], chain.model, chain)


def test_odd_keys_are_named_and_not_raised_on(make_chain):
    chain = make_chain()
    for key in ("\ud800", 1, None, ("a",), float("nan")):
        with pytest.raises(PromptVariablesError, match="unknown") as error:
            encode_examples([{"text": "a", key: "b", "completion": "c"}], chain.model, chain)
        str(error.value).encode()


def test_a_header_among_the_rows_is_refused(make_chain):
    chain = make_chain()
    for rows in ([["text", "completion"], ["a", "b"]], [{"text": "text", "completion": "completion"}]):
        with pytest.raises(DataError, match=r"example 0.*names of the columns"):
            list(read_examples(rows, chain))
    assert len(list(read_examples([("text", "Text"), ("completion", "completion")], chain))) == 2
    with pytest.raises(DataError, match="got Series"):  # compared with care
        list(read_examples(pd.DataFrame([("a", "b")], columns=["text", "completion"]).iterrows(), chain))


def test_a_consumed_generator_is_refused(make_chain):
    chain, rows = make_chain(), (pair for pair in PAIRS)
    assert encode_examples(rows, chain.model, chain).report.used == len(PAIRS)
    with pytest.raises(DataError, match=r"read to its end before.*list\(generator\)"):
        encode_examples(rows, chain.model, chain)


def test_a_share_is_held_out_of_what_is_not_empty(make_chain):
    rows = [*PAIRS, (None, "a"), ("b", None)]
    divided = hold_out(Participant("a", rows), Split(0.25), make_chain(), seed=0)
    assert not any(e.empty for e in divided.held_out)
    assert sum(e.empty for e in divided.examples) == 2
    same = hold_out(Participant("a", PAIRS), Split(0.25), make_chain(), seed=0)
    assert divided.held_out == same.held_out
    with pytest.raises(EmptyParticipantError, match="0 usable examples"):
        hold_out(Participant("a", [(None, "a")] * 8), Split(0.25), make_chain(), seed=0)


def test_rows_are_left_as_they_are():
    row = {"text": None, "completion": "b"}
    filled(row)
    assert row == {"text": None, "completion": "b"}
    whole = {"text": "a", "completion": "b"}
    assert filled(whole) is whole


def test_nothing_is_imported_to_tell():
    """The test of a value asks its type's name; pandas, pyarrow and numpy stay out of a process without them."""
    code = (
        "import importlib.util, sys, types;"
        "spec = importlib.util.spec_from_file_location('missing', sys.argv[1]);"
        "found = importlib.util.module_from_spec(spec); spec.loader.exec_module(found);"
        "assert found.is_missing(float('nan'));"
        "print([n for n in ('numpy', 'pandas', 'pyarrow', 'polars', 'torch') if n in sys.modules])"
    )
    from llmchain_fed.data.sources import missing

    done = subprocess.run([sys.executable, "-c", code, missing.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_chain_a_blank_text_is_empty_too(make_model):
    assert isinstance(make_model(), LocalModel)
    assert encode_examples([("  ", "a"), ("b", "c")], make_model()).report.empty == 1
