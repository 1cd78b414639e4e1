"""Ids of large files on the disk: the same as made anew, or made anew.

Belongs here: what is kept, for whom, and what is never given back. Does not: how ids are made (test_encoding).
"""

import json
import os
import random
import stat
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableLambda
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, LLMChain, Split
from llmchain_fed.data import cache, encode_examples, encoding, read_examples, sides
from llmchain_fed.data.encoder import Encoder
from llmchain_fed.data.sides import divide
from llmchain_fed.data.split import position
from llmchain_fed.errors import UnsayableError
from llmchain_fed.model.loading import cache_folder

ARRAYS = ("tokens", "bounds", "starts")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache of every test is its own, and keeps small files too."""
    monkeypatch.delenv("LLMCHAIN_FED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 1)
    return tmp_path / "cache" / "llmchain_fed" / "examples"


@pytest.fixture
def made(monkeypatch):
    """How many examples have been encoded so far, those looked at to check a cache left out."""
    counted = []

    class Counting(Encoder):
        def add(self, examples):
            counted.extend(examples)
            super().add(examples)

    monkeypatch.setattr(encoding, "Encoder", Counting)
    monkeypatch.setattr(encoding, "_LOOKED_AT", 0)
    return counted


def table(tmp_path, rows=PAIRS, name="a.csv"):
    path = tmp_path / name
    numbered = [(*row, at) for at, row in enumerate(rows)]
    pd.DataFrame(numbered, columns=["text", "completion", "id"]).to_csv(path, index=False)
    return path


def same(one, other):
    ids = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    return ids and asdict(one.report) == asdict(other.report)


def test_a_second_start_gives_the_same_without_making_it(tmp_path, folder, made, make_chain):
    rows = [*PAIRS, ("", "x"), *PAIRS[:2], ("word " * 300, "y"), ("z", "a</s>b")]
    path = table(tmp_path, rows)
    first = encode_examples(path, make_chain().model, make_chain())
    assert len(made) == len(rows)
    second = encode_examples(path, make_chain().model, make_chain())  # of another process: nothing is shared
    assert len(made) == len(rows)
    assert same(first, second)
    assert second.report.ignored_names == ("id",)
    assert second.first_left_out == first.first_left_out
    assert [second[at] for at in range(len(second))] == [first[at] for at in range(len(first))]
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder() == folder.parent


def test_what_decides_ids_is_in_the_key(tmp_path, folder, made, make_chain):
    """Of each kind of change the ids are those made without a cache, and nothing old comes back."""
    path, chain = table(tmp_path), make_chain()
    encode_examples(path, chain.model, chain)
    template = PromptTemplate.from_template("{tone}: {text}", partial_variables={"tone": "kind"})
    others = {
        "template": (make_chain(prompt="Say in French: {text}\n"), {}),
        "default": (make_chain(prompt=template), {}),
        "another default": (make_chain(prompt=template.partial(tone="stern")), {}),
        "length": (chain, {"max_length": 20}),
        "columns": (chain, {"columns": {"text": "completion", "completion": "text"}}),
        "a call's keyword": (LLMChain(llm=chain.llm, prompt=chain.prompt, llm_kwargs={"max_new_tokens": 2}), {}),
    }
    other_tokens = make_chain()
    other_tokens.model.tokenizer.add_tokens(["page"])
    others["a token"] = (other_tokens, {})
    other_end = make_chain()
    other_end.model.module.generation_config.suppress_tokens = [5]
    others["what may be said"] = (other_end, {})
    for count, (name, (other, options)) in enumerate(others.items(), start=2):
        before = len(made)
        found = encode_examples(path, other.model, other, **options)
        assert len(made) == before + len(PAIRS), name
        assert len(list(folder.iterdir())) == count, name
        assert same(found, encode_examples(pd.read_csv(path), other.model, other, **options)), name
    before = len(made)
    table(tmp_path, [*PAIRS[1:], PAIRS[0]])
    assert encode_examples(path, chain.model, chain)[0] != encode_examples(PAIRS, chain.model, chain)[0]
    assert len(made) == before + 2 * len(PAIRS)


def test_a_file_of_the_cache_that_is_damaged_or_anothers_is_made_anew(tmp_path, folder, made, make_chain):
    path, chain = table(tmp_path), make_chain()
    first = encode_examples(path, chain.model, chain)
    (kept,) = folder.iterdir()
    whole, rng = kept.read_bytes(), random.Random(0)
    head, _, body = whole.partition(b"\n")
    said = json.loads(head)
    damaged = [b"", b"\n", b"{}\n", b"[" * 10**6, whole[:-1], whole + b"\0", head, head + b"\n"]
    changes = [{"key": "0" * 64}, {"counts": [-1, 1, 1]}, {"counts": [10**15] * 3}, {"counts": None}]
    changes += [{"report": {"used": "x"}}, {"report": {"wrong": 1}}, {"digest": 5}]
    damaged += [json.dumps(said | change).encode() + b"\n" + body for change in changes]
    for at in (rng.randrange(len(head) + 1, len(whole)) for _ in range(8)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        before = len(made)
        assert same(encode_examples(path, chain.model, chain), first), content[:80]
        assert len(made) == before + len(PAIRS), content[:80]
        assert kept.read_bytes() == whole
    kept.chmod(0o666)  # somebody else could have written it
    before = len(made)
    encode_examples(path, chain.model, chain)
    assert len(made) == before + len(PAIRS)
    kept.unlink()
    kept.mkdir()
    assert same(encode_examples(path, chain.model, chain), first)


def test_the_first_examples_are_looked_at_again(tmp_path, made, monkeypatch, make_chain):
    """What the key does not see, somebody's patch of a tokenizer say, is seen there."""
    path, chain = table(tmp_path), make_chain()
    encode_examples(path, chain.model, chain)
    monkeypatch.setattr(encoding, "_LOOKED_AT", 8)
    encode = type(chain.model).encode
    monkeypatch.setattr(type(chain.model), "encode", lambda self, *a, **k: [[5, *ids] for ids in encode(self, *a, **k)])
    assert encode_examples(path, chain.model, chain)[0][0][0] == 5


