"""Examples of every form → token ids, the report, batches and their order.

Belongs here: reading, encoding, collating. Does not: what the loss makes of labels (test_loss).
"""

import csv
import json
import pydoc
import re
from pathlib import Path

import datasets
import pytest
import torch
from tiny import PAIRS, TEMPLATE
from torch.utils.data import DataLoader

from llmchain_fed import DataReport, Example, LocalModel, RawText
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.data.examples import is_ready_tensors, read_examples
from llmchain_fed.data.sayable import _REMEDY
from llmchain_fed.data.variables import carries
from llmchain_fed.errors import DataError, PromptVariablesError, TemplatedTwiceError

EOS, PAD = 1, 0


def by_hand(tokenizer, pairs, template=TEMPLATE):
    """Prompt ids and completion ids + end token, each text tokenised on its own."""
    rows = []
    for text, completion in pairs:
        prompt_ids = tokenizer(template.replace("{text}", text), add_special_tokens=False)["input_ids"]
        rows.append((prompt_ids, [*tokenizer(completion, add_special_tokens=False)["input_ids"], EOS]))
    return rows


def test_rows_are_numbered_as_pythons_are(make_chain):
    chain = make_chain()
    encoded = encode_examples(PAIRS[:3], chain.model, chain)
    assert [encoded[i - 3] for i in range(3)] == [encoded[i] for i in range(3)]
    for beyond in (3, -4):
        with pytest.raises(IndexError, match=f"no row {beyond}: 3 examples have the rows 0 to 2"):
            encoded[beyond]


def rows_of(encoded):
    return [encoded[i] for i in range(len(encoded))]


def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"text": t, "completion": c}, ensure_ascii=False) for t, c in PAIRS]
    path.write_text("\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n", encoding="utf-8")
    return str(path)


def csv_file(tmp_path: Path, encoding: str = "utf-8") -> Path:
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "completion"])
        writer.writerows(PAIRS)
    return path


FORMS = {
    "tuple with dict": lambda _: [({"text": t}, c) for t, c in PAIRS],
    "tuple with string": lambda _: PAIRS,
    "list of two": lambda _: [[t, c] for t, c in PAIRS],
    "dict of variables": lambda _: [{"text": t, "completion": c} for t, c in PAIRS],
    "prompt and completion": lambda _: [{"prompt": t, "completion": c} for t, c in PAIRS],
    "Example": lambda _: [Example(inputs={"text": t}, completion=c) for t, c in PAIRS],
    "Example with a string": lambda _: [Example(t, c) for t, c in PAIRS],
    "RawText": lambda _: [RawText(TEMPLATE.format(text=t), c) for t, c in PAIRS],
    "generator": lambda _: (pair for pair in PAIRS),
    "JSONL": jsonl,
    "CSV": csv_file,
    "CSV of a spreadsheet": lambda tmp_path: csv_file(tmp_path, "utf-8-sig"),
    "Dataset": lambda _: datasets.Dataset.from_list([{"text": t, "completion": c} for t, c in PAIRS]),
    "Dataset of prompts": lambda _: datasets.Dataset.from_list([{"prompt": t, "completion": c} for t, c in PAIRS]),
}
SAID = {"RawText": "raw", "prompt and completion": "prompt_as_input", "Dataset of prompts": "prompt_as_input"}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_ids_as_encoding_by_hand(form, kind, make_chain, tokenizer, tmp_path):
    chain = make_chain(kind)
    encoded = encode_examples(FORMS[form](tmp_path), chain.model, chain)
    expected = by_hand(tokenizer, PAIRS)
    assert rows_of(encoded) == expected
    assert encoded.lengths() == [len(p) + len(c) for p, c in expected]
    said = {SAID[form]: len(PAIRS)} if form in SAID else {}
    assert encoded.report == DataReport(used=len(PAIRS), completion_tokens=sum(len(c) for _, c in expected), **said)


