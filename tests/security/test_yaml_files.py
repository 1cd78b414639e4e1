"""Recipes, federation files and chain.yaml that somebody else wrote: options in their ranges, or one error.

Belongs here: the files as a whole, with hostile values in every place. Does not: the reader alone (test_untrusted).
"""

import tempfile
from pathlib import Path

import pytest
import yaml
from bounded import bounded, within
from corpus.yaml_files import LARGE, VALUES, WHOLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import untrusted
from llmchain_fed.chain.saving import directory
from llmchain_fed.errors import ChainFileError, ConfigError, RecipeError
from llmchain_fed.library import read_spec
from llmchain_fed.recipes.prompts import make_prompt
from llmchain_fed.recipes.schema import ChainSpec, PromptSpec
from llmchain_fed.runtimes.federation_file import FederationFile

FEDERATION = """\
chain: translate
hub: {admin: kits/admin, sites: [a, b], patience: 8}
out: out
rounds: 2
checkpoint_dir: checkpoints
keep_checkpoints: 2
aggregation: fedavg
codec: int8
broadcast_codec: bf16
server_optimizer: {class: FedAdam, lr: 0.01}
personal: {lam: 0.1}
training: {learning_rate: 5e-3, batch_size: 2, epochs: 2}
participants_per_round: 0.5
quorum: 1
deadline: 60
retries: 1
weighting: examples
samples: 1
seed: 3
"""
PROMPT = """\
name: it
description: Says hello.
template: "Greet {who} {how}."
input_variables: [who]
defaults: {how: well}
prefix: "Examples\\n"
examples: [{a: b}]
example_template: "{a}"
separator: "\\n"
licence: MIT
"""
CHAIN = """\
name: it
description: Says hello.
prompt: greet
model: smollm2-135m-instruct
adapter: {r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q_proj]}
generation: {max_new_tokens: 5, temperature: 0.5, top_p: 0.9, top_k: 3, num_beams: 1, repetition_penalty: 1.5, seed: 1}
stop: ["x"]
parser: json
chat_template_kwargs: {thinking: false}
"""
SAVED = yaml.safe_dump(
    {
        "format": 3,
        "llmchain_fed": "1",
        "face": "llm",
        "options": {"max_new_tokens": 3},
        "llm_kwargs": {"stop": ["a"]},
        "prompt": {"kind": "template", "template": "{text}"},
        "parser": "text",
        "model": {
            "name": "m",
            "reference": "some/model",
            "fingerprint": "f",
            "digest": "d",
            "dtype": "float32",
            "kind": "causal",
            "vocabulary": 3,
            "config": {"a": 1},
            "generation": {"top_k": 3},
            "trained": {"r": 1, "lora_alpha": 2, "rank_pattern": {"a": 2}, "alpha_pattern": {}},
        },
        "files": {},
    }
)
SPECIAL = (
    "\x85\u2028\u2029\ufeff\u200e\u202e\t\r\n\x0b\x0c\x1c\x7f\x80\x9f\xa0\xad\ufffe\uffff\U0001f600"
    "'\"\\:#-?!&*|>%@`{}[], \x00\x07\x1b"
)


def read(kind, folder, text):
    """As each of the four kinds of files is read; the value, or the error's message."""
    file = Path(folder) / ("chain.yaml" if kind == "saved" else "it.yaml")
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    error = {"federation": ConfigError, "saved": ChainFileError}.get(kind, RecipeError)
    with within(5):
        try:
            if kind == "federation":
                return FederationFile.read(file)
            if kind == "saved":
                return directory._parse(file)
            found = read_spec(PromptSpec if kind == "prompt" else ChainSpec, "it", Path(folder))
            if kind == "prompt":
                make_prompt(found)
            return found
        except error as refused:
            told = str(refused)
    assert 20 < len(told) < 3000, told
    assert untrusted.printable(told, 5000) == told
    return told


GOOD = {"federation": FEDERATION, "prompt": PROMPT, "chain": CHAIN, "saved": SAVED}


def places(data, at=()):
    """Where a value stands in plain data."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def replaced(data, place, value):
    """The file with another value in one place, as YAML's own text."""
    mark = "MARK-OF-THE-VALUE"
    copy = yaml.safe_load(yaml.safe_dump(data))
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = mark
    return yaml.safe_dump(copy, width=10**6, default_flow_style=True).replace(mark, value)


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_file_is_good(kind, tmp_path):
    assert not isinstance(read(kind, tmp_path, GOOD[kind]), str)


@bounded(seconds=60, megabytes=700)
def test_whole_files_of_any_kind_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        for kind in GOOD:
            for name, text in WHOLE.items():
                assert isinstance(read(kind, folder, text), str), (kind, name)