def test_what_cannot_be_described_is_not_kept(tmp_path, folder, make_chain, make_model):
    path, chain = table(tmp_path), make_chain()

    class Own(LLMChain):
        """Somebody's own chain, which may render as it likes."""

    dated = make_chain(prompt=PromptTemplate.from_template("{day} {text}", partial_variables={"day": lambda: "Monday"}))
    encode_examples(path, dated.model, dated)
    own = Own(llm=chain.llm, prompt=chain.prompt)
    encode_examples(path, own.model, own)
    piped = {"text": RunnableLambda(lambda x: x["text"])} | chain
    FederatedAveraging(piped, participants={"a": path}, progress=False, lr=1e-3).fit(rounds=1)
    for source in (PAIRS, pd.read_csv(path)):
        encode_examples(source, chain.model, chain)
    assert not folder.exists() or not list(folder.iterdir())


def test_small_files_are_not_kept_and_a_switch_keeps_none(tmp_path, folder, monkeypatch, make_chain):
    path, chain = table(tmp_path), make_chain()
    monkeypatch.setenv(cache.SWITCH, "off")
    encode_examples(path, chain.model, chain)
    monkeypatch.delenv(cache.SWITCH)
    monkeypatch.setattr(cache, "SMALLEST", 2**20)
    encode_examples(path, chain.model, chain)
    assert not folder.exists()


def test_a_disk_that_cannot_be_written_to_changes_nothing(tmp_path, folder, make_chain):
    path, chain = table(tmp_path), make_chain()
    folder.parent.parent.mkdir()
    folder.parent.write_text("no folder")
    assert encode_examples(path, chain.model, chain).report.used == len(PAIRS)


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path, folder, monkeypatch, make_chain):
    path, chain = table(tmp_path), make_chain()
    place = cache.place_of(encoding.Mapped.of(path), chain.model, chain, None)
    found = encode_examples(PAIRS, chain.model, chain)
    os.utime(path, (1, 1))
    place.save(tuple(getattr(found, name) for name in ARRAYS), found.report, "")
    assert not folder.exists()


def test_both_sides_of_a_split_are_kept_apart(tmp_path, folder, made, make_chain):
    path, chain = table(tmp_path), make_chain()
    sides = [encode_examples(side, chain.model, chain) for side in divide(path, chain, Split(0.4), 0, "a")]
    count = len(made)
    again = [encode_examples(side, chain.model, chain) for side in divide(path, chain, Split(0.4), 0, "a")]
    assert len(made) == count == len(PAIRS)
    assert all(map(same, sides, again))
    other = [encode_examples(side, chain.model, chain) for side in divide(path, chain, Split(0.4), 1, "a")]
    assert not all(map(same, sides, other))
    assert len(list(folder.iterdir())) == 6  # two sides each, and which rows they have