def test_without_a_chain_a_string_is_the_prompt_itself(make_model, tokenizer):
    encoded = encode_examples(PAIRS, make_model())
    assert rows_of(encoded) == by_hand(tokenizer, PAIRS, "{text}")


def test_a_chain_of_two_variables(make_chain, tokenizer):
    chain = make_chain(prompt="{a} and {b}:")
    encoded = encode_examples(
        [({"a": "page", "b": "file"}, "x"), {"b": "file", "a": "page", "completion": "x"}], chain.model, chain
    )
    assert rows_of(encoded) == [(tokenizer("page and file:")["input_ids"], [*tokenizer("x")["input_ids"], EOS])] * 2


def test_a_variable_named_prompt_is_a_variable(make_chain, tokenizer):
    chain = make_chain(prompt="say: {prompt}!")
    encoded = encode_examples([{"prompt": "page", "completion": "x"}], chain.model, chain)
    assert encoded[0][0] == tokenizer("say: page!")["input_ids"]


def test_nothing_merges_across_the_border(make_model, tokenizer):
    prompt, completion = "save the pa", "ge"
    joint = tokenizer(prompt + completion)["input_ids"]
    apart = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
    assert joint != apart  # or this pair would test nothing
    p, c = encode_examples([(prompt, completion)], make_model())[0]
    assert p + c == [*apart, EOS]


def test_training_prompt_bytes_are_invoke_prompt_bytes(battery, monkeypatch):
    """Invariant 7: the ids the model is trained on are the ids that invoke feeds it."""
    chain = battery(max_new_tokens=1)
    fed = []
    inner = chain.model._generate_ids
    monkeypatch.setattr(chain.model, "_generate_ids", lambda rows, *a, **k: fed.extend(rows) or inner(rows, *a, **k))
    for text in ("page locked", " a  b\n", "é{x}", "</s>"):
        fed.clear()
        chain.invoke({"text": text})
        assert fed == [encode_examples([(text, "x")], chain.model, chain)[0][0]]


# --- batches ------------------------------------------------------------------------------------------------------


def test_causal_batches_mask_the_prompt_by_length(make_model):
    batch = collate([([5, 6], [7, 1]), ([5], [8, 9, 5, 1]), ([5, 6, 7], [1])], make_model())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, PAD], [5, 8, 9, 5, 1], [5, 6, 7, 1, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 1, -100], [-100, 8, 9, 5, 1], [-100, -100, -100, 1, -100],
    ]  # fmt: skip


def test_seq2seq_batches_have_the_completion_as_labels(make_model):
    batch = collate([([5, 6], [7, 1]), ([5], [8, 9, 1])], make_model("seq2seq"))
    assert batch["input_ids"].tolist() == [[5, 6], [5, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]


def test_the_end_token_is_learnt_even_where_it_is_the_padding_token(make_model, tokenizer):
    """Masking labels by the pad id would unlearn the end for tokenizers whose pad token is the end token."""
    shared = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="</s>", eos_token="</s>")
    model = LocalModel(make_model().module, shared)
    assert model.pad_id == EOS
    batch = collate([([5, 6], [7, EOS]), ([5], [EOS])], model)
    assert batch["labels"].tolist() == [[-100, -100, 7, EOS], [-100, EOS, -100, -100]]