@bounded(seconds=120, megabytes=700)
def test_every_value_in_every_place_is_an_option_or_one_error():
    with tempfile.TemporaryDirectory() as folder:
        for kind, good in GOOD.items():
            data = yaml.safe_load(good)
            for number, place in enumerate(places(data)):  # a third of the values in each, every one in some place
                values = [*VALUES.values()][number % 3 :: 3] + ([] if number % 9 else [*LARGE.values()])
                for value in values:
                    read(kind, folder, replaced(data, place, value))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("server_optimizer: {class: [FedAdam]}", "server_optimizer: `class` is"),
        ("server_optimizer: {class: TorchServerOptimizer}", "which torch.optim does not have"),
        ("server_optimizer: {lr: 1}", "server_optimizer: `class` is None"),
        ("server_optimizer: {class: os.system}", "pass server_optimizer= again"),
        ("rounds: 10000000000", "`rounds`"),
        ("deadline: 1e300", "`deadline`"),
        ("codec: [int8]", "`codec`"),
        ("out: " + "x" * 5000, "`out`"),
    ],
)
def test_what_a_federation_file_may_not_say(change, wanted, tmp_path):
    kept = [line for line in FEDERATION.splitlines() if not line.startswith(change.split(":")[0] + ":")]
    assert wanted in read("federation", tmp_path, "\n".join([*kept, change]))


# --- what is written is read ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(codec="utf-8")), max_size=30),
    st.text(st.sampled_from(SPECIAL), max_size=30),
)
def test_texts_of_any_letters_come_back_as_they_are(one, two):
    data = {"a": one, "b": [two, {"c": one + two}], "d": (one,)}
    text = untrusted.dump_yaml(data, what="it", error=ChainFileError)
    assert untrusted.parse_yaml(text.encode(), what="it", error=ChainFileError) == data | {"d": [one]}


NUMBERS = st.from_regex(r"\A[-+]?[0-9_.]{0,4}[eE]?[-+]?[0-9_]{0,3}\n?\Z")


@settings(max_examples=500, deadline=None, database=None)
@given(
    NUMBERS | st.sampled_from(["1e5", "1E5", "-1e-2", "+.5e3", "1.e3", "1e999", "1_0e5", "1e", "e5", "1e5\n", ".e3"])
)
def test_texts_that_look_like_numbers_stay_texts(one):
    text = untrusted.dump_yaml({"a": one, one: [one]}, what="it", error=ChainFileError)
    assert untrusted.parse_yaml(text, what="it", error=ChainFileError) == {"a": one, one: [one]}


@settings(max_examples=200, deadline=None, database=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_stay_numbers(number):
    text = untrusted.dump_yaml({"a": number}, what="it", error=ChainFileError)
    assert untrusted.parse_yaml(text, what="it", error=ChainFileError) == {"a": number}


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-2", 0.01),
        ("5e-4", 5e-4),
        ("1e3", 1e3),
        ("-2E+1", -20.0),
        ("1.5e3", 1500.0),
        (".5e1", 5.0),
    ],
)
def test_powers_of_ten_are_numbers(written, number):
    assert untrusted.parse_yaml(f"a: {written}", what="it", error=ConfigError) == {"a": number}
    assert untrusted.parse_yaml(f"a: '{written}'", what="it", error=ConfigError) == {"a": written}


def test_a_power_of_ten_that_is_not_finite_is_refused():
    with within(5), pytest.raises(ConfigError, match="1e999 in line 1 is not finite"):
        untrusted.parse_yaml("a: 1e999", what="it", error=ConfigError)
    with within(5), pytest.raises(ConfigError, match="in line 1 is not finite"):
        untrusted.parse_yaml("a: " + "9" * 900_000 + "e5", what="it", error=ConfigError)


def test_keys_come_back_as_well_and_readable_texts_stay_readable():
    for key in ("\x85", "yes", "1", "", "2020-01-01", "é", "<<", "~"):
        text = untrusted.dump_yaml({key: None}, what="it", error=ChainFileError)
        assert untrusted.parse_yaml(text, what="it", error=ChainFileError) == {key: None}
    assert "Übersetze 日本語" in untrusted.dump_yaml({"a": "Übersetze 日本語"}, what="it", error=ChainFileError)


def test_what_occurs_twice_is_written_twice():
    shared = ["stop"]
    text = untrusted.dump_yaml({"a": shared, "b": shared}, what="it", error=ChainFileError)
    assert untrusted.parse_yaml(text, what="it", error=ChainFileError) == {"a": ["stop"], "b": ["stop"]}


def within_itself():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, 2**63, float("inf"), "\ud800", within_itself(), {"a"}, b"a", "x" * 2**20, 1j],
    ids=range(10),
)
def test_what_no_file_can_store_is_refused_when_it_is_written(value):
    with pytest.raises(ChainFileError, match=r"^the options ") as error:
        untrusted.dump_yaml({"a": value}, what="the options", error=ChainFileError, remedy="Leave it out.")
    assert len(str(error.value)) < 600