SPLITS = {
    "share": Split(0.4), "key": Split(0.4, by="id"), "time": Split(0.4, time="id"), "after": Split(time="id", after=6),
    "function": Split(0.4, by=lambda row: row["id"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_a_second_start_divides_without_reading(name, tmp_path, monkeypatch, make_chain):
    """Which rows are held out is known; a look at the first is taken, and what is code is asked anew."""
    rows_read = []
    split, placed = SPLITS[name], sides.placed_examples

    def counting(*args, **options):
        for item in placed(*args, **options):
            rows_read.append(item)
            yield item

    monkeypatch.setattr(sides, "placed_examples", counting)
    monkeypatch.setattr(sides, "_LOOKED_AT", 2)
    path, found = table(tmp_path), []
    for count in (len(PAIRS), len(PAIRS) if name == "function" else 2):
        rows_read.clear()
        train, apart = divide(path, make_chain(), split, 0, "a")
        assert len(rows_read) == count
        found.append([(side.marks, [e.inputs for e in read_examples(side, make_chain())]) for side in (train, apart)])
    assert found[0] == found[1]
    assert [inputs for _, inputs in found[0]][1]


def test_what_decides_sides_is_in_the_key(tmp_path, folder, made, make_chain):
    path, chain = table(tmp_path), make_chain()
    other = make_chain(prompt="Say in French: {text}\n")
    cases = [(chain, Split(0.4), 0), (chain, Split(0.4), 1), (chain, Split(0.5), 0), (other, Split(0.4), 0)]
    cases += [(chain, Split(0.4, by="id"), 0), (chain, Split(0.4, time="id"), 0), (chain, Split(0.4, seed=2), 0)]
    for count, (prompt, split, seed) in enumerate(cases, start=1):
        train, _ = divide(path, prompt, split, seed, "a")
        assert len(list(folder.iterdir())) == count
        assert train.marks == divide(pd.read_csv(path), prompt, split, seed, "a")[0].marks
    divide(path, chain, Split(0.4, seed=2), 5, "a")
    assert len(list(folder.iterdir())) == len(cases)


def test_sides_that_begin_otherwise_are_found_anew(tmp_path, monkeypatch, make_chain):
    path = table(tmp_path)
    first = divide(path, make_chain(), Split(0.4), 0, "a")[0].marks
    monkeypatch.setattr(sides, "position", lambda key, seed: position(key, seed + 1))
    changed = divide(path, make_chain(), Split(0.4), 0, "a")[0].marks
    assert changed == divide(pd.read_csv(path), make_chain(), Split(0.4), 0, "a")[0].marks != first


def test_an_error_names_the_file_and_the_line_of_this_start(tmp_path, folder, make_chain):
    """The same bytes under another name: out of the cache comes this file's, not the former's."""
    rows = [*PAIRS, ("a", "x STOP y")]
    for name in ("hospital.csv", "mine.csv"):
        path, chain = table(tmp_path, rows, name), make_chain(stop=["STOP"])
        place = rf"example {len(PAIRS)} \({name}, line {len(PAIRS) + 2}\): "
        with pytest.raises(UnsayableError, match=f"The first: {place}") as error:
            encoding.encoded(path, chain.model, chain, None, tolerance=0.01)
        assert "hospital" not in str(error.value) or name == "hospital.csv"
    assert len(list(folder.iterdir())) == 1


def test_both_sides_are_kept_where_columns_are_mapped(tmp_path, folder, made, make_chain):
    """The held-out side as the training one: not read into a list of texts."""
    path = tmp_path / "a.csv"
    pd.DataFrame(PAIRS, columns=["english", "french"]).to_csv(path, index=False)
    options = {"columns": {"text": "english", "completion": "french"}, "evaluation": 0.4, "progress": False}
    for _ in range(2):
        fed = FederatedAveraging(make_chain(), participants={"a": path}, lr=1e-3, samples=0, **options)
        data = fed._peers["a"].data
        assert len(data.train()) + len(data.held_out()) == len(PAIRS)
        assert not isinstance(data._sampled, list)
        assert len(made) == len(PAIRS)


def test_what_nobody_has_used_for_long_is_removed(tmp_path, folder, make_chain):
    path, chain = table(tmp_path), make_chain()
    folder.mkdir(parents=True)
    for name in ("old.ids", ".left.ids-0123456789abcdef", "other.txt"):
        (folder / name).write_text("")
        os.utime(folder / name, (1, 1))
    encode_examples(path, chain.model, chain)
    assert {p.suffix for p in folder.iterdir()} == {".ids", ".txt"}
    assert len(list(folder.iterdir())) == 2