def test_a_tokenizer_without_padding_token(make_model, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    model = LocalModel(make_model().module, bare)
    encoded = encode_examples(PAIRS[:2], model)
    batch = collate(rows_of(encoded), model)
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()


# --- what is left out is counted --------------------------------------------------------------------------------


def test_the_report_counts_what_is_empty_duplicate_and_too_long(make_chain, tokenizer):
    chain = make_chain()
    long = "page " * 200
    source = [PAIRS[0], PAIRS[1], PAIRS[0], ("x", ""), ("y", "  \n"), (long, "z"), ("z", long)]
    encoded = encode_examples(source, chain.model, chain)
    assert encoded.report == DataReport(
        used=3, empty=2, too_long=2, duplicate=1,
        completion_tokens=sum(len(c) for _, c in by_hand(tokenizer, [PAIRS[0], PAIRS[1], PAIRS[0]])),
    )  # fmt: skip
    assert rows_of(encoded) == by_hand(tokenizer, [PAIRS[0], PAIRS[1], PAIRS[0]])
    assert repr(encoded.report).startswith("DataReport(used=3, empty=2, too_long=2, duplicate=1, completion_tokens=")


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_max_length_leaves_out_whole_examples_and_cuts_nothing(kind, make_chain, tokenizer):
    chain = make_chain(kind)
    rows = by_hand(tokenizer, PAIRS)
    sizes = [len(p) + len(c) if kind == "causal" else max(len(p), len(c)) for p, c in rows]
    limit = sorted(sizes)[len(sizes) // 2]
    encoded = encode_examples(PAIRS, chain.model, chain, max_length=limit)
    assert rows_of(encoded) == [row for row, size in zip(rows, sizes, strict=True) if size <= limit]
    assert encoded.report.too_long == sum(size > limit for size in sizes) > 0


def test_the_context_is_the_outer_limit(make_chain):
    """128 positions in the tiny Llama: an example of exactly 128 tokens is used, one of 129 is left out."""
    chain = make_chain()
    prompt = chain.model.encode([TEMPLATE.format(text="a")])[0]
    for extra, used in ((0, 1), (1, 0)):
        completion = "x" * (128 - len(prompt) - 1 + extra)
        assert len(chain.model.tokenizer(completion)["input_ids"]) == len(completion)
        report = encode_examples([("a", completion)], chain.model, chain, max_length=10_000).report
        assert (report.used, report.too_long) == (used, 1 - used)


def test_no_example_is_no_error_while_encoding(make_chain):
    chain = make_chain()
    encoded = encode_examples([], chain.model, chain)
    assert len(encoded) == 0
    assert encoded.report == DataReport()


def test_a_dataloader_is_taken_as_it_is():
    assert is_ready_tensors(DataLoader([1, 2]))
    assert not is_ready_tensors([1, 2])


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown variable": ([({"text": "a", "tone": "b"}, "c")], PromptVariablesError, r"example 0.*'tone'.*unknown"),
    "missing variable": ([{"txt": "a", "completion": "c"}], PromptVariablesError, r"\['text'\] is missing"),
    "second is bad": ([PAIRS[0], ({}, "c")], PromptVariablesError, "example 1"),
    "input is a number": ([(5, "c")], PromptVariablesError, "int"),
    "completion is a number": ([("a", 1)], DataError, "completion is text, got int"),
    "completion is a list": ([{"text": "a", "completion": ["c"]}], DataError, "got list"),
    "completion is bytes": ([({"text": "a"}, b"c")], DataError, "got bytes"),
    "no completion": ([{"text": "a"}], DataError, "no 'completion'"),
    "input and output": ([{"input": "a", "output": "b"}], DataError, r"columns=\{'completion': …, 'text': …\}"),
    "response": ([{"text": "a", "response": "b"}], DataError, r"columns=\{'completion': …\}"),
    "a templated row": ([{"prompt": TEMPLATE.format(text="a"), "completion": "c"}], TemplatedTwiceError, "RawText"),
    "an integer": ([3], DataError, "cannot read 3"),
    "a bare string": (["ab"], DataError, "cannot read 'ab'"),
    "three parts": ([("a", "b", "c")], DataError, "cannot read"),
    "templated": ([(TEMPLATE.format(text="a"), "c")], TemplatedTwiceError, "templated twice"),
    "templated variable": ([({"text": TEMPLATE.format(text="a") + " "}, "c")], TemplatedTwiceError, "`text`"),
    "a mapping": ({"text": "a", "completion": "c"}, DataError, "got dict"),
    "bytes": (b"abc", DataError, "got bytes"),
    "a number": (7, DataError, "got int"),
    "None": (None, DataError, "got NoneType"),
    "no such file": ("nowhere.jsonl", DataError, "no file 'nowhere.jsonl'"),
    "a folder": (".", DataError, "no file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_examples_are_refused_by_name_and_reason(case, make_chain):
    source, error, reason = REFUSED[case]
    chain = make_chain()
    with pytest.raises(error, match=reason):
        encode_examples(source, chain.model, chain)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "a", "completion": "b"}\n{"text": oops}\n', r"a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a", "completion": 5}\n', "example 0.*got int"),
        ("a.jsonl", b'{"text": "caf\xe9", "completion": "b"}\n', r"a.jsonl.*UTF-8"),
        ("a.csv", b"text,completion\ncaf\xe9,b\n", r"a.csv.*UTF-8"),
        ("a.csv", b"text,completion\na\n", r"a.csv, line 2 has 1 cells under 2 columns"),
        ("a.csv", b"text,completion\na,b,c\n", r"a.csv, line 2 has 3 cells under 2 columns"),
        ("a.csv", b'text,completion\n"a"x,b\n', "a.csv.*not CSV"),
        ("a.parquet", b"PAR1", r"a\.parquet is no whole Parquet file \(row 0\)"),
        ("a.xlsx", b"PK", r"read from \.csv, \.tsv, \.json.*not \.xlsx"),
        ("data", b"x", "without a suffix"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(name, content, reason, tmp_path, make_chain):
    path = tmp_path / name
    path.write_bytes(content)
    chain = make_chain()
    with pytest.raises(DataError, match=reason):
        encode_examples(path, chain.model, chain)


def test_one_string_for_two_variables_is_refused(make_chain):
    chain = make_chain(prompt="{a} {b}")
    with pytest.raises(PromptVariablesError, match=r"\['a', 'b'\]"):
        encode_examples([("x", "y")], chain.model, chain)


def test_a_prompt_row_for_two_variables_is_refused(make_chain):
    chain = make_chain(prompt="{a} {b}")
    with pytest.raises(PromptVariablesError, match=r"\['a', 'b'\].*RawText"):
        encode_examples([{"prompt": "x", "completion": "y"}], chain.model, chain)


def test_variables_without_a_chain_are_refused(make_model):
    for rows in ([({"text": "a"}, "b")], [{"text": "a", "completion": "b"}]):
        with pytest.raises(DataError, match=r"RawText|no template"):
            encode_examples(rows, make_model())


def test_raw_text_and_examples_contain_text():
    with pytest.raises(DataError, match="got int"):
        Example(inputs="a", completion=5)
    with pytest.raises(DataError, match="got dict as `prompt`"):
        RawText({"text": "a"}, "b")
    with pytest.raises(DataError, match="got list as `completion`"):
        RawText("a", [])


def test_text_that_only_mentions_the_template_is_no_error(make_chain):
    chain = make_chain()
    for text in ("How do I say 'Translate to French: x' politely?", "Translate to", "French"):
        assert [e.inputs for e in read_examples([(text, "b")], chain)] == [text]
    assert not carries("a: b", ["", ": ", ""])  # too few letters to tell a template by


def test_labels_are_never_found_by_searching(make_chain, tokenizer):
    """A prompt that contains its own completion, or the template's marker, is masked all the same."""
    chain = make_chain(prompt="Q: {text} A:")
    batch = collate(rows_of(encode_examples([("A: x A: x", "x")], chain.model, chain)), chain.model)
    answer = [*tokenizer("x")["input_ids"], EOS]
    prompt = tokenizer("Q: A: x A: x A:")["input_ids"]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + answer]
    assert batch["input_ids"].tolist() == [prompt + answer]
    assert batch["labels"].dtype == torch.int64


def test_what_a_remedy_names_is_there():
    named = [name for text in _REMEDY.values() for name in re.findall(r"llmchain_fed[\w.]+\w", text)]
    assert named
    assert [name for name in named if pydoc.locate(name) is None] == []
